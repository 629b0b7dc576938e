"""What an evaluation is told: one flat, frozen set of settings, from the command line or a file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from armhubert.errors import ArmhubertError
from armhubert.settings import check_fields, documented
from armhubert.superb.task import SPLITS, Options, Task, TrainingSettings
from armhubert.superb.tasks import find
from armhubert.superb.upstream import FeatureChoice

RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""SUPERB's range for the learning rate."""
MOST_RATE = 10.0
"""Above it no Adam learns anything."""


@documented
@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of one `armhubert evaluate` of one model on one task; what is none is SUPERB's (`Task.defaults`).

    Raises:
        ArmhubertError: a setting breaks a rule; the message names the rule, the value and the remedy.
    """

    model: str = "mini"
    """A student, any teacher, `fbank`, `fbank_no_cmvn`, `mfcc`, `module:function`, or `file.py:function`."""
    task: str = "pr"
    """pr, asr, ks, qbe, sid, asv, sd, ic, sf or er."""
    data: str = ""
    """Root of the task's data."""
    out: str = "runs/evaluate"
    """Folder of the run: result, checkpoint, pictures, predictions."""
    features: FeatureChoice = "auto"
    """What is evaluated: `hidden` states, outputs of a student's `heads`, or `auto`, the heads where there are any."""
    normalize_layers: bool = False
    """Normalise every frame of every layer before the weighted sum; SUPERB does not."""

    lexicon: str | None = None
    """pr: pronunciations; none: lexicon.txt beside the data."""
    train: tuple[str, ...] = ()
    """Subsets of the data to train on; none: SUPERB's, else what is there."""
    dev: tuple[str, ...] = ()
    """Subsets to choose on, likewise."""
    test: tuple[str, ...] = ()
    """Subsets to score, likewise; pr, asr: the first gives the result, every further one is scored by the same head."""
    fold: int | None = None
    """One fold of a task that has them, from 1; none: all."""
    g2p: bool = False
    """pr: machine pronunciations for words outside the lexicon; else their utterances are left out."""
    language_model: str | None = None
    """asr: ARPA file for beam search; none: greedy."""

    optimizer: Literal["Adam", "AdamW"] | None = None
    """Optimizer of the head."""
    learning_rate: float | None = None
    """Learning rate, constant unless `warmup` is given."""
    warmup: int | None = None
    """Steps in which the rate rises from 0, to fall linearly to 0 in the others (s3prl's schedule); none: constant."""
    batch: int | None = None
    """Utterances a batch."""
    accumulate: int | None = None
    """Batches a step."""
    steps: int | None = None
    """Optimizer steps."""
    clip: float | None = None
    """Largest gradient norm."""
    crop_seconds: float | None = None
    """Train on random crops of this length, but for pr, asr and sf; 0: whole utterances."""
    head_size: int | None = None
    """asr, sf: units of the projection and of each LSTM's direction; SUPERB's 1024 take minutes a step on two cores."""
    sweep: Literal["lr"] | None = None
    """Try several learning rates and keep the best on dev."""
    rates: tuple[float, ...] = RATES
    """Learning rates that a sweep tries."""

    cache: str | None = None
    """Folder for features, shared by all tasks and models; none: computed anew in every epoch."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Threads that read audio; 0: none."""
    seed: int = 0
    """Seed of all random numbers."""
    validate_every: int | None = None
    """Steps between validations, each of which leaves a checkpoint."""
    log_every: int | None = None
    """Steps between reports; none: a fiftieth of the steps, at most 100."""
    dry_run: bool = False
    """Check everything, take two steps, score a few utterances, write no result."""

    def __post_init__(self) -> None:
        check_fields(self)
        task = find(self.task)
        for name in (
            "learning_rate",
            "batch",
            "accumulate",
            "steps",
            "clip",
            "validate_every",
            "log_every",
            "head_size",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ArmhubertError(f"{name} must be above 0, got {value}")
        for rate in (self.learning_rate or 0.0, *(self.rates if self.sweep else ())):
            if rate > MOST_RATE:
                raise ArmhubertError(f"a learning rate must be at most {MOST_RATE:g}, got {rate:g}")
        for name in ("crop_seconds", "workers", "seed", "warmup"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ArmhubertError(f"{name} must be at least 0, got {value}")
        if not self.data:
            raise ArmhubertError(
                f"give data=..., the root of {task.name}'s data: {task.data}; suite='mini' is on bundled speech"
            )
        if not Path(self.data).is_dir():
            raise ArmhubertError(f"data root {self.data!r} must be a folder that exists: {task.data}")
        for name in given_in_vain(task, vars(self)):
            what = _ABSENT.get(name, "training")
            raise ArmhubertError(f"{task.name} has no {what}: leave out {name}=...")
        if self.fold is not None and not 1 <= self.fold <= task.folds:
            raise ArmhubertError(f"fold must be within 1 and {task.folds} for {task.name}, got {self.fold}")
        if self.warmup is not None and self.warmup > self.training.steps:
            raise ArmhubertError(f"warmup must be at most the run's {self.training.steps} steps, got {self.warmup}")
        if self.sweep and self.learning_rate is not None:
            raise ArmhubertError("sweep='lr' chooses the learning rate: leave out learning_rate=...")
        if self.sweep and (len(set(self.rates)) < max(2, len(self.rates)) or min(self.rates) <= 0):
            raise ArmhubertError(f"a sweep needs at least 2 rates, different and above 0, got {list(self.rates)}")
        if not self.sweep and self.rates != RATES:
            raise ArmhubertError("rates are those of a sweep: add sweep='lr', or give one with learning_rate=...")

    @property
    def training(self) -> TrainingSettings:
        """SUPERB's settings of the task with what was given instead."""
        defaults = find(self.task).defaults
        given = {
            field.name: value
            for field in dataclasses.fields(TrainingSettings)
            if (value := getattr(self, field.name, None)) is not None
        }
        settings = dataclasses.replace(defaults, **given)
        if settings.steps and self.validate_every is None:
            settings = dataclasses.replace(
                settings, validate_every=min(settings.validate_every, max(1, settings.steps // 10))
            )
        return dataclasses.replace(settings, crop_seconds=settings.crop_seconds or None)

    def options(self, fold: int) -> Options:
        """What the task is told about its data; `fold` from 0."""
        return Options(self.lexicon, self.train, self.dev, self.test, fold, self.seed, self.language_model, self.g2p)


def given_in_vain(task: Task, settings: Mapping[str, Any]) -> list[str]:
    """Settings that a task has no use for and that would be thought to work: of its data, of training, of the head."""
    useless = {field.name for field in dataclasses.fields(Options)} - {"seed", *task.reads}
    if not task.defaults.head_size:
        useless.add("head_size")
    if task.whole and settings.get("crop_seconds"):  # 0 is whole utterances
        useless.add("crop_seconds")
    if not task.defaults.steps:
        useless |= {field.name for field in dataclasses.fields(TrainingSettings)} | {"sweep", "normalize_layers"}
    return [n for n, value in settings.items() if n in useless and value not in (None, (), []) and value is not False]


_ABSENT = {
    "fold": "folds",
    "head_size": "head whose size can be set",
    "crop_seconds": "training on crops",
    "lexicon": "lexicon",
    "g2p": "lexicon",
    "language_model": "language model",
    **{split: f"choice of {split} subsets" for split in SPLITS},
}
"""What a task lacks that is given one of these in vain; another setting is of training."""


# What may differ when a run is resumed: how it is carried out, not what it computes.
RESUMABLE = frozenset({"out", "workers", "device", "log_every", "cache"})
