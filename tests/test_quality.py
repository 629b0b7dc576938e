import json
from typing import Any

import pytest

from armhubert import quality
from armhubert.clock import Timing
from armhubert.errors import ArmhubertError
from armhubert.profile import Cell, Model, Profile, Rates
from armhubert.profile_report import write


def result(task: str, value: float, source: str, identity: str, *, features: str = "hidden", data: str = "d") -> str:
    metric = {"pr": "per", "ks": "accuracy"}[task]
    model = {"source": source, "identity": identity, "features": features}
    return json.dumps({"task": task, "model": model, "metrics": {metric: value}, "data": {"test": {"hash": data}}})


def model(source: str, parameters: int, *, mode: str = "eager", error: float | None = None) -> Model:
    return Model(
        f"{source} ({mode})", source, mode, parameters + 10, parameters, 4 * parameters, 1000 * parameters, 0, None,
        error, {},
    )  # fmt: skip


def profile(*models: Model) -> Profile:
    timings = {m.name: Timing(*[m.parameters_without_heads * 1e-8] * 3) for m in models}
    return Profile({}, Rates(1.0, 1.0), models, (Cell(1, 10.0, timings, {}, {}),))


IDENTITIES = {"small": frozenset({"s", "s-heads"}), "large": frozenset({"l"}), "middle": frozenset({"m"})}


@pytest.fixture
def folder(tmp_path):
    for name, text in {
        "small/pr": result("pr", 9.0, "moved/small", "s-heads", features="heads"),
        "large/pr": result("pr", 5.0, "large", "l"),
        "middle/pr": result("pr", 9.5, "middle", "m"),
        "large/ks": result("ks", 97.0, "large", "l"),
        "small/ks": result("ks", 96.0, "moved/small", "s-heads", features="heads"),
        "small/er/fold-1": result("pr", 1.0, "small", "s"),
    }.items():
        path = tmp_path / "suite" / name / ("other.json" if "fold" in name else "result.json")
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "suite" / "suite.json").write_text("[]")
    return tmp_path / "suite"


def compared(results: tuple[quality.Result, ...], *models: Model) -> quality.Comparison:
    return quality.compare(profile(*models), results, lambda source: IDENTITIES.get(source, frozenset()))


def test_a_result_of_several_folds_is_read(tmp_path):
    content = json.loads(result("ks", 60.0, "small", "s"))
    content["data"] = {f"fold-{n}/{split}": {"hash": f"{split}{n}"} for n in (1, 2) for split in ("dev", "test")}
    (tmp_path / "result.json").write_text(json.dumps(content))
    (found,) = quality.read_results([tmp_path])
    assert (found.value, found.data) == (60.0, "test1 test2")


def test_results_are_found_by_file_folder_and_suite(folder):
    whole = quality.read_results([folder])
    assert len(whole) == 5
    assert quality.read_results([folder / "suite.json"]) == whole
    assert quality.read_results([folder, folder / "large"]) == whole  # each once
    one = quality.read_results([folder / "large" / "pr" / "result.json"])
    assert [(r.task, r.metric, r.value, r.higher_is_better) for r in one] == [("pr", "PER", 5.0, False)]


def test_models_are_matched_by_what_they_are_and_the_front_is_marked(folder, tmp_path):
    models = model("small", 20_000_000), model("middle", 30_000_000), model("large", 90_000_000)
    found = compared(quality.read_results([folder]), *models)
    points = {(p.task, p.model): p for p in found.points}
    assert len(points) == 5
    assert found.not_profiled == ()
    assert set(points["pr", "small (eager)"].front) == set(quality.COSTS)
    assert points["pr", "middle (eager)"].front == ()  # dearer and worse than small
    assert set(points["pr", "large (eager)"].front) == set(quality.COSTS)
    assert points["ks", "small (eager)"].front == points["ks", "large (eager)"].front
    costs = points["pr", "small (eager)"].costs
    assert costs == pytest.approx({"parameters": 20.00001, "macs": 20.0, "latency": 0.2})
    assert costs["parameters"] > 20  # its heads were evaluated
    assert points["pr", "large (eager)"].costs["parameters"] == 90.0
    paths = write(profile(*models), tmp_path / "out", found)
    assert paths[-1].name == "profile-quality.png"
    stored = json.loads(paths[0].read_text())["quality"]
    assert len(stored["points"]) == 5


def test_a_cost_that_is_not_of_what_was_evaluated_is_told(folder):
    """`large` was evaluated by its hidden states, `small` by its heads."""
    small, large = model("small", 20), model("large", 90)
    results = quality.read_results([folder])
    without_heads = large._replace(parameters=large.parameters_without_heads)
    for models, without, with_them in (
        ((small, without_heads), "add heads=True", ""),
        ((small, large), "add heads=True", "leave out heads=True"),
        ((large,), "", "leave out heads=True"),
    ):
        found = compared(results, *models)
        for heads, says in ((False, without), (True, with_them)):
            told = quality.caution(profile(*models), found, heads)
            assert says in told
            assert bool(says) == bool(told)


def test_what_has_no_place_is_listed(folder):
    found = compared(
        quality.read_results([folder]),
        model("large", 90), model("large", 90, mode="bf16", error=1e-2), model("large", 90, mode="onnx", error=1e-6),
        model("hubert-base", 95), model("middle", 30)._replace(source="moved/small"),
    )  # fmt: skip
    assert {p.model for p in found.points} == {"large (eager)", "large (onnx)", "middle (eager)"}
    assert found.without_result == {
        "large (bf16)": "its features are 1.0e-02 from those that were evaluated",
        "hubert-base (eager)": "no result",
    }
    assert len(found.not_profiled) == 1
    assert found.not_profiled[0].startswith("middle, pr PER 9.5")


def test_a_result_of_other_weights_under_the_same_name_is_not_taken(folder):
    results = quality.read_results([folder / "large" / "pr"])
    found = quality.compare(profile(model("large", 90)), results, lambda _: frozenset({"trained on"}))
    assert found.points == ()
    assert found.without_result == {"large (eager)": "its result is of other weights"}
    assert len(found.not_profiled) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "must hold a mapping"),
        ("{}", "is no result of armhubert evaluate"),
        (result("pr", 9.0, "a", "b").replace('"pr"', '"prr"'), "unknown task 'prr'"),
        (result("pr", 9.0, "a", "b").replace("9.0", '"good"'), "is no result of armhubert evaluate"),
        (result("pr", 9.0, "a", "b").replace("9.0", "NaN"), "is no result of armhubert evaluate"),
        (result("pr", 9.0, "a", "b").replace('"b"', "7"), "is no result of armhubert evaluate"),
        (result("pr", 9.0, "a", "b").replace('"pr"', "[1]"), "is no result of armhubert evaluate"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, says):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ArmhubertError, match=says) as caught:
        quality.read_results([tmp_path / "result.json"])
    assert "\n" not in str(caught.value)


def test_what_was_not_run_together_is_refused(folder, tmp_path):
    with pytest.raises(ArmhubertError, match=r"has no result\.json below it"):
        quality.read_results([folder / "small" / "er"])
    with pytest.raises(ArmhubertError, match="cannot read"):
        quality.read_results([tmp_path / "nowhere.json"])
    again = folder / "large" / "again" / "result.json"
    again.parent.mkdir()
    again.write_text(result("pr", 4.0, "large", "l"))
    with pytest.raises(ArmhubertError, match="has several results of pr: name one of"):
        compared(quality.read_results([folder]), model("large", 90))
    again.write_text(result("pr", 4.0, "large", "l", data="other"))
    with pytest.raises(ArmhubertError, match="results of pr are on different test data"):
        quality.read_results([folder])


def test_identities_are_those_of_evaluate():
    from armhubert.superb.upstream import load_upstream

    known: Any = quality.identities("mini")
    assert load_upstream("mini").identity in known
    assert quality.identities("hubert-base") == quality.identities("released") == frozenset()
