"""Speaker identification: VoxCeleb1 with its list, LibriSpeech's speakers, or folders of speakers."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from armhubert.audio import AUDIO_SUFFIXES
from armhubert.errors import ArmhubertError
from armhubert.superb.heads import PooledClassifier
from armhubert.superb.librispeech import Transcribed, choose_subsets, hold_out_utterances, is_librispeech
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
    classification_scores,
    read_lines,
    some,
)

LIST = "iden_split.txt"
MIN_UTTERANCES = 3
"""Fewest utterances of a speaker, so that each split can have one."""


class SpeakerIdentification(Task):
    """Every speaker is in all splits, with different recordings."""

    name = "sid"
    title = "Speaker identification"
    data = f"VoxCeleb1 with {LIST}, a LibriSpeech subset, or a folder for each speaker"
    folders = ("VoxCeleb1", "voxceleb1", "LibriSpeech/train-clean-100", "LibriSpeech/train-clean-5")
    reads = ("train",)
    metrics = (Metric("accuracy", "Accuracy", True),)
    defaults = TrainingSettings(learning_rate=1e-4, batch=8, accumulate=4, steps=200_000, crop_seconds=8.0)

    def read(self, root: Path, options: Options) -> Corpus:
        """By VoxCeleb1's list where it is there; else a tenth of each speaker is dev and a tenth test."""
        if (root / LIST).is_file():
            options.refuse(root / LIST, "train")
            return self._read_list(root)
        folders = [root]
        if options.train or is_librispeech(root):
            folders = choose_subsets(root, options)[0]["train"]
        base = Path(os.path.commonpath(folders))
        utterances, silent = [], []
        for speaker in (path for folder in folders for path in sorted(folder.iterdir())):
            if speaker.is_dir() and speaker.name[0] != ".":
                files = [path for path in sorted(speaker.rglob("[!.]*")) if path.suffix.lower() in AUDIO_SUFFIXES]
                utterances += [Transcribed(path, speaker.name, ()) for path in files]
                silent += [] if files else [speaker.name]
        if not utterances:
            raise ArmhubertError(f"{base} has no folders of speakers with audio in them: expected {self.data}")
        count = Counter(utterance.speaker for utterance in utterances)
        many = {speaker for speaker in count if count[speaker] >= MIN_UTTERANCES}
        rare = count.keys() - many
        notes = [f"{len(rare)} speakers with fewer than {MIN_UTTERANCES} recordings left out"] if rare else []
        if silent:
            notes.append(f"{len(silent)} folders without audio are left out ({some(silent)})")
        if not many:
            raise ArmhubertError(f"no speaker in {base} has {MIN_UTTERANCES} recordings, one a split: add data")
        splits, more = hold_out_utterances({"train": [u for u in utterances if u.speaker in many]}, by_speaker=True)
        items = {split: [Item.of_file(u.path, base, (u.speaker,)) for u in found] for split, found in splits.items()}
        return classes(items, "speaker", notes=notes + more)

    def _read_list(self, root: Path) -> Corpus:
        items: dict[SplitName, list[Item]] = {"train": [], "dev": [], "test": []}
        bases = [path for path in (root / "dev" / "wav", root / "test" / "wav", root / "wav", root) if path.is_dir()]
        missing = []
        for number, line in enumerate(read_lines(root / LIST, "VoxCeleb1's list"), start=1):
            code, _, name = line.partition(" ")
            if code not in ("1", "2", "3") or name.count("/") != 2:
                raise ArmhubertError(f"{root / LIST}:{number}: expected '1 id10001/video/00001.wav', got {line[:60]!r}")
            path = next((base / name for base in bases if (base / name).is_file()), None)
            if path is None:
                missing.append(name)
            else:
                key = name.rpartition(".")[0]
                items[SPLITS[int(code) - 1]].append(Item(key, (Part(str(path)),), (name.split("/")[0],)))
        notes = [f"{len(missing)} recordings of {LIST} are missing ({some(missing)})"] if missing else []
        return classes(items, "speaker", notes=notes)

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> PooledClassifier:
        """Linear to 256, mean over time, linear."""
        return PooledClassifier(width, corpus.labels)

    def score(self, predictions: Sequence[tuple[str, ...]], split: Split, corpus: Corpus) -> Scores:
        """Accuracy."""
        return classification_scores(predictions, split, corpus)
