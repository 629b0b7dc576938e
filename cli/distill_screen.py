"""The screen of `armhubert distill`: a table and bars on a terminal, one parseable line a report elsewhere."""

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text

from armhubert import distill
from armhubert.cli import ui
from armhubert.cli.options import as_typed
from armhubert.data import Scanning

SCAN_TOLD_EVERY = 30.0
"""Seconds between two lines of a scan, without a terminal."""


def show_distillation(reports: Iterator[distill.Report]) -> distill.Finished:
    """Consume a run's reports, of which the last tells the end."""
    leads = int(os.environ.get("RANK", 0)) == 0
    if leads and ui.out.is_terminal:
        report = _show_live(reports)
    else:
        told = time.monotonic()
        for report in reports:
            if isinstance(report, Scanning) and report.done < report.total:
                if time.monotonic() - told < SCAN_TOLD_EVERY:
                    continue
                told = time.monotonic()
            if leads:
                print(_format_line(report), flush=True)
            elif isinstance(report, distill.Unreadable):  # the lead does not know of others' files
                ui.note(_format_line(report))
            if leads and isinstance(report, distill.Started):
                for text in report.notes:
                    ui.note(f"note: {text}")
    assert isinstance(report, distill.Finished)
    if leads and report.reason == "not begun":
        ui.note("Stopped before the first step; the same command starts anew, with the audio examined so far.")
    return report


def _format_line(report: distill.Report) -> str:
    """One line of `kind key=value ...` for logs and scripts, to be split as a shell does."""
    if isinstance(report, Scanning):
        return f"scan done={report.done} total={report.total}"
    if isinstance(report, distill.Started):
        skipped = sum(report.skipped.values())
        return (
            f"start teacher={shlex.quote(Path(report.config.teacher).name)} "
            f"teacher_parameters={report.teacher_parameters} student_parameters={report.student_parameters} "
            f"without_heads={report.student_parameters_without_heads} "
            f"pattern={report.student.pattern} utterances={report.utterances} seconds={report.seconds:.1f} "
            f"valid_utterances={report.valid_utterances} valid_seconds={report.valid_seconds:.1f} skipped={skipped} "
            f"{f'listed={shlex.quote(str(report.skipped_report))} ' if report.skipped_report else ''}"
            f"padding={report.padding_waste:.3f} steps={report.steps} first_step={report.first_step} "
            f"processes={report.processes} out={shlex.quote(report.config.out)}"
        )
    if isinstance(report, distill.Progress):
        return (
            f"train step={report.step} of={report.steps} epoch={report.epoch} loss={report.loss:.5f} "
            f"lr={report.learning_rate:.2e} grad_norm={report.gradient_norm:.3f} masked={report.masked_share:.2f} "
            f"audio_rate={report.audio_rate:.1f} waiting={report.waiting:.2f} eta={report.eta:.0f} "
            f"skipped_steps={report.skipped_steps}"
        )
    if isinstance(report, distill.Validated):
        layers = ",".join(f"{x:.4f}" for x in report.layers)
        return f"valid step={report.step} loss={report.loss:.5f} layers={layers} best={str(report.best).lower()}"
    if isinstance(report, distill.Saved):
        return f"saved step={report.step} path={shlex.quote(str(report.path))}"
    if isinstance(report, distill.Unreadable):
        return f"left-out step={report.step} why={json.dumps(report.why, ensure_ascii=False)}"
    if isinstance(report, distill.StepSkipped):
        return f"skipped step={report.step} in_a_row={report.in_a_row}"
    out = shlex.quote(str(report.out))
    resume = f" resume={shlex.quote(f'armhubert distill --resume {out}')}" if report.reason == "stopped" else ""
    best = f" best_loss={report.best_loss:.5f}" if math.isfinite(report.best_loss) else ""
    return (
        f"finished reason={report.reason.replace(' ', '-')} step={report.step}{best} "
        f"train_seconds={report.seconds:.1f} audio_seconds={report.audio_seconds:.1f} "
        f"peak_memory_mib={report.peak_memory / 2**20:.0f} out={out}{resume}"
    )


def _show_live(reports: Iterator[distill.Report]) -> distill.Report:
    with ui.bars() as bar:
        scanning = training = None
        for report in reports:
            if isinstance(report, Scanning):
                if scanning is None:
                    scanning = bar.add_task("examine audio", total=report.total, detail="")
                bar.update(scanning, completed=report.done, total=report.total)
            elif isinstance(report, distill.Started):
                if scanning is not None:
                    bar.remove_task(scanning)
                bar.console.print(_start_table(report))
                for text in report.notes:
                    bar.console.print(f"note: {as_typed(text, sys.argv[1:])}", style="yellow")
                training = bar.add_task("distil", total=report.steps, completed=report.first_step, detail="")
            elif isinstance(report, distill.Progress) and training is not None:
                waiting = f"{report.waiting:.0%} waiting for audio · " if report.waiting > 0.1 else ""
                rate = f"{report.audio_rate:.0f} s audio/s · {waiting}{ui.duration(report.eta)} left"
                detail = f"loss {report.loss:.4f} · {rate}"
                bar.update(training, completed=report.step, detail=detail)
            elif isinstance(report, distill.Validated):
                mark = (" best", "green") if report.best else ""
                layers = " ".join(f"{x:.3f}" for x in report.layers)
                loss = f"step {report.step}: held-out loss {report.loss:.4f}"
                bar.console.print(Text.assemble(loss, mark, (f" by layer {layers}", "dim")))
            elif isinstance(report, distill.Unreadable):
                bar.console.print(ui.one_line(f"step {report.step}: left out, {report.why}"), style="yellow")
            elif isinstance(report, distill.StepSkipped):
                bar.console.print(
                    f"step {report.step} skipped: not finite ({report.in_a_row} in a row)", style="yellow"
                )
            elif isinstance(report, distill.Finished):
                bar.stop()
                _show_end(report)
    return report


def _start_table(report: distill.Started) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    share = report.student_parameters_without_heads / report.teacher_parameters
    table.add_row("teacher", f"{report.config.teacher}, {report.teacher_parameters:,} parameters")
    table.add_row(
        "student",
        f"{report.student_parameters_without_heads:,} parameters ({share:.0%} of the teacher), pattern "
        f"{report.student.pattern}"
        + (f", {report.copied_from_teacher} tensors from the teacher" if report.copied_from_teacher else ""),
    )
    table.add_row(
        "speech", f"{report.utterances} utterances, {ui.duration(report.seconds)}; padding {report.padding_waste:.1%}"
    )
    if report.valid_utterances:
        table.add_row("held out", f"{report.valid_utterances} utterances, {ui.duration(report.valid_seconds)}")
    if report.skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.skipped.items())
        table.add_row("skipped", Text.assemble((kinds, "yellow"), f", listed in {report.skipped_report}"))
    processes = f"{report.processes} processes, " if report.processes > 1 else ""
    table.add_row("on", f"{processes}{report.device}, {report.config.precision}")
    if report.first_step:
        table.add_row("resumed", f"at step {report.first_step}")
    return table


def _show_end(report: distill.Finished) -> None:
    if report.reason == "not begun":
        return
    held_out = f", lowest held-out loss {report.best_loss:.4f}" if math.isfinite(report.best_loss) else ""
    ui.say(
        f"{report.reason.capitalize()} at step {report.step}{held_out}; {ui.duration(report.seconds)} of training, "
        f"{ui.duration(report.audio_seconds)} of audio, peak memory {report.peak_memory / 2**30:.2f} GiB."
    )
    if report.reason == "stopped":
        ui.say(f"Go on with:  armhubert distill --resume {shlex.quote(str(report.out))}")
    else:
        name = str(report.out)
        ui.say(f"Student, curves and card are in {name}:  ARMHuBERT.from_pretrained({name!r})")
