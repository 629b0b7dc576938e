import dataclasses
import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from armhubert import ARMHuBERT, ArmhubertError, forecast
from armhubert import export as module
from armhubert.config import preset
from armhubert.export import CASES, TOLERANCE, ExportConfig, Exported, Stage, export

pytest.importorskip("onnxruntime", reason="needs armhubert[onnx]")

SMALL = dataclasses.replace(
    preset("mini"),
    conv_layers=((16, 10, 5), *((16, 3, 2),) * 4, (64, 2, 2), (64, 2, 2)),
    width=64,
    layers=2,
    heads=2,
    ffn=64,
    pattern="CR",
    projection_width=24,
    attention_mode="resoftmax",
)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ARMHuBERT(SMALL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def onnx_file(student) -> tuple[Path, list]:
    """Everything at once: all outputs, and int8 beside."""
    path = student.parent / "student.onnx"
    settings = {"heads": True, "hidden_states": True}
    return path, list(export(ExportConfig(str(student), str(path), **settings)))


@pytest.fixture(scope="module")
def torch_file(student) -> tuple[Path, list]:
    path = student.parent / "student.pt2"
    return path, list(export(ExportConfig(str(student), str(path), format="torch")))


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    waveforms = torch.randn(3, 21_000, generator=generator) * torch.tensor([[0.01], [1.0], [0.1]])
    return waveforms, torch.tensor([9_000, 21_000, 720])


def assert_equals_each_alone(student: Path, run) -> None:
    """Outputs of a padded batch, whatever the padding holds, are those of each utterance alone in the model."""
    waveforms, lengths = ragged()
    for row, length in enumerate(lengths.tolist()):
        waveforms[row, length:] = 100.0
    model = ARMHuBERT.from_pretrained(student)
    last, *others, frames = run(waveforms, lengths)
    assert frames.tolist() == SMALL.frames(lengths).tolist()
    for row, (length, count) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        with torch.no_grad():
            alone = model(waveforms[row : row + 1, :length])
        torch.testing.assert_close(last[row, :count], alone.last_hidden_state[0], rtol=0, atol=TOLERANCE)
        for found, expected in zip(others, (alone.hidden_states, alone.projections), strict=False):
            torch.testing.assert_close(found[:, row, :count], torch.cat(expected), rtol=0, atol=TOLERANCE)


def test_onnx_gives_what_the_model_gives(student, onnx_file):
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file[0], providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("waveforms", ["batch", "samples"]),
        ("lengths", ["batch"]),
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("last_hidden_state", ["batch", "frames", 64]),
        ("hidden_states", [3, "batch", "frames", 64]),
        ("projections", [2, "batch", "frames", 24]),
        ("frames", ["batch"]),
    ]
    assert session.get_modelmeta().custom_metadata_map["hop"] == "320"

    def run(waveforms, lengths):
        found = session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})
        return [torch.from_numpy(x) for x in found]

    assert_equals_each_alone(student, run)


def test_a_torch_program_gives_what_the_model_gives_without_this_package(student, torch_file, tmp_path):
    program = torch.export.load(torch_file[0])
    assert "armhubert" not in {
        node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")
    }
    assert_equals_each_alone(student, program.module())
    code = f"""
import sys, torch
program = torch.export.load({str(torch_file[0])!r})
outputs = program.module()(torch.zeros(1, 16000), torch.tensor([16000]))
print([list(x.shape) for x in outputs], "armhubert" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[[1, 49, 64], [1]] False"


def test_a_program_compiled_ahead_gives_what_the_model_gives(student, tmp_path):
    path = tmp_path / "student.pt2"
    list(export(ExportConfig(str(student), str(path), format="aot")))
    program = torch._inductor.aoti_load_package(str(path))
    assert program.get_metadata()["armhubert.hop"] == "320"
    assert_equals_each_alone(student, program)


def test_without_a_compiler_nothing_is_compiled_ahead(student, tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ArmhubertError, match=r"needs a C\+\+ compiler: install"):
        list(export(ExportConfig(str(student), str(tmp_path / "m.pt2"), format="aot")))
    assert not list(tmp_path.iterdir())


def test_a_profiled_program_has_no_file(student, tmp_path, monkeypatch):
    (tmp_path / "unnamed.onnx").write_text("mine")
    monkeypatch.chdir(tmp_path)
    program = module.OnnxProgram(module.onnx_file(ARMHuBERT.from_pretrained(student, heads=False)))
    assert [x.shape[1:] for x in program(torch.zeros(1, 16_000), torch.tensor([16_000]))] == [(49, 64), ()]
    assert [path.name for path in tmp_path.iterdir()] == ["unnamed.onnx"]


def test_onnx_gives_back_what_it_has_pooled(onnx_file):
    program = module.OnnxProgram(onnx_file[0].read_bytes())
    short, long = (torch.zeros(1, 16_000 * s) for s in (1, 40))
    want = program(short, torch.tensor([16_000]))[0]
    pooled = forecast._measure(lambda: program(long, torch.tensor([16_000 * 40])), torch.device("cpu")).kept
    assert pooled > 16 << 20  # a map of 2,000 frames, at least
    got = []
    back = forecast._measure(lambda: got.extend(program(short, torch.tensor([16_000]), shrink=True)), want.device).kept
    assert back < -0.9 * pooled
    assert torch.equal(got[0], want)


@pytest.mark.parametrize("which", ["onnx_file", "torch_file"])
def test_the_check_is_reported_by_case(request, which):
    path, reports = request.getfixturevalue(which)
    end = reports[-1]
    assert isinstance(end, Exported)
    assert reports[0] == Stage("trace")
    assert (end.path, end.bytes, end.quantised) == (path, path.stat().st_size, None)
    assert [check.utterances for check in end.checks] == [utterances for utterances, _ in CASES]
    assert len({check.samples for check in end.checks}) == 5
    assert all(0 < check.difference <= TOLERANCE for check in end.checks)


def test_a_program_that_differs_is_not_written(student, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_trace", lambda model: None)
    monkeypatch.setattr(module, "_to_bytes", lambda *_: b"")
    model = ARMHuBERT.from_pretrained(student, heads=False)

    def slightly_wrong(waveforms, lengths):
        with torch.no_grad():
            output = model(waveforms, lengths)
        return output.last_hidden_state + 2e-4, output.lengths

    monkeypatch.setattr(module, "open_program", lambda *_: slightly_wrong)
    with pytest.raises(ArmhubertError, match=r"differs from the model by 2\.\de-04 at \d x \d+ samples.*not written"):
        list(export(ExportConfig(str(student), str(tmp_path / "m.pt2"), format="torch")))
    monkeypatch.setattr(
        module, "open_program", lambda *_: lambda w, n: (model(w, n)[0] * float("nan"), model(w, n).lengths)
    )
    with pytest.raises(ArmhubertError, match="differs from the model by inf"):
        list(export(ExportConfig(str(student), str(tmp_path / "m.pt2"), format="torch")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_int8_is_smaller_and_its_error_told(student, onnx_file, torch_file, kind):
    if kind == "torch":
        pytest.importorskip("torchao", reason="needs armhubert[int8]")
    path, _ = onnx_file if kind == "onnx" else torch_file
    data = path.read_bytes()
    reference = module.open_program(data, kind)
    if kind == "onnx":
        handlers = list(logging.getLogger().handlers)
        small = module._quantise_onnx(data)
        assert logging.getLogger().handlers == handlers
    else:
        model = module._Model(ARMHuBERT.from_pretrained(student, heads=False, impl="torch")).eval()
        small = module._quantise_torch(model, {}, "torch")
        stored = torch.export.load(io.BytesIO(small)).state_dict.values()
        matrices = [x for x in stored if x.dtype == torch.int8 and x.ndim == 2 and x.shape[1] > 1]  # not zero points
        assert len(matrices) == 4 * 2  # of each layer: qkv or value, output, up, down
    if kind == "onnx":  # a program's own text outweighs the tensors of a model this small
        assert len(small) < len(data)
    found = module._compare(reference, module.open_program(small, kind), len(data))
    assert 0 < found.error < 0.05
    assert found.padding < (0.05 if kind == "onnx" else found.error)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"out": "m.pt2"},
            r"a file of format onnx must end in \.onnx, got .*m\.pt2.*: choose the name, or format='torch' or "
            r"format='aot'",
        ),
        ({"out": "m.onnx", "format": "torch"}, r"format torch must end in \.pt2.*format='onnx'"),
        ({"out": "there.onnx"}, "exists: choose another name, or force=True"),
        ({"out": "folder.onnx", "force": True}, "is a folder: choose another name"),
    ],
)
def test_files_that_cannot_be_written(tmp_path, settings, says):
    (tmp_path / "there.onnx").write_text("old")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ArmhubertError, match=says):
        ExportConfig("mini", **{**settings, "out": str(tmp_path / settings["out"])})
    assert (tmp_path / "there.onnx").read_text() == "old"


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_traced(student, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "_trace", lambda model: pytest.fail("traced"))
    with pytest.raises(ArmhubertError, match=r"cannot write to .*file"):
        list(export(ExportConfig(str(student), str(tmp_path / "file" / "m.onnx"))))


def test_what_cannot_be_exported(student, tmp_path, monkeypatch):
    ARMHuBERT(dataclasses.replace(SMALL, projection_width=None)).save_pretrained(tmp_path / "bare")
    with pytest.raises(ArmhubertError, match="no distillation heads: leave out heads=True"):
        next(export(ExportConfig(str(tmp_path / "bare"), str(tmp_path / "m.onnx"), heads=True)))
    monkeypatch.setattr(module, "_ONNX_LIMIT", 1000)
    with pytest.raises(ArmhubertError, match="at most 2 GiB"):
        next(export(ExportConfig(str(student), str(tmp_path / "m.onnx"))))
    for missing, extra, settings in (
        ("onnxscript", "onnx", {}),
        ("torchao", "int8", {"format": "torch", "int8": True}),
    ):
        monkeypatch.setitem(sys.modules, missing, None)
        out = tmp_path / ("m.pt2" if settings else "m.onnx")
        remedy = rf'{missing} must be installed for this: pip install "armhubert\[{extra}\]"'
        with pytest.raises(ArmhubertError, match=remedy):
            next(export(ExportConfig(str(student), str(out), **settings)))


def test_the_command(student, tmp_path, monkeypatch, call):
    shown = [
        Stage("trace"),
        Exported(tmp_path / "m.onnx", 10, ("waveforms",), ("frames",), (), None, ("lm_head.bias", "lm_head.weight")),
    ]
    seen = []

    def fake(config):
        seen.append(config)
        yield from shown

    monkeypatch.setattr(module, "export", fake)
    monkeypatch.setattr("logging.disable", lambda level: None)

    code, out, err = call("export", student, tmp_path / "m.onnx", "--int8", "--hidden-states")
    assert (code, err) == (0, "trace\nlm_head.bias, lm_head.weight: no part of the encoder, and not in the file\n")
    assert out.splitlines()[-1].endswith("m.onnx: 0.0 MB, waveforms -> frames")
    assert seen == [ExportConfig(str(student), str(tmp_path / "m.onnx"), int8=True, hidden_states=True)]
    for argv, says in (
        (
            (student, tmp_path / "m.onnx", "--format", "coreml"),
            "--format must be 'onnx' or 'torch' or 'aot'",
        ),
        ((student, tmp_path / "m.bin"), r"must end in \.onnx"),
        ((student, tmp_path / "m.pt2"), "choose the name, or --format torch or --format aot"),
    ):
        code, out, err = call("export", *argv)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert re.search(says, err), err
