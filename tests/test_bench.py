import json
from pathlib import Path

import torch

from armhubert.bench import report
from armhubert.clock import interleave, write_results

ROOT = Path(__file__).resolve().parents[1]


def test_candidates_are_timed_in_turn():
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert all(t.low <= t.median <= t.high for t in timings.values())


def test_results_carry_their_conditions(tmp_path):
    path = write_results("x", [{"a": 1}], torch.device("cpu"), tmp_path)
    content = json.loads(path.read_text())
    assert content["rows"] == [{"a": 1}]
    assert content["conditions"].keys() >= {"device", "torch", "date"}


def test_the_readme_shows_what_the_result_files_hold():
    text = (ROOT / "README.md").read_text("utf-8")
    shown = report.BEGIN + text.split(report.BEGIN)[1].split(report.END)[0] + report.END
    assert shown == report.render(ROOT / "bench" / "results")
