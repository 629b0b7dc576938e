import json
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from corpora import librispeech

from armhubert.superb import progress, runner

SMALL = ["--steps", "2", "--batch", "4", "--accumulate", "1", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def words(waves, tmp_path):
    waves(*(f"keywords/{word}/{n}.wav" for word in ("cat", "dog") for n in range(24)), seconds=0.2)
    return tmp_path / "keywords"


def test_a_task_from_start_to_result(call, words, tmp_path):
    code, out, err = call(
        "evaluate", "fbank", "--task", "ks", "--data", words, *SMALL, "--cache", "features", "-o", "run"
    )
    assert code == 0, err
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert f"test accuracy={result['metrics']['accuracy']:.4f}" in out
    assert re.search(r"cache items=48 write=\d\.\d\dGB", out)
    assert "not SUPERB's: batch=4 steps=2" in out
    assert "note: no lists: split 80/10/10" in err
    assert {"confusion.png", "training.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    code, out, err = call("evaluate", "--resume", "run")
    assert code == 0
    assert f"test accuracy={result['metrics']['accuracy']:.4f}" in out


def test_code_that_a_file_names_as_the_model_is_not_run(call, words, tmp_path):
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\ndef make(): return None\n")
    model = f"{tmp_path / 'evil.py'}:make"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/evaluate.json").write_text(json.dumps({"model": model, "task": "ks", "data": str(words)}))
    (tmp_path / "c.yaml").write_text(json.dumps({"model": model, "task": "ks", "data": str(words)}))
    for argv in (["--resume", tmp_path / "run"], ["--config", tmp_path / "c.yaml"]):
        code, _, err = call("evaluate", *argv)
        assert code == 2
        assert "a model that is code must be named on the command line" in err
        assert not Path("ran").exists()
        code, _, err = call("evaluate", model, *argv)
        assert code == 2
        assert "must return a callable" in err, "who names it trusts it"
        Path("ran").unlink()


def test_a_resumed_run_may_be_given_what_it_has(call, words):
    own = ["--task", "ks", "--data", words, *SMALL, "--sweep", "lr", "--rates", "1e-2,1e-3"]
    assert call("evaluate", "fbank", *own, "-o", "run")[0] == 0
    code, out, err = call("evaluate", "fbank", "--resume", "run", *own)
    assert (code, out.splitlines()[-1][:14]) == (0, "test accuracy="), err
    code, _, err = call("evaluate", "mfcc", "--resume", "run", *own, "--steps", "3")
    assert (code, err) == (2, "error: a resumed run keeps model, steps: leave it out, or start a new run\n")


def test_a_stopped_evaluation_exits_with_the_code_of_its_signal(call, words, monkeypatch):
    real = runner.evaluate

    def interrupted(config, *, should_stop, **how):
        for report in real(config, should_stop=should_stop, **how):
            yield report
            if isinstance(report, progress.Progress) and not should_stop():
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runner, "evaluate", interrupted)
    argv = ["evaluate", "fbank", "--task", "ks", "--data", words, *SMALL, "--steps", "30", "-o", "run"]
    code, out, _ = call(*argv)
    assert (code, out.splitlines()[-1]) == (143, "Stopped. Go on with:  armhubert evaluate --resume run")
    code, out, _ = call("evaluate", "fbank", "--suite", "superb", "--data", words, *SMALL, "--steps", "30", "-o", "all")
    assert (code, out.splitlines()[-1]) == (143, "Stopped; the same command goes on.")


def test_a_suite_prints_the_published_rows_and_writes_the_report(call, words, tmp_path):
    code, out, err = call("evaluate", "fbank", "mfcc", "--suite", "superb", "--data", words, *SMALL, "-o", "all")
    assert code == 0, err
    assert "ARMHuBERT 960h (published)" in out
    assert "78.1" in out
    assert (tmp_path / "all/report.html").is_file()
    assert "pr is left out: " in err


def test_similarity(call, waves, tmp_path):
    waves("speech/a.wav", "speech/b.wav", seconds=0.5)
    code, out, err = call(
        "evaluate", "mini", "--task", "similarity", "--against", "mini", "--data", "speech", "-o", "sim"
    )
    assert code == 0, err
    assert out.count("1.000") >= 12
    assert (tmp_path / "sim/similarity.png").is_file()
    again = ("evaluate", "mini", "--task", "similarity", "--against", "mini", "--data", "speech", "-o", "sim")
    code, out, err = call(*again)
    assert (code, out) == (2, "")
    assert "sim/similarity.json exists: choose another name, or --force to replace it" in err
    assert call(*again, "--force", "--seed", "1")[0] == 0
    assert json.loads((tmp_path / "sim/similarity.json").read_text())["config"]["seed"] == 1


@pytest.mark.parametrize(
    "argv", [["mini", "--task", "similarity", "--against", "mini"], ["fbank", "--task", "ks", *SMALL]]
)
def test_a_folder_that_cannot_be_written_is_refused_before_any_audio_is_read(call, words, tmp_path, monkeypatch, argv):
    (tmp_path / "file").touch()
    for reader in ("armhubert.superb.similarity.read_audio", "armhubert.data.measure"):
        monkeypatch.setattr(reader, lambda *args, **how: pytest.fail("read"))
    code, out, err = call("evaluate", *argv, "--data", words, "-o", "file/run")
    assert (code, out) == (2, "")
    assert "cannot write to file/run" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--task", "krs"], "unknown task 'krs'; did you mean 'ks'"),
        (["--task", "similarty"], "unknown task 'similarty'; did you mean 'similarity'"),
        (["--task", "ks"], "give --data, the root of ks's data"),
        (["--task", "ks", "--suite", "mini"], "unknown task 'ks' of the suite; known: mini-pr"),
        (["fbank", "--task", "similarity", "--suite", "superb"], "unknown task 'similarity' of the suite; known: pr,"),
        (["--suite", "big"], "--suite must be superb or mini"),
        (["--suite", "superb"], "--suite superb needs a model"),
        (["fbank", "mini", "--task", "ks"], "give one model"),
        (["--task", "similarity"], "give both"),
        (["mini", "--task", "similarity", "--against", "mini", "--config", "x"], "similarity takes no --config"),
        (["--task", "ks", "--against", "mini"], "--against is for --task similarity"),
        (["--task", "ks", "--utterances", "3"], "--utterances is for --task similarity"),
        (["--resume", "nowhere"], "nowhere has no evaluate.json"),
        (["no-such-model", "--task", "ks", "--data", "keywords"], "no model at 'no-such-model'"),
    ],
)
def test_bad_input_is_one_line(argv, says, call, words):
    code, out, err = call("evaluate", *argv)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert says in err


@pytest.mark.parametrize(
    ("content", "argv", "says"),
    [
        ("model: 5", [], "model in the settings must be text, got 5"),
        ("task: [ks]", [], "task in the settings must be text, got ['ks']"),
        ("data: 5", ["fbank", "--suite", "superb"], "data root '5' must be a folder that exists"),
        ("train: 5", ["fbank", "--suite", "superb"], "train in the settings of pr must be a list, got 5"),
        ("tasks: {ks: {data: 5}}", ["fbank", "--suite", "superb"], "data root '5' must be a folder that exists"),
        ("tasks: {er: {sed: 1}}", ["fbank", "--suite", "superb"], "unknown key 'sed' in the settings of er"),
        ("tasks: {er: {out: x}}", ["fbank", "--suite", "superb"], "a suite's settings name no out"),
    ],
)
def test_settings_of_a_wrong_type_are_one_line(content, argv, says, call, tmp_path):
    (tmp_path / "settings.yaml").write_text(content)
    code, out, err = call("evaluate", *argv, "--config", "settings.yaml")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert says in err


@pytest.mark.parametrize("option", ["--data", "--out", "--train", "--resume"])
def test_a_name_that_no_file_system_takes_is_one_line(option, call, words):
    rest = [] if option == "--resume" else ["fbank", "--task", "asv", *([] if option == "--data" else ["-d", words])]
    code, out, err = call("evaluate", *rest, option, "x" * 300)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "name too long" in err or sys.version_info >= (3, 14)  # whose pathlib says only that nothing is there


def test_a_dry_run_takes_the_warm_up_of_the_run(call, words):
    argv = ["evaluate", "fbank", "--task", "ks", "--data", words, *SMALL, "--dry-run", "--steps", "20", "--warmup"]
    assert call(*argv, "5")[0] == 0
    code, _, err = call(*argv, "50")
    assert code == 2
    assert "--warmup must be at most the run's 20 steps, got 50" in err


def test_without_out_a_run_is_named_after_model_and_task(call, words, tmp_path):
    (tmp_path / "settings.yaml").write_text("model: fbank\ntask: ks\n")
    code, out, err = call("evaluate", "--config", "settings.yaml", "--data", words, *SMALL)
    assert code == 0, err
    assert "out=runs/evaluate/fbank/ks" in out


def test_the_commands_of_the_reproduction_page_run(call, tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=4, dev_clean=2, test_clean=2)
    (tmp_path / "data/LibriSpeech").mkdir(parents=True)
    for subset in ("train-clean-100", "dev-clean", "test-clean"):
        (tmp_path / subset).rename(tmp_path / "data/LibriSpeech" / subset)
    (tmp_path / "lexicon.txt").rename(tmp_path / "data/lexicon.txt")
    page = (Path(__file__).parents[2] / "docs/reproduce.md").read_text()
    commands = re.findall(r"^    armhubert (evaluate .*)$", page, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        argv = shlex.split(command.replace("runs/arm facebook/hubert-base-ls960", "").replace("runs/arm", "mini"))
        small = ["--workers", "0", "--device", "cpu", *(["--head-size", "8"] if "--task pr" not in command else [])]
        code, _, err = call(*argv, *([] if "--dry-run" in argv else ["--dry-run"]), *small)
        assert code == 0, (command, err)
    assert not list(tmp_path.glob("runs/**/result.json"))
