"""One model on one task: read, check, train the head, choose on dev, score on test; interrupted and resumed at will."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armhubert.config import SAMPLE_RATE
from armhubert.data import SCAN_CACHE
from armhubert.errors import ArmhubertError
from armhubert.files import held, make_folder, write_atomic
from armhubert.machine import device_name, pick_device, processor_name
from armhubert.settings import build, read_mapping
from armhubert.superb.audio import Recordings, measure_corpus
from armhubert.superb.cache import FeatureCache
from armhubert.superb.config import RESUMABLE, EvaluateConfig
from armhubert.superb.features import Features
from armhubert.superb.progress import Finished, RateTried, Report, Searching, Started, Stopped
from armhubert.superb.task import SPLITS, Corpus, Scores, Split, SplitName, Task
from armhubert.superb.tasks import find
from armhubert.superb.training import BEST_FILE, CHECKPOINT_FILE, Diverged, Setup, Training, rank
from armhubert.superb.upstream import Upstream, load_upstream
from armhubert.teacher import fingerprint

CONFIG_FILE, RESULT_FILE = "evaluate.json", "result.json"
FORMAT = 1
DRY_ITEMS, DRY_STEPS = 8, 2
MANY_PASSES = 1000
"""Over the training speech: several times those of any task on SUPERB's own data."""


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
    except Stopped:
        yield Finished("stopped", {}, out)
        return
    if config.dry_run:
        yield Finished("dry run", results[0], out)
        return
    earlier = sum(r.pop("earlier_seconds", 0.0) for r in results)
    result = _average(results)
    result["wall_seconds"] = round(time.perf_counter() - started + earlier, 3)
    text = as_text(result)
    write_atomic(out / RESULT_FILE, text + "\n")
    yield Finished("done", json.loads(text), out)  # as a later reader finds it


def as_text(result: Mapping[str, Any]) -> str:
    """A result as JSON, a list of numbers a line: a confusion matrix of VoxCeleb1's speakers has 1.6 million."""
    return re.sub(r'\[\n[^][{}"]*\]', lambda row: "".join(row[0].split()), json.dumps(result, indent=1))


def load_run_config(folder: Path, changes: Mapping[str, Any]) -> EvaluateConfig:
    """The settings of the run in `folder`, changed where that does not change what it computes.

    Raises:
        ArmhubertError: no run there, or a change that needs a new run.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ArmhubertError(f"{folder} has no {CONFIG_FILE}: nothing to resume")
    saved = read_mapping(folder / CONFIG_FILE)
    given = json.loads(json.dumps(dict(changes)))  # as it was saved
    if fixed := sorted(name for name in given.keys() - RESUMABLE if given[name] != saved.get(name)):
        raise ArmhubertError(f"a resumed run keeps {', '.join(fixed)}: leave it out, or start a new run")
    return build(EvaluateConfig, {**saved, **changes, "out": str(folder)}, str(folder / CONFIG_FILE))


def other_settings(
    saved: Mapping[str, Any], config: EvaluateConfig | Mapping[str, Any], ignored: Set[str] = frozenset()
) -> list[str]:
    """Names of the settings by which `config` computes something else than the run that saved its own."""
    now = config if isinstance(config, Mapping) else json.loads(json.dumps(dataclasses.asdict(config)))
    defaults = json.loads(json.dumps({field.name: field.default for field in dataclasses.fields(EvaluateConfig)}))

    def value(settings: Mapping[str, Any], name: str) -> Any:
        found = settings.get(name, defaults[name])
        return os.path.realpath(found) if name in _PATHS and isinstance(found, str) else found

    compared = defaults.keys() - RESUMABLE - ignored - {"dry_run"}
    return sorted(name for name in compared if value(saved, name) != value(now, name))


_PATHS = ("model", "data", "lexicon", "language_model")


def _check_out(out: Path, resume: bool, force: bool) -> None:
    if resume and force:
        raise ArmhubertError("resume=True continues a run and force=True starts one anew: give one of them")
    if resume or not out.exists() or force:
        return
    if not out.is_dir() or any(path.name != SCAN_CACHE for path in out.iterdir()):
        raise ArmhubertError(
            f"{out} exists: continue it with resume=True, start anew with force=True, or choose another folder"
        )


# ---- one task (of one fold) ------------------------------------------------


class _Evaluation:
    """One model on one task, in one fold of it."""

    corpus: Corpus
    recordings: Recordings
    features: Features
    hashes: dict[SplitName, str]
    setup: Setup

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
        self.began = time.perf_counter()
        if config.dry_run:
            batch = min(config.training.batch, DRY_ITEMS)
            if config.training.steps:
                self.config = dataclasses.replace(
                    config, steps=DRY_STEPS, validate_every=DRY_STEPS, warmup=None, batch=batch
                )

    def run(self, *, anew: bool) -> Generator[Report, None, dict[str, Any]]:
        """Everything; returns the result. With `anew`, nothing of an earlier run is left once the data are checked."""
        config, out = self.config, Path(self.config.out)
        self.corpus = self._checked(self.task.read(Path(config.data).absolute(), config.options(self.fold)))
        if config.dry_run:
            with tempfile.TemporaryDirectory() as temporary:
                self.folder = Path(temporary)
                return (yield from self._run(None, anew))
        scan_cache = Path(config.cache or out) / SCAN_CACHE
        for folder in (out, scan_cache.parent):
            make_folder(folder)
        with held(out, strict=False):
            return (yield from self._run(scan_cache, anew))

    def _run(self, scan_cache: Path | None, anew: bool) -> Generator[Report, None, dict[str, Any]]:
        config, out = self.config, Path(self.config.out)
        self.recordings = yield from measure_corpus(self.corpus, scan_cache)
        self.hashes = {name: list_hash(split, self.recordings) for name, split in self.corpus.splits.items()}
        cache = None
        if config.cache and not config.dry_run:
            cache = FeatureCache(Path(config.cache), self.upstream)
        self.features = Features(self.upstream, self.recordings, cache, self.device, config.workers)
        self.setup = Setup(config, self.task, self.corpus, self.features, self.hashes, self.should_stop, self.began)
        if anew and not config.dry_run:
            _clear(out)
        yield from self._start()
        return (yield from self._trained() if config.training.steps else self._searched())

    def _checked(self, corpus: Corpus) -> Corpus:
        needed = SPLITS if self.config.training.steps else SPLITS[1:]
        for name in dict.fromkeys((*needed, *(name for name in corpus.splits if name.startswith("test")))):
            if name not in corpus.splits or not corpus.splits[name].items:
                raise ArmhubertError(f"the {name} split of {self.config.data} has no utterances: {self.task.data}")
        files: dict[str, str] = {}
        for path in (p.path for split in corpus.splits.values() for item in split.items for p in item.parts):
            if (other := files.setdefault(os.path.splitext(path)[0], path)) != path:
                raise ArmhubertError(
                    f"{other} and {path} differ in their endings alone, one recording twice: remove one"
                )
        for name, split in corpus.splits.items():
            if len({item.key for item in split.items}) < len(split.items):
                raise ArmhubertError(f"the {name} split names an utterance twice: correct its list")
        trained = set(_cuts(corpus.splits["train"])) if self.config.training.steps else set()
        for name, split in corpus.splits.items():
            if name != "train" and (cut := next((cut for cut in _cuts(split) if cut in trained), None)):
                raise ArmhubertError(
                    f"train and {name} must share no recording, both have {cut[0]}: name other subsets by "
                    "train=..., dev=... or test=..."
                )
        if not self.config.dry_run:
            return corpus
        return dataclasses.replace(corpus, splits={name: _few(split) for name, split in corpus.splits.items()})

    def _start(self) -> Iterator[Report]:
        config = self.config
        steps, parameters, first = config.training.steps, 0, 0
        if steps:
            training = Training(self.setup, config.training.learning_rate, self.folder)
            parameters, first = sum(p.numel() for p in training.trained), training.state.step
        if not config.dry_run:
            write_atomic(Path(config.out) / CONFIG_FILE, json.dumps(dataclasses.asdict(config), indent=1) + "\n")
        splits = {
            name: (len(split.items), sum(self.recordings.samples(item) for item in split.items) / SAMPLE_RATE)
            for name, split in self.corpus.splits.items()
        }
        notes, changed = self.corpus.notes, self.changed()
        if steps and "steps" not in changed:
            passes = steps * config.training.batch * config.training.accumulate / splits["train"][0]
            if passes > MANY_PASSES:
                notes = (*notes, f"SUPERB's {steps:,} steps are {passes:,.0f} passes over this little training speech: "
                         "steps=... sets fewer")  # fmt: skip
        yield Started(
            config, self.task, self.upstream, self.fold + 1 if self.task.folds > 1 else 0, splits, notes, changed,
            parameters, first, steps, device_name(self.device),
        )  # fmt: skip
        if self.features.cache is not None:
            items = [item for split in self.corpus.splits.values() for item in split.items]
            yield from self.features.fill(items, self.should_stop)

    def changed(self) -> dict[str, Any]:
        """Settings that are not SUPERB's."""
        mine, theirs = dataclasses.asdict(self.config.training), dataclasses.asdict(self.task.defaults)
        given = {name: getattr(self.config, name) for name in ("normalize_layers", "language_model")}
        return {name: value for name, value in mine.items() if value != theirs[name]} | {
            name: value for name, value in given.items() if value
        }

    def _trained(self) -> Generator[Report, None, dict[str, Any]]:
        settings = self.config.training
        tried: list[dict[str, Any]] = []
        if self.config.sweep and not self.config.dry_run:
            training = yield from self._sweep(tried)
        else:
            training = Training(self.setup, settings.learning_rate, self.folder)
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
            earlier_seconds=self.setup.earlier,
        )  # fmt: skip

    def _sweep(self, tried: list[dict[str, Any]]) -> Generator[Report, None, Training]:
        """Successive halving on dev: after 1/8, 1/4 and 1/2 of the steps the worse half of the rates is given up.

        Where all that is left diverges, the best that was given up is trained on.
        """
        choose, steps = self.task.choose_by, self.config.training.steps
        rates = sorted(self.config.rates)
        given_up: list[float] = []  # without having diverged, the best last
        for share in (8, 4, 2, 1):
            until = max(1, steps // share)
            scores: dict[float, dict[str, Any]] = {}
            trained = []
            while rates or (given_up and not scores):
                rate = rates.pop(0) if rates else given_up.pop()
                trained.append(rate)
                training = Training(self.setup, rate, self.folder / f"lr-{rate:g}")
                with contextlib.suppress(Diverged):
                    yield from training.run(until)
                    scores[rate] = training.best(until)
            if not scores:
                tried_rates = ", ".join(f"{rate:g}" for rate in self.config.rates)
                raise Diverged(f"every learning rate of the sweep diverged ({tried_rates}): give lower rates=...")
            ranked = sorted(scores, key=lambda rate: rank(choose, scores[rate]), reverse=True)
            kept = ranked[:1] if share == 1 else ranked[: -(-len(ranked) // 2)]
            given_up += reversed(ranked[len(kept) :])
            for rate in trained:
                score = scores[rate][choose[0].name] if rate in scores else None
                tried.append({"rate": rate, "step": until, "dev": score, "kept": rate in kept})
                yield RateTried(rate, until, score, rate in kept)
            rates = sorted(kept)
        return Training(self.setup, rates[0], self.folder / f"lr-{rates[0]:g}")

    def _searched(self) -> Generator[Report, None, dict[str, Any]]:
        if self.config.dry_run:  # a search of a part has nothing to find
            for _ in self.features.stream([[item] for item in self.corpus.splits["test"].items]):
                pass
            return {"metrics": {}}

        def states(name: SplitName) -> Iterator[Tensor]:
            for layers, lengths in self.features.stream([[item] for item in self.corpus.splits[name].items]):
                yield layers[:, 0, : int(lengths[0])].cpu()

        scores: Mapping[SplitName, Scores] = {}
        for found in self.task.search(states, self.corpus):
            if isinstance(found, tuple):
                yield Searching(*found)
            else:
                scores = found
            if self.should_stop():
                raise Stopped
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
    for path in out.glob("predictions-*.jsonl"):
        path.unlink()
    for folder in out.iterdir():
        if re.fullmatch(r"fold-\d+|lr-[\d.e-]+", folder.name) and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)


def _cuts(split: Split) -> Iterator[tuple[str, int, int | None]]:
    """The recordings of a split, and the samples of them that it uses."""
    return ((part.path, part.start, part.count) for item in split.items for part in item.parts)


def _few(split: Split) -> Split:
    """Some items of a split, for a dry run; of trials, some of both kinds."""
    trials = [trial for kind in (True, False) for trial in [t for t in split.trials if t[2] is kind][:DRY_ITEMS]]
    named = {key for one, other, _ in trials for key in (one, other)}
    if named:
        return Split(tuple(item for item in split.items if item.key in named), tuple(trials))
    return Split(split.items[:DRY_ITEMS])


def list_hash(split: Split, recordings: Recordings) -> str:
    """Digest of a split: keys, lengths and labels of its items, and its trials; no machine path."""
    rows = [(item.key, recordings.samples(item), item.label) for item in split.items]
    return hashlib.blake2b(repr((rows, split.trials)).encode(), digest_size=16).hexdigest()


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """Versions of everything that numbers may depend on."""
    from armhubert import __version__

    found = {"armhubert": __version__, "torch": torch.__version__, "numpy": np.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # without it speech of 16 kHz is still read
        found["torchaudio"] = importlib.metadata.version("torchaudio")
    return found | {"python": platform.python_version()}


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


OF_A_FOLD = ("metrics", "dev", "best_step", "training", "layer_weights", "head", "sweep", "history", "notes")
"""What each fold has a value of its own for, in `folds` of a result."""


def _average(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result; of several folds: what they agree on, metrics averaged, and in `folds` what each has of its own."""
    if len(results) == 1:
        return results[0]
    first = results[0]
    result = {name: value for name, value in first.items() if name not in OF_A_FOLD}
    for key in ("metrics", "dev"):
        result[key] = {name: float(np.mean([r[key][name] for r in results])) for name in first[key]}
    result["tests"] = {"test": result["metrics"]}
    result["training"] = {k: v for k, v in first["training"].items() if all(r["training"][k] == v for r in results)}
    result["train_seconds"] = sum(r["train_seconds"] for r in results)
    result["notes"] = [note for note in first["notes"] if all(note in r["notes"] for r in results)]
    result["folds"] = [{name: r[name] for name in OF_A_FOLD} for r in results]
    result["data"] = {f"fold-{n}/{name}": split for n, r in enumerate(results, 1) for name, split in r["data"].items()}
    result["details"] = _details(Scores({}))
    confusions = [r["details"]["confusion"] for r in results]
    if all(confusions) and len({tuple(c["labels"]) for c in confusions}) == 1:
        total = np.sum([c["counts"] for c in confusions], axis=0).tolist()
        result["details"]["confusion"] = {"labels": confusions[0]["labels"], "counts": total}
    return result
