"""Read audio files: any rate and channel count become 16 kHz mono float32, the whole file or a part of it.

A part equals the same samples of the whole file: exactly for wav, flac, mp3 and Vorbis, to resampling's rounding at
other rates, and to about 3e-3 for Opus files of more than 30 s, whose decoder carries state over from before the part.
libsndfile 1.2.2 does not give that by itself:

- mp3: soundfile seeks after every read, and an mp3 seek may land anywhere; so there is one read, from the first sample,
  for which an mp3 is in memory whole, all its channels at its own rate.
- Vorbis: a seek into the last page lands on the page's beginning; so the last 30 s are reached by decoding.
"""

import functools
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from armhubert.config import SAMPLE_RATE
from armhubert.errors import ArmhubertError
from armhubert.packages import import_torchaudio

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"})
"""File name endings, in lower case, taken for audio in a folder."""

SILENCE = 1e-5
"""A file whose peak is below this is silent: one 16-bit step is 3e-5."""

_RATES = range(1_000, 1_000_001)  # beyond, the header is wrong, and believing it could cost gigabytes
_BLOCK = 1 << 20  # values decoded at a time: the channels of an hour-long file are never in memory together
_OGG_TAIL_SECONDS = 30  # more than the longest Ogg page of speech
_ZEROS, _ROLLOFF = 6, 0.99  # torchaudio's resampling filter: zero crossings on each side, cut-off
_KERNEL_LIMIT = 1 << 21  # values in torchaudio's filter bank, which grows with rate / gcd(rate, 16000) squared
_DECODE_ERRORS = (soundfile.SoundFileError, OSError, MemoryError, ValueError)


class Measured(NamedTuple):
    """What decoding a whole file showed."""

    samples: int
    """Length at 16 kHz."""
    defect: str
    """Empty for a sound file; else "missing", "empty", "not finite", "silent" or "unreadable: <why>"."""


def measure(path: str | Path) -> Measured:
    """Decode a file once for its exact length at 16 kHz and its defects; mp3 apart, in bounded memory. Never raises."""
    frames, peak = 0, 0.0
    try:
        with _open(path) as file:
            rate = _checked_rate(file)
            for block in _blocks(file, 0, None):
                low, high = float(block.min()), float(block.max())
                if not (math.isfinite(low) and math.isfinite(high)):
                    return Measured(0, "not finite")
                frames, peak = frames + len(block), max(peak, -low, high)
    except FileNotFoundError:
        return Measured(0, "missing")
    except EOFError:
        return Measured(0, "empty")
    except _DECODE_ERRORS as error:
        return Measured(0, f"unreadable: {_why(error)}")
    if not frames:
        return Measured(0, "empty")
    return Measured(_length(frames, rate), "silent" if peak < SILENCE else "")


def read_audio(path: str | Path, start: int = 0, count: int | None = None) -> Tensor:
    """Samples `start` to `start + count` (default: to the end) of a file, at 16 kHz, mixed down to mono.

    Returns float32 [S], nominally in [-1, 1], S = count where it is given. Seeks rather than decoding what is not
    asked for, where that is exact. Raises ArmhubertError where the file is missing, is not readable as audio, or ends
    before `start + count`.
    """
    assert start >= 0, start
    assert count is None or count > 0, count
    try:
        with _open(path) as file:
            wave = _read(file, start, count)
    except FileNotFoundError:
        raise ArmhubertError(f"audio file {str(path)!r} does not exist: check the path") from None
    except EOFError:
        raise ArmhubertError(f"audio file {str(path)!r} is empty: leave it out") from None
    except _DECODE_ERRORS as error:
        raise ArmhubertError(
            f"audio file {str(path)!r} cannot be read ({_why(error)}): convert it to wav or flac, or remove it"
        ) from None
    if count is not None and len(wave) < count:
        raise ArmhubertError(
            f"audio file {str(path)!r} ends after {start + len(wave)} samples at 16 kHz where {start + count} were "
            "expected: it has changed since it was measured; scan the data again"
        )
    return wave


def _read(file: soundfile.SoundFile, start: int, count: int | None) -> Tensor:
    rate = _checked_rate(file)
    if rate == SAMPLE_RATE:
        return torch.from_numpy(_frames(file, start, None if count is None else start + count))
    # The two rates meet every `step_in` frames of the file, `step_out` samples of ours. Resampling from such a meeting
    # point, far enough back for the filter, gives what resampling the whole file would.
    divisor = math.gcd(rate, SAMPLE_RATE)
    step_in, step_out = rate // divisor, SAMPLE_RATE // divisor
    reach = _filter_reach(rate)
    first = max(0, start // step_out - math.ceil(reach / step_in) - 1)
    stop = None if count is None else -(-(start + count) * step_in // step_out) + reach + 1
    wave = resample(torch.from_numpy(_frames(file, first * step_in, stop)), rate)
    wave = wave[start - first * step_out :]
    return wave if count is None else wave[:count]


def resample(wave: Tensor, rate: int) -> Tensor:
    """[S] at `rate` Hz -> [ceil(S * 16000 / rate)] at 16 kHz, by windowed sinc; silence is assumed on both sides."""
    if rate == SAMPLE_RATE or not len(wave):
        return wave
    length = _length(len(wave), rate)
    divisor = math.gcd(rate, SAMPLE_RATE)
    step_in, step_out = rate // divisor, SAMPLE_RATE // divisor
    if step_out * (2 * _filter_reach(rate) + step_in) > _KERNEL_LIMIT:
        return _resample_directly(wave, rate)
    functional = import_torchaudio("torchaudio.functional")  # half a second of import, rarely needed
    # torchaudio computes the length in float32, which is short of the truth for long files: ask for more, then cut.
    wave = F.pad(wave, (0, 64 * step_in))
    resampled: Tensor = functional.resample(wave, rate, SAMPLE_RATE, _ZEROS, _ROLLOFF)
    return resampled[:length]


def _resample_directly(wave: Tensor, rate: int) -> Tensor:
    """The filter of `resample`, evaluated at every sample: for rates such as 44,099 Hz, where a filter bank is GBs."""
    scale = min(1.0, SAMPLE_RATE / rate) * _ROLLOFF  # cut-off, in the file's rate
    reach = _filter_reach(rate)
    padded = F.pad(wave, (reach, reach + 1))
    taps = torch.arange(-reach, reach + 2)  # [K], relative to the frame at or before the sample
    parts = []
    length, piece = _length(len(wave), rate), max(1, (1 << 22) // len(taps))
    for start in range(0, length, piece):
        samples = torch.arange(start, min(start + piece, length))  # [N]
        frame = samples * rate // SAMPLE_RATE  # [N]
        part = (samples * rate % SAMPLE_RATE).double() / SAMPLE_RATE
        phase = ((taps - part[:, None]) * scale).clamp(-_ZEROS, _ZEROS)  # [N, K]
        kernel = torch.sinc(phase) * torch.cos(phase * (math.pi / 2 / _ZEROS)).square() * scale
        columns = (frame[:, None] + taps + reach).clamp(max=len(padded) - 1)
        parts.append((padded[columns] * kernel.to(wave.dtype)).sum(1))
    return torch.cat(parts)


def _filter_reach(rate: int) -> int:
    """Frames of a file at `rate` Hz on each side of a sample that its value depends on."""
    return math.ceil(_ZEROS * max(1.0, rate / SAMPLE_RATE) / _ROLLOFF)


def _length(frames: int, rate: int) -> int:
    return -(-frames * SAMPLE_RATE // rate)


def _checked_rate(file: soundfile.SoundFile) -> int:
    rate = int(file.samplerate)
    if rate not in _RATES:
        raise ValueError(f"its header says {rate} Hz, outside {_RATES[0]} to {_RATES[-1]}")
    return rate


def _frames(file: soundfile.SoundFile, start: int, stop: int | None) -> NDArray[np.float32]:
    """Frames start to stop (None: the end) of a freshly opened file, mono [S]; fewer where the file ends before."""
    position = start
    if file.subtype.startswith("MPEG"):
        position = 0
    elif file.format == "OGG":
        position = max(0, min(start, file.frames - _OGG_TAIL_SECONDS * file.samplerate))
    parts = []
    if position < file.frames:
        if position:
            file.seek(position)
        for block in _blocks(file, position, stop):
            parts.append(block[max(0, start - position) :])
            position += len(block)
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _blocks(file: soundfile.SoundFile, position: int, stop: int | None) -> Iterator[NDArray[np.float32]]:
    """Mono blocks [S], none empty, from where the file stands (`position`) to frame `stop` or its end."""
    frames = file.frames if file.subtype.startswith("MPEG") else max(1, _BLOCK // file.channels)
    while stop is None or position < stop:
        block = file.read(frames if stop is None else min(frames, stop - position), dtype="float32", always_2d=True)
        if not len(block):
            return
        # Channel by channel: along a short row numpy's own mean takes as long as decoding FLAC
        yield functools.reduce(np.add, block.T) / np.float32(block.shape[1]) if block.shape[1] > 1 else block[:, 0]
        position += len(block)
        if file.subtype.startswith("MPEG"):
            return


def _open(path: str | Path) -> soundfile.SoundFile:
    """Open, or raise FileNotFoundError, EOFError (no bytes) or what else _DECODE_ERRORS names.

    The file is looked at first: libsndfile waits on a pipe, and calls whatever the system refuses a "System error".
    """
    try:
        status = os.stat(path)
    except NotADirectoryError:
        raise FileNotFoundError(path) from None
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    if not os.access(path, os.R_OK):
        raise OSError("permission denied")
    if not status.st_size:
        raise EOFError
    # As bytes, since soundfile refuses a name that is not UTF-8; but on Windows it wants text.
    return soundfile.SoundFile(os.fsencode(path) if os.name == "posix" else str(path))


def _why(error: BaseException) -> str:
    """The cause alone, on one line: libsndfile's own messages repeat the path."""
    text = (
        getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    )
    return " ".join(text.removeprefix("Error : ").split()).rstrip(".")
