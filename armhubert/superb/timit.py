"""TIMIT's layout (TRAIN and TEST, *.PHN beside the audio), for pr."""

from collections.abc import Iterable
from pathlib import Path

from armhubert.audio import AUDIO_SUFFIXES
from armhubert.errors import ArmhubertError
from armhubert.superb.task import read_lines

# TIMIT's 61 phones as CMUdict's: closures, pauses and the glottal stop go, allophones fold.
_TIMIT = {
    "ax": "AH", "ax-h": "AH", "ix": "IH", "axr": "ER", "el": "L", "em": "M", "en": "N", "eng": "NG", "nx": "N",
    "hv": "HH", "ux": "UW", "dx": "D",
}  # fmt: skip
_LABELS = "[!.]*.[pP][hH][nN]"  # the LDC's names are in capitals
_TIMIT_SILENT = frozenset(["h#", "pau", "epi", "q", "bcl", "dcl", "gcl", "pcl", "tcl", "kcl"])


def is_timit(folder: Path) -> bool:
    """Whether a folder holds TIMIT's phone labels."""
    return next(folder.rglob(_LABELS), None) is not None


def fold(phones: Iterable[str]) -> tuple[str, ...]:
    """TIMIT's or CMUdict's phones as CMUdict's 39: without stress, closures, pauses and allophones."""
    plain = (phone.lower().rstrip("012") for phone in phones)
    return tuple(_TIMIT.get(phone, phone.upper()) for phone in plain if phone not in _TIMIT_SILENT)


def read_timit(folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """(audio, phones of the hand labels folded to CMUdict's 39) of every sentence."""
    sentences = []
    for labels in sorted(folder.rglob(_LABELS)):
        audio = next(
            (p for p in sorted(labels.parent.glob(f"{labels.stem}.*")) if p.suffix.lower() in AUDIO_SUFFIXES), None
        )
        phones = [line.split()[-1] for line in read_lines(labels, "TIMIT labels")]
        if audio is not None and (folded := fold(phones)):
            sentences.append((audio, folded))
    if not sentences:
        raise ArmhubertError(f"none of the .phn files in {folder} has audio beside it: check the folder")
    return sentences
