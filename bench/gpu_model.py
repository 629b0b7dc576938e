"""End to end: the student's inference and the distillation step, against what people run today; random weights.

Times are those of a run as a user starts it, the host's part included: where `host` is near the median, the host is
what it waits for.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from armhubert import encoder as encoder_module
from armhubert.baselines import HUBERT_BASE, ReleasedWay, baseline, released_front_end
from armhubert.bench.cases import released_loss, sdpa_attend, sdpa_reattend
from armhubert.bench.gpu_clock import (
    as_graphs,
    brief,
    cudnn_at_its_best,
    interleave,
    kernel_times,
    peak_extra_bytes,
    warm,
)
from armhubert.bench.gpu_micro import ceilings
from armhubert.config import EncoderConfig, armhubert, mini
from armhubert.encoder import PositionalConv, SpeechEncoder
from armhubert.frontend import FrontEnd
from armhubert.kernels import Impl
from armhubert.kernels.runtime import frame_mask
from armhubert.losses import Objective, layer_weights
from armhubert.student import ARMHuBERT
from armhubert.teacher import layer_mapping, teacher_targets


class Job(NamedTuple):
    """One end-to-end comparison."""

    kind: str
    """inference, distillation, or ceilings: what a copy and a matrix product reach here."""
    B: int
    device: str
    quick: bool
    way: Literal["eager", "graph", "compiled", "compiled twins", "kernels"] = "eager"
    """Candidates as they are, as CUDA graphs, ours by torch.compile or its twins by it; or which kernels ours runs."""
    seconds: float = 10.0
    """Seconds of audio in an utterance."""
    repeats: int = 20
    """Repeats of the distillation step, in turn."""
    against: str | None = None
    """Ours and this baseline alone; None: all of them."""


RELEASED, TEACHER = "released way", "HuBERT Base, transformers sdpa"


def jobs(device: str, quick: bool) -> list[Job]:
    """Both kinds; a batch and one utterance. A baseline that cannot be captured costs no other job, nor a profiler."""
    many = 2 if quick else 16
    found = [
        Job("inference", many, device, quick),
        Job("ceilings", 0, device, quick),
        Job("distillation", many, device, quick),
        *(Job("inference", many, device, quick, "graph", against=name) for name in (TEACHER, RELEASED)),
        Job("inference", 1, device, quick),
        *(Job("inference", 1, device, quick, "graph", against=name) for name in (TEACHER, RELEASED)),
        Job("inference", many, device, quick, "kernels"),
        Job("distillation", many, device, quick, "kernels"),
    ]
    if not quick:
        found += [Job("inference", B, device, quick, way) for B in (many, 1) for way in ("compiled", "compiled twins")]
    return found


def work(job: Job) -> dict[str, Any]:
    """Run one comparison -> its row."""
    if job.kind == "ceilings":
        return {"kind": job.kind, **ceilings(torch.device(job.device))}
    run = _inference if job.kind == "inference" else _distillation
    with cudnn_at_its_best():
        return {"kind": job.kind, "batch": job.B, "way": job.way, "cudnn_benchmark": True, **run(job)}


# ---- other people's ways, in our model --------------------------------------


@contextlib.contextmanager
def with_sdpa() -> Iterator[None]:
    """Run our modules with PyTorch's linear maps, convolutions and attention, and with group norm and GELU apart."""

    def front_end(self: FrontEnd, waveforms: Tensor, *_: Any, **__: Any) -> Tensor:
        return released_front_end(self, waveforms)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y

    def position(self: PositionalConv, x: Tensor) -> Tensor:
        return F.gelu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)

    with (
        mock.patch.object(encoder_module, "linear", linear),
        mock.patch.object(PositionalConv, "forward", position),
        mock.patch.object(encoder_module, "attend", sdpa_attend),
        mock.patch.object(encoder_module, "reattend", sdpa_reattend),
        mock.patch.object(FrontEnd, "forward", front_end),
    ):
        yield


def _model(config: EncoderConfig, kind: type[SpeechEncoder], impl: Impl, device: torch.device) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return kind(config, impl=impl).to(device)


def _samples(job: Job) -> int:
    return 16_000 // 5 if job.quick else int(16_000 * job.seconds)


# ---- inference --------------------------------------------------------------


def _inference(job: Job) -> dict[str, Any]:
    device = torch.device(job.device)
    dtype = torch.float32 if job.quick else torch.bfloat16
    config = mini() if job.quick else armhubert()
    generator = torch.Generator(device).manual_seed(0)
    waveforms = torch.randn(job.B, _samples(job), generator=generator, device=device).to(dtype)
    failed: dict[str, str] = {}
    runs: dict[str, Callable[[], Any]] = {}

    def student(impl: Impl) -> Callable[[], Tensor]:
        model = _model(config, ARMHuBERT, impl, device).to(dtype).eval().requires_grad_(False)
        return lambda: model(waveforms, projections=False).last_hidden_state

    def of(model: torch.nn.Module) -> Callable[[], Tensor]:
        model.to(device, dtype)
        return lambda: model(waveforms)

    makers: dict[str, Callable[[], Callable[[], Any]]] = {"ours": lambda: student("auto")}
    spoilt = False
    if job.way == "compiled":
        makers["ours, torch.compile"] = lambda: torch.compile(student("auto"), dynamic=False)
    if job.way == "compiled twins":
        makers["twins, torch.compile"] = lambda: torch.compile(student("torch"), dynamic=False)
    if job.way in ("eager", "graph"):
        others = {
            RELEASED: lambda: of(ReleasedWay(_model(config, ARMHuBERT, "torch", device).eval())),
            TEACHER: lambda: of(baseline("hubert-base")),
        }
        makers |= {name: make for name, make in others.items() if job.against in (None, name)}
    if job.way == "eager":
        makers["ours, PyTorch twins"] = lambda: student("torch")
    with torch.no_grad():
        for name, make in makers.items():
            try:
                run = make()
                warm(run, device)
                runs[name] = run
            except Exception as error:
                if name == "ours":
                    raise
                failed[name] = brief(error)
        if job.way == "kernels":
            return {"kernels": kernel_times(runs["ours"], device), "spoilt": True}
        if job.way == "graph":
            graphs, spoilt = as_graphs(runs, device, failed)
            runs = {f"{name}, CUDA graph": run for name, run in graphs.items()}
        # a graph's memory is set aside when it is captured
        memory = {name: None if job.way == "graph" else peak_extra_bytes(run, device) for name, run in runs.items()}
        repeats = 3 if job.quick else 30
        timings = interleave(runs, device=device, repeats=repeats, seconds=8, ahead=False) if runs else {}
    hours = waveforms.numel() / 16_000 / 3600
    return {
        "seconds_each": waveforms.shape[1] / 16_000,
        "dtype": str(dtype).removeprefix("torch."),
        "candidates": {
            name: {
                **timing._asdict(),
                "hours_of_audio_per_second": hours / timing.median,
                "peak_extra_bytes": memory[name],
            }
            for name, timing in timings.items()
        },
        "failed": failed,
        "spoilt": spoilt,
    }


# ---- distillation -----------------------------------------------------------


def _distillation(job: Job) -> dict[str, Any]:
    """A training step, teacher HuBERT Base: forward of both, backward, clipping, AdamW; under bf16 autocast where it is
    rehearsed or on a GPU, in float32 on a CPU."""
    device = torch.device(job.device)
    autocast = job.quick or device.type == "cuda"
    student_config = mini() if job.quick else armhubert()
    teacher_config = HUBERT_BASE
    if job.quick:
        teacher_config = dataclasses.replace(mini(), pattern="", projection_width=None)
        student_config = dataclasses.replace(mini(), projection_width=160)
    teacher = _model(teacher_config, SpeechEncoder, "auto", device).eval().requires_grad_(False)
    teacher_twin = _model(teacher_config, SpeechEncoder, "torch", device).eval().requires_grad_(False)
    layers = layer_mapping(student_config.layers, teacher_config.layers)
    samples = _samples(job)
    generator = torch.Generator(device).manual_seed(0)
    waveforms = torch.randn(job.B, samples, generator=generator, device=device)
    lengths = torch.linspace(samples, samples * 0.8, job.B, dtype=torch.float64).long().to(device)
    frames = student_config.frames(lengths)
    total = int(frames.sum())
    mask = (torch.arange(student_config.frames(samples), device=device) % 14 < 10).expand(job.B, -1).contiguous()
    weights = layer_weights(student_config.layers, 0.1).to(device)

    def training(impl: Impl, sums: Callable[[ARMHuBERT, Impl], Callable[[], Tensor]]) -> Callable[[], Tensor]:
        student = _model(student_config, ARMHuBERT, impl, device).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
        compute = sums(student, impl)

        def step() -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                loss = (compute() * weights).sum() / total
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def ours(student: ARMHuBERT, impl: Impl) -> Callable[[], Tensor]:
        objective = Objective(student, {"masking": 1.0}, "mse", impl)

        def compute() -> Tensor:
            targets = teacher_targets(teacher, waveforms, lengths, mask, layers)
            sums: Tensor = objective(waveforms, lengths, mask, targets)
            return sums[0]

        return compute

    def straightforward(student: ARMHuBERT, _: Impl) -> Callable[[], Tensor]:
        valid = frame_mask(frames, mask.shape[1])

        def compute() -> Tensor:
            with with_sdpa():
                with torch.no_grad():
                    clean = teacher_twin(waveforms, lengths).hidden_states
                    masked = teacher_twin(waveforms, lengths, mask).hidden_states
                first = student.layer_inputs(student.embed(waveforms, lengths)[0], frames, mask)
                hidden = (first, *student.layer_outputs(first, frames, through_heads=True))
            assert student.heads is not None
            inputs = list(student.head_inputs(hidden))
            seen, unseen = ([h[i] for i in layers] for h in (clean, masked))
            return released_loss(inputs, student.heads.weight, student.heads.bias, seen, unseen, mask & valid, frames)

        return compute

    runs: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, impl, way in (
        ("ours", "auto", ours),
        ("straightforward: two teacher passes, sdpa, eager loss", "torch", straightforward),
        ("ours, PyTorch twins", "torch", ours),
    ):
        if name.endswith("twins") and not job.quick:
            continue  # its dropout works an utterance at a time
        if job.way == "kernels" and runs:
            break
        try:
            run = training(impl, way)  # type: ignore[arg-type]
            warm(run, device, 2)
            runs[name] = run
        except Exception as error:
            if name == "ours":
                raise
            failed[name] = brief(error)
    if job.way == "kernels":
        return {"kernels": kernel_times(runs["ours"], device), "spoilt": True}
    memory = {name: peak_extra_bytes(run, device) for name, run in runs.items()}
    timings = interleave(runs, device=device, repeats=3 if job.quick else job.repeats, seconds=12, ahead=False)
    audio = float(lengths.sum()) / 16_000
    return {
        "seconds_each": samples / 16_000,
        "dtype": "float32 weights, bfloat16 autocast" if autocast else "float32",
        "candidates": {
            name: {
                **timing._asdict(),
                "steps_per_second": 1 / timing.median,
                "hours_of_audio_per_second": audio / 3600 / timing.median,
                "peak_extra_bytes": memory[name],
            }
            for name, timing in timings.items()
        },
        "failed": failed,
    }
