"""What a result looks like: confusion matrix, learned layer weights, errors by phone, DET curve, training. As PNG."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from armhubert import figures
from armhubert.superb import metrics

MOST_CLASSES = 60
"""A confusion matrix of more has no readable labels; it is drawn without."""
LONGEST = 40
"""Characters of a name that a picture shows."""


def draw(result: Mapping[str, Any]) -> dict[str, bytes]:
    """Every picture that a result has data for, by name."""
    details, source = result["details"], result["model"]["source"]
    runs = each_fold({source: result})
    weighted = {name: run for name, run in runs.items() if len(run.get("layer_weights") or ()) > 1}
    found = {
        "training": training(runs) if all(run.get("history") for run in runs.values()) else None,
        "layers": layer_weights(weighted) if weighted else None,
        "confusion": confusion(details["confusion"]) if details["confusion"] else None,
        "labels": errors_by_label(details["by_label"]) if details["by_label"] else None,
        "det": det({source: details["detection"]}) if details["detection"] else None,
    }
    return {name: picture for name, picture in found.items() if picture is not None}


def each_fold(by_model: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Results by name; one of several folds becomes as many, each with what is its own."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, result in by_model.items():
        folds = result.get("folds", ())
        found |= {f"fold {number} of {name}": {**result, **own} for number, own in enumerate(folds, 1)}
        if not folds:
            found[name] = result
    return found


def plain(text: str) -> str:
    """A name as matplotlib shows it as it is: no formulas, and short enough for a legend."""
    short = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return short.replace("$", r"\$")


def training(by_model: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Training loss and the deciding metric on dev over the steps; a dot at the step that was chosen."""
    figure, (left, right) = figures.panels(2)
    for (model, result), color in zip(by_model.items(), figures.shades(len(by_model)), strict=True):
        name = next(iter(result["dev"]))
        loss, dev = (
            {row["step"]: row[key] for row in result["history"] if row["kind"] == kind}
            for kind, key in (("train", "loss"), ("dev", name))
        )
        left.plot([*loss], [*loss.values()], color=color, label=plain(model))
        left.set(xlabel="step", ylabel="training loss")
        right.plot([*dev], [*dev.values()], color=color)
        right.plot(result["best_step"], dev[result["best_step"]], "o", color=color)
        right.set(xlabel="step", ylabel=f"{name} on dev")
    right.ticklabel_format(axis="y", useOffset=False)
    return figures.png(figure)


def layer_weights(by_model: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Softmax weights of the layers, a line for each result: 0 is the input of the first layer, heads are at theirs."""
    figure, (axes,) = figures.panels()
    for (name, result), color in zip(by_model.items(), figures.shades(len(by_model)), strict=True):
        weights, first = result["layer_weights"], int(result["model"].get("features") == "heads")
        axes.plot(
            range(first, first + len(weights)), weights, marker="o", color=color, label=plain(name), clip_on=False
        )
    axes.set(xlabel="layer", ylabel="weight", ylim=(0, None))
    return figures.png(figure)


def confusion(matrix: Mapping[str, Any]) -> bytes:
    """Shares of each true class (rows) taken for each class (columns)."""
    counts = np.asarray(matrix["counts"], float)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labels, size = [plain(label) for label in matrix["labels"]], len(matrix["labels"])
    side = min(16.0, max(4.5, 0.28 * size + 2))
    figure, (axes,) = figures.panels(width=side + 1, height=side)
    axes.grid(visible=False)
    picture = axes.imshow(share, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the true class")
    if size <= MOST_CLASSES:
        axes.set_xticks(range(size), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(size), labels, fontsize=7)
    axes.set(xlabel="predicted", ylabel="true")
    return figures.png(figure)


def errors_by_label(by_label: Mapping[str, Sequence[int]]) -> bytes:
    """Substitutions and deletions of each token, in percent of its occurrences, the worst first."""
    shares = sorted(
        ((100 * wrong / max(1, total), total, name) for name, (wrong, total) in by_label.items()), reverse=True
    )
    figure, (axes,) = figures.panels(width=max(figures.WIDTH, 0.22 * len(shares) + 2))
    axes.bar([plain(name) for _, _, name in shares], [share for share, _, _ in shares], color=figures.shades(3)[1])
    axes.tick_params(axis="x", labelsize=7, labelrotation=90)
    axes.margins(x=0.01)
    axes.set(ylabel="substituted or deleted, %")
    return figures.png(figure)


def det(by_model: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Detection error trade-off: misses against false alarms, both axes in normal deviates."""
    from statistics import NormalDist

    ticks = (0.1, 0.5, 1, 2, 5, 10, 20, 40)
    deviate = NormalDist().inv_cdf
    figure, (axes,) = figures.panels(width=figures.HEIGHT + 1.2, height=figures.HEIGHT + 0.6)
    for (name, trials), color in zip(by_model.items(), figures.shades(len(by_model)), strict=True):
        curve = metrics.detection_curve(trials["targets"], trials["scores"])
        alarm, miss = (np.clip(np.asarray(rate, float), 5e-4, 1 - 5e-4) for rate in (curve.false_alarms, curve.misses))
        label = f"{plain(name)}, EER {metrics.equal_error_rate(curve):.2f} %"
        axes.plot([deviate(x) for x in alarm], [deviate(x) for x in miss], color=color, label=label)
    places = [deviate(tick / 100) for tick in ticks]
    axes.set_xticks(places, [f"{tick:g}" for tick in ticks])
    axes.set_yticks(places, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel="false alarms, %", ylabel="misses, %")
    axes.set(xlim=(deviate(5e-4), deviate(0.6)), ylim=(deviate(5e-4), deviate(0.6)))
    return figures.png(figure)
