"""The tables of `armhubert profile`."""

import os

from rich.table import Table

from armhubert.candidates import FEWER_BITS
from armhubert.cli import ui
from armhubert.clock import Timing
from armhubert.profile import Profile
from armhubert.profile_report import label
from armhubert.quality import Comparison
from armhubert.training_profile import TrainingProfile


def show_profile(result: Profile) -> None:
    """Tables: times, ratios to each baseline, what the models are, their stages, batches of unequal lengths."""
    ui.draw(_times(result))
    for cell in result.cells:
        for name, reason in cell.left_out.items():
            ui.say(f"left out of {cell.batch} x {cell.seconds:g} s: {name}, {reason}")
    for table in (_ratios(result), _costs(result), _stages(result), _ragged(result)):
        if table.row_count:
            ui.draw(table)
    busy, cores = result.conditions.get("load before", 0.0), os.cpu_count() or 1
    if busy > cores / 4:
        ui.note(f"note: {busy} processes were at work on {cores} cores before this run: others may have disturbed it")
    rates = f"{result.rates.macs_per_second / 1e9:.0f} GMAC/s, {result.rates.bytes_per_second / 1e9:.1f} GB/s"
    ui.say(f"{', '.join(f'{k} {v}' for k, v in result.conditions.items())}; this machine in this run: {rates}")


def _table(title: str, *columns: str, words: int = 1) -> Table:
    """The first `words` columns hold words, the others numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right")
    return table


def _times(result: Profile) -> Table:
    single = [cell for cell in result.cells if cell.batch == 1]
    batched = [cell for cell in result.cells if cell.batch > 1]
    columns = [f"{cell.seconds:g} s" for cell in single] + [f"{cell.batch} x {cell.seconds:g} s" for cell in batched]
    table = _table("median seconds at batch size 1; seconds of audio a second for batches", "model", *columns)
    for model in result.models:
        row = [_spread(cell.timings.get(model.name)) for cell in single]
        row += [
            f"{cell.batch * cell.seconds / cell.timings[model.name].median:.1f}" if model.name in cell.timings else "-"
            for cell in batched
        ]
        table.add_row(label(model), *row)
    return table


def _ratios(result: Profile) -> Table:
    columns = [f"{cell.batch} x {cell.seconds:g} s" for cell in result.cells]
    table = _table("times faster than", "model", "baseline", *columns, words=2)
    for model in result.models:
        for other in result.models:
            if model.source == result.models[0].source != other.source:
                found = [cell.speedup(model.name, other.name) for cell in result.cells]
                table.add_row(label(model), label(other), *("-" if x is None else f"{x:.2f}" for x in found))
    return table


def _costs(result: Profile) -> Table:
    shape = "" if result.memory_shape is None else "; peak memory at {} x {:g} s".format(*result.memory_shape)
    table = _table(
        f"size and cost{shape}", "model", "parameters", "without heads", "MiB", "GMACs 10 s", "GMACs SUPERB",
        "peak memory MiB", "of matrix rate", "feature error",
    )  # fmt: skip
    ten = next((cell for cell in result.cells if (cell.batch, cell.seconds) == (1, 10)), None)
    for model in result.models:
        timing = ten.timings.get(model.name) if ten else None
        rate = None
        if timing and model.mode not in FEWER_BITS:  # the machine's rate is float32's
            rate = model.macs / timing.median / result.rates.macs_per_second
        table.add_row(
            label(model), f"{model.parameters / 1e6:.2f} M", f"{model.parameters_without_heads / 1e6:.2f} M",
            f"{model.bytes_on_disk / 2**20:.1f}", f"{model.macs / 1e9:.1f}", f"{model.macs_superb / 1e9:.0f}",
            "-" if model.peak_memory is None else f"{model.peak_memory / 2**20:.0f}",
            "-" if rate is None else f"{rate:.0%}",
            "-" if model.feature_error is None else f"{model.feature_error:.1e}",
        )  # fmt: skip
    return table


def _stages(result: Profile) -> Table:
    eager = [model for model in result.models if model.stages]
    kinds = list(dict.fromkeys(stage for model in eager for stage in model.stages))
    table = _table("milliseconds by stage, eager, 1 x 10 s", "model", *kinds)
    for model in eager:
        table.add_row(label(model), *(f"{model.stages.get(kind, 0) * 1e3:.0f}" for kind in kinds))
    return table


def _ragged(result: Profile) -> Table:
    table = _table(
        "seconds of audio a second, batches of 60 s with padding",
        "model", "equal lengths", "LibriSpeech's, sorted", "unsorted",
    )  # fmt: skip
    names = {model.name: label(model) for model in result.models}
    for measured in result.ragged:
        equal = measured.rate("equal")
        table.add_row(
            names[measured.name], f"{equal:.1f}",
            *(f"{measured.rate(way):.1f}, {measured.rate(way) / equal:.0%}; padding {measured.padding[way]:.1%}"
              for way in ("sorted", "unsorted")),
        )  # fmt: skip
    return table


def _spread(timing: Timing | None) -> str:
    return f"{timing.median:.3f} ({timing.low:.3f}-{timing.high:.3f})" if timing else "-"


def show_quality(result: Profile, comparison: Comparison, caution: str) -> None:
    """Every model with a result: what it is worth, what it costs, and whether anything beats it in both."""
    table = _table(
        "quality against cost; * on the Pareto front",
        "model", "task", "quality", "ms for 10 s", "parameters", "GMACs 10 s", words=2,
    )  # fmt: skip
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


def show_training(result: TrainingProfile) -> None:
    """The parts of a distillation step."""
    table = _table("a step of distillation", "part", "milliseconds", "of the step")
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
