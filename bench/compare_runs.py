"""Runs of `armhubert distill` side by side: held-out error over the steps and by layer, as JSON and PNG.

python -m armhubert.bench compare_runs --name distill-mini reuse=runs/reuse "no reuse=runs/noreuse"
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from armhubert import figures
from armhubert.bench import output
from armhubert.errors import ArmhubertError
from armhubert.runlog import METRICS, read_metrics
from armhubert.settings import read_mapping
from armhubert.student import ARMHuBERT, count_parameters


def summarize(name: str, folder: Path) -> dict[str, Any]:
    """One row: what the run was, and its held-out error at every validation."""
    settings = read_mapping(folder / "distill.json")
    rows = read_metrics(folder / METRICS)
    valid = [row for row in rows if row["kind"] == "valid"]
    if not valid:
        raise ArmhubertError(f"{folder} has no validation in its {METRICS}: nothing to compare")
    student = ARMHuBERT.from_pretrained(folder)
    count = count_parameters(student)
    return {
        "name": name,
        "settings": {key: value for key, value in settings.items() if key not in ("out", "data", "valid")},
        "pattern": student.config.pattern,
        "parameters": count.total,
        "parameters_without_heads": count.without_heads,
        "validations": [{key: row[key] for key in ("step", "loss", "layers")} for row in valid],
        "train": [{key: row[key] for key in ("step", "loss")} for row in rows if row["kind"] == "train"],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: held-out loss over the steps; right: error of each layer at the last validation that all runs have."""
    figure, (over_steps, by_layer) = figures.panels(2, width=11, height=4.2)
    step = last_common_step(rows)
    for row in rows:
        points = [(v["step"], v["loss"]) for v in row["validations"]]
        over_steps.plot(*zip(*points, strict=True), marker="o", markersize=3, label=row["name"])
        layers = next(v["layers"] for v in row["validations"] if v["step"] == step)
        by_layer.plot(range(1, len(layers) + 1), layers, marker="o", markersize=4, label=row["name"])
    over_steps.set(xlabel="step", ylabel="held-out loss (unmasked, weighted sum)")
    figures.logarithmic(over_steps)
    by_layer.set(xlabel="layer", ylabel=f"held-out error at step {step}", ylim=(0, None))
    figures.save(figure, path)


def last_common_step(rows: list[dict[str, Any]]) -> int:
    """The last step at which every run was validated.

    Raises:
        ArmhubertError: there is none.
    """
    common = set.intersection(*({v["step"] for v in row["validations"]} for row in rows))
    if not common:
        raise ArmhubertError("runs to compare must have been validated at a common step: these have none")
    return max(common)


def main() -> None:
    """Compare, print, and write NAME.json and NAME.png."""
    parser = output.parser("compare_runs", __doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--name", default="distill")
    options = parser.parse_args()
    pairs = [run.partition("=")[::2] for run in options.runs]
    rows = [summarize(label, Path(folder)) for label, folder in pairs]
    step = last_common_step(rows)
    table = Table("run", "parameters", "loss", "error by layer", title=f"held out, step {step}")
    for row in rows:
        at = next(v for v in row["validations"] if v["step"] == step)
        layers = " ".join(f"{x:.3f}" for x in at["layers"])
        table.add_row(row["name"], f"{row['parameters_without_heads']:,}", f"{at['loss']:.4f}", layers)
    Console().print(table)
    draw(rows, options.out / f"{options.name}.png")
    print(output.write_results(options.name, rows, torch.device("cpu"), options.out))
