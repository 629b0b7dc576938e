"""LibriSpeech's layout: subset/speaker/chapter/*.flac and *.trans.txt."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from armhubert.audio import AUDIO_SUFFIXES
from armhubert.errors import ArmhubertError
from armhubert.superb.task import SPLITS, Options, SplitName, read_lines, some

SUPERB_SUBSETS: dict[SplitName, str] = {"train": "train-clean-100", "dev": "dev-clean", "test": "test-clean"}
HELD_OUT = 0.1
"""Share of the training utterances that becomes dev, or test, where the data has none."""


class Transcribed(NamedTuple):
    """One utterance with its words."""

    path: Path
    speaker: str
    words: tuple[str, ...]

    @property
    def key(self) -> str:
        """LibriSpeech's utterance id."""
        return self.path.stem


def is_librispeech(root: Path) -> bool:
    """Whether subsets of LibriSpeech lie in `root` or in a folder LibriSpeech of it."""
    return any(next(base.glob("*/*/*/*.trans.txt"), None) is not None for base in (root, root / "LibriSpeech"))


def choose_subsets(root: Path, options: Options) -> tuple[dict[SplitName, list[Path]], list[str]]:
    """The folders of each split below `root` or `root/LibriSpeech`; train, dev or test may be empty: to be held out.

    Returns:
        folders by split, and notes.

    Raises:
        ArmhubertError: a named subset is not there, or no LibriSpeech is.
    """
    bases = [path for path in (root, root / "LibriSpeech") if path.is_dir()]
    found = {
        path.name: path
        for base in bases
        for path in sorted(base.iterdir())
        if path.is_dir() and next(path.glob("*/*/*.trans.txt"), None) is not None
    }
    if not found and next(root.glob("*/*/*.trans.txt"), None) is not None:
        found = {root.name: root}  # one subset alone
    chosen: dict[SplitName, list[Path]] = {}
    notes = []
    for split in SPLITS:
        names = getattr(options, split)
        if names:
            chosen[split] = [_named(name, bases, found) for name in names]
        elif SUPERB_SUBSETS[split] in found:
            chosen[split] = [found[SUPERB_SUBSETS[split]]]
        else:
            chosen[split] = [path for name, path in found.items() if name.startswith(split)]
            if chosen[split]:
                notes.append(f"{split} is {', '.join(path.name for path in chosen[split])}: not SUPERB's")
    if not chosen["train"]:
        rest = [path for path in found.values() if path not in chosen["dev"] + chosen["test"]]
        if not rest:
            raise ArmhubertError(
                f"{root} holds no training data in LibriSpeech's layout: expected train-clean-100/<speaker>/<chapter>/"
                "*.flac with *.trans.txt below it, or name the subsets with train=..."
            )
        chosen["train"] = rest
    tests = chosen["test"]
    chosen["test"] = tests[:1]
    chosen |= {f"test:{folder.name}": [folder] for folder in tests[1:]}
    return chosen, notes


def _named(name: str, bases: Sequence[Path], found: dict[str, Path]) -> Path:
    for base in bases:
        if (base / name).is_dir():
            return base / name
    raise ArmhubertError(
        f"subset {name!r} does not exist below {bases[0] if bases else 'the data root'}; "
        f"there are {', '.join(found) or 'none'}"
    )


def read_subset(folder: Path) -> tuple[list[Transcribed], list[str]]:
    """All utterances of a subset that have both audio and transcript, in order of their ids; and what was left out.

    Raises:
        ArmhubertError: no transcripts, or none with audio.
    """
    audio = {path.stem: path for path in sorted(folder.glob("*/*/[!.]*")) if path.suffix.lower() in AUDIO_SUFFIXES}
    utterances, silent, wordless = [], [], []
    lists = sorted(folder.glob("*/*/[!.]*.trans.txt"))  # macOS leaves ._1-2.trans.txt beside 1-2.trans.txt
    if not lists:
        raise ArmhubertError(f"{folder} has no transcripts: expected <speaker>/<chapter>/*.trans.txt")
    for path in lists:
        for line in read_lines(path, "transcript"):
            key, *words = line.split()
            file = audio.pop(key, None)
            if file is None:
                silent.append(key)
            elif words:
                utterances.append(Transcribed(file, file.parent.parent.name, tuple(words)))
            else:
                wordless.append(key)
    notes = []
    if silent:
        notes.append(f"{folder.name}: {len(silent)} transcripts ({some(silent)}) without audio left out")
    if wordless:
        notes.append(f"{folder.name}: {len(wordless)} transcripts ({some(wordless)}) without words left out")
    if audio:
        notes.append(f"{folder.name}: {len(audio)} recordings ({some(audio)}) without transcript left out")
    if not utterances:
        raise ArmhubertError(
            f"none of the {len(silent) + len(wordless)} transcripts in {folder} has both words and audio beside it "
            f"({'; '.join(notes)}): check the folder"
        )
    return utterances, notes


def read_splits(folders: Mapping[SplitName, Sequence[Path]]) -> tuple[dict[SplitName, list[Transcribed]], list[str]]:
    """All utterances of the subsets of each split, and notes of `read_subset`."""
    splits: dict[SplitName, list[Transcribed]] = {split: [] for split in folders}
    notes = []
    for split, paths in folders.items():
        for path in paths:
            utterances, more = read_subset(path)
            splits[split] += utterances
            notes += more
    return splits, notes


def hold_out_utterances(
    splits: dict[SplitName, list[Transcribed]],
    which: Sequence[SplitName] = ("dev", "test"),
    *,
    by_speaker: bool = False,
) -> tuple[dict[SplitName, list[Transcribed]], list[str]]:
    """Fill an empty dev or test from train: a tenth, but at least one and never the last, chosen by the hash of the
    utterance's id; of every speaker alike with `by_speaker`, as speaker identification needs."""
    notes = []
    for split in which:
        if splits.get(split):
            continue
        train = splits["train"]
        groups: dict[str, list[Transcribed]] = {}
        for utterance in train:
            groups.setdefault(utterance.speaker if by_speaker else "", []).append(utterance)
        held = {
            utterance.path
            for group in groups.values()
            if len(group) > 1
            for utterance in sorted(group, key=lambda u: _rank(split, u.key))[: max(1, round(HELD_OUT * len(group)))]
        }
        splits = {
            **splits,
            "train": [u for u in train if u.path not in held],
            split: [u for u in train if u.path in held],
        }
        notes.append(f"no {split} data: {len(held)} utterances of train are held out")
    return splits, notes


def _rank(split: str, key: str) -> bytes:
    return hashlib.blake2b(f"{split}:{key}".encode(), digest_size=8).digest()
