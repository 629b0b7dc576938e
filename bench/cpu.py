"""The ops' PyTorch twins against the released way and PyTorch's attention on this CPU: `make bench`.

Ratios come from runs in turn (A B A B), which pytest-benchmark cannot do; its statistics of single cases, over the same
registry, are `pytest bench/test_ops.py --benchmark-only`.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from armhubert import machine
from armhubert.bench import output
from armhubert.bench.cases import Cell, build, cpu_cells
from armhubert.clock import interleave

CPU = torch.device("cpu")


def candidates(cell: Cell, *, backward: bool) -> dict[str, Callable[[], Any]]:
    """What is timed: forward, or forward and backward, of each candidate."""
    makers = build(cell, CPU, torch.float32, impl="torch", grad=backward)
    made = {name: make() for name, make in makers.items()}
    return {name: c.forward_backward() if backward else c.forward for name, c in made.items()}


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """Most memory that PyTorch's allocator holds at once above what it held before, outputs included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        kept = run()
    del kept
    held = peak = 0
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(cell: Cell, *, backward: bool, repeats: int) -> dict[str, Any]:
    """Times and memory of a cell's candidates."""
    runs = candidates(cell, backward=backward)
    with torch.enable_grad() if backward else torch.no_grad():
        memory = {name: peak_extra_bytes(run) for name, run in runs.items()}
        timings = interleave(runs, repeats=repeats)
    return {
        "cell": {**cell._asdict(), "label": cell.label},
        "pass": "forward+backward" if backward else "forward",
        "dtype": "float32",
        "candidates": {name: {**t._asdict(), "peak_extra_bytes": memory[name]} for name, t in timings.items()},
    }


def main() -> None:
    """Measure, print, and write cpu-microbench.json."""
    parser = output.parser("cpu", __doc__)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    work = [(cell, backward) for cell in cpu_cells() for backward in (False, True)]
    before = machine.load()
    rows = [
        measure(cell, backward=backward, repeats=options.repeats)
        for cell, backward in track(work, description="measuring", transient=True)
    ]
    load = {"load_before": before, "load_after": machine.load(), "cores": os.cpu_count()}
    Console(width=120).print(table(rows))
    Console().print(", ".join(f"{key} {value}" for key, value in load.items()))
    print(output.write_results("cpu-microbench", [{**row, "machine_load": load} for row in rows], CPU, options.out))


def table(rows: list[dict[str, Any]]) -> Table:
    """Medians, their ratios to ours, and memory."""
    shown = Table("cell", "pass", "ours ms", "released ms", "ratio", "sdpa ms", "ours MB", "released MB")
    for row in rows:
        c = row["candidates"]
        ours, released, sdpa = c["ours"], c["released"], c.get("sdpa")
        shown.add_row(
            row["cell"]["label"],
            "f" if row["pass"] == "forward" else "f+b",
            f"{ours['median'] * 1e3:.1f}",
            f"{released['median'] * 1e3:.1f}",
            f"{released['median'] / ours['median']:.2f}",
            f"{sdpa['median'] * 1e3:.1f}" if sdpa else "",
            f"{ours['peak_extra_bytes'] / 2**20:.1f}",
            f"{released['peak_extra_bytes'] / 2**20:.1f}",
        )
    return shown
