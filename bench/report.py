"""Render the README's results from bench/results/*.json, between its two markers."""

import json
from pathlib import Path
from typing import Any

from armhubert.bench.compare_runs import last_common_step
from armhubert.files import write_atomic

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RESULTS = Path("bench/results")


def render(results: Path = RESULTS) -> str:
    """The results section, from whichever result files are there."""
    parts = ["## Measured"]
    if (results / "distill-mini.json").is_file():
        parts += _distillation(_read(results / "distill-mini.json"))
    if (results / "teacher-views.json").is_file():
        parts += _teacher_views(_read(results / "teacher-views.json"))
    return "\n\n".join([BEGIN, *parts, END])


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _distillation(content: dict[str, Any]) -> list[str]:
    rows = content["rows"]
    step = last_common_step(rows)
    lines = ["| student | parameters | held-out loss | error by layer |", "|---|---|---|---|"]
    for row in rows:
        at = next(v for v in row["validations"] if v["step"] == step)
        layers = " ".join(f"{x:.3f}" for x in at["layers"])
        lines.append(f"| {row['name']} | {row['parameters_without_heads']:,} | {at['loss']:.4f} | {layers} |")
    settings = rows[0]["settings"]
    return [
        f"Teacher mini (5.6 M parameters) distilled for {step} steps of {settings['batch_seconds']:g} s of "
        f"LibriSpeech train-clean-5 ({_conditions(content)}). The error is that of clean input against the clean "
        "teacher on held-out utterances, which is what `plain` trains for; `masking` also has to learn the masked "
        "frames and, after so few steps, is far behind on it. Whose features are better is for SUPERB's tasks to say.",
        "\n".join(lines),
        "![held-out error](bench/results/distill-mini.png)",
    ]


def _teacher_views(content: dict[str, Any]) -> list[str]:
    lines = ["| batch | two plain passes | one pass, two views | ratio |", "|---|---|---|---|"]
    for row in content["rows"]:
        two, one = row["two_plain_passes_s"]["median"], row["teacher_targets_s"]["median"]
        lines.append(f"| {row['batch']} x {row['seconds']:g} s | {two:.2f} s | {one:.2f} s | {row['speedup']:.2f}x |")
    return [
        "Both views of a HuBERT Base teacher (random weights, float32), against running it twice; medians of "
        f"interleaved runs ({_conditions(content)}).",
        "\n".join(lines),
    ]


def _conditions(content: dict[str, Any]) -> str:
    c = content["conditions"]
    return f"{c['device']}, torch {c['torch']}, {c['date']}"


def main() -> None:
    """Rewrite the README's section."""
    path = Path("README.md")
    text = path.read_text("utf-8")
    before, rest = text.split(BEGIN)
    write_atomic(path, before + render() + rest.split(END)[1])
