"""The README's Python, run: with a small student where it says "runs/demo"."""

import re
from pathlib import Path

import pytest
import torch

from armhubert import ARMHuBERT
from armhubert.config import preset

README = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    ARMHuBERT(preset("mini")).save_pretrained(folder / "runs/demo")
    return folder


def test_the_snippets_of_the_readme_run_in_order(demo, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(demo)
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) >= 4
    assert names["model"] is not None


def test_the_readme_shows_every_interface():
    section = README.split("## Use it in your code")[1].split("\n## ")[0]
    for name in ("ARMHuBERT.from_pretrained", "AutoModel.from_pretrained", "TorchaudioEncoder", "armhubert.s3prl"):
        assert name in section
