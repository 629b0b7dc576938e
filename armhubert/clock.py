"""Timing: interleaved runs and their medians, for `profile` and the benchmarks."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of one candidate over the repeats."""

    median: float
    low: float
    high: float


def summarize(seconds: Sequence[float]) -> Timing:
    """Median, lowest and highest of repeated measurements."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def wait(device: torch.device | None) -> None:
    """Until a GPU has done what it was given; a CPU has."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of one run, of a GPU's work too."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time each candidate in turn, A B A B ..., so that a drifting machine is unfair to none.

    Only figures of one call may be compared with each other.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            seconds[name].append(timed(run, device))
    return {name: summarize(values) for name, values in seconds.items()}
