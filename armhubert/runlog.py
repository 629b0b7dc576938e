"""What a run leaves to read and to look at: metrics.jsonl, TensorBoard, loss.png, layers.png."""

import contextlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from armhubert import figures
from armhubert.files import disk_errors, write_atomic

METRICS = "metrics.jsonl"
MOST_POINTS = 2000
"""About so many of a curve are drawn: more cannot be told apart, and take seconds."""


class RunLog:
    """Writes a run's measurements into its folder; on resume, forgets what came after the checkpoint.

    Args:
        folder: of the run.
        step: the step that the run goes on from; 0: anew.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.rows = [row for row in read_metrics(folder / METRICS) if row["step"] <= step] if step else []
        write_atomic(folder / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows))
        if not step:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        with disk_errors(folder):
            self._board = _Board(folder / "tensorboard", step)
            self._file = open(folder / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def add(self, kind: str, step: int, scalars: dict[str, float], layers: tuple[float, ...]) -> None:
        """One measurement: `kind` is train or valid; `layers` the unweighted error of each layer. What is not finite
        becomes null: JSON has no NaN.

        Raises:
            ArmhubertError: the disk is full.
        """
        row: dict[str, Any] = {"kind": kind, "step": step, **{name: _finite(x) for name, x in scalars.items()}}
        row["layers"] = [_finite(round(x, 6)) for x in layers]
        self.rows.append(row)
        with disk_errors(self.folder):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            by_layer = {f"layer_{number:02d}": value for number, value in enumerate(layers, start=1)}
            self._board.add({f"{kind}/{name}": value for name, value in (scalars | by_layer).items()}, step)

    def draw(self) -> None:
        """Rewrite the pictures from everything measured so far; without anything there are none."""
        if not self.rows:
            return
        draw_loss(self.rows, self.folder / "loss.png")
        draw_layers(self.rows, self.folder / "layers.png")

    def close(self) -> None:
        """Flush and close all files; a full disk has been told by `add`, and must not hide another error here."""
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):
                file.close()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Board:
    """TensorBoard's event file. Its own writer uses a thread, whose traceback on a full disk nobody can catch."""

    def __init__(self, folder: Path, step: int) -> None:
        # Here, since slow to import, and only runs need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / f"events.out.tfevents.{time.time_ns()}", "wb")  # noqa: SIM115 - closed by close()
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if step:  # what an earlier part of the run wrote after this step is forgotten
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, values: dict[str, float], step: int) -> None:
        self._write(step=step, summary={"value": [{"tag": tag, "simple_value": v} for tag, v in values.items()]})

    def close(self) -> None:
        self._file.close()

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl. A torn last line, as an interrupted run leaves it, is left out, and so is a row
    that lacks what is drawn: kind, step, loss and layers."""
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if _drawn(row):
            rows.append(row)
    return rows


def _drawn(row: Any) -> bool:
    """Whether a row has all that the pictures need."""
    if not isinstance(row, dict) or not isinstance(row.get("layers"), list):
        return False
    numbers = (row.get("loss", ""), *row["layers"])
    named = isinstance(row.get("kind"), str) and isinstance(row.get("step"), int)
    return named and all(isinstance(number, float | int | None) for number in numbers)


def _thinned(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Rows of a kind, of thousands as many as a picture shows, the last among them."""
    chosen = [row for row in rows if row["kind"] == kind]
    return chosen[:: -max(1, len(chosen) // MOST_POINTS)][::-1]


def draw_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss over the steps."""
    figure, (axes,) = figures.panels()
    axes.set(xlabel="step", ylabel="loss (weighted sum over layers)")
    for kind, style in (("train", {"alpha": 0.75, "linewidth": 1}), ("valid", {"marker": "o", "markersize": 3.5})):
        points = [(row["step"], row["loss"]) for row in _thinned(rows, kind)]
        if points:
            label = {"train": "training, masked", "valid": "held out, unmasked"}[kind]
            alone = {"marker": "o"} if len(points) == 1 else {}
            axes.plot(*zip(*points, strict=True), label=label, **(style | alone))
    figures.logarithmic(axes)
    figures.save(figure, path)


def draw_layers(rows: list[dict[str, Any]], path: Path) -> None:
    """Error of every layer over the steps: of the validation where there is one, else of the training batches."""
    kind = "valid" if any(row["kind"] == "valid" for row in rows) else "train"
    chosen = _thinned(rows, kind)
    figure, (axes,) = figures.panels()
    axes.set(xlabel="step", ylabel=f"error of each layer ({'held out' if kind == 'valid' else 'training'})")
    count = min((len(row["layers"]) for row in chosen), default=0)
    colors = figures.shades(count)
    for layer in range(count):
        points = [(row["step"], row["layers"][layer]) for row in chosen]
        axes.plot(
            *zip(*points, strict=True), color=colors[layer], label=f"layer {layer + 1}", marker="o", markersize=2.5
        )
    figures.logarithmic(axes)
    figures.save(figure, path)
