"""Keyword spotting: Speech Commands v1, 12 classes; or any folders of words."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from armhubert.audio import measure
from armhubert.config import SAMPLE_RATE
from armhubert.errors import ArmhubertError
from armhubert.superb import metrics
from armhubert.superb.heads import PooledClassifier
from armhubert.superb.task import (
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
    audio_files,
    classes,
    classification_scores,
    read_lines,
    some,
)

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE, NOISE = "_unknown_", "_silence_", "_background_noise_"
GAIN = 10 ** (-3 / 20)
"""SUPERB turns Speech Commands down by 3 dB."""

TEST_FOLDER = "speech_commands_test_set_v0.01"


class KeywordSpotting(Task):
    """Speech Commands v1 with its lists; its test folder where it lies in or beside the root."""

    name = "ks"
    title = "Keyword spotting"
    data = "Speech Commands v1 (folders of words, validation_list.txt, testing_list.txt), or any folders of words"
    folders = ("speech_commands_v0.01", "speech_commands", "SpeechCommands", "keywords")
    metrics = (Metric("accuracy", "Accuracy", True), Metric("mean_recall", "Mean recall of classes", True))
    defaults = TrainingSettings(learning_rate=1e-4, batch=32, steps=200_000, validate_every=5_000, balanced=True)

    @property
    def choose_by(self) -> tuple[Metric, ...]:
        """Mean recall, which is what SUPERB's accuracy on dev estimates: there dev is drawn with balanced classes."""
        return self.metrics[::-1]

    def read(self, root: Path, options: Options) -> Corpus:
        """Folders of words; words outside SUPERB's ten are `_unknown_` where all ten are there, or one and a list."""
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]
        words = [path for path in folders if path.name not in (NOISE, TEST_FOLDER) and audio_files(path)]
        if not words:
            raise ArmhubertError(f"{root} has no folders of words with audio in them: expected {self.data}")
        silent = [path.name for path in folders if path not in words and path.name not in (NOISE, TEST_FOLDER)]
        notes = [f"{len(silent)} folders without audio are left out ({some(silent)})"] if silent else []
        place: dict[str, SplitName] = {}
        lists = {"dev": root / "validation_list.txt", "test": root / "testing_list.txt"}
        names = {path.name for path in words}
        listed = names.issuperset(WORDS) or any(path.is_file() for path in lists.values())
        official = listed and not names.isdisjoint(WORDS)
        if listed:
            for name, path in lists.items():
                place |= dict.fromkeys(read_lines(path, "list of Speech Commands"), name)
        else:
            notes.append(
                "no lists: split 80/10/10 by the hash of the speaker in the file name, as Speech Commands does"
            )
        splits: dict[SplitName, list[Item]] = {"train": [], "dev": [], "test": []}
        for folder in words:
            label = folder.name if not official or folder.name in WORDS else UNKNOWN
            for path in audio_files(folder):
                split = place.pop(f"{folder.name}/{path.name}", "train") if listed else which_split(path.name)
                splits[split].append(_keyword(path, root, label))
        if place:
            notes.append(f"{len(place)} recordings of the lists have no audio and are left out: {some(place)}")
        for number, piece in enumerate(_noise(root)):
            part: SplitName = "dev" if number % 10 == 8 else "test" if number % 10 == 9 else "train"
            splits[part].append(piece)
        tests = [path for path in (root / TEST_FOLDER, root.parent / TEST_FOLDER) if path.is_dir()]
        if tests:
            splits["test"] = [
                _keyword(path, tests[0], sub.name)
                for sub in sorted(tests[0].iterdir())
                if sub.is_dir()
                for path in audio_files(sub)
            ]
        elif official:
            notes.append(f"no {TEST_FOLDER}: tested on testing_list.txt, whose words are not balanced as there")
        return classes(splits, "keyword", notes=notes)

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> PooledClassifier:
        """Linear to 256, mean over time, linear."""
        return PooledClassifier(width, corpus.labels)

    def score(self, predictions: Sequence[tuple[str, ...]], split: Split, corpus: Corpus) -> Scores:
        """Accuracy, and the mean recall of the classes."""
        scores = classification_scores(predictions, split, corpus)
        recall = metrics.mean_recall([guess[0] for guess in predictions], [item.label[0] for item in split.items])
        return replace(scores, metrics={**scores.metrics, "mean_recall": recall})


def which_split(name: str) -> SplitName:
    """Speech Commands' own rule: a speaker, named before `_nohash_`, is always in one split."""
    speaker = re.sub(r"_nohash_.*$", "", name)
    most = 2**27 - 1
    share = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % (most + 1) * (100.0 / most)
    return "dev" if share < 10 else "test" if share < 20 else "train"


def _keyword(path: Path, root: Path, label: str) -> Item:
    return Item(path.relative_to(root).with_suffix("").as_posix(), (Part(str(path), gain=GAIN),), (label,))


def _noise(root: Path) -> list[Item]:
    """`_silence_`: the background noises, cut into pieces of one second (s3prl cuts at random in every epoch)."""
    folder = root / NOISE
    pieces = []
    for path in audio_files(folder) if folder.is_dir() else []:
        for second in range(measure(path).samples // SAMPLE_RATE):
            part = Part(str(path), second * SAMPLE_RATE, SAMPLE_RATE, gain=GAIN)
            pieces.append(Item(f"{SILENCE}/{path.stem}/{second}", (part,), (SILENCE,)))
    return pieces
