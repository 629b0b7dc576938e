"""Where a distillation step's time goes: the loop's own pieces, timed one after the other on real batches."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from armhubert.audio import SAMPLE_RATE
from armhubert.clock import Timing, conditions, summarize
from armhubert.data import AudioBatch, batches, discover, plan_epoch, scan
from armhubert.distill import check_views
from armhubert.distill_config import DistillConfig, student_config
from armhubert.distributed import pick_device
from armhubert.forecast import high_water_mark
from armhubert.losses import Objective, layer_weights
from armhubert.masking import batch_mask, span_mask
from armhubert.student import ARMHuBERT
from armhubert.teacher import layer_mapping, load_teacher, teacher_targets

PARTS = ("data", "teacher", "student forward", "loss", "backward", "optimizer")


class TrainingProfile(NamedTuple):
    """Seconds of a step and of its parts."""

    conditions: dict[str, Any]
    batch_seconds: float
    """Mean seconds of audio in a batch."""
    step: Timing
    """Everything but reading audio, which happens beside it."""
    parts: dict[str, Timing]
    """By `PARTS`; `data` is one process reading and collating a batch, with nothing beside it."""
    peak_memory: int
    """Bytes: of the process on a CPU, of the allocator on a GPU."""

    @property
    def loader_rate(self) -> float:
        """Hours of audio an hour that one reading process delivers."""
        return self.batch_seconds / self.parts["data"].median


class Step(NamedTuple):
    """A step was measured."""

    done: int
    total: int


def profile_training(config: DistillConfig, *, steps: int = 5, warmup: int = 1) -> Iterator[Step | TrainingProfile]:
    """Measure `steps` steps of the distillation that `config` describes; the last report is the result.

    The pieces are those of `armhubert.distill`; on a GPU the device is waited for between them, so that the parts add
    up to more than an undisturbed step.

    Raises:
        ArmhubertError: as `distill`: no teacher, no speech, settings that make no student.
    """
    device = pick_device(config.device)
    teacher = load_teacher(config.teacher, device=device)
    check_views(config, teacher)
    with torch.random.fork_rng([]):
        student = ARMHuBERT(student_config(config, teacher.config), impl=config.impl).to(device).train()
    objective = Objective(student, config.terms, config.distance, config.impl)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    layers = layer_mapping(student.config.layers, teacher.config.layers)
    weights = layer_weights(student.config.layers, config.layer_weight).to(device)
    term_weights = torch.tensor(list(config.terms.values()), device=device)
    precision = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in (*PARTS, "step")}
    audio_seconds = []

    def timed(part: str, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        wait()
        started = time.perf_counter()
        result = run(*args, **options)
        wait()
        seconds[part].append(time.perf_counter() - started)
        return result

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    audio = _audio(config, teacher.config.receptive_field)
    for number in range(warmup + steps):
        batch = timed("data", next, audio)
        waveforms, lengths = batch.waveforms.to(device), batch.lengths.to(device)
        mask = _mask(config, batch, teacher.config.frames).to(device)
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])  # dropout draws
        autocast = torch.autocast(device.type, precision, enabled=precision is not None)
        with forked, autocast:
            targets = timed("teacher", teacher_targets, teacher, waveforms, lengths, mask, layers, **objective.needs)
            hidden, frames = timed("student forward", objective.views, waveforms, lengths, mask)
            sums = timed("loss", objective.compare, hidden, frames, targets)
        loss = (term_weights @ sums) @ weights / int(frames.sum())
        timed("backward", loss.backward)
        timed("optimizer", update)
        seconds["step"].append(sum(seconds[part][-1] for part in PARTS[1:]))
        audio_seconds.append(float(batch.lengths.sum()) / SAMPLE_RATE)
        yield Step(number + 1, warmup + steps)
    timings = {name: summarize(values[warmup:]) for name, values in seconds.items()}
    yield TrainingProfile(
        {
            **conditions(device),
            "teacher": config.teacher,
            "loss": config.loss,
            "precision": config.precision,
            "steps": steps,
        },
        sum(audio_seconds) / len(audio_seconds),
        timings.pop("step"),
        timings,
        high_water_mark(device),
    )


def _audio(config: DistillConfig, shortest: int) -> Iterator[AudioBatch]:
    examined = scan(discover(config.sources), min_samples=shortest, cache=None, workers=config.workers)
    while True:
        try:
            next(examined)
        except StopIteration as end:
            found = end.value
            break
    found.require_utterances()
    for epoch in itertools.count():
        plan = plan_epoch(
            found.utterances, batch_seconds=config.batch_seconds, max_seconds=config.max_seconds,
            seed=config.seed, epoch=epoch,
        )  # fmt: skip
        yield from batches(found.utterances, plan, workers=0)


def _mask(config: DistillConfig, batch: AudioBatch, frames: Callable[[Any], Any]) -> Tensor:
    rng = np.random.default_rng(config.seed)
    spans = [
        span_mask(frames(int(length)), config.mask_prob, rng, mean_length=config.mask_length)
        for length in batch.lengths
    ]
    return batch_mask(spans, frames(batch.waveforms.shape[1]))
