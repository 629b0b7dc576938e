"""Intent classification: Fluent Speech Commands, or JSON labels with an intent and slots."""

import csv
from collections.abc import Sequence
from pathlib import Path

from armhubert.errors import ArmhubertError
from armhubert.superb import metrics
from armhubert.superb.heads import PooledClassifier
from armhubert.superb.slots import read_json_slots, split_utterances
from armhubert.superb.task import (
    SPLITS,
    Corpus,
    Item,
    Metric,
    Options,
    Part,
    Scores,
    Split,
    SplitName,
    Task,
    TrainingSettings,
    classes,
    some,
)

SLOTS = ("action", "object", "location")
LISTS: dict[SplitName, str] = {"train": "train_data.csv", "dev": "valid_data.csv", "test": "test_data.csv"}
ABSENT = "none"
"""The class of a slot that an utterance does not fill, as in Fluent Speech Commands."""


class IntentClassification(Task):
    """One group of classes a slot; an utterance is right where all of them are."""

    name = "ic"
    title = "Intent classification"
    data = (
        "Fluent Speech Commands (data/train_data.csv, valid_data.csv, test_data.csv), or label/label.json of "
        '{"a.wav": {"intent": "...", "slots": {"name": "value"}}}'
    )
    folders = ("fluent_speech_commands_dataset", "fluent_speech_commands", "intents")
    metrics = (Metric("accuracy", "Accuracy", True), Metric("slot_accuracy", "Mean accuracy of slots", True))
    defaults = TrainingSettings(learning_rate=1e-4, batch=32, steps=200_000, validate_every=5_000)

    def read(self, root: Path, options: Options) -> Corpus:
        """A JSON file without splits is split 80/10/10, so that training has every value."""
        if (root / "data" / LISTS["train"]).is_file():
            return _read_fluent(root)
        labelled, notes = read_json_slots(root, f"data/{LISTS['train']}")
        slots = sorted({slot for utterance in labelled for slot in utterance.slots})
        items = [
            Item.of_file(
                utterance.path,
                root.absolute(),
                (utterance.intent, *(utterance.slots.get(slot, ABSENT) for slot in slots)),
            )
            for utterance in labelled
        ]
        values = [set(enumerate(item.label)) for item in items]
        places, more = split_utterances(labelled, values, options.seed)
        splits = {name: [items[place] for place in places[name]] for name in SPLITS}
        nouns = ("intent", *(f"{slot} value" for slot in slots))
        return classes(splits, nouns, notes=(*notes, *more), extra=("intent", *slots))

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> PooledClassifier:
        """Linear to 256, mean over time, a linear layer for each slot."""
        return PooledClassifier(width, corpus.labels)

    def score(self, predictions: Sequence[tuple[str, ...]], split: Split, corpus: Corpus) -> Scores:
        """Accuracy of all slots jointly, and on average; `by_label` counts the errors of each slot."""
        truth = [tuple(item.label) for item in split.items]
        misses = [
            (item.key, " ".join(item.label), " ".join(guess))
            for item, guess in zip(split.items, predictions, strict=True)
            if tuple(guess) != tuple(item.label)
        ]
        errors = {
            name: (sum(guess[group] != true[group] for guess, true in zip(predictions, truth, strict=True)), len(truth))
            for group, name in enumerate(corpus.extra)
        }
        return Scores(
            {
                "accuracy": metrics.accuracy([tuple(guess) for guess in predictions], truth),
                "slot_accuracy": 100 * (1 - sum(wrong for wrong, _ in errors.values()) / (len(truth) * len(errors))),
            },
            by_label=errors,
            examples=tuple(misses[:20]),
        )


def _read_fluent(root: Path) -> Corpus:
    splits: dict[SplitName, list[Item]] = {}
    missing = []
    for split, name in LISTS.items():
        path = root / "data" / name
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except FileNotFoundError:
            raise ArmhubertError(f"the {split} list of Fluent Speech Commands is missing: expected {path}") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ArmhubertError(f"{path} cannot be read ({error}): it must be a UTF-8 CSV file") from None
        for row in rows:
            if absent := [column for column in ("path", *SLOTS) if not row.get(column)]:
                raise ArmhubertError(f"{path} has a row without {', '.join(absent)}: it needs path, {', '.join(SLOTS)}")
            audio = root.absolute() / row["path"]
            if audio.is_file():
                label = tuple(row[slot] for slot in SLOTS)
                key = Path(row["path"]).with_suffix("").as_posix()
                splits.setdefault(split, []).append(Item(key, (Part(str(audio)),), label))
            else:
                missing.append(row["path"])
    notes = (
        [f"{len(missing)} recordings of the lists have no audio and are left out ({some(missing)})"] if missing else []
    )
    return classes(splits, SLOTS, notes=notes, extra=SLOTS)
