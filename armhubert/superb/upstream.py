"""What is evaluated: a frozen upstream that turns waveforms into the features of its layers.

Encoders (students, teachers of every format that `load_weights` takes), the baselines `fbank`, `fbank_no_cmvn` and
`mfcc` as s3prl computes them, and anything a user's `module:function` returns. Features of an utterance do not depend
on its batch.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armhubert.config import SAMPLE_RATE
from armhubert.convert import load_weights
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError, brief
from armhubert.kernels.runtime import frame_mask
from armhubert.packages import import_torchaudio
from armhubert.student import ARMHuBERT
from armhubert.teacher import fingerprint

FeatureChoice = Literal["auto", "hidden", "heads"]


class States(NamedTuple):
    """Features of a batch."""

    layers: Tensor
    """[L, B, T, D], zero beyond each length."""
    lengths: Tensor
    """Valid frames [B], int64."""


class Upstream(ABC):
    """A frozen feature extractor."""

    source: str
    """Name that the user gave."""
    identity: str
    """Digest of everything that its features depend on: weights, configuration, choice of features."""
    parameters: int
    features: str
    """hidden, heads, or the baseline's name."""
    count: int
    """L, the layers that are weighted."""
    width: int
    """D."""
    hop: int
    """Samples between two frames."""

    @abstractmethod
    def frames(self, samples: int) -> int:
        """Frames that so many samples give, to plan with: at least one, since short waveforms are padded."""

    @abstractmethod
    def __call__(self, waveforms: Tensor, lengths: Tensor) -> States:
        """Waveforms [B, S] at 16 kHz and their valid samples [B] -> features, without gradients."""


def load_upstream(source: str, *, features: FeatureChoice = "auto", device: torch.device | str = "cpu") -> Upstream:
    """The upstream that `source` names.

    Args:
        source: `fbank`, `fbank_no_cmvn`, `mfcc`, `module:function` or `file.py:function` (see `CustomUpstream`), or a
            model: whatever `armhubert.convert.load_weights` takes.
        features: of models: `hidden` are the L + 1 hidden states, `heads` the outputs of a student's heads, `auto`
            the heads where there are any, as the released students were evaluated.
        device: where it goes.

    Raises:
        ArmhubertError: nothing usable at `source`, or features that it does not have.
    """
    if source in BASELINES:
        _refuse_heads(source, features)
        return Baseline(source, device)
    if names_code(source):
        _refuse_heads(source, features)
        module, _, function = source.rpartition(":")
        return CustomUpstream(source, _make(module, function), device)
    weights = load_weights(source)
    has_heads = weights.config.projection_width is not None
    if features == "heads" and not has_heads:
        raise ArmhubertError(f"features 'heads' need a student with heads, {source} has none: use features='hidden'")
    if has_heads and features != "hidden":
        return EncoderUpstream(source, ARMHuBERT.from_weights(weights, device=device), "heads")
    model = SpeechEncoder.from_weights(weights.without_heads(), device=device)
    return EncoderUpstream(source, model, "hidden")


def names_code(source: str) -> bool:
    """Whether `load_upstream` would import and call what `source` names."""
    _, colon, function = source.rpartition(":")
    return bool(colon) and function.isidentifier() and not Path(source).exists()


def _refuse_heads(source: str, features: FeatureChoice) -> None:
    if features == "heads":
        raise ArmhubertError(f"features 'heads' need a student with heads, {source} has none: use features='auto'")


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class EncoderUpstream(Upstream):
    """A student or teacher."""

    def __init__(self, source: str, model: SpeechEncoder, features: Literal["hidden", "heads"]) -> None:
        self.source, self.model, self.features = source, model.eval().requires_grad_(False), features
        config = model.config
        self.count = config.layers if features == "heads" else config.layers + 1
        self.width = (config.projection_width or 0) if features == "heads" else config.width
        self.hop = config.hop
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        more = ("after the final norm",) if config.norm_first and features == "hidden" else ()
        self.identity = _digest(fingerprint(model), dataclasses.asdict(config), features, *more)

    def frames(self, samples: int) -> int:
        """By the convolutions' arithmetic."""
        return int(self.model.config.frames(max(samples, self.model.config.receptive_field)))

    @torch.no_grad()
    def __call__(self, waveforms: Tensor, lengths: Tensor) -> States:
        """Hidden states or head outputs."""
        least = self.model.config.receptive_field
        waveforms = F.pad(waveforms, (0, max(0, least - waveforms.shape[1])))
        lengths = lengths.clamp(min=least)
        whole = bool((lengths == waveforms.shape[1]).all())
        if not whole and self.model.config.padding == "as_trained":  # where padding changes features
            alone = [self(wave[None, :n], n[None]) for wave, n in zip(waveforms, lengths, strict=True)]
            rows = nn.utils.rnn.pad_sequence([states.layers[:, 0].transpose(0, 1) for states in alone])
            return States(rows.permute(2, 1, 0, 3), torch.cat([states.lengths for states in alone]))
        output = self.model(waveforms, None if whole else lengths)
        hidden = (
            *output.hidden_states[:-1],
            output.last_hidden_state,
        )  # of the last, s3prl takes what leaves the encoder
        layers = torch.stack(output.projections if self.features == "heads" else hidden)
        return _masked(layers.float(), output.lengths)


def _masked(layers: Tensor, lengths: Tensor) -> States:
    return States(layers * frame_mask(lengths, layers.shape[2])[..., None], lengths)


# ---- baselines -------------------------------------------------------------

BASELINES: dict[str, dict[str, Any]] = {
    "fbank": {"num_mel_bins": 80, "use_log_fbank": True},
    "fbank_no_cmvn": {"num_mel_bins": 80, "use_log_fbank": True},
    "mfcc": {"num_ceps": 13},
}
"""s3prl's upstreams of these names. Where a task pools over time with linear maps alone (ks, sid, ic, er), `fbank` and
`mfcc` tell nothing: after normalisation every utterance has the same mean. `fbank_no_cmvn` is the baseline there."""

_WINDOW, _SHIFT = 400, 160


class Baseline(Upstream):
    """Kaldi's log-mel filter bank (80) or MFCC (13), 25 ms every 10 ms, no dither; with two orders of deltas over 5
    frames (240 or 39 dimensions), then, but for `no_cmvn`, normalised to mean 0 and deviation 1 over the utterance.
    One layer."""

    def __init__(self, name: str, device: torch.device | str) -> None:
        self.source = self.features = name
        self.device = torch.device(device)
        kind, self.normalize = name.partition("_")[0], not name.endswith("no_cmvn")
        self.extract = getattr(import_torchaudio("torchaudio.compliance.kaldi"), kind)
        self.settings = {"sample_frequency": SAMPLE_RATE, "frame_length": 25.0, "frame_shift": 10.0, **BASELINES[name]}
        self.count, self.hop, self.parameters = 1, _SHIFT, 0
        self.width = 3 * (80 if kind == "fbank" else 13)
        self.identity = _digest(name, self.settings, "deltas 2x5, 1")

    def frames(self, samples: int) -> int:
        """Kaldi's count with whole windows only."""
        return (max(samples, _WINDOW) - _WINDOW) // _SHIFT + 1

    @torch.no_grad()
    def __call__(self, waveforms: Tensor, lengths: Tensor) -> States:
        """Every utterance by itself."""
        rows = []
        for waveform, length in zip(waveforms, lengths.tolist(), strict=True):
            valid = waveform[:length]
            rows.append(self.one(F.pad(valid, (0, max(0, _WINDOW - length)))))
        layers = nn.utils.rnn.pad_sequence(rows, batch_first=True)[None]
        return States(layers, torch.tensor([len(row) for row in rows], device=layers.device))

    def one(self, waveform: Tensor) -> Tensor:
        """[S] -> [T, D]."""
        compute_deltas = import_torchaudio("torchaudio.functional").compute_deltas
        x = self.extract(waveform[None], **self.settings)
        first = compute_deltas(x.T[None], win_length=5)
        second = compute_deltas(first, win_length=5)
        x = torch.cat([x, first[0].T, second[0].T], dim=1)
        if not self.normalize:
            return x
        if len(x) < 2:
            return torch.zeros_like(x)  # one frame has no deviation
        return (x - x.mean(0)) / (1e-10 + x.std(0))


# ---- a user's own ----------------------------------------------------------


class CustomUpstream(Upstream):
    """Whatever a user's function returns: an object that is called with waveforms [B, S] and valid samples [B].

    It returns its layers, a sequence of L tensors [B, T, D], and the valid frames [B]; `hop` (samples a frame, default
    320) is read from it. Its features are keyed by the parameters of the torch module that it is, or by its attribute
    `identity`; without either, they are not cached.
    """

    def __init__(self, source: str, function: Any, device: torch.device | str) -> None:
        if not callable(function):
            raise ArmhubertError(
                f"{source} must return a callable (waveforms, lengths) -> (layers, lengths), not a "
                f"{type(function).__name__}"
            )
        self.source, self.features, self.function = source, "custom", function
        self.hop = int(getattr(function, "hop", 320))
        self.parameters = 0
        identity = getattr(function, "identity", None)
        if isinstance(function, nn.Module):
            function.eval().requires_grad_(False).to(device)
            self.parameters = sum(parameter.numel() for parameter in function.parameters())
            identity = identity or fingerprint(function)
        self.identity = _digest(source, str(identity)) if identity else ""
        self.device = torch.device(device)
        probe = self._call(torch.zeros(1, SAMPLE_RATE, device=device), torch.tensor([SAMPLE_RATE], device=device))
        self.count, self.width = probe.layers.shape[0], probe.layers.shape[3]

    def frames(self, samples: int) -> int:
        """By the hop, rounded up: to ask the function would be to run it for every length."""
        return -(-samples // self.hop)

    def __call__(self, waveforms: Tensor, lengths: Tensor) -> States:
        """The user's features, checked."""
        return self._call(waveforms, lengths)

    @torch.no_grad()
    def _call(self, waveforms: Tensor, lengths: Tensor) -> States:
        try:
            layers, frames = self.function(waveforms, lengths)
            stacked = torch.stack([layer.float() for layer in layers])
            frames = torch.as_tensor(frames, device=stacked.device).long()
            if stacked.ndim != 4 or frames.shape != stacked.shape[1:2] or int(frames.max()) > stacked.shape[2]:
                raise ValueError(f"got layers {list(stacked.shape)} and lengths {frames.tolist()[:4]}")
        except Exception as error:
            raise ArmhubertError(
                f"{self.source} must return (L tensors [B, T, D] of one shape, valid frames [B]): {_reason(error)}"
            ) from error
        return _masked(stacked, frames)


def _make(module: str, function: str) -> Any:
    try:
        if module.endswith(".py"):
            # Under no name that an import could mean.
            spec = importlib.util.spec_from_file_location(f"armhubert upstream {Path(module).stem}", module)
            assert spec is not None
            assert spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = loaded  # where dataclasses look up what annotations name
            try:
                spec.loader.exec_module(loaded)
            except BaseException:
                del sys.modules[spec.name]
                raise
        else:
            loaded = importlib.import_module(module)
        make = getattr(loaded, function)
    except Exception as error:  # a stranger's module may raise anything
        raise ArmhubertError(
            f"upstream {module}:{function} cannot be imported ({_reason(error)}): "
            "name an importable module, or a file.py:function"
        ) from error
    try:
        return make()
    except Exception as error:
        raise ArmhubertError(
            f"upstream {module}:{function}() fails ({_reason(error)}): it must return the model when called without "
            "arguments"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {brief(error)}"
