"""Where a distillation step's time goes: the loop's own steps on real batches, with their parts timed."""

import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from armhubert.clock import Timing, summarize, wait
from armhubert.data import Scanning, discover, scan
from armhubert.distill_config import DistillConfig
from armhubert.distill_data import Data
from armhubert.distill_models import load_models
from armhubert.distill_run import Run
from armhubert.distributed import World
from armhubert.errors import ArmhubertError
from armhubert.files import write_atomic
from armhubert.machine import conditions, high_water_mark, pick_device
from armhubert.teacher import TeacherTargets

PARTS = ("data", "teacher", "student forward", "loss", "backward", "optimizer")
SPARE = 20
"""Steps that may be left out as not finite: fp16 finds the scale of the loss in 17 at most."""
FILES = 4_000
"""Most files that are examined: some hours of speech make batches like those of all of it."""


class TrainingProfile(NamedTuple):
    """Seconds of a step and of its parts."""

    conditions: dict[str, Any]
    audio_seconds: float
    """Mean seconds of audio in a step."""
    step: Timing
    """Everything but reading audio, which happens beside it."""
    parts: dict[str, Timing]
    """By `PARTS`; `data` is one process reading and collating a step's batches, with nothing beside it. Drawing masks
    and moving audio to the device are in none."""
    peak_memory: int
    """Bytes: of the process on a CPU, of the allocator on a GPU."""

    @property
    def loader_rate(self) -> float:
        """Hours of audio an hour that one reading process delivers."""
        return self.audio_seconds / self.parts["data"].median

    def write(self, path: Path) -> None:
        """As JSON."""
        parts = {name: timing._asdict() for name, timing in self.parts.items()}
        content = {**self._asdict(), "step": self.step._asdict(), "parts": parts}
        write_atomic(path, json.dumps(content, indent=1) + "\n")


class Step(NamedTuple):
    """A step was measured."""

    done: int
    total: int


class _TimedRun(Run):
    """The training loop's steps; notes how long their parts take."""

    spent: dict[str, float]
    """Seconds of the step by part."""

    def timed(self, part: str, run: Callable[..., Any], *args: Any) -> Any:
        wait(self.world.device)
        started = time.perf_counter()
        result = run(*args)
        wait(self.world.device)
        self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - started
        return result

    def targets(self, waveforms: Tensor, lengths: Tensor | None, mask: Tensor) -> TeacherTargets:
        targets: TeacherTargets = self.timed("teacher", super().targets, waveforms, lengths, mask)
        return targets

    def forward(self, waveforms: Tensor, lengths: Tensor | None, mask: Tensor, targets: TeacherTargets) -> Tensor:
        hidden, frames = self.timed("student forward", self.objective.views, waveforms, lengths, mask)
        terms: Tensor = self.timed("loss", self.objective.compare, hidden, frames, targets)
        return terms

    def backward(self, terms: Tensor, frames: int) -> None:
        self.timed("backward", super().backward, terms, frames)

    def update(self, loss: Tensor) -> tuple[Tensor, bool]:
        norm, finite = self.timed("optimizer", super().update, loss)
        return norm, finite


def profile_training(
    config: DistillConfig, *, steps: int = 5, warmup: int = 1
) -> Iterator[Scanning | Step | TrainingProfile]:
    """Measure `steps` steps of the distillation that `config` describes; the last report is the result.

    The steps are those of `armhubert.distill`, by one process, without those that are left out as not finite; on a GPU
    the device is waited for between their parts, so that they take longer than undisturbed ones. Of more than `FILES`
    files, so many are drawn at random to make batches of.

    Raises:
        ArmhubertError: as `distill`: no teacher, no speech, settings that make no student; steps that are not finite;
            no steps to measure.
    """
    if steps < 1 or warmup < 0:
        raise ArmhubertError(f"steps must be at least 1 and warmup at least 0, got {steps} and {warmup}")
    device, total = pick_device(config.device), warmup + steps
    teacher, student, _ = load_models(config, device)
    shortest = student.config.receptive_field
    paths = discover(config.sources)
    if len(paths) > FILES:
        paths = random.Random(config.seed).sample(paths, FILES)
    found = yield from scan(paths, min_samples=shortest, cache=None)
    found.require_utterances()
    planned = dataclasses.replace(config, workers=0, epochs=None, steps=2 * total + SPARE)
    run = _TimedRun(planned, World(0, 1, device), teacher, student, Data(found.utterances, (), found.skipped))
    seconds: dict[str, list[float]] = {name: [] for name in (*PARTS, "step")}
    audio_seconds: list[float] = []
    groups = run.groups()
    while len(audio_seconds) < total:
        run.spent = {}
        group = run.timed("data", next, groups, None)
        if group is None:
            raise ArmhubertError(
                f"{run.state.skipped_steps} of {run.state.step} steps had a loss or gradients that are not finite: "
                f"lower the learning rate ({config.learning_rate}) or set clip"
            )
        outcome = run.timed("step", run.step, group)
        if outcome is not None:
            for part, spent in run.spent.items():
                seconds[part].append(spent)
            audio_seconds.append(outcome.audio_seconds)
            yield Step(len(audio_seconds), total)
    timings = {name: summarize(values[warmup:]) for name, values in seconds.items()}
    yield TrainingProfile(
        {
            **conditions(device),
            "teacher": config.teacher,
            "loss": config.loss,
            "precision": config.precision,
            "gradient checkpointing": config.gradient_checkpointing,
            "steps": steps,
        },
        sum(audio_seconds) / len(audio_seconds),
        timings.pop("step"),
        timings,
        high_water_mark(device),
    )
