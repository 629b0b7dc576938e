"""What an evaluation reports while it works, and how it is stopped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from armhubert.data import Scanning
from armhubert.superb.cache import Plan
from armhubert.superb.config import EvaluateConfig
from armhubert.superb.task import SplitName, Task
from armhubert.superb.upstream import Upstream


class Started(NamedTuple):
    """Everything is checked and built."""

    config: EvaluateConfig
    task: Task
    upstream: Upstream
    fold: int
    """From 1; 0: the task has none."""
    splits: Mapping[SplitName, tuple[int, float]]
    """Items and seconds of each."""
    notes: tuple[str, ...]
    changed: Mapping[str, Any]
    """Settings that are not SUPERB's."""
    parameters: int
    """Trained parameters: the head's and the weighted sum's."""
    first_step: int
    steps: int
    device: str


class CachePlanned(NamedTuple):
    """What computing features once will write."""

    plan: Plan


class Caching(NamedTuple):
    """Features computed so far."""

    done: int
    total: int


class Progress(NamedTuple):
    """Where training is, averaged since the last report."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    eta: float
    """Seconds."""


class Validated(NamedTuple):
    """Metrics on dev."""

    step: int
    metrics: Mapping[str, float]
    best: bool


class Searching(NamedTuple):
    """Pairs searched so far, in a task without training."""

    done: int
    total: int


class RateTried(NamedTuple):
    """Where a learning rate of a sweep stands after a part of the steps."""

    rate: float
    step: int
    metric: float | None
    """Best on dev so far; None: it diverged."""
    kept: bool


class Finished(NamedTuple):
    """The end of an evaluation, or of this part of it."""

    reason: str
    """done, stopped or dry run."""
    result: Mapping[str, Any]
    """Content of result.json; empty where the run was stopped."""
    out: Path


Report = Scanning | Started | CachePlanned | Caching | Progress | Validated | Searching | RateTried | Finished


class Stopped(Exception):
    """The user asked to stop; everything is saved."""
