import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from made import SECONDS, SHAPE, digests, two_processes, write_speech, write_teacher

from armhubert import ARMHuBERT, ArmhubertError, checkpoint, data, distill, distill_run, load_teacher
from armhubert.data import ReaderDied
from armhubert.distill_config import DistillConfig
from armhubert.kernels.runtime import INTERPRET
from armhubert.runlog import read_metrics
from armhubert.schedule import learning_rate


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    return write_speech(tmp_path_factory.mktemp("data") / "speech")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def settings(tmp_path, speech, teacher):
    """A tiny run's configuration; keywords change it."""

    def make(**changes) -> DistillConfig:
        values = {
            "out": str(tmp_path / "run"),
            "data": (str(speech),),
            "teacher": str(teacher),
            **SHAPE,
            "batch_seconds": 2.0,
            "steps": 2,
            "learning_rate": 1e-3,
            "hold_out": 0.0,
            "workers": 0,
            "log_every": 1,
            "save_every": 1000,
            "device": "cpu",
        }
        return DistillConfig(**{**values, **changes})

    return make


def run(config: DistillConfig, **how) -> list[distill.Report]:
    return list(distill.distill(config, **how))


def of(reports, kind):
    return [report for report in reports if isinstance(report, kind)]


@pytest.fixture
def stop_after(monkeypatch):
    """`should_stop` that says yes after so many more steps."""
    taken, step = [], distill_run.Run.step

    def counted(self, group):
        taken.append(group)
        return step(self, group)

    def after(steps: int):
        last = len(taken) + steps
        return lambda: len(taken) >= last

    monkeypatch.setattr(distill_run.Run, "step", counted)
    return after


def rows(out: str) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in row.items() if k != "audio_rate"} for row in read_metrics(Path(out) / "metrics.jsonl")]


def losses(reports) -> list[float]:
    return [report.loss for report in of(reports, distill.Progress)]


def same_state(a: Path, b: Path) -> None:
    """Two checkpoints hold bitwise the same student and optimizer."""
    first, second = checkpoint.load(a / "checkpoint.pt"), checkpoint.load(b / "checkpoint.pt")
    assert first.student.keys() == second.student.keys()
    for name, value in first.student.items():
        assert torch.equal(value, second.student[name]), name
    for number, moments in first.optimizer["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, second.optimizer["state"][number][name]), (number, name)


# what a run leaves


def test_a_run_leaves_a_student_that_loads_and_everything_to_read_and_look_at(settings, tmp_path, speech, teacher):
    before, around = (digests(speech), digests(teacher)), {path.name for path in tmp_path.iterdir()}
    # sources: speech, and a file that is too short
    extra = tmp_path / "extra"
    extra.mkdir()
    soundfile.write(extra / "short.wav", np.ones(100) * 0.1, 16_000)
    config = settings(data=(str(speech), str(extra)), hold_out=0.2, steps=4, validate_every=2)
    reports = run(config)
    out = Path(config.out)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "README.md", "checkpoint.pt", "metrics.jsonl", "loss.png", "layers.png",
        "distill.json", "data.json", "skipped.tsv", "tensorboard", "preprocessor_config.json", ".armhubert-scan.json",
    }  # fmt: skip
    assert any((out / "tensorboard").iterdir())
    for picture in ("loss.png", "layers.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    student = ARMHuBERT.from_pretrained(out)
    assert student.config.pattern == "CR"
    assert student(torch.randn(1, 4000)).projections[-1].shape == (1, 12, 32)
    assert json.loads((out / "distill.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(config)))
    assert (out / "skipped.tsv").read_text().splitlines() == [
        "path\treason",
        f"{extra / 'short.wav'}\ttoo short: 100 samples, at least 400",
    ]
    card = (out / "README.md").read_text()
    assert re.search("weights after step [24] of 4, the best on held-out speech,", card)
    assert "tags: [speech, self-supervised, distillation, feature-extraction]" in card
    assert "license" not in card.split("---")[1]  # that of teacher and data, for the student's owner to say
    written = read_metrics(out / "metrics.jsonl")
    assert [(row["kind"], row["step"]) for row in written] == [
        ("train", 1), ("train", 2), ("valid", 2), ("train", 3), ("train", 4), ("valid", 4),
    ]  # fmt: skip
    assert [row["loss"] for row in written if row["kind"] == "train"] == losses(reports)
    assert all(len(row["layers"]) == 2 for row in written)
    started = of(reports, distill.Started)[0]
    assert (started.utterances + started.valid_utterances, started.steps) == (len(SECONDS), 4)
    assert started.valid_utterances >= 1
    assert started.skipped == {"too short": 1}
    end = reports[-1]
    assert isinstance(end, distill.Finished)
    assert (end.reason, end.step) == ("done", 4)
    assert end.best_loss == min(row["loss"] for row in written if row["kind"] == "valid")
    assert end.peak_memory > 2**20
    assert end.audio_seconds == checkpoint.load(out / "checkpoint.pt").state.audio_seconds > 0
    assert (digests(speech), digests(teacher)) == before
    assert {path.name for path in tmp_path.iterdir()} == around | {"extra", "run"}


def test_the_exported_student_is_the_best_validated_one_and_the_checkpoint_the_last(settings):
    # A rate of nothing for the first validation, then ruin: the first stays the best.
    config = settings(hold_out=0.3, steps=4, validate_every=1, learning_rate=2.0, warmup=1.0)
    validated = of(run(config), distill.Validated)
    assert [v.best for v in validated].count(True) < len(validated)
    last_best = max(v.step for v in validated if v.best)
    exported = ARMHuBERT.from_pretrained(config.out).state_dict()
    last = checkpoint.load(Path(config.out) / "checkpoint.pt")
    assert last.state.step == 4
    assert last.state.best_loss == min(v.loss for v in validated)
    same = all(torch.equal(exported[name], value) for name, value in last.student.items())
    assert same == (last_best == 4)


def test_without_holding_out_the_last_student_is_exported_and_nothing_validated(settings):
    config = settings()
    reports = run(config)
    assert not of(reports, distill.Validated)
    assert of(reports, distill.Started)[0].valid_utterances == 0
    assert reports[-1].best_loss == float("inf")
    exported = ARMHuBERT.from_pretrained(config.out).state_dict()
    last = checkpoint.load(Path(config.out) / "checkpoint.pt").student
    assert all(torch.equal(exported[name], value) for name, value in last.items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"batch_seconds": 1.0, "max_seconds": 1.5},
            r"2 of 6 utterances are longer than batch_seconds=1: .* up to 1\.3 s",
        ),
        ({"precision": "fp16"}, "no instructions for fp16: fp32 is much faster"),
        ({"max_seconds": 0.6}, r"an epoch hears 6\d% of the audio, max_seconds=0\.6 of each file"),
    ],
)
def test_settings_that_work_otherwise_than_they_look_are_noted(settings, monkeypatch, changes, says):
    monkeypatch.setattr(distill, "emulated", lambda dtype: True)
    (notes,) = (started.notes for started in of(run(settings(hold_out=0.0, **changes)), distill.Started))
    assert re.search(says, *notes)


def test_given_validation_speech_is_used_whole_and_no_training_speech_is_held_out(settings, tmp_path):
    held = write_speech(tmp_path / "held", (0.5, 0.8))
    reports = run(settings(valid=(str(held),), hold_out=0.5))
    started = of(reports, distill.Started)[0]
    assert (started.utterances, started.valid_utterances) == (len(SECONDS), 2)
    assert started.valid_seconds == pytest.approx(1.3)
    assert of(reports, distill.Validated)


def test_speech_that_is_held_out_within_the_data_is_not_trained_on(settings, tmp_path):
    whole = write_speech(tmp_path / "whole")
    write_speech(whole / "dev", (0.5, 0.8))
    (whole / "dev/broken.wav").write_text("no audio")
    linked = tmp_path / "link"
    linked.symlink_to(whole / "dev")
    reports = run(settings(data=(str(whole),), valid=(str(linked),)))
    started = of(reports, distill.Started)[0]
    assert (started.utterances, started.valid_utterances) == (len(SECONDS), 2)
    assert started.skipped == {"held out": 2, "unreadable": 2}
    listed = (Path(started.config.out) / "skipped.tsv").read_text()
    assert f"{whole / 'dev/0.wav'}\theld out\n" in listed
    with pytest.raises(
        ArmhubertError,
        match=r"data must hold usable audio, got 2 files of which none can be used \(1 unreadable, 1 held out",
    ):
        run(settings(out=str(tmp_path / "other"), data=(str(whole / "0.wav"),), valid=(str(whole),)))


def test_training_lowers_the_loss(settings):
    reports = run(settings(steps=30, learning_rate=5e-3, hold_out=0.2, validate_every=30, log_every=10, dropout=0.0))
    assert losses(reports)[-1] < 0.8 * losses(reports)[0]


def test_epochs_count_passes_over_the_data(settings):
    reports = run(settings(steps=None, epochs=2.0, batch_seconds=0.1))  # a batch an utterance
    assert of(reports, distill.Started)[0].steps == 2 * len(SECONDS)
    assert reports[-1].audio_seconds == pytest.approx(2 * sum(SECONDS), abs=1e-3)


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero_just_after_the_last_step():
    rates = [learning_rate(step, 20, 5, 1.0) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert np.diff(rates[4:20]) == pytest.approx(np.full(15, -1 / 16))
    assert rates[20] == 0.0
    assert learning_rate(0, 1, 0.05, 3.0) == 3.0


def test_the_callers_generators_threads_and_dtype_stay_untouched(settings):
    def state():
        return (
            torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(),  # noqa: NPY002
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), os.getcwd(),
            # torch sets its compiler's cache folder when it first imports it
            {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")},
            signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT),
        )  # fmt: skip

    before = state()
    run(settings(hold_out=0.2, dropout=0.1))
    assert state() == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="/proc tells which files are open")
def test_an_iterator_that_is_dropped_early_closes_its_files(settings):
    config, still_open = settings(steps=50), []
    for _ in range(2):  # the first opens what the process keeps
        reports = distill.distill(config, force=True)
        while not isinstance(next(reports), distill.Progress):
            pass
        reports.close()
        still_open.append(len(os.listdir("/proc/self/fd")))
    assert still_open[1] <= still_open[0]


# the same run, computed in other ways


def test_the_same_seed_gives_bitwise_the_same_run_and_another_seed_another(settings, tmp_path):
    torch.manual_seed(1)
    first = losses(run(settings(out=str(tmp_path / "a"))))
    torch.manual_seed(2)
    assert losses(run(settings(out=str(tmp_path / "b")))) == first
    assert losses(run(settings(out=str(tmp_path / "c"), seed=1))) != first


def test_a_steps_loss_does_not_depend_on_how_its_utterances_are_cut_into_batches(settings, tmp_path):
    # One step over the whole epoch, as one batch or as one batch an utterance: the valid frames are the same.
    whole = run(settings(out=str(tmp_path / "a"), batch_seconds=100.0, accumulate=1, steps=1, preset="mini", dropout=0))
    each = run(
        settings(out=str(tmp_path / "b"), batch_seconds=0.1, accumulate=len(SECONDS), steps=1, preset="mini", dropout=0)
    )
    a, b = of(whole, distill.Progress)[0], of(each, distill.Progress)[0]
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert a.layers == pytest.approx(b.layers, rel=1e-5)
    assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
    assert a.masked_share == pytest.approx(b.masked_share)


def test_gradient_checkpointing_changes_no_loss(settings, tmp_path):
    plain = run(settings(out=str(tmp_path / "a"), steps=3, dropout=0.1))
    saving = run(settings(out=str(tmp_path / "b"), steps=3, dropout=0.1, gradient_checkpointing=True))
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-6)
    assert [r.gradient_norm for r in of(saving, distill.Progress)] == pytest.approx(
        [r.gradient_norm for r in of(plain, distill.Progress)], rel=1e-5
    )


def test_two_processes_give_the_losses_of_one_with_twice_the_accumulation(settings, tmp_path):
    config = settings(out=str(tmp_path / "one"), accumulate=2, steps=3, batch_seconds=1.5, hold_out=0.3, dropout=0.1)
    run(config)
    file = tmp_path / "two.json"
    two = {**dataclasses.asdict(config), "out": str(tmp_path / "two"), "accumulate": 1}
    file.write_text(json.dumps(two))
    done = two_processes("-m", "armhubert.cli", "distill", "--config", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes=2" in done.stdout
    assert done.stdout.count("finished ") == 1  # the lead alone reports
    one, other = rows(config.out), rows(two["out"])
    assert [(row["kind"], row["step"]) for row in one] == [(row["kind"], row["step"]) for row in other]
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["layers"] == pytest.approx(b["layers"], rel=1e-4, abs=2e-6)
    ARMHuBERT.from_pretrained(two["out"])
    # The one process takes the two's run over: the global batch is the same.
    end = run(dataclasses.replace(config, out=two["out"], steps=4), resume=True)[-1]
    assert (end.reason, end.step) == ("done", 4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_precision_runs_on_the_cpu_near_the_full_precision_losses(settings, tmp_path, precision):
    full = losses(run(settings(out=str(tmp_path / "a"), steps=3)))
    config = settings(out=str(tmp_path / "b"), steps=3, precision=precision, hold_out=0.0)
    assert losses(run(config)) == pytest.approx(full, rel=0.03)
    saved = checkpoint.load(Path(config.out) / "checkpoint.pt")
    assert all(value.dtype == torch.float32 for value in saved.student.values())
    assert bool(saved.scaler) == (precision == "fp16")
    assert run(dataclasses.replace(config, steps=4), resume=True)[-1].step == 4


def test_clipping_reports_the_norm_before_and_changes_the_steps_after(settings, tmp_path):
    free = of(run(settings(out=str(tmp_path / "a"), steps=3)), distill.Progress)
    clipped = of(run(settings(out=str(tmp_path / "b"), steps=3, clip=1e-6)), distill.Progress)
    assert clipped[0].gradient_norm == free[0].gradient_norm > 1e-6
    assert clipped[2].loss != free[2].loss


# losses and students


@pytest.mark.parametrize(
    ("loss", "heads"), [("masking", True), ("plain", True), ("star", False), ("masking=1,star=0.5", True)]
)
def test_every_loss_trains_and_validates(settings, loss, heads):
    config = settings(loss=loss, hold_out=0.2)
    reports = run(config)
    assert all(np.isfinite(losses(reports)))
    assert all(np.isfinite(v.loss) for v in of(reports, distill.Validated))
    assert (ARMHuBERT.from_pretrained(config.out).heads is not None) == heads
    assert (of(reports, distill.Progress)[0].masked_share > 0) == ("masking" in loss)


def test_a_combined_loss_is_the_weighted_sum_of_its_terms(settings, tmp_path):
    def first(name, **changes):
        shared = {"out": str(tmp_path / name), "steps": 1, "preset": "mini", "dropout": 0.0, **changes}
        return of(run(settings(**shared)), distill.Progress)[0]

    plain, star = first("plain", loss="plain"), first("star", loss="star")
    both = first("both", loss="plain=2,star=0.25")
    assert both.loss == pytest.approx(2 * plain.loss + 0.25 * star.loss, rel=1e-5)
    assert both.layers == pytest.approx([2 * p + 0.25 * s for p, s in zip(plain.layers, star.layers, strict=True)])
    assert plain.loss == pytest.approx(0.1 * plain.layers[0] + plain.layers[1])


def test_the_validation_loss_is_the_clean_one_whatever_is_trained(settings, tmp_path):
    masking = of(run(settings(out=str(tmp_path / "a"), steps=1, learning_rate=1e-12, hold_out=0.3)), distill.Validated)
    plain = of(
        run(settings(out=str(tmp_path / "b"), steps=1, learning_rate=1e-12, hold_out=0.3, loss="plain")),
        distill.Validated,
    )
    assert masking[-1].loss == pytest.approx(plain[-1].loss, rel=1e-5)


def test_the_mask_schedule_ends_at_its_second_value(settings, tmp_path):
    falling = of(run(settings(steps=6, mask_prob=1.0, mask_prob_end=0.0, mask_length=3)), distill.Progress)
    constant = of(run(settings(out=str(tmp_path / "b"), steps=6, mask_prob=1.0, mask_length=3)), distill.Progress)
    assert falling[0].masked_share == constant[0].masked_share
    assert falling[-1].masked_share < 0.5 * constant[-1].masked_share


def test_a_deeper_teacher_is_mapped_to_the_student_last_to_last(settings, tmp_path):
    deep = write_teacher(tmp_path / "deep", layers=5)
    reports = run(settings(teacher=str(deep), hold_out=0.2))
    assert of(reports, distill.Started)[0].student.layers == 2
    assert len(of(reports, distill.Progress)[0].layers) == 2


def test_a_student_started_from_its_teacher_has_its_tensors_where_shapes_allow(settings, teacher):
    reports = run(settings(init="teacher", learning_rate=1e-30, pattern="CC", ffn=48, steps=1, weight_decay=0.0))
    started = of(reports, distill.Started)[0]
    theirs = load_teacher(teacher).state_dict()
    ours = ARMHuBERT.from_pretrained(started.config.out).state_dict()
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    assert started.copied_from_teacher == len(shared) > 20
    for name in shared:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-25), name


def test_a_reusing_layer_starts_from_the_values_of_its_teacher_layer(settings, teacher):
    run(config := settings(init="teacher", learning_rate=1e-30, steps=1, weight_decay=0.0))
    theirs = load_teacher(teacher).state_dict()
    ours = ARMHuBERT.from_pretrained(config.out).state_dict()
    assert torch.equal(ours["layers.1.attention.value.weight"], theirs["layers.1.attention.qkv.weight"][64:])
    assert torch.equal(ours["layers.1.attention.value.bias"], theirs["layers.1.attention.qkv.bias"][64:])


def test_a_random_student_copies_nothing(settings):
    reports = run(settings(steps=1))
    assert of(reports, distill.Started)[0].copied_from_teacher == 0


# stopping and going on


def test_readers_that_are_ended_with_the_process_end_the_run_like_its_own_signal(settings, tmp_path, monkeypatch):
    groups, signalled = distill_run.Run.groups, []

    def ended(self):
        for number, group in enumerate(groups(self)):
            if number == 2 and not signalled:
                signalled.append(True)
                raise ReaderDied("gone")
            yield group

    monkeypatch.setattr(distill_run.Run, "groups", ended)
    config = settings(out=str(tmp_path / "run"), steps=4)
    last = run(config, should_stop=lambda: bool(signalled))[-1]
    assert (last.reason, last.step) == ("stopped", 2)
    assert (run(config, resume=True)[-1].reason, run(config, resume=True)[-1].step) == ("done", 4)
    signalled.clear()
    with pytest.raises(ReaderDied):
        run(dataclasses.replace(config, out=str(tmp_path / "other")))


def test_readers_that_are_ended_in_a_validation_end_the_run_like_its_own_signal(settings, tmp_path, monkeypatch):
    read, signalled = distill_run.batches, []

    def ended(utterances, plan, **how):
        if len(utterances) < 3 and not signalled:  # the validation's
            signalled.append(True)
            raise ReaderDied("gone")
        yield from read(utterances, plan, **{**how, "workers": 0})

    monkeypatch.setattr(distill_run, "batches", ended)
    config = settings(steps=4, hold_out=0.3, validate_every=2, workers=2)
    stopped = run(config, should_stop=lambda: bool(signalled))
    assert (stopped[-1].reason, stopped[-1].step, of(stopped, distill.Validated)) == ("stopped", 2, [])
    resumed = run(config, resume=True)
    assert (resumed[-1].reason, [r.step for r in of(resumed, distill.Validated)]) == ("done", [2, 4])
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    run(whole)
    same_state(Path(config.out), Path(whole.out))
    signalled.clear()
    short = dataclasses.replace(config, steps=2, patience=1, learning_rate=1e-30, out=str(tmp_path / "short"))
    stopped = run(short, should_stop=lambda: bool(signalled))
    assert (stopped[-1].reason, stopped[-1].step) == ("stopped", 2), "its last validation is owed"
    resumed = run(short, resume=True)
    assert (resumed[-1].reason, [r.step for r in of(resumed, distill.Validated)]) == ("done", [2])
    signalled.clear()
    with pytest.raises(ReaderDied):
        run(dataclasses.replace(config, out=str(tmp_path / "other")))


SCRIPT = """
import json, multiprocessing, sys
from armhubert.distill import DistillConfig, distill

def work(workers):
    list(distill(DistillConfig(**json.loads(sys.argv[1]) | {"workers": workers}), force=True))

multiprocessing.set_start_method("spawn", force=True)
"""


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("work(1)", 'or the script may lack if __name__ == "__main__"; use fewer workers, or 0'),
        ("if __name__ == '__main__': work(1)", None),
        (
            "if __name__ == '__main__':\n  own = multiprocessing.Process(target=work, args=(0,))\n"
            "  own.start(); own.join(); sys.exit(own.exitcode)",
            None,
        ),
    ],
)
def test_a_script_that_its_readers_run_again_is_told_so(settings, tmp_path, call, says):
    (tmp_path / "script.py").write_text(SCRIPT + call)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", json.dumps(dataclasses.asdict(settings()))],
        capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode == 0) == (says is None), done.stderr
    if says:
        assert "a new process runs this script again: put the script's work under if __name__" in done.stderr
        assert says in done.stderr


def test_a_run_goes_on_where_its_speech_and_teacher_have_moved(settings, stop_after, tmp_path, speech, teacher):
    def moved(folder: Path, name: str) -> str:
        return str(shutil.copytree(folder, tmp_path / name))

    config = settings(steps=4, hold_out=0.3)
    run(config, should_stop=stop_after(2))
    with pytest.raises(ArmhubertError, match=r"'elsewhere' is no longer there: resume .* with its data named anew"):
        distill.load_run_config(Path(config.out), {"data": ("elsewhere",)})
    changes = {"data": (moved(speech, "speech"),), "teacher": moved(teacher, "teacher")}
    assert run(distill.load_run_config(Path(config.out), changes), resume=True)[-1].reason == "done"
    other = dataclasses.replace(config, out=str(tmp_path / "other"))
    run(other)
    same_state(Path(config.out), Path(other.out))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"learning_rate": 0.1},
            "a resumed run keeps its learning_rate 0.001, got 0.1: leave it out, or start a new run",
        ),
        ({"accumulate": 2}, r"other batches in a step: 1 then, 2 now \(accumulate times processes\)"),
    ],
)
def test_a_resumed_run_refuses_settings_that_change_what_it_computes(settings, stop_after, changes, says):
    config = settings(steps=4)
    run(config, should_stop=stop_after(2))
    before = digests(Path(config.out))
    with pytest.raises(ArmhubertError, match=says):
        run(dataclasses.replace(config, **changes), resume=True)
    assert digests(Path(config.out)) == before


def misshapen(content: dict) -> None:
    for moments in content["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    "damage",
    [
        misshapen,
        lambda content: content["optimizer"].clear(),
        lambda content: content["optimizer"].update(state=[1]),
        lambda content: content["optimizer"].update(state={0: {"step": 1, "exp_avg": "x"}}),
        lambda content: content["student"].clear(),
        lambda content: content["student"].update({name: torch.zeros(3) for name in content["student"]}),
        lambda content: content["state"].update(window=[(0.1, [0.2], 0.3, 0.4, 0.5)]),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_student_is_one_line_and_stays(settings, damage):
    config = settings()
    run(config)
    path = Path(config.out) / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    damage(content)
    torch.save(content, path)
    before = digests(Path(config.out))
    with pytest.raises(ArmhubertError, match=r"does not fit the student: .*; start the run anew") as told:
        run(dataclasses.replace(config, steps=3), resume=True)
    assert "\n" not in str(told.value)
    assert digests(Path(config.out)) == before


def test_a_change_to_what_is_no_setting_names_the_nearest(settings):
    config = settings()
    run(config)
    with pytest.raises(ArmhubertError, match=r"unknown key 'stps' in the changes; did you mean 'steps'\?"):
        distill.load_run_config(config.out, {"stps": 5})


def test_a_run_is_continued_or_started_anew_not_both(settings):
    with pytest.raises(ArmhubertError, match="resume=True continues a run and force=True starts one anew"):
        run(settings(), resume=True, force=True)


def test_a_folder_without_a_run_cannot_be_resumed(settings, tmp_path):
    with pytest.raises(ArmhubertError, match=r"nothing is no run: it has no distill\.json"):
        run(settings(out=str(tmp_path / "nothing")), resume=True)


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRET, reason="the kernels run here")
def test_kernels_that_do_not_run_here_are_refused_before_anything_is_written(settings):
    config = settings(impl="triton")
    with pytest.raises(ArmhubertError, match="impl='triton' needs"):
        run(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "mask probability 0.8, "),
        ({"mask_prob": 0.4, "mask_prob_end": 0.6}, "mask probability 0.4 to 0.6, "),
        ({"loss": "plain"}, None),
    ],
)
def test_the_model_card_tells_the_masking_that_was_used(settings, changes, says):
    config = settings(steps=1, **changes)
    run(config)
    card = (Path(config.out) / "README.md").read_text()
    assert says in card if says else "mask probability" not in card


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_run_that_is_stopped_while_its_audio_is_examined_has_not_begun(settings, tmp_path, monkeypatch, asked):
    held = write_speech(tmp_path / "held", (0.5, 0.8))
    config, answers = settings(valid=(str(held),)), iter(range(asked))
    with monkeypatch.context() as patch:
        patch.setattr(distill_run.Run, "step", lambda *args: pytest.fail("trained"))
        *scanning, end = run(config, should_stop=lambda: next(answers, None) is None)
    assert all(isinstance(report, data.Scanning) for report in scanning)
    assert (end.reason, end.step, end.best_loss) == ("not begun", 0, float("inf"))
    assert [path.name for path in Path(config.out).iterdir()] == [".armhubert-scan.json"]
    examined = []
    monkeypatch.setattr(data, "measure", lambda path, real=data.measure: examined.append(path) or real(path))
    assert run(config)[-1].reason == "done"
    assert len(examined) < len(SECONDS) + 2


@pytest.mark.parametrize("how", [{"resume": True}, {"force": True}])
def test_an_earlier_run_is_as_it_was_where_the_next_is_stopped_while_its_audio_is_examined(settings, how):
    config = settings(steps=3)
    run(config)
    before = digests(Path(config.out))
    end = run(config, should_stop=lambda: True, **how)[-1]
    assert (end.reason, end.step) == (("stopped", 3) if "resume" in how else ("not begun", 0))
    assert digests(Path(config.out)) == before


@pytest.fixture
def while_the_teacher_loads(monkeypatch):
    """Do something once, while the next run loads its teacher: after it looked into its folder, before it holds it."""

    def once(action) -> None:
        def load(*args, real=distill.load_models):
            monkeypatch.setattr(distill, "load_models", real)
            action()
            return real(*args)

        monkeypatch.setattr(distill, "load_models", load)

    return once


def test_a_resumed_run_goes_on_from_what_its_predecessor_saved_last(settings, while_the_teacher_loads):
    config = settings(steps=4, save_every=1)
    predecessor = distill.distill(dataclasses.replace(config, steps=3))
    next(report for report in predecessor if isinstance(report, distill.Saved))
    while_the_teacher_loads(lambda: list(predecessor))
    resumed = run(config, resume=True)
    assert of(resumed, distill.Started)[0].first_step == 3
    assert [row["step"] for row in rows(config.out)] == [1, 2, 3, 4]


def test_a_run_does_not_overwrite_one_that_was_made_while_it_began(settings, while_the_teacher_loads):
    config = settings()
    while_the_teacher_loads(lambda: run(config))
    with pytest.raises(ArmhubertError, match="holds a run: continue it with resume=True"):
        run(config)
    assert run(config, resume=True)[-1].reason == "done"


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(settings, tmp_path, log_every, stop_after):
    # Dropout, random crops, masks, several epochs, several batches a step, validation: all chance there is.
    shared = {
        "steps": 8, "dropout": 0.1, "max_seconds": 0.7, "batch_seconds": 1.5, "accumulate": 2, "hold_out": 0.3,
        "validate_every": 2, "log_every": log_every,
    }  # fmt: skip
    whole = settings(out=str(tmp_path / "whole"), **shared)
    run(whole)
    parts = settings(out=str(tmp_path / "parts"), **shared)
    first = run(parts, should_stop=stop_after(3))
    assert (first[-1].reason, first[-1].step) == ("stopped", 3)
    torch.randn(7)  # nothing is drawn from the caller's generator
    second = run(parts, resume=True, should_stop=stop_after(3))
    assert (of(second, distill.Started)[0].first_step, second[-1].step) == (3, 6)
    third = run(parts, resume=True)
    assert (third[-1].reason, third[-1].step) == ("done", 8)
    assert rows(whole.out) == rows(parts.out)
    same_state(Path(whole.out), Path(parts.out))
    best = safetensors.torch.load_file(tmp_path / "whole" / "model.safetensors")
    again = safetensors.torch.load_file(tmp_path / "parts" / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in best.items())


def test_rows_written_after_the_last_checkpoint_are_forgotten_on_resume(settings, tmp_path):
    config = settings(steps=6, save_every=2)
    reports = distill.distill(config)
    for report in reports:  # killed without a word after step 3
        if isinstance(report, distill.Progress) and report.step == 3:
            break
    del reports
    assert [row["step"] for row in rows(config.out)] == [1, 2, 3]
    with open(Path(config.out) / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    run(config, resume=True)
    whole = settings(out=str(tmp_path / "whole"), steps=6, save_every=2)
    run(whole)
    assert rows(config.out) == rows(whole.out)
    same_state(Path(config.out), Path(whole.out))


def test_a_finished_run_goes_on_with_more_steps(settings):
    config = settings(steps=2)
    run(config)
    reports = run(dataclasses.replace(config, steps=5), resume=True)
    assert [r.step for r in of(reports, distill.Progress)] == [3, 4, 5]
    assert [row["step"] for row in rows(config.out)] == [1, 2, 3, 4, 5]
    assert json.loads((Path(config.out) / "distill.json").read_text())["steps"] == 5


def test_resuming_a_finished_run_trains_nothing_and_says_done(settings):
    config = settings()
    run(config)
    before = digests(Path(config.out))
    reports = run(config, resume=True)
    end = reports[-1]
    assert (end.reason, end.step) == ("done", 2)
    (started,) = of(reports, distill.Started)
    assert "all 2 steps were made before: to go on, resume with steps=... above 2" in started.notes
    after = digests(Path(config.out))
    for name in ("checkpoint.pt", "model.safetensors", "metrics.jsonl"):
        assert after[name] == before[name]


def test_a_resumed_run_cannot_take_steps_back(settings):
    config = settings(steps=3)
    run(config)
    before = digests(Path(config.out))
    with pytest.raises(ArmhubertError, match="has made 3 steps, more than the 2 asked for: ask for more, or start"):
        run(dataclasses.replace(config, steps=2), resume=True)
    assert digests(Path(config.out)) == before


def test_early_stop_after_validations_without_gain(settings):
    # Frozen by a rate of nothing, the second and third validation gain nothing.
    reports = run(settings(steps=20, learning_rate=1e-30, hold_out=0.3, validate_every=2, patience=2, weight_decay=0.0))
    assert (reports[-1].reason, reports[-1].step) == ("early stop", 6)
    assert [v.best for v in of(reports, distill.Validated)] == [True, False, False]
    assert of(reports, distill.Saved)[-1].step == 6


def test_a_run_whose_patience_and_whose_user_end_with_its_last_step_is_done(settings, stop_after):
    config = settings(steps=6, learning_rate=1e-30, hold_out=0.3, validate_every=2, patience=2, weight_decay=0.0)
    end = run(config, should_stop=stop_after(6))[-1]
    assert (end.reason, end.step) == ("done", 6)


def test_starting_anew_with_force_leaves_nothing_of_the_old_run_to_resume(settings):
    config = settings(steps=3)
    run(config)
    reports = distill.distill(config, force=True)
    for report in reports:
        if isinstance(report, distill.Progress):
            break
    reports.close()  # killed before its first checkpoint
    with pytest.raises(ArmhubertError, match=r"no checkpoint\.pt"):
        run(config, resume=True)
    assert not (Path(config.out) / "model.safetensors").exists()
    with pytest.raises(ArmhubertError, match=r"no config\.json"):
        ARMHuBERT.from_pretrained(config.out)


def test_sigterm_writes_a_checkpoint_exits_with_143_and_says_how_to_go_on(settings, tmp_path):
    config = settings(out=str(tmp_path / "with space"), steps=100_000, log_every=1)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(dataclasses.asdict(config)))
    child = subprocess.Popen(
        [sys.executable, "-m", "armhubert.cli", "distill", "--config", str(file)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("train "):
                break
        child.send_signal(signal.SIGTERM)
        rest, complaints = child.communicate(timeout=120)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 128 + signal.SIGTERM, complaints
    assert "Stopping as soon as" in complaints
    last = rest.splitlines()[-1]
    assert last.startswith("finished reason=stopped ")
    assert f"--resume '{config.out}'" in last.replace("'\"'\"'", "'")
    step = checkpoint.load(Path(config.out) / "checkpoint.pt").state.step
    assert f" step={step} " in last
    end = run(dataclasses.replace(config, steps=step + 2), resume=True)[-1]
    assert (end.reason, end.step) == ("done", step + 2)


# losses that are not finite


def test_a_step_that_is_not_finite_is_left_out_counted_and_reported(settings, monkeypatch):
    real, calls = distill_run.teacher_targets, []

    def sometimes(*args, **options):
        calls.append(0)
        targets = real(*args, **options)
        if len(calls) == 2:
            targets = targets._replace(masking=tuple(t * float("nan") for t in targets.masking))
        return targets

    monkeypatch.setattr(distill_run, "teacher_targets", sometimes)
    reports = run(config := settings(steps=4))
    assert of(reports, distill.StepSkipped) == [distill.StepSkipped(2, 1)]
    assert [r.step for r in of(reports, distill.Progress)] == [1, 3, 4]
    assert all(np.isfinite(losses(reports)))
    assert of(reports, distill.Progress)[-1].skipped_steps == 1
    assert reports[-1].reason == "done"
    saved = checkpoint.load(Path(config.out) / "checkpoint.pt")
    assert saved.state.skipped_steps == 1
    assert all(bool(torch.isfinite(value).all()) for value in saved.student.values())


@pytest.fixture
def held_out_losses(monkeypatch):
    """Replace the first losses of a run's validations."""

    def replace(*values: float) -> None:
        scripted, weighted = iter(values), distill_run.Run.validate

        def validate(self, should_stop):
            weights, value = self.layer_weights, next(scripted, None)
            if value is not None:
                self.layer_weights = weights * value
            try:
                return weighted(self, should_stop)
            finally:
                self.layer_weights = weights

        monkeypatch.setattr(distill_run.Run, "validate", validate)

    return replace


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_validation_that_is_not_finite_is_never_the_best_and_keeps_none_from_being_it(
    settings, held_out_losses, broken
):
    held_out_losses(broken, 1.0, broken)
    reports = run(config := settings(hold_out=0.3, steps=3, validate_every=1, save_every=1))
    validated = of(reports, distill.Validated)
    assert [v.best for v in validated] == [False, True, False]
    assert reports[-1].best_loss == validated[1].loss
    card = (Path(config.out) / "README.md").read_text()
    assert "weights after step 2 of 3, the best on held-out speech," in card
    assert f"unmasked): {validated[1].loss:.4f}" in card


def test_where_no_validation_is_finite_the_last_student_is_written_and_the_run_fails(settings, held_out_losses):
    held_out_losses(*[float("nan")] * 3)
    config, reports = settings(hold_out=0.3, steps=3, validate_every=1, save_every=1000), []
    with pytest.raises(ArmhubertError, match=r"no held-out loss was finite.* step 3.* learning rate below 0\.001"):
        reports.extend(distill.distill(config))
    assert [v.best for v in of(reports, distill.Validated)] == [False] * 3
    exported = ARMHuBERT.from_pretrained(config.out).state_dict()
    last = checkpoint.load(Path(config.out) / "checkpoint.pt").student
    assert all(torch.equal(exported[name], value) for name, value in last.items())
    assert "Held-out" not in (Path(config.out) / "README.md").read_text()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_of_steps_that_are_not_finite_ends_with_the_last_good_state_intact(settings, monkeypatch, precision):
    config = settings(steps=100, save_every=4, precision=precision)
    real, calls = distill_run.teacher_targets, []

    def broken(*args, **options):
        calls.append(0)
        targets = real(*args, **options)
        return targets if len(calls) <= 4 else targets._replace(masking=tuple(t / 0 for t in targets.masking))

    monkeypatch.setattr(distill_run, "teacher_targets", broken)
    reports = []
    with pytest.raises(
        ArmhubertError, match=r"in a row .* not finite.* start a new run with a learning rate below"
    ) as caught:
        reports.extend(distill.distill(config))
    assert "\n" not in str(caught.value)
    saved = checkpoint.load(Path(config.out) / "checkpoint.pt")
    assert all(bool(torch.isfinite(value).all()) for value in saved.student.values())
    monkeypatch.setattr(distill_run, "teacher_targets", real)
    end = run(dataclasses.replace(config, steps=saved.state.step + 2), resume=True)[-1]
    assert end.reason == "done"


def test_gradients_beyond_fp16_halve_the_scale_and_count_as_skipped_steps(settings):
    reports = run(config := settings(steps=30, precision="fp16", loss="masking=1e4"))
    skipped, progress = of(reports, distill.StepSkipped), of(reports, distill.Progress)
    assert len(skipped) > 0
    assert [r.step for r in progress] == list(range(len(skipped) + 1, 31))  # the scale is found, then all steps count
    assert all(np.isfinite(r.gradient_norm) for r in progress)
    saved = checkpoint.load(Path(config.out) / "checkpoint.pt")
    assert progress[-1].skipped_steps == saved.state.skipped_steps == len(skipped)
    assert saved.scaler["scale"] == 65536 / 2 ** len(skipped)
    assert {state["step"].item() for state in saved.optimizer["state"].values()} == {len(progress)}


def test_gradients_that_no_scale_brings_into_fp16_are_a_run_that_diverged(settings):
    config = settings(steps=100, precision="fp16", loss="masking=1e30", clip=1.0)
    reports = []
    with pytest.raises(ArmhubertError, match=r"17 steps in a row .* gradients that are not finite.* bf16 or fp32"):
        reports.extend(distill.distill(config))
    assert len(of(reports, distill.StepSkipped)) == 17  # 65536 down to below 1
    assert of(reports, distill.Progress) == []


def test_a_ruinous_learning_rate_ends_in_one_clear_error(settings):
    with pytest.raises(ArmhubertError, match="start a new run with a learning rate below"):
        run(settings(steps=100, learning_rate=1e30, warmup=0.0))


# bad input, and what it leaves


def test_settings_out_of_range_name_themselves(settings):
    for change in (
        {"steps": 0}, {"steps": None, "epochs": 0.0}, {"batch_seconds": 0.0}, {"mask_prob": 1.5}, {"mask_prob_end": -1},
        {"hold_out": 1.0}, {"dropout": 1.0}, {"learning_rate": -1.0}, {"seed": -1}, {"workers": -1}, {"clip": 0.0},
        {"workers": 99999}, {"layers": 2**62}, {"mask_length": 2**62}, {"accumulate": 2**62}, {"steps": 10**400},
        {"accumulate": 0}, {"patience": 0}, {"width": 0}, {"layers": 0}, {"heads": 0}, {"ffn": 0},
        {"seed": 2**64}, {"batch_seconds": 1e-6}, {"max_seconds": 1e-6},
        {"learning_rate": float("nan")}, {"layer_weight": float("nan")}, {"warmup": float("nan")},
    ):  # fmt: skip
        with pytest.raises(ArmhubertError, match=rf"^{list(change)[-1]} must be"):
            settings(**change)
    with pytest.raises(ArmhubertError, match="steps or epochs, not both"):
        settings(steps=1, epochs=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seconds": 0.02}, "max_seconds must be at least 0.025"),
        ({"conv_layers": "[(8, 10, 5)] * 0"}, "conv_layers must hold"),
        ({"conv_layers": "[(8, 10, 5)] + [(32, 2, 2)]"}, "same frames"),
        ({"device": "tpu"}, "device must be"),
        ({"valid": ("absent",)}, "absent' does not exist"),
    ],
)
def test_input_that_shows_its_fault_before_the_audio_is_examined_leaves_no_folder(settings, change, message):
    config = settings(**change)
    with pytest.raises(ArmhubertError, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.out).exists()


def test_input_that_shows_its_fault_in_the_audio_leaves_what_was_examined_to_the_next_run(
    settings, speech, monkeypatch
):
    config = settings(hold_out=0.5, data=(str(speech / "0.wav"),))
    with pytest.raises(ArmhubertError, match="at least 2"):
        run(config)
    assert [path.name for path in Path(config.out).iterdir()] == [".armhubert-scan.json"]
    monkeypatch.setattr(data, "measure", lambda path: pytest.fail("decoded again"))
    assert run(dataclasses.replace(config, hold_out=0.0))[-1].reason == "done"


def test_a_recording_that_goes_away_is_left_out(settings, speech, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RETRY_AFTER", ())
    moving = Path(shutil.copytree(speech, tmp_path / "moving"))
    config = settings(data=(str(moving),), hold_out=0.0, steps=6, workers=0, batch_seconds=60.0)
    reports = []
    for report in distill.distill(config):
        reports.append(report)
        if isinstance(report, distill.Progress) and report.step == 2:
            (moving / "3.wav").unlink()
    assert reports[-1].reason == "done"
    gone = of(reports, distill.Unreadable)
    assert [report.step for report in gone] == [3, 4, 5, 6]
    assert all("3.wav' does not exist" in report.why for report in gone)
    assert all(math.isfinite(loss) for loss in losses(reports))
    monkeypatch.setattr(data, "measure", lambda path: pytest.fail("examined anew"))
    resumed = run(dataclasses.replace(config, steps=7), resume=True)  # its list has the file still
    assert (resumed[-1].reason, len(of(resumed, distill.Unreadable))) == ("done", 1)


def test_recordings_that_all_go_away_cost_nothing_that_was_learned(settings, speech, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RETRY_AFTER", ())
    moving = Path(shutil.copytree(speech, tmp_path / "moving"))
    config = settings(data=(str(moving),), hold_out=0.0, steps=100, workers=0)
    reports = distill.distill(config)
    for report in reports:
        if isinstance(report, distill.Progress) and report.step == 2:
            moving.rename(tmp_path / "away")
            break
    with pytest.raises(ArmhubertError, match=r"\.wav' does not exist"):
        list(reports)
    saved = checkpoint.load(Path(config.out) / "checkpoint.pt")
    assert saved.state.step >= 2
    (tmp_path / "away").rename(moving)
    assert run(dataclasses.replace(config, steps=saved.state.step + 1), resume=True)[-1].reason == "done"


def test_held_out_recordings_that_go_away_cost_nothing_that_was_learned(settings, speech, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RETRY_AFTER", ())
    held = Path(shutil.copytree(speech, tmp_path / "held"))
    config = settings(data=(str(write_speech(tmp_path / "more")),), valid=(str(held),), steps=3, validate_every=3)
    reports = distill.distill(config)
    next(report for report in reports if isinstance(report, distill.Started))
    held.rename(tmp_path / "away")
    with pytest.raises(ArmhubertError, match=r"\.wav' does not exist"):
        list(reports)
    saved = checkpoint.load(Path(config.out) / "checkpoint.pt").state
    assert (saved.step, saved.validation_due) == (3, True)
    (tmp_path / "away").rename(held)
    resumed = run(config, resume=True)
    assert (resumed[-1].reason, [r.step for r in of(resumed, distill.Validated)]) == ("done", [3])


def test_a_held_out_recording_that_goes_away_does_not_lower_the_loss(settings, speech, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RETRY_AFTER", ())
    held = Path(shutil.copytree(speech, tmp_path / "held"))
    config = settings(valid=(str(held),), batch_seconds=60.0, learning_rate=1e-30, weight_decay=0.0)
    config = dataclasses.replace(config, data=(str(write_speech(tmp_path / "more")),), validate_every=1)
    first, second = [], []
    for report in distill.distill(config):
        if isinstance(report, distill.Validated):
            (second if first else first).append(report)
            (held / "3.wav").unlink(missing_ok=True)
    (alone,) = of(run(dataclasses.replace(config, out=str(tmp_path / "alone"), steps=1)), distill.Validated)
    assert len(second[0].left_out) == 1
    assert second[0].loss == pytest.approx(alone.loss, rel=1e-5)
    assert second[0].loss != first[0].loss


def of_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def of_a_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("allocate", [of_a_gpu, of_a_cpu])
@pytest.mark.parametrize(("part", "what"), [("step", "a batch of step 3"), ("validate", "a batch of held-out speech")])
def test_memory_that_runs_out_costs_nothing_that_was_learned(settings, monkeypatch, allocate, part, what):
    real, kept = getattr(distill_run.Run, part), []

    def full(self, *args):
        large = torch.zeros(1)
        kept.append(weakref.ref(large))
        if self.state.step == 2:
            allocate()
        return real(self, *args)

    def save(path, content, real=checkpoint.save):
        assert [ref() for ref in kept] == [None] * len(kept), "what the failed step held is in the way"
        real(path, content)

    config = settings(steps=4, hold_out=0.3, validate_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(distill_run.Run, part, full)
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(ArmhubertError, match=f"did not hold {what}: resume with gradient_checkpointing=True"):
            run(config)
    resumed = run(dataclasses.replace(config, gradient_checkpointing=True), resume=True)
    assert (of(resumed, distill.Started)[0].first_step, resumed[-1].reason) == (2, "done")


def test_other_errors_of_a_step_are_not_taken_for_memory(settings, monkeypatch):
    monkeypatch.setattr(distill_run.Run, "step", lambda *args: torch.zeros(1) @ torch.zeros(2))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run(settings())


@pytest.mark.parametrize(("save_every", "steps"), [(None, [1, 2, 3]), (1000, [3])])
def test_a_checkpoint_is_due_after_a_while_unless_its_steps_are_given(settings, monkeypatch, save_every, steps):
    monkeypatch.setattr(distill, "SAVED_WITHIN", 0.0)
    reports = run(settings(steps=3, save_every=save_every))
    assert [saved.step for saved in of(reports, distill.Saved)] == steps


def test_what_a_killed_process_was_writing_is_removed(settings):
    config = settings()
    run(config)
    left = Path(config.out) / ".checkpoint.pt.a1b2c3_4"
    left.touch()
    run(config, resume=True)
    assert not left.exists()


def test_what_is_held_out_by_default_is_a_share_and_no_more_than_enough(settings, monkeypatch):
    config = settings(hold_out=None, steps=1)
    assert of(run(config), distill.Started)[0].valid_utterances == 1
    monkeypatch.setattr("armhubert.distill_data.HELD_OUT_SHARE", 0.9)
    many = of(run(config, force=True), distill.Started)[0]
    assert many.valid_seconds > 3
    monkeypatch.setattr("armhubert.distill_data.HELD_OUT_SECONDS", 1.0)
    few = of(run(config, force=True), distill.Started)[0]
    assert 1.0 <= few.valid_seconds < 2.4


def test_a_run_whose_folder_and_speech_have_moved_together_goes_on(settings, speech, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(speech, "speech")
    config = settings(data=("speech",), out="run")
    run(config)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    resumed = run(dataclasses.replace(distill.load_run_config("run"), steps=3), resume=True)
    assert (resumed[-1].reason, of(resumed, distill.Unreadable)) == ("done", [])


def test_losses_are_of_what_was_read(settings, speech, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RETRY_AFTER", ())
    moving = Path(shutil.copytree(speech, tmp_path / "moving"))
    frozen = {"learning_rate": 1e-30, "weight_decay": 0.0, "loss": "plain", "batch_seconds": 60.0, "dropout": 0.0}
    config = settings(data=(str(moving),), steps=2, **frozen)
    seen = []
    for report in distill.distill(config):
        seen.append(report)
        if isinstance(report, distill.Progress):
            for number in range(4):
                (moving / f"{number}.wav").unlink(missing_ok=True)
    whole, rest = losses(seen)
    (alone,) = losses(run(settings(data=(str(moving),), out=str(tmp_path / "alone"), steps=1, **frozen)))
    assert rest == pytest.approx(alone, rel=1e-2)  # another step's dropout of the input
    assert rest == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": "armhubert data 1", "train": [["a", -1]], "valid": [], "skipped": []}']
)
def test_a_run_whose_list_is_damaged_examines_its_data_anew(settings, text):
    config = settings()
    run(config)
    listed = Path(config.out) / "data.json"
    before = listed.read_text()
    listed.write_text(text)
    resumed = run(dataclasses.replace(config, steps=3), resume=True)
    assert of(resumed, distill.Scanning)
    assert resumed[-1].reason == "done"
    assert listed.read_text() == before


def test_two_runs_do_not_share_a_folder(settings):
    config = settings()
    first = distill.distill(config)
    next(first)
    with pytest.raises(ArmhubertError, match="another process is at work"):
        run(config, force=True)
    first.close()
    assert run(config, force=True)[-1].reason == "done"


def test_the_teacher_is_not_in_the_way_of_its_student(settings, teacher, tmp_path):
    own = shutil.copytree(teacher, tmp_path / "own")
    for out in (own, tmp_path):
        with pytest.raises(ArmhubertError, match="holds the teacher"):
            run(settings(teacher=str(own), out=str(out)), force=True)
    assert (own / "config.json").is_file()


def test_a_folder_that_cannot_be_written_is_refused_before_the_audio_is_examined(settings, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "measure", lambda path: pytest.fail("examined"))
    with pytest.raises(ArmhubertError, match=r"cannot write to .*choose another folder"):
        run(settings(out=str(tmp_path / "file" / "run")))


def test_a_teacher_without_mask_embedding_is_refused_for_masking_and_taken_for_plain(settings, tmp_path, teacher):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((teacher / "config.json").read_bytes())
    state = safetensors.torch.load_file(teacher / "model.safetensors")
    del state["masked_spec_embed"]
    safetensors.torch.save_file(state, bare / "model.safetensors")
    with pytest.raises(ArmhubertError, match="no mask embedding"):
        run(settings(teacher=str(bare)))
    assert run(settings(teacher=str(bare), loss="plain"))[-1].reason == "done"
