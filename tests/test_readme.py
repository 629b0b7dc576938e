"""The README's Python, run: with a small student where it says "runs/demo"."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from armhubert import ARMHuBERT
from armhubert.config import preset

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ARMHuBERT(preset("mini")).save_pretrained(folder / "runs/demo")
    return folder


def test_the_snippets_of_the_readme_run_in_order(demo, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(demo)
    names: dict[str, Any] = {}
    plain, transformers, torchaudio, s3prl, command = BLOCKS
    exec(plain, names)
    output, frames = names["output"], [99, 62]  # of 32,000 and 20,000 samples
    assert names["model"].heads is None
    assert output.last_hidden_state.shape == (2, 99, 160)
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 99, 160)] * 7
    assert output.lengths.tolist() == frames
    exec(transformers, names)
    inputs = names["extractor"](torch.zeros(9000).numpy(), sampling_rate=16_000, return_tensors="pt")
    assert names["model"](**inputs).last_hidden_state.shape == (1, 27, 160)
    exec(torchaudio, names)
    assert names["frames"].tolist() == frames
    states = names["model"].model(names["waveforms"], names["lengths"]).hidden_states
    for found, expected in zip(names["features"], states[1:5], strict=True):
        for row, count in enumerate(frames):
            torch.testing.assert_close(found[row, :count], expected[row, :count])
    exec(s3prl, names)
    assert {tuple(x.shape[::2]) for x in names["hidden_states"]} == {(2, 160)}
    exec(command.replace("steps=150", "steps=1, batch_seconds=5, log_every=1"), names)
    assert capsys.readouterr().out.startswith("1 ")
    assert ARMHuBERT.from_pretrained("runs/own").config.width == preset("mini").width


def test_the_readme_shows_every_interface():
    section = README.split("## Use it in your code")[1].split("\n## ")[0]
    for name in ("ARMHuBERT.from_pretrained", "AutoModel.from_pretrained", "TorchaudioEncoder", "armhubert.s3prl"):
        assert name in section


def test_the_layout_names_every_module():
    section = README.split("## Layout")[1]
    modules = {path.stem for path in (ROOT / "armhubert").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert [name for name in sorted(modules) if name[0] != "_" and not re.search(rf"\b{name}\b", section)] == []


def test_the_speeds_that_the_readme_leads_with_are_those_of_its_table():
    said = re.search(r"(\S+) to (\S+) times as fast .* in float32, (\S+) to (\S+) times in bfloat16", README)
    assert said is not None
    cells = re.findall(r"^\| ([^|]+?) \|" + r" \**([\d.]+)x\** \|" * 8, README, re.MULTILINE)
    rows = {name: speeds for name, *speeds in cells}
    float32, bfloat16 = (sorted(map(float, rows[name])) for name in ("student", "student, bf16"))
    native = [speed for speed in bfloat16 if speed >= 1]  # emulated without the processor's instructions
    assert tuple(map(float, said.groups())) == (float32[0], float32[-1], native[0], native[-1])
