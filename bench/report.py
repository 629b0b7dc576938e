"""Render bench/results/*.json: what a user chooses by into the README, between its markers, the rest into docs."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from armhubert.bench.compare_runs import last_common_step
from armhubert.bench.gpu_report import baselines, best, best_baseline, measured, over_ours
from armhubert.files import write_atomic

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RESULTS = Path("bench/results")
README, DETAILS = Path("README.md"), Path("docs/measured.md")


def summary(results: Path = RESULTS) -> str:
    """The README's section, from whichever result files are there."""
    parts = ["## Measured", *_overview(_machines(results))]
    parts += _sections(results, {"superb-mini": _superb})
    for path, content in _gpus(results):
        parts += _gpu(content, path)
    parts.append("Other lengths, training, the loader, single ops: [docs/measured.md](docs/measured.md).")
    return "\n\n".join([BEGIN, *parts, END])


def details(results: Path = RESULTS) -> str:
    """docs/measured.md, from whichever result files are there."""
    parts = [
        "# Measured",
        "Written by `python -m armhubert.bench report` from `bench/results/`; the README holds the models' figures, "
        "[performance.md](performance.md) says what they mean.",
    ]
    parts += _sections(results, {"distill-mini": _distillation})
    sections = {
        "profile/profile": _profile,
        "length/profile": _length,
        "ragged/profile": _unequal,
        "teacher-views": _teacher_views,
        "distillation-step": _step,
        "loader": _loader,
        "cpu-microbench": _cpu,
    }
    for machine in _machines(results):
        conditions = _read(machine / "profile/profile.json")["conditions"]
        parts.append(f"## {machine.name}: {_processor(conditions)}")
        parts += _sections(machine, sections)
    for _, content in _gpus(results):
        parts += _gpu_ops(content)
    return "\n\n".join(parts) + "\n"


Section = Callable[[dict[str, Any], Path], list[str]]
"""A result file's content, and its folder -> paragraphs."""


def _sections(folder: Path, sections: Mapping[str, Section]) -> list[str]:
    """The parts of those files that are there."""
    paths = {folder / f"{name}.json": section for name, section in sections.items()}
    return [part for path, section in paths.items() if path.is_file() for part in section(_read(path), path.parent)]


def _machines(results: Path) -> list[Path]:
    """A folder a processor that was measured."""
    return sorted(path.parent.parent for path in results.glob("*/profile/profile.json"))


def _gpus(results: Path) -> list[tuple[Path, dict[str, Any]]]:
    """What bench/gpu.sh measured, not rehearsed."""
    found = [(path, _read(path)) for path in sorted(results.glob("*.json"))]
    return [(path, c) for path, c in found if c.get("conditions", {}).get("real") and "check" in c]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


def _overview(machines: list[Path]) -> list[str]:
    """Every machine's ratios to transformers' HuBERT Base for 10 s of audio, alone and in the largest batch."""
    if not machines:
        return []
    profiles = {machine.name: _read(machine / "profile/profile.json") for machine in machines}
    models = [model for content in profiles.values() for model in content["models"]]
    titles, rows = ["model"], {_title(model): [_title(model)] for model in models}
    for machine, content in profiles.items():
        names = {_title(model): model["name"] for model in content["models"]}
        for cell in (cell for cell in content["cells"] if cell["seconds"] == 10):
            titles.append(f"{machine}, {cell['batch']} x 10 s")
            seconds = {name: timing["median"] for name, timing in cell["timings"].items()}
            fastest = min(seconds, key=seconds.__getitem__)
            for title, row in rows.items():
                row.append(_ratio(seconds, names.get(title, ""), fastest))
    for title, key, shown in _MEASURES:
        titles.append(title)
        for name, row in rows.items():
            found = [model[key] for model in models if _title(model) == name and model[key] is not None]
            row.append(shown(max(found)) if found else "")
    newest = max(profiles, key=lambda machine: profiles[machine]["conditions"]["date"])
    repeats = profiles[newest]["conditions"]["repeats"]
    runs = "; ".join(
        f"{machine}: {_processor(c := content['conditions'])}, {c['device'].rpartition(', ')[2]}, torch {c['torch']}, "
        f"{c['date']}, matrix rate {content['rates']['macs_per_second'] / 1e9:.0f} GMAC/s"
        for machine, content in profiles.items()
    )
    return [
        "`armhubert profile` on CPUs: how many times faster than transformers' HuBERT Base (sdpa, fp32) each model "
        "runs; HuBERT Base's own row gives its time. The student has the preset armhubert. Fastest in bold.",
        _table(titles, rows.values()),
        f"Medians of {repeats} interleaved runs, random weights, no heads. Where a "
        "processor has no instructions for bf16 and int8 (AVX2 alone), these modes are emulated. Memory is what "
        "loading and the largest batch add to a process; it and the feature error are the largest of all machines. The "
        "matrix rate is what a large product reaches, in multiply-accumulates a second. "
        f"{runs}.",
        f"![profile](bench/results/{newest}/profile/profile.png)",
    ]


def _profile(content: dict[str, Any], folder: Path) -> list[str]:
    """One machine: times of a run of `armhubert profile`, as ratios to transformers' HuBERT Base."""
    rate = content["rates"]["macs_per_second"] / 1e9
    return [
        "### Latency and throughput",
        "`armhubert profile`: milliseconds, and times faster than transformers' HuBERT Base (sdpa, fp32) in the same "
        f"run; medians of {content['conditions']['repeats']} interleaved runs, random weights, no heads "
        f"({_conditions(content)}; matrix rate {rate:.0f} GMAC/s).",
        _timings(content["models"], content["cells"]),
        f"![profile](../bench/results/{folder.parent.name}/profile/profile.png)",
    ]


def _length(content: dict[str, Any], folder: Path) -> list[str]:
    conditions = content["conditions"]
    return [
        "### Cost against length",
        "`armhubert profile` at batch size 1: milliseconds, and times faster than transformers' HuBERT Base (sdpa, "
        f"fp32) in the same run; medians of {conditions['repeats']} interleaved runs ({_conditions(content)}).",
        _timings(content["models"], content["cells"]),
        f"![cost against length](../bench/results/{folder.parent.name}/length/profile-length.png)",
    ]


def _timings(models: list[dict[str, Any]], cells: list[dict[str, Any]]) -> str:
    """A row a model, a column a cell, and what else was measured of a model."""
    titles = ["model", *(f"{cell['batch']} x {cell['seconds']:g} s" for cell in cells)]
    rows = [[_title(m), *(_time(cell["timings"], m["name"], _REFERENCE) for cell in cells)] for m in models]
    for title, key, shown in _MEASURES:
        if any(model[key] is not None for model in models):
            titles.append(title)
            for row, model in zip(rows, models, strict=True):
                row.append("" if model[key] is None else shown(model[key]))
    return _table(titles, rows)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Names to the left, numbers to the right."""
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, rule, *rows))


_REFERENCE = "hubert-base (eager)"
_MEASURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("peak memory", "peak_memory", lambda value: f"{value / 2**20:.0f} MiB"),
    ("feature error", "feature_error", lambda value: f"{value:.1e}"),
)
"""Title, key of a profiled model, and how it is written."""


def _title(model: dict[str, Any]) -> str:
    """What the tables call a profiled model."""
    mode = "" if model["mode"] == "eager" else f", {model['mode']}"
    return _BASELINES.get(model["source"], "student") + mode


def _unequal(content: dict[str, Any], folder: Path) -> list[str]:
    shares = [
        f"{row['name'].rpartition('(')[2].rstrip(')')} {row['rates']['sorted'] / row['rates']['equal']:.0%} "
        f"({row['rates']['unsorted'] / row['rates']['equal']:.0%})"
        for row in content["ragged"]
    ]
    return [
        "### Unequal lengths",
        "Batches of recordings as long as LibriSpeech's, sorted by length as `extract` and `distill` do (in brackets: "
        f"unsorted), reach of the throughput on equal lengths: {', '.join(shares)}. Medians of "
        f"{content['conditions']['repeats']} interleaved runs ({_conditions(content)}).",
    ]


def _processor(conditions: dict[str, Any]) -> str:
    """The processor's name, and its extensions where they were recorded."""
    name, extensions = conditions.get("processor", "CPU"), conditions.get("extensions", "")
    return f"{name} ({extensions.replace(' ', ', ')})" if extensions else name


def _ratio(seconds: Mapping[str, float], name: str, fastest: str) -> str:
    """Times faster than the reference; the reference's own time."""
    if name not in seconds:
        return "-"
    if name == _REFERENCE:
        return f"{seconds[name] * 1e3:.0f} ms"
    ratio = f"{seconds[_REFERENCE] / seconds[name]:.1f}x"
    return f"**{ratio}**" if name == fastest else ratio


def _time(timings: dict[str, Any], name: str, reference: str) -> str:
    if name not in timings:
        return "-"
    seconds = timings[name]["median"]
    ratio = f", {timings[reference]['median'] / seconds:.1f}x" if reference in timings else ""
    return f"{seconds * 1e3:.0f} ms{ratio}"


_BASELINES = {
    "hubert-base": "HuBERT Base",
    "hubert-base-torchaudio": "HuBERT Base, torchaudio",
    "wavlm-base": "WavLM Base, transformers",
    "distilhubert": "DistilHuBERT, transformers",
    "released": "student as the released code computes it",
}


def _distillation(content: dict[str, Any], folder: Path) -> list[str]:
    rows = content["rows"]
    step = last_common_step(rows)
    lines = []
    for row in rows:
        at = next(v for v in row["validations"] if v["step"] == step)
        layers = " ".join(f"{x:.3f}" for x in at["layers"])
        lines.append([row["name"], f"{row['parameters_without_heads']:,}", f"{at['loss']:.4f}", layers])
    settings = rows[0]["settings"]
    return [
        "## Distillation with and without map reuse",
        f"Teacher mini (5.6 M parameters) distilled for {step} steps of {settings['batch_seconds']:g} s of "
        f"LibriSpeech train-clean-5 ({_conditions(content)}). The error is that of clean input against the clean "
        "teacher on held-out utterances, which is what `plain` trains for; `masking` also has to learn the masked "
        "frames and, after so few steps, is far behind on it. Whose features are better is for SUPERB's tasks to say.",
        _table(["student", "parameters", "held-out loss", "error by layer"], lines),
        "![held-out error](../bench/results/distill-mini.png)",
    ]


_SUPERB = (
    ("PER", "pr", "test", ("per",)),
    ("PER, TIMIT", "pr", "test:timit-sample", ("per",)),
    ("WER, CER", "asr", "test", ("wer", "cer")),
    ("KS", "ks", "test", ("accuracy",)),
    ("QbE", "qbe", "test", ("mtwv",)),
    ("SID", "sid", "test", ("accuracy",)),
    ("ASV", "asv", "test", ("eer",)),
    ("SD", "sd", "test", ("der",)),
    ("IC, slots", "ic", "test", ("slot_accuracy",)),
    ("SF F1, CER", "sf", "test", ("slot_f1", "slot_cer")),
    ("ER", "er", "test", ("accuracy",)),
)
"""Title, task, test set and metrics of each column."""


def _superb(content: dict[str, Any], folder: Path) -> list[str]:
    """The ten tasks on little real speech, and what may be concluded from them."""
    rows = []
    for row in content["rows"]:
        cells = [row["name"]]
        for _, task, test, metrics in _SUPERB:
            found = row["tasks"].get(task, {}).get("tests", {}).get(test)
            digits = 3 if task == "qbe" else 1
            cells.append(", ".join(f"{found[metric]:.{digits}f}" for metric in metrics) if found else "")
        rows.append(cells)
    return [
        "SUPERB's ten tasks, its heads and metrics, on five hours of LibriSpeech and at most an hour of any other"
        " speech: few steps, smaller LSTMs for asr and sf, rates chosen on dev from the same candidates for"
        f" every model (`bench/superb-mini.yaml`; {_conditions(content)}). PER counts phones without stress. The rows"
        " compare with each other, **not with published ones**."
        " Error rates (PER, WER, CER, ASV's EER, SD's DER) are better lower, the rest higher; QbE is the maximum"
        " term-weighted value, at most 1, the rest is in percent.",
        *([note] if (note := content["rows"][0].get("note")) else []),
        _table(["model", *(title for title, *_ in _SUPERB)], rows),
        "![learning curves and layer weights](bench/results/superb-mini.png)",
    ]


def _teacher_views(content: dict[str, Any], folder: Path) -> list[str]:
    rows = []
    for row in content["rows"]:
        two, one = row["two_plain_passes_s"]["median"], row["teacher_targets_s"]["median"]
        batch = f"{row['batch']} x {row['seconds']:g} s"
        rows.append([batch, f"{two:.2f} s", f"{one:.2f} s", f"{row['speedup']:.2f}x"])
    return [
        "### The teacher's two views",
        "Both views of a HuBERT Base teacher (random weights, float32), against running it twice; medians of "
        f"interleaved runs ({_conditions(content)}).",
        _table(["batch", "two plain passes", "one pass, two views", "ratio"], rows),
    ]


def _step(content: dict[str, Any], folder: Path) -> list[str]:
    row = content["rows"][0]
    ours, other = (row["candidates"][name]["median"] for name in row["candidates"])
    return [
        "### A step of distillation",
        f"A step of distillation, HuBERT Base to the preset armhubert, {row['batch']} x {row['seconds_each']:g} s, "
        f"{row['dtype']}: {ours:.2f} s, and {other:.2f} s by a straightforward loop (two teacher passes, PyTorch's "
        f"attention, convolutions and linear maps, the loss layer by layer): **{other / ours:.2f}x**; medians of "
        f"interleaved runs ({_conditions(content)}).",
    ]


def _loader(content: dict[str, Any], folder: Path) -> list[str]:
    stages = list(content["rows"][0]["rates"])
    titles = ["format", *(_counted(int(name), "process", "processes") if name.isdecimal() else name for name in stages)]
    rows = [[row["format"], *(f"{row['rates'][name]['cpu']:,.0f}" for name in stages)] for row in content["rows"]]
    return [
        "### The loader",
        "The loader of distillation alone, in times real time that one core delivers (seconds of audio a second of CPU "
        f"time; medians of interleaved runs, {_conditions(content)}): the codec, with mixing down and resampling, the "
        "first run's scan, and batches from so many processes. 10,000 times real time on 16 cores is 625 a core.",
        _table(titles, rows),
    ]


def _cpu(content: dict[str, Any], folder: Path) -> list[str]:
    rows = []
    for row in content["rows"]:
        ours, released = row["candidates"]["ours"], row["candidates"]["released"]
        memory = " and ".join(f"{c['peak_extra_bytes'] / 2**20:.0f}" for c in (ours, released))
        times = [f"{c['median'] * 1e3:.1f} ms" for c in (ours, released)]
        ratio = f"{released['median'] / ours['median']:.2f}x"
        rows.append([row["cell"]["label"], row["pass"], *times, ratio, f"{memory} MB"])
    load = content["rows"][0]["machine_load"]
    return [
        "### Ops on a CPU",
        "The PyTorch twins against the released code's way of computing on a CPU; medians of interleaved runs, peak "
        f"extra memory ({_conditions(content)}; load average {load['load_before']} before and {load['load_after']} "
        f"after, {load['cores']} cores). {_LONE}",
        _table(["op, float32", "pass", "ours", "released way", "ratio", "memory, ours and released"], rows),
    ]


def _gpu(content: dict[str, Any], path: Path) -> list[str]:
    """What runs and what is faster on a named GPU; whether it matches float64 there is part of running."""
    device, checks = content["conditions"]["device"], content["check"]
    good = sum(bool(row.get("ok")) and not row.get("untried") for row in checks)
    worst = max((row["ratio"] for row in checks if row.get("ok") and row.get("ratio") is not None), default=None)
    bound = "" if worst is None else f", at most {worst:.2f} of the error that the rule allows"
    failed = [row["job"] for row in checks if not row.get("ok")]
    failed += [f"{row['job']} (not tried)" for row in checks if row.get("untried")]
    runs = f"**Runs** on {device}: {good} of {len(checks)} checks against float64 on the device pass{bound}."
    if failed:
        runs += f" Not passed: {'; '.join(failed[:5])}{f' and {len(failed) - 5} more' if len(failed) > 5 else ''}."
    rows = measured(content)
    behind = sum(bool((other := best_baseline(row)) and other.ratio < 1) for row in rows)
    faster = (
        f"**Faster** on {device}: medians of interleaved runs from a cold L2, ops queued before the device begins and "
        f"replayed as CUDA graphs where little is moved ({_conditions(content)}). Ours is behind the best baseline in "
        f"{behind} of {len(rows)} rows."
    )
    whole = [
        [
            row["kind"],
            f"{row['batch']} x {row['seconds_each']:g} s",
            name,
            f"{c['median'] * 1e3:.2f} ms",
            f"{over_ours(row, name):.2f}x",
            f"{c['hours_of_audio_per_second']:.3f}",
        ]
        for row in content["model"]
        for name, c in row.get("candidates", {}).items()
    ]
    pictures = [
        f"![{kind}](bench/results/{path.stem}-{kind}.png)"
        for kind in ("roofline", "bars")
        if path.with_name(f"{path.stem}-{kind}.png").is_file()
    ]
    titles = ["end to end", "batch", "way", "time", "over ours", "hours of audio a second"]
    times = [_table(titles, whole)] if whole else []
    return [f"### {device}", runs, *([faster] if rows else []), *times, *pictures]


def _gpu_ops(content: dict[str, Any]) -> list[str]:
    """Every op and pass that was timed."""
    titles = [
        "op, bf16",
        "pass",
        "ours",
        "x of floor",
        "best baseline",
        "against it",
        "against the released way",
        "memory",
    ]
    rows = []
    for row in measured(content):
        ours, other, released = best(row["candidates"]), best_baseline(row), baselines(row).get("released")
        memory = row["candidates"]["ours"]["peak_extra_bytes"]
        rows.append(
            [
                row["cell"]["label"],
                row["pass"],
                f"{ours * 1e6:.1f} us",
                f"{ours / row['floor_s']:.2f}" if row["floor_s"] else "",
                f"{other.name}, {other.seconds * 1e6:.1f} us" if other else "",
                f"{other.ratio:.2f}x" if other else "",
                f"{released.ratio:.2f}x" if released else "",
                "" if memory is None else f"{memory / 2**20:.1f} MB",
            ]
        )
    return [f"## Ops on {content['conditions']['device']}", _LONE, _table(titles, rows)] if rows else []


_LONE = (
    "`reattend`, a reusing layer alone, is not the same work backward: the released way ends at the gradient of its "
    "stored map, the others go on to q and k. `pair`, with its computing layer, compares the whole."
)


def _conditions(content: dict[str, Any]) -> str:
    c = content["conditions"]
    processor = f"{c['processor']}, " if c.get("processor", c["device"]) not in c["device"] else ""
    return f"{processor}{c['device']}, torch {c['torch']}, {c['date']}"


def _counted(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def main() -> None:
    """Rewrite the README's section and docs/measured.md."""
    argparse.ArgumentParser("python -m armhubert.bench report", description=__doc__).parse_args()
    text = README.read_text("utf-8")
    before, rest = text.split(BEGIN)
    write_atomic(README, before + summary() + rest.split(END)[1])
    write_atomic(DETAILS, details())
    print(f"wrote {README} and {DETAILS}")
