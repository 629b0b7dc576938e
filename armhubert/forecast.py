"""What a candidate will cost at a length where it has not run yet, so that a profile leaves out what cannot end well.

Attention that stores its maps needs 12 x 15,000^2 floats for 5 minutes of audio: 10.8 GB a map.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from armhubert.clock import timed
from armhubert.config import SAMPLE_RATE
from armhubert.machine import forget_peak, free_memory, resident, return_free_pages

PROBES = (1.0, 4.0, 10.0)
"""Seconds of audio that show how a candidate's cost grows; no longer one runs without a forecast."""
MARGIN = 1.5
"""How much memory must be free for each byte forecast."""


class Cost(NamedTuple):
    """Time and memory of one pass."""

    seconds: float
    memory: int | None
    """Bytes that it adds at its peak; None: the system does not tell."""
    kept: int = 0
    """Bytes by which the process is larger after it: a runtime's own pool."""


class Forecast:
    """a + b s + c s^2 of the seconds s of audio, none of the three negative, through what one candidate's runs cost.

    Args:
        run: waveforms [B, S] -> anything.
        release: gives memory that earlier runs have pooled back.
        device: where it runs.
    """

    def __init__(self, run: Callable[[Tensor], Any], release: Callable[[], object], device: torch.device) -> None:
        self.run, self.release, self.device = run, release, device
        self._runs: list[tuple[float, Cost]] = []
        run(_silence(PROBES[0], device))  # compiles, reads weights from the disk
        for seconds in PROBES:
            self.add(seconds, self.measure(_silence(seconds, device)))

    def measure(self, waveforms: Tensor) -> Cost:
        """The second of two passes, in which a runtime's own pool grows again, with the memory of the larger."""
        self.release()
        memories, kept = [], 0
        for _ in range(2):
            cost = _measure(lambda: self.run(waveforms), self.device)
            if cost.memory is not None:
                memories.append(cost.memory + kept)
            kept = max(0, kept + cost.kept)
        return cost._replace(memory=max(memories, default=None))

    def add(self, seconds: float, cost: Cost) -> None:
        """A pass over one utterance, to forecast from."""
        self._runs.append((seconds, cost))

    def __call__(self, batch: int, seconds: float) -> Cost:
        """Cost of a batch of so many utterances: at most what they cost one by one."""
        time_needed = self._at(seconds, [(s, cost.seconds) for s, cost in self._runs])
        known = [(s, float(cost.memory)) for s, cost in self._runs if cost.memory]
        memory = round(batch * self._at(seconds, known)) if known else None
        return Cost(batch * time_needed, memory)

    @staticmethod
    def _at(seconds: float, known: list[tuple[float, float]]) -> float:
        from scipy.optimize import nnls

        lengths, values = np.array(known).T
        columns = np.stack([np.ones_like(lengths), lengths, lengths**2], axis=1)
        # Errors a second of audio count alike: a pool that short passes fit in must not outweigh the one that fills it.
        coefficients, _ = nnls(columns / lengths[:, None], values / lengths)
        return float(coefficients @ [1.0, seconds, seconds**2])


def _silence(seconds: float, device: torch.device) -> Tensor:
    return torch.zeros(1, round(seconds * SAMPLE_RATE), device=device)


def _measure(run: Callable[[], Any], device: torch.device) -> Cost:
    """One pass: its time, and what it adds to the process' memory or the GPU's at its peak."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds = timed(run, device)
        return Cost(seconds, torch.cuda.max_memory_allocated(device) - before)
    try:
        forget_peak()
        before, _ = resident("VmRSS"), resident("VmHWM")
    except OSError:
        return Cost(timed(run, device), None)
    seconds = timed(run, device)
    peak = resident("VmHWM")
    return_free_pages()
    return Cost(seconds, max(0, peak - before), resident("VmRSS") - before)


def refusal(cost: Cost, device: torch.device, limit_seconds: float) -> str:
    """Why a pass of such a cost is not run here; empty: it is."""
    free = free_memory(device)
    if cost.memory is not None and free is not None and MARGIN * cost.memory > free:
        return f"about {cost.memory / 2**30:.1f} GiB needed, {free / 2**30:.1f} free"
    if cost.seconds > limit_seconds:
        return f"about {cost.seconds:.0f} s a pass, limit {limit_seconds:g}"
    return ""
