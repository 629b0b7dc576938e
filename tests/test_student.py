import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from armhubert import ARMHuBERT, ArmhubertError
from armhubert.config import preset
from armhubert.files import write_atomic


@pytest.fixture
def student() -> ARMHuBERT:
    return ARMHuBERT(dataclasses.replace(preset("mini"), layers=2, pattern="CR")).eval()


def test_a_saved_student_comes_back_bit_for_bit(student, tmp_path):
    student.save_pretrained(tmp_path / "s", card=None)
    again = ARMHuBERT.from_pretrained(tmp_path / "s")
    assert again.config == student.config
    assert not again.training
    for name, value in student.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert "from_pretrained" in (tmp_path / "s/README.md").read_text()


def test_loading_draws_nothing_from_the_global_generator(student, tmp_path):
    student.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    ARMHuBERT.from_pretrained(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_heads_may_be_left_on_disk(student, tmp_path):
    student.save_pretrained(tmp_path)
    small = ARMHuBERT.from_pretrained(tmp_path, heads=False)
    x = torch.randn(1, 3000)
    assert small.heads is None
    assert small(x).projections is None
    assert torch.equal(small(x).last_hidden_state, student(x).last_hidden_state)
    assert student(x, projections=False).projections is None
    assert [p.shape[-1] for p in student(x).projections] == [256, 256]


def test_the_reading_of_the_maps_may_be_changed_at_loading(student, tmp_path):
    student.save_pretrained(tmp_path)
    other = ARMHuBERT.from_pretrained(tmp_path, attention_mode="resoftmax")
    x = torch.randn(1, 3000)
    assert other.config.attention_mode == "resoftmax"
    assert not torch.equal(other(x).last_hidden_state, student(x).last_hidden_state)


def test_a_student_that_cannot_be_written_leaves_nothing_behind(student, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArmhubertError, match="cannot write"):
        student.save_pretrained(tmp_path / "file/student")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_writing_replaces_whole_files_and_keeps_the_umask(tmp_path):
    write_atomic(tmp_path / "a.txt", "one")
    write_atomic(tmp_path / "a.txt", b"two")
    assert (tmp_path / "a.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_full_disk_keeps_the_old_file_and_no_temporary_one(tmp_path):
    (tmp_path / "a.bin").write_text("old")
    code = f"""
import resource
from pathlib import Path
from armhubert.errors import ArmhubertError
from armhubert.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path({str(tmp_path / "a.bin")!r}), bytes(100_000))
except ArmhubertError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot write")
    assert (tmp_path / "a.bin").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
