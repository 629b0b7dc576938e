"""`armhubert extract`: argv -> ExtractConfig -> reports on the screen."""

from typing import Annotated

import typer

from armhubert.cli import ui
from armhubert.cli.app import app


@app.command()
def extract(
    model: Annotated[str, typer.Argument(help="A student's folder, a released .ckpt, a hub id, or any teacher.")],
    data: Annotated[
        list[str], typer.Argument(help="Folders (searched recursively), audio files, TSV or JSONL manifests.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the features; it mirrors the data's folders.")],
    layers: Annotated[
        str,
        typer.Option(
            help="last, all, numbers such as 3,6 (0: input of layer 0), weighted (the mean), or weighted:0.1,0.2,..."
        ),
    ] = "last",
    heads: Annotated[
        bool, typer.Option("--heads", help="Outputs of the distillation heads instead of hidden states.")
    ] = False,
    format: Annotated[
        str, typer.Option(help="npy: one array [T, D] or [N, T, D]; safetensors: a tensor a layer.")
    ] = "npy",
    dtype: Annotated[str, typer.Option(help="Of the files: fp32, fp16, or bf16 (safetensors).")] = "fp32",
    precision: Annotated[str, typer.Option(help="Of the model: fp32, bf16 or fp16.")] = "fp32",
    batch_seconds: Annotated[float, typer.Option(help="Padded audio of a batch.")] = 60.0,
    chunk_seconds: Annotated[float, typer.Option(help="Longer recordings pass in overlapping windows.")] = 60.0,
    context_seconds: Annotated[float, typer.Option(help="Overlap on either side of a window.")] = 5.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read audio.", show_default="2 for a GPU, 0 for a CPU"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compute everything anew, whatever OUT holds.")] = False,
) -> None:
    """Write a model's features of audio, one file a recording; run it again to compute what is missing."""
    given = dict(locals())
    from armhubert.extract import ExtractConfig
    from armhubert.extract import extract as run
    from armhubert.settings import build

    ui.show_extraction(run(build(ExtractConfig, given, "the options")))
