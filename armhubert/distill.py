"""Distillation: a teacher, speech and settings in; a student, step by step, out.

`distill` prepares and `_Training.reports` loops, to be read from top to bottom; they yield reports and print nothing. A
step is in `armhubert.distill_run`.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from armhubert import checkpoint, runlog
from armhubert.checkpoint import TrainingState
from armhubert.config import SAMPLE_RATE, EncoderConfig
from armhubert.data import SCAN_CACHE, Scanning, check_main_guard, count_by_kind, padding_waste, write_skipped
from armhubert.distill_config import RESUMABLE, DistillConfig
from armhubert.distill_data import Data, prepare, write_list
from armhubert.distill_models import load_models
from armhubert.distill_run import Progress, Run, StepBatches, Validated, Window, while_read
from armhubert.distributed import World, join_world
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.files import held, make_folder, remove_temporaries, write_atomic
from armhubert.kernels.onednn import emulated
from armhubert.machine import device_name, high_water_mark, pick_device, ran_out_of_memory
from armhubert.settings import build, coerced, read_mapping
from armhubert.student import ARMHuBERT, count_parameters
from armhubert.teacher import fingerprint

__all__ = [
    "DistillConfig",
    "Finished",
    "Progress",
    "Report",
    "Saved",
    "Scanning",
    "Started",
    "StepSkipped",
    "Unreadable",
    "Validated",
    "distill",
    "load_run_config",
]

CONFIG_FILE, CHECKPOINT_FILE, SKIPPED_FILE = "distill.json", "checkpoint.pt", "skipped.tsv"
SAVED_WITHIN = 900.0
"""Seconds after which a checkpoint is due, where `save_every` does not say when."""


# ---- reports ---------------------------------------------------------------


class Started(NamedTuple):
    """Everything is checked and built; training begins."""

    config: DistillConfig
    student: EncoderConfig
    teacher_parameters: int
    student_parameters: int
    student_parameters_without_heads: int
    copied_from_teacher: int
    """Tensors that the student starts with."""
    utterances: int
    seconds: float
    """Audio to train on, before long utterances are cropped."""
    valid_utterances: int
    valid_seconds: float
    skipped: dict[str, int]
    """Files that are not used, counted by reason."""
    skipped_report: Path | None
    """Where they are listed; None where all are used."""
    padding_waste: float
    """Share of the first epoch's batches that is padding."""
    steps: int
    """Steps of the whole run."""
    first_step: int
    """Steps that were made before; more than 0 in a resumed run."""
    processes: int
    device: str
    notes: tuple[str, ...]
    """What the user may not have meant."""


class Saved(NamedTuple):
    """The training state is on disk."""

    step: int
    path: Path


class Unreadable(NamedTuple):
    """An utterance that could not be read was left out of its batch."""

    step: int
    """The step that it was to be part of, or after which it was to be validated on."""
    why: str


class StepSkipped(NamedTuple):
    """Loss or gradients were not finite; the step was left out."""

    step: int
    in_a_row: int


Reason = Literal["done", "early stop", "stopped", "not begun"]
"""Why a run ended; `not begun`: it was stopped before anything but the scan's cache was written."""


class Finished(NamedTuple):
    """The end of the run, or of this part of it."""

    step: int
    reason: Reason
    best_loss: float
    seconds: float
    audio_seconds: float
    peak_memory: int
    """Bytes: of the GPU where one is used, else of the process."""
    out: Path


Report = Scanning | Started | Progress | Validated | Saved | Unreadable | StepSkipped | Finished


# ---- the loop --------------------------------------------------------------


def distill(
    config: DistillConfig,
    *,
    resume: bool = False,
    force: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Distil a student: a generator, which does nothing until it is iterated and yields reports, last `Finished`.

    Args:
        config: the settings. With `resume`, those of the run to continue (`load_run_config`), which may differ in
            what `armhubert.distill_config.RESUMABLE` names.
        resume: continue from `config.out`'s checkpoint.
        force: start anew although `config.out` exists.
        should_stop: asked while the audio is examined and before every step; on True the run ends, with a
            checkpoint if steps have begun.

    Raises:
        ArmhubertError: bad input, before anything but the scan's cache is written, or a run that cannot go on, its
            last checkpoint intact: it diverged, memory ran out, all files of a batch have gone, a process that reads
            audio died, the disk is full.
    """
    check_main_guard()
    out = Path(config.out)
    _check_out(out, config, resume, force)
    saved = checkpoint.load(out / CHECKPOINT_FILE) if resume else None
    with join_world(pick_device(config.device)) as world, contextlib.ExitStack() as stack:

        def claim() -> None:
            make_folder(out)
            stack.enter_context(held(out, strict=False))
            _check_out(out, config, resume, force)

        teacher, student, copied = load_models(config, world.device)
        data = yield from prepare(config, resume, student.config.receptive_field, world, claim, should_stop)
        if saved is not None:  # again: until the folder was the lead's, another process may have gone on
            saved = checkpoint.load(out / CHECKPOINT_FILE)
            if world.any(saved.state.step != world.from_lead(saved.state.step)):
                raise ArmhubertError(
                    f"all processes must find the same {out / CHECKPOINT_FILE}, this one found step "
                    f"{saved.state.step}: wait until the drive shows all the last one, and resume again"
                )
        if data is None:
            if saved is None:
                yield _finished(TrainingState(), "not begun", world, out)
            else:
                yield _finished(saved.state, "stopped", world, out)
            return
        identity = _identity(config, teacher, student, data, world)
        run = Run(config, world, teacher, student, data)
        if saved is not None:
            _check_identity(saved.identity, identity, out, data)
            run.restore(saved)
            if run.state.step > run.steps:
                raise ArmhubertError(
                    f"{out} has made {run.state.step} steps, more than the {run.steps} asked for: ask for more, or "
                    "start a new run"
                )
        started = _started(run, copied, out)
        if world.leads:
            remove_temporaries(out / name for name in (CHECKPOINT_FILE, "model.safetensors"))
            if saved is None:  # with `force`, the old run's state and student must not be taken for this one's
                for name in (CHECKPOINT_FILE, "model.safetensors", "config.json"):
                    (out / name).unlink(missing_ok=True)
            write_atomic(out / CONFIG_FILE, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
            write_list(data, config)
            write_skipped(data.skipped, out / SKIPPED_FILE)
        log = runlog.RunLog(out, run.state.step) if world.leads else None
        yield started

        try:
            yield from _Training(run, log, identity, should_stop).reports()
        finally:
            if log is not None:
                log.close()


class _Training:
    """Training from where a run stands to its end, or to the signal that stops it, as reports."""

    def __init__(
        self, run: Run, log: runlog.RunLog | None, identity: dict[str, Any], should_stop: Callable[[], bool]
    ) -> None:
        self.run, self.log, self.identity, self.should_stop = run, log, identity, should_stop
        self.config, self.state, self.out = run.config, run.state, Path(run.config.out)
        self.validate_every = self.config.validate_every or max(10, run.steps // 20)
        self.save_every = self.config.save_every or self.validate_every
        self.window = Window(run)
        self.saved_at, self.saved_step = time.monotonic(), -1

    def reports(self) -> Iterator[Report]:
        """Step, log, validate and save by turns; the last report is `Finished`."""
        run, state = self.run, self.state
        reason: Reason | None = None
        if state.validation_due:
            reason = yield from self.validate()
            yield self.save()
        groups = while_read(run.groups(), self.should_stop)
        while not reason:
            group = yield from self.next_group(groups)
            if group is None:
                reason = "done" if state.step >= run.steps else "stopped"
                break
            yield from self.step(group)
            last = state.step >= run.steps
            if self.window.count and (last or state.step % self.config.log_every == 0):
                yield self.progress()
            reason = "done" if last else None
            if run.data.valid and (last or state.step % self.validate_every == 0):
                reason = (yield from self.validate()) or reason
            late = self.config.save_every is None and time.monotonic() - self.saved_at > SAVED_WITHIN
            if reason or state.step % self.save_every == 0 or late:
                yield self.save()
        run.world.wait()
        if reason != "stopped" and state.validations_without_gain and state.best_loss == float("inf"):
            raise ArmhubertError(
                f"no held-out loss was finite, so {self.out} holds the student of step {state.step}, which is no good: "
                f"start a new run with a learning rate below {self.config.learning_rate}, or with clip set"
            )
        yield _finished(state, reason, run.world, self.out)

    def next_group(self, groups: Iterator[StepBatches]) -> Generator[Report, None, StepBatches | None]:
        """The next step's audio; None, with a checkpoint, where a process has no step left, a signal or a failure."""
        group, failure, began = None, None, time.perf_counter()
        try:
            group = None if self.should_stop() else next(groups, None)
        except ArmhubertError as error:  # files have gone, or a reader
            failure = error
        self.window.waited += time.perf_counter() - began
        if not self.run.world.any(group is None):
            return group
        if self.state.step < self.run.steps and self.saved_step != self.state.step:
            yield self.save()
        if failure := self.run.world.failure(failure):
            self.run.world.wait()  # the end of one process is that of all: the lead saves first
            raise failure
        return None

    def step(self, group: StepBatches) -> Iterator[Report]:
        """One step, which is skipped where something is not finite.

        Raises:
            ArmhubertError: so many in a row were skipped that the run has diverged, or memory ran out.
        """
        config, state = self.config, self.state
        yield from (Unreadable(state.step + 1, why) for _, audio in group.mine for why in audio.left_out)
        try:
            outcome = self.run.step(group)
        except Exception as error:
            yield from self.out_of_memory(error, f"a batch of step {state.step + 1}")
        if outcome is not None:
            self.window.add(outcome)
            return
        yield StepSkipped(state.step, state.skipped_in_a_row)
        if self.run.diverged:
            remedy = "with clip set, or in bf16 or fp32" if config.precision == "fp16" else "or with clip set"
            kept = f"; {self.out} keeps the last checkpoint" if (self.out / CHECKPOINT_FILE).is_file() else ""
            raise ArmhubertError(
                f"{state.skipped_in_a_row} steps in a row had a loss or gradients that are not finite, at step "
                f"{state.step}: start a new run with a learning rate below {config.learning_rate}, {remedy}{kept}"
            )

    def progress(self) -> Progress:
        """What the steps since the last report were like."""
        progress = self.window.report()
        if self.log is not None:
            scalars = {"loss": progress.loss, "learning_rate": progress.learning_rate}
            scalars |= {"gradient_norm": progress.gradient_norm, "audio_rate": progress.audio_rate}
            self.log.add("train", progress.step, scalars, progress.layers)
        return progress

    def validate(self) -> Generator[Report, None, Reason | None]:
        """Validate, and export the best student; returns why training is to end, if it is."""
        state = self.state
        state.validation_due = True
        try:
            validated = self.run.validate(self.should_stop)
        except ArmhubertError:  # in all processes
            yield self.save()
            self.run.world.wait()
            raise
        except Exception as error:
            yield from self.out_of_memory(error, "a batch of held-out speech")
        if validated is None:
            return "stopped"
        state.validation_due = False
        if self.log is not None:
            self.log.add("valid", state.step, {"loss": validated.loss}, validated.layers)
        if validated.best:
            self.run.export(self.out)
        yield from (Unreadable(state.step, why) for why in validated.left_out)
        yield validated
        given_up = self.config.patience is not None and state.validations_without_gain >= self.config.patience
        return "early stop" if given_up and state.step < self.run.steps else None

    def save(self) -> Saved:
        """Everything needed to go on, by the lead."""
        self.saved_at, self.saved_step = time.monotonic(), self.state.step
        if self.run.world.leads:
            self.window.keep()
            checkpoint.save(self.out / CHECKPOINT_FILE, self.run.checkpoint(self.identity))
            # None validated yet, or none finite: the latest is what there is.
            if self.state.step and self.state.best_loss == float("inf"):
                self.run.export(self.out)
        if self.log is not None:
            self.log.draw()
        return Saved(self.state.step, self.out / CHECKPOINT_FILE)

    def out_of_memory(self, error: Exception, what: str) -> Generator[Report, None, NoReturn]:
        """Save and tell of memory that ran out, perhaps in this process alone; any other error goes on."""
        if not ran_out_of_memory(error):
            raise error
        traceback.clear_frames(error.__traceback__)  # their tensors are in the way of saving
        if self.run.world.leads:
            yield self.save()
        resume = "" if self.config.gradient_checkpointing else "resume with gradient_checkpointing=True, or "
        raise ArmhubertError(
            f"the memory of {device_name(self.run.world.device)} did not hold {what}: {resume}start a new run with "
            f"batch_seconds below {self.config.batch_seconds:g}"
        ) from error


def _finished(state: TrainingState, reason: Reason, world: World, out: Path) -> Finished:
    memory = high_water_mark(world.device)
    return Finished(state.step, reason, state.best_loss, state.train_seconds, state.audio_seconds, memory, out)


# ---- preparation -----------------------------------------------------------


def _check_out(out: Path, config: DistillConfig, resume: bool, force: bool) -> None:
    if resume and force:
        raise ArmhubertError("resume=True continues a run and force=True starts one anew: give one of them")
    if resume:
        _check_changes(_read_run(out), vars(config))
        return
    if out.exists() and not out.is_dir():
        raise ArmhubertError(f"{out} is a file: choose a folder for the run")
    for source in map(Path, (*config.data, *config.valid)):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ArmhubertError(f"the run's folder {out} lies inside the data {source}: nothing is written there")
    if Path(config.teacher).exists() and Path(config.teacher).resolve().is_relative_to(out.resolve()):
        raise ArmhubertError(f"the run's folder {out} holds the teacher {config.teacher}: choose another folder")
    if force or not out.is_dir() or all(path.name == SCAN_CACHE for path in out.iterdir()):
        return
    if (out / CHECKPOINT_FILE).is_file():
        raise ArmhubertError(f"{out} holds a run: continue it with resume=True, or start anew with force=True")
    if (out / CONFIG_FILE).is_file():
        raise ArmhubertError(f"{out} holds a run that ended before its first checkpoint: start anew with force=True")
    raise ArmhubertError(f"{out} exists, is not empty and is no run: choose another folder, or use force=True")


def load_run_config(out: str | Path, changes: Mapping[str, Any] | None = None) -> DistillConfig:
    """The settings of the run in `out`, with `changes` to those that a resumed run may change.

    Raises:
        ArmhubertError: no run there, or a change to something that it computes or that is no setting.
    """
    out, changes = Path(out), coerced(DistillConfig, changes or {}, "the changes")
    config = _read_run(out)
    _check_changes(config, changes)
    if changes.get("steps") is not None:
        changes = {**changes, "epochs": None}
    elif changes.get("epochs") is not None:
        changes = {**changes, "steps": None}
    resumed = dataclasses.replace(config, **{**changes, "out": str(out)})
    for source in (*resumed.data, *resumed.valid):
        if not Path(source).exists():
            raise ArmhubertError(f"{source!r} is no longer there: resume {str(out)!r} with its data named anew")
    return resumed


def _read_run(out: Path) -> DistillConfig:
    if not (out / CONFIG_FILE).is_file():
        raise ArmhubertError(f"{out} is no run: it has no {CONFIG_FILE}")
    return build(DistillConfig, read_mapping(out / CONFIG_FILE), str(out / CONFIG_FILE))


def _check_changes(saved: DistillConfig, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if name not in RESUMABLE and value != getattr(saved, name):
            raise ArmhubertError(
                f"a resumed run keeps its {name} {getattr(saved, name)!r}, got {value!r}: "
                "leave it out, or start a new run"
            )


def _identity(
    config: DistillConfig, teacher: SpeechEncoder, student: ARMHuBERT, data: Data, world: World
) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    for utterance in (*data.train, *data.valid):
        digest.update(f"{Path(utterance.path).name} {utterance.samples}\n".encode(errors="surrogateescape"))
    return {
        "teacher": fingerprint(teacher),
        "student": student.config.as_dict(),
        "data": digest.hexdigest(),
        "batches in a step": config.accumulate * world.size,
    }


def _check_identity(saved: dict[str, Any], now: dict[str, Any], out: Path, data: Data) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            detail = ""
            if name == "student" and isinstance(saved.get(name), dict):
                changed = [k for k in value if saved[name].get(k) != value[k]]
                detail = f" ({', '.join(changed)})"
            if name == "data":
                skipped = data.skipped
                first = (
                    f", the first of {len(skipped)} skipped {skipped[0].path} ({skipped[0].reason})" if skipped else ""
                )
                detail = f" ({len(data.train)} utterances now{first})"
            if name == "batches in a step":
                detail = f": {saved.get(name)} then, {value} now (accumulate times processes)"
            what = f"other {name}" if name in ("data", "batches in a step") else f"another {name}"
            raise ArmhubertError(f"{out} was made with {what}{detail}: resume with the same, or start a new run")


def _started(run: Run, copied: int, out: Path) -> Started:
    count = count_parameters(run.student)
    data = run.data
    return Started(
        config=run.config,
        student=run.student.config,
        teacher_parameters=sum(p.numel() for p in run.teacher.parameters()),
        student_parameters=count.total,
        student_parameters_without_heads=count.without_heads,
        copied_from_teacher=copied,
        utterances=len(data.train),
        seconds=sum(u.samples for u in data.train) / SAMPLE_RATE,
        valid_utterances=len(data.valid),
        valid_seconds=sum(u.samples for u in data.valid) / SAMPLE_RATE,
        skipped=count_by_kind(data.skipped),
        skipped_report=out / SKIPPED_FILE if data.skipped else None,
        padding_waste=padding_waste(run.plan(0)),
        steps=run.steps,
        first_step=run.state.step,
        processes=run.world.size,
        device=device_name(run.world.device),
        notes=tuple(_notes(run)),
    )


def _notes(run: Run) -> Iterator[str]:
    config = run.config
    if run.state.step == run.steps:
        yield f"all {run.steps} steps were made before: to go on, resume with steps=... above {run.steps}"
    if run.world.device.type == "cpu" and run.dtype is not None and emulated(run.dtype):
        yield f"this processor has no instructions for {config.precision}: fp32 is much faster on it"
    if run.world.device.type == "cuda" and run.dtype is None:
        yield "fp32 leaves the GPU's tensor cores unused: precision='bf16' uses them"
    longest = [min(u.samples / SAMPLE_RATE, config.max_seconds) for u in run.data.train]
    heard = sum(longest) / sum(u.samples / SAMPLE_RATE for u in run.data.train)
    if heard < 0.9:
        yield (
            f"an epoch hears {heard:.0%} of the audio, max_seconds={config.max_seconds:g} of each file: cut long "
            "recordings into utterances"
        )
    if alone := sum(seconds > config.batch_seconds for seconds in longest):
        yield (
            f"{alone} of {len(longest)} utterances are longer than batch_seconds={config.batch_seconds:g}: each is a "
            f"batch of its own, of up to {max(longest):.1f} s; max_seconds=... crops them"
        )
