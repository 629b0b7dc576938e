"""Several models on several tasks: what the data root has, SUPERB's table, its published rows and its two scores."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from armhubert.bundled import SPEECH
from armhubert.errors import ArmhubertError
from armhubert.machine import pick_device
from armhubert.settings import build, read_mapping
from armhubert.superb import runner
from armhubert.superb.config import EvaluateConfig, given_in_vain
from armhubert.superb.progress import Finished, Report
from armhubert.superb.task import Options, Task
from armhubert.superb.tasks import MINI, TASKS
from armhubert.superb.tasks.mini import RESOLUTION
from armhubert.superb.upstream import FeatureChoice, Upstream, load_upstream


class Column(NamedTuple):
    """One of the 11 numbers of SUPERB's table."""

    title: str
    task: str
    metric: str
    higher_is_better: bool
    scale: float = 1.0
    """Factor to percent: QbE's MTWV is printed plain and counted times 100."""

    def shown(self, value: float | None) -> str:
        """A number of this column as tables print it."""
        return printed(value, 4 if self.scale != 1 else 2)


def printed(value: float | None, digits: int) -> str:
    """A number of a table, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


COLUMNS = (
    Column("PER", "pr", "per", False),
    Column("WER", "asr", "wer", False),
    Column("KS", "ks", "accuracy", True),
    Column("QbE", "qbe", "mtwv", True, 100.0),
    Column("SID", "sid", "accuracy", True),
    Column("ASV", "asv", "eer", False),
    Column("SD", "sd", "der", False),
    Column("IC", "ic", "accuracy", True),
    Column("SF F1", "sf", "slot_f1", True),
    Column("SF CER", "sf", "slot_cer", False),
    Column("ER", "er", "accuracy", True),
)
MINI_COLUMNS = (Column("PER", "mini-pr", "per", False),)
MINI_NOTE = f"A proxy on the bundled speech: models less than {RESOLUTION} points of PER apart are not told apart."

Row = tuple[float | None, ...]
"""A model's numbers in the order of the columns; None: not measured."""

PUBLISHED: dict[str, Row] = {
    "HuBERT Base": (5.41, 6.42, 96.30, 0.0736, 81.42, 5.11, 5.88, 98.34, 88.53, 25.20, 64.92),
    "ARMHuBERT 960h": (7.72, 9.96, 96.88, 0.0635, 65.03, 5.68, 7.10, 97.07, 87.59, 26.06, 62.86),
    "ARMHuBERT-S 960h": (8.63, 10.82, 96.82, 0.0720, 63.76, 5.58, 7.01, 97.02, 86.34, 29.02, 62.96),
    "ARMwavLM-S 960h": (7.42, 10.03, 97.01, 0.0741, 71.29, 5.99, 7.11, 97.76, 87.41, 26.97, 64.54),
    "MaskHuBERT 960h": (7.30, 9.77, 96.36, 0.0664, 62.83, 5.38, 6.79, 97.05, 87.31, 27.10, 62.37),
    "STaRHuBERT-L": (7.97, 8.91, 96.56, 0.0677, 78.66, 5.45, 5.83, 97.50, 88.01, 25.36, 63.48),
    "DPHuBERT": (9.67, 10.47, 96.36, 0.0693, 76.83, 5.84, 5.92, 97.92, 86.86, 28.26, 63.16),
    "DistilHuBERT": (16.27, 13.37, 95.98, 0.0511, 73.54, 8.55, 6.19, 94.99, 82.57, 35.59, 63.02),
}
"""Published results (arXiv 2305.11685, 2312.09040) of models trained on whole data sets: not measured here."""

FBANK: Row = (82.01, 23.18, 41.38, 0.0058, 20.06, 9.56, 10.05, 9.65, 69.64, 52.94, 48.24)
SOTA: Row = (3.53, 3.62, 96.66, 0.0736, 90.33, 5.11, 5.62, 98.76, 89.81, 21.76, 67.62)
"""The leaderboard's rows that SUPERB_s is relative to."""


def overall(row: Row) -> float | None:
    """Mean of the 11 numbers, errors as 100 - x, MTWV times 100; None where one is missing."""
    points = [
        (column.scale * value if column.higher_is_better else 100 - value)
        for column, value in zip(COLUMNS, row, strict=True)
        if value is not None
    ]
    return sum(points) / len(COLUMNS) if len(points) == len(COLUMNS) else None


def superb_score(row: Row) -> float | None:
    """SUPERB_s: 1000 times the mean over the 10 tasks of (s - FBANK) / (SOTA - FBANK), SF's two metrics averaged."""
    by_task: dict[str, list[float]] = {}
    for column, value, low, high in zip(COLUMNS, row, FBANK, SOTA, strict=True):
        assert low is not None
        assert high is not None
        if value is None:
            return None
        by_task.setdefault(column.task, []).append((value - low) / (high - low))
    return 1000 * sum(sum(shares) / len(shares) for shares in by_task.values()) / len(by_task)


def row_of(results: Mapping[str, Mapping[str, Any]], columns: Sequence[Column] = COLUMNS) -> Row:
    """A model's row from its result.json by task."""
    return tuple(
        results[column.task]["metrics"][column.metric] if column.task in results else None for column in columns
    )


# ---- running ---------------------------------------------------------------


class SuitePlanned(NamedTuple):
    """What will be run, and why the rest will not."""

    configs: tuple[EvaluateConfig, ...]
    skipped: Mapping[str, str]
    """Reason by task."""


class TaskBegun(NamedTuple):
    """One model on one task, of so many."""

    number: int
    total: int
    config: EvaluateConfig


class TaskFailed(NamedTuple):
    """One model on one task, which ended in an error; the suite goes on."""

    config: EvaluateConfig
    error: str


class SuiteFinished(NamedTuple):
    """All that was run."""

    results: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """result.json by model and task; last those of earlier runs in the same folder with the same settings."""
    columns: tuple[Column, ...]
    reason: str
    """done or stopped."""
    out: Path
    failed: int = 0
    """Evaluations that ended in an error."""
    left_out: tuple[str, ...] = ()
    """Folders with results of other settings."""


def label(source: str) -> str:
    """A model's name in tables and folders: the last part of its path."""
    name = Path(source).name
    return (name if name not in ("", "..") else Path(source).resolve().name).replace(":", ".") or source


def plan_suite(
    suite: str,
    models: Sequence[str],
    data: str,
    out: str,
    settings: Mapping[str, Any],
    per_task: Mapping[str, Mapping[str, Any]],
    only: Sequence[str] = (),
) -> SuitePlanned:
    """Which tasks the data root has, with the settings of each.

    Args:
        suite: superb or mini.
        models: what to evaluate.
        data: the root; below it each task's data, in the folder that its download unpacks to, or itself. Empty: the
            bundled speech, for mini.
        out: folder of all runs.
        settings: of `EvaluateConfig`, for all tasks. mini caches features below `out`, unless told elsewhere.
        per_task: the same, for single tasks; `data` among them names a task's own root, relative to `data`.
        only: these tasks; none: all.

    Raises:
        ArmhubertError: two models of one name, unknown tasks or settings, or data for no task at all.
    """
    tasks = TASKS if suite == "superb" else MINI
    if suite == "mini":
        data = data or str(SPEECH)
        settings = {"cache": str(Path(out) / "features"), **settings}
    names = [label(model) for model in models]
    if len(set(names)) < len(names):
        raise ArmhubertError(f"models must differ in the last part of their names, got {', '.join(models)}")
    for where, named in (("in the settings", per_task), ("of the suite", only)):
        if unknown := sorted(set(named) - set(tasks)):
            raise ArmhubertError(f"unknown task {unknown[0]!r} {where}; known: {', '.join(tasks)}")
    configs, skipped = [], {}
    for task in (task for task in tasks.values() if not only or task.name in only):
        own = dict(per_task.get(task.name, {}))
        vain = given_in_vain(task, settings)
        common = {name: value for name, value in settings.items() if name not in vain}
        place = own.pop("data", None)
        root = Path(data, str(place or ""))
        config = build(
            EvaluateConfig, {**common, **own, "task": task.name, "data": str(root)}, f"the settings of {task.name}"
        )
        if place is None:
            try:
                config = dataclasses.replace(config, data=str(find_data(task, root, config.options(0))))
            except ArmhubertError as error:
                skipped[task.name] = str(error)
                continue
        configs += [
            dataclasses.replace(config, model=model, out=str(Path(out) / label(model) / task.name)) for model in models
        ]
    if not configs:
        first, reason = next(iter(skipped.items()))
        raise ArmhubertError(f"{data or 'no data root'} has data for none of the tasks; {first}: {reason}")
    configs.sort(key=lambda config: models.index(config.model))  # a model is loaded once
    return SuitePlanned(tuple(configs), skipped)


def find_data(task: Task, root: Path, options: Options) -> Path:
    """The folder of a task's data: the first of its usual names that is there, below the root or the root's own.

    Folders of words, speakers and emotions look alike, so no other name is taken for any of them; nor is a later one
    where the first is incomplete.

    Raises:
        ArmhubertError: none is there, or the task cannot read it.
    """
    folders = [root / name for name in task.folders if (root / name).is_dir()]
    if root.absolute().name in {Path(name).name for name in task.folders} or task.name in MINI:
        folders.append(root)
    if not folders:
        raise ArmhubertError(
            f"none of {', '.join(task.folders)} is in {root}: put its data there under such a name, or name the folder "
            f"in a settings file, as tasks: {{{task.name}: {{data: ...}}}}"
        )
    task.read(folders[0], options)
    return folders[0]


def run_suite(
    plan: SuitePlanned, out: Path, *, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Report | TaskBegun | TaskFailed | SuiteFinished]:
    """Evaluate everything that was planned; what is done already is not repeated, what fails does not end the rest.

    Raises:
        ArmhubertError: before anything is run: a model cannot be loaded, or a folder holds a run of other settings or
            other weights.
    """
    results: dict[str, dict[str, Mapping[str, Any]]] = {}
    upstream = loaded = None
    for config in plan.configs:
        _check_settings(config)
    for loaded in reversed(list(dict.fromkeys(map(_loading, plan.configs)))):  # so that the first is kept
        upstream = _load(*loaded)
        for config in plan.configs:
            if _loading(config) == loaded:
                _check_weights(config, upstream)
    failed = 0
    for number, config in enumerate(plan.configs, start=1):
        yield TaskBegun(number, len(plan.configs), config)
        if loaded != _loading(config):
            loaded = _loading(config)
            upstream = _load(*loaded)
        begun = not config.dry_run and (Path(config.out) / runner.CONFIG_FILE).is_file()
        run = runner.evaluate(config, resume=begun, force=config.dry_run, upstream=upstream, should_stop=should_stop)
        try:
            for last in run:
                yield last
        except ArmhubertError as error:
            failed += 1
            yield TaskFailed(config, str(error))
            continue
        assert isinstance(last, Finished)
        if last.reason == "stopped":
            yield SuiteFinished(results, _columns(plan), "stopped", out)
            return
        results.setdefault(label(config.model), {})[config.task] = last.result
    left_out = [] if plan.configs[0].dry_run else _add_earlier(results, plan, out)
    yield SuiteFinished(results, _columns(plan), "done", out, failed, tuple(left_out))


_Loading = tuple[str, FeatureChoice, str]


def _loading(config: EvaluateConfig) -> _Loading:
    return config.model, config.features, config.device


def _load(model: str, features: FeatureChoice, device: str) -> Upstream:
    return load_upstream(model, features=features, device=pick_device(device))


def _check_settings(config: EvaluateConfig) -> None:
    file = Path(config.out) / runner.CONFIG_FILE
    if not config.dry_run and file.is_file() and (other := runner.other_settings(read_mapping(file), config)):
        raise ArmhubertError(f"{config.out} holds a run with other {', '.join(other)}: name another out=...")


def _check_weights(config: EvaluateConfig, upstream: Upstream) -> None:
    file = Path(config.out) / runner.RESULT_FILE
    if config.dry_run or not file.is_file():
        return
    then = read_mapping(file).get("model")
    if upstream.identity and isinstance(then, dict) and then.get("identity") != upstream.identity:
        raise ArmhubertError(
            f"{config.out} holds a result of other weights than {config.model} has now: name another out=..."
        )


def _add_earlier(results: dict[str, dict[str, Mapping[str, Any]]], plan: SuitePlanned, out: Path) -> list[str]:
    """Add what other runs of the suite left in its folder, where the settings are the same; returns the others."""
    compared: dict[str, EvaluateConfig | Mapping[str, Any]] = {config.task: config for config in plan.configs}
    left_out = []
    for file in sorted(out.glob(f"*/*/{runner.RESULT_FILE}")):
        model, task = file.parent.parent.name, file.parent.name
        if task in results.get(model, {}) or task not in {column.task for column in _columns(plan)}:
            continue
        saved = read_mapping(file.with_name(runner.CONFIG_FILE))
        if runner.other_settings(saved, compared.setdefault(task, saved), ignored={"model"}):
            left_out.append(str(file.parent))
        else:
            results.setdefault(model, {})[task] = read_mapping(file)
    return left_out


def _columns(plan: SuitePlanned) -> tuple[Column, ...]:
    return MINI_COLUMNS if plan.configs[0].task in MINI else COLUMNS


def settings_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A settings file's common part and its `tasks` part.

    Raises:
        ArmhubertError: `tasks` is not a mapping of mappings.
    """
    common = dict(config)
    per_task = common.pop("tasks", {})
    if not isinstance(per_task, dict) or not all(isinstance(value, dict) for value in per_task.values()):
        raise ArmhubertError("tasks in the settings must map task names to their settings")
    own = {"task", "model", "out"}
    if wrong := sorted(own & {name for settings in (common, *per_task.values()) for name in settings}):
        known = sorted({field.name for field in dataclasses.fields(EvaluateConfig)} - own)
        raise ArmhubertError(f"a suite's settings name no {', '.join(wrong)}: known are {', '.join(known)}")
    return common, {str(name): dict(value) for name, value in per_task.items()}
