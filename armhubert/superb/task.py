"""What a SUPERB task is: how to read its data, which head it trains, how predictions are scored.

    task.read(root, options) -> Corpus                items of train, dev and test, with labels
    task.head(width, corpus, settings) -> Head        head.loss(batch), head.predict(batch)
    task.score(predictions, split, corpus) -> Scores  metrics as SUPERB prints them, and what pictures need

Everything else (upstream, weighted sum of layers, features cache, batches, optimizer, resuming) is the runner's, the
same for all tasks. A task without training (`defaults.steps == 0`) has no head and implements `search` instead.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn

from armhubert.audio import AUDIO_SUFFIXES
from armhubert.errors import ArmhubertError
from armhubert.superb import metrics

SplitName = str
"""train, dev, test; further test sets are called `test:<name>`, and are scored by the same head."""

SPLITS = ("train", "dev", "test")


# ---- data ------------------------------------------------------------------


class Part(NamedTuple):
    """A piece of a recording, placed in an item's waveform."""

    path: str
    """Absolute."""
    start: int = 0
    """First sample, at 16 kHz."""
    count: int | None = None  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """Samples; None: to the end of the file."""
    offset: int = 0
    """Where it begins in the item's waveform."""
    gain: float = 1.0


class Item(NamedTuple):
    """One utterance. Its waveform is the sum of its parts: one file, a cut of it, or a simulated mixture."""

    key: str
    """Names the item within its split, without machine paths: goes into lists, hashes and prediction files."""
    parts: tuple[Part, ...]
    label: Any
    """What the task is to find: a tuple of class names (one for each group of classes), of tokens, segments..."""

    @classmethod
    def of_file(cls, path: Path, root: Path, label: Any) -> "Item":
        """The whole of one file, its key the path below `root` without suffix."""
        return cls(path.relative_to(root).with_suffix("").as_posix(), (Part(str(path)),), label)


class Split(NamedTuple):
    """The items of one split; `trials` where a task scores pairs instead of items."""

    items: tuple[Item, ...]
    trials: tuple[tuple[str, str, bool], ...] = ()
    """(key, key, same speaker) of asv's dev and test."""


@dataclass(frozen=True)
class Corpus:
    """The data of a task."""

    splits: Mapping[SplitName, Split]
    labels: tuple[tuple[str, ...], ...] = ()
    """Names of the classes, for each group of them (ks, sid, er: one group; ic: one a slot), or ctc's tokens."""
    notes: tuple[str, ...] = ()
    """One line each, shown before training and kept in the result: what was left out, how splits were made."""
    extra: Any = None
    """What only this task's head or score needs."""


@dataclass(frozen=True)
class Options:
    """What tasks can be told about their data; `Task.reads` names the fields that a task uses."""

    lexicon: str | None = None
    """pr: file of `WORD<tab or space>PHONES`; none: `lexicon.txt` or `librispeech-lexicon.txt` at the root."""
    train: tuple[str, ...] = ()
    """Names of the training subsets (folders of LibriSpeech); none: SUPERB's, else what is there."""
    dev: tuple[str, ...] = ()
    """As `train`; none: SUPERB's, else a share of the training data is held out."""
    test: tuple[str, ...] = ()
    """As `train`; of pr and asr, the second and further ones become splits of their own, `test:<name>`."""
    fold: int = 0
    """One fold of a task that has them, from 0."""
    seed: int = 0
    """Seed of what a reader draws: splits, mixtures, queries."""
    language_model: str | None = None
    """asr: ARPA file for beam search; none: greedy."""
    g2p: bool = False
    """pr: machine pronunciations for words outside the lexicon, whose utterances are left out otherwise."""

    def refuse(self, source: Path, *names: SplitName) -> None:
        """Refuse a choice of subsets that `source`, a list of the data's own, has made.

        Raises:
            ArmhubertError: one of these is given.
        """
        if given := next((name for name in names if getattr(self, name)), None):
            raise ArmhubertError(f"{source} says what {given} is: leave out {given}=...")


# ---- training --------------------------------------------------------------


class Batch(NamedTuple):
    """What a head sees: weighted sums of the upstream's layers."""

    features: Tensor
    """float32 [B, T, D], zero beyond each length."""
    lengths: Tensor
    """Valid frames [B], int64."""
    items: tuple[Item, ...]
    first: tuple[int, ...]
    """Frame of each item at which its features begin: not 0 where training crops."""
    hop: int
    """Samples between two frames."""


class Head(nn.Module, ABC):
    """A trained head. It knows the labels from the corpus, so that loss and prediction need a batch alone.

    Dropout and augmentation draw from torch's default generator, which the runner seeds for every step.
    """

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""

    @abstractmethod
    def predict(self, batch: Batch) -> list[Any]:
        """One prediction an item, on the CPU, of whatever type the task's `score` takes; called in eval mode."""


@dataclass(frozen=True)
class TrainingSettings:
    """SUPERB's training settings of a task."""

    learning_rate: float = 1e-4
    warmup: int | None = None
    """Steps in which the rate rises to `learning_rate`, to fall linearly to 0 in the others; none: it is constant."""
    batch: int = 32
    """Utterances a batch."""
    accumulate: int = 1
    """Batches a step."""
    steps: int = 200_000
    """0: no training."""
    clip: float = 1.0
    """Largest gradient norm."""
    optimizer: Literal["Adam", "AdamW"] = "Adam"
    validate_every: int = 5_000
    crop_seconds: float | None = None
    """Train on random crops of this many seconds of features, which have seen the whole recording (s3prl crops the
    waveform); dev and test are whole."""
    head_size: int = 0
    """Units of asr's and sf's projection and of each direction of their LSTMs; 0: the head has no such size."""
    balanced: bool = False
    """Draw training items so that every class (of the first group) is equally likely."""


class Metric(NamedTuple):
    """One number of a task."""

    name: str
    """Key in `Scores.metrics`: per, accuracy, eer..."""
    title: str
    """Heading in tables: PER, Accuracy, EER..."""
    higher_is_better: bool | None
    """None: neither is, as of the number of a layer."""
    unit: str = "%"
    """% for rates, which are printed as SUPERB does (5.41); empty for plain numbers."""


class Confusion(NamedTuple):
    """How often class i was taken for class j."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


class Detection(NamedTuple):
    """Trials, for a DET curve."""

    scores: tuple[float, ...]
    targets: tuple[bool, ...]


@dataclass(frozen=True)
class Scores:
    """What a split's predictions are worth."""

    metrics: Mapping[str, float]
    """By `Metric.name`; `Task.choose_by` names those that decide on dev."""
    confusion: Confusion | None = None
    by_label: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Errors and occurrences of each token (pr: phones), in the reference."""
    detection: Detection | None = None
    examples: tuple[tuple[str, str, str], ...] = ()
    """(key, reference, prediction) of some items, to read."""


class Task(ABC):
    """A task, without state: one instance serves all runs."""

    name: str
    """Name on the command line: pr, asr, ..."""
    title: str
    """Phoneme recognition, ..."""
    data: str
    """One line: the data layouts that `read` takes."""
    folders: tuple[str, ...] = ()
    """Where a suite looks for the data, below its root, before the root itself: names that downloads unpack to."""
    reads: tuple[str, ...] = ()
    """Fields of `Options` that the task uses, besides the seed."""
    metrics: tuple[Metric, ...]
    """The first is SUPERB's."""
    defaults: TrainingSettings
    whole: bool = False
    """Labels are transcripts of whole utterances: a crop would be trained on words that are not in it."""
    folds: int = 1
    """Cross-validation: the runner trains and tests once for each fold, and averages."""

    @property
    def choose_by(self) -> tuple[Metric, ...]:
        """What chooses the best step on dev: the first, between equals the next."""
        return self.metrics

    @abstractmethod
    def read(self, root: Path, options: Options) -> Corpus:
        """The data below `root`.

        Raises:
            ArmhubertError: layout not recognised, lists or transcripts missing, labels that cannot be used.
        """

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> Head:
        """A fresh head for features [B, T, width], of `settings.head_size` where the task's head has a size."""
        raise NotImplementedError(f"{self.name} is not trained")

    def score(self, predictions: Sequence[Any], split: Split, corpus: Corpus) -> Scores:
        """Metrics of the predictions, which are in the order of `split.items`."""
        raise NotImplementedError(f"{self.name} is not trained")

    def search(
        self, states: Callable[[SplitName], Iterator[Tensor]], corpus: Corpus
    ) -> Iterator[tuple[int, int] | Mapping[SplitName, Scores]]:
        """Score a task without training: from all layers' features, on the CPU.

        Args:
            states: the features [L, T, D] (float32) of each item of a split, in order.
            corpus: from `read`.

        Yields:
            (done, total) while it works; the scores of dev and test last. The choice of layer is made on dev.
        """
        raise NotImplementedError(f"{self.name} is trained")


# ---- for readers -----------------------------------------------------------


def classes(
    splits: Mapping[SplitName, Sequence[Item]],
    what: str | Sequence[str],
    *,
    notes: Sequence[str] = (),
    extra: Any = None,
) -> Corpus:
    """A corpus whose labels are tuples of class names, checked: the groups of classes are those of the training split.

    Args:
        splits: items by split.
        what: the classes' noun, for messages: speaker, emotion, keyword; or one for each group of classes.
        notes: of the reader.
        extra: as in `Corpus`.

    Raises:
        ArmhubertError: an empty split, fewer than two classes, or classes in dev or test that training never shows.
    """
    for name in SPLITS:
        if not splits.get(name):
            raise ArmhubertError(f"the {name} split has no utterances: check the data root and its lists")
    groups = len(splits["train"][0].label)
    nouns = (what,) * groups if isinstance(what, str) else what
    notes = list(notes)
    labels = tuple(tuple(sorted({item.label[group] for item in splits["train"]})) for group in range(groups))
    if all(len(group) < 2 for group in labels):
        raise ArmhubertError(f"training needs at least 2 {nouns[0]}s, got {len(labels[0])} ({labels[0][0]}): add data")
    for name in ("dev", "test"):
        for group in range(groups):
            there = {item.label[group] for item in splits[name]}
            if unseen := there.difference(labels[group]):
                raise ArmhubertError(
                    f"{len(unseen)} {nouns[group]}s of the {name} split are not in the training split "
                    f"({some(unseen)}): no head can learn them; correct the lists"
                )
            if absent := set(labels[group]) - there:
                notes.append(f"{len(absent)} {nouns[group]}s have no utterance in the {name} split ({some(absent)})")
    return Corpus({name: Split(tuple(splits[name])) for name in SPLITS}, labels, tuple(notes), extra)


def some(names: Iterable[Any], most: int = 5) -> str:
    """The first of sorted names, for messages."""
    listed = sorted(map(str, names))
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def unseen_tokens(splits: Mapping[SplitName, Sequence[Item]], what: str) -> list[str]:
    """Notes on tokens of dev and test that no training label has."""
    known = {token for item in splits["train"] for token in item.label}
    found = {name: {token for item in items for token in item.label} - known for name, items in splits.items()}
    return [
        f"{what} of {name} that training lacks count as errors: {some(tokens, 20)}"
        for name, tokens in found.items()
        if tokens
    ]


def classification_scores(predictions: Sequence[tuple[str, ...]], split: Split, corpus: Corpus) -> Scores:
    """Accuracy over one group of classes, with its confusion matrix."""
    truth = [item.label[0] for item in split.items]
    guess = [prediction[0] for prediction in predictions]
    place = {label: number for number, label in enumerate(corpus.labels[0])}
    counts = [[0] * len(place) for _ in place]
    for true, guessed in zip(truth, guess, strict=True):
        counts[place[true]][place[guessed]] += 1
    wrong = [(item.key, t, g) for item, t, g in zip(split.items, truth, guess, strict=True) if t != g]
    return Scores(
        {"accuracy": metrics.accuracy(guess, truth)},
        confusion=Confusion(corpus.labels[0], tuple(map(tuple, counts))),
        examples=tuple(wrong[:20]),
    )


def generator(*key: object) -> np.random.Generator:
    """Random numbers that are a function of the key alone."""
    return np.random.default_rng(list(":".join(map(str, key)).encode()))


def audio_files(folder: Path) -> list[Path]:
    """Audio files right inside a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES and path.name[0] != ".")


def read_lines(path: Path, what: str) -> list[str]:
    """Stripped lines of a list that are not empty; an ArmhubertError that says what is missing where there is none."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ArmhubertError(f"{what} is missing: expected {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArmhubertError(f"{what} {path} cannot be read ({error}): it must be a UTF-8 text file") from None
    return [line.strip() for line in text.split("\n") if line.strip()]
