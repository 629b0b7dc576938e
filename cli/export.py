"""`armhubert export`: argv -> ExportConfig -> reports on the screen."""

from typing import Annotated

import typer

from armhubert.cli import ui
from armhubert.cli.app import app


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
    ui.show_export(run(build(ExportConfig, given, "the options")))
