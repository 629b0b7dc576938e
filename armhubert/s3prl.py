"""A student as an s3prl upstream, for its SUPERB recipes: nothing is copied into s3prl.

    import armhubert.s3prl
    armhubert.s3prl.register()                       # s3prl.hub now has "armhubert_local"
    upstream = s3prl.nn.S3PRLUpstream("armhubert_local", path_or_url="runs/demo")

s3prl calls an upstream with a list of waveforms and reads `hidden_states` from what comes back (its
upstream/example/expert.py documents it); no class of s3prl's is needed for that, so this module imports none.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from armhubert.errors import ArmhubertError
from armhubert.student import ARMHuBERT

NAME = "armhubert_local"
"""What s3prl's `--upstream` and `S3PRLUpstream` call it: theirs, for one that takes a checkpoint's path."""


class UpstreamExpert(nn.Module):
    """The upstream.

    Args:
        ckpt: what `ARMHuBERT.from_pretrained` takes: a folder, a hub id, a released `student.ckpt`.
        model_config: s3prl's `--upstream_model_config`; must be None, since checkpoints here carry their configuration.
        refresh: s3prl asks for a new download; nothing is downloaded here but by huggingface_hub, which looks itself.
        settings: for `ARMHuBERT.from_pretrained`.

    Raises:
        ArmhubertError: nothing usable at `ckpt`, or a `model_config`.
    """

    def __init__(
        self, ckpt: str | Path | None = None, model_config: Any = None, refresh: bool = False, **settings: Any
    ) -> None:
        super().__init__()
        if ckpt is None:
            raise ArmhubertError("the upstream needs a checkpoint: give ckpt (s3prl: -k, path_or_url) a folder or file")
        if model_config is not None:
            raise ArmhubertError(
                f"model_config must be left out, got {model_config!r}: a folder holds its config.json, and a released "
                "checkpoint is read with the .yaml beside it"
            )
        self.model = ARMHuBERT.from_pretrained(ckpt, **settings)

    def get_downsample_rates(self, key: str) -> int:
        """Samples a frame of the features called `key`."""
        return self.model.config.hop

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Features of waveforms [S_i] at 16 kHz; an utterance's do not depend on the others, unless the model has
        `padding="as_trained"`.

        Returns:
            `hidden_states`, the input of layer 0 and every layer's output, L + 1 tensors [B, T, D] padded to the
            longest, the last after the final norm of a model that has one, as s3prl takes it; `last_hidden_state`
            [B, T, D]; and where the student has heads `projections`, L tensors [B, T, D_t], on which the authors'
            released students were evaluated (s3prl: `-s projections`).

        Raises:
            ArmhubertError: no list of tensors [S], or one of fewer samples than a frame needs (400 in released models).
        """
        if isinstance(wavs, Tensor) or not wavs or not all(isinstance(wav, Tensor) and wav.ndim == 1 for wav in wavs):
            raise ArmhubertError("wavs must be a list of tensors [S], one or more: give a batch [B, S] as list(batch)")
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        output = self.model(pad_sequence(wavs, batch_first=True), lengths)
        hidden_states = [*output.hidden_states[:-1], output.last_hidden_state]
        features = {"hidden_states": hidden_states, "last_hidden_state": output.last_hidden_state}
        return features if output.projections is None else features | {"projections": list(output.projections)}


def register(name: str = NAME) -> None:
    """Make `name` an upstream of the installed s3prl, in this process.

    Raises:
        ArmhubertError: s3prl is not installed, or an upstream of this name is there already.
    """
    try:
        import s3prl.hub
    except ImportError as error:
        raise ArmhubertError(f"s3prl cannot be imported ({error}): install it in this environment") from None
    if getattr(s3prl.hub, name, UpstreamExpert) is not UpstreamExpert:
        raise ArmhubertError(f"s3prl has an upstream {name!r} of its own: choose another name")
    setattr(s3prl.hub, name, UpstreamExpert)
