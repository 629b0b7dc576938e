import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from made import GOLDEN, fairseq_state, model_settings, transformers_model
from typer.testing import CliRunner

from armhubert import ARMHuBERT, ArmhubertError, load_teacher
from armhubert.cli.app import app
from armhubert.cli.options import as_typed
from armhubert.config import preset
from armhubert.convert import load_weights
from armhubert.convert.folder import convert
from armhubert.student import model_card

WRITTEN = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
pytestmark = pytest.mark.filterwarnings("error::UserWarning:armhubert")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fairseq") / "hubert.pt"
    state = fairseq_state(transformers_model("Hubert"), layer_norm=False) | {"final_proj.weight": torch.zeros(2, 2)}
    torch.save({"cfg": {"model": model_settings(large=False), "task": {"normalize": False}}, "model": state}, path)
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, ArmhubertError), result.exception
        message = as_typed(str(result.exception), ["convert", *map(str, arguments)])
        return 2, result.stdout, message  # what `main` prints and exits with
    return result.exit_code, result.stdout, result.stderr


def test_a_checkpoint_becomes_a_folder_with_the_same_tensors(checkpoint, tmp_path):
    code, out, _ = run(checkpoint, tmp_path / "a" / "b")
    assert code == 0
    assert "missing none" in out
    assert "ignored 1: final_proj.weight" in out
    assert "read back equal" in out
    folder = tmp_path / "a" / "b"
    assert {file.name for file in folder.iterdir()} == WRITTEN
    assert os.listdir(tmp_path / "a") == ["b"]
    before, after = load_weights(checkpoint), load_weights(folder)
    assert before.config == after.config
    assert all(torch.equal(after.state[name], value) for name, value in before.state.items())
    x = torch.randn(1, 2000)
    with torch.no_grad():
        assert torch.equal(load_teacher(folder)(x).last_hidden_state, load_teacher(checkpoint)(x).last_hidden_state)
    assert "licence" in (folder / "README.md").read_text()


def test_the_card_names_what_was_given_and_never_claims_its_licence(checkpoint, tmp_path, monkeypatch):
    convert(checkpoint, tmp_path / "theirs")
    monkeypatch.setattr("armhubert.convert.huggingface.download", lambda _: tmp_path / "theirs")
    monkeypatch.chdir(tmp_path / "theirs")
    for source, name in ((".", "theirs"), ("someone/hubert", "someone/hubert"), ("mini", "mini")):
        convert(source, tmp_path / "out", force=True)
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"# {name}, converted\n" in card
        assert "license: other\n" in card


def test_the_card_of_a_student_of_ours_keeps_its_training(tmp_path):
    student = ARMHuBERT(dataclasses.replace(preset("mini"), layers=2, pattern="CR"))
    training, files = "\n## Training\n\nDistilled from `x`.\n", "\nAll settings: distill.json.\n"
    student.save_pretrained(tmp_path / "s", card=model_card(student, training + files))
    convert(tmp_path / "s", tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == model_card(student, training)
    convert(tmp_path / "s", tmp_path / "other", attention_mode="resoftmax")
    card = (tmp_path / "other" / "README.md").read_text()
    assert training + "\nIts maps were read as `exact` in that training.\n\nMethod: " in card
    assert "license: other" not in card
    (tmp_path / "s" / "README.md").write_text("# facebook/hubert\n\n## Training\n\nLong.\n")
    convert(tmp_path / "s", tmp_path / "theirs")
    assert "Long." not in (tmp_path / "theirs" / "README.md").read_text()


def test_a_new_folder_is_open_to_whom_the_umask_lets(checkpoint, tmp_path):
    tmp_path.chmod(0o777)
    before = os.umask(0o027)
    try:
        convert(checkpoint, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_an_existing_folder_is_filled_where_it_stands(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    before = (tmp_path / "here").stat()
    for out in (".", tmp_path / "link"):
        convert(checkpoint, out)
        after = (tmp_path / "here").stat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        assert {file.name for file in (tmp_path / "here").iterdir()} == WRITTEN
        assert {file.name for file in tmp_path.iterdir()} == {"here", "link"}
        for name in WRITTEN:
            (tmp_path / "here" / name).unlink()


def test_a_folder_that_holds_something_is_left_alone_unless_forced(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert run(checkpoint, out)[0] == 0  # empty
    (out / "notes.txt").write_text("mine")
    (out / "config.json").write_text("{}")
    code, _, message = run(checkpoint, out)
    assert code == 2
    assert "--force" in message
    assert (out / "config.json").read_text() == "{}"
    assert run(checkpoint, out, "--force")[0] == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "armhubert"
    assert (out / "notes.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    assert "is a file" in run(checkpoint, tmp_path / "file", "--force")[2]
    assert "is the source itself" in run(out, out, "--force")[2]


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_nothing_is_written_when_the_source_is_bad(checkpoint, tmp_path, force):
    (tmp_path / "torn.pt").write_bytes(checkpoint.read_bytes()[:20000])
    for source in (tmp_path / "torn.pt", tmp_path / "absent.pt"):
        code, _, message = run(source, tmp_path / "out", *force)
        assert code == 2
        assert "\n" not in message.strip()
    assert "--attention-mode must be" in run(checkpoint, tmp_path / "out", "--attention-mode", "soft")[2]
    assert [file.name for file in tmp_path.iterdir()] == ["torn.pt"]


def test_a_write_that_fails_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArmhubertError, match="No space left"):
        convert(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArmhubertError, match="No space left"):
        convert(checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_system_takes_is_one_line(tmp_path):
    code, _, message = run("mini", tmp_path / ("x" * 300))
    assert code == 2
    assert message.strip().endswith("File name too long; choose another folder")
    code, _, message = run("x" * 300, "mini")
    assert code == 2
    assert "no model at" in message


def test_a_released_student_keeps_its_setting_or_warns(tmp_path):
    source = GOLDEN / "reuse-2by2" / "student.ckpt"
    assert run(source, tmp_path / "as-released")[0] == 0
    assert ARMHuBERT.from_pretrained(tmp_path / "as-released").config.attention_mode == "resoftmax"
    code, out, err = run(source, tmp_path / "exact", "--attention-mode", "exact", "--no-heads")
    assert code == 0
    assert "warning:" in err
    assert "fine-tune it" in err
    student = ARMHuBERT.from_pretrained(tmp_path / "exact")
    assert student.config.attention_mode == "exact"
    assert student.heads is None
    assert "ignored" in out
    assert "teacher_model" in out
