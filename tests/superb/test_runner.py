import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
import torch
from corpora import UPSTREAM, librispeech, write_wave

from armhubert.errors import ArmhubertError
from armhubert.machine import processor_name
from armhubert.settings import read_mapping
from armhubert.superb import config as config_module
from armhubert.superb import features, pictures, report
from armhubert.superb.config import EvaluateConfig
from armhubert.superb.progress import CachePlanned, Finished, Progress, RateTried, Started, Validated
from armhubert.superb.runner import as_text, evaluate, load_run_config
from armhubert.superb.suite import COLUMNS
from armhubert.superb.tasks import find
from armhubert.superb.training import Diverged, Training, plan_batches, rank

WORDS = [f"{word}/{name}.wav" for word in ("cat", "dog") for name in range(16)]


@pytest.fixture
def config(waves, tmp_path):
    waves(*[f"words/{name}" for name in WORDS], seconds=0.3)
    (tmp_path / "upstream.py").write_text(UPSTREAM)
    return EvaluateConfig(
        model=f"{tmp_path / 'upstream.py'}:make",
        task="ks",
        data=str(tmp_path / "words"),
        out=str(tmp_path / "run"),
        steps=12,
        batch=4,
        accumulate=2,
        learning_rate=1e-2,
        validate_every=4,
        workers=0,
    )


def run(config, **arguments):
    *_, last = reports = list(evaluate(config, **arguments))
    assert isinstance(last, Finished)
    return last.result, reports


def replace(config, **changes):
    return dataclasses.replace(config, **changes)


def same(one, other):
    return (one["head"], one["metrics"], one["dev"]) == (other["head"], other["metrics"], other["dev"])


@pytest.mark.parametrize(("steps", "noted"), [(None, True), (12, False)])
def test_superbs_steps_on_little_speech_are_noted(config, steps, noted):
    started = next(r for r in evaluate(replace(config, steps=steps)) if isinstance(r, Started))
    assert any("200,000 steps are" in note and "steps=... sets fewer" in note for note in started.notes) == noted


def test_starting_anew_removes_what_is_the_runs_own_and_nothing_else(config, tmp_path):
    run(config)
    (tmp_path / "run/lr-notes").mkdir()
    (tmp_path / "run/lr-notes/mine.txt").write_text("kept")
    (tmp_path / "run/lr-1e-3").mkdir()
    (tmp_path / "run/fold-1.txt").write_text("kept")
    (tmp_path / "run/predictions-test-other.jsonl").write_text("of the old run")
    run(config, force=True)
    assert (tmp_path / "run/lr-notes/mine.txt").is_file()
    assert (tmp_path / "run/fold-1.txt").is_file()
    assert not (tmp_path / "run/lr-1e-3").exists()
    assert not (tmp_path / "run/predictions-test-other.jsonl").exists()


def test_the_rate_is_constant_or_rises_and_falls(config):
    def rates(**settings):
        reports = evaluate(replace(config, steps=4, learning_rate=0.01, log_every=1, **settings), force=True)
        return [report.learning_rate for report in reports if isinstance(report, Progress)]

    assert rates() == [0.01] * 4
    assert rates(warmup=2) == pytest.approx([0.005, 0.01, 0.02 / 3, 0.01 / 3])
    with pytest.raises(ArmhubertError, match="warmup must be at most the run's 4 steps, got 5"):
        rates(warmup=5)


def test_a_folder_takes_one_run_at_a_time(config):
    reports = evaluate(config)
    assert isinstance(next(r for r in reports if isinstance(r, Started)), Started)
    with pytest.raises(ArmhubertError, match=r"another process is at work in .*run"):
        list(evaluate(config, force=True))
    assert isinstance([*reports][-1], Finished)


def test_a_further_test_set_without_utterances_is_told_before_training(tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=3, dev_clean=2, test_clean=2, test_other=1)
    speaker = tmp_path / "test-other/10/1/10-1.trans.txt"
    speaker.write_text("10-1-0000 UNKNOWN\n")
    config = EvaluateConfig(model="fbank", task="pr", data=str(tmp_path), out=str(tmp_path / "run"), steps=1)
    with pytest.raises(ArmhubertError, match=r"the test:test-other split of .* has no utterances"):
        list(evaluate(replace(config, test=("test-clean", "test-other"))))


def test_recordings_are_not_trained_on_and_scored(tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=3, dev_clean=2, test_clean=2)
    config = EvaluateConfig(model="fbank", task="asr", data=str(tmp_path), out=str(tmp_path / "run"), steps=1)
    for changes, shared in (
        ({"train": ("test-clean",)}, "train and test must share no recording, both have .*test-clean"),
        ({"train": ("dev-clean",)}, "train and dev must share no recording, both have .*dev-clean"),
        ({"test": ("test-clean", "train-clean-100")}, "train and test:train-clean-100 must share"),
    ):
        with pytest.raises(ArmhubertError, match=shared):
            list(evaluate(replace(config, **changes)))
    assert not (tmp_path / "run").exists()


def test_reruns_are_equal_and_results_are_complete(config, tmp_path):
    first, reports = run(config)
    second, _ = run(replace(config, out=str(tmp_path / "again")))
    assert same(first, second)
    assert first == json.loads((tmp_path / "run/result.json").read_text())
    assert first["changed"].keys() == {"steps", "batch", "accumulate", "learning_rate", "validate_every"}
    assert {"torch", "numpy", "armhubert", "python"} <= first["versions"].keys()

    assert re.fullmatch(rf"CPU {re.escape(processor_name())}, \d+ threads?", first["hardware"]["device"])
    assert re.fullmatch("[0-9a-f]{32}", first["config_hash"])
    assert re.fullmatch("[0-9a-f]{32}", first["model"]["identity"])
    assert first["wall_seconds"] > 0
    assert all(re.fullmatch("[0-9a-f]{32}", split["hash"]) for split in first["data"].values())
    assert first["data"]["train"] == second["data"]["train"]
    assert str(tmp_path) not in json.dumps(first["data"])
    assert sum(first["layer_weights"]) == pytest.approx(1)
    assert [r.step for r in reports if isinstance(r, Validated)] == [4, 8, 12]
    predictions = (tmp_path / "run/predictions-test.jsonl").read_text().splitlines()
    assert len(predictions) == first["data"]["test"]["items"]


def test_a_large_result_is_read_back(tmp_path):
    counts = [[10 + row] * 1400 for row in range(1400)]
    result = {"details": {"confusion": {"labels": ["a [\n1 2]", "b"], "counts": counts}, "detection": None}, "rows": []}
    text = as_text(result)
    (tmp_path / "result.json").write_text(text)
    assert read_mapping(tmp_path / "result.json") == result
    assert text.count("\n") < 1400 + 20


def test_what_is_not_superbs_is_told(config):
    result, reports = run(replace(config, normalize_layers=True))
    assert result["changed"]["normalize_layers"] is True
    assert next(r for r in reports if isinstance(r, Started)).changed == result["changed"]


def test_another_seed_is_another_run(config, tmp_path):
    first, _ = run(config)
    second, _ = run(replace(config, seed=1, out=str(tmp_path / "again")))
    assert not same(first, second)


@pytest.mark.parametrize("after", [3, 4, 9])
def test_an_interrupted_run_ends_as_if_it_had_not_been(after, config, tmp_path):
    whole, _ = run(config)
    part = replace(config, out=str(tmp_path / "part"))
    steps = iter(range(100))
    result, _ = run(part, should_stop=lambda: next(steps) >= after - 1)
    assert result == {}
    assert not (tmp_path / "part/result.json").exists()
    resumed, reports = run(load_run_config(tmp_path / "part", {}), resume=True)
    assert next(r.first_step for r in reports if isinstance(r, Started)) == after
    assert same(whole, resumed)


def test_dropout_and_augmentation_are_resumed_bit_for_bit(tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=6, dev_clean=2, test_clean=2)
    asr = EvaluateConfig(
        "fbank", "asr", str(tmp_path), str(tmp_path / "whole"), head_size=6, steps=6, batch=2, workers=0
    )
    whole, _ = run(asr)
    steps = iter(range(100))
    run(replace(asr, out=str(tmp_path / "part")), should_stop=lambda: next(steps) >= 3)
    resumed, _ = run(load_run_config(tmp_path / "part", {}), resume=True)
    assert same(whole, resumed)
    assert whole["changed"]["head_size"] == 6


def test_a_finished_run_is_not_repeated(config):
    first, _ = run(config)
    again, reports = run(config, resume=True)
    assert again == first
    assert len(reports) == 1


@pytest.fixture
def folds(waves, tmp_path):
    waves(*(f"er/{emotion}/{s}/{n}.wav" for emotion in ("glad", "sad") for s in "abcde" for n in "12"), seconds=0.2)
    return EvaluateConfig(
        "fbank", "er", str(tmp_path / "er"), str(tmp_path / "run"),
        steps=2, batch=2, accumulate=1, validate_every=1, workers=0,
    )  # fmt: skip


def test_a_run_begun_anew_takes_nothing_from_the_one_before(folds, tmp_path):
    run(folds)
    other = replace(folds, seed=1)
    assert run(other, force=True, should_stop=lambda: True)[0] == {}
    resumed, reports = run(load_run_config(tmp_path / "run", {}), resume=True)
    assert resumed["config"]["seed"] == 1
    steps = {r.fold: r.first_step for r in reports if isinstance(r, Started)}
    assert steps == {1: 1, 2: 0, 3: 0, 4: 0, 5: 0}
    fresh, _ = run(replace(other, out=str(tmp_path / "fresh")))
    assert resumed["folds"] == fresh["folds"]


def test_an_average_over_folds_has_nothing_of_a_single_one(folds):
    swept = replace(folds, model="fbank_no_cmvn", steps=8, sweep="lr", rates=(1e-1, 1e-4))
    result, _ = run(swept)
    own = {"best_step", "layer_weights", "head", "sweep", "history"}
    assert not own & result.keys()
    assert len(result["folds"]) == 5
    for fold in result["folds"]:
        assert own <= fold.keys()
        assert any("speakers of this fold" in note for note in fold["notes"])
    rates = {fold["training"]["learning_rate"] for fold in result["folds"]}
    assert (len(rates) == 1) == ("learning_rate" in result["training"])
    assert result["training"]["steps"] == 8
    assert result["metrics"]["accuracy"] == pytest.approx(sum(f["metrics"]["accuracy"] for f in result["folds"]) / 5)
    assert result["details"]["examples"] == []
    assert sum(map(sum, result["details"]["confusion"]["counts"])) == 20  # every recording is tested once
    assert list(pictures.each_fold({"m": result})) == [f"fold {n} of m" for n in range(1, 6)]
    assert set(pictures.draw(result)) == {"training", "confusion"}
    result["training"].pop("learning_rate", None)
    text = report.page({"m": {"er": result}}, COLUMNS)
    assert "<td>–</td><td>–</td>" in text


def test_each_fold_leaves_a_checkpoint_until_a_run_begins_anew(folds, tmp_path):
    run(folds)
    assert len(list((tmp_path / "run").glob("fold-*/checkpoint.pt"))) == 5
    one, _ = run(replace(folds, fold=3), force=True)
    assert len(one["data"]) == 3  # train, dev and test of one fold
    assert [path.parent.name for path in (tmp_path / "run").glob("fold-*/checkpoint.pt")] == ["fold-3"]


def test_a_dry_run_leaves_an_earlier_run_as_it_is(folds, tmp_path):
    first, _ = run(folds)
    run(replace(folds, seed=1, dry_run=True), force=True)
    assert run(folds, resume=True)[0] == first
    assert len(list((tmp_path / "run").glob("fold-*/checkpoint.pt"))) == 5


@pytest.mark.parametrize(("changes", "name"), [({"seed": 1}, "seed"), ({"normalize_layers": True}, "normalize_layers")])
def test_checkpoints_of_other_settings_are_refused(config, changes, name):
    run(config, should_stop=lambda: True)
    with pytest.raises(ArmhubertError, match=f"begun with other {name}: start anew"):
        run(replace(config, **changes), resume=True)


def test_a_run_is_not_overwritten_by_accident(config):
    run(config)
    with pytest.raises(ArmhubertError, match=r"exists: continue it with resume=True"):
        run(config)
    run(config, force=True)


def test_cached_features_give_the_same_numbers(config, tmp_path):
    plain, _ = run(config)
    cached = replace(config, out=str(tmp_path / "cached"), cache=str(tmp_path / "features"))
    first, reports = run(cached)
    plan = next(r.plan for r in reports if isinstance(r, CachePlanned))
    assert plan.items == len(WORDS)
    assert plan.bytes == sum(path.stat().st_size for path in (tmp_path / "features").glob("*/*.fp16"))
    assert first["layer_weights"] == pytest.approx(plain["layer_weights"], abs=1e-3)  # fp16 rounds features to 5e-4
    losses = [[row["loss"] for row in result["history"] if row["kind"] == "train"] for result in (first, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert (first["metrics"], first["dev"]) == (plain["metrics"], plain["dev"])
    second, reports = run(replace(cached, out=str(tmp_path / "cached-again")))
    assert next(r.plan for r in reports if isinstance(r, CachePlanned)).items == 0
    assert same(first, second)
    _, reports = run(replace(cached, out=str(tmp_path / "cached-seed"), seed=1))
    assert next(r.plan for r in reports if isinstance(r, CachePlanned)).items == 0  # seeds share features


def test_scored_batches_are_bounded_in_seconds(config, monkeypatch, tmp_path):
    plain, _ = run(config)
    seen, stream = [], features.Features.stream
    monkeypatch.setattr(features.Features, "stream", lambda self, g: seen.append([*map(len, g)]) or stream(self, g))
    monkeypatch.setattr(features, "BATCH_SECONDS", 0.7)
    result, _ = run(replace(config, out=str(tmp_path / "again")))
    assert (result["metrics"], result["dev"]) == (plain["metrics"], plain["dev"])
    scored = [sizes for sizes in seen if sum(sizes) in {result["data"][name]["items"] for name in ("dev", "test")}]
    assert len(scored) == 4  # dev three times, and test
    assert {size for sizes in scored for size in sizes} <= {1, 2}  # of 0.3 s


def test_an_interrupted_cache_is_completed(config, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "BATCH_SECONDS", 1.0)
    cached = replace(config, cache=str(tmp_path / "features"))
    result, _ = run(cached, should_stop=lambda: True)
    assert result == {}
    _, reports = run(cached, force=True)
    missing = next(r.plan for r in reports if isinstance(r, CachePlanned)).items
    assert 0 < missing < len(WORDS)


def test_between_equals_the_next_metric_decides():
    rows = [{"accuracy": 0.0, "slot_accuracy": 51.0}, {"accuracy": 0.0, "slot_accuracy": 60.0}]
    first, second = (rank(find("ic").choose_by, row) for row in rows)
    assert second > first
    errors = [{"wer": 100.0, "cer": 99.0}, {"wer": 100.0, "cer": 70.0}, {"wer": 90.0, "cer": 80.0}]
    ranks = [rank(find("asr").choose_by, row) for row in errors]
    assert ranks == sorted(ranks)


def test_ks_is_chosen_by_mean_recall_as_on_balanced_data():
    guessing = {"accuracy": 90.0, "mean_recall": 50.0}
    fair = {"accuracy": 80.0, "mean_recall": 80.0}
    first, second = (rank(find("ks").choose_by, row) for row in (guessing, fair))
    assert second > first


def test_a_sweep_chooses_on_dev_and_gives_bad_rates_up(config, monkeypatch):
    monkeypatch.setattr(config_module, "MOST_RATE", 1e38)
    swept = replace(config, learning_rate=None, sweep="lr", rates=(1e-2, 1e-3, 1e30), steps=16)
    started = time.perf_counter()
    result, reports = run(swept)
    assert result["wall_seconds"] < time.perf_counter() - started + 0.001  # rates that are taken up again count once
    tried = [r for r in reports if isinstance(r, RateTried)]
    assert {r.rate for r in tried} == {1e-2, 1e-3, 1e30}
    assert [r.rate for r in tried if r.step == 16 and r.kept] == [result["training"]["learning_rate"]]
    best = max(r.metric for r in tried if r.metric is not None and r.step == 16)
    assert result["dev"]["accuracy"] == pytest.approx(best)
    assert len([r for r in tried if r.step == 16]) == 1


def test_a_sweep_goes_back_to_a_rate_where_the_last_one_diverges(config, monkeypatch, tmp_path):
    swept = replace(config, learning_rate=None, sweep="lr", rates=(1e-2, 1e-3, 1e-4), steps=16)
    usual, _ = run(swept)
    doomed = {usual["training"]["learning_rate"]}
    step = Training._step

    def diverging(self, micros):
        if self.rate in doomed and self.state.step >= 12:
            raise Diverged("not finite")
        return step(self, micros)

    monkeypatch.setattr(Training, "_step", diverging)
    result, _ = run(replace(swept, out=str(tmp_path / "again")))
    last = {row["rate"]: row["kept"] for row in result["sweep"] if row["step"] == 16}
    assert last == {doomed.pop(): False, result["training"]["learning_rate"]: True}
    second = next(row for row in reversed(usual["sweep"]) if not row["kept"])
    assert result["training"]["learning_rate"] == second["rate"]
    assert result["history"][-1]["step"] == 16
    doomed.update(swept.rates)
    with pytest.raises(Diverged, match=re.escape("every learning rate of the sweep diverged (0.01, 0.001, 0.0001)")):
        run(replace(swept, out=str(tmp_path / "all")))


def test_a_resumed_sweep_records_what_an_uninterrupted_one_does(config, tmp_path):
    for n in range(16):
        write_wave(tmp_path / f"words/cat/{n}.wav", 0.3, n, level=0.01)  # loudness alone tells the words apart
    swept = replace(
        config,
        model="fbank_no_cmvn",
        learning_rate=None,
        sweep="lr",
        rates=(1e-2, 1e-3, 1e-4),
        steps=8,
        validate_every=1,
    )
    whole, _ = run(swept)
    assert whole["sweep"][1]["dev"] < whole["dev"]["accuracy"]  # a rate that gets better later
    part = replace(swept, out=str(tmp_path / "part"))
    steps = iter(range(100))
    assert run(part, should_stop=lambda: next(steps) >= 5)[0] == {}
    resumed, _ = run(load_run_config(tmp_path / "part", {}), resume=True)
    assert resumed["sweep"] == whole["sweep"]
    assert same(whole, resumed)


@pytest.mark.parametrize("out", ["run", "runs/ks", "before"])
def test_a_dry_run_leaves_nothing(config, tmp_path, out):
    (tmp_path / "before").mkdir()
    before = set(tmp_path.rglob("*"))
    _, reports = run(replace(config, dry_run=True, out=str(tmp_path / out)))
    assert reports[-1].reason == "dry run"
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before


def test_settings_of_a_resumed_run_are_its_own(config):
    run(config)
    with pytest.raises(ArmhubertError, match="keeps steps"):
        load_run_config(Path(config.out), {"steps": 100})


def test_checkpoints_of_other_data_are_refused(config, waves):
    steps = iter(range(100))
    run(config, should_stop=lambda: next(steps) >= 4)
    waves("words/cat/more.wav", seconds=0.4)
    with pytest.raises(ArmhubertError, match="begun with other data"):
        run(config, resume=True)


def test_global_state_is_left_alone(config):
    before = torch.random.get_rng_state()
    run(config)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "kss"}, "unknown task 'kss'; did you mean 'ks'"),
        ({"task": "similarity"}, "unknown task 'similarity'; known: asr, asv, er"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"data": "/nowhere"}, "must be a folder that exists"),
        ({"fold": 2}, "ks has no folds: leave out fold=..."),
        ({"task": "er", "fold": 6}, "fold must be within 1 and 5 for er, got 6"),
        ({"head_size": 8}, "ks has no head whose size can be set: leave out head_size=..."),
        ({"task": "asr", "head_size": 0}, "head_size must be above 0, got 0"),
        ({"task": "pr", "crop_seconds": 2.0}, "pr has no training on crops: leave out crop_seconds=..."),
        ({"task": "sf", "crop_seconds": 2.0}, "sf has no training on crops: leave out crop_seconds=..."),
        ({"task": "qbe"}, "qbe has no training: leave out learning_rate=..."),
        ({"test": ("x",)}, "ks has no choice of test subsets: leave out test=..."),
        ({"task": "sid", "dev": ("x",)}, "sid has no choice of dev subsets: leave out dev=..."),
        ({"task": "pr", "language_model": "x"}, "pr has no language model: leave out language_model=..."),
        ({"task": "asr", "lexicon": "x"}, "asr has no lexicon: leave out lexicon=..."),
        ({"task": "asr", "g2p": True}, "asr has no lexicon: leave out g2p=..."),
        ({"task": "qbe", "train": ("x",)}, "qbe has no choice of train subsets: leave out train=..."),
        ({"learning_rate": 1e30}, "a learning rate must be at most 10, got 1e+30"),
        ({"rates": (1e-3, 1e-4)}, "add sweep='lr'"),
        ({"rates": (1e-3, 1e3), "sweep": "lr", "learning_rate": None}, "a learning rate must be at most 10, got 1000"),
        ({"rates": (1e-3, 1e-3), "sweep": "lr", "learning_rate": None}, "at least 2 rates, different and above 0"),
        ({"rates": (1e-3, -1e-3), "sweep": "lr", "learning_rate": None}, "at least 2 rates, different and above 0"),
        ({"sweep": "lr"}, "leave out learning_rate=..."),
        ({"rates": (1e-3,), "sweep": "lr", "learning_rate": None}, "at least 2 rates"),
    ],
)
def test_bad_settings(changes, message, config):
    with pytest.raises(ArmhubertError, match=re.escape(message)):
        replace(config, **changes)


def test_unreadable_recordings_are_named_before_training(config, tmp_path):
    (tmp_path / "words/cat/bad.wav").write_bytes(b"no audio")
    with pytest.raises(ArmhubertError, match=r"1 recordings of the data cannot be used .*bad\.wav"):
        run(config)


def test_batches_hold_everything_once():
    plan = plan_batches([100, 5, 70, 30, 8], 2, seed=0, epoch=0)
    assert sorted(index for batch in plan for index in batch) == [0, 1, 2, 3, 4]
    assert plan == plan_batches([100, 5, 70, 30, 8], 2, seed=0, epoch=0)
    plans = {str(plan_batches([100, 5, 70, 30, 8], 2, seed=0, epoch=epoch)) for epoch in range(8)}
    assert len(plans) > 1


def test_balanced_batches_even_out_classes():
    weights = [1 / 990] * 990 + [1 / 10] * 10
    drawn = [index for batch in plan_batches([1] * 1000, 8, 0, 0, weights) for index in batch]
    assert 400 < sum(index >= 990 for index in drawn) < 600
