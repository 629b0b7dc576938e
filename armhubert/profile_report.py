"""What is left of a profile: JSON for programs, CSV for tables, pictures."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from armhubert import figures
from armhubert.baselines import BASELINES
from armhubert.files import write_atomic
from armhubert.profile import Cell, Model, Profile
from armhubert.quality import COSTS, Comparison

FILES = ("profile.json", "profile.csv", "profile.png")
"""What every profile leaves."""

LENGTHS = 4
"""Lengths from which cost against length is a curve worth a picture."""


def as_json(result: Profile, quality: Comparison | None = None) -> dict[str, Any]:
    """The profile as plain data; ratios are those of its own cells."""
    content: dict[str, Any] = {
        "conditions": result.conditions,
        "rates": result.rates._asdict(),
        "models": [model._asdict() for model in result.models],
        "memory_shape": result.memory_shape,
        "cells": [{**cell._asdict(), "timings": _plain(cell.timings)} for cell in result.cells],
    }
    if result.ragged:
        content["ragged"] = [
            {**row._asdict(), "timings": _plain(row.timings), "rates": {way: row.rate(way) for way in row.timings}}
            for row in result.ragged
        ]
    if quality is not None:
        content["quality"] = {**quality._asdict(), "points": [point._asdict() for point in quality.points]}
    return content


def _plain(timings: dict[str, Any]) -> dict[str, Any]:
    return {name: timing._asdict() for name, timing in timings.items()}


def write(result: Profile, folder: Path, quality: Comparison | None = None) -> list[Path]:
    """profile.json, profile.csv (a row a model and cell) and profile.png in `folder`; profile-length.png where there
    are enough lengths, profile-quality.png where two models or more have a quality.
    """
    paths = [folder / name for name in FILES]
    write_atomic(paths[0], json.dumps(as_json(result, quality), indent=1) + "\n")
    write_atomic(paths[1], _rows(result))
    draw(result, paths[2])
    if len(_curve(result)) >= LENGTHS:
        paths.append(folder / "profile-length.png")
        draw_lengths(result, paths[-1])
    if quality is not None and len({point.model for point in quality.points}) > 1:
        paths.append(folder / "profile-quality.png")
        draw_quality(result, quality, paths[-1])
    return paths


def _rows(result: Profile) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["model", "mode", "batch", "seconds", "median_s", "low_s", "high_s", "real_time_factor"])
    for cell in result.cells:
        for model in result.models:
            timing = cell.timings.get(model.name)
            factor = timing.median / (cell.batch * cell.seconds) if timing else "-"
            table.writerow([model.source, model.mode, cell.batch, cell.seconds, *(timing or ("-", "-", "-")), factor])
    return text.getvalue()


def label(model: Model) -> str:
    """A model's name for tables and pictures: the last part of its source, and its mode where it is not eager."""
    name = model.source if model.source in BASELINES else Path(model.source).name or model.source
    return name if model.mode == "eager" else f"{name}, {model.mode}"


# ---- pictures ---------------------------------------------------------------


def draw(result: Profile, path: Path) -> None:
    """Left: speed of every cell, in seconds of audio a second; right: where the eager passes spend their time."""
    figure, (speed, parts) = figures.panels(2, width=15, height=1.6 + 0.42 * len(result.models) + 2)
    names = [label(model) for model in result.models]
    height = 0.8 / len(result.cells)
    for i, (cell, color) in enumerate(zip(result.cells, figures.shades(len(result.cells)), strict=True)):
        rates = [
            cell.batch * cell.seconds / cell.timings[model.name].median if model.name in cell.timings else 0
            for model in result.models
        ]
        offsets = [row + (i + 0.5) * height - 0.4 for row in range(len(names))]
        speed.barh(offsets, rates, height, color=color, label=f"{cell.batch} x {cell.seconds:g} s")
    speed.set(xlabel="seconds of audio a second", yticks=range(len(names)), yticklabels=names)
    speed.invert_yaxis()
    eager = [model for model in result.models if model.stages]
    left = [0.0] * len(eager)
    kinds = list(dict.fromkeys(stage for model in eager for stage in model.stages))
    for stage, color in zip(kinds, figures.shades(len(kinds)), strict=True):
        widths = [model.stages.get(stage, 0.0) for model in eager]
        parts.barh(range(len(eager)), widths, 0.6, left=left, color=color, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    parts.set(xlabel="seconds for 1 x 10 s, by stage (eager)", yticks=range(len(eager)))
    parts.set_yticklabels([label(model) for model in eager])
    parts.invert_yaxis()
    for panel in (speed, parts) if eager else (speed,):
        panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, which fill the panel
    figures.save(figure, path)


def _curve(result: Profile) -> list[Cell]:
    return [cell for cell in result.cells if cell.batch == 1]


def draw_lengths(result: Profile, path: Path) -> None:
    """Seconds and memory of a pass against seconds of audio, batch size 1; a line ends where a model was left out."""
    cells = _curve(result)
    told = any(cell.memory for cell in cells)
    figure, panels = figures.panels(1 + told, width=figures.WIDTH * (1.6 if told else 1), height=5)
    values = [{name: timing.median for name, timing in cell.timings.items()} for cell in cells]
    mebibytes = [{name: size / 2**20 for name, size in cell.memory.items() if size} for cell in cells]
    for panel, points, title in zip(
        panels, (values, mebibytes), ("seconds a pass", "MiB that a pass adds to the process"), strict=False
    ):
        for number, model in enumerate(result.models):
            line = [(c.seconds, p[model.name]) for c, p in zip(cells, points, strict=True) if model.name in p]
            if line:
                panel.plot(*zip(*line, strict=True), label=label(model), **figures.line_style(number))
        figures.logarithmic(panel)
        figures.logarithmic(panel, "x")
        panel.set(xlabel="seconds of audio, batch size 1", ylabel=title)
    figures.save(figure, path)


def draw_quality(result: Profile, quality: Comparison, path: Path) -> None:
    """A panel a task and cost: better is up, cheaper is left; the line is the best that can be had at a cost."""
    tasks = list(dict.fromkeys(point.task for point in quality.points))
    costs = [name for name in COSTS if any(name in point.costs for point in quality.points)]
    names = {model.name: label(model) for model in result.models}
    figure, panels = figures.panels(
        len(tasks), rows=len(costs), width=5.5 * max(len(tasks), 1.2), height=4.2 * len(costs)
    )  # fmt: skip
    grid = [(cost, task) for cost in costs for task in tasks]
    for panel, (cost, task) in zip(panels, grid, strict=True):
        shown = [point for point in quality.points if point.task == task and cost in point.costs]
        front = sorted((point for point in shown if cost in point.front), key=lambda point: point.costs[cost])
        panel.plot(
            [p.costs[cost] for p in front], [p.value for p in front], "o-", drawstyle="steps-post", label="Pareto front"
        )  # fmt: skip
        rest = [point for point in shown if cost not in point.front]
        panel.plot([p.costs[cost] for p in rest], [p.value for p in rest], "o", color="gray")
        for point in shown:
            panel.annotate(
                names[point.model], (point.costs[cost], point.value), textcoords="offset points", xytext=(6, -11)
            )  # fmt: skip
        panel.margins(x=0.25, y=0.15)
        best = shown[0]
        unit = f", {best.unit}" if best.unit else ""
        panel.set(xlabel=COSTS[cost], ylabel=f"{best.title}: {best.metric}{unit}")
        if not best.higher_is_better:
            panel.invert_yaxis()
    figures.save(figure, path)
