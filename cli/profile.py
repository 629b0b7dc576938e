"""`armhubert profile`: argv -> ProfileConfig -> tables on the screen, files in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from armhubert.cli import ui
from armhubert.cli.app import app
from armhubert.cli.options import numbers
from armhubert.errors import ArmhubertError
from armhubert.files import claim

_FEATURES = (
    "--baseline", "--mode", "--seconds", "--batch-sizes", "--batch-seconds", "--heads", "--limit", "--ragged",
    "--quality", "--memory", "--trace",
)  # fmt: skip
"""Options that --training has no use for."""


@app.command()
def profile(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="A student's folder, a released .ckpt, or any model; with --training the teacher."),
    ],
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME[:MODE], may be repeated: hubert-base, hubert-base-torchaudio, wavlm-base, distilhubert "
            "(random weights), released (this student as the released code computes it), or a model.",
            show_default="hubert-base, distilhubert, released",
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="eager, compiled, aot, bf16, int8, triton, onnx, onnx-int8; several: eager,bf16.", show_default="eager"
        ),
    ] = None,
    seconds: Annotated[
        str, typer.Option(help="Lengths for latency at batch size 1; with four or more, also a plot against length.")
    ] = "1,5,10,30",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes for throughput; '' for none.")] = "4,8",
    batch_seconds: Annotated[float, typer.Option(help="Length of the utterances of these batches.")] = 10.0,
    heads: Annotated[bool, typer.Option("--heads", help="Keep the student's distillation heads.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs of each cell.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs before timing; of inference two at least.")] = 1,
    limit_seconds: Annotated[
        float,
        typer.Option(
            "--limit",
            help="Most seconds a pass may take. Above 10 s of audio, models forecast to exceed it, or free memory, are "
            "left out.",
        ),
    ] = 120.0,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Also time batches of LibriSpeech's lengths against equal ones.")
    ] = False,
    quality: Annotated[
        list[str] | None,
        typer.Option(
            help="A result.json of `armhubert evaluate`, a suite.json or a folder with results; may be repeated. Draws "
            "quality against cost."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default="auto")] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")] = True,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write profile.json, .csv and pictures here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier profile or trace.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a chrome trace of one pass of MODEL over 10 s here.")
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Profile steps of distilling MODEL as the teacher instead.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="With --training: settings as for distill (student, batches, precision).")
    ] = None,
) -> None:
    """Measure latency, throughput, memory and size of a model against baselines, timed in turn in one run."""
    from armhubert.baselines import default_baselines
    from armhubert.cli.profile_tables import show_profile, show_quality
    from armhubert.convert import load_weights
    from armhubert.profile import Building, Measuring, MemoryUnknown, Profile, ProfileConfig
    from armhubert.profile import profile as measure
    from armhubert.profile import trace as write_trace
    from armhubert.profile_report import FILES, write
    from armhubert.quality import caution, compare, read_results

    ui.set_threads(threads)
    ui.silence_libraries()
    if training:
        sources = {p.opts[0]: ctx.get_parameter_source(p.name or "") for p in ctx.command.params}
        given = [option for option in _FEATURES if (source := sources[option]) and source.name != "DEFAULT"]
        if given:
            raise ArmhubertError(f"--training times steps, not features, got {', '.join(given)} as well: leave it out")
        _training(model, config, device, repeats, warmup, out, force)
        return
    if config is not None:
        raise ArmhubertError(f"--config belongs to --training, got {config} without it: leave it out")
    settings = ProfileConfig(
        model=model,
        baselines=tuple(baseline) if baseline else default_baselines(load_weights(model).config),
        modes=tuple(name.strip() for names in mode or ["eager"] for name in names.split(",")),
        seconds=numbers(seconds, float, "--seconds"),
        batch_sizes=numbers(batch_sizes, int, "--batch-sizes"),
        batch_seconds=batch_seconds,
        heads=heads,
        repeats=repeats,
        warmup=warmup,
        device=device or "auto",
        limit_seconds=limit_seconds,
        memory=memory,
        ragged=ragged,
    )
    results = read_results(quality or ())
    files = [out / name for name in FILES] if out else []
    claim([*files, trace] if trace else files, force)
    with ui.progress() as show:
        for report in measure(settings):
            if isinstance(report, Building):
                show(f"load {report.name}", 0, None)
            elif isinstance(report, Measuring):
                show(f"measure {report.what}", report.done, report.total)
            elif isinstance(report, MemoryUnknown):
                ui.note(f"the peak memory of {report.name} is not known: {report.why}")
            elif isinstance(report, Profile):
                result = report
    show_profile(result)
    comparison = None
    try:
        if results:
            comparison = compare(result, results)
            show_quality(result, comparison, caution(result, comparison, heads))
    finally:  # the figures took long, and do not depend on what they are compared with
        if out is not None:
            for path in write(result, out, comparison):
                ui.say(f"wrote {path}")
    if trace is not None:
        write_trace(settings, trace)
        ui.say(f"wrote {trace}")


def _training(
    teacher: str, file: Path | None, device: str | None, repeats: int, warmup: int, out: Path | None, force: bool
) -> None:
    """Parts of a distillation step, as a table and training.json."""
    from armhubert.cli.profile_tables import show_training
    from armhubert.data import Scanning
    from armhubert.distill_config import DistillConfig
    from armhubert.settings import build, read_mapping
    from armhubert.training_profile import Step, profile_training

    if repeats < 1 or warmup < 0:
        raise ArmhubertError(f"--repeats must be at least 1 and --warmup at least 0, got {repeats} and {warmup}")
    given = {**(read_mapping(file) if file else {}), "teacher": teacher, **({"device": device} if device else {})}
    settings = build(DistillConfig, given, str(file or "the options"))
    if out is not None:
        claim([out / "training.json"], force)
    with ui.progress() as show:
        for report in profile_training(settings, steps=repeats, warmup=warmup):
            if isinstance(report, Scanning):
                show("examine audio", report.done, report.total)
            elif isinstance(report, Step):
                show("measure a step", report.done, report.total)
            else:
                result = report
    show_training(result)
    if out is not None:
        result.write(out / "training.json")
        ui.say(f"wrote {out / 'training.json'}")
