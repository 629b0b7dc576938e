"""`armhubert convert`: other people's weights -> a folder of ours."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from armhubert.cli import ui
from armhubert.cli.app import app


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint file (released student, fairseq, s3prl, WavLM, DistilHuBERT, DPHuBERT, torchaudio), "
            "a Hugging Face folder or hub id, or a torchaudio pipeline."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write: config.json, preprocessor_config.json, model.safetensors, README.md."),
    ],
    attention_mode: Annotated[
        str | None,
        typer.Option(help="Read the maps of a released student as exact, for fine-tuning.", show_default="as recorded"),
    ] = None,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Keep the distillation heads.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace our files in OUT although it is not empty.")] = False,
) -> None:
    """Convert weights of another project into a folder that from_pretrained reads; the format is recognised."""
    from armhubert.convert import folder

    mode: Any = attention_mode
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        report = folder.convert(source, out, attention_mode=mode, heads=heads, force=force)
    for warning in caught:
        ui.note(f"warning: {warning.message}")
    ui.show_conversion(report)
