"""One run of a distillation: its batches, steps and validations; what of it goes into a checkpoint and comes back.

All randomness is derived from (seed, epoch, utterance) for crops and masks and from (seed, step, batch) for dropout, so
that a resumed run, or the same run on more processes, repeats the same computation.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from armhubert import losses, schedule
from armhubert.checkpoint import ANEW, Checkpoint, Cursor, TrainingState
from armhubert.config import SAMPLE_RATE
from armhubert.data import (
    AudioBatch,
    Crop,
    ReaderDied,
    Utterance,
    batches,
    plan_epoch,
)
from armhubert.distill_config import DistillConfig
from armhubert.distill_data import Data
from armhubert.distributed import World, seeded
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError, brief
from armhubert.losses import Objective
from armhubert.masking import batch_mask, scheduled_probability, span_mask
from armhubert.student import ARMHuBERT, model_card
from armhubert.teacher import TeacherTargets, layer_mapping, teacher_targets

MAX_SKIPPED_IN_A_ROW = 10
STEPS_PER_LOADER, BATCHES_PER_LOADER = 500, 4_000  # the larger: then readers are started anew, lest the plan grow
R = TypeVar("R")


class _MicroBatch(NamedTuple):
    """One batch of one process: the smallest piece of a step."""

    epoch: int
    place: int
    """In the step, counted over all processes; seeds dropout."""
    crops: list[Crop]


class StepBatches(NamedTuple):
    """The batches of one optimizer step over all processes, and this process's share of them as audio."""

    all: list[_MicroBatch]
    """As planned."""
    mine: list[tuple[_MicroBatch, AudioBatch]]
    """As read."""
    after: Cursor


class _Outcome(NamedTuple):
    """Result of one step, over all processes; tensors are still on the device."""

    loss: Tensor
    layers: Tensor
    gradient_norm: Tensor
    masked_share: float
    """Share of this process' frames that were masked."""
    audio_seconds: float


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
    waiting: float
    """Share of this process' time that went by until audio was read."""
    eta: float
    """Seconds."""
    skipped_steps: int


class Validated(NamedTuple):
    """Error on held-out speech, student and teacher both clean."""

    step: int
    loss: float
    layers: tuple[float, ...]
    best: bool
    left_out: tuple[str, ...] = ()
    """What is wrong with utterances of this process that could not be read."""


class Run:
    """Models, optimizer and state of one process of a run."""

    def __init__(
        self, config: DistillConfig, world: World, teacher: SpeechEncoder, student: ARMHuBERT, data: Data
    ) -> None:
        self.config, self.world, self.teacher, self.student, self.data = config, world, teacher, student, data
        self.state = TrainingState()
        self.layers = layer_mapping(student.config.layers, teacher.config.layers)
        self.layer_weights = losses.layer_weights(student.config.layers, config.layer_weight).to(world.device)
        student.gradient_checkpointing = config.gradient_checkpointing
        self.objective = Objective(student, config.terms, config.distance, config.impl).to(world.device)
        self.term_weights = torch.tensor(list(config.terms.values()), device=world.device)
        self.wrapped: torch.nn.Module = self.objective
        if world.size > 1:
            self.wrapped = DistributedDataParallel(
                self.objective, device_ids=[world.device] if world.device.type == "cuda" else None
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
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype is torch.float16)
        self.workers = (6 if world.device.type == "cuda" else 2) if config.workers is None else config.workers
        self.batches_per_step = config.accumulate * world.size
        self.steps = config.steps or self._steps_of_epochs(200.0 if config.epochs is None else config.epochs)

    def _steps_of_epochs(self, epochs: float) -> int:
        return max(1, -int(-epochs * len(self.plan(0)) // self.batches_per_step))

    def plan(self, epoch: int) -> list[list[Crop]]:
        """The batches of an epoch, the same in every process."""
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
            plan = self.plan(epoch)
            for number in range(first, len(plan)):
                yield Cursor(epoch, number + 1), plan[number]
            epoch, first = epoch + 1, 0

    def groups(self) -> Iterator[StepBatches]:
        """The steps that are left, with their audio."""
        stream = self._stream(self.state.cursor)
        step = self.state.step
        while step < self.steps:
            count = min(max(STEPS_PER_LOADER, BATCHES_PER_LOADER // self.batches_per_step), self.steps - step)
            planned = []
            for _ in range(count):
                pieces = list(islice(stream, self.batches_per_step))
                micros = [_MicroBatch(after.epoch, place, crops) for place, (after, crops) in enumerate(pieces)]
                planned.append((micros, pieces[-1][0]))
            mine = [micros[self.world.rank :: self.world.size] for micros, _ in planned]
            audio = self._read(self.data.train, [micro.crops for micros in mine for micro in micros])
            with contextlib.closing(audio):  # type: ignore[type-var]
                for (micros, after), own in zip(planned, mine, strict=True):
                    yield StepBatches(micros, [_as_read(micro, next(audio)) for micro in own], after)
            step += count

    def _read(self, utterances: Sequence[Utterance], plan: Sequence[Sequence[Crop]]) -> Iterator[AudioBatch]:
        """This process' batches, without what cannot be read."""
        workers, pinned = min(self.workers, len(plan)), self.world.device.type == "cuda"
        return batches(utterances, plan, workers=workers, pin_memory=pinned, tolerant=True)

    def _over_processes(self, sums: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Sums and frames of all processes, in one exchange."""
        totals = self.world.sum(torch.cat([sums.flatten(), sums.new_tensor([frames])]))
        return totals[:-1].view_as(sums), totals[-1]

    def step(self, group: StepBatches) -> _Outcome | None:
        """One optimizer step; None where it was skipped because something was not finite."""
        started = time.perf_counter()
        state, config, student = self.state, self.config, self.student
        student.train()
        rate = self.learning_rate(state.step)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        # Frames of all batches of all processes: known from the plan, so every process divides by the same number. An
        # utterance that could not be read adds nothing to gradients; losses are told of the frames that were read.
        frames = sum(student.config.frames(crop.samples) for micro in group.all for crop in micro.crops)
        sums = torch.zeros(len(config.terms), student.config.layers, device=self.world.device)
        masked = 0
        for position, (micro, audio) in enumerate(group.mine):
            waveforms, lengths, mask = self._inputs(micro, audio)
            masked += int(mask.sum())
            mask = mask.to(waveforms.device, non_blocking=True)
            last = position == len(group.mine) - 1
            alone = contextlib.nullcontext() if last or self.world.size == 1 else self.wrapped.no_sync()  # type: ignore[operator]
            with alone, seeded(self.world.device, config.seed, state.step, micro.place):
                with self._autocast():
                    targets = self.targets(waveforms, lengths, mask)
                    terms = self.forward(waveforms, lengths, mask, targets)
                self.backward(terms, frames)
            sums += terms.detach()
        own = sum(student.config.frames(crop.samples) for micro, _ in group.mine for crop in micro.crops)
        sums, read = self._over_processes(sums, own)
        loss = self._weigh(sums) / read
        norm, finite = self.update(loss)
        state.step += 1
        state.cursor = group.after
        state.train_seconds += time.perf_counter() - started
        if not finite:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
            return None
        state.skipped_in_a_row = 0
        seconds = sum(crop.samples for micro in group.all for crop in micro.crops) / SAMPLE_RATE
        state.audio_seconds += seconds
        layers = (sums * self.term_weights[:, None]).sum(0) / read
        return _Outcome(loss, layers, norm, masked / max(1, own), seconds)

    def learning_rate(self, step: int) -> float:
        """Rate of a step of the run, from 0."""
        config = self.config
        return schedule.learning_rate(step, self.steps, config.warmup * self.steps, config.learning_rate)

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
        # One process, without loss scaling, waits for its device nowhere else in a step.
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

    def _inputs(self, micro: _MicroBatch, audio: AudioBatch) -> tuple[Tensor, Tensor | None, Tensor]:
        """Waveforms and lengths on the device, and the mask: drawn here, once, for teacher and student."""
        config, student = self.config, self.student.config
        probability = scheduled_probability(config.mask_prob, config.mask_prob_end, self.state.step / self.steps)
        if "masking" not in config.terms:
            probability = 0.0
        masks = [
            span_mask(
                student.frames(crop.samples),
                probability,
                np.random.default_rng([config.seed, micro.epoch, crop.utterance]),
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
        device = self.world.device
        audio = self._read(self.data.valid, own)
        read, frames_read = 0, 0
        left_out: list[str] = []
        failure: ArmhubertError | None = None
        try:
            with contextlib.closing(audio):  # type: ignore[type-var]
                for batch in while_read(audio, should_stop):
                    read += 1
                    left_out += batch.left_out
                    frames_read += sum(student.config.frames(samples) for samples in batch.lengths.tolist())
                    waveforms, lengths = batch.waveforms.to(device, non_blocking=True), _lengths(batch, device)
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
        except ArmhubertError as error:  # told when all processes know
            failure = error
        if self.world.any(read < len(own)):
            if failure := self.world.failure(failure):
                raise failure
            return None
        sums, total = self._over_processes(sums, frames_read)
        layers = sums / total
        loss = float(layers @ self.layer_weights)
        best = math.isfinite(loss) and loss < self.state.best_loss
        if best:
            self.state.best_loss = loss
        self.state.validations_without_gain = 0 if best else self.state.validations_without_gain + 1
        return Validated(self.state.step, loss, tuple(layers.tolist()), best, tuple(left_out))

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
        """Go on from `saved`.

        Raises:
            ArmhubertError: it is damaged.
        """
        self.state = saved.state
        try:
            self.student.load_state_dict(saved.student)
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": saved.optimizer["state"]})
            for parameter, moments in self.optimizer.state.items():
                if {value.shape for name, value in moments.items() if name != "step"} != {parameter.shape}:
                    raise ValueError("the optimizer's moments have other shapes")
            if saved.scaler:
                self.scaler.load_state_dict(saved.scaler)
            if any(len(layers) != len(self.layers) for _, layers, *_ in saved.state.window):
                raise ValueError("the open window has another number of layers")
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ArmhubertError(f"the checkpoint does not fit the student: {brief(error)}; {ANEW}") from None


class Window:
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
        self.waited = 0.0

    def keep(self) -> None:
        """Note the outcomes in the training state, for a checkpoint."""
        self.run.state.window = [
            (float(o.loss), o.layers.tolist(), float(o.gradient_norm), o.masked_share, o.audio_seconds)
            for o in self.outcomes
        ]

    @property
    def count(self) -> int:
        """Steps since the last report."""
        return len(self.outcomes)

    def add(self, outcome: _Outcome) -> None:
        """Take in the outcome of one step."""
        self.outcomes.append(outcome)

    def report(self) -> Progress:
        """Averages since the last report; a new window begins."""
        run, state, outcomes = self.run, self.run.state, self.outcomes
        elapsed = max(1e-9, time.perf_counter() - self.since)
        progress = Progress(
            step=state.step,
            steps=run.steps,
            epoch=state.cursor.epoch,
            loss=float(torch.stack([o.loss for o in outcomes]).mean()),
            layers=tuple(torch.stack([o.layers for o in outcomes]).mean(0).tolist()),
            learning_rate=run.learning_rate(state.step - 1),
            gradient_norm=float(torch.stack([o.gradient_norm for o in outcomes]).mean()),
            masked_share=sum(o.masked_share for o in outcomes) / len(outcomes),
            audio_rate=sum(o.audio_seconds for o in outcomes[self.resumed :]) / elapsed,
            waiting=self.waited / elapsed,
            eta=elapsed / max(1, len(outcomes) - self.resumed) * (run.steps - state.step),
            skipped_steps=state.skipped_steps,
        )
        self._clear()
        return progress


def while_read(audio: Iterator[R], should_stop: Callable[[], bool]) -> Iterator[R]:
    """Iterate until the end, or until the readers die, if that was by the signal that asks this process to stop too."""
    try:
        yield from audio
    except ReaderDied:
        if not should_stop():
            raise


def _as_read(micro: _MicroBatch, audio: AudioBatch) -> tuple[_MicroBatch, AudioBatch]:
    """A batch of the plan without what could not be read, and its audio."""
    if audio.left_out:
        read = set(audio.indices.tolist())
        micro = micro._replace(crops=[crop for crop in micro.crops if crop.utterance in read])
    return micro, audio


def _lengths(audio: AudioBatch, device: torch.device) -> Tensor | None:
    """Valid samples on the device; None where nothing is padded, which is faster."""
    if bool((audio.lengths == audio.waveforms.shape[1]).all()):
        return None
    return audio.lengths.to(device, non_blocking=True)


def _training_section(run: Run) -> str:
    config, state = run.config, run.state
    hours = state.audio_seconds / 3600
    end = "" if config.mask_prob_end is None else f" to {config.mask_prob_end}"
    masking = f"mask probability {config.mask_prob}{end}, " if "masking" in config.terms else ""
    held_out = state.best_loss < float("inf")
    best = ", the best on held-out speech" if held_out else ""
    lines = [
        "",
        "## Training",
        "",
        f"Distilled from `{Path(config.teacher).name}` with armhubert: loss `{config.loss}` ({config.distance}), "
        f"{masking}weights after step {state.step} of {run.steps}{best}, {hours:.2f} hours of audio seen, "
        f"{len(run.data.train)} utterances, peak learning rate {config.learning_rate:g}, precision {config.precision}, "
        f"seed {config.seed}.",
    ]
    if held_out:
        lines.append(f"Held-out loss ({len(run.data.valid)} utterances, unmasked): {state.best_loss:.4f}.")
    return "\n".join([*lines, "", "All settings: distill.json; curves: metrics.jsonl, loss.png, layers.png.", ""])
