"""The frozen teacher and its two views of a batch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from armhubert.convert import load_weights
from armhubert.encoder import SpeechEncoder


class TeacherTargets(NamedTuple):
    """What the student is to predict: one tensor [B, T, D_t] for each of its layers; None where no loss term asks."""

    masking: tuple[Tensor, ...] | None
    """The clean view where the student's frame is masked, the masked view elsewhere."""
    clean: tuple[Tensor, ...] | None
    """The clean view everywhere."""
    clean_inputs: tuple[Tensor, ...] | None
    """Clean view, input of the same teacher layers."""


def load_teacher(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SpeechEncoder:
    """A frozen teacher in eval mode.

    Args:
        source: `mini` (bundled), a folder in Hugging Face's layout (hubert, wav2vec2, wavlm) or ours, a hub id, a
            torchaudio pipeline's name, or a checkpoint file of fairseq, s3prl, Microsoft (WavLM) or torchaudio: see
            `armhubert.convert.load_weights`.
        dtype: of the parameters.
        device: where it goes.

    Raises:
        ArmhubertError: nothing usable at `source`.
    """
    weights = load_weights(source).without_heads()
    return SpeechEncoder.from_weights(weights, dtype=dtype, device=device).requires_grad_(False)


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of all parameters, so that a resumed run notices another teacher under the same name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def layer_mapping(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher layer (1-based) that each student layer learns from: evenly spread, last to last."""
    return tuple(
        max(1, (2 * (i + 1) * teacher_layers + student_layers) // (2 * student_layers)) for i in range(student_layers)
    )


@torch.no_grad()
def teacher_targets(
    teacher: SpeechEncoder,
    waveforms: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    layers: Sequence[int],
    *,
    masking: bool = True,
    clean: bool = False,
    inputs: bool = False,
) -> TeacherTargets:
    """Run the teacher once for every view that the loss needs.

    Both views share everything before the mask and go through the Transformer as one batch; of each layer only the
    view that a frame needs is kept, and nothing past the last needed layer runs.

    Args:
        teacher: frozen encoder.
        waveforms: [B, S].
        lengths: valid samples [B]; None: all.
        mask: [B, T] bool, the student's masked frames; needed for `masking`.
        layers: the teacher layer (1-based) of each student layer, ascending.
        masking: return `TeacherTargets.masking`.
        clean: return `TeacherTargets.clean`.
        inputs: return `TeacherTargets.clean_inputs`.
    """
    x, frames = teacher.embed(waveforms, lengths)
    batch = len(x)
    views = teacher.layer_inputs(x, frames, None)
    if masking:
        assert mask is not None, "the masked view needs a mask"
        views = torch.cat([views, teacher.layer_inputs(x, frames, mask)])
        frames = None if frames is None else frames.repeat(2)
    mixed: dict[int, Tensor] = {}
    plain: dict[int, Tensor] = {0: views[:batch]}
    for number, hidden in enumerate(teacher.layer_outputs(views, frames), start=1):
        if masking and mask is not None and number in layers:
            mixed[number] = torch.where(mask[..., None], hidden[:batch], hidden[batch:])
        if (clean and number in layers) or (inputs and number + 1 in layers):
            plain[number] = hidden[:batch]
        if number == max(layers):
            break
    return TeacherTargets(
        tuple(mixed[n] for n in layers) if masking else None,
        tuple(plain[n] for n in layers) if clean else None,
        tuple(plain[n - 1] for n in layers) if inputs else None,
    )
