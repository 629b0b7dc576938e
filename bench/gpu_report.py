"""Merge what the GPU stages measured into one file, print it, and draw it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from armhubert import figures
from armhubert.errors import ArmhubertError
from armhubert.files import write_atomic
from armhubert.kernels import variants
from armhubert.machine import conditions

STAGES = ("check", "micro", "model", "variants", "compiled")
Row = dict[str, Any]


def write_stage(name: str, rows: list[Row], device: torch.device, out: Path) -> None:
    """DIR/NAME.json: the rows of a stage and what they were measured on."""
    content = {"conditions": {**conditions(device), **_versions(device)}, "rows": rows}
    write_atomic(out / f"{name}.json", json.dumps(content, indent=1) + "\n")


def report(out: Path, addition: Path | None = None) -> Path:
    """DIR/<gpu>-<date>.json from the stages' files, which it replaces; tables; pictures where matplotlib is there.

    Needs no GPU. What was not run again, or not reached, keeps its rows of `addition`, another report of the same GPU,
    or of a report of that name that is there already.

    Raises:
        ArmhubertError: no stage has left a file, or what is to be merged is of several devices.
    """
    name, content = merge(out, addition)
    path = out / f"{name}.json"
    write_atomic(path, json.dumps(content, indent=1) + "\n")
    for stage in STAGES:
        (out / f"{stage}.json").unlink(missing_ok=True)
    console = Console(width=150)
    for table in tables(content):
        console.print(table)
    try:
        draw(content, out / name)
    except ImportError:
        console.print("matplotlib is not installed: no pictures")
    except Exception as error:  # a picture must not cost the figures
        console.print(f"pictures failed: {type(error).__name__}: {error}", markup=False)
    for line in summary(content):
        console.print(line, markup=False)
    console.print(str(path))
    return path


def exit_code(path: Path) -> int:
    """Exit code of a report's checks: 1 where one failed, 3 where some were not reached, else 0."""
    checks = json.loads(path.read_text("utf-8"))["check"]
    if _failed(checks):
        return 1
    return 3 if any(row.get("unreached") for row in checks) else 0


def _failed(checks: list[Row]) -> list[Row]:
    return [row for row in checks if not row.get("ok") and not row.get("unreached")]


def adopt(result: Path) -> Path:
    """Make what bench/gpu.sh measured the kernels' choice of variants for that family of GPUs.

    Raises:
        ArmhubertError: figures of a rehearsal, none, or not of the whole grid.
    """
    content = json.loads(result.read_text("utf-8"))
    if not content["conditions"].get("real") or not content["choices"]:
        raise ArmhubertError(f"{result} must hold variants measured on a GPU, got a rehearsal or none")
    missing = [row["job"] for row in content["variants"] if "error" in row]
    if missing:
        raise ArmhubertError(f"{result} lacks variants {', '.join(missing)}: run bench/gpu.sh variants report again")
    table = {**variants.measured(), content["conditions"]["capability"]: content["choices"]}
    write_atomic(variants.FILE, json.dumps(table) + "\n")
    return variants.FILE


def merge(out: Path, addition: Path | None = None) -> tuple[str, dict[str, Any]]:
    """The report's name; the stages' rows under their names, what they were measured on, and the choice of variants."""
    found = {stage: out / f"{stage}.json" for stage in STAGES}
    parts = {stage: json.loads(path.read_text("utf-8")) for stage, path in found.items() if path.is_file()}
    other = json.loads(addition.read_text("utf-8")) if addition else {}
    told = [part["conditions"] for part in parts.values()] + ([other["conditions"]] if other else [])
    if not told:
        raise ArmhubertError(f"a report needs files that stages have left in {out}, found none")
    if len(devices := {part["device"] for part in told}) > 1:
        raise ArmhubertError(f"a report must be of one device, got {' and '.join(sorted(devices))}")
    where = told[0]["device"] if told[0].get("real") else "rehearsal"
    name = "-".join(["".join(c if c.isalnum() else "-" for c in where.lower()), told[0]["date"]])
    path = out / f"{name}.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    content: dict[str, Any] = {"conditions": told[0]}
    for stage in STAGES:
        rows = parts[stage]["rows"] if stage in parts else []
        for earlier in (other, before):
            rows = _completed(rows, earlier.get(stage, []))
        content[stage] = rows
    content["ceilings"] = next((row for row in content["model"] if row.get("kind") == "ceilings"), {"error": "none"})
    grid = [row for row in content["variants"] if "error" not in row]
    content["choices"] = variants.table(grid) if grid else {}
    return name, content


def _completed(rows: list[Row], earlier: list[Row]) -> list[Row]:
    """The rows, or the earlier ones where there are none; one not reached is the earlier one of the same job."""
    known = {row["job"]: row for row in earlier}
    return [known.get(row["job"], row) if row.get("unreached") else row for row in rows] or earlier


def _versions(device: torch.device) -> dict[str, Any]:
    import importlib.metadata

    found: dict[str, Any] = {"real": device.type == "cuda"}
    for package in ("triton", "transformers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return found


# ---- figures ----------------------------------------------------------------


class Baseline(NamedTuple):
    """What ours is compared with, in the run that timed both."""

    name: str
    seconds: float
    ratio: float
    """To the time of ours."""
    peak_extra_bytes: int | None


def _graphs(candidates: dict[str, Any]) -> bool:
    return all(candidate.get("graph") for candidate in candidates.values())


def best(candidates: dict[str, Any], name: str = "ours") -> float:
    """Seconds of a candidate: the graph's replay where every candidate has one, so that like is compared with like."""
    candidate = candidates[name]
    return float((candidate["graph"] if _graphs(candidates) else candidate)["median"])


def baselines(row: Row) -> dict[str, Baseline]:
    """The others of a row of `measured`, by name."""
    return {
        name: Baseline(name, best(run, name), best(run, name) / best(run), run[name]["peak_extra_bytes"])
        for run in row["runs"]
        for name in run
        if name != "ours"
    }


def best_baseline(row: Row) -> Baseline | None:
    """The fastest of the others."""
    return min(baselines(row).values(), key=lambda other: other.ratio, default=None)


def measured(content: dict[str, Any]) -> list[Row]:
    """A row a cell and pass that hold times of ours, with the candidates of every run of it under "runs"."""
    rows: dict[tuple[str, str], Row] = {}
    for row in (*content["micro"], *content["compiled"]):
        if "candidates" in row:
            first = rows.setdefault((row["cell"]["label"], row["pass"]), {**row, "runs": []})
            first["runs"].append(row["candidates"])
    return list(rows.values())


def over_ours(row: Row, name: str) -> float:
    """A candidate's time end to end over that of ours in the same run."""
    times = [candidate["median"] for candidate in row["candidates"].values()]
    return float(row["candidates"][name]["median"] / times[0])


def host_bound(row: Row) -> list[str]:
    """Candidates whose time, as compared, may be the host's: it did not queue most rounds in time."""
    late = (
        name
        for run in row["runs"]
        for name, candidate in run.items()
        if not _graphs(run) and (candidate.get("ahead") or 0) < 0.5
    )
    return list(dict.fromkeys(late))


def summary(content: dict[str, Any]) -> list[str]:
    """One screen: what passed, what failed, the worst ratio, where ours loses."""
    checks = content["check"]
    passed = [row for row in checks if row.get("ok") and not row.get("untried")]
    untried = sum(bool(row.get("untried")) for row in checks)
    failed = _failed(checks)
    unreached = sum(bool(row.get("unreached")) for row in checks)
    worst = max((row for row in passed if row.get("ratio") is not None), key=lambda r: r["ratio"], default=None)
    lines = ["", "SUMMARY" if content["conditions"]["real"] else "SUMMARY of a rehearsal: nothing here is a GPU figure"]
    lines.append(f"checks: {len(passed)} passed, {len(failed)} FAILED, {untried} not tried, {unreached} not reached")
    if worst is not None:
        lines.append(f"  worst passing ratio {worst['ratio']:.3f}: {worst['job']}: {worst['at']}")
    lines += [f"  FAILED {row['job']}: {(row.get('error') or row.get('at') or '')[:160]}" for row in failed[:25]]
    if len(failed) > 25:
        lines.append(f"  and {len(failed) - 25} more")
    times = measured(content)
    lost = [(row, other) for row in times if (other := best_baseline(row)) and other.ratio < 1]
    bound = [(row, names) for row in times if (names := host_bound(row))] if content["conditions"]["real"] else []
    errors = [row for stage in STAGES[1:] for row in content[stage] if "error" in row]
    lines.append(
        f"times: {len(times)} cells, ours behind the best baseline in {len(lost)}; {len(errors)} jobs without result"
    )
    for row, other in lost[:12]:
        ours = other.seconds / other.ratio
        lines.append(f"  {_named(row)}: ours {ours * 1e6:.0f} us, {other.name} {other.seconds * 1e6:.0f} us")
    lines += [f"  perhaps the host's time: {_named(row)}: {', '.join(names)}" for row, names in bound[:12]]
    lines += [f"  no result: {row['job']}: {row['error'][:140]}" for row in errors[:12]]
    slow = (*content["model"], *content["compiled"])
    absent = [(row["job"], *item) for row in slow for item in row.get("failed", {}).items()]
    lines += [f"  not timed: {job}: {name}: {why[:140]}" for job, name, why in absent[:12]]
    for row in content["model"]:
        for name, c in row.get("candidates", {}).items():
            host = f", of it the host's {c['host'] * 1e3:.2f} ms" if c.get("host") else ""
            time = f"{c['median'] * 1e3:.2f} ms, {over_ours(row, name):.2f}x ours"
            lines.append(f"{row['kind']} B {row['batch']}, {name}: {time}{host}")
    return lines


def _named(row: Row) -> str:
    return f"{row['cell']['label']} {row['pass']}"


# ---- tables -----------------------------------------------------------------


def tables(content: dict[str, Any]) -> Iterator[Table]:
    """Times of the ops, then end to end, then the variants."""
    title = content["conditions"]["device"]
    shown = Table("cell", "pass", "ours us", "graph us", "x floor", "best baseline", "us", "x", "released x", "peak MB",
                  "baseline MB", title=f"ops, {title}")  # fmt: skip
    for row in measured(content):
        ours, other, mine = row["candidates"]["ours"], best_baseline(row), best(row["candidates"])
        released = baselines(row).get("released")
        graph = ours["graph"]
        shown.add_row(
            row["cell"]["label"],
            "f" if row["pass"] == "forward" else "f+b",
            f"{ours['median'] * 1e6:.1f}",
            f"{graph['median'] * 1e6:.1f}" if graph else "",
            f"{mine / row['floor_s']:.2f}" if row["floor_s"] else "",
            other.name if other else "",
            f"{other.seconds * 1e6:.1f}" if other else "",
            f"{other.ratio:.2f}" if other else "",
            f"{released.ratio:.2f}" if released else "",
            _megabytes(ours["peak_extra_bytes"]),
            _megabytes(other.peak_extra_bytes) if other else "",
        )
    yield shown
    whole = Table("end to end", "batch", "candidate", "ms", "over ours", "host ms", "hours of audio a second",
                  "steps a second", "peak MB", title=title)  # fmt: skip
    for row in content["model"]:
        for name, c in row.get("candidates", {}).items():
            whole.add_row(
                row["kind"], str(row["batch"]), name, f"{c['median'] * 1e3:.2f}", f"{over_ours(row, name):.2f}",
                f"{c['host'] * 1e3:.2f}" if c.get("host") else "",
                f"{c['hours_of_audio_per_second']:.3f}",
                f"{c['steps_per_second']:.2f}" if "steps_per_second" in c else "", _megabytes(c["peak_extra_bytes"]),
            )  # fmt: skip
    yield whole
    if content["choices"]:
        ways = Table("B", "T", "inside us", "outside us", "stored us", "storing us", "store for layers", title=title)
        layers = {(batch, frames): n for batch, frames, n in content["choices"]["stored"]}
        for row in content["variants"]:
            if "error" not in row:
                times = [f"{row[f'{way}_s'] * 1e6:.1f}" for way in ("inside", "outside", "stored", "storing")]
                ways.add_row(str(row["B"]), str(row["T"]), *times, str(layers[row["B"], row["T"]] or "never"))
        yield ways


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


# ---- pictures ---------------------------------------------------------------


def draw(content: dict[str, Any], stem: Path) -> None:
    """STEM-roofline.png: operations a second over operations a byte; STEM-bars.png: speed against each baseline."""
    rows = measured(content)
    if not rows:
        return
    colours = {"attend": "C0", "reattend": "C1", "pair": "C2", "loss": "C3", "conv": "C4", "position": "C5"}
    title = content["conditions"]["device"] + ("" if content["conditions"]["real"] else " (rehearsal)")

    def picture(name: str) -> Path:
        return stem.with_name(f"{stem.name}-{name}.png")

    figure, (axes,) = figures.panels(width=7.5, height=5)
    for op in dict.fromkeys(row["cell"]["op"] for row in rows):
        for which, marker in (("forward", "o"), ("forward+backward", "^")):
            mine = [row for row in rows if row["cell"]["op"] == op and row["pass"] == which]
            axes.scatter(
                [row["operations"] / row["bytes"] for row in mine],
                [row["operations"] / best(row["candidates"]) / 1e12 for row in mine],
                marker=marker, color=colours.get(op, "C5"), s=28, label=f"{op}, {which}",
            )  # fmt: skip
    roof = content["ceilings"]
    if "error" not in roof:
        intensity = [10 ** (i / 20) for i in range(0, 75)]
        top = [min(i * roof["bytes_per_second"], roof["operations_per_second"]) / 1e12 for i in intensity]
        axes.plot(intensity, top, color="0.4", label="measured copy and matrix product")
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte (fewest)", ylabel="Tera-operations a second", title=title
    )
    axes.legend(frameon=False, fontsize=7)
    figures.save(figure, picture("roofline"))

    against = [baselines(row) for row in rows]
    names = list(dict.fromkeys(name for others in against for name in others))
    figure, (axes,) = figures.panels(width=9, height=1.5 + 0.16 * len(rows) * max(1, len(names) / 2))
    height = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        points = [(i, others[name].ratio) for i, others in enumerate(against) if name in others]
        axes.barh([i + number * height for i, _ in points], [x for _, x in points], height, label=name)
    axes.axvline(1, color="0.3", linewidth=0.8)
    labels = [f"{row['cell']['label']} {'f+b' if '+' in row['pass'] else 'f'}" for row in rows]
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], labels, fontsize=6)
    axes.set(xscale="log", xlabel="time over ours", title=title)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=7)
    figures.save(figure, picture("bars"))
