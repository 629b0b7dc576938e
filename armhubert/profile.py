"""How fast and how large a model is, against baselines timed in the same run.

Only figures of one run are compared: a cell times all candidates in turn, A B A B ..., and ratios are taken within it.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from armhubert import forecast, machine, ragged
from armhubert.baselines import BASELINES
from armhubert.candidates import (
    MODES,
    PROGRAMS,
    Candidate,
    check_baseline,
    export_candidate,
    last_hidden_state,
    load_candidate,
    load_run,
    split_baseline,
)
from armhubert.clock import Timing, interleave, wait
from armhubert.config import SAMPLE_RATE
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError, nearest
from armhubert.export import open_program
from armhubert.files import write_atomic
from armhubert.forecast import Cost, Forecast
from armhubert.kernels import onednn
from armhubert.machine import conditions, pick_device
from armhubert.ragged import Ragged
from armhubert.settings import check_fields, documented

SUPERB_UTTERANCES, SUPERB_SECONDS = 32, 224.86
"""SUPERB counts operations over 32 utterances of test-clean, 224.86 s in all; here as 32 of equal length."""


@documented
@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Settings of `armhubert profile`.

    Raises:
        ArmhubertError: a setting breaks a rule; the message names the rule, the value and the remedy.
    """

    model: str
    """A student, or any model that `load_weights` takes."""
    baselines: tuple[str, ...] = ()
    """NAME[:MODE]: a built-in baseline, `released` (the student as the released code computes it), or a source."""
    modes: tuple[str, ...] = ("eager",)
    """How the model is run: eager, compiled, aot (compiled ahead of time), bf16, int8 (torchao), triton, onnx,
    onnx-int8 (ONNX Runtime)."""
    seconds: tuple[float, ...] = (1.0, 5.0, 10.0, 30.0)
    """Lengths for latency, at batch size 1."""
    batch_sizes: tuple[int, ...] = (4, 8)
    """Batch sizes for throughput."""
    batch_seconds: float = 10.0
    """Length of each utterance of these batches."""
    heads: bool = False
    """Keep the student's distillation heads: SUPERB's features of the released models."""
    repeats: int = 5
    """Interleaved runs of each cell; the median counts."""
    warmup: int = 1
    """Runs before timing; at least the two that show the memory that a pass needs."""
    limit_seconds: float = 120.0
    """A candidate that would need longer for one pass is left out of a cell of more than 10 s of audio."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    memory: bool = True
    """Measure peak memory, each candidate in a process of its own on a CPU."""
    ragged: bool = False
    """Also measure batches of unequal lengths: see `armhubert.ragged`."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.modes:
            raise ArmhubertError("modes must name at least one, got none")
        of_baselines = [text.rpartition(":") for text in self.baselines]
        named = [mode for name, _, mode in of_baselines if name in (*BASELINES, "released")]
        for mode in (*self.modes, *named):
            if mode not in MODES:
                raise ArmhubertError(f"mode must be one of {', '.join(MODES)}, got {mode!r}{nearest(mode, MODES)}")
        if not all(size > 0 for size in self.batch_sizes):
            raise ArmhubertError(f"batch_sizes must be above 0, got {self.batch_sizes}")
        if not self.seconds and not self.batch_sizes:
            raise ArmhubertError("give at least one length or batch size, got none: nothing would be timed")
        for name, length in (*(("seconds", each) for each in self.seconds), ("batch_seconds", self.batch_seconds)):
            if not 0.025 <= length <= 3600:
                raise ArmhubertError(f"{name} must be at least 0.025, one frame, and at most 3600, got {length:g}")
        for name in ("repeats", "warmup"):
            if getattr(self, name) < 1:
                raise ArmhubertError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.limit_seconds > 0:
            raise ArmhubertError(f"limit_seconds must be above 0, got {self.limit_seconds}")


# ---- where the time goes ----------------------------------------------------

_STAGES = (
    ("front end", r"(model\.)?(front_end|feature_extractor)"),
    ("projection", r"(model\.)?(feature_norm|feature_projection)|model\.encoder\.feature_projection"),
    ("positional convolution", r"position|model\.encoder\.(transformer\.)?pos_conv_embed"),
    ("attention", r"(model\.encoder\.(transformer\.)?)?layers\.\d+\.attention"),
    ("feed-forward", r"(model\.encoder\.(transformer\.)?)?layers\.\d+\.(up|down|feed_forward)"),
    (
        "norms",
        r"norm|(model\.encoder\.(transformer\.)?)?layers\.\d+\.(\w*norm)|model\.encoder\.(transformer\.)?layer_norm",
    ),
    ("heads", r"heads"),
)
"""Stage by full module name, in our models and in transformers' and torchaudio's."""


def stages(module: nn.Module, waveforms: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of each stage of one forward pass, medians; `between them`: activations and residuals.

    Timed at the borders of modules, so a stage is what its modules do; on a GPU each border waits for the device, so
    that the sum is above the latency.
    """
    owner = {
        child: stage
        for name, child in module.named_modules()
        for stage, pattern in _STAGES
        if re.fullmatch(pattern, name)
    }
    passes: list[dict[str, float]] = []
    began: list[float] = []

    def enter(child: nn.Module, *_: Any) -> None:
        wait(waveforms.device)
        began.append(time.perf_counter())

    def leave(child: nn.Module, *_: Any) -> None:
        wait(waveforms.device)
        passes[-1][owner[child]] = passes[-1].get(owner[child], 0.0) + time.perf_counter() - began.pop()

    handles = [
        hook for child in owner for hook in (child.register_forward_pre_hook(enter), child.register_forward_hook(leave))
    ]
    try:
        for _ in range(repeats):
            passes.append({})
            started = time.perf_counter()
            with torch.no_grad():
                module(waveforms)
            wait(waveforms.device)
            passes[-1]["between them"] = time.perf_counter() - started - sum(passes[-1].values())
    finally:
        for handle in handles:
            handle.remove()
    if not owner:
        return {}
    return {stage: statistics.median(p.get(stage, 0.0) for p in passes) for stage in passes[0]}


class Rates(NamedTuple):
    """What this machine reaches, measured in the same run."""

    macs_per_second: float
    """Float32 matrix product of 1536 x 1536, by PyTorch or by oneDNN, whichever is faster where both are used."""
    bytes_per_second: float
    """Copy of 256 MiB, bytes read and written."""


def machine_rates(device: torch.device) -> Rates:
    """Measure the matrix rate and the bandwidth."""
    size, count = 1536, 1 << 26
    a, b = (torch.ones(size, size, device=device) for _ in range(2))
    products = [lambda: a @ b]
    if onednn.runs(a):
        products.append(lambda: onednn.product(a, b, longest=size))
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    runs = {"copy": lambda: target.copy_(source), **{f"product {n}": product for n, product in enumerate(products)}}
    timings = interleave(runs, repeats=5, device=device)
    copy = timings.pop("copy")
    return Rates(size**3 / min(timing.median for timing in timings.values()), 8 * count / copy.median)


# ---- memory -----------------------------------------------------------------

_CHILD = """
import sys
sys.path[:] = [place for place in sys.path if place]  # no module of the current folder
import json
from armhubert import profile
print(json.dumps(getattr(profile, sys.argv[1])(**json.loads(sys.argv[2]))))
"""
_RUNTIMES = ("transformers", "onnxruntime", "torchao.quantization", "torch._inductor.package")


def peak_memory(config: ProfileConfig, source: str, mode: str, batch: int, seconds: float) -> int:
    """Bytes that loading a candidate and running it once add to a process, at their peak.

    On a CPU in a process of its own, above what it takes to import the libraries; what runs from an exported file only
    opens it there, another process has made it. On a GPU the allocator's own figure.
    """
    candidate = {"student": config.model, "source": source, "mode": mode, "heads": config.heads}
    run = {"device": config.device, "batch": batch, "seconds": seconds, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "program.pt2") if mode in PROGRAMS else None
        if file is not None:
            _in_a_process("_export_to", {**candidate, "file": file})
        return int(_in_a_process("_peak_of_child", {**candidate, **run, "file": file}))


def _in_a_process(function: str, arguments: dict[str, Any]) -> str:
    """The last line that a function of this module leaves in a process of its own."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, function, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    if child.returncode:
        name = f"{arguments['source']} ({arguments['mode']})"
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArmhubertError(f"{name} failed in a process of its own while its memory was measured: {last}")
    return child.stdout.strip().splitlines()[-1]


def _export_to(*, student: str, source: str, mode: str, heads: bool, file: str) -> None:
    Path(file).write_bytes(export_candidate(source, mode, student=student, heads=heads))


def _peak_of_child(
    *,
    student: str,
    source: str,
    mode: str,
    heads: bool,
    file: str | None,
    device: str,
    batch: int,
    seconds: float,
    threads: int,
) -> int:
    torch.set_num_threads(threads)  # this process is ours
    where = pick_device(device)
    for runtime in _RUNTIMES:
        with contextlib.suppress(ImportError):
            importlib.import_module(runtime)
    with contextlib.suppress(OSError):  # where the system refuses, the libraries' own peak may count
        machine.forget_peak()
    before = _resident("VmRSS")
    waveforms = torch.zeros(batch, round(seconds * SAMPLE_RATE), device=where)
    if file is not None:
        open_program(Path(file), PROGRAMS[mode].format)(waveforms, torch.full((batch,), waveforms.shape[1]))
    else:
        load_run(source, mode, student=student, heads=heads, device=where)(waveforms)
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    return _resident("VmHWM") - before


def _resident(kind: str) -> int:
    try:
        return machine.resident(kind)
    except OSError:
        raise ArmhubertError(
            "peak memory on a CPU is read from /proc/self/status, which does not tell it here: use memory=False"
        ) from None


# ---- the profile ------------------------------------------------------------


class Building(NamedTuple):
    """A candidate is being loaded, compiled or exported."""

    name: str


class Measuring(NamedTuple):
    """A cell is being timed, or a candidate's memory measured."""

    done: int
    total: int
    what: str


class MemoryUnknown(NamedTuple):
    """A candidate's process ended before its memory was measured."""

    name: str
    why: str


class Cell(NamedTuple):
    """The candidates on batches of one shape, timed in turn."""

    batch: int
    seconds: float
    timings: dict[str, Timing]
    memory: dict[str, int]
    """Bytes that a pass added to this process at its peak, where the system tells."""
    left_out: dict[str, str]
    """Candidates that did not run, and why: too long, or too large for this machine."""

    def speedup(self, name: str, baseline: str) -> float | None:
        """How many times faster `name` is than `baseline`, medians of this cell; None where one did not run."""
        if not {name, baseline} <= self.timings.keys():
            return None
        return self.timings[baseline].median / self.timings[name].median


class Model(NamedTuple):
    """What is known of a candidate beside its times."""

    name: str
    source: str
    mode: str
    parameters: int
    parameters_without_heads: int
    bytes_on_disk: int
    macs: int
    """Multiply-accumulates for 10 s of audio."""
    macs_superb: int
    """Multiply-accumulates for SUPERB's 224.86 s, as 32 utterances of equal length."""
    peak_memory: int | None
    """Bytes, at `Profile.memory_shape`; None: not measured."""
    feature_error: float | None
    """Relative to the same model in float32 and eager mode; None for that mode itself."""
    stages: dict[str, float]
    """Seconds of each stage of the eager pass at 10 s; empty for other modes."""


class Profile(NamedTuple):
    """The result: everything was measured in one run."""

    conditions: dict[str, Any]
    rates: Rates
    models: tuple[Model, ...]
    """The profiled model in each of its modes, then the baselines."""
    cells: tuple[Cell, ...]
    """Latencies by length, then batches by size."""
    ragged: tuple[Ragged, ...] = ()
    memory_shape: tuple[int, float] | None = None
    """Batch and seconds at which peak memory was measured: the largest cell that all candidates ran; None: nowhere."""


Report = Building | Measuring | MemoryUnknown | Profile


def profile(config: ProfileConfig) -> Iterator[Report]:
    """Measure; the last report is the `Profile`.

    Raises:
        ArmhubertError: a source that is not there, or a mode that it or this machine does not have.
    """
    device, busy = pick_device(config.device), machine.load()
    baselines = [split_baseline(text) for text in config.baselines]
    for source, _ in baselines:
        check_baseline(source)
    asked = [(config.model, mode) for mode in config.modes] + baselines
    if config.memory and device.type == "cpu":
        for kind in ("VmRSS", "VmHWM"):  # whether they are told, before the work
            _resident(kind)
    candidates: dict[str, Candidate] = {}
    for source, mode in dict.fromkeys(asked):
        yield Building(f"{source} ({mode})")
        candidate = load_candidate(source, mode, student=config.model, heads=config.heads, device=device)
        candidates[candidate.name] = candidate
    shapes = [(1, s) for s in sorted(config.seconds)] + [(b, config.batch_seconds) for b in sorted(config.batch_sizes)]
    steps = len(shapes) + (len(candidates) if config.memory else 0) + config.ragged
    forecasts: dict[str, Forecast] = {}
    for name, candidate in candidates.items():
        yield Measuring(0, steps, f"growth of {name}")
        forecasts[name] = Forecast(candidate.run, candidate.release, device)
    cells: list[Cell] = []
    for b, s in shapes:
        yield Measuring(len(cells), steps, f"{b} x {s:g} s")
        cells.append(_cell(candidates, forecasts, b, s, config, device))
    unequal: list[Ragged] = []
    if config.ragged:
        yield Measuring(len(cells), steps, "unequal lengths")
        ours = {name: c.run for name, c in candidates.items() if isinstance(c.module, SpeechEncoder)}
        unequal = ragged.measure(ours, device, repeats=config.repeats, warmup=config.warmup)
    rates = machine_rates(device)
    waveforms = noise(1, 10.0, device)
    models = [_describe(candidate, waveforms, config.repeats) for candidate in candidates.values()]
    candidates.clear()  # with the pools of their runtimes, whose memory the next processes may need
    forecasts.clear()
    memory_shape = None
    if config.memory:
        whole = [(cell.batch, cell.seconds) for cell in cells if not cell.left_out]
        memory_shape = max(whole, key=lambda shape: shape[0] * shape[1], default=None)
    if memory_shape is not None:
        for number, model in enumerate(models):
            yield Measuring(len(cells) + config.ragged + number, steps, f"memory of {model.name}")
            try:
                peak = peak_memory(config, model.source, model.mode, *memory_shape)
            except ArmhubertError as error:  # the figures that there are took long
                yield MemoryUnknown(model.name, str(error))
            else:
                models[number] = model._replace(peak_memory=peak)
    random = sorted({*BASELINES} & {s for s, _ in asked})
    yield Profile(
        {
            **conditions(device),
            "repeats": config.repeats,
            **({"random weights": ", ".join(random)} if random else {}),
            **({} if busy is None else {"load before": round(busy, 1)}),
        },
        rates,
        tuple(models),
        tuple(cells),
        tuple(unequal),
        memory_shape,
    )


def _cell(
    candidates: dict[str, Candidate],
    forecasts: dict[str, Forecast],
    batch: int,
    seconds: float,
    config: ProfileConfig,
    device: torch.device,
) -> Cell:
    runs, memory, left_out = {}, {}, {}
    for name in candidates:
        reason = forecast.refusal(forecasts[name](batch, seconds), device, config.limit_seconds)
        if reason and batch * seconds > forecast.PROBES[-1]:
            left_out[name] = reason
    if len(left_out) == len(candidates):
        return Cell(batch, seconds, {}, {}, left_out)
    waveforms = noise(batch, seconds, device)
    for name, candidate in candidates.items():
        if name in left_out:
            continue
        try:
            cost = forecasts[name].measure(waveforms)
        except Exception as error:
            if not machine.ran_out_of_memory(error):
                raise
            left_out[name] = "out of memory"
            continue
        runs[name] = functools.partial(candidate.run, waveforms)
        if cost.memory is not None:
            memory[name] = cost.memory
    timings = interleave(runs, repeats=config.repeats, warmup=max(0, config.warmup - 2), device=device)
    for candidate in candidates.values():
        candidate.release()
    if batch == 1:
        for name in timings:
            forecasts[name].add(seconds, Cost(timings[name].median, memory.get(name)))
    return Cell(batch, seconds, timings, memory, left_out)


def noise(batch: int, seconds: float, device: torch.device) -> Tensor:
    """The waveforms that are timed: [B, S] of normal noise, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, round(seconds * SAMPLE_RATE), generator=generator).mul_(0.1).to(device)


def _describe(candidate: Candidate, waveforms: Tensor, repeats: int) -> Model:
    error = None
    if candidate.mode != "eager":
        with torch.no_grad():
            exact = last_hidden_state(candidate.module(waveforms)).double()
        error = float((candidate.run(waveforms).double() - exact).norm() / exact.norm())
    return Model(
        candidate.name,
        candidate.source,
        candidate.mode,
        candidate.parameters,
        candidate.parameters_without_heads,
        candidate.bytes_on_disk,
        candidate.macs(10 * SAMPLE_RATE),
        SUPERB_UTTERANCES * candidate.macs(round(SUPERB_SECONDS * SAMPLE_RATE / SUPERB_UTTERANCES)),
        peak_memory=None,
        feature_error=error,
        stages=stages(candidate.module, waveforms, repeats) if candidate.mode == "eager" else {},
    )


def trace(config: ProfileConfig, path: Path, seconds: float = 10.0) -> None:
    """A chrome trace (chrome://tracing, Perfetto) of one pass of the profiled model in its first mode, batch size 1."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    device = pick_device(config.device)
    run = load_candidate(config.model, config.modes[0], student=config.model, heads=config.heads, device=device).run
    waveforms = noise(1, seconds, device)
    run(waveforms)
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if waveforms.is_cuda else [])]) as recorded:
        run(waveforms)
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(str(Path(folder) / "trace.json"))
        write_atomic(path, (Path(folder) / "trace.json").read_bytes())
