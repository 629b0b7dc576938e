"""The commands, in one place."""

from typing import Annotated

import typer

app = typer.Typer(
    name="armhubert",
    help="Compress speech models (HuBERT, wav2vec 2.0, WavLM) by attention map reusing and masking distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from armhubert import __version__

        typer.echo(f"armhubert {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


# Each module adds its command to `app`.
from armhubert.cli import convert, distill, evaluate, export, extract, info, plan, profile  # noqa: E402, F401
