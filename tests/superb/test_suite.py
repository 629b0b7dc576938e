import dataclasses
import html.parser
import json
import re
from typing import Any

import pytest

from armhubert.bundled import SPEECH, TEST_SPEECH, TRAINING_SPEECH
from armhubert.errors import ArmhubertError
from armhubert.superb import pictures
from armhubert.superb import report as report_module
from armhubert.superb.progress import Finished
from armhubert.superb.suite import (
    COLUMNS,
    FBANK,
    PUBLISHED,
    SOTA,
    SuitePlanned,
    TaskBegun,
    TaskFailed,
    label,
    overall,
    plan_suite,
    row_of,
    run_suite,
    superb_score,
)
from armhubert.superb.task import Options
from armhubert.superb.tasks import find


@pytest.mark.parametrize(
    ("model", "published"),
    [("HuBERT Base", 80.8), ("ARMHuBERT 960h", 78.1), ("ARMHuBERT-S 960h", 77.5), ("ARMwavLM-S 960h", 78.9),
     ("MaskHuBERT 960h", 77.8), ("STaRHuBERT-L", 79.8), ("DPHuBERT", 78.9), ("DistilHuBERT", 75.9)],
)  # fmt: skip
def test_overall_is_the_published_one(model, published):
    assert overall(PUBLISHED[model]) == pytest.approx(published, abs=0.051)


def test_superb_score_is_the_known_one():
    assert superb_score(PUBLISHED["HuBERT Base"]) == pytest.approx(941, abs=1)
    assert superb_score(PUBLISHED["DPHuBERT"]) == pytest.approx(866, abs=1)
    assert superb_score(PUBLISHED["STaRHuBERT-L"]) == pytest.approx(896, abs=1)
    assert superb_score(FBANK) == 0
    assert superb_score(SOTA) == pytest.approx(1000)


def test_incomplete_rows_have_no_score():
    row = (None, *PUBLISHED["DPHuBERT"][1:])
    assert overall(row) is None
    assert superb_score(row) is None


TINY = {"steps": 2, "batch": 4, "accumulate": 1, "workers": 0}


@pytest.fixture
def small(tmp_path, waves):
    waves(*(f"data/keywords/{word}/{n}.wav" for word in ("cat", "<dog>") for n in range(24)), seconds=0.2)
    return plan_suite("superb", ["fbank", "mfcc"], str(tmp_path / "data"), str(tmp_path / "out"), TINY, {})


def test_a_suite_runs_what_is_there_and_goes_on(small, tmp_path):
    assert {config.task for config in small.configs} == {"ks"}
    assert set(small.skipped) == {column.task for column in COLUMNS} - {"ks"}
    *_, finished = run_suite(small, tmp_path / "out")
    assert set(finished.results) == {"fbank", "mfcc"}
    row = row_of(finished.results["fbank"])
    assert [value is not None for value in row] == [column.task == "ks" for column in COLUMNS]
    elsewhere = tuple(
        dataclasses.replace(config, workers=1, data=f"{tmp_path}/data/./keywords", log_every=1)
        for config in small.configs
    )
    for plan in (small, SuitePlanned(elsewhere, {})):
        *reports, again = run_suite(plan, tmp_path / "out")
        assert again.results == finished.results
        assert [type(report) for report in reports] == [TaskBegun, Finished] * 2, "nothing is repeated"


def test_a_suite_of_fewer_models_keeps_the_others_in_its_report(small, tmp_path):
    *_, both = run_suite(small, tmp_path / "out")
    one = SuitePlanned(small.configs[1:], {})
    *_, finished = run_suite(one, tmp_path / "out")
    assert finished.results == both.results
    assert list(finished.results) == ["mfcc", "fbank"]
    settings = TINY | {"steps": 3}
    longer = plan_suite("superb", ["fbank_no_cmvn"], str(tmp_path / "data"), str(tmp_path / "out"), settings, {})
    *_, finished = run_suite(longer, tmp_path / "out")
    assert list(finished.results) == ["fbank_no_cmvn"]
    assert finished.left_out == (str(tmp_path / "out/fbank/ks"), str(tmp_path / "out/mfcc/ks"))


def test_a_result_of_weights_that_have_changed_is_not_taken_for_the_models(tmp_path, waves):
    waves(*(f"data/keywords/{word}/{n}.wav" for word in ("cat", "dog") for n in range(24)), seconds=0.2)
    file = tmp_path / "own.py"
    code = (
        "class M:\n    identity = 'old'\n    def __call__(s, x, n):\n        return [x[:, ::320, None]], -(-n // 320)\n"
    )
    plan = plan_suite("superb", [f"{file}:M"], str(tmp_path / "data"), str(tmp_path / "out"), TINY, {})
    file.write_text(code)
    *_, finished = run_suite(plan, tmp_path / "out")
    before = finished.results
    file.write_text(code.replace("old", "new"))
    with pytest.raises(ArmhubertError, match=r"other weights than .*own\.py:M has now: name another out="):
        list(run_suite(plan, tmp_path / "out"))
    file.write_text(code)
    *_, finished = run_suite(plan, tmp_path / "out")
    assert finished.results == before
    (tmp_path / "out/own.py.M/ks/result.json").unlink()  # as if interrupted
    file.write_text(code.replace("old", "new"))
    *_, failure, finished = run_suite(plan, tmp_path / "out")
    assert failure.error.endswith("ks was begun with other model: start anew with force=True, or name another out=...")


def test_a_task_that_fails_does_not_end_the_suite(tmp_path, waves):
    waves(*(f"data/keywords/{word}/{n}.wav" for word in ("cat", "dog") for n in range(24)), seconds=0.2)
    waves(*(f"data/emotions/{e}/{s}/1.wav" for e in ("glad", "sad") for s in "abcde"), seconds=0.2)
    (tmp_path / "data/keywords/dog/0.wav").write_text("no audio")
    plan = plan_suite("superb", ["fbank"], str(tmp_path / "data"), str(tmp_path / "out"), TINY, {})
    *reports, finished = run_suite(plan, tmp_path / "out")
    (failure,) = (report for report in reports if isinstance(report, TaskFailed))
    assert failure.config.task == "ks"
    assert "0.wav" in failure.error
    assert (finished.failed, set(finished.results["fbank"])) == (1, {"er"})


def test_a_suite_of_another_seed_is_another_suite(tmp_path, waves):
    waves(*(f"data/emotions/{e}/{s}/1.wav" for e in ("glad", "sad") for s in "abcde"), seconds=0.2)
    out = tmp_path / "out"

    def suite(seed, stop=False):
        settings = {"steps": 2, "batch": 2, "accumulate": 1, "workers": 0, "seed": seed}
        plan = plan_suite("superb", ["fbank"], str(tmp_path / "data"), str(out), settings, {})
        *_, finished = run_suite(plan, out, should_stop=lambda: stop)
        return finished

    assert suite(0, stop=True).reason == "stopped"
    assert suite(0).results["fbank"]["er"]["config"]["seed"] == 0
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    with pytest.raises(ArmhubertError, match="out/fbank/er holds a run with other seed: name another out="):
        suite(1)
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("source", "name"), [("runs/arm", "arm"), ("a/b:c", "b.c"), (".", "here"), ("..", "up")])
def test_a_models_name_is_the_name_of_a_folder(tmp_path, monkeypatch, source, name):
    (tmp_path / "up/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "up/here")
    assert label(source) == name


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_file_with_everything_inside(small, tmp_path):
    *_, finished = run_suite(small, tmp_path / "out")
    path = report_module.write_report(finished)
    page = Page()
    page.feed(path.read_text())
    assert page.open == []
    assert page.sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert "HuBERT Base" in page.text
    rows = json.loads((tmp_path / "out/suite.json").read_text())
    assert [row["model"] for row in rows] == ["fbank", "mfcc"]
    assert rows[0]["overall"] is None
    accuracy = finished.results["fbank"]["ks"]["metrics"]["accuracy"]
    assert f"{accuracy:.2f}" in page.text


def test_what_differs_between_models_is_said_of_each(small, tmp_path):
    *_, finished = run_suite(small, tmp_path / "out")
    other = {"changed": {"steps": 9}, "notes": ["drawn anew"]}
    results = {"one": finished.results["fbank"], "two": {"ks": {**finished.results["fbank"]["ks"], **other}}}
    page = Page()
    page.feed(report_module.page(results, COLUMNS))
    assert "two: Settings that are not SUPERB's: steps 9." in page.text
    assert re.search("one: Settings that are not SUPERB's: .*batch 4", page.text)
    assert "two: drawn anew" in page.text
    assert page.text.count("Data: train") == 1
    assert ": Data: train" not in page.text


def test_what_strangers_named_is_escaped(small, tmp_path):
    *_, finished = run_suite(small, tmp_path / "out")
    results = {"<script>alert(1)</script>": finished.results["fbank"]}
    text = report_module.page(results, COLUMNS)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_settings_for_single_tasks(tmp_path, waves):
    waves(*(f"words/{word}/{n}.wav" for word in ("cat", "dog") for n in range(24)))
    per_task = {"ks": {"data": str(tmp_path / "words"), "steps": 7}}
    plan = plan_suite("superb", ["fbank"], str(tmp_path / "words"), "out", {"steps": 3}, per_task)
    assert [config.steps for config in plan.configs if config.task == "ks"] == [7]
    only = plan_suite("superb", ["fbank"], str(tmp_path / "words"), "out", {}, per_task, ["ks"])
    assert [config.task for config in only.configs] == ["ks"]
    assert not only.skipped
    relative = plan_suite("superb", ["fbank"], str(tmp_path), "out", {}, {"ks": {"data": "words"}})
    assert relative.configs[0].data == str(tmp_path / "words")
    with pytest.raises(ArmhubertError, match="unknown task 'kss'"):
        plan_suite("superb", ["fbank"], str(tmp_path), "out", {}, {"kss": {}})
    with pytest.raises(ArmhubertError, match="unknown key 'step' in the settings of ks; did you mean 'steps'"):
        plan_suite("superb", ["fbank"], str(tmp_path / "words"), "out", {}, {"ks": {**per_task["ks"], "step": 1}})


def test_a_suite_gives_no_task_what_it_has_no_use_for(tmp_path, waves):
    waves(*(f"keywords/{word}/{n}.wav" for word in ("cat", "dog") for n in range(24)))
    common = {"test": ["x"], "g2p": True, "language_model": "lm.arpa", "fold": 2}
    plan = plan_suite("superb", ["fbank"], str(tmp_path), "out", common, {})
    (ks,) = plan.configs
    assert (ks.task, ks.test, ks.g2p, ks.language_model, ks.fold) == ("ks", (), False, None, None)
    with pytest.raises(ArmhubertError, match="ks has no choice of test subsets"):
        plan_suite("superb", ["fbank"], str(tmp_path), "out", {}, {"ks": {"test": ["x"]}})


def test_data_that_are_incomplete_are_not_replaced_by_other_data(tmp_path, waves):
    for subset, speakers in (("train-clean-100", "abcd"), ("dev-clean", "ef"), ("test-clean", "gh")):
        waves(*(f"LibriSpeech/{subset}/{speaker}/1/{n}.wav" for speaker in speakers for n in range(2)), seconds=2.1)
    (only,) = plan_suite("superb", ["fbank"], str(tmp_path), "out", {}, {}, ["asv"]).configs
    assert only.data == str(tmp_path / "LibriSpeech")
    waves("VoxCeleb1/dev/wav/id1/v/0.wav", "VoxCeleb1/test/wav/id2/v/0.wav")
    with pytest.raises(ArmhubertError, match=r"the trial list of VoxCeleb1 is missing: put veri_test2\.txt"):
        plan_suite("superb", ["fbank"], str(tmp_path), "out", {}, {}, ["asv"])


def test_data_for_nothing(tmp_path):
    with pytest.raises(ArmhubertError, match="has data for none of the tasks"):
        plan_suite("superb", ["fbank"], str(tmp_path), "out", {}, {})


def test_models_of_one_name():
    with pytest.raises(ArmhubertError, match="must differ"):
        plan_suite("mini", ["a/x", "b/x"], "", "out", {}, {})


def test_the_mini_suite_is_planned_from_bundled_speech():
    plan = plan_suite("mini", ["fbank", "mini"], "", "out", {}, {})
    assert [(config.model, config.task) for config in plan.configs] == [("fbank", "mini-pr"), ("mini", "mini-pr")]
    assert {config.cache for config in plan.configs} == {"out/features"}


def test_the_mini_suite_runs_on_bundled_speech(tmp_path):
    settings = {"steps": 2, "workers": 0, "device": "cpu"}
    *_, finished = run_suite(plan_suite("mini", ["fbank"], "", str(tmp_path), settings, {}), tmp_path)
    result = finished.results["fbank"]["mini-pr"]
    assert 50 < result["metrics"]["per"] < 500
    assert {name: split["items"] for name, split in result["data"].items()} == {"train": 92, "dev": 14, "test": 57}
    assert (tmp_path / "features").is_dir()


def test_no_speaker_is_in_two_sets_of_the_bundled_speech():
    corpus = find("mini-pr").read(SPEECH, Options())
    speakers = [{item.key.partition("-")[0] for item in split.items} for split in corpus.splits.values()]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 24
    assert not any("lexicon" in note or "left out" in note for note in corpus.notes)
    assert {path.name for path in TRAINING_SPEECH.iterdir()} == speakers[0]
    assert {path.name for path in TEST_SPEECH.iterdir()} == speakers[2]


def test_pictures_of_every_kind():
    result = {
        "model": {"source": "m"}, "dev": {"eer": 3.0}, "best_step": 2, "layer_weights": [0.2, 0.8],
        "history": [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "dev", "step": 2, "eer": 3.0}],
        "details": {
            "confusion": {"labels": ["a", "b"], "counts": [[3, 1], [0, 0]]},
            "by_label": {"AA": [1, 4], "B": [0, 0]},
            "detection": {"scores": [0.9, 0.2, 0.4, 0.1], "targets": [True, False, True, False]},
        },
    }  # fmt: skip
    drawn = pictures.draw(result)
    assert set(drawn) == {"training", "layers", "confusion", "labels", "det"}
    assert all(re.match(rb"\x89PNG", picture) for picture in drawn.values())


def test_a_students_heads_stand_at_their_layers(monkeypatch):
    monkeypatch.setattr(pictures.figures, "png", lambda figure: figure)
    results = {
        "student": {"model": {"features": "heads"}, "layer_weights": [0.4, 0.6]},
        "teacher": {"model": {"features": "hidden"}, "layer_weights": [0.2, 0.3, 0.5]},
    }
    figure: Any = pictures.layer_weights(results)
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[1, 2], [0, 1, 2]]
