import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.utils import prune
from torch.nn.utils.parametrize import remove_parametrizations

from armhubert import ARMHuBERT, ArmhubertError
from armhubert.config import preset
from armhubert.files import remove_temporaries, write_atomic
from armhubert.losses import Objective
from armhubert.student import count_parameters
from armhubert.torchaudio import TorchaudioEncoder


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


def test_a_readme_that_is_there_stays_unless_a_card_is_given(student, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    student.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"
    student.save_pretrained(tmp_path, card="a card")
    assert (tmp_path / "README.md").read_text() == "a card"


def test_dropouts_to_train_on_with(student, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = ARMHuBERT.from_pretrained(tmp_path, dropout=0.2, attention_dropout=0.1, input_dropout=0.3)
    assert (loaded.config.dropout, loaded.config.attention_dropout, loaded.config.input_dropout) == (0.2, 0.1, 0.3)
    assert loaded.config.activation_dropout == student.config.activation_dropout
    x = torch.randn(1, 3000)
    assert torch.equal(loaded(x).last_hidden_state, student(x).last_hidden_state)
    assert not torch.equal(loaded.train()(x).last_hidden_state, student(x).last_hidden_state)
    with pytest.raises(ArmhubertError, match="dropout"):
        ARMHuBERT.from_pretrained(tmp_path, dropout=1.5)


def test_an_implementation_that_is_none_is_told_at_once():
    with pytest.raises(ArmhubertError, match="impl must be one of auto, triton, torch, got 'cuda'"):
        ARMHuBERT(preset("mini"), impl="cuda")


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchaos_quantised_layers_are_called(student, kind):
    quantization = pytest.importorskip("torchao.quantization", reason="needs armhubert[int8]")
    x = torch.randn(2, 4000)
    with torch.inference_mode():
        want = student(x).last_hidden_state
    quantization.quantize_(student, getattr(quantization, kind)())
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            got = student(x).last_hidden_state
        assert 0 < (got - want).norm() < 0.05 * want.norm()


def test_loading_draws_nothing_from_the_global_generator(student, tmp_path):
    student.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    process = torch.get_num_threads(), torch.get_default_dtype()
    again = ARMHuBERT.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.norm.weight.dtype == torch.float64
    assert torch.equal(before, torch.get_rng_state())
    assert process == (torch.get_num_threads(), torch.get_default_dtype())


def test_heads_may_be_left_on_disk(student, tmp_path):
    student.save_pretrained(tmp_path)
    small = ARMHuBERT.from_pretrained(tmp_path, heads=False)
    x = torch.randn(1, 3000)
    assert small.heads is None
    assert count_parameters(small) == (count_parameters(student).without_heads,) * 2
    assert count_parameters(small).total < count_parameters(student).total
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


@pytest.mark.parametrize("letter", ["n", "\u97f3", "\U0001f50a"])
def test_a_name_that_fits_can_be_written(tmp_path, letter):
    longest = 255 // len(letter.encode())
    write_atomic(tmp_path / (letter * longest), "one")
    assert [p.name for p in tmp_path.iterdir()] == [letter * longest]
    with pytest.raises(ArmhubertError, match=r"File name too long; choose a shorter name$"):
        write_atomic(tmp_path / (letter * (longest + 1)), "one")
    assert len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_were_writing_is_removed_and_nothing_else(tmp_path):
    name = "n" * 100 + ".npy"
    others = [name, ".a.npy.swp", ".a.npy.12345678.bak", ".b.npy.12345678", "a.npy.12345678"]
    for other in (*others, ".a.npy.t_472r5e", f".{name[:32]}.00000000"):
        (tmp_path / other).touch()
    remove_temporaries([tmp_path / "a.npy", tmp_path / name, tmp_path / "absent" / "a.npy"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)


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


def in_distillation(model, x):
    """Head outputs of [B, S] as the loss of distillation takes them."""
    (hidden,), _ = Objective(model, {"plain": 1.0}, "mse", "auto").views(x, None, None)
    return model.heads(model.head_inputs(hidden))


def test_layer_gradient_scaling_is_the_published_product(student):
    """(1 - m_i) at head i, then m_i ... m_0 down the stream, with m_i = (L - i) / (L - i + 1).

    Without reuse: a shared map is a second way down, past the stream's factors.
    """
    student = ARMHuBERT(dataclasses.replace(student.config, pattern="CC")).eval()
    plain = ARMHuBERT(dataclasses.replace(student.config, scale_layer_gradients=False)).eval()
    plain.load_state_dict(student.state_dict())
    x, norms = torch.randn(1, 2000), (student.norm.weight, plain.norm.weight)
    for head, share in ((0, 1 / 3 * 2 / 3), (1, 1 / 2 * 1 / 2 * 2 / 3)):
        scaled, unscaled = (
            torch.autograd.grad(in_distillation(m, x)[head].square().sum(), norm)[0]
            for m, norm in zip((student, plain), norms, strict=True)
        )
        torch.testing.assert_close(scaled, share * unscaled, rtol=1e-4, atol=1e-6 * float(unscaled.abs().max()))


def test_gradients_are_scaled_in_distillation_alone(student, tmp_path):
    """A student that is fine-tuned, with its heads or without, learns as an encoder that was never distilled."""
    plain = ARMHuBERT(dataclasses.replace(student.config, scale_layer_gradients=False)).eval()
    plain.load_state_dict(student.state_dict())
    student.save_pretrained(tmp_path)
    x = torch.randn(1, 2000)

    def gradient(model, **how):
        model.zero_grad()
        model(x, **how).last_hidden_state.square().sum().backward()
        return model.norm.weight.grad

    expected = gradient(plain)
    assert torch.equal(gradient(student), expected)
    assert torch.equal(gradient(student, projections=False), expected)
    assert torch.equal(gradient(ARMHuBERT.from_pretrained(tmp_path, heads=False)), expected)
    through_heads = [
        torch.autograd.grad(m(x).projections[0].square().sum(), m.norm.weight)[0] for m in (student, plain)
    ]
    assert torch.equal(*through_heads)
    scaled = torch.autograd.grad(in_distillation(student, x)[0].square().sum(), student.norm.weight)[0]
    assert not torch.allclose(scaled, through_heads[0], rtol=0.1)
    features, _ = TorchaudioEncoder(student).extract_features(x)
    student.zero_grad()
    features[-1].square().sum().backward()
    assert torch.equal(student.norm.weight.grad, expected)


def test_waveforms_that_are_no_tensor_are_one_line(student):
    with pytest.raises(ArmhubertError, match=r"waveforms must be a tensor \[B, S\], got a ndarray"):
        student(np.zeros((1, 2000), dtype=np.float32))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: setattr(m, "heads", None), "heads.bias"),
        (lambda m: setattr(m, "layers", m.layers[:1]), "layers.1."),
        (lambda m: remove_parametrizations(m.position.conv, "weight"), "position.conv."),
        (lambda m: prune.l1_unstructured(m.layers[0].up, "weight", 0.3), "layers.0.up.weight"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(student, tmp_path, change, named):
    change(student)
    with pytest.raises(ArmhubertError, match=f"{re.escape(named)}.* is not in the model as its configuration has it"):
        student.save_pretrained(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_subclass_with_another_constructor_is_saved(student, tmp_path):
    class Named(ARMHuBERT):
        def __init__(self, config, name):
            super().__init__(config)
            self.name = name

    Named(student.config, "mine").save_pretrained(tmp_path)
    assert ARMHuBERT.from_pretrained(tmp_path).config == student.config


def test_a_model_without_values_is_not_saved(student, tmp_path):
    with pytest.raises(ArmhubertError, match="is on the meta device and has no values to save"):
        student.to("meta").save_pretrained(tmp_path / "s")


def test_a_mask_that_is_no_tensor_is_one_line(student):
    with pytest.raises(ArmhubertError, match=r"mask must be a bool tensor \[B, T\], got a list"):
        student(torch.zeros(1, 2000), mask=[True])
