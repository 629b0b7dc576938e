"""The frozen teacher and its two views of a batch."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from armhubert.convert import load_weights
from armhubert.encoder import SpeechEncoder


def load_teacher(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SpeechEncoder:
    """A frozen teacher in eval mode; `source` as `armhubert.convert.load_weights` takes it.

    Raises:
        ArmhubertError: nothing usable at `source`.
    """
    weights = load_weights(source).without_heads()
    return SpeechEncoder.from_weights(weights, dtype=dtype, device=device).requires_grad_(False)


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
) -> tuple[Tensor, ...]:
    """What each student layer is to predict (method: masking distillation).

    Both views share everything before the mask and go through the Transformer as one batch; of each layer only the
    view that a frame needs is kept, and nothing past the last needed layer runs.

    Args:
        teacher: frozen encoder.
        waveforms: [B, S].
        lengths: valid samples [B]; None: all.
        mask: [B, T] bool, the student's masked frames; None: the clean view only.
        layers: 1-based teacher layers, ascending; a layer may be named more than once.

    Returns:
        One [B, T, D_t] for each of `layers`: the clean view where `mask`, the masked view elsewhere.
    """
    x, frames = teacher.embed(waveforms, lengths)
    views = teacher.layer_inputs(x, frames, None)
    if mask is not None:
        views = torch.cat([views, teacher.layer_inputs(x, frames, mask)])
        frames = None if frames is None else frames.repeat(2)
    kept: dict[int, Tensor] = {}
    for number, hidden in enumerate(teacher.layer_outputs(views, frames), start=1):
        if number in layers:
            kept[number] = hidden if mask is None else torch.where(mask[..., None], *hidden.chunk(2))
        if number == max(layers):
            break
    return tuple(kept[number] for number in layers)
