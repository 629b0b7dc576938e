"""Times of the ops and their baselines on one GPU, a cell of the registry a job; and the variants to choose from."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from armhubert.bench.cases import Cell, Makers, build, gpu_cells, rehearsal_cells
from armhubert.bench.gpu_clock import as_graphs, brief, captured, cudnn_at_its_best, interleave, peak_extra_bytes, warm
from armhubert.kernels import attend, costs, reattend, variants
from armhubert.kernels import reuse_attention as attention_module

GRAPHS_UP_TO_BYTES = 512e6
"""Cells that move no more are also timed as CUDA graphs, whose launches are closer together."""


class Job(NamedTuple):
    """One cell to time, forward or forward and backward."""

    cell: Cell
    device: str
    backward: bool
    repeats: int
    baseline: str | None = None
    """Against this one alone; None: against those that need no compiling."""


SLOW = ("flex", "compiled released", "compiled")
"""In this order: FlexAttention compiles in seconds, max-autotune in up to minutes."""


def gpu_rates(device: torch.device) -> costs.Gpu | None:
    """Rates of this GPU, if `kernels/costs.py` knows it."""
    if device.type != "cuda":
        return None
    return costs.named(torch.cuda.get_device_name(device))


def jobs(device: str, quick: bool) -> list[Job]:
    """Every cell without the baselines that must be compiled first, forward and then forward and backward."""
    return [job._replace(cell=job.cell._replace(slow=False)) for job in _jobs(device, quick)]


def compiled_jobs(device: str, quick: bool) -> list[Job]:
    """Ours again with each of those baselines, so that a ratio comes from one run, the quickest to compile first."""
    jobs = _jobs(device, quick)
    return [job._replace(baseline=name) for name in SLOW for job in jobs for n in job.cell.slow_baselines if n == name]


def _jobs(device: str, quick: bool) -> list[Job]:
    cells = list(rehearsal_cells() if quick else gpu_cells())
    passes = [(cell, backward) for cell in cells for backward in (False, True) if cell.op != "position" or not backward]
    return [Job(cell, device, backward, 3 if quick else 30) for cell, backward in passes]


def work(job: Job) -> dict[str, Any]:
    """Time one cell -> its row."""
    with cudnn_at_its_best():
        return _measure(job)


def _measure(job: Job) -> dict[str, Any]:
    device = torch.device(job.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch._dynamo.reset()  # or the ninth shape of a function would no longer be compiled
    makers = build(job.cell, device, dtype, grad=job.backward)
    if job.baseline:
        makers = {name: makers[name] for name in ("ours", job.baseline)}
    runs, failed = _prepare(makers, device, job.backward)
    moved, operations = job.cell.cost(backward=job.backward)
    with torch.enable_grad() if job.backward else torch.no_grad():
        memory = {name: peak_extra_bytes(run, device) for name, run in runs.items()}
        timings = interleave(runs, device=device, repeats=job.repeats, seconds=6.0)
        graphs, spoilt = as_graphs(runs, device, failed) if moved < GRAPHS_UP_TO_BYTES else ({}, False)
        replays = interleave(graphs, device=device, repeats=job.repeats, seconds=3.0) if graphs else {}
    floor = job.cell.floor(gpu_rates(device), backward=job.backward)
    return {
        "cell": {**job.cell._asdict(), "label": job.cell.label},
        "pass": "forward+backward" if job.backward else "forward",
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": moved,
        "operations": operations,
        "floor_s": floor,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "candidates": {
            name: {
                **timing._asdict(),
                "graph": replays[name]._asdict() if name in replays else None,
                "peak_extra_bytes": memory[name],
            }
            for name, timing in timings.items()
        },
        "failed": failed,
        "spoilt": spoilt,
    }


def _prepare(makers: Makers, device: torch.device, backward: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Each candidate as a callable that has run; those that cannot, with why."""
    runs: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            with torch.enable_grad() if backward else torch.no_grad():
                candidate = make()
                run = candidate.forward_backward() if backward else candidate.forward
                warm(run, device)
            runs[name] = run
        except Exception as error:
            if name == "ours":
                raise
            failed[name] = brief(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return runs, failed


# ---- ceilings of this machine -----------------------------------------------


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second of a large copy and operations a second of a large 16-bit matrix product."""
    size = 2**29 if device.type == "cuda" else 2**20
    edge = 8192 if device.type == "cuda" else 256
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(edge, edge, generator=generator, device=device).bfloat16() for _ in range(2))
    runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    for run in runs.values():
        warm(run, device)
    times = interleave(runs, device=device, repeats=10, seconds=3)
    return {
        "bytes_per_second": 8 * size / times["copy"].median,
        "operations_per_second": 2 * edge**3 / times["product"].median,
    }


# ---- variants ---------------------------------------------------------------


class VariantJob(NamedTuple):
    """One shape of a computing and a reusing layer, by each of the ways that `kernels/variants.py` chooses from."""

    B: int
    T: int
    H: int
    d: int
    device: str
    repeats: int


def variant_jobs(device: str, quick: bool) -> list[VariantJob]:
    """The grid of the table, short sequences first: that is where the ways may cross."""
    if quick:
        return [VariantJob(1, 8, 2, 16, device, 2), VariantJob(2, 16, 2, 16, device, 2)]
    return list(_variant_grid(device))


def _variant_grid(device: str) -> Iterator[VariantJob]:
    for T in variants.FRAMES:
        for B in variants.BATCHES:
            yield VariantJob(B, T, 12, 40, device, 20)


def variant_work(job: VariantJob) -> dict[str, Any]:
    """Forward times of every way, from chains of a computing layer and none, one or two reusing layers.

    Only the head of a chain finds a cold L2: in a model the map, or q and k, have just been written. Each chain is a
    CUDA graph, so that a launch saved on the host does not decide.
    """
    device = torch.device(job.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    width = job.H * job.d
    q, k, v = torch.randn(3, job.B, job.T, job.H, job.d, generator=generator, device=device).to(dtype)
    x = torch.randn(job.B, job.T, width, generator=generator, device=device).to(dtype)
    weight = (torch.randn(width, width, generator=generator, device=device) * width**-0.5).to(dtype)

    def chain(layers: int) -> list[torch.Tensor]:
        out, kept = attend(q, k, v, reusing_layers=layers)
        return [out, *(reattend(kept, x, weight) for _ in range(layers))]

    runs = {}
    with torch.no_grad():
        for name, layers, inside, stored in (
            ("attend", 0, False, False),
            ("inside", 1, True, False),
            ("outside", 1, False, False),
            ("stored", 1, False, True),
            ("stored twice", 2, False, True),
        ):
            with (
                mock.patch.object(attention_module, "project_inside", return_value=inside),
                mock.patch.object(attention_module, "store_map", return_value=stored),
            ):
                run = partial(chain, layers)
                warm(run, device)
                runs[name] = captured(run, device)
        timings = interleave(runs, device=device, repeats=job.repeats, seconds=3.0)
    seconds = {name: timing.median for name, timing in timings.items()}
    reusing = max(0.0, seconds["stored twice"] - seconds["stored"])
    return {
        **job._asdict(),
        **{f"{name}_s": max(0.0, seconds[name] - seconds["attend"]) for name in ("inside", "outside")},
        "stored_s": reusing,
        "storing_s": max(0.0, seconds["stored"] - reusing - seconds["attend"]),
        "attend_s": seconds["attend"],
    }
