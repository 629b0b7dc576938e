"""A student for a budget: width, feed-forward width, depth and reuse pattern, with its latency measured here.

For each kind of student (how many layers share a map, how deep) the widest one within the budget is found, and what is
left goes into its feed-forward blocks: parameters and operations are counted, latency is measured. Which kind learns
best is for an evaluation to say; the published one is the first.
"""

import bisect
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import yaml

from armhubert.clock import Timing, interleave
from armhubert.config import SAMPLE_RATE, EncoderConfig
from armhubert.convert import load_weights
from armhubert.distill_config import DistillConfig, student_config
from armhubert.errors import ArmhubertError
from armhubert.files import write_atomic
from armhubert.machine import pick_device
from armhubert.student import ARMHuBERT, count_parameters

Kind = Literal["parameters", "macs", "latency"]

SECONDS = 10.0
"""Length of the audio that operations and latency are counted for."""
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "ms": 1e-3, "s": 1.0}


class Budget(NamedTuple):
    """What the student may cost, without its distillation heads."""

    kind: Kind
    limit: float
    """Parameters; multiply-accumulates for 10 s; or seconds for 10 s at batch size 1."""

    def missed(self, proposal: "Proposal") -> bool:
        """Whether a proposal that was found within a latency took longer when all were timed in turn at the end."""
        return self.kind == "latency" and proposal.latency.median > self.limit


class Proposal(NamedTuple):
    """The widest student of one kind within the budget."""

    kind: str
    settings: DistillConfig
    student: EncoderConfig
    parameters: int
    macs: int
    latency: Timing


class Searching(NamedTuple):
    """A kind of student is being sized."""

    kind: str


def parse_amount(text: str, kind: Kind) -> float:
    """`20M`, `15G`, `200ms`, `0.2s` -> a number.

    Raises:
        ArmhubertError: no number, another unit than the kind has, a latency without one, or not above 0.
    """
    allowed = ("s", "ms") if kind == "latency" else ("", "k", "m", "g")
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in allowed or not 0 < float(match[1]) < 1e15:
        example = "200ms or 0.2s" if kind == "latency" else "20M or 2e7"
        raise ArmhubertError(f"{kind} must be like {example}, got {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def plan(
    teacher: str, budget: Budget, *, device: str = "auto", repeats: int = 5
) -> Iterator[Searching | list[Proposal]]:
    """Find the students; the last report is the list of proposals, the published kind first, timed in turn.

    Their loss is `masking`, or `plain` for a teacher without a mask embedding, which has no masked view.

    Args:
        teacher: as for `distill`.
        budget: what the student may cost.
        device: where latency is measured.
        repeats: interleaved runs of each proposal.

    Raises:
        ArmhubertError: a budget of another kind or not above 0, `repeats` below 1, no student that is small enough, or
            no teacher there.
    """
    if budget.kind not in _WORDS or not budget.limit > 0:
        raise ArmhubertError(
            f"a budget must be of {', '.join(_WORDS)}, and above 0, got {budget.kind!r} and {budget.limit}"
        )
    if repeats < 1:
        raise ArmhubertError(f"repeats must be at least 1, got {repeats}")
    weights = load_weights(teacher)
    where, found = pick_device(device), []
    smallest = float("inf")
    loss = "masking" if weights.config.mask_embedding else "plain"
    for kind, settings in _kinds(teacher, weights.config, loss):
        yield Searching(kind)
        cost = _cost(budget.kind, where)

        def largest(sizes: list[_Size], cost: Callable[[EncoderConfig], float] = cost) -> _Size | None:
            return _last_fitting(sizes, lambda size: cost(size.student) <= budget.limit)

        sizes = [_size(settings, weights.config, width, 1.8) for width in _widths(weights.config)]
        widest = largest(sizes)
        if widest is None:
            smallest = min(smallest, cost(sizes[0].student))
            continue
        width = widest.student.width
        fuller = [_size(settings, weights.config, width, 1.8 + 0.1 * i) for i in range(7)]
        found.append((kind, largest(fuller) or widest))
    if not found:
        raise ArmhubertError(
            f"no student of {teacher} is within {budget.limit:g} {_WORDS[budget.kind]}: the smallest has {smallest:g}"
        )
    timings = _latencies({kind: size.student for kind, size in found}, where, repeats)
    yield [Proposal(kind, *size, *_counts(size.student), timings[kind]) for kind, size in found]


_WORDS = {"parameters": "parameters", "macs": "multiply-accumulates for 10 s", "latency": "seconds for 10 s"}


def _kinds(teacher: str, config: EncoderConfig, loss: str) -> list[tuple[str, DistillConfig]]:
    base = DistillConfig(teacher=teacher, layers=config.layers, heads=config.heads, loss=loss)
    half = max(1, config.layers // 2)
    kinds = {
        "every second layer reuses a map (published)": ("CR" * config.layers, config.layers),
        "two of three layers reuse a map": ("CRR" * config.layers, config.layers),
        "every layer computes its map": ("C" * config.layers, config.layers),
        "half as deep, every second layer reuses a map": ("CR" * half, half),
    }
    return [
        (name, dataclasses.replace(base, layers=depth, pattern=pattern[:depth]))
        for name, (pattern, depth) in kinds.items()
    ]


class _Size(NamedTuple):
    settings: DistillConfig
    student: EncoderConfig
    """Without heads."""


def _widths(teacher: EncoderConfig) -> list[int]:
    """Widths that the heads and the groups of the positional convolution divide, up to the teacher's."""
    step = math.lcm(16, teacher.heads)
    return list(range(step, teacher.width + 1, step)) or [teacher.width]


def _size(settings: DistillConfig, teacher: EncoderConfig, width: int, ratio: float) -> _Size:
    """A student of that width, its feed-forward `ratio` times as wide: 1.8 in the published ones (864 / 480)."""
    sized = dataclasses.replace(settings, width=width, ffn=max(16, round(ratio * width / 16) * 16))
    return _Size(sized, dataclasses.replace(student_config(sized, teacher), projection_width=None))


def _counts(student: EncoderConfig) -> tuple[int, int]:
    with torch.device("meta"):
        return count_parameters(ARMHuBERT(student)).total, student.macs(round(SECONDS * SAMPLE_RATE))


def _cost(kind: Kind, device: torch.device) -> Callable[[EncoderConfig], float]:
    if kind == "latency":
        return lambda student: _latencies({"": student}, device, 3)[""].median
    return lambda student: _counts(student)[0 if kind == "parameters" else 1]


def _last_fitting(sizes: list[_Size], fits: Callable[[_Size], bool]) -> _Size | None:
    """The last of the sizes that fits, by bisection: cost grows along them."""
    count = bisect.bisect_left(sizes, True, key=lambda size: not fits(size))
    return sizes[count - 1] if count else None


def _latencies(students: dict[str, EncoderConfig], device: torch.device, repeats: int) -> dict[str, Timing]:
    waveforms = torch.zeros(1, round(SECONDS * SAMPLE_RATE), device=device)
    runs = {}
    with torch.random.fork_rng([]):
        for name, config in students.items():
            model = ARMHuBERT(config).to(device).eval().requires_grad_(False)
            runs[name] = lambda model=model: model(waveforms)
    with torch.no_grad():
        return interleave(runs, repeats=repeats, device=device)


def write(proposal: Proposal, path: Path) -> None:
    """The proposal as a configuration file for `armhubert distill --config`: JSON by that ending, else YAML."""
    chosen = ("teacher", "loss", "width", "layers", "heads", "ffn", "pattern")
    settings = {name: getattr(proposal.settings, name) for name in chosen}
    header = (
        f"# {proposal.kind}: {proposal.parameters:,} parameters without heads, {proposal.macs / 1e9:.1f} G "
        f"multiply-accumulates for 10 s\n# armhubert distill DATA --config {path.name}\n"
    )
    if path.suffix.lower() == ".json":
        write_atomic(path, json.dumps(settings, indent=2) + "\n")
    else:
        write_atomic(path, header + yaml.safe_dump(settings, sort_keys=False))
