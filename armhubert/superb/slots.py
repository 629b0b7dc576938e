"""Labels of intents and slots in one JSON file, for ic and sf."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from armhubert.data import discover
from armhubert.errors import ArmhubertError
from armhubert.settings import read_mapping
from armhubert.superb.task import SPLITS, SplitName, generator, some

JSON_LABELS = ("label/label.json", "labels.json", "label.json")


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
