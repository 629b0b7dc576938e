"""The training of one head on one task's features, with one learning rate; interrupted and resumed at will.

All chance comes from the seed for the head's first weights, (seed, epoch) for batches, (seed, epoch, item) for crops
and (seed, step, batch) for dropout and augmentation, so that a resumed run computes what an uninterrupted one does: bit
for bit on a CPU.
"""

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from armhubert import schedule
from armhubert.config import SAMPLE_RATE
from armhubert.convert.pickles import read_pickle
from armhubert.distributed import seeded
from armhubert.errors import ArmhubertError, brief
from armhubert.files import write_atomic
from armhubert.superb.config import EvaluateConfig
from armhubert.superb.features import Features
from armhubert.superb.heads import WeightedSum
from armhubert.superb.progress import Progress, Report, Stopped, Validated
from armhubert.superb.task import Batch, Corpus, Head, Metric, Split, SplitName, Task

CHECKPOINT_FILE, BEST_FILE = "checkpoint.pt", "best.pt"
FORMAT = 1
MAX_SKIPPED_IN_A_ROW = 10
BUCKET = 50
"""Batches whose items are sorted by length together."""


@contextlib.contextmanager
def _taking_in(path: Path) -> Iterator[None]:
    """What a file of ours that somebody has changed raises, as one line."""
    try:
        yield
    except ArmhubertError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArmhubertError(
            f"{path} does not fit this training ({brief(error)}): start anew with force=True"
        ) from None


class Diverged(ArmhubertError):
    """Losses or gradients were not finite, several steps in a row; or every rate of a sweep diverged."""


def plan_batches(
    samples: Sequence[int], batch: int, seed: int, epoch: int, weights: Sequence[float] | None = None
) -> list[list[int]]:
    """One epoch: every item once (with `weights`: as many draws, with replacement), in batches of similar length."""
    draw = np.random.default_rng([seed, epoch])
    count = len(samples)
    if weights is None:
        order = draw.permutation(count)
    else:
        share = np.asarray(weights, np.float64)
        order = draw.choice(count, count, p=share / share.sum())
    plan = []
    for start in range(0, count, BUCKET * batch):
        bucket = sorted(order[start : start + BUCKET * batch].tolist(), key=lambda index: -samples[index])
        plan += [bucket[i : i + batch] for i in range(0, len(bucket), batch)]
    return [plan[place] for place in draw.permutation(len(plan))]


class Probe(nn.Module):
    """What is trained: the weighted sum of the layers, and the head."""

    def __init__(self, total: WeightedSum, head: Head) -> None:
        super().__init__()
        self.total, self.head = total, head


@dataclasses.dataclass
class _State:
    step: int = 0
    best_step: int = 0
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """Metrics on dev at the best step."""
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Rows of metrics.jsonl."""
    seconds: float = 0.0
    """In steps."""
    wall: float = 0.0
    """In all, over every part of an interrupted run."""
    skipped_in_a_row: int = 0


@dataclasses.dataclass
class Setup:
    """What the trainings of one task (of one fold) share; a sweep has one for each rate."""

    config: EvaluateConfig
    task: Task
    corpus: Corpus
    features: Features
    hashes: Mapping[SplitName, str]
    """Hash of each split's items, by `runner.list_hash`."""
    should_stop: Callable[[], bool]
    began: float
    """By `time.perf_counter`."""
    earlier: float = 0.0
    """Seconds that parts of the run before this process took."""
    _seen: set[Path] = dataclasses.field(default_factory=set)

    def came_back(self, folder: Path, wall: float) -> None:
        """A training was restored: what it took before counts, unless that was in this process, as in a sweep."""
        if folder not in self._seen:
            self._seen.add(folder)
            self.earlier = max(self.earlier, wall)


class Training:
    """The training of one head with one learning rate, in its own folder."""

    def __init__(self, setup: Setup, learning_rate: float, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        config, self.settings = setup.config, setup.config.training
        self.features, self.device, self.corpus = setup.features, setup.features.device, setup.corpus
        self.upstream, self.recordings, self.rate = self.features.upstream, self.features.recordings, learning_rate
        with seeded(torch.device("cpu"), config.seed):
            head = setup.task.head(self.upstream.width, self.corpus, self.settings)
            self.probe = Probe(WeightedSum(self.upstream.count, config.normalize_layers), head)
        self.probe.to(self.device)
        self.trained = [parameter for parameter in self.probe.parameters() if parameter.requires_grad]
        optimizer = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[self.settings.optimizer]
        self.optimizer = optimizer(self.trained, lr=learning_rate)
        self.items = self.corpus.splits["train"].items
        self.samples = [self.recordings.samples(item) for item in self.items]
        self.weights: list[float] | None = None
        if self.settings.balanced:
            counts: dict[str, int] = {}
            for item in self.items:
                counts[item.label[0]] = counts.get(item.label[0], 0) + 1
            self.weights = [1 / counts[item.label[0]] for item in self.items]
        self.state = _State()
        self.restore()
        setup.came_back(folder, self.state.wall)

    # -- to disk and back --

    def identity(self) -> dict[str, Any]:
        """What a resumed training must agree on."""
        setup = self.setup
        return {
            "model": self.upstream.identity,
            "data": setup.hashes["train"] + setup.hashes["dev"],
            "settings": json.dumps(dataclasses.asdict(self.settings), sort_keys=True),
            "rate": self.rate,
            "seed": setup.config.seed,
            "normalize_layers": setup.config.normalize_layers,
        }

    def save(self) -> None:
        """Write the state of the training."""
        self.state.wall = self.setup.earlier + time.perf_counter() - self.setup.began
        content = {
            "format": FORMAT,
            "state": dataclasses.asdict(self.state),
            "probe": self.probe.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "identity": self.identity(),
        }
        write_atomic(self.folder / CHECKPOINT_FILE, _pickled(content))
        rows = "".join(json.dumps(row) + "\n" for row in self.state.history)
        write_atomic(self.folder / "metrics.jsonl", rows)

    def restore(self) -> None:
        """Go on from the folder's checkpoint, if there is one."""
        path = self.folder / CHECKPOINT_FILE
        if not path.is_file():
            return
        try:
            content = read_pickle(path)
        except ArmhubertError as error:
            raise ArmhubertError(f"{error}; start anew with force=True") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ArmhubertError(
                f"{path} is no checkpoint of this version (format {FORMAT}): start anew with force=True"
            )
        with _taking_in(path):
            mine, saved = self.identity(), content["identity"]
            if different := [name for name in mine if saved.get(name) != mine[name]]:
                raise ArmhubertError(
                    f"{self.folder} was begun with other {', '.join(different)}: start anew with force=True, or name "
                    "another out=..."
                )
            self.probe.load_state_dict(content["probe"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.state = _State(**content["state"])

    def load_best(self) -> None:
        """The head of the best step on dev."""
        path = self.folder / BEST_FILE
        with _taking_in(path):
            self.probe.load_state_dict(read_pickle(path))

    def best(self, until: int) -> dict[str, Any]:
        """The best row on dev up to a step; a resumed sweep asks for steps that are long past."""
        rows = [row for row in self.state.history if row["kind"] == "dev" and row["step"] <= until]
        return max(rows, key=lambda row: rank(self.setup.task.choose_by, row))

    # -- training --

    def run(self, until: int) -> Iterator[Report]:
        """Train up to a step; validations and checkpoints on the way.

        Raises:
            Diverged: several steps in a row had a loss or gradients that are not finite.
            Stopped: the user asked to; the state is saved.
        """
        config, settings, state = self.setup.config, self.settings, self.state
        log_every = config.log_every or min(100, max(1, settings.steps // 50))
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        begun, first, validating = time.perf_counter(), state.step, 0.0
        for micros in self._steps(until):
            loss, norm = self._step(micros)
            if loss is not None:
                losses.append(loss)
                norms.append(norm)
            last = state.step >= until
            if losses and (last or state.step % log_every == 0):
                a_step = (time.perf_counter() - begun - validating) / (state.step - first)
                progress = Progress(
                    state.step, settings.steps,
                    float(torch.stack(losses).mean()), self.rate_of(state.step - 1), float(torch.stack(norms).mean()),
                    a_step * (settings.steps - state.step),
                )  # fmt: skip
                state.history.append({"kind": "train", "step": state.step, "loss": progress.loss})
                losses, norms = [], []
                yield progress
            stop = self.setup.should_stop()
            if last or state.step % settings.validate_every == 0:
                since = time.perf_counter()
                yield self._validate()
                self.save()
                validating += time.perf_counter() - since
            elif stop:
                self.save()
            if stop and state.step < settings.steps:
                raise Stopped

    def _steps(self, until: int) -> Iterator[list[tuple[int, list[int], Tensor, Tensor]]]:
        """The batches of each step that is left: (epoch, indices, layers, lengths)."""
        settings, seed = self.settings, self.setup.config.seed
        per_epoch = -(-len(self.items) // settings.batch)
        plans: dict[int, list[list[int]]] = {}

        def place(number: int) -> tuple[int, list[int]]:
            epoch, batch = divmod(number, per_epoch)
            if epoch not in plans:
                plans.clear()
                plans[epoch] = plan_batches(self.samples, settings.batch, seed, epoch, self.weights)
            return epoch, plans[epoch][batch]

        first, last = self.state.step * settings.accumulate, until * settings.accumulate
        chunk = max(settings.accumulate, 64 // settings.accumulate * settings.accumulate)
        for start in range(first, last, chunk):
            places = [place(number) for number in range(start, min(start + chunk, last))]
            groups = [[self.items[index] for index in indices] for _, indices in places]
            stream = self.features.stream(groups)
            with contextlib.closing(stream):  # type: ignore[type-var]
                ready = []
                for (epoch, indices), (layers, lengths) in zip(places, stream, strict=True):
                    ready.append((epoch, indices, layers, lengths))
                    if len(ready) == settings.accumulate:
                        yield ready
                        ready = []

    def _step(self, micros: Sequence[tuple[int, list[int], Tensor, Tensor]]) -> tuple[Tensor | None, Tensor]:
        """One optimizer step: loss, None where it was left out as not finite, and norm of the gradients."""
        state, settings = self.state, self.settings
        started = time.perf_counter()
        self.probe.train()
        total = torch.zeros((), device=self.device)
        for number, (epoch, indices, layers, lengths) in enumerate(micros):
            batch = self._crop(epoch, indices, layers, lengths)
            with seeded(self.device, self.setup.config.seed, state.step, number):
                loss = self.probe.head.loss(batch) / settings.accumulate
            loss.backward()
            total += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate_of(state.step)
        norm = nn.utils.clip_grad_norm_(self.trained, settings.clip)
        finite = bool(torch.isfinite(total) & torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.seconds += time.perf_counter() - started
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise Diverged(
                f"{state.skipped_in_a_row} steps in a row had a loss or gradients that are not finite, at step "
                f"{state.step}: lower the learning rate ({self.rate:g})"
            )
        return (total if finite else None), norm

    def rate_of(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        if self.settings.warmup is None:
            return self.rate
        return schedule.learning_rate(step, self.settings.steps, self.settings.warmup, self.rate)

    def _crop(self, epoch: int, indices: Sequence[int], layers: Tensor, lengths: Tensor) -> Batch:
        """The batch that the head sees: random crops of the features where the task trains on crops."""
        items, hop = tuple(self.items[index] for index in indices), self.upstream.hop
        first = [0] * len(items)
        if self.settings.crop_seconds is not None:
            most = max(1, round(self.settings.crop_seconds * SAMPLE_RATE / hop))
            if layers.shape[2] > most:
                cropped = layers.new_zeros(*layers.shape[:2], most, layers.shape[3])
                for row, (index, length) in enumerate(zip(indices, lengths.tolist(), strict=True)):
                    draw = np.random.default_rng([self.setup.config.seed, epoch, index])
                    first[row] = int(draw.integers(0, max(0, length - most) + 1))
                    kept = min(length, most)
                    cropped[:, row, :kept] = layers[:, row, first[row] : first[row] + kept]
                layers, lengths = cropped[:, :, : int(lengths.clamp(max=most).max())], lengths.clamp(max=most)
        return Batch(self.probe.total(layers), lengths, items, tuple(first), hop)

    # -- scores --

    @torch.no_grad()
    def predict(self, split: Split) -> list[Any]:
        """Predictions in the order of the split's items."""
        self.probe.eval()
        groups = self.features.groups(split.items)
        predictions: list[Any] = [None] * len(split.items)
        stream = self.features.stream([[split.items[i] for i in group] for group in groups])
        with contextlib.closing(stream):  # type: ignore[type-var]
            for group, (layers, lengths) in zip(groups, stream, strict=True):
                items = tuple(split.items[i] for i in group)
                batch = Batch(self.probe.total(layers), lengths, items, (0,) * len(items), self.upstream.hop)
                for index, prediction in zip(group, self.probe.head.predict(batch), strict=True):
                    predictions[index] = prediction
        return predictions

    def _validate(self) -> Validated:
        split = self.corpus.splits["dev"]
        scores = self.setup.task.score(self.predict(split), split, self.corpus)
        state, choose = self.state, self.setup.task.choose_by
        metrics = {name: float(value) for name, value in scores.metrics.items()}
        best = not state.best or rank(choose, metrics) > rank(choose, state.best)
        if best:
            state.best, state.best_step = metrics, state.step
            write_atomic(self.folder / BEST_FILE, _pickled(self.probe.state_dict()))
        state.history.append({"kind": "dev", "step": state.step, **metrics})
        return Validated(state.step, metrics, best)


def rank(choose: Sequence[Metric], metrics: Mapping[str, float]) -> tuple[float, ...]:
    """Higher is better: the first metric decides, the next ones between equals (no utterance is wholly right yet)."""
    return tuple(metrics[m.name] if m.higher_is_better else -metrics[m.name] for m in choose if m.name in metrics)


def _pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
