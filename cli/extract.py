"""`armhubert extract`: argv -> ExtractConfig -> reports on the screen."""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from armhubert.cli import ui
from armhubert.cli.app import app
from armhubert.cli.signals import stop_on_signal

if TYPE_CHECKING:
    from armhubert.extract import Finished, Report, Started


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

    with stop_on_signal() as stop:
        with contextlib.closing(run(build(ExtractConfig, given, "the options"))) as reports:  # type: ignore[type-var]
            done = _show(reports, stop.asked)
        if not done:
            ui.say(f"Stopped; the same command goes on{', without --force' if force else ''}.")
            stop.leave()


def _show(reports: "Iterator[Report]", should_stop: Callable[[], bool]) -> bool:
    """Consume an extraction's reports: a bar on a terminal; elsewhere lines at the start, every 10 s, the end.

    Returns:
        Whether it came to the end.
    """
    from armhubert.data import Scanning
    from armhubert.extract import Finished, Progress, Started

    live = ui.out.is_terminal
    shown = -10.0
    with ui.bars(disable=not live) as bar:
        task = bar.add_task("examine audio", total=None, detail="")
        for report in reports:
            if isinstance(report, Scanning):
                bar.update(task, completed=report.done, total=report.total)
            elif isinstance(report, Started):
                bar.remove_task(task)
                ui.say(_plan(report, live))
                task = bar.add_task("extract", total=report.recordings, detail="")
            elif isinstance(report, Progress):
                bar.update(task, completed=report.done, detail=f"{report.rate:.0f} h of audio an hour")
                if not live and report.seconds - shown >= 10:
                    shown = report.seconds
                    ui.say(
                        f"extract done={report.done} of={report.recordings} audio_seconds={report.audio_seconds:.1f} "
                        f"hours_an_hour={report.rate:.1f}"
                    )
            else:
                bar.stop()
                ui.say(_end(report, live))
            if not isinstance(report, Finished) and should_stop():
                return False
    return True


def _plan(report: "Started", live: bool) -> str:
    skipped, before = sum(report.skipped.values()), report.finished
    if not live:
        return (
            f"start model={shlex.quote(report.config.model)} parameters={report.parameters} "
            f"features={','.join(report.features)} width={report.width} recordings={report.recordings} "
            f"seconds={report.seconds:.1f} finished_before={before} long={report.long} skipped={skipped} "
            f"{f'listed={shlex.quote(str(report.skipped_report))} ' if skipped else ''}"
            f"padding={report.padding_waste:.3f} out={shlex.quote(report.config.out)}"
        )
    names = report.features if len(report.features) < 4 else (report.features[0], "...", report.features[-1])
    text = f"{', '.join(names)} of {report.recordings} recordings, {ui.duration(report.seconds)}, on {report.device}"
    if before:
        text += f"; {before} were finished before"
    if report.long:
        text += f"; {report.long} longer than {report.config.chunk_seconds:g} s pass in windows"
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.skipped.items())
        text += f"; skipped: {kinds}, listed in {report.skipped_report}"
    return text


def _end(report: "Finished", live: bool) -> str:
    if not live:
        return (
            f"finished recordings={report.recordings} finished_before={report.finished_before} "
            f"skipped={report.skipped} audio_seconds={report.audio_seconds:.1f} seconds={report.seconds:.1f} "
            f"bytes={report.bytes} out={shlex.quote(str(report.out))}"
        )
    return (
        f"{report.recordings} recordings, {ui.duration(report.audio_seconds)} of audio, "
        f"in {ui.duration(report.seconds)}: {report.bytes / 1e6:.1f} MB in {report.out}"
    )
