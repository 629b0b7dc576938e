"""Intent classification: Fluent Speech Commands, or JSON labels with an intent and slots."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from armhubert.data import discover
from armhubert.errors import ArmhubertError
from armhubert.settings import read_mapping
from armhubert.superb import metrics
from armhubert.superb.heads import PooledClassifier
from armhubert.superb.speakers import generator
from armhubert.superb.task import (
    SPLITS,
    Corpus,
    Defaults,
    Item,
    Metric,
    Options,
    Part,
    Scores,
    Split,
    SplitName,
    Task,
    classes,
    some,
)

SLOTS = ("action", "object", "location")
LISTS: dict[SplitName, str] = {"train": "train_data.csv", "dev": "valid_data.csv", "test": "test_data.csv"}
ABSENT = "none"
"""The class of a slot that an utterance does not fill, as in Fluent Speech Commands."""

JSON_LABELS = ("label/label.json", "labels.json", "label.json")


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
    defaults = Defaults(learning_rate=1e-4, batch=32, steps=200_000, validate_every=5_000)

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

    def head(self, width: int, corpus: Corpus, settings: Defaults) -> PooledClassifier:
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


# ---- JSON labels -----------------------------------------------------------


class Labelled(NamedTuple):
    """One utterance of a JSON file."""

    path: Path
    intent: str
    slots: Mapping[str, str]
    text: str | None
    """The transcript; None where the file has none."""
    speaker: str | None
    split: SplitName | None


def read_json_slots(root: Path, other: str) -> tuple[list[Labelled], list[str]]:
    """Utterances of `label/label.json` (or labels.json, label.json) that have audio below `root`, and notes.

    The file maps a recording's name, whose folder and suffix do not matter, to `intent` (text), `slots` (name to
    value) and, where known, `text` (or transcript, transcription), `speaker` and `split` (train, dev or test).

    Args:
        root: of the data.
        other: the list of the task's other layout, to name where nothing is found.

    Raises:
        ArmhubertError: no such file, or an entry of another form; a label has audio twice; none has audio.
    """
    source = next((root / name for name in JSON_LABELS if (root / name).is_file()), None)
    if source is None:
        raise ArmhubertError(f"labels are missing: {root} has none of {other}, {', '.join(JSON_LABELS)}")
    entries = read_mapping(source)
    audio: dict[str, Path] = {}
    for path in discover([root]):
        if path.stem in audio:
            raise ArmhubertError(
                f"{path} and {audio[path.stem]} have the same name: labels could mean either; rename one"
            )
        audio[path.stem] = path
    labelled = []
    missing = []
    for name, entry in entries.items():
        stem = Path(name).stem
        if stem in audio:
            labelled.append(_labelled(source, name, entry, audio.pop(stem)))
        else:
            missing.append(name)
    if not labelled:
        raise ArmhubertError(f"none of the {len(entries)} labels of {source} has audio below {root}: check the names")
    notes = []
    if missing:
        notes.append(f"{len(missing)} labels have no audio and are left out ({some(missing)})")
    if audio:
        notes.append(f"{len(audio)} recordings have no label and are left out ({some(audio)})")
    return sorted(labelled, key=lambda utterance: utterance.path), notes


def _labelled(source: Path, name: str, entry: object, path: Path) -> Labelled:
    rule = f"{source}: {name!r} must have intent (text) and slots (names to values, texts)"
    if not isinstance(entry, dict):
        raise ArmhubertError(f"{rule}, got {str(entry)[:60]!r}")
    slots = entry.get("slots", {})
    if not isinstance(slots, dict) or not all(isinstance(value, str) and value.strip() for value in slots.values()):
        raise ArmhubertError(f"{rule}, got slots {str(slots)[:60]!r}")
    text = next((entry[key] for key in ("text", "transcript", "transcription") if key in entry), None)
    texts = (entry.get("intent"), text, entry.get("speaker"), entry.get("split"))
    if not isinstance(texts[0], str) or not all(value is None or isinstance(value, str) for value in texts):
        raise ArmhubertError(f"{rule}, got {str(entry)[:60]!r}")
    split = texts[3] and {"valid": "dev", "validation": "dev", "eval": "test"}.get(texts[3], texts[3])
    if split is not None and split not in SPLITS:
        raise ArmhubertError(f"{source}: the split of {name!r} must be train, dev or test, got {split!r}")
    clean = {slot: " ".join(value.split()) for slot, value in slots.items()}
    return Labelled(path, texts[0], clean, text, texts[2], split)


def split_utterances(
    labelled: Sequence[Labelled], values: Sequence[set[tuple[int, str]]], seed: int
) -> tuple[dict[SplitName, list[int]], list[str]]:
    """Places of the utterances of each split, and notes: by the file's splits, else by speaker, else at random.

    Without splits, utterances of dev and test that have one of `values` which training lacks are moved to training.

    Raises:
        ArmhubertError: some utterances have a split and some have none.
    """
    splits: dict[SplitName, list[int]] = {name: [] for name in SPLITS}
    given = sum(utterance.split is not None for utterance in labelled)
    if given:
        if given < len(labelled):
            raise ArmhubertError(
                f"{len(labelled) - given} of {len(labelled)} labels have no split: give it to all of them, or to none"
            )
        for place, utterance in enumerate(labelled):
            splits[utterance.split or "train"].append(place)
        return splits, []
    by_speaker = all(utterance.speaker is not None for utterance in labelled)
    group = [utterance.speaker if by_speaker else place for place, utterance in enumerate(labelled)]
    groups = sorted(set(group), key=str)
    draw = generator(seed, "split").permutation(len(groups)).tolist()
    tenth = max(1, len(groups) // 10)
    kind = {
        groups[g]: "dev" if rank < tenth else "test" if rank < 2 * tenth else "train" for rank, g in enumerate(draw)
    }
    for place, of in enumerate(group):
        splits[kind[of]].append(place)
    known = set().union(*(values[place] for place in splits["train"]))
    moved = 0
    for name in ("dev", "test"):
        for place in list(splits[name]):
            if not values[place] <= known:
                known |= values[place]
                splits[name].remove(place)
                splits["train"].append(place)
                moved += 1
    how = "by speaker" if by_speaker else "at random, speakers unknown"
    notes = [f"no splits in the labels: split 80/10/10 {how} (seed {seed})"]
    if moved:
        notes.append(f"{moved} utterances with a value that training lacked were moved to training")
    return {name: sorted(places) for name, places in splits.items()}, notes
