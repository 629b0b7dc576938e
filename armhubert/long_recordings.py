"""Hours of audio in bounded memory: overlapping windows; their features equal the whole file's, except in attention.

    pass 1: the file's mean and variance, and the covariance of the first convolution's windows (float64, streamed)
    pass 2: samples -> front end with those statistics -> positional convolution -> Transformer, window by window

Everything up to the input of layer 0 equals the whole file's to rounding: the convolutions have no padding, and the
only statistics over time are taken in pass 1. The Transformer attends within its window; of each window the frames that
have `context_seconds` on both sides (or the file's end) are kept.

What that changes, measured with the bundled teacher on 240 s of read speech (LibriSpeech 1088-134315) against one pass
over all of it, as relative L2 difference: input of layer 0 under 1e-5; last layer 8 % with windows of 20 s, 6 % of
30 s, 4 % of 60 s, 3 % of 120 s. It is as large in the middle of a window as where windows meet, and a context of 2 s or
of 10 s gives the same: attention over 12,000 frames is spread wider than over 3,000. Neither is what such models were
trained on (crops of about 15 s), so no pass is the right one; what was chosen is recorded beside the features.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from armhubert.audio import read_audio
from armhubert.config import SAMPLE_RATE
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.kernels import Moments

Read = Callable[[int, int], Tensor]
"""(first sample, count) -> float32 [count] at 16 kHz."""

_PIECE_FRAMES = 500  # the front end is the widest part of the model: 10 s of it at a time
_BLOCK_SAMPLES = 1 << 18


class Window(NamedTuple):
    """One window of a recording, ready for the Transformer."""

    inputs: Tensor
    """Input of layer 0, [1, C, D]."""
    start: int
    """Frame of the recording where the kept part begins; the parts follow each other without a gap."""
    keep: slice
    """The kept part of the window."""


def open_recording(path: str | Path, samples: int) -> Read:
    """A reader of parts of an audio file of `samples` samples at 16 kHz.

    wav and flac are read where they lie; mp3 and Ogg (Vorbis, Opus) are decoded once into memory, 0.23 GB an hour at
    16 kHz, since their decoders do not seek exactly.
    """
    if Path(path).suffix.lower() in (".wav", ".flac"):
        return lambda start, count: read_audio(path, start, count)
    wave = read_audio(path, 0, samples)
    return lambda start, count: wave[start : start + count]


def windows(
    model: SpeechEncoder, read: Read, samples: int, *, chunk_seconds: float, context_seconds: float
) -> Iterator[Window]:
    """The windows of a recording, in order: the front end runs once over every sample.

    Args:
        model: in eval mode.
        read: parts of the recording.
        samples: its length at 16 kHz.
        chunk_seconds: length of a window; a recording that is no longer is one window, and exact.
        context_seconds: what each window shares with its neighbours on either side.

    Raises:
        ArmhubertError: fewer samples than a frame needs, or a context that leaves nothing of a window.
    """
    config = model.config
    if samples < config.receptive_field:
        raise ArmhubertError(f"a recording must have at least {config.receptive_field} samples, got {samples}")
    check_windows(chunk_seconds, context_seconds, config.hop)
    size = round(chunk_seconds * SAMPLE_RATE / config.hop)
    context = round(context_seconds * SAMPLE_RATE / config.hop)
    total: int = config.frames(samples)
    reach = config.position_kernel // 2  # frames on either side that the positional convolution looks at
    statistics = _statistics(model, read, samples)
    pending = torch.empty(0)  # [1, n, D]: frames `first` .. `first + n` of the front end's output
    first = done = kept = 0
    while kept < total:
        begin = max(0, min(kept - context, total - size))
        end = min(total, begin + size)
        stop = total if end == total else end - context
        low, high = max(0, begin - reach), min(total, end + reach)
        parts = [pending[:, low - first :]] if done > low else []
        while done < high:
            until = min(high, done + _PIECE_FRAMES)
            parts.append(_embed(model, read, statistics, done, until))
            done = until
        pending, first = torch.cat(parts, 1), low
        inputs = _layer_inputs(model, pending, begin - low, end - low)
        yield Window(inputs, kept, slice(kept - begin, stop - begin))
        kept = stop


def check_windows(chunk_seconds: float, context_seconds: float, hop: int = 0) -> None:
    """Raise ArmhubertError where windows of `chunk_seconds` have nothing left between two contexts, rounded to frames
    that begin `hop` samples apart."""
    least = max(0.1, 2 * hop / SAMPLE_RATE)
    if not (context_seconds >= 0 and 2 * context_seconds + least <= chunk_seconds):
        raise ArmhubertError(
            f"chunk_seconds must exceed twice context_seconds by {least:g} or more, got {chunk_seconds:g} and "
            f"{context_seconds:g}: choose longer chunks or less context"
        )


@torch.inference_mode()
def _embed(model: SpeechEncoder, read: Read, statistics: "_Statistics", begin: int, end: int) -> Tensor:
    """Frames `begin` to `end` of the front end, [1, n, D]."""
    count = (end - begin - 1) * model.config.hop + model.config.receptive_field
    waveform = _waveform(model, read, begin * model.config.hop, count, statistics.mean, statistics.scale)
    return model.project(model.front_end(waveform, None, statistics.moments))


@torch.inference_mode()
def _layer_inputs(model: SpeechEncoder, x: Tensor, begin: int, end: int) -> Tensor:
    return model.layer_inputs(x, None, None)[:, begin:end]


# ---- statistics of a whole file, given to its parts ------------------------


class _Statistics(NamedTuple):
    """What a model's front end needs to know of a whole recording."""

    mean: float
    scale: float
    """Normalisation of the waveform, (x - mean) * scale; 0 and 1 where the model does not normalise its input."""
    moments: Moments | None
    """Moments of the first convolution's windows; None where it has no group norm."""


def _statistics(model: SpeechEncoder, read: Read, samples: int) -> _Statistics:
    mean, scale = 0.0, 1.0
    if model.config.normalize_input:
        count, total, squares = 0, 0.0, 0.0
        for start in range(0, samples, _BLOCK_SAMPLES):  # merged as Chan, Golub and LeVeque (1979) do
            block = read(start, min(_BLOCK_SAMPLES, samples - start)).double()
            delta = float(block.mean()) - (total / count if count else 0.0)
            squares += float(block.var(correction=0)) * len(block) + delta**2 * count * len(block) / (
                count + len(block)
            )
            count, total = count + len(block), total + float(block.sum())
        mean, scale = total / count, (squares / count + 1e-7) ** -0.5
    moments: Moments | None = None
    if model.config.conv_norm == "group":
        _, kernel, stride = model.config.conv_layers[0]
        step = _BLOCK_SAMPLES // stride * stride
        for start in range(0, samples - kernel + 1, step):
            length = min(step + kernel - stride, samples - start)
            part = model.front_end.moments(_waveform(model, read, start, length, mean, scale))
            assert part is not None, "there is a group norm"
            moments = part if moments is None else moments.plus(part)
    return _Statistics(mean, scale, moments)


def _waveform(model: SpeechEncoder, read: Read, start: int, count: int, mean: float, scale: float) -> Tensor:
    """[1, count] as the front end takes it."""
    return ((read(start, count)[None] - mean) * scale).to(model.norm.weight)
