"""What only a GPU can show, a stage at a time; `bench/gpu.sh` runs them all, each in a process and a time of its own.

    check     every kernel on the device against float64
    micro     the ops against their baselines
    model     the student and the distillation step, end to end, and which kernels they run
    variants  the ways of reusing a map: recomputed, projection inside or before the kernel, or stored
    compiled  the ops against baselines that take minutes to compile: torch.compile, FlexAttention
    report    merge the stages' files into one, print, draw; needs no GPU
    adopt     make the variants that --result holds the kernels' choice (kernels/variants.json)

Each stage writes DIR/STAGE.json whenever it has something new, so that what is done survives whatever comes after.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from armhubert.bench import gpu_check, gpu_micro, gpu_model, gpu_report, isolate, output
from armhubert.machine import pick_device

REHEARSAL = "no CUDA device: rehearsal, nothing here is a GPU figure"


class Stage(NamedTuple):
    """Jobs of a stage and how many may run at once: checks side by side, times alone."""

    jobs: Callable[[str, bool], Sequence[Any]]
    work: isolate.Work
    side_by_side: bool
    job_seconds: float
    least_seconds: float = 0.0
    """With which to begin a job."""


STAGES = {
    "check": Stage(gpu_check.jobs, gpu_check.work, True, 90),
    "micro": Stage(gpu_micro.jobs, gpu_micro.work, False, 45),
    "model": Stage(gpu_model.jobs, gpu_model.work, False, 120),
    "variants": Stage(gpu_micro.variant_jobs, gpu_micro.variant_work, False, 30),
    "compiled": Stage(gpu_micro.compiled_jobs, gpu_micro.work, False, 75, 40),
}


def run_stage(name: str, device: torch.device, *, quick: bool, budget: float, out: Path) -> list[dict[str, Any]]:
    """Run a stage's jobs within `budget` seconds and keep DIR/NAME.json up to date."""
    deadline = time.monotonic() + budget
    stage = STAGES[name]
    jobs = list(stage.jobs(device.type, quick))
    console = Console(width=120)
    rows: list[dict[str, Any]] = [{"job": _label(job), "error": "not reached", "unreached": True} for job in jobs]
    gpu_report.write_stage(name, rows, device, out)
    workers = max(1, min((os.cpu_count() or 2) * 3 // 4, 12, len(jobs))) if stage.side_by_side else 1
    limits = {"job_seconds": stage.job_seconds, "least_seconds": stage.least_seconds, "deadline": deadline}
    written = 0.0
    for number, (index, row) in enumerate(isolate.run(stage.work, jobs, workers=workers, **limits), 1):
        rows[index] = {"job": _label(jobs[index]), **row}
        bad = ("error" in row or row.get("ok") is False) and not row.get("unreached")
        if bad:
            console.print(f"{name}: {rows[index]['job']}: {row.get('error') or row.get('at')}", markup=False)
        # the last time before the workers are stopped
        if bad or number == len(jobs) or time.monotonic() - written > 5:
            gpu_report.write_stage(name, rows, device, out)
            written = time.monotonic()
    failed = sum("error" in row or row.get("ok") is False for row in rows)
    console.print(f"{name}: {len(rows) - failed} of {len(rows)} jobs done well, {failed} not", markup=False)
    return rows


def _label(job: Any) -> str:
    if isinstance(job, gpu_check.Job):
        return job.label
    if isinstance(job, gpu_micro.Job):
        words = [job.cell.label, "forward+backward" if job.backward else "forward", job.baseline]
    elif isinstance(job, gpu_model.Job):
        words = [job.kind, job.way, f"B{job.B}", job.against] if job.B else [job.kind]
    else:
        words = [str(value) for value in job]
    return " ".join(word for word in words if word)


def main() -> None:
    """Run one stage."""
    parser = output.parser("gpu", __doc__)
    parser.add_argument("stage", choices=[*STAGES, "report", "adopt"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; what a machine without a GPU can do")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for this stage")
    parser.add_argument("--result", type=Path, help="adopt: what report wrote; report: an earlier one to add to")
    options = parser.parse_args()
    if options.stage == "adopt":
        if options.result is None:
            parser.error("adopt needs --result FILE")
        print(gpu_report.adopt(options.result))
        return
    if options.stage == "report":
        sys.exit(gpu_report.exit_code(gpu_report.report(options.out, options.result)))
    device = pick_device(options.device)
    if device.type == "cpu":
        Console().print(REHEARSAL, style="bold red")
    run_stage(
        options.stage, device, quick=options.quick or device.type == "cpu", budget=options.budget, out=options.out
    )
