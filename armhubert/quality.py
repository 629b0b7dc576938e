"""What models are worth beside what they cost: results of `armhubert evaluate` joined to a profile.

A result belongs to a profiled model when its weights, configuration and choice of features are the same (its
identity); where no identity can be computed, when the model was named alike. What was not profiled, or has no result,
is listed and not drawn; results on different test data are refused.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from armhubert.baselines import BASELINES
from armhubert.errors import ArmhubertError
from armhubert.profile import Model, Profile
from armhubert.settings import read_mapping
from armhubert.superb.runner import RESULT_FILE
from armhubert.superb.tasks import find
from armhubert.superb.upstream import load_upstream

COSTS = {
    "latency": "seconds for 10 s, batch size 1",
    "parameters": "million parameters",
    "macs": "G multiply-accumulates for 10 s",
}
"""What quality is drawn against, with its axis."""

_SAME = 1e-4
"""Feature error below which a mode has the quality of the float32 model, which is the one that was evaluated."""


class Result(NamedTuple):
    """The first metric of one result of `armhubert evaluate`."""

    path: str
    task: str
    title: str
    metric: str
    unit: str
    higher_is_better: bool
    value: float
    source: str
    identity: str
    """Empty: the evaluation could not tell."""
    features: str
    """hidden, heads, ..."""
    data: str
    """Digest of the test list."""


class Point(NamedTuple):
    """A profiled model on a task."""

    model: str
    """Name in the profile."""
    task: str
    title: str
    metric: str
    unit: str
    higher_is_better: bool
    value: float
    features: str
    """What was evaluated: hidden or heads."""
    costs: dict[str, float]
    """By `COSTS`, in the units of its axes; a latency only where 1 x 10 s was timed."""
    front: tuple[str, ...]
    """Costs at which no other model of the task is both cheaper and better."""


class Comparison(NamedTuple):
    """Quality against cost, and what could not be compared."""

    points: tuple[Point, ...]
    without_result: dict[str, str]
    """Profiled models, and why they have no place."""
    not_profiled: tuple[str, ...]
    """Results, one line each."""


# ---- results ----------------------------------------------------------------


def read_results(paths: Iterable[str | Path]) -> tuple[Result, ...]:
    """Results by file or folder.

    Args:
        paths: each a result.json, a folder below which there are some, or a suite.json beside whose models they are.

    Raises:
        ArmhubertError: nothing there, a file that is no result, or results of one task on different test data.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        folder = path.parent if path.name == "suite.json" and path.is_file() else path
        found = sorted(folder.rglob(RESULT_FILE)) if folder.is_dir() else [path]
        if not found:
            raise ArmhubertError(f"{path} has no {RESULT_FILE} below it: name the folder of an evaluation")
        files |= dict.fromkeys(file.resolve() for file in found)
    results = tuple(map(_read, files))
    for task in {result.task for result in results}:
        same = [result for result in results if result.task == task]
        if len({result.data for result in same}) > 1:
            raise ArmhubertError(
                f"results of {task} are on different test data and cannot be compared: "
                f"{', '.join(result.path for result in same)}"
            )
    return results


def _read(path: Path) -> Result:
    content = read_mapping(path)
    try:
        task = find(content["task"])
        metric = task.metrics[0]
        model, value = content["model"], content["metrics"][metric.name]
        tests = [split["hash"] for name, split in content["data"].items() if name.rpartition("/")[2] == "test"]
        texts = (model["source"], model["identity"], model["features"], " ".join(tests))  # a test a fold
        if not all(isinstance(text, str) for text in texts) or type(value) not in (int, float) or value != value:
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise ArmhubertError(f"{path} is no result of armhubert evaluate: name a {RESULT_FILE} that it wrote") from None
    except ArmhubertError as error:
        raise ArmhubertError(f"{path}: {error}") from None
    source, identity, features, data = texts
    return Result(
        str(path), task.name, task.title, metric.title, metric.unit, bool(metric.higher_is_better), float(value),
        source, identity, features, data,
    )  # fmt: skip


# ---- comparison -------------------------------------------------------------


def identities(source: str) -> frozenset[str]:
    """What `armhubert evaluate` calls the model at `source`, with and without heads; empty for a built-in baseline."""
    if source in BASELINES or source == "released":
        return frozenset()
    kinds: tuple[Any, ...] = ("hidden", "auto")
    return frozenset(load_upstream(source, features=kind).identity for kind in kinds)


def compare(
    result: Profile,
    results: Sequence[Result],
    identify: Callable[[str], frozenset[str]] = identities,
) -> Comparison:
    """Join results to the models of a profile, and find the Pareto front of every task and cost.

    Raises:
        ArmhubertError: two results of one model on one task.
    """
    known = {source: identify(source) for source in dict.fromkeys(model.source for model in result.models)}
    points: dict[tuple[str, str], Point] = {}
    without: dict[str, str] = {}
    used: set[str] = set()
    for model in result.models:
        own = [r for r in results if _belongs(r, model.source, known[model.source])]
        if model.feature_error is not None and not model.feature_error < _SAME:
            without[model.name] = f"its features are {model.feature_error:.1e} from those that were evaluated"
        elif not own:
            other = any(r.source == model.source for r in results)
            without[model.name] = "its result is of other weights" if other else "no result"
        for r in own:
            used.add(r.path)
            if model.name in without:
                continue
            if (r.task, model.name) in points:
                twice = ", ".join(other.path for other in own if other.task == r.task)
                raise ArmhubertError(f"{model.name} has several results of {r.task}: name one of {twice}")
            points[r.task, model.name] = Point(
                model.name, r.task, r.title, r.metric, r.unit, r.higher_is_better, r.value, r.features,
                _costs(result, model, r.features), (),
            )  # fmt: skip
    strangers = [f"{r.source}, {r.task} {r.metric} {r.value:g} ({r.path})" for r in results if r.path not in used]
    return Comparison(_with_front(list(points.values())), without, tuple(strangers))


def _belongs(result: Result, source: str, known: frozenset[str]) -> bool:
    return result.identity in known if known and result.identity else result.source == source


def _costs(result: Profile, model: Model, features: str) -> dict[str, float]:
    parameters = model.parameters if features == "heads" else model.parameters_without_heads
    costs = {"parameters": parameters / 1e6, "macs": model.macs / 1e9}
    for cell in result.cells:
        if (cell.batch, cell.seconds) == (1, 10) and model.name in cell.timings:
            costs["latency"] = cell.timings[model.name].median
    return costs


def _with_front(points: list[Point]) -> tuple[Point, ...]:
    return tuple(
        point._replace(front=tuple(cost for cost in COSTS if cost in point.costs and not _beaten(point, cost, points)))
        for point in points
    )


def _beaten(point: Point, cost: str, points: Sequence[Point]) -> bool:
    """Whether another model is at least as good and as cheap, and one of both truly."""

    def rank(other: Point) -> tuple[float, float]:
        return other.costs[cost], -other.value if other.higher_is_better else other.value

    mine = rank(point)
    theirs = [rank(other) for other in points if other.task == point.task and cost in other.costs]
    return any(a <= b and c <= d and (a, c) != (b, d) for (a, c), (b, d) in ((other, mine) for other in theirs))


def caution(result: Profile, comparison: Comparison, heads: bool) -> str:
    """What the picture would hide; empty: nothing."""
    if not heads and any(point.features == "heads" for point in comparison.points):
        return "results are of the distillation heads, whose cost this profile leaves out: add heads=True for it"
    with_heads = {model.name for model in result.models if model.parameters > model.parameters_without_heads}
    if heads and any(point.features != "heads" and point.model in with_heads for point in comparison.points):
        return "results are of hidden states, and latency and operations are with the heads: leave out heads=True"
    return ""
