"""Items' waveforms, measured and read; work done ahead of its use by threads (decoding releases Python's lock)."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from armhubert.audio import read_audio
from armhubert.config import SAMPLE_RATE
from armhubert.data import Scanning, scan
from armhubert.errors import ArmhubertError
from armhubert.superb.task import Corpus, Item, Part

_T = TypeVar("_T")
_R = TypeVar("_R")


class Recordings:
    """The lengths of a corpus' recordings, and what follows from them for its items."""

    def __init__(self, samples: Mapping[str, int]) -> None:
        self.samples_of_file = samples
        self._identity: dict[str, tuple[str, int, int]] = {}

    def samples(self, item: Item) -> int:
        """Length of an item's waveform at 16 kHz."""
        return max(part.offset + self._count(part) for part in item.parts)

    def waveform(self, item: Item) -> Tensor:
        """[S] float32: the sum of the item's parts."""
        if len(item.parts) == 1 and not item.parts[0].offset:
            part = item.parts[0]
            wave = read_audio(part.path, part.start, self._count(part))
            return wave if part.gain == 1 else wave * part.gain
        wave = torch.zeros(self.samples(item))
        for part in item.parts:
            piece = read_audio(part.path, part.start, self._count(part))
            wave[part.offset : part.offset + len(piece)] += piece * part.gain
        return wave

    def _count(self, part: Part) -> int:
        return part.count if part.count is not None else self.samples_of_file[part.path] - part.start

    def digest(self, item: Item) -> str:
        """What the item's waveform depends on: its files' places, sizes and times of change, and the cuts."""
        parts = [(*self._file(part.path), *part[1:]) for part in item.parts]
        return hashlib.blake2b(repr(parts).encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def _file(self, path: str) -> tuple[str, int, int]:
        if path not in self._identity:
            status = os.stat(path)
            self._identity[path] = (os.path.realpath(path), status.st_size, status.st_mtime_ns)
        return self._identity[path]


def measure_corpus(corpus: Corpus, cache: Path | None) -> Generator[Scanning, None, Recordings]:
    """Decode every recording once; yields its progress, returns the lengths.

    Raises:
        ArmhubertError: recordings that cannot be read, or are shorter than what a list cuts from them.
    """
    paths = list(dict.fromkeys(p.path for split in corpus.splits.values() for item in split.items for p in item.parts))
    result = yield from scan(paths, min_samples=1, cache=cache)
    # A silent recording is data like any other here: keyword spotting asks for silence.
    bad = [skipped for skipped in result.skipped if skipped.reason != "silent"]
    if bad:
        some = "; ".join(f"{skipped.path}: {skipped.reason}" for skipped in bad[:3])
        raise ArmhubertError(
            f"{len(bad)} recordings of the data cannot be used ({some}{'; ...' if len(bad) > 3 else ''}): "
            "repair them, or remove them and their labels"
        )
    recordings = Recordings(
        {u.path: u.samples for u in result.utterances}
        | {skipped.path: len(read_audio(skipped.path)) for skipped in result.skipped}
    )
    for split in corpus.splits.values():
        for item in split.items:
            for part in item.parts:
                end = part.start + (part.count or 1)
                if end > (there := recordings.samples_of_file[part.path]):
                    raise ArmhubertError(
                        f"{item.key}: {part.path} has {there / SAMPLE_RATE:.2f} s where the "
                        f"labels need {end / SAMPLE_RATE:.2f} s: check the lists"
                    )
    return recordings


def ahead(function: Callable[[_T], _R], inputs: Iterable[_T], workers: int) -> Iterator[_R]:
    """`map`, with up to twice `workers` results computed ahead by threads; 0: none. Order is kept."""
    if workers == 0:
        yield from map(function, inputs)
        return
    executor = ThreadPoolExecutor(workers, thread_name_prefix="ahead")
    try:
        pending = deque()  # type: ignore[var-annotated]
        for value in inputs:
            pending.append(executor.submit(function, value))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def padded(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Waveforms -> [B, S], zero beyond each, and their lengths [B]."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    return torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True), lengths
