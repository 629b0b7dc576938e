"""What suites of `armhubert evaluate` left, as one compact JSON and PNG: metrics, settings, hashes, learned weights.

python -m armhubert.bench superb --name superb-mini runs/superb/fbank runs/superb/mini "student=runs/superb/student"
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from armhubert import figures
from armhubert.bench import output
from armhubert.errors import ArmhubertError
from armhubert.settings import read_mapping
from armhubert.superb.runner import RESULT_FILE
from armhubert.superb.tasks import TASKS

KEPT = ("metrics", "tests", "dev", "best_step", "sweep", "folds", "head", "changed", "data", "notes")


def summarize(name: str, folder: Path) -> dict[str, Any]:
    """One row: a model, and what it reached on every task that is done.

    Raises:
        ArmhubertError: no result in the folder.
    """
    results = {name: read_mapping(path) for name in TASKS if (path := folder / name / RESULT_FILE).is_file()}
    if not results:
        raise ArmhubertError(f"{folder} has no <task>/{RESULT_FILE}: give a model's folder of an evaluated suite")
    model = next(iter(results.values()))["model"]
    run = Path(model["source"]) / "distill.json"
    distilled = read_mapping(run) if run.is_file() else {}
    return {
        "name": name,
        "model": {key: value for key, value in model.items() if key != "source"},
        "distilled": {key: value for key, value in distilled.items() if key not in ("out", "data", "valid")},
        "tasks": {task: _task(result, TASKS[task].metrics[0].name) for task, result in results.items()},
    }


def _task(result: dict[str, Any], decides: str) -> dict[str, Any]:
    return {
        **{key: result[key] for key in KEPT if result.get(key)},
        "learning_rate": result["training"].get("learning_rate"),  # folds may have one each
        "seed": result["config"]["seed"],
        "layer_weights": [round(weight, 4) for weight in result.get("layer_weights", ())],
        "dev_curve": [[row["step"], row[decides]] for row in result.get("history", ()) if row["kind"] == "dev"],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: PER on dev while pr's heads learn; then, for every model of several layers, the tasks' learned weights."""
    learned = {
        row["name"]: {task: found["layer_weights"] for task, found in row["tasks"].items() if found["layer_weights"]}
        for row in rows
    }
    deep = [row for row in rows if row["model"]["layers"] > 1 and learned[row["name"]]]
    figure, (left, *maps) = figures.panels(1 + len(deep), width=5 + 3.2 * len(deep), height=4)
    for row in rows:
        if curve := row["tasks"].get("pr", {}).get("dev_curve"):
            left.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=row["name"])
    left.set(xlabel="step", ylabel="pr: PER on dev, %")
    for row, panel in zip(deep, maps, strict=True):
        weights = learned[row["name"]]
        panel.grid(visible=False)
        image = panel.imshow(np.array(list(weights.values())), vmin=0, cmap="viridis", aspect="auto")
        panel.set_yticks(range(len(weights)), list(weights))
        panel.set(xlabel=f"{row['model']['features']} layer", title=row["name"])
        figure.colorbar(image, ax=panel, label="learned weight")
    figures.save(figure, path)


def main() -> None:
    """Collect, and write NAME.json and NAME.png."""
    parser = output.parser("superb", __doc__)
    parser.add_argument("models", nargs="+", metavar="[LABEL=]FOLDER")
    parser.add_argument("--name", default="superb")
    parser.add_argument("--note", default="", help="what no file tells, such as how a student's run went")
    options = parser.parse_args()
    pairs = [(model.rpartition("=")[0] or Path(model).name, model.rpartition("=")[2]) for model in options.models]
    rows: list[dict[str, Any]] = [summarize(label, Path(folder)) for label, folder in pairs]
    draw(rows, options.out / f"{options.name}.png")
    rows[0]["note"] = options.note
    print(output.write_results(options.name, rows, torch.device("cpu"), options.out))
