"""Distillation: a teacher, speech and settings in; a student, step by step, out.

`distill` prepares and `_train` loops, to be read from top to bottom; they yield reports and print nothing. All chance
comes from (seed, epoch, utterance) for crops and masks and from (seed, step, batch) for dropout, so that a resumed run,
or the same run on more processes, computes the same thing.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from armhubert import checkpoint, losses, runlog
from armhubert.audio import SAMPLE_RATE
from armhubert.checkpoint import Checkpoint, Cursor, TrainingState
from armhubert.config import EncoderConfig, build, read_mapping
from armhubert.data import (
    SCAN_CACHE,
    AudioBatch,
    Crop,
    ReaderDied,
    Scan,
    Scanning,
    Utterance,
    batches,
    discover,
    leave_out,
    padding_waste,
    plan_epoch,
    scan,
    split_validation,
    write_skipped,
)
from armhubert.distill_config import RESUMABLE, DistillConfig, student_config
from armhubert.distributed import World, chance, device_name, pick_device, world
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError, brief
from armhubert.files import held, make_folder, write_atomic
from armhubert.forecast import high_water_mark
from armhubert.kernels.onednn import emulated
from armhubert.kernels.runtime import resolve_impl
from armhubert.losses import Objective
from armhubert.masking import batch_mask, scheduled_probability, span_mask
from armhubert.student import ARMHuBERT, count_parameters, model_card
from armhubert.teacher import TeacherTargets, fingerprint, layer_mapping, load_teacher, teacher_targets

CONFIG_FILE, CHECKPOINT_FILE, SKIPPED_FILE = "distill.json", "checkpoint.pt", "skipped.tsv"
MAX_SKIPPED_IN_A_ROW = 10
STEPS_PER_LOADER = 500  # reading processes are started anew after so many steps; the plan in memory stays small
R = TypeVar("R")


# ---- reports ---------------------------------------------------------------


class Started(NamedTuple):
    """Everything is checked and built; training begins."""

    config: DistillConfig
    student: EncoderConfig
    teacher_parameters: int
    student_parameters: int
    student_parameters_without_heads: int
    copied_from_teacher: int
    utterances: int
    seconds: float
    valid_utterances: int
    valid_seconds: float
    skipped: dict[str, int]
    skipped_report: Path | None
    padding_waste: float
    steps: int
    first_step: int
    processes: int
    device: str
    notes: tuple[str, ...]
    """What the user may not have meant."""


class Progress(NamedTuple):
    """Where training is, averaged since the last report."""

    step: int
    steps: int
    epoch: int
    loss: float
    layers: tuple[float, ...]
    learning_rate: float
    gradient_norm: float
    masked_share: float
    audio_rate: float
    """Seconds of audio a second."""
    eta: float
    """Seconds."""
    skipped_steps: int


class Validated(NamedTuple):
    """Error on held-out speech, student and teacher both clean."""

    step: int
    loss: float
    layers: tuple[float, ...]
    best: bool


class NoBest(NamedTuple):
    """No held-out loss of the run was finite, so that none is the lowest: the student written is the last one."""

    step: int


class Saved(NamedTuple):
    """The training state is on disk."""

    step: int
    path: Path


class StepSkipped(NamedTuple):
    """Loss or gradients were not finite; the step was left out."""

    step: int
    in_a_row: int


class Finished(NamedTuple):
    """The end of the run, or of this part of it."""

    step: int
    reason: str
    """done, early stop, stopped, or not begun: stopped before anything of the run but the scan's cache was written."""
    best_loss: float
    seconds: float
    audio_seconds: float
    peak_memory: int
    """Bytes: of the GPU where one is used, else of the process."""
    out: Path


Report = Scanning | Started | Progress | Validated | NoBest | Saved | StepSkipped | Finished


# ---- the loop --------------------------------------------------------------


def distill(
    config: DistillConfig,
    *,
    resume: bool = False,
    force: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Distil a student; yields reports while it works.

    Args:
        config: the settings. With `resume`, of the run to continue, changed only in `RESUMABLE`.
        resume: continue from `config.out`'s checkpoint.
        force: start anew although `config.out` exists.
        should_stop: asked while the audio is examined and after every step; on True the run ends, after the first step
            with a checkpoint.

    Raises:
        ArmhubertError: bad input, before anything but the scan's cache is written, or a run that diverged, its last
            checkpoint intact.
    """
    out = Path(config.out)
    _check_out(out, config, resume, force)
    saved = checkpoint.load(out / CHECKPOINT_FILE) if resume else None
    with world(pick_device(config.device)) as processes, contextlib.ExitStack() as stack:
        teacher, student, copied = load_models(config, processes.device)
        sources = [discover(paths) for paths in (config.sources, config.valid) if paths]
        if processes.leads:
            make_folder(out)
            stack.enter_context(held(out, strict=False))
        data = yield from _prepare_data(config, sources, student.config.receptive_field, processes, should_stop)
        if data is None:
            state, reason = (saved.state, "stopped") if saved is not None else (TrainingState(), "not begun")
            yield _finished(state, reason, processes, out)
            return
        identity = _identity(config, teacher, student, data, processes)
        run = Run(config, processes, teacher, student, data)
        if saved is not None:
            _check_identity(saved.identity, identity, out, data)
            run.restore(saved)
        started = _started(run, copied, out)
        if processes.leads:
            if saved is None:  # with `force`, the old run's state and student must not be taken for this one's
                for name in (CHECKPOINT_FILE, "model.safetensors", "config.json"):
                    (out / name).unlink(missing_ok=True)
            write_atomic(out / CONFIG_FILE, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
            write_skipped(data.scan, out / SKIPPED_FILE)
        log = runlog.RunLog(out, run.state.step) if processes.leads else None
        yield started

        try:
            yield from _train(run, log, identity, should_stop)
        finally:
            if log is not None:
                log.close()


def _while_read(audio: Iterator[R], should_stop: Callable[[], bool]) -> Iterator[R]:
    """What is read, up to where the readers are ended by the signal that also asks this process to stop."""
    try:
        yield from audio
    except ReaderDied:
        if not should_stop():
            raise


def _train(
    run: "Run", log: runlog.RunLog | None, identity: dict[str, Any], should_stop: Callable[[], bool]
) -> Iterator[Report]:
    config, state, out = run.config, run.state, Path(run.config.out)
    validate_every = config.validate_every or max(10, run.steps // 20)
    save_every = config.save_every or validate_every
    window = _Window(run)

    def save() -> Saved:
        if run.world.leads:
            window.keep()
            checkpoint.save(out / CHECKPOINT_FILE, run.checkpoint(identity))
            if state.best_loss == float("inf"):  # none validated yet, or none finite: the latest is what there is
                run.export(out)
        if log is not None:
            log.draw()
        return Saved(state.step, out / CHECKPOINT_FILE)

    def validation() -> Generator[Report, None, str]:
        """Validate; returns why training is to end, if it is."""
        state.validation_due = True
        validated = run.validate(should_stop)
        if validated is None:
            return "stopped"
        state.validation_due = False
        if log is not None:
            log.add("valid", state.step, {"loss": validated.loss}, validated.layers)
        if validated.best:
            run.export(out)
        yield validated
        given_up = config.patience is not None and state.validations_without_gain >= config.patience
        return "early stop" if given_up and state.step < run.steps else ""

    reason = ""
    if state.validation_due:
        reason = yield from validation()
        yield save()
    groups = _while_read(run.groups(), should_stop)
    while not reason:
        try:
            group = next(groups, None)
        except ArmhubertError:  # a file has gone, or a reader: what was learned is kept
            yield save()
            raise
        if run.world.any(group is None) or group is None:  # no step is left, or a signal ended a process' readers
            reason = "done" if state.step >= run.steps else "stopped"
            if reason == "stopped":
                yield save()
            break
        outcome = run.step(group)
        if outcome is None:
            yield StepSkipped(state.step, state.skipped_in_a_row)
            if run.diverged:
                remedy = "with clip set, or in bf16 or fp32" if config.precision == "fp16" else "or with clip set"
                kept = f"; {out} keeps the last good state" if (out / CHECKPOINT_FILE).is_file() else ""
                raise ArmhubertError(
                    f"{state.skipped_in_a_row} steps in a row had a loss or gradients that are not finite, at step "
                    f"{state.step}: start a new run with a learning rate below {config.learning_rate}, {remedy}{kept}"
                )
        else:
            window.add(outcome)
        last = state.step >= run.steps
        if window.count and (last or state.step % config.log_every == 0):
            progress = window.report()
            if log is not None:
                scalars = {"loss": progress.loss, "learning_rate": progress.learning_rate}
                scalars |= {"gradient_norm": progress.gradient_norm, "audio_rate": progress.audio_rate}
                log.add("train", state.step, scalars, progress.layers)
            yield progress
        reason = "done" if last else "stopped" if run.world.any(should_stop()) else ""
        if run.data.valid and (last or state.step % validate_every == 0):
            reason = (yield from validation()) or reason
        if reason or state.step % save_every == 0:
            yield save()
    run.world.wait()
    if state.validations_without_gain and state.best_loss == float("inf"):
        yield NoBest(state.step)
    yield _finished(state, reason, run.world, out)


def _finished(state: TrainingState, reason: str, processes: World, out: Path) -> Finished:
    memory = high_water_mark(processes.device)
    return Finished(state.step, reason, state.best_loss, state.train_seconds, state.audio_seconds, memory, out)


# ---- one run ---------------------------------------------------------------


class Data(NamedTuple):
    """Utterances to train on, utterances held out, and the scan that found them."""

    train: Sequence[Utterance]
    valid: Sequence[Utterance]
    scan: Scan


class _Micro(NamedTuple):
    """One batch of one process: the smallest piece of a step."""

    epoch: int
    place: int
    """In the step, counted over all processes; seeds dropout."""
    crops: list[Crop]


class _Group(NamedTuple):
    """The batches of one optimizer step over all processes, and this process's share of them as audio."""

    all: list[_Micro]
    mine: list[tuple[_Micro, AudioBatch]]
    after: Cursor


class _Outcome(NamedTuple):
    """Of one step, over all processes but for the mask; tensors are still on the device."""

    loss: Tensor
    layers: Tensor
    gradient_norm: Tensor
    masked_share: float
    """Of this process' frames."""
    audio_seconds: float


class Run:
    """Models, optimizer and state of one process of a run."""

    def __init__(
        self, config: DistillConfig, processes: World, teacher: SpeechEncoder, student: ARMHuBERT, data: Data
    ) -> None:
        self.config, self.world, self.teacher, self.student, self.data = config, processes, teacher, student, data
        self.state = TrainingState()
        self.layers = layer_mapping(student.config.layers, teacher.config.layers)
        self.layer_weights = losses.layer_weights(student.config.layers, config.layer_weight).to(processes.device)
        student.gradient_checkpointing = config.gradient_checkpointing
        self.objective = Objective(student, config.terms, config.distance, config.impl).to(processes.device)
        self.term_weights = torch.tensor(list(config.terms.values()), device=processes.device)
        self.wrapped: torch.nn.Module = self.objective
        if processes.size > 1:
            self.wrapped = DistributedDataParallel(
                self.objective, device_ids=[processes.device] if processes.device.type == "cuda" else None
            )
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.dtype is torch.float16)
        self.batches_per_step = config.accumulate * processes.size
        self.steps = config.steps or self._steps_of_epochs(200.0 if config.epochs is None else config.epochs)

    def _steps_of_epochs(self, epochs: float) -> int:
        return max(1, -int(-epochs * len(self._plan(0)) // self.batches_per_step))

    def _plan(self, epoch: int) -> list[list[Crop]]:
        config = self.config
        return plan_epoch(
            self.data.train,
            batch_seconds=config.batch_seconds,
            max_seconds=config.max_seconds,
            seed=config.seed,
            epoch=epoch,
        )

    def _stream(self, cursor: Cursor) -> Iterator[tuple[Cursor, list[Crop]]]:
        """Every batch from `cursor` on, epoch after epoch, with the cursor that follows it."""
        epoch, first = cursor
        while True:
            plan = self._plan(epoch)
            for number in range(first, len(plan)):
                yield Cursor(epoch, number + 1), plan[number]
            epoch, first = epoch + 1, 0

    def groups(self) -> Iterator[_Group]:
        """The steps that are left, with their audio."""
        stream = self._stream(self.state.cursor)
        step = self.state.step
        while step < self.steps:
            count = min(STEPS_PER_LOADER, self.steps - step)
            planned = []
            for _ in range(count):
                pieces = list(islice(stream, self.batches_per_step))
                micros = [_Micro(after.epoch, place, crops) for place, (after, crops) in enumerate(pieces)]
                planned.append((micros, pieces[-1][0]))
            mine = [micros[self.world.rank :: self.world.size] for micros, _ in planned]
            audio = batches(
                self.data.train,
                [micro.crops for micros in mine for micro in micros],
                workers=self.config.workers,
                pin_memory=self.world.device.type == "cuda",
            )
            with contextlib.closing(audio):  # type: ignore[type-var]
                for (micros, after), own in zip(planned, mine, strict=True):
                    yield _Group(micros, [(micro, next(audio)) for micro in own], after)
            step += count

    def step(self, group: _Group) -> _Outcome | None:
        """One optimizer step; None where it was skipped because something was not finite."""
        started = time.perf_counter()
        state, config, student = self.state, self.config, self.student
        student.train()
        rate = learning_rate(state.step, self.steps, config.warmup, config.learning_rate)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        # Frames of all batches of all processes: known from the plan, so every process divides by the same number.
        frames = sum(student.config.frames(crop.count) for micro in group.all for crop in micro.crops)
        sums = torch.zeros(len(config.terms), student.config.layers, device=self.world.device)
        masked = 0
        for position, (micro, audio) in enumerate(group.mine):
            waveforms, lengths, mask = self._inputs(micro, audio)
            masked += int(mask.sum())
            mask = mask.to(waveforms.device, non_blocking=True)
            last = position == len(group.mine) - 1
            alone = contextlib.nullcontext() if last or self.world.size == 1 else self.wrapped.no_sync()  # type: ignore[operator]
            with alone, chance(self.world.device, config.seed, state.step, micro.place):
                with self._autocast():
                    targets = self.targets(waveforms, lengths, mask)
                    terms = self.forward(waveforms, lengths, mask, targets)
                self.backward(terms, frames)
            sums += terms.detach()
        sums = self.world.sum(sums)
        loss = self._weigh(sums) / frames
        norm, finite = self.update(loss)
        state.step += 1
        state.cursor = group.after
        state.train_seconds += time.perf_counter() - started
        if not finite:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
            return None
        state.skipped_in_a_row = 0
        seconds = sum(crop.count for micro in group.all for crop in micro.crops) / SAMPLE_RATE
        state.audio_seconds += seconds
        own = sum(student.config.frames(crop.count) for micro, _ in group.mine for crop in micro.crops)
        layers = (sums * self.term_weights[:, None]).sum(0) / frames
        return _Outcome(loss, layers, norm, masked / max(1, own), seconds)

    def targets(self, waveforms: Tensor, lengths: Tensor | None, mask: Tensor) -> TeacherTargets:
        """What the student is to predict of a batch."""
        return teacher_targets(self.teacher, waveforms, lengths, mask, self.layers, **self.objective.needs)

    def forward(self, waveforms: Tensor, lengths: Tensor | None, mask: Tensor, targets: TeacherTargets) -> Tensor:
        """Each loss term's sum over a batch, by layer: [terms, L]."""
        terms: Tensor = self.wrapped(waveforms, lengths, mask, targets)
        return terms

    def backward(self, terms: Tensor, frames: int) -> None:
        """Add a batch's gradients; `frames` are those of the whole step."""
        # DistributedDataParallel averages gradients; ours are shares of one sum.
        self.scaler.scale(self._weigh(terms) / frames * self.world.size).backward()

    def update(self, loss: Tensor) -> tuple[Tensor, bool]:
        """Clip and step; returns the gradients' norm, and whether it and the loss are finite: else no step is made."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip or float("inf"))
        # The one place where the device is waited for.
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.scaler.is_enabled():  # by hand: the scaler knows of the gradients, not of the loss
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite

    @property
    def diverged(self) -> bool:
        """Whether to give up. With fp16 the first steps find the loss's scale, halving it wherever one is skipped: that
        is no divergence before the scale is below 1."""
        if self.scaler.is_enabled():
            return self.scaler.get_scale() < 1
        return self.state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    def _weigh(self, sums: Tensor) -> Tensor:
        return (self.term_weights @ sums) @ self.layer_weights

    def _inputs(self, micro: _Micro, audio: AudioBatch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Waveforms and lengths on the device, and the mask: drawn here, once, for teacher and student."""
        config, student = self.config, self.student.config
        probability = scheduled_probability(config.mask_prob, config.mask_prob_end, self.state.step / self.steps)
        if "masking" not in config.terms:
            probability = 0.0
        masks = [
            span_mask(
                student.frames(crop.count),
                probability,
                np.random.default_rng([config.seed, micro.epoch, crop.index]),
                mean_length=config.mask_length,
            )
            for crop in micro.crops
        ]
        mask = batch_mask(masks, student.frames(audio.waveforms.shape[1]))
        waveforms = audio.waveforms.to(self.world.device, non_blocking=True)
        return waveforms, _lengths(audio, self.world.device), mask

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not None)

    @torch.no_grad()
    def validate(self, should_stop: Callable[[], bool]) -> Validated | None:
        """Held-out error of student against teacher, both clean, per layer; remembers whether it is the lowest.

        None where its readers were ended by the signal that also asks this process to stop.
        """
        config, student = self.config, self.student
        student.eval()
        plan = plan_epoch(
            self.data.valid, batch_seconds=config.batch_seconds, max_seconds=config.max_seconds,
            seed=config.seed, epoch=0, shuffle=False,
        )  # fmt: skip
        own = plan[self.world.rank :: self.world.size]
        sums = torch.zeros(student.config.layers, device=self.world.device)
        audio = batches(self.data.valid, own, workers=min(1, config.workers))
        read = 0
        with contextlib.closing(audio):  # type: ignore[type-var]
            for batch in _while_read(audio, should_stop):
                read += 1
                waveforms, lengths = batch.waveforms.to(self.world.device), _lengths(batch, self.world.device)
                with self._autocast():
                    targets = teacher_targets(
                        self.teacher, waveforms, lengths, None, self.layers,
                        masking=False, clean=True, inputs=student.heads is None,
                    )  # fmt: skip
                    output = SpeechEncoder.forward(student, waveforms, lengths)
                    frames = output.lengths if lengths is not None else None
                    if student.heads is None:
                        sums += losses.relation_loss(output.hidden_states, targets, frames)
                    else:
                        sums += self.objective.frame_loss(output.hidden_states, targets.clean, frames)
        if self.world.any(read < len(own)):
            return None
        total = sum(student.config.frames(crop.count) for crops in plan for crop in crops)
        layers = self.world.sum(sums) / total
        loss = float(layers @ self.layer_weights)
        best = math.isfinite(loss) and loss < self.state.best_loss
        if best:
            self.state.best_loss = loss
        self.state.validations_without_gain = 0 if best else self.state.validations_without_gain + 1
        return Validated(self.state.step, loss, tuple(layers.tolist()), best)

    def export(self, out: Path) -> None:
        """Write the student as a model folder, and load it once."""
        if not self.world.leads:
            return
        self.student.save_pretrained(out, card=model_card(self.student, _training_section(self)))
        again = ARMHuBERT.from_pretrained(out).state_dict()
        if not all(torch.equal(again[name], value.cpu()) for name, value in self.student.state_dict().items()):
            raise RuntimeError(f"{out} did not read back as it was written: the disk is at fault")

    def checkpoint(self, identity: dict[str, Any]) -> Checkpoint:
        """Everything needed to go on."""
        return Checkpoint(
            self.state, self.student.state_dict(), self.optimizer.state_dict(), self.scaler.state_dict(), identity
        )

    def restore(self, saved: Checkpoint) -> None:
        """Go on from `saved`."""
        self.state = saved.state
        try:
            self.student.load_state_dict(saved.student)
            self.optimizer.load_state_dict(saved.optimizer)
            if saved.scaler:
                self.scaler.load_state_dict(saved.scaler)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ArmhubertError(f"the checkpoint does not fit the student: {brief(error)}") from None


class _Window:
    """Outcomes since the last report."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._clear()
        device = run.world.device
        for loss, layers, norm, masked, seconds in run.state.window:  # from before the interruption
            total, by_layer = torch.tensor(loss, device=device), torch.tensor(layers, device=device)
            self.outcomes.append(_Outcome(total, by_layer, torch.tensor(norm, device=device), masked, seconds))
        self.resumed = len(self.outcomes)

    def _clear(self) -> None:
        self.outcomes: list[_Outcome] = []
        self.resumed = 0
        self.since = time.perf_counter()

    def keep(self) -> None:
        """Note the outcomes in the training state, for a checkpoint."""
        self.run.state.window = [
            (float(o.loss), o.layers.tolist(), float(o.gradient_norm), o.masked_share, o.audio_seconds)
            for o in self.outcomes
        ]

    @property
    def count(self) -> int:
        return len(self.outcomes)

    def add(self, outcome: _Outcome) -> None:
        self.outcomes.append(outcome)

    def report(self) -> Progress:
        run, state, outcomes = self.run, self.run.state, self.outcomes
        elapsed = max(1e-9, time.perf_counter() - self.since)
        progress = Progress(
            step=state.step,
            steps=run.steps,
            epoch=state.cursor.epoch,
            loss=float(torch.stack([o.loss for o in outcomes]).mean()),
            layers=tuple(torch.stack([o.layers for o in outcomes]).mean(0).tolist()),
            learning_rate=learning_rate(state.step - 1, run.steps, run.config.warmup, run.config.learning_rate),
            gradient_norm=float(torch.stack([o.gradient_norm for o in outcomes]).mean()),
            masked_share=sum(o.masked_share for o in outcomes) / len(outcomes),
            audio_rate=sum(o.audio_seconds for o in outcomes[self.resumed :]) / elapsed,
            eta=elapsed / max(1, len(outcomes) - self.resumed) * (run.steps - state.step),
            skipped_steps=state.skipped_steps,
        )
        self._clear()
        return progress


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Rate of step 0..steps-1: linear rise over the first `warmup` share, then linear fall to 0."""
    rising = max(1.0, warmup * steps)
    if step + 1 < rising:
        return peak * (step + 1) / rising
    return peak * (steps - step) / (steps - rising + 1)


# ---- preparation -----------------------------------------------------------


def _check_out(out: Path, config: DistillConfig, resume: bool, force: bool) -> None:
    if resume:
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
        raise ArmhubertError(f"{out} holds a run: continue it with --resume {out}, or start anew with --force")
    if (out / CONFIG_FILE).is_file():
        raise ArmhubertError(f"{out} holds a run that ended before its first checkpoint: start anew with --force")
    raise ArmhubertError(f"{out} exists, is not empty and is no run: choose another folder, or use --force")


def load_run_config(out: Path, changes: dict[str, Any]) -> DistillConfig:
    """The settings of the run in `out`, with `changes` made to what a resumed run may change.

    Raises:
        ArmhubertError: no run there, or a change to something that it computes.
    """
    if not (out / CONFIG_FILE).is_file():
        raise ArmhubertError(f"{out} is no run: it has no {CONFIG_FILE}")
    config = build(DistillConfig, read_mapping(out / CONFIG_FILE), str(out / CONFIG_FILE))
    for name, value in changes.items():
        if name not in RESUMABLE and value != getattr(config, name):
            raise ArmhubertError(
                f"a resumed run keeps its {name} {getattr(config, name)!r}, got {value!r}: "
                "leave it out, or start a new run"
            )
    if changes.get("steps") is not None:
        changes = {**changes, "epochs": None}
    elif changes.get("epochs") is not None:
        changes = {**changes, "steps": None}
    resumed = dataclasses.replace(config, **{**changes, "out": str(out)})
    for source in (*resumed.data, *resumed.valid):
        if not Path(source).exists():
            raise ArmhubertError(f"{source} is no longer there: name the run's data anew beside --resume {out}")
    return resumed


def check_views(config: DistillConfig, teacher: SpeechEncoder) -> None:
    """Raise ArmhubertError where the loss needs a masked view that the teacher does not have."""
    if "masking" in config.terms and teacher.mask_embedding is None:
        raise ArmhubertError(
            f"teacher {config.teacher} has no mask embedding, so it has no masked view: "
            "use --loss plain or star, or the same weights from the hub"
        )


def load_models(config: DistillConfig, device: torch.device) -> tuple[SpeechEncoder, ARMHuBERT, int]:
    """Teacher, new student, and how many tensors it has from the teacher.

    Raises:
        ArmhubertError: no teacher, settings that do not make a student of it, or kernels that do not run on `device`.
    """
    if config.impl == "triton":
        try:
            resolve_impl(config.impl, torch.empty(0, device=device))
        except ValueError as error:
            raise ArmhubertError(str(error)) from None
    teacher = load_teacher(config.teacher, device=device)
    check_views(config, teacher)
    wanted = student_config(config, teacher.config)
    if config.max_seconds * SAMPLE_RATE < wanted.receptive_field:
        raise ArmhubertError(
            f"max_seconds must be at least {wanted.receptive_field / SAMPLE_RATE}, one frame, got {config.max_seconds}"
        )
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(config.seed)
        student = ARMHuBERT(wanted, impl=config.impl).to(device)
    return teacher, student, copy_matching(student, teacher) if config.init == "teacher" else 0


@torch.no_grad()
def copy_matching(student: ARMHuBERT, teacher: SpeechEncoder) -> int:
    """Start the student from the teacher's tensors where names and shapes agree; returns how many were copied.

    A student layer takes from the teacher layer it learns from; a reusing layer's values from that layer's values.
    """
    theirs = teacher.state_dict()
    mapping = layer_mapping(student.config.layers, teacher.config.layers)
    copied = 0
    for name, parameter in student.named_parameters():
        source = name
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            source = f"layers.{mapping[int(number)] - 1}.{rest}"
        tensor = theirs.get(source)
        if tensor is None and ".attention.value." in source:
            fused = theirs.get(source.replace(".value.", ".qkv."))
            tensor = None if fused is None else fused.chunk(3)[2]
        if tensor is not None and tensor.shape == parameter.shape:
            parameter.copy_(tensor)
            copied += 1
    return copied


def _prepare_data(
    config: DistillConfig,
    sources: Sequence[Sequence[Path]],
    min_samples: int,
    processes: World,
    should_stop: Callable[[], bool],
) -> Generator[Report, None, Data | None]:
    """Examine and split the speech; the lead process does the work, the others read its cache. None: stopped."""
    scans: list[Scan] = []
    cache = Path(config.out) / SCAN_CACHE
    if processes.leads:
        scans = yield from _scan(sources, min_samples, cache, config.workers, should_stop)
    processes.wait_for_lead()
    if processes.any(should_stop()):
        return None
    if not processes.leads:
        scans = yield from _scan(sources, min_samples, cache, config.workers)
    for part, what in zip(scans, ("data", "valid"), strict=False):
        part.require_utterances(what=what)
    found = scans[0]
    if config.valid:
        found = leave_out(found, scans[1])
        found.require_utterances()
        return Data(found.utterances, scans[1].utterances, found)
    if config.hold_out == 0:
        return Data(found.utterances, (), found)
    train, valid = split_validation(found.utterances, fraction=config.hold_out, seed=config.seed)
    return Data(train, valid, found)


def _scan(
    sources: Sequence[Sequence[Path]],
    min_samples: int,
    cache: Path,
    workers: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[Report, None, list[Scan]]:
    """A scan of each source; those that were ended before they were asked to stop."""
    scans = []
    for paths in sources:
        with contextlib.closing(scan(paths, min_samples=min_samples, cache=cache, workers=workers)) as examined:
            while not should_stop():
                try:
                    yield next(examined)
                except StopIteration as end:
                    scans.append(end.value)
                    break
    return scans


def _lengths(audio: AudioBatch, device: torch.device) -> Tensor | None:
    """Valid samples on the device; None where nothing is padded, which is faster."""
    if bool((audio.lengths == audio.waveforms.shape[1]).all()):
        return None
    return audio.lengths.to(device, non_blocking=True)


def _identity(
    config: DistillConfig, teacher: SpeechEncoder, student: ARMHuBERT, data: Data, processes: World
) -> dict[str, Any]:
    digest = hashlib.blake2b(digest_size=16)
    for utterance in (*data.train, *data.valid):
        digest.update(f"{Path(utterance.path).name} {utterance.samples}\n".encode(errors="surrogateescape"))
    return {
        "teacher": fingerprint(teacher),
        "student": student.config.as_dict(),
        "data": digest.hexdigest(),
        "batches in a step": config.accumulate * processes.size,
    }


def _check_identity(saved: dict[str, Any], now: dict[str, Any], out: Path, data: Data) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            detail = ""
            if name == "student" and isinstance(saved.get(name), dict):
                changed = [k for k in value if saved[name].get(k) != value[k]]
                detail = f" ({', '.join(changed)})"
            if name == "data":
                skipped = data.scan.skipped
                first = (
                    f", the first of {len(skipped)} skipped {skipped[0].path} ({skipped[0].reason})" if skipped else ""
                )
                detail = f" ({len(data.train)} utterances now{first})"
            if name == "batches in a step":
                detail = f": {saved.get(name)} then, {value} now (accumulate times processes)"
            raise ArmhubertError(
                f"{out} was made with another {name}{detail}: resume with the same, or start a new run"
            )


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
        skipped=data.scan.skipped_by_kind,
        skipped_report=out / SKIPPED_FILE if data.scan.skipped else None,
        padding_waste=padding_waste(run._plan(0)),
        steps=run.steps,
        first_step=run.state.step,
        processes=run.world.size,
        device=device_name(run.world.device),
        notes=tuple(_notes(run)),
    )


def _notes(run: Run) -> Iterator[str]:
    config = run.config
    if run.world.device.type == "cpu" and run.dtype is not None and emulated(run.dtype):
        yield f"this processor has no instructions for {config.precision}: fp32 is much faster on it"
    longest = [min(u.samples / SAMPLE_RATE, config.max_seconds) for u in run.data.train]
    if alone := sum(seconds > config.batch_seconds for seconds in longest):
        yield (
            f"{alone} of {len(longest)} utterances are longer than batch_seconds {config.batch_seconds:g}: each is a "
            f"batch of its own, of up to {max(longest):.1f} s (max_seconds crops them)"
        )


def _training_section(run: Run) -> str:
    config, state = run.config, run.state
    hours = state.audio_seconds / 3600
    end = "" if config.mask_prob_end is None else f" to {config.mask_prob_end}"
    masking = f"mask probability {config.mask_prob}{end}, " if "masking" in config.terms else ""
    lines = [
        "## Training",
        "",
        f"Distilled from `{Path(config.teacher).name}` with armhubert: loss `{config.loss}` ({config.distance}), "
        f"{masking}{state.step} steps of {run.steps}, {hours:.2f} hours of audio seen, "
        f"{len(run.data.train)} utterances, peak learning rate {config.learning_rate:g}, precision {config.precision}, "
        f"seed {config.seed}.",
    ]
    if state.best_loss < float("inf"):
        lines.append(f"Held-out loss ({len(run.data.valid)} utterances, unmasked): {state.best_loss:.4f}.")
    return "\n".join([*lines, "", "All settings: distill.json; curves: metrics.jsonl, loss.png, layers.png.", ""])
