"""Recordings by speaker, for asv and sd: LibriSpeech, VoxCeleb1, or any folders of speakers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import soundfile

from armhubert.data import discover
from armhubert.errors import ArmhubertError
from armhubert.superb.librispeech import choose_subsets, is_librispeech
from armhubert.superb.task import SPLITS, Options, SplitName, generator

Speakers = Mapping[str, Sequence[Path]]
"""Recordings of each speaker, sorted."""

LAYOUTS = "LibriSpeech's subsets, VoxCeleb1's dev/wav and test/wav, train, dev and test folders, or folders of speakers"

_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("dev/wav", "train"),
    "dev": ("dev", "valid", "val"),
    "test": ("test/wav", "test", "eval"),
}


class SpeakerSplits(NamedTuple):
    """Speakers of train, dev and test; none is in two of them unless the folders say so."""

    train: Speakers
    dev: Speakers
    test: Speakers
    notes: tuple[str, ...]


def speaker_splits(root: Path, options: Options) -> SpeakerSplits:
    """Speakers below `root`: the folder right below a subset names the speaker. Several subsets of a split are one.

    Without dev or test folders, a seventh of the training speakers (2 to 40) is held out for each; which ones depends
    on the seed and their names.

    Raises:
        ArmhubertError: no speech there, a named subset is missing, or too few speakers.
    """
    notes: list[str] = []
    if is_librispeech(root) or next(root.glob("*/*/*.trans.txt"), None) is not None:
        chosen, notes = choose_subsets(root, options)
        folders = {
            split: [path for name in chosen if name.startswith(split) for path in chosen[name]] for split in SPLITS
        }
    else:
        folders = {split: subsets(root, split, getattr(options, split)) for split in SPLITS}
        if not folders["train"]:
            folders = {"train": [root], "dev": [], "test": []}
    found: dict[SplitName, dict[str, list[Path]]] = {split: recordings(folders[split]) for split in SPLITS}
    for split in ("test", "dev"):
        if not folders[split]:
            has = f"{root} has {len(found['train'])} speakers with audio"
            held = hold_out_speakers(found["train"], options.seed, split, has)
            found[split] = {speaker: found["train"].pop(speaker) for speaker in held}
            notes.append(f"no {split} folder: {len(held)} speakers are held out for {split} ({', '.join(held)})")
    return SpeakerSplits(found["train"], found["dev"], found["test"], tuple(notes))


def recordings(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Recordings by the first folder below each of `folders`; files that lie in none belong to nobody."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        base = folder.absolute()
        for path in discover([base]):
            parts = path.relative_to(base).parts
            if len(parts) > 1:
                found.setdefault(parts[0], []).append(path)
        if not found:
            raise ArmhubertError(f"{folder} has no folders of speakers with audio in them: expected {LAYOUTS}")
    return found


def seconds(path: Path) -> float:
    """Length as the header tells it, without decoding; 0 where it cannot be read."""
    try:
        return float(soundfile.info(str(path)).duration)
    except (soundfile.SoundFileError, OSError):
        return 0.0


def subsets(root: Path, split: SplitName, named: Sequence[str]) -> list[Path]:
    """The folders of a split: those named, else those that are called so; none: the root has no such folders.

    Raises:
        ArmhubertError: a named one is missing.
    """
    for name in named:
        if not (root / name).is_dir():
            raise ArmhubertError(f"{split} subset {name!r} is not a folder of {root}: correct the name")
    if named:
        return [root / name for name in named]
    is_voxceleb = (root / "dev" / "wav").is_dir()
    for name in _FOLDERS[split]:
        if (root / name).is_dir() and not (is_voxceleb and split == "dev"):
            return [root / name]
    return sorted(path for path in root.glob(f"{split}-*") if path.is_dir())  # LibriSpeech without its transcripts


def hold_out_speakers(speakers: Speakers, seed: int, split: str, has: str) -> list[str]:
    """The names of a seventh of the speakers, 2 to 40; `has` begins what is said where there are too few."""
    number = min(40, max(2, len(speakers) // 7))
    if len(speakers) < number + 2:
        raise ArmhubertError(
            f"{has}, too few to hold out {number} for {split} and to train on at least 2: add speakers, or a folder "
            "for each split"
        )
    order = generator(seed, split).permutation(len(speakers))[:number]
    names = sorted(speakers)
    return sorted(names[place] for place in order)
