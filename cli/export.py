"""`armhubert export`: argv -> ExportConfig -> reports on the screen."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from armhubert.cli import ui
from armhubert.cli.app import app

if TYPE_CHECKING:
    from armhubert.export import Report


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A student's folder, a released .ckpt, a hub id, or any teacher.")],
    out: Annotated[str, typer.Argument(help="The file to write: .onnx, or .pt2 with --format torch or aot.")],
    format: Annotated[
        str,
        typer.Option(
            help="onnx; torch, for torch.export.load; aot: compiled for this processor, loaded by AOTInductor."
        ),
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="8-bit weights in linear layers; reports size, speed and feature error.")
    ] = False,
    heads: Annotated[
        bool, typer.Option("--heads/--no-heads", help="Give the outputs of the distillation heads too.")
    ] = False,
    hidden_states: Annotated[bool, typer.Option("--hidden-states", help="Give all hidden states too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a model for other runtimes, checked against the model at five lengths and batch sizes first."""
    given = dict(locals())
    from armhubert.export import ExportConfig
    from armhubert.export import export as run
    from armhubert.settings import build

    ui.silence_libraries()
    _show(run(build(ExportConfig, given, "the options")))
    if int8 and format == "torch":
        ui.note("import torchao before torch.export.load reads it")


def _show(reports: "Iterator[Report]") -> None:
    """Consume an export's reports: its stages as progress, then what was written and what the check found."""
    from armhubert.config import SAMPLE_RATE
    from armhubert.export import Exported, Stage

    with ui.progress() as show:
        for report in reports:
            if isinstance(report, Stage):
                show(report.name, 0, None)
    assert isinstance(report, Exported), "the last report tells the end"
    table = Table("batch", "longest", "largest difference", box=None, padding=(0, 2, 0, 0))
    for check in report.checks:
        table.add_row(str(check.utterances), f"{check.samples / SAMPLE_RATE:.3f} s", f"{check.difference:.1e}")
    ui.draw(table)
    if report.quantised is not None:
        int8 = report.quantised
        before, after = int8.float_time.median, int8.time.median
        ui.say(
            f"int8: {int8.float_bytes / report.bytes:.2f}x smaller, {before / after:.2f}x as fast ({before:.3f} -> "
            f"{after:.3f} s for 10 s here, medians of interleaved runs), feature error {int8.error:.2%}, "
            f"of another batch {int8.padding:.2%}"
        )
    if report.ignored:
        ui.note(f"{ui.grouped(report.ignored)}: no part of the encoder, and not in the file")
    ui.say(f"{report.path}: {report.bytes / 1e6:.1f} MB, {', '.join(report.inputs)} -> {', '.join(report.outputs)}")
