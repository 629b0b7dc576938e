"""How fast and how large a model is, against baselines timed in the same run.

Only figures of one run are compared: a cell times all candidates in turn, A B A B ..., and ratios are taken within it.
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from armhubert import figures
from armhubert.audio import SAMPLE_RATE
from armhubert.baselines import BASELINES, HUBERT_BASE, ReleasedWay, baseline, macs
from armhubert.clock import Timing, conditions, interleave
from armhubert.convert import load_weights
from armhubert.distributed import pick_device
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError, nearest
from armhubert.export import onnx_program, quantise
from armhubert.files import write_atomic
from armhubert.kernels import Impl
from armhubert.kernels.runtime import resolve_impl
from armhubert.student import ARMHuBERT, count_parameters

MODES = ("eager", "compiled", "bf16", "int8", "triton", "onnx", "onnx-int8")
SUPERB_UTTERANCES, SUPERB_SECONDS = 32, 224.86
"""SUPERB counts operations over 32 utterances of test-clean, 224.86 s in all; here as 32 of equal length."""


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
    """How the model is run: eager, compiled, bf16, int8 (torchao), triton, onnx, onnx-int8 (ONNX Runtime)."""
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
    """Runs before timing."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    memory: bool = True
    """Measure peak memory, each candidate in a process of its own on a CPU."""

    def __post_init__(self) -> None:
        if not self.modes:
            raise ArmhubertError("modes must name at least one, got none")
        for mode in (*self.modes, *(split_baseline(text)[1] for text in self.baselines)):
            if mode not in MODES:
                raise ArmhubertError(f"mode must be one of {', '.join(MODES)}, got {mode!r}{nearest(mode, MODES)}")
        for name in ("seconds", "batch_sizes"):
            if any(value <= 0 for value in getattr(self, name)):
                raise ArmhubertError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.seconds and not self.batch_sizes:
            raise ArmhubertError("give at least one length or batch size, got none: nothing would be timed")
        if max((*self.seconds, self.batch_seconds), default=0) > 3600:
            raise ArmhubertError(f"lengths must be at most 3600 s, got {max((*self.seconds, self.batch_seconds)):g}")
        if min(self.repeats, self.warmup + 1) < 1:
            raise ArmhubertError(f"repeats must be at least 1 and warmup at least 0, got {self.repeats}, {self.warmup}")


def split_baseline(text: str) -> tuple[str, str]:
    """`NAME[:MODE]` -> name, mode; a path may hold colons, so only a known mode is taken for one."""
    name, _, mode = text.rpartition(":")
    return (name, mode) if name and mode in MODES else (text, "eager")


# ---- candidates -------------------------------------------------------------


class Candidate(NamedTuple):
    """Something that turns waveforms into features, and what is known of it without running it."""

    name: str
    source: str
    mode: str
    run: Callable[[Tensor], Tensor]
    """[B, S] on the device -> [B, T, D]."""
    module: nn.Module
    """In float32 and eager: for counts and stages."""
    parameters: int
    parameters_without_heads: int
    bytes_on_disk: int
    macs: Callable[[int], int]
    """Samples of one utterance -> multiply-accumulates."""


def load_candidate(source: str, mode: str, *, student: str, heads: bool, device: torch.device) -> Candidate:
    """A baseline by name, or the model at `source`, ready to run in `mode`.

    Raises:
        ArmhubertError: nothing usable at `source`, or a mode that this machine or model does not have.
    """
    module: nn.Module
    left_out = 0
    if source == "hubert-base" and mode.startswith("onnx"):
        with torch.random.fork_rng([]):
            module = ARMHuBERT(HUBERT_BASE).eval()
    elif source in BASELINES:
        module = baseline(source)
    elif source == "released":
        module = ReleasedWay(ARMHuBERT.from_pretrained(student, heads=False)).eval()
    else:
        weights = load_weights(source)
        left_out = 0 if heads else sum(t.numel() for name, t in weights.state.items() if name.startswith("heads."))
        impl: Impl = "triton" if mode == "triton" else "auto"
        module = ARMHuBERT.from_weights(weights if heads else weights.without_heads(), impl=impl)
    if mode == "triton":
        if not isinstance(module, SpeechEncoder):
            raise ArmhubertError(f"mode triton is for models of armhubert, got {source!r}: choose another mode for it")
        try:
            resolve_impl("triton", torch.empty(0, device=device))
        except ValueError as error:
            raise ArmhubertError(f"mode triton: {error}") from None
    module.requires_grad_(False).to(device)
    encoder = module.student if isinstance(module, ReleasedWay) else module
    count = count_parameters(module)
    run, size = _prepare(module, mode, device)
    return Candidate(
        name=f"{source} ({mode})",
        source=source,
        mode=mode,
        run=run,
        module=module,
        parameters=count.total + left_out,
        parameters_without_heads=count.without_heads,
        bytes_on_disk=size,
        macs=(lambda samples: macs(encoder.config, samples))
        if isinstance(encoder, SpeechEncoder)
        else _counter(module),
    )


def _prepare(module: nn.Module, mode: str, device: torch.device) -> tuple[Callable[[Tensor], Tensor], int]:
    """A call in that mode, and the bytes that its weights take on disk."""
    if mode in ("onnx", "onnx-int8"):
        return _in_onnx(module, device, int8=mode == "onnx-int8")
    dtype = torch.float32
    if mode == "bf16":
        module, dtype = copy.deepcopy(module).to(torch.bfloat16), torch.bfloat16
    elif mode == "int8":
        if device.type != "cpu":
            raise ArmhubertError(f"mode int8 runs on a CPU, got device {device}: use bf16 there")
        module = copy.deepcopy(module)
        quantise(module)
    size = state_bytes(module)
    call = torch.compile(module, dynamic=True) if mode == "compiled" else module

    def run(waveforms: Tensor) -> Tensor:
        with torch.no_grad():
            return last_hidden_state(call(waveforms.to(dtype)))

    return run, size


def _in_onnx(module: nn.Module, device: torch.device, *, int8: bool) -> tuple[Callable[[Tensor], Tensor], int]:
    """In ONNX Runtime; HuBERT Base of transformers as the encoder of ours that equals it."""
    if device.type != "cpu":
        raise ArmhubertError(f"modes onnx and onnx-int8 run on a CPU, got device {device}: use another mode there")
    if not isinstance(module, ARMHuBERT):
        raise ArmhubertError("modes onnx and onnx-int8 are for models of armhubert and for hubert-base")
    program, size = onnx_program(module, int8=int8)

    def run(waveforms: Tensor) -> Tensor:
        return program(waveforms, torch.full((len(waveforms),), waveforms.shape[1]))[0]

    return run, size


def last_hidden_state(output: Any) -> Tensor:
    """The features in what a model of ours, or a baseline, returns."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


def state_bytes(module: nn.Module) -> int:
    """Bytes of the module's weights as torch writes them."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()


def _counter(module: nn.Module) -> Callable[[int], int]:
    """Multiply-accumulates counted on the meta device, where PyTorch's counter knows attention."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(samples: int) -> int:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            copy.deepcopy(module).to("meta")(torch.empty(1, samples, device="meta"))
        return counter.get_total_flops() // 2

    return count


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
    wait = torch.cuda.synchronize if waveforms.is_cuda else lambda: None
    passes: list[dict[str, float]] = []
    began: list[float] = []

    def enter(child: nn.Module, *_: Any) -> None:
        wait()
        began.append(time.perf_counter())

    def leave(child: nn.Module, *_: Any) -> None:
        wait()
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
            wait()
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
    """Float32 matrix product of 1536 x 1536."""
    bytes_per_second: float
    """Copy of 256 MiB, bytes read and written."""


def machine_rates(device: torch.device, repeats: int = 5) -> Rates:
    """Measure the matrix rate and the bandwidth."""
    size, count = 1536, 1 << 26
    a = torch.ones(size, size, device=device)
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    timings = interleave(
        {"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, repeats=repeats, device=device
    )
    return Rates(size**3 / timings["product"].median, 8 * count / timings["copy"].median)


# ---- memory -----------------------------------------------------------------

_CHILD = """
import json, sys
from armhubert.profile import _peak_of_child
print(json.dumps(_peak_of_child(**json.loads(sys.argv[1]))))
"""


def peak_memory(config: ProfileConfig, source: str, mode: str, batch: int, seconds: float) -> int:
    """Bytes that loading a candidate and running it once add to a process, at their peak.

    On a CPU in a process of its own, above what it takes to import the libraries; on a GPU the allocator's own figure.
    """
    settings = {"student": config.model, "source": source, "mode": mode, "heads": config.heads, "device": config.device}
    settings |= {"batch": batch, "seconds": seconds, "threads": torch.get_num_threads()}
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(settings)], capture_output=True, text=True, check=False
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArmhubertError(f"{source} ({mode}) failed in a process of its own while its memory was measured: {last}")
    return int(child.stdout.strip().splitlines()[-1])


def _peak_of_child(
    *, student: str, source: str, mode: str, heads: bool, device: str, batch: int, seconds: float, threads: int
) -> int:
    torch.set_num_threads(threads)  # this process is ours
    where = pick_device(device)
    with contextlib.suppress(ImportError):
        import transformers  # noqa: F401
    before = _resident("VmRSS")
    candidate = load_candidate(source, mode, student=student, heads=heads, device=where)
    candidate.run(torch.zeros(batch, round(seconds * SAMPLE_RATE), device=where))
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    return _resident("VmHWM") - before


def _resident(kind: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM); getrusage would count the parent's before the exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise ArmhubertError("peak memory on a CPU is read from /proc, which is not there: use --no-memory") from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


# ---- the profile ------------------------------------------------------------


class Building(NamedTuple):
    """A candidate is being loaded, compiled or exported."""

    name: str


class Measuring(NamedTuple):
    """A cell is being timed, or a candidate's memory measured."""

    done: int
    total: int
    what: str


class Cell(NamedTuple):
    """All candidates on batches of one shape, timed in turn."""

    batch: int
    seconds: float
    timings: dict[str, Timing]

    def speedup(self, name: str, baseline: str) -> float:
        """How many times faster `name` is than `baseline`, medians of this cell."""
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
    """Of 10 s of audio."""
    macs_superb: int
    """Of SUPERB's 224.86 s, as 32 utterances of equal length."""
    peak_memory: int | None
    """Bytes, at the largest cell; None: not measured."""
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


Report = Building | Measuring | Profile


def profile(config: ProfileConfig) -> Iterator[Report]:
    """Measure; the last report is the `Profile`.

    Raises:
        ArmhubertError: a source that is not there, or a mode that it or this machine does not have.
    """
    device = pick_device(config.device)
    asked = [(config.model, mode) for mode in config.modes] + [split_baseline(text) for text in config.baselines]
    candidates: dict[str, Candidate] = {}
    for source, mode in dict.fromkeys(asked):
        yield Building(f"{source} ({mode})")
        candidate = load_candidate(source, mode, student=config.model, heads=config.heads, device=device)
        candidates[candidate.name] = candidate
    shapes = [(1, s) for s in config.seconds] + [(b, config.batch_seconds) for b in config.batch_sizes]
    batch, seconds = max(shapes, key=lambda shape: shape[0] * shape[1])
    steps = len(shapes) + (len(candidates) if config.memory else 0)
    peaks: dict[str, int] = {}
    if config.memory:  # first, while nothing else runs here
        for name, candidate in candidates.items():
            yield Measuring(len(peaks), steps, f"memory of {name}")
            peaks[name] = peak_memory(config, candidate.source, candidate.mode, batch, seconds)
    cells = []
    for number, (b, s) in enumerate(shapes):
        yield Measuring(len(peaks) + number, steps, f"{b} x {s:g} s")
        waveforms = noise(b, s, device)
        runs = {name: functools.partial(c.run, waveforms) for name, c in candidates.items()}
        cells.append(Cell(b, s, interleave(runs, repeats=config.repeats, warmup=config.warmup, device=device)))
    rates = machine_rates(device)
    waveforms = noise(1, 10.0, device)
    yield Profile(
        {
            **conditions(device),
            "repeats": config.repeats,
            "random weights": sorted({*BASELINES} & {s for s, _ in asked}),
        },
        rates,
        tuple(_describe(c, candidates, waveforms, peaks.get(name), config.repeats) for name, c in candidates.items()),
        tuple(cells),
    )


def noise(batch: int, seconds: float, device: torch.device) -> Tensor:
    """The waveforms that are timed: [B, S] of normal noise, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, round(seconds * SAMPLE_RATE), generator=generator).to(device) * 0.1


def _describe(
    candidate: Candidate, candidates: dict[str, Candidate], waveforms: Tensor, peak: int | None, repeats: int
) -> Model:
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
        peak,
        error,
        stages(candidate.module, waveforms, repeats) if candidate.mode == "eager" else {},
    )


# ---- what is left to read and to look at ------------------------------------


def as_json(result: Profile) -> dict[str, Any]:
    """The profile as plain data; ratios are those of its own cells."""
    return {
        "conditions": result.conditions,
        "rates": result.rates._asdict(),
        "models": [model._asdict() for model in result.models],
        "cells": [
            {
                "batch": cell.batch,
                "seconds": cell.seconds,
                "timings": {name: timing._asdict() for name, timing in cell.timings.items()},
            }
            for cell in result.cells
        ],
    }


def write(result: Profile, folder: Path) -> list[Path]:
    """profile.json, profile.csv (a row a model and cell) and profile.png in `folder`."""
    paths = [folder / f"profile.{kind}" for kind in ("json", "csv", "png")]
    write_atomic(paths[0], json.dumps(as_json(result), indent=1) + "\n")
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["model", "mode", "batch", "seconds", "median_s", "low_s", "high_s", "real_time_factor"])
    for cell in result.cells:
        for model in result.models:
            timing = cell.timings[model.name]
            factor = timing.median / (cell.batch * cell.seconds)
            table.writerow([model.source, model.mode, cell.batch, cell.seconds, *timing, factor])
    write_atomic(paths[1], rows.getvalue())
    draw(result, paths[2])
    return paths


def draw(result: Profile, path: Path) -> None:
    """Left: speed of every cell, in seconds of audio a second; right: where the eager passes spend their time."""
    figure, (speed, parts) = figures.panels(2, width=13, height=1.6 + 0.42 * len(result.models) + 2)
    names = [label(model) for model in result.models]
    height = 0.8 / len(result.cells)
    for i, (cell, color) in enumerate(zip(result.cells, figures.shades(len(result.cells)), strict=True)):
        rates = [cell.batch * cell.seconds / cell.timings[model.name].median for model in result.models]
        offsets = [row + (i + 0.5) * height - 0.4 for row in range(len(names))]
        speed.barh(offsets, rates, height, color=color, label=f"{cell.batch} x {cell.seconds:g} s")
    speed.set(xlabel="seconds of audio a second", yticks=range(len(names)), yticklabels=names)
    speed.invert_yaxis()
    eager = [model for model in result.models if model.stages]
    left = [0.0] * len(eager)
    kinds = list(dict.fromkeys(stage for model in eager for stage in model.stages))
    for stage, color in zip(kinds, figures.shades(len(kinds)), strict=True):
        widths = [model.stages.get(stage, 0.0) for model in eager]
        parts.barh(range(len(eager)), widths, 0.6, left=left, color=color, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    parts.set(xlabel="seconds for 1 x 10 s, by stage (eager)", yticks=range(len(eager)))
    parts.set_yticklabels([label(model) for model in eager])
    parts.invert_yaxis()
    figures.save(figure, path)


def label(model: Model) -> str:
    """A model's name for tables and pictures: the last part of its source, and its mode where it is not eager."""
    name = model.source if model.source in BASELINES else Path(model.source).name or model.source
    return name if model.mode == "eager" else f"{name}, {model.mode}"


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
