"""`armhubert plan`: a budget -> students within it -> a configuration for distill."""

from pathlib import Path
from typing import Annotated

import typer

from armhubert.cli import ui
from armhubert.cli.app import app
from armhubert.errors import ArmhubertError
from armhubert.files import claim


@app.command()
def plan(
    teacher: Annotated[
        str, typer.Argument(help="As for distill: mini, a folder, a checkpoint file, a hub id, a torchaudio pipeline.")
    ],
    parameters: Annotated[str | None, typer.Option("--params", help="Most parameters without heads: 20M.")] = None,
    macs: Annotated[str | None, typer.Option(help="Most multiply-accumulates for 10 s of audio: 15G.")] = None,
    latency: Annotated[str | None, typer.Option(help="Longest time for 10 s of audio, measured here: 200ms.")] = None,
    device: Annotated[str, typer.Option(help="Where latency is measured: auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved runs of each proposal.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a configuration for distill --config here.")
    ] = None,
    choose: Annotated[int, typer.Option(help="Which proposal to write, counted from 1.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Propose students of a teacher for a budget of parameters, operations or latency."""
    from rich.table import Table

    from armhubert.plan import Budget, Searching, parse_amount, write
    from armhubert.plan import plan as search

    given = {"parameters": parameters, "macs": macs, "latency": latency}
    asked = [(kind, text) for kind, text in given.items() if text is not None]
    if len(asked) != 1:
        raise ArmhubertError(f"give one budget, --params, --macs or --latency, got {len(asked)} of them")
    if choose < 1:
        raise ArmhubertError(f"--choose must be at least 1, got {choose}")
    ((kind, text),) = asked
    budget = Budget(kind, parse_amount(text, kind))  # type: ignore[arg-type]
    ui.set_threads(threads)
    if out is not None:
        claim([out], force)
    with ui.progress() as show:
        for report in search(teacher, budget, device=device, repeats=repeats):
            if isinstance(report, Searching):
                show(f"size: {report.kind}", 0, None)
            else:
                proposals = report
    table = Table("", "student", "width", "FFN", "layers", "pattern", "without heads", "GMACs 10 s", "10 s takes")
    for number, p in enumerate(proposals, start=1):
        s = p.student
        table.add_row(
            str(number), p.kind, str(s.width), str(s.ffn), str(s.layers), s.pattern, f"{p.parameters:,}",
            f"{p.macs / 1e9:.1f}", f"{p.latency.median * 1e3:.0f} ms ({p.latency.low * 1e3:.0f}-"
            f"{p.latency.high * 1e3:.0f}){'*' * budget.missed(p)}",
        )  # fmt: skip
    ui.draw(table)
    if proposals[0].settings.loss == "plain":
        ui.note(f"{teacher} has no mask embedding, so no masked view: the proposals distil with the plain loss")
    if any(map(budget.missed, proposals)):
        ui.note(f"* above {text} in this last measurement: ask for less, or measure again on a quieter machine")
    if choose > len(proposals):
        raise ArmhubertError(f"--choose must be at most {len(proposals)}, the proposals found, got {choose}")
    if out is not None:
        write(proposals[choose - 1], out)
        ui.say(f"wrote {out}: armhubert distill DATA --config {out}")
