"""`armhubert convert`: other people's weights -> a folder of ours."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armhubert.cli import ui
from armhubert.cli.app import app

if TYPE_CHECKING:
    from armhubert.convert.folder import Converted


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
    _show(report)


def _show(report: "Converted") -> None:
    """What became of a source's tensors: one line an ignored group, and the settings nobody stated."""
    config, count = report.config, report.parameters
    ui.say(
        f"mapped {len(report.mapped)} tensors, {count.total} parameters ({count.without_heads} without heads): "
        f"{config.layers} layers of width {config.width}, pattern {config.pattern}, "
        f"maps read as {config.attention_mode}"
    )
    ui.say("missing none")
    ui.say(f"ignored {len(report.ignored)}" + (f": {ui.grouped(report.ignored)}" if report.ignored else ""))
    if report.inferred:
        ui.say(f"not stated by the source, taken from published models of this size: {', '.join(report.inferred)}")
    ui.say(f"wrote {report.out}, read back equal")
