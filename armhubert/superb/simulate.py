"""Data sets made from other speech, the same for the same seed on every machine: mixtures for sd, queries for qbe."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from armhubert.audio import read_audio
from armhubert.config import SAMPLE_RATE
from armhubert.data import discover
from armhubert.errors import ArmhubertError
from armhubert.superb.metrics import Turn
from armhubert.superb.speakers import Speakers
from armhubert.superb.task import Item, Part, generator, read_lines

# ----------------------------------------------------------------------------------------------- who speaks when

_HOP = SAMPLE_RATE // 100
_BELOW_LOUD_DB = 35.0  # of the loud frames: softer is silence
_SHORTEST_PAUSE, _SHORTEST_SPEECH = 20, 10  # frames of 10 ms


def speech_intervals(wave: NDArray[np.float32]) -> list[tuple[int, int]]:
    """[S] at 16 kHz -> (first, past the last) sample of each stretch of speech, by energy.

    For recordings of one speaker without noise: a frame of 10 ms is speech where its level, averaged over 30 ms, is
    within 35 dB of the loud ones (their 95th percentile). Pauses below 0.2 s are bridged, bursts below 0.1 s dropped.
    """
    frames = len(wave) // _HOP
    if not frames:
        return []
    power = np.square(wave[: frames * _HOP].reshape(frames, _HOP)).mean(1, dtype=np.float64)
    level = 10 * np.log10(np.convolve(power, np.ones(3) / 3, "same") + 1e-12)
    active = level > np.percentile(level, 95) - _BELOW_LOUD_DB
    stretches: list[tuple[int, int]] = []
    changes = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(np.int8)))
    for start, end in changes.reshape(-1, 2).tolist():
        if stretches and start - stretches[-1][1] < _SHORTEST_PAUSE:
            stretches[-1] = (stretches[-1][0], end)
        else:
            stretches.append((start, end))
    return [(start * _HOP, end * _HOP) for start, end in stretches if end - start >= _SHORTEST_SPEECH]


def as_turns(intervals: Sequence[tuple[int, int]], speaker: str, offset: int = 0) -> list[Turn]:
    """Intervals in samples as turns in seconds, moved by `offset` samples."""
    return [Turn((offset + start) / SAMPLE_RATE, (offset + end) / SAMPLE_RATE, speaker) for start, end in intervals]


# ------------------------------------------------------------------------------------------------------- mixtures

_LEVELS_DB = (-33.0, -25.0)  # LibriMix's range, there of loudness in LUFS (Cosentino et al., arXiv 2005.11262, 3.1)


class Talk(NamedTuple):
    """What a mixture needs to know of an utterance."""

    samples: int
    spoken: list[tuple[int, int]]
    """Where somebody speaks, from `speech_intervals`."""
    level: float
    """Root mean square over its speech."""


def mixtures(speakers: Speakers, number: int, seed: int, split: str) -> list[Item]:
    """About `number` recordings in which two of the speakers talk, partly at once; labels are tuples of `Turn`.

    Utterances are drawn speaker by speaker, each at a level between -33 and -25 dB of full scale over its speech; the
    second begins at a random point of the first. Who speaks when is measured on the clean utterances
    (`speech_intervals`); mixtures of one that holds no speech are left out.

    Raises:
        ArmhubertError: fewer than two speakers, no speech, or a recording that cannot be read.
    """
    names = sorted(speakers)
    if len(names) < 2:
        raise ArmhubertError(f"mixtures need at least 2 speakers, but the {split} split has {len(names)}: add speakers")
    draw = generator(seed, split, "mixtures")
    plans = []
    for _ in range(number):
        pair = [names[place] for place in draw.choice(len(names), 2, replace=False)]
        paths = [speakers[name][int(draw.integers(len(speakers[name])))] for name in pair]
        plans.append((pair, paths, draw.uniform(*_LEVELS_DB, size=2), draw.random()))
    used = sorted({path for _, paths, _, _ in plans for path in paths})
    talks = listen_all(used)
    items: list[Item] = []
    for pair, paths, levels, where in plans:
        first, second = (talks[path] for path in paths)
        if not (first.spoken and second.spoken):
            continue
        parts, turns = [], []
        for name, path, talk, level, offset in zip(
            pair, paths, (first, second), levels, (0, int(where * first.samples)), strict=True
        ):
            parts.append(Part(str(path), offset=offset, gain=float(10 ** (level / 20) / talk.level)))
            turns += as_turns(talk.spoken, name, offset)
        key = f"{split}/{len(items):05d}-{'-'.join(path.stem for path in paths)}"
        items.append(Item(key, tuple(parts), tuple(sorted(turns))))
    if not items:
        raise ArmhubertError(f"the {len(used)} recordings drawn for {split} hold no speech: check the audio")
    return items


def listen(path: Path) -> Talk:
    """What is said in a recording; measured once, though a suite reads its data to plan and again for each model."""
    return _listened(path, path.stat().st_mtime_ns if path.exists() else 0)


def listen_all(paths: Sequence[Path]) -> dict[Path, Talk]:
    """`listen` to several recordings at once."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="listen") as pool:
        return dict(zip(paths, pool.map(listen, paths), strict=True))


@functools.cache
def _listened(path: Path, changed: int) -> Talk:
    wave = read_audio(path).numpy()
    spoken = speech_intervals(wave)
    power = np.concatenate([np.square(wave[a:b], dtype=np.float64) for a, b in spoken]).mean() if spoken else 0.0
    return Talk(len(wave), spoken, max(float(np.sqrt(power)), 1e-6))


# -------------------------------------------------------------------------------------------------------- queries


class Word(NamedTuple):
    """A word where it is spoken."""

    text: str
    start: int
    """First sample at 16 kHz."""
    end: int
    """Past the last."""


class Spoken(NamedTuple):
    """A recording whose words are known."""

    path: Path
    speaker: str
    words: tuple[str, ...]
    """Lower case."""
    aligned: tuple[Word, ...]
    """With their times; empty where only the transcript is known."""


def spoken_words(root: Path) -> Iterator[Spoken]:
    """Recordings below `root` whose words are known, sorted by path.

    Words come from TIMIT's `.wrd` beside the recording (sample numbers, word), from `SPEAKER-CHAPTER.alignment.txt`
    (LibriSpeech alignments: utterance, "words", "end times in seconds", the empty word for silence) or, without times,
    from LibriSpeech's `SPEAKER-CHAPTER.trans.txt`. Recordings without any are left out.

    Raises:
        ArmhubertError: a line of such a file is malformed.
    """
    lists: dict[Path, dict[str, tuple[str, ...]]] = {}
    timed: dict[Path, dict[str, tuple[Word, ...]]] = {}
    for path in discover([root]):
        beside = next((p for suffix in (".wrd", ".WRD") if (p := path.with_suffix(suffix)).is_file()), None)
        if beside is not None:
            aligned = tuple(_wrd(beside))
            # TIMIT names folders dialect-speaker in one release, dialect/speaker in the other: the last is the speaker.
            yield Spoken(path, path.parent.name, tuple(word.text for word in aligned), aligned)
            continue
        folder = path.parent
        if folder not in lists:
            lists[folder], timed[folder] = {}, {}
            for name in sorted(folder.glob("[!.]*.trans.txt")):
                lists[folder].update(_transcripts(name))
            for name in sorted(folder.glob("[!.]*.alignment.txt")):
                timed[folder].update(_alignments(name))
        if path.stem in timed[folder]:
            aligned = timed[folder][path.stem]
            yield Spoken(path, path.stem.split("-")[0], tuple(word.text for word in aligned), aligned)
        elif path.stem in lists[folder]:
            yield Spoken(path, path.stem.split("-")[0], lists[folder][path.stem], ())


def _wrd(path: Path) -> Iterator[Word]:
    for line in read_lines(path, "word times"):
        fields = line.split()
        if len(fields) != 3 or not (fields[0].isdecimal() and fields[1].isdecimal()):
            raise ArmhubertError(f"{path}: every line must be first sample, last sample and word, got {line[:60]!r}")
        yield Word(fields[2].lower(), int(fields[0]), int(fields[1]))


def _transcripts(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for line in read_lines(path, "transcripts"):
        name, *words = line.lower().split()
        yield name, tuple(words)


_ALIGNMENT = re.compile(r'(\S+) "([^"]*)" "([\d.,]*)"')


def _alignments(path: Path) -> Iterator[tuple[str, tuple[Word, ...]]]:
    for line in read_lines(path, "word times"):
        match = _ALIGNMENT.fullmatch(line)
        words = match[2].lower().split(",") if match else []
        try:
            ends = [round(float(end) * SAMPLE_RATE) for end in match[3].split(",")] if match else []
        except ValueError:
            ends = []
        if match is None or len(words) != len(ends):
            raise ArmhubertError(
                f'{path}: every line must be an utterance, "WORDS,..." and as many "end times,...", got {line[:60]!r}'
            )
        starts = [0, *ends]
        yield match[1], tuple(Word(*word) for word in zip(words, starts, ends, strict=False) if word[0])
