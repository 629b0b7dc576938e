"""`armhubert profile`: argv -> ProfileConfig -> tables on the screen, files in a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from armhubert.cli import ui
from armhubert.cli.app import app
from armhubert.errors import ArmhubertError
from armhubert.files import make_folder

if TYPE_CHECKING:
    from armhubert.clock import Timing
    from armhubert.profile import Profile
    from armhubert.quality import Comparison

N = TypeVar("N", int, float)
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
            "(random weights), released (this student as the released code computes it), or a model. "
            "",
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
        str, typer.Option(help="Lengths for latency at batch size 1; of four or more, cost against length is drawn.")
    ] = "1,5,10,30",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes for throughput; '' for none.")] = "4,8",
    batch_seconds: Annotated[float, typer.Option(help="Length of the utterances of these batches.")] = 10.0,
    heads: Annotated[bool, typer.Option("--heads", help="Keep the student's distillation heads.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved runs of each cell.")] = 5,
    warmup: Annotated[int, typer.Option(help="Runs before timing.")] = 1,
    limit_seconds: Annotated[
        float,
        typer.Option(
            "--limit",
            help="Seconds of one pass; what would need longer, or more memory, is left out of a cell of more than 10 s "
            "of audio.",
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
    from armhubert.convert import load_weights
    from armhubert.profile import Building, Measuring, MemoryUnknown, Profile, ProfileConfig
    from armhubert.profile import profile as measure
    from armhubert.profile import trace as write_trace
    from armhubert.profile_report import write
    from armhubert.quality import caution, compare, read_results

    ui.set_threads(threads)
    ui.silence_libraries()
    if training:
        sources = {p.opts[0]: ctx.get_parameter_source(p.name or "") for p in ctx.command.params}
        given = [option for option in _FEATURES if (source := sources[option]) and source.name != "DEFAULT"]
        if given:
            raise ArmhubertError(f"--training times steps, not features, got {', '.join(given)} as well: leave it out")
        _training(model, config, device, repeats, warmup, out)
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
    for folder in (out, trace and trace.parent):
        if folder is not None:
            make_folder(folder)
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
    render(result)
    comparison = None
    try:
        if results:
            comparison = compare(result, results)
            _quality(result, comparison, caution(result, comparison, heads))
    finally:  # the figures took long, and do not depend on what they are compared with
        if out is not None:
            for path in write(result, out, comparison):
                ui.say(f"wrote {path}")
    if trace is not None:
        write_trace(settings, trace)
        ui.say(f"wrote {trace}")


def numbers(text: str, kind: Callable[[str], N], option: str) -> tuple[N, ...]:
    """`1,5,10` -> (1, 5, 10).

    Raises:
        ArmhubertError: anything in it that is no number.
    """
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ArmhubertError(f"{option} must be numbers with commas between them, got {text!r}") from None


def render(result: "Profile") -> None:
    """Tables: times, ratios to each baseline, what the models are, their stages, batches of unequal lengths."""
    from rich.table import Table

    from armhubert.candidates import FEWER_BITS
    from armhubert.profile_report import label

    single = [cell for cell in result.cells if cell.batch == 1]
    batched = [cell for cell in result.cells if cell.batch > 1]
    times = Table(title="median seconds at batch size 1; seconds of audio a second for batches", title_justify="left")
    times.add_column("model")
    for cell in single:
        times.add_column(f"{cell.seconds:g} s", justify="right")
    for cell in batched:
        times.add_column(f"{cell.batch} x {cell.seconds:g} s", justify="right")
    for model in result.models:
        row = [_spread(cell.timings.get(model.name)) for cell in single]
        row += [
            f"{cell.batch * cell.seconds / cell.timings[model.name].median:.1f}" if model.name in cell.timings else "-"
            for cell in batched
        ]
        times.add_row(label(model), *row)
    ui.draw(times)
    for cell in result.cells:
        for name, reason in cell.left_out.items():
            ui.say(f"left out of {cell.batch} x {cell.seconds:g} s: {name}, {reason}")

    profiled = [model for model in result.models if model.source == result.models[0].source]
    others = [model for model in result.models if model.source != result.models[0].source]
    if others:
        ratios = Table(title="times faster than", title_justify="left")
        for name in ("model", "baseline", *(f"{cell.batch} x {cell.seconds:g} s" for cell in result.cells)):
            ratios.add_column(name, justify="left" if name in ("model", "baseline") else "right")
        for model in profiled:
            for other in others:
                found = [cell.speedup(model.name, other.name) for cell in result.cells]
                ratios.add_row(label(model), label(other), *("-" if x is None else f"{x:.2f}" for x in found))
        ui.draw(ratios)

    shape = "" if result.memory_shape is None else "; peak memory at {} x {:g} s".format(*result.memory_shape)
    about = Table(title=f"size and cost{shape}", title_justify="left")
    for name in ("model", "parameters", "without heads", "MiB", "GMACs 10 s", "GMACs SUPERB", "peak memory MiB",
                 "of matrix rate", "feature error"):  # fmt: skip
        about.add_column(name, justify="left" if name == "model" else "right")
    ten = next((cell for cell in single if cell.seconds == 10), None)
    for model in result.models:
        timing = ten.timings.get(model.name) if ten else None
        rate = None
        if timing and model.mode not in FEWER_BITS:  # the machine's rate is float32's
            rate = model.macs / timing.median / result.rates.macs_per_second
        about.add_row(
            label(model), f"{model.parameters / 1e6:.2f} M", f"{model.parameters_without_heads / 1e6:.2f} M",
            f"{model.bytes_on_disk / 2**20:.1f}", f"{model.macs / 1e9:.1f}", f"{model.macs_superb / 1e9:.0f}",
            "-" if model.peak_memory is None else f"{model.peak_memory / 2**20:.0f}",
            "-" if rate is None else f"{rate:.0%}",
            "-" if model.feature_error is None else f"{model.feature_error:.1e}",
        )  # fmt: skip
    ui.draw(about)

    eager = [model for model in result.models if model.stages]
    if eager:
        parts = Table(title="milliseconds by stage, eager, 1 x 10 s", title_justify="left")
        kinds = list(dict.fromkeys(stage for model in eager for stage in model.stages))
        for name in ("model", *kinds):
            parts.add_column(name, justify="left" if name == "model" else "right")
        for model in eager:
            parts.add_row(label(model), *(f"{model.stages.get(kind, 0) * 1e3:.0f}" for kind in kinds))
        ui.draw(parts)
    if result.ragged:
        unequal = Table(title="seconds of audio a second, batches of 60 s with padding", title_justify="left")
        for name in ("model", "equal lengths", "LibriSpeech's, sorted", "unsorted"):
            unequal.add_column(name, justify="left" if name == "model" else "right")
        names = {model.name: label(model) for model in result.models}
        for measured in result.ragged:
            equal = measured.rate("equal")
            unequal.add_row(
                names[measured.name], f"{equal:.1f}",
                *(f"{measured.rate(way):.1f}, {measured.rate(way) / equal:.0%}; padding {measured.padding[way]:.1%}"
                  for way in ("sorted", "unsorted")),
            )  # fmt: skip
        ui.draw(unequal)
    rates = f"{result.rates.macs_per_second / 1e9:.0f} GMAC/s, {result.rates.bytes_per_second / 1e9:.1f} GB/s"
    ui.say(f"{', '.join(f'{k} {v}' for k, v in result.conditions.items())}; this machine in this run: {rates}")


def _spread(timing: "Timing | None") -> str:
    return f"{timing.median:.3f} ({timing.low:.3f}-{timing.high:.3f})" if timing else "-"


def _quality(result: "Profile", comparison: "Comparison", caution: str) -> None:
    """Every model with a result: what it is worth, what it costs, and whether anything beats it in both."""
    from rich.table import Table

    from armhubert.profile_report import label

    table = Table(title="quality against cost; * on the Pareto front", title_justify="left")
    for name in ("model", "task", "quality", "ms for 10 s", "parameters", "GMACs 10 s"):
        table.add_column(name, justify="left" if name in ("model", "task") else "right")
    names = {model.name: label(model) for model in result.models}
    for point in comparison.points:
        cells = []
        for cost, scale, unit in (("latency", 1e3, ""), ("parameters", 1, " M"), ("macs", 1, "")):
            value = point.costs.get(cost)
            front = "*" if cost in point.front else " "
            cells.append("-" if value is None else f"{value * scale:.1f}{unit}{front}")
        quality = f"{point.metric} {point.value:g}{point.unit} {'↑' if point.higher_is_better else '↓'}"
        table.add_row(names[point.model], point.task, quality, *cells)
    ui.draw(table)
    if not all("latency" in point.costs for point in comparison.points):
        ui.note("- in ms: 1 x 10 s was not timed; --seconds with 10 in it does")
    for name, reason in comparison.without_result.items():
        ui.say(f"not compared: {name}, {reason}")
    for line in comparison.not_profiled:
        ui.say(f"result of a model that was not profiled here: {line}")
    if caution:
        ui.note(caution)


def _training(teacher: str, file: Path | None, device: str | None, repeats: int, warmup: int, out: Path | None) -> None:
    """Parts of a distillation step, as a table and training.json."""
    import json

    from rich.table import Table

    from armhubert.config import build, read_mapping
    from armhubert.distill_config import DistillConfig
    from armhubert.files import write_atomic
    from armhubert.training_profile import Step, profile_training

    given = {**(read_mapping(file) if file else {}), "teacher": teacher, **({"device": device} if device else {})}
    settings = build(DistillConfig, given, str(file or "the options"))
    if out is not None:
        make_folder(out)
    with ui.progress() as show:
        for report in profile_training(settings, steps=repeats, warmup=warmup):
            if isinstance(report, Step):
                show("measure a step", report.done, report.total)
            else:
                result = report
    table = Table("part", "milliseconds", "of the step", title="a step of distillation", title_justify="left")
    for part, timing in {**result.parts, "step": result.step}.items():
        share = "beside it" if part == "data" else f"{timing.median / result.step.median:.0%}"
        spread = f"{timing.median * 1e3:.0f} ({timing.low * 1e3:.0f}-{timing.high * 1e3:.0f})"
        table.add_row(part, spread, share)
    ui.draw(table)
    ui.say(
        f"{result.audio_seconds:.1f} s of audio a step, {result.audio_seconds / result.step.median:.1f} s of audio a "
        f"second; one reading process delivers {result.loader_rate:.0f} times real time; peak memory "
        f"{result.peak_memory / 2**20:.0f} MiB; {', '.join(f'{k} {v}' for k, v in result.conditions.items())}"
    )
    if out is not None:
        timings = {name: timing._asdict() for name, timing in {**result.parts, "step": result.step}.items()}
        content = {**result._asdict(), "step": timings.pop("step"), "parts": timings}
        write_atomic(out / "training.json", json.dumps(content, indent=1) + "\n")
        ui.say(f"wrote {out / 'training.json'}")
