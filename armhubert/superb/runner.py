"""One model on one task: read, check, train the head, choose on dev, score on test; interrupted and resumed at will.

All chance comes from (seed, epoch) for batches, (seed, epoch, item) for crops and (seed, step, batch) for dropout and
augmentation, so that a resumed run computes what an uninterrupted one does: bit for bit on a CPU.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import platform
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from armhubert.audio import SAMPLE_RATE
from armhubert.config import build, read_mapping
from armhubert.convert.tensors import read_pickle
from armhubert.distributed import chance, device_name, pick_device, processor_name
from armhubert.errors import ArmhubertError
from armhubert.files import write_atomic
from armhubert.superb.audio import Recordings, ahead, measure_corpus, padded
from armhubert.superb.cache import FeatureCache, Plan
from armhubert.superb.config import RESUMABLE, EvaluateConfig
from armhubert.superb.heads import WeightedSum
from armhubert.superb.task import Batch, Corpus, Head, Item, Metric, Scores, Split, SplitName, Task
from armhubert.superb.tasks import find
from armhubert.superb.upstream import Upstream, load_upstream
from armhubert.teacher import fingerprint

CONFIG_FILE, RESULT_FILE, CHECKPOINT_FILE, BEST_FILE = "evaluate.json", "result.json", "checkpoint.pt", "best.pt"
SCAN_CACHE = ".armhubert-scan.json"
FORMAT = 1
MAX_SKIPPED_IN_A_ROW = 10
CACHE_BATCH_SECONDS = 60.0
DRY_ITEMS, DRY_STEPS = 8, 2
BUCKET = 50
"""Batches whose items are sorted by length together."""


# ---- reports ---------------------------------------------------------------


class Scanning(NamedTuple):
    """Recordings examined so far."""

    done: int
    total: int


class Started(NamedTuple):
    """Everything is checked and built."""

    config: EvaluateConfig
    task: Task
    upstream: Upstream
    fold: int
    """From 1; 0: the task has none."""
    splits: Mapping[SplitName, tuple[int, float]]
    """Items and seconds of each."""
    notes: tuple[str, ...]
    changed: Mapping[str, Any]
    """Training settings that are not SUPERB's."""
    parameters: int
    """Of head and weighted sum."""
    first_step: int
    steps: int
    device: str


class CachePlanned(NamedTuple):
    """What computing features once will write."""

    plan: Plan


class Caching(NamedTuple):
    """Features computed so far."""

    done: int
    total: int


class Progress(NamedTuple):
    """Where training is, averaged since the last report."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    eta: float
    """Seconds."""


class Validated(NamedTuple):
    """Metrics on dev."""

    step: int
    metrics: Mapping[str, float]
    best: bool


class Searching(NamedTuple):
    """Of a task without training: pairs searched so far."""

    done: int
    total: int


class RateTried(NamedTuple):
    """Of a sweep: where a rate stands after a part of the steps."""

    rate: float
    step: int
    metric: float | None
    """Best on dev so far; None: it diverged."""
    kept: bool


class Finished(NamedTuple):
    """The end of an evaluation, or of this part of it."""

    reason: str
    """done, stopped or dry run."""
    result: Mapping[str, Any]
    """As in result.json; empty where the run was stopped."""
    out: Path


Report = Scanning | Started | CachePlanned | Caching | Progress | Validated | Searching | RateTried | Finished


class _Stopped(Exception):
    """The user asked to stop; everything is saved."""


class Diverged(ArmhubertError):
    """Losses were not finite, several times in a row."""


# ---- the way in ------------------------------------------------------------


def evaluate(
    config: EvaluateConfig,
    *,
    resume: bool = False,
    force: bool = False,
    upstream: Upstream | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Report]:
    """Evaluate a model on a task; yields reports while it works, `Finished` last, and leaves `config.out`.

    Args:
        config: the settings. With `resume`, of the run to continue.
        resume: continue in `config.out`; a run that is done is not repeated.
        force: start anew although `config.out` exists.
        upstream: the loaded model, where the caller has it already.
        should_stop: asked after every step; on True a checkpoint is written and the run ends.

    Raises:
        ArmhubertError: bad input, before any training, or a run that diverged.
    """
    started, out, task = time.perf_counter(), Path(config.out), find(config.task)
    device = pick_device(config.device)
    _check_out(out, resume, force)
    if resume and (out / RESULT_FILE).is_file():
        yield Finished("done", read_mapping(out / RESULT_FILE), out)
        return
    upstream = upstream or load_upstream(config.model, features=config.features, device=device)
    folds = [0] if task.folds == 1 else range(task.folds) if config.fold is None else [config.fold - 1]
    results = []
    try:
        for fold in folds:
            folder = out / f"fold-{fold + 1}" if task.folds > 1 else out
            evaluation = _Evaluation(config, task, upstream, fold, folder, device, should_stop)
            results.append((yield from evaluation.run(anew=not resume and fold == folds[0])))
    except _Stopped:
        yield Finished("stopped", {}, out)
        return
    if config.dry_run:
        yield Finished("dry run", results[0], out)
        return
    result = _average(results)
    earlier = sum(r.pop("earlier_seconds", 0.0) for r in results)
    result.pop("earlier_seconds", None)
    result["wall_seconds"] = round(time.perf_counter() - started + earlier, 1)
    text = json.dumps(result, indent=1)
    write_atomic(out / RESULT_FILE, text + "\n")
    yield Finished("done", json.loads(text), out)  # as a later reader finds it


def load_run_config(folder: Path, changes: Mapping[str, Any]) -> EvaluateConfig:
    """The settings of the run in `folder`, changed where that does not change what it computes.

    Raises:
        ArmhubertError: no run there, or a change that needs a new run.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ArmhubertError(f"{folder} has no {CONFIG_FILE}: nothing to resume")
    if fixed := sorted(name for name in changes if name not in RESUMABLE):
        raise ArmhubertError(f"a resumed run keeps {', '.join(fixed)}: leave it out, or start a new run")
    saved = read_mapping(folder / CONFIG_FILE)
    return build(EvaluateConfig, {**saved, **changes, "out": str(folder)}, str(folder / CONFIG_FILE))


def _check_out(out: Path, resume: bool, force: bool) -> None:
    if resume or not out.exists() or force:
        return
    if not out.is_dir() or any(path.name != SCAN_CACHE for path in out.iterdir()):
        raise ArmhubertError(f"{out} exists: give --resume {out}, --force to start anew, or another --out")


# ---- features --------------------------------------------------------------


class Features:
    """The features of items, from the cache where there is one, else from the upstream."""

    def __init__(
        self, upstream: Upstream, recordings: Recordings, cache: FeatureCache | None, device: torch.device, workers: int
    ) -> None:
        self.upstream, self.recordings, self.cache = upstream, recordings, cache
        self.device, self.workers = device, workers

    def stream(self, groups: Sequence[Sequence[Item]]) -> Iterator[tuple[Tensor, Tensor]]:
        """([L, B, T, D], valid frames [B]) of each group, on the device."""
        if self.cache is not None:
            cache, digest = self.cache, self.recordings.digest
            for rows in ahead(lambda group: [cache.read(digest(item)) for item in group], groups, self.workers):
                lengths = torch.tensor([row.shape[1] for row in rows])
                layers = rows[0].new_zeros(rows[0].shape[0], len(rows), int(lengths.max()), rows[0].shape[2])
                for number, row in enumerate(rows):
                    layers[:, number, : row.shape[1]] = row
                yield layers.to(self.device), lengths.to(self.device)
        else:
            for waveforms, lengths in ahead(self._read, groups, self.workers):
                yield self.upstream(waveforms.to(self.device), lengths.to(self.device))

    def _read(self, group: Sequence[Item]) -> tuple[Tensor, Tensor]:
        return padded([self.recordings.waveform(item) for item in group])

    def fill(self, items: Sequence[Item], should_stop: Callable[[], bool]) -> Iterator[CachePlanned | Caching]:
        """Compute what the cache does not have yet; says first how much it will be.

        Raises:
            ArmhubertError: it does not fit on the disk.
        """
        assert self.cache is not None
        by_digest = {self.recordings.digest(item): item for item in items}
        frames = [self.upstream.frames(self.recordings.samples(item)) for item in by_digest.values()]
        plan = self.cache.plan(list(by_digest), frames)
        yield CachePlanned(plan)
        if plan.bytes > 0.95 * plan.free:
            raise ArmhubertError(
                f"the features need {plan.bytes / 1e9:.1f} GB and {plan.folder} has {plan.free / 1e9:.1f} GB free: "
                "choose another disk with --cache, or run without"
            )
        if not plan.items:
            return
        with self.cache.writer() as writer:
            missing = [(digest, item) for digest, item in by_digest.items() if digest not in self.cache]
            missing.sort(key=lambda pair: -self.recordings.samples(pair[1]))
            groups = _by_seconds(missing, self.recordings)
            done = 0
            waveforms = ahead(lambda group: self._read([item for _, item in group]), groups, self.workers)
            with contextlib.closing(waveforms):  # type: ignore[type-var]
                for group, (batch, lengths) in zip(groups, waveforms, strict=True):
                    states = self.upstream(batch.to(self.device), lengths.to(self.device))
                    for row, (digest, _) in enumerate(group):
                        writer.add(digest, states.layers[:, row, : int(states.lengths[row])])
                    done += len(group)
                    yield Caching(done, len(missing))
                    if should_stop():
                        raise _Stopped


def _by_seconds(pairs: Sequence[tuple[str, Item]], recordings: Recordings) -> list[list[tuple[str, Item]]]:
    """Pairs, longest first, in groups that padded hold at most `CACHE_BATCH_SECONDS`."""
    groups: list[list[tuple[str, Item]]] = []
    longest = 0
    for pair in pairs:
        if not groups or longest * (len(groups[-1]) + 1) > CACHE_BATCH_SECONDS * SAMPLE_RATE:
            groups.append([])
            longest = recordings.samples(pair[1])
        groups[-1].append(pair)
    return groups


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


# ---- one head --------------------------------------------------------------


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


class _Training:
    """The training of one head with one learning rate, in its own folder."""

    def __init__(self, evaluation: "_Evaluation", learning_rate: float, folder: Path) -> None:
        self.evaluation, self.folder = evaluation, folder
        config, self.settings = evaluation.config, evaluation.config.training
        self.rate, self.device, self.corpus = learning_rate, evaluation.device, evaluation.corpus
        with chance(torch.device("cpu"), config.seed):
            head = evaluation.task.head(evaluation.upstream.width, self.corpus, self.settings)
            self.probe = Probe(WeightedSum(evaluation.upstream.count, config.normalize_layers), head)
        self.probe.to(self.device)
        self.trained = [parameter for parameter in self.probe.parameters() if parameter.requires_grad]
        optimizer = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[self.settings.optimizer]
        self.optimizer = optimizer(self.trained, lr=learning_rate)
        self.items = self.corpus.splits["train"].items
        self.samples = [evaluation.recordings.samples(item) for item in self.items]
        self.weights: list[float] | None = None
        if self.settings.balanced:
            counts: dict[str, int] = {}
            for item in self.items:
                counts[item.label[0]] = counts.get(item.label[0], 0) + 1
            self.weights = [1 / counts[item.label[0]] for item in self.items]
        self.state = _State()
        self.restore()
        evaluation.came_back(folder, self.state.wall)

    # -- to disk and back --

    def identity(self) -> dict[str, Any]:
        """What a resumed training must agree on."""
        evaluation = self.evaluation
        return {
            "model": evaluation.upstream.identity,
            "data": evaluation.hashes["train"] + evaluation.hashes["dev"],
            "settings": json.dumps(dataclasses.asdict(self.settings), sort_keys=True),
            "rate": self.rate,
            "seed": evaluation.config.seed,
            "normalize_layers": evaluation.config.normalize_layers,
        }

    def save(self) -> None:
        """Write the state of the training."""
        self.state.wall = self.evaluation.earlier + time.perf_counter() - self.evaluation.began
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
            raise ArmhubertError(f"{error}; start anew with --force") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ArmhubertError(f"{path} is no checkpoint of this version (format {FORMAT}): start anew with --force")
        mine = self.identity()
        if different := [name for name in mine if content["identity"].get(name) != mine[name]]:
            raise ArmhubertError(f"{self.folder} was begun with other {', '.join(different)}: start anew with --force")
        self.probe.load_state_dict(content["probe"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.state = _State(**content["state"])

    def load_best(self) -> None:
        """The head of the best step on dev."""
        self.probe.load_state_dict(read_pickle(self.folder / BEST_FILE))

    def best(self, until: int) -> dict[str, Any]:
        """The best row on dev up to a step; a resumed sweep asks for steps that are long past."""
        rows = [row for row in self.state.history if row["kind"] == "dev" and row["step"] <= until]
        return max(rows, key=lambda row: _rank(self.evaluation.task.metrics, row))

    # -- training --

    def run(self, until: int) -> Iterator[Report]:
        """Train up to a step; validations and checkpoints on the way.

        Raises:
            Diverged: several losses in a row were not finite.
            _Stopped: the user asked to; the state is saved.
        """
        config, settings, state = self.evaluation.config, self.settings, self.state
        log_every = config.log_every or min(100, max(1, settings.steps // 50))
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        since = time.perf_counter()
        for micros in self._steps(until):
            loss, norm = self._step(micros)
            if loss is not None:
                losses.append(loss)
                norms.append(norm)
            last = state.step >= until
            if losses and (last or state.step % log_every == 0):
                seconds = time.perf_counter() - since
                progress = Progress(
                    state.step, settings.steps,
                    float(torch.stack(losses).mean()), self.rate, float(torch.stack(norms).mean()),
                    seconds / len(losses) * (settings.steps - state.step),
                )  # fmt: skip
                state.history.append({"kind": "train", "step": state.step, "loss": progress.loss})
                losses, norms, since = [], [], time.perf_counter()
                yield progress
            stop = self.evaluation.should_stop()
            if last or state.step % settings.validate_every == 0:
                yield self._validate()
                self.save()
                since = time.perf_counter()
            elif stop:
                self.save()
            if stop and state.step < settings.steps:
                raise _Stopped

    def _steps(self, until: int) -> Iterator[list[tuple[int, list[int], Tensor, Tensor]]]:
        """The batches of each step that is left: (epoch, indices, layers, lengths)."""
        settings, seed = self.settings, self.evaluation.config.seed
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
            stream = self.evaluation.features.stream(groups)
            with contextlib.closing(stream):  # type: ignore[type-var]
                ready = []
                for (epoch, indices), (layers, lengths) in zip(places, stream, strict=True):
                    ready.append((epoch, indices, layers, lengths))
                    if len(ready) == settings.accumulate:
                        yield ready
                        ready = []

    def _step(self, micros: Sequence[tuple[int, list[int], Tensor, Tensor]]) -> tuple[Tensor | None, Tensor]:
        """One optimizer step; None where it was left out because something was not finite."""
        state, settings = self.state, self.settings
        started = time.perf_counter()
        self.probe.train()
        total = torch.zeros((), device=self.device)
        for number, (epoch, indices, layers, lengths) in enumerate(micros):
            batch = self._crop(epoch, indices, layers, lengths)
            with chance(self.device, self.evaluation.config.seed, state.step, number):
                loss = self.probe.head.loss(batch) / settings.accumulate
            loss.backward()
            total += loss.detach()
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
                f"{state.skipped_in_a_row} steps in a row had a loss that is not finite, at step {state.step}: "
                f"lower the learning rate ({self.rate:g})"
            )
        return (total if finite else None), norm

    def _crop(self, epoch: int, indices: Sequence[int], layers: Tensor, lengths: Tensor) -> Batch:
        """The batch that the head sees: random crops of the features where the task trains on crops."""
        items, hop = tuple(self.items[index] for index in indices), self.evaluation.upstream.hop
        first = [0] * len(items)
        if self.settings.crop_seconds is not None:
            most = max(1, round(self.settings.crop_seconds * SAMPLE_RATE / hop))
            if layers.shape[2] > most:
                cropped = layers.new_zeros(*layers.shape[:2], most, layers.shape[3])
                for row, (index, length) in enumerate(zip(indices, lengths.tolist(), strict=True)):
                    draw = np.random.default_rng([self.evaluation.config.seed, epoch, index])
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
        recordings, size = self.evaluation.recordings, self.settings.batch
        order = sorted(range(len(split.items)), key=lambda index: -recordings.samples(split.items[index]))
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        predictions: list[Any] = [None] * len(order)
        stream = self.evaluation.features.stream([[split.items[i] for i in group] for group in groups])
        with contextlib.closing(stream):  # type: ignore[type-var]
            for group, (layers, lengths) in zip(groups, stream, strict=True):
                items = tuple(split.items[i] for i in group)
                batch = Batch(self.probe.total(layers), lengths, items, (0,) * len(items), self.evaluation.upstream.hop)
                for index, prediction in zip(group, self.probe.head.predict(batch), strict=True):
                    predictions[index] = prediction
        return predictions

    def _validate(self) -> Validated:
        split = self.corpus.splits["dev"]
        scores = self.evaluation.task.score(self.predict(split), split, self.corpus)
        state, choose = self.state, self.evaluation.task.metrics
        metrics = {name: float(value) for name, value in scores.metrics.items()}
        best = not state.best or _rank(choose, metrics) > _rank(choose, state.best)
        if best:
            state.best, state.best_step = metrics, state.step
            write_atomic(self.folder / BEST_FILE, _pickled(self.probe.state_dict()))
        state.history.append({"kind": "dev", "step": state.step, **metrics})
        return Validated(state.step, metrics, best)


def _rank(choose: Sequence[Metric], metrics: Mapping[str, float]) -> tuple[float, ...]:
    """Higher is better: the first metric decides, the next ones between equals (no utterance is wholly right yet)."""
    return tuple(metrics[m.name] if m.higher_is_better else -metrics[m.name] for m in choose if m.name in metrics)


def _pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# ---- one task (of one fold) ------------------------------------------------


class _Evaluation:
    """One model on one task, in one fold of it."""

    corpus: Corpus
    recordings: Recordings
    features: Features
    hashes: dict[SplitName, str]

    def __init__(
        self,
        config: EvaluateConfig,
        task: Task,
        upstream: Upstream,
        fold: int,
        folder: Path,
        device: torch.device,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.task, self.upstream, self.fold = config, task, upstream, fold
        self.folder, self.device, self.should_stop = folder, device, should_stop
        self.began, self.earlier = time.perf_counter(), 0.0
        self._seen: set[Path] = set()
        if config.dry_run:
            settings = {"steps": DRY_STEPS, "validate_every": DRY_STEPS, "batch": min(config.training.batch, DRY_ITEMS)}
            if config.training.steps:
                self.config = dataclasses.replace(config, **settings)  # type: ignore[arg-type]

    def run(self, *, anew: bool) -> Generator[Report, None, dict[str, Any]]:
        """Everything; returns the result. With `anew`, nothing of an earlier run is left once the data are checked."""
        config, out = self.config, Path(self.config.out)
        self.corpus = self._checked(self.task.read(Path(config.data).absolute(), config.options(self.fold)))
        scan_cache = (Path(config.cache) if config.cache else out) / SCAN_CACHE
        scanning = measure_corpus(self.corpus, None if config.dry_run else scan_cache, max(1, config.workers))
        self.recordings = yield from _reported(scanning)
        self.hashes = {name: list_hash(split, self.recordings) for name, split in self.corpus.splits.items()}
        cache = None
        if config.cache and not config.dry_run:
            cache = FeatureCache(Path(config.cache), self.upstream)
        self.features = Features(self.upstream, self.recordings, cache, self.device, config.workers)
        if config.dry_run:
            self.folder = out / ".dry-run"
            shutil.rmtree(self.folder, ignore_errors=True)  # of one that was killed
        elif anew:
            _clear(out)
        try:
            yield from self._start()
            return (yield from self._trained() if config.training.steps else self._searched())
        finally:
            if config.dry_run:
                shutil.rmtree(self.folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    out.rmdir()  # where the dry run made it

    def came_back(self, folder: Path, wall: float) -> None:
        """A training was restored: what it took before counts, unless that was in this process, as in a sweep."""
        if folder not in self._seen:
            self._seen.add(folder)
            self.earlier = max(self.earlier, wall)

    def _checked(self, corpus: Corpus) -> Corpus:
        for name in ("train", "dev", "test") if self.config.training.steps else ("dev", "test"):
            if name not in corpus.splits or not corpus.splits[name].items:
                raise ArmhubertError(f"the {name} split of {self.config.data} has no utterances: {self.task.data}")
        for name, split in corpus.splits.items():
            if len({item.key for item in split.items}) < len(split.items):
                raise ArmhubertError(f"the {name} split names an utterance twice: correct its list")
        if not self.config.dry_run:
            return corpus
        return dataclasses.replace(corpus, splits={name: _few(split) for name, split in corpus.splits.items()})

    def _start(self) -> Iterator[Report]:
        config = self.config
        steps, parameters, first = config.training.steps, 0, 0
        if steps:
            training = _Training(self, config.training.learning_rate, self.folder)
            parameters, first = sum(p.numel() for p in training.trained), training.state.step
        if not config.dry_run:
            write_atomic(Path(config.out) / CONFIG_FILE, json.dumps(dataclasses.asdict(config), indent=1) + "\n")
        splits = {
            name: (len(split.items), sum(self.recordings.samples(item) for item in split.items) / SAMPLE_RATE)
            for name, split in self.corpus.splits.items()
        }
        yield Started(
            config, self.task, self.upstream, self.fold + 1 if self.task.folds > 1 else 0, splits, self.corpus.notes,
            self.changed(), parameters, first, steps, device_name(self.device),
        )  # fmt: skip
        if self.features.cache is not None:
            items = [item for split in self.corpus.splits.values() for item in split.items]
            yield from self.features.fill(items, self.should_stop)

    def changed(self) -> dict[str, Any]:
        """Training settings that are not SUPERB's."""
        mine, theirs = dataclasses.asdict(self.config.training), dataclasses.asdict(self.task.defaults)
        return {name: value for name, value in mine.items() if value != theirs[name]}

    def _trained(self) -> Generator[Report, None, dict[str, Any]]:
        settings = self.config.training
        tried: list[dict[str, Any]] = []
        if self.config.sweep and not self.config.dry_run:
            training = yield from self._sweep(tried)
        else:
            training = _Training(self, settings.learning_rate, self.folder)
            yield from training.run(settings.steps)
        training.load_best()
        tests = {}
        for name, split in self.corpus.splits.items():
            if name.startswith("test"):
                predictions = training.predict(split)
                tests[name] = self.task.score(predictions, split, self.corpus)
                if not self.config.dry_run:
                    _write_predictions(self.folder / f"predictions-{name.replace(':', '-')}.jsonl", split, predictions)
        weights = training.probe.total.weights.detach().softmax(0).tolist()
        return self._result(
            training.state.best, tests, training.rate,
            best_step=training.state.best_step,
            layer_weights=weights,
            head=fingerprint(training.probe),
            sweep=tried,
            history=training.state.history,
            train_seconds=training.state.seconds,
            earlier_seconds=self.earlier,
        )  # fmt: skip

    def _sweep(self, tried: list[dict[str, Any]]) -> Generator[Report, None, _Training]:
        """Successive halving on dev: after 1/8, 1/4 and 1/2 of the steps the worse half of the rates is given up."""
        choose, steps = self.task.metrics, self.config.training.steps
        rates = sorted(self.config.rates)
        for share in (8, 4, 2, 1):
            until = max(1, steps // share)
            scores: dict[float, dict[str, Any]] = {}
            for rate in rates:
                training = _Training(self, rate, self.folder / f"lr-{rate:g}")
                with contextlib.suppress(Diverged):
                    yield from training.run(until)
                    scores[rate] = training.best(until)
            if not scores:
                tried_rates = ", ".join(f"{rate:g}" for rate in self.config.rates)
                raise Diverged(f"every learning rate of the sweep diverged ({tried_rates}): give lower --rates")
            ranked = sorted(scores, key=lambda rate: _rank(choose, scores[rate]), reverse=True)
            kept = ranked[:1] if share == 1 else ranked[: -(-len(ranked) // 2)]
            for rate in rates:
                score = scores[rate][choose[0].name] if rate in scores else None
                tried.append({"rate": rate, "step": until, "dev": score, "kept": rate in kept})
                yield RateTried(rate, until, score, rate in kept)
            rates = sorted(kept)
        return _Training(self, rates[0], self.folder / f"lr-{rates[0]:g}")

    def _searched(self) -> Generator[Report, None, dict[str, Any]]:
        if self.config.dry_run:  # a search of a part has nothing to find
            for _ in self.features.stream([[item] for item in self.corpus.splits["test"].items]):
                pass
            return {"metrics": {}}

        def states(name: SplitName) -> Iterator[Tensor]:
            for layers, lengths in self.features.stream([[item] for item in self.corpus.splits[name].items]):
                yield layers[:, 0, : int(lengths[0])].cpu()

        scores: Mapping[SplitName, Scores] = {}
        for found in self.task.search(states, self.corpus, self.config.options(self.fold)):
            if isinstance(found, tuple):
                yield Searching(*found)
            else:
                scores = found
            if self.should_stop():
                raise _Stopped
        tests = {name: score for name, score in scores.items() if name.startswith("test")}
        return self._result({k: float(v) for k, v in scores["dev"].metrics.items()}, tests, None)

    def _result(
        self, dev: Mapping[str, float], tests: Mapping[SplitName, Scores], rate: float | None, **more: Any
    ) -> dict[str, Any]:
        training = dataclasses.asdict(self.config.training) | ({"learning_rate": rate} if rate is not None else {})
        upstream = self.upstream
        return {
            "format": FORMAT,
            "task": self.task.name,
            "title": self.task.title,
            "model": {
                "source": upstream.source, "identity": upstream.identity, "parameters": upstream.parameters,
                "features": upstream.features, "layers": upstream.count, "width": upstream.width, "hop": upstream.hop,
            },
            "metrics": {name: round(float(value), 6) for name, value in tests["test"].metrics.items()},
            "dev": {name: round(value, 6) for name, value in dev.items()},
            "tests": {name: {k: round(float(v), 6) for k, v in score.metrics.items()} for name, score in tests.items()},
            "units": {metric.name: metric.unit for metric in self.task.metrics},
            "training": training,
            "changed": self.changed(),
            "config": dataclasses.asdict(self.config),
            "config_hash": _hash(dataclasses.asdict(self.config)),
            "data": {
                name: {
                    "items": len(split.items),
                    "seconds": round(sum(self.recordings.samples(item) for item in split.items) / SAMPLE_RATE, 3),
                    "hash": self.hashes[name],
                }
                for name, split in self.corpus.splits.items()
            },
            "notes": list(self.corpus.notes),
            "details": _details(tests["test"]),
            "versions": versions(),
            "hardware": {
                "device": device_name(self.device), "processor": processor_name(), "threads": torch.get_num_threads(),
                "machine": platform.machine(), "system": platform.system(),
            },
            **more,
        }  # fmt: skip


def _clear(out: Path) -> None:
    """Remove what a resumed run would take up, of every fold and rate; the result first: it says that all is done."""
    for name in (RESULT_FILE, CHECKPOINT_FILE, BEST_FILE):
        (out / name).unlink(missing_ok=True)
    for pattern in ("fold-*", "lr-*"):
        for folder in out.glob(pattern):
            shutil.rmtree(folder)


def _few(split: Split) -> Split:
    """Some items of a split, for a dry run; of trials, some of both kinds."""
    trials = [trial for kind in (True, False) for trial in [t for t in split.trials if t[2] is kind][:DRY_ITEMS]]
    named = {key for one, other, _ in trials for key in (one, other)}
    if named:
        return Split(tuple(item for item in split.items if item.key in named), tuple(trials))
    return Split(split.items[:DRY_ITEMS])


def _reported(scanning: Generator[tuple[int, int], None, Recordings]) -> Generator[Scanning, None, Recordings]:
    while True:
        try:
            done, total = next(scanning)
        except StopIteration as end:
            recordings: Recordings = end.value
            return recordings
        yield Scanning(done, total)


def list_hash(split: Split, recordings: Recordings) -> str:
    """Digest of a split: keys, lengths and labels of its items, and its trials; no machine path."""
    rows = [(item.key, recordings.samples(item), item.label) for item in split.items]
    return hashlib.blake2b(repr((rows, split.trials)).encode(), digest_size=16).hexdigest()


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """Of everything that numbers may depend on."""
    import torchaudio

    from armhubert import __version__

    return {
        "armhubert": __version__, "torch": torch.__version__, "torchaudio": torchaudio.__version__,
        "numpy": np.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _details(scores: Scores) -> dict[str, Any]:
    """What pictures need."""
    return {
        "confusion": scores.confusion._asdict() if scores.confusion else None,
        "by_label": {label: list(counts) for label, counts in scores.by_label.items()},
        "detection": scores.detection._asdict() if scores.detection else None,
        "examples": [list(example) for example in scores.examples],
    }


def _write_predictions(path: Path, split: Split, predictions: Sequence[Any]) -> None:
    rows = [
        {"key": item.key, "label": item.label, "prediction": prediction}
        for item, prediction in zip(split.items, predictions, strict=True)
    ]
    write_atomic(path, "".join(json.dumps(row, default=_plain) + "\n" for row in rows))


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists; anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _average(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result; of several folds: the first with the metrics of all averaged."""
    if len(results) == 1:
        return results[0]
    result = dict(results[0])
    for key in ("metrics", "dev"):
        result[key] = {name: float(np.mean([r[key][name] for r in results])) for name in results[0][key]}
    result["tests"] = {"test": result["metrics"]}
    result["folds"] = [{"metrics": r["metrics"], "dev": r["dev"], "head": r.get("head")} for r in results]
    result["data"] = {f"fold-{n}/{name}": split for n, r in enumerate(results, 1) for name, split in r["data"].items()}
    confusions = [r["details"]["confusion"] for r in results]
    if all(confusions) and len({tuple(c["labels"]) for c in confusions}) == 1:
        total = np.sum([c["counts"] for c in confusions], axis=0).tolist()
        result["details"] = {**result["details"], "confusion": {"labels": confusions[0]["labels"], "counts": total}}
    return result
