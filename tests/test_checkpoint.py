import os
import pickle

import pytest
import torch

from armhubert import ArmhubertError, checkpoint
from armhubert.checkpoint import Checkpoint, Cursor, TrainingState


@pytest.fixture
def full() -> Checkpoint:
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    state = TrainingState(
        step=7, cursor=Cursor(2, 5), audio_seconds=1.25, skipped_steps=3, skipped_in_a_row=1, best_loss=0.1 + 0.2,
        validations_without_gain=4, train_seconds=9.5, window=[(0.1, [0.2, 0.3], 0.4, 0.5, 0.6)],
    )  # fmt: skip
    student = {"a": parameter.detach().clone(), "b": torch.tensor([1, 2])}
    identity = {"teacher": "abc", "student": {"width": 4, "conv_layers": [[1, 2, 3]]}, "batches in a step": 2}
    return Checkpoint(state, student, optimizer.state_dict(), {"scale": 2.0**16}, identity)


def test_everything_comes_back_as_it_was(full, tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", full)
    again = checkpoint.load(tmp_path / "checkpoint.pt")
    assert again.state == full.state
    assert isinstance(again.state.cursor, Cursor)
    assert (again.scaler, again.identity) == (full.scaler, full.identity)
    assert all(torch.equal(value, again.student[name]) for name, value in full.student.items())
    assert again.optimizer["param_groups"] == full.optimizer["param_groups"]
    for name, value in full.optimizer["state"][0].items():
        assert torch.equal(value, again.optimizer["state"][0][name])
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_checkpoint_without_the_open_window_is_read(full, tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, full)
    content = torch.load(path, weights_only=True)
    del content["state"]["window"]
    torch.save(content, path)
    assert checkpoint.load(path).state.window == []


def test_a_new_checkpoint_replaces_the_old_one_only_when_it_is_whole(full, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, full)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ArmhubertError, match=r"cannot write .*No space left on device; free space"):
        checkpoint.save(path, full)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_what_does_not_read_back_is_not_written(full, tmp_path, monkeypatch):
    real = torch.load

    def forgetful(*args, **options):
        content = real(*args, **options)
        content["student"]["a"] += 1
        return content

    monkeypatch.setattr(torch, "load", forgetful)
    with pytest.raises(RuntimeError, match="did not read back"):
        checkpoint.save(tmp_path / "checkpoint.pt", full)
    assert os.listdir(tmp_path) == []


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(ArmhubertError, match=r"has no checkpoint\.pt: nothing to resume"):
        checkpoint.load(tmp_path / "checkpoint.pt")


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": 1, "state": Harm()}, path)
    with pytest.raises(ArmhubertError, match="holds more than tensors"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(ArmhubertError, match=r"checkpoint\.pt"):
        checkpoint.load(path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
def test_a_truncated_checkpoint(full, tmp_path, share):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, full)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArmhubertError, match=r"checkpoint\.pt.*; start the run anew with force=True") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["state", "student", "optimizer", "scaler", "identity", "format"])
def test_an_incomplete_checkpoint(full, tmp_path, name):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, full)
    content = torch.load(path, weights_only=True)
    del content[name]
    torch.save(content, path)
    with pytest.raises(ArmhubertError, match=r"is no (complete )?checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize("state", [{"stepp": 1}, {"cursor": 3}, {"cursor": (1, 2, 3)}, [1], None])
def test_a_checkpoint_with_another_state(full, tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, full)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "state": state}, path)
    with pytest.raises(ArmhubertError, match="is no complete checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"}, {"step": 1.5}, {"step": -1}, {"step": True}, {"cursor": ("a", 0)}, {"cursor": (0, -1)},
        {"cursor": "ab"}, {"best_loss": None}, {"validation_due": 1}, {"train_seconds": "x"}, {"window": [1]},
        {"window": [(0.1, ["x"], 0.4, 0.5, 0.6)]}, {"window": [(0.1, [0.2], 0.4)]}, {"window": None},
        {"student": [1]}, {"student": {"a": 1}}, {"optimizer": None}, {"scaler": {"scale": "x"}}, {"identity": None},
    ],
)  # fmt: skip
def test_a_field_of_a_wrong_kind_is_named(full, tmp_path, change):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, full)
    content = torch.load(path, weights_only=True)
    (name,) = change
    torch.save(content | change if name in content else {**content, "state": content["state"] | change}, path)
    with pytest.raises(ArmhubertError, match=rf"no complete checkpoint: its {name} is .*; start the run anew") as told:
        checkpoint.load(path)
    assert "\n" not in str(told.value)


def test_another_format(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in ({"format": 2}, [1, 2], torch.zeros(2)):
        torch.save(content, path)
        with pytest.raises(ArmhubertError, match="no checkpoint of this version"):
            checkpoint.load(path)
