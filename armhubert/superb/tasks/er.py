"""Emotion recognition: IEMOCAP's five folds, RAVDESS, or folders of emotions and speakers."""

import re
from collections.abc import Sequence
from pathlib import Path

from armhubert.data import discover
from armhubert.errors import ArmhubertError
from armhubert.superb.heads import PooledClassifier
from armhubert.superb.task import (
    Corpus,
    Item,
    Metric,
    Options,
    Scores,
    Split,
    SplitName,
    Task,
    TrainingSettings,
    classes,
    classification_scores,
    generator,
    read_lines,
    some,
)

IEMOCAP_CLASSES = {"neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad"}
"""SUPERB's four classes: excitement counts as happiness, the rest is left out."""

RAVDESS_CLASSES = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
"""By the third field of a file name, 01 to 08."""

FOLDS = 5

_RAVDESS = re.compile(r"\d\d(-\d\d){6}")
_EMOTIONS = re.compile(
    r"(neutral|calm|happ|sad|ang|anger|fear|disgust|surpris|bored|excit|frustrat|contempt|joy)", re.I
)
_EVALUATION = re.compile(r"\[[\d. -]+\]\t(\S+)\t(\w+)\t")


class EmotionRecognition(Task):
    """Test speakers are never heard in training; the folds take turns."""

    name = "er"
    title = "Emotion recognition"
    data = "IEMOCAP (Session1 to Session5), RAVDESS (by its file names), or folders emotion/speaker or speaker/emotion"
    folders = ("IEMOCAP", "IEMOCAP_full_release", "RAVDESS", "emotions")
    reads = ("fold",)
    metrics = (Metric("accuracy", "Accuracy", True),)
    defaults = TrainingSettings(learning_rate=1e-4, batch=4, accumulate=8, steps=30_000, validate_every=1_000)
    folds = FOLDS

    def read(self, root: Path, options: Options) -> Corpus:
        """IEMOCAP: a session is tested, a fifth of the rest is dev (s3prl). Else: a fifth of the speakers each."""
        if (root / "Session1").is_dir():
            return _read_iemocap(root, options)
        base = root.absolute()
        paths = discover([base])
        if all(_RAVDESS.fullmatch(path.stem) for path in paths):
            found = {path: _ravdess(path) for path in paths}
            return _by_speaker(found, base, options.fold, ["emotions and speakers are those of RAVDESS's file names"])
        found, notes = _read_folders(base, paths)
        return _by_speaker(found, base, options.fold, notes)

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> PooledClassifier:
        """Linear to 256, mean over time, linear."""
        return PooledClassifier(width, corpus.labels)

    def score(self, predictions: Sequence[tuple[str, ...]], split: Split, corpus: Corpus) -> Scores:
        """Accuracy."""
        return classification_scores(predictions, split, corpus)


def _by_speaker(found: dict[Path, tuple[str, str]], root: Path, fold: int, notes: Sequence[str] = ()) -> Corpus:
    """Neighbours in the order of names share a fold, for RAVDESS's actors are men and women in turn."""
    speakers = sorted({speaker for _, speaker in found.values()})
    if len(speakers) < FOLDS:
        raise ArmhubertError(
            f"{FOLDS} folds of unseen speakers need at least {FOLDS} speakers, got {len(speakers)}: add speakers"
        )
    pairs = len(speakers) // 2 >= FOLDS
    place = {speaker: (number // 2 if pairs else number) % FOLDS for number, speaker in enumerate(speakers)}
    splits: dict[SplitName, list[Item]] = {"train": [], "dev": [], "test": []}
    for path, (emotion, speaker) in found.items():
        turn = (place[speaker] - fold) % FOLDS
        splits["test" if turn == 0 else "dev" if turn == 1 else "train"].append(Item.of_file(path, root, (emotion,)))
    heard = {split: sum((place[s] - fold) % FOLDS in turns for s in speakers) for split, turns in _TURNS.items()}
    note = "speakers of this fold: " + ", ".join(f"{number} {split}" for split, number in heard.items())
    return classes(splits, "emotion", notes=(*notes, note))


_TURNS = {"train": (2, 3, 4), "dev": (1,), "test": (0,)}


def _ravdess(path: Path) -> tuple[str, str]:
    fields = path.stem.split("-")
    number = int(fields[2])
    if not 1 <= number <= len(RAVDESS_CLASSES):
        raise ArmhubertError(
            f"{path} has emotion {fields[2]} in its name, but RAVDESS has 01 to 08: rename or remove it"
        )
    return RAVDESS_CLASSES[number - 1], fields[6]


def _read_folders(root: Path, paths: Sequence[Path]) -> tuple[dict[Path, tuple[str, str]], list[str]]:
    """(emotion, speaker) of files in emotion/speaker/... or speaker/emotion/...: whichever level is named so; notes."""
    parts = {path: path.relative_to(root).parts for path in paths}
    heard = {p[0] for p in parts.values()}
    silent = [path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in heard]
    if silent:
        raise ArmhubertError(f"{len(silent)} folders of {root} hold no audio ({some(silent)}): complete or remove them")
    shallow = [path for path in paths if len(parts[path]) < 3]
    if shallow:
        raise ArmhubertError(
            f"{shallow[0]} is not in a folder of an emotion and one of a speaker: expected emotion/speaker/*.wav or "
            "speaker/emotion/*.wav, so that test speakers can be unseen ones"
        )
    named = [sum(bool(_EMOTIONS.match(p[level])) for p in parts.values()) for level in (0, 1)]
    notes = []
    if named == [0, 0]:
        notes.append(
            f"no folder of {root} is named as an emotion that is known here: the upper folders are taken for them"
        )
    emotion_first = named[0] >= named[1]
    return {path: (p[0], p[1]) if emotion_first else (p[1], p[0]) for path, p in parts.items()}, notes


def _read_iemocap(root: Path, options: Options) -> Corpus:
    base = root.absolute()
    splits: dict[SplitName, list[Item]] = {"train": [], "dev": [], "test": []}
    rest: list[Item] = []
    missing = []
    folders = {session: base / f"Session{session}" for session in range(1, FOLDS + 1)}
    if absent := [folder.name for folder in folders.values() if not folder.is_dir()]:
        raise ArmhubertError(f"IEMOCAP has 5 sessions, but {root} lacks {', '.join(absent)}: complete the data")
    for session, folder in folders.items():
        lists = sorted((folder / "dialog" / "EmoEvaluation").glob("Ses*.txt"))
        if not lists:
            raise ArmhubertError(f"the labels of IEMOCAP are missing: expected {folder}/dialog/EmoEvaluation/Ses*.txt")
        for source in lists:
            for line in read_lines(source, "labels of IEMOCAP"):
                match = _EVALUATION.match(line)
                if match is None or match[2] not in IEMOCAP_CLASSES:
                    continue
                path = folder / "sentences" / "wav" / source.stem / f"{match[1]}.wav"
                if not path.is_file():
                    missing.append(match[1])
                    continue
                item = Item.of_file(path, base, (IEMOCAP_CLASSES[match[2]],))
                (splits["test"] if session == options.fold + 1 else rest).append(item)
    order = generator(options.seed, "dev").permutation(len(rest))
    held = set(order[: len(rest) - int(0.8 * len(rest))].tolist())
    for number, item in enumerate(rest):
        splits["dev" if number in held else "train"].append(item)
    notes = [f"Session{options.fold + 1} is tested; a fifth of the other sessions' utterances, drawn by seed, is dev"]
    if missing:
        notes.append(f"{len(missing)} labelled utterances have no audio and are left out ({some(missing)})")
    return classes(splits, "emotion", notes=notes)
