"""Timing on a GPU: CUDA events, a flushed L2, candidates in turn, graph replays, peak memory.

On a CPU the same calls use the host's clock, so that the whole path can be rehearsed there.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from armhubert import clock
from armhubert.clock import Timing

Run = Callable[[], Any]
FLUSHED_BYTES = 256 * 2**20
"""Several times the L2 of any GPU that we name."""


def interleave(runs: Mapping[str, Run], *, device: torch.device, repeats: int, seconds: float) -> dict[str, Timing]:
    """Seconds of each candidate, A B C A B C ..., each from a cold L2; 3 rounds or more, none begun after `seconds`."""
    if device.type != "cuda":
        return clock.interleave(runs, repeats=repeats, warmup=0)
    flushed = torch.empty(FLUSHED_BYTES // 4, dtype=torch.float32, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.monotonic() + seconds
    for number in range(repeats):
        if number >= 3 and time.monotonic() > stop:
            break
        events = {}
        for name, run in runs.items():
            flushed.zero_()  # the device is busy with it while the host queues the candidate
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize(device)
        for name, (begin, end) in events.items():
            times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: clock.summarize(values) for name, values in times.items()}


def warm(run: Run, device: torch.device, times: int = 3) -> None:
    """Compile, choose algorithms, fill the allocator."""
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(run: Run, device: torch.device) -> Run:
    """The run as one CUDA graph: its replay costs the host one launch."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # a capture that fails does not restore the stream by itself
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def peak_extra_bytes(run: Run, device: torch.device) -> int | None:
    """Most memory held at once above what is held before, outputs included; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del kept
    return peak - before
