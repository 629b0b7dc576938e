"""Timing on a GPU: CUDA events, a flushed L2, candidates in turn, graph replays, peak memory.

On a CPU the same calls use the host's clock, so that the whole path can be rehearsed there.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from armhubert import clock
from armhubert.bench.isolate import SpoiltError

Run = Callable[[], Any]
FLUSHED_BYTES = 256 * 2**20
"""Several times the L2 of any GPU that we name."""
CYCLES_PER_SECOND = 2e9
"""About the highest clock of a GPU; a lower one only lengthens the head start."""
HEAD_START = 3e-4, 5e-2
"""Seconds, least and most."""


class Timing(NamedTuple):
    """Seconds of one candidate over the rounds."""

    median: float
    low: float
    high: float
    host: float | None
    """Median that the host took to queue it; None on a CPU."""
    ahead: float | None
    """Share of rounds that were queued whole before the device began with them: their time is the device's alone."""


def interleave(
    runs: Mapping[str, Run], *, device: torch.device, repeats: int, seconds: float, ahead: bool = True
) -> dict[str, Timing]:
    """Seconds of each candidate, A B C A B C ..., each from a cold L2; 3 rounds or more, none begun after `seconds`.

    With `ahead` the device first sleeps for longer than the host needs to queue the candidate, else eager baselines of
    many small ops would be timed by the host; without, it is timed as it runs, host and all.
    """
    if device.type != "cuda":
        timings = clock.interleave(runs, repeats=repeats, warmup=0)
        return {name: Timing(*timing, None, None) for name, timing in timings.items()}
    # read, not written: lines left dirty would be written back while the candidate runs
    flushed = torch.zeros(FLUSHED_BYTES // 4, dtype=torch.float32, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    queued: dict[str, list[float]] = {name: [] for name in runs}
    early: dict[str, list[bool]] = {name: [] for name in runs}
    least, most = HEAD_START
    head_start = {name: min(least + 1.5 * _host_seconds(run, device), most) for name, run in runs.items()}
    stop = time.monotonic() + seconds
    for number in range(repeats):
        if number >= 3 and time.monotonic() > stop:
            break
        for name, run in runs.items():
            flushed.sum()
            if ahead:
                torch.cuda._sleep(int(head_start[name] * CYCLES_PER_SECOND))
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            started = time.perf_counter()
            run()
            end.record()
            queued[name].append(time.perf_counter() - started)
            early[name].append(not begin.query())
            torch.cuda.synchronize(device)
            times[name].append(begin.elapsed_time(end) / 1e3)
    return {
        name: Timing(*clock.summarize(values), statistics.median(queued[name]), statistics.fmean(early[name]))
        for name, values in times.items()
    }


def _host_seconds(run: Run, device: torch.device) -> float:
    """What queueing it takes on an idle device."""
    taken = []
    for _ in range(2):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    torch.cuda.synchronize(device)
    return min(taken)


@contextlib.contextmanager
def cudnn_at_its_best() -> Iterator[None]:
    """Until the block ends cuDNN tries its algorithms at a shape's first run and keeps the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def kernel_times(run: Run, device: torch.device, *, rounds: int = 3, most: int = 25) -> list[dict[str, Any]]:
    """The device's longest kernels of a run, by PyTorch's profiler: name, launches, seconds; on a CPU its ops."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:
        warm(run, device, rounds)
    rows = [
        {
            "name": event.key[:160],
            "launches": event.count / rounds,
            "seconds": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / rounds,
        }
        for event in profiler.key_averages()
        # spans that code has named hold kernels that are there already
        if not cuda or (event.device_type != torch.autograd.DeviceType.CPU and not event.is_user_annotation)
    ]
    total = sum(row["seconds"] for row in rows)
    longest = sorted(rows, key=lambda row: -row["seconds"])[:most]
    return [{**row, "share": row["seconds"] / total} for row in longest if row["seconds"]]


def warm(run: Run, device: torch.device, times: int = 3) -> None:
    """Compile, choose algorithms, fill the allocator."""
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(run: Run, device: torch.device) -> Run:
    """The run as one CUDA graph: its replay costs the host one launch.

    Raises:
        SpoiltError: the capture failed, and may have left the allocator or the stream in it.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # what it frees, an earlier graph above all, could break the capture
    try:
        # a capture that fails does not restore the stream by itself
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            kept = run()
    except Exception as error:
        raise SpoiltError(f"no capture: {type(error).__name__}: {error}") from error
    finally:
        gc.enable()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def as_graphs(runs: Mapping[str, Run], device: torch.device, failed: dict[str, str]) -> tuple[dict[str, Run], bool]:
    """Each candidate as a CUDA graph; none, and True, where one could not be captured, since eager times are kept."""
    graphs = {}
    for name, run in runs.items():
        try:
            graphs[name] = captured(run, device)
        except Exception as error:
            failed[f"{name}, as a graph"] = brief(error)
            return {}, True
    return graphs, False


def brief(error: Exception) -> str:
    """For a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
