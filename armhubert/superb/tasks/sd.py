"""Speaker diarization: Libri2Mix, Kaldi data folders, or mixtures simulated from any speech by speaker."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from armhubert.audio import AUDIO_SUFFIXES
from armhubert.config import SAMPLE_RATE
from armhubert.errors import ArmhubertError
from armhubert.kernels.runtime import frame_mask
from armhubert.superb import metrics
from armhubert.superb.metrics import Turn
from armhubert.superb.simulate import as_turns, listen_all, mixtures
from armhubert.superb.speakers import LAYOUTS, speaker_splits
from armhubert.superb.task import (
    SPLITS,
    Batch,
    Corpus,
    Head,
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
    read_lines,
    some,
)

THRESHOLD, MEDIAN = 0.5, 11
"""What is scored: frames above the threshold, after a median filter of so many frames."""

SETTINGS = tuple((threshold, width) for threshold in (0.3, 0.4, 0.5, 0.6, 0.7) for width in (1, 11))
"""s3prl scores with each of these, and reports the best *on the test set*: `der_best`."""

MIXTURES = {"train": 13_900, "dev": 3_000, "test": 3_000}
"""Most mixtures to simulate: Libri2Mix has as many (train-100)."""

_MIXED = ("mix_both", "mix_clean")


class Activity(NamedTuple):
    """Who speaks when, as predicted."""

    probabilities: NDArray[np.float32]
    """[T, speakers]."""
    frame_seconds: float


class SpeakerDiarization(Task):
    """Items' labels are the turns of a recording, tuples of `metrics.Turn`."""

    name = "sd"
    title = "Speaker diarization"
    data = (
        "Libri2Mix (train-100, dev, test with mix_both or mix_clean, s1, s2), Kaldi folders train, dev, test (wav.scp, "
        f"segments and utt2spk or rttm), or speech to simulate two-speaker mixtures from: {LAYOUTS}"
    )
    folders = ("Libri2Mix", "LibriSpeech")
    reads = ("train", "dev", "test")
    metrics = (
        Metric("der", "DER", False),
        Metric("der_best", "DER, best setting on test", False),
        Metric("missed", "Missed", False),
        Metric("false_alarm", "False alarm", False),
        Metric("confused", "Confusion", False),
    )
    defaults = TrainingSettings(
        learning_rate=1e-4, batch=8, accumulate=4, steps=30_000, validate_every=500, crop_seconds=40.0
    )

    def read(self, root: Path, options: Options) -> Corpus:
        """Simulated mixtures have as many recordings as half the utterances, at most Libri2Mix's number."""
        notes: tuple[str, ...] = ()
        if (folders := _kaldi_folders(root, options)) is not None:
            splits = _read_all(read_kaldi, folders, root)
        elif (folders := _librimix_folders(root, options)) is not None:
            splits = _read_all(read_librimix, folders, root)
            notes = (
                "who speaks when is measured on s1 and s2 by their energy; SUPERB takes it from LibriMix's rttm: give "
                "the Kaldi folders that its prepare_diarization.py writes",
            )
        else:
            speakers = speaker_splits(root, options)
            splits = {}
            for split in SPLITS:
                utterances = getattr(speakers, split)
                number = min(MIXTURES[split], max(1, sum(map(len, utterances.values())) // 2))
                splits[split] = mixtures(utterances, number, options.seed, split)
            count = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
            notes = (*speakers.notes, f"mixtures of two speakers simulated with seed {options.seed}: {count}")
        return _corpus(splits, notes)

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> "FrameActivity":
        """One LSTM of 512 and a linear layer."""
        return FrameActivity(width, corpus.extra)

    def score(self, predictions: Sequence[Activity], split: Split, corpus: Corpus) -> Scores:
        """DER without collar, overlaps included, over all recordings together."""
        totals = {}
        for threshold, width in SETTINGS:
            parts = []
            for prediction, item in zip(predictions, split.items, strict=True):
                active = prediction.probabilities > threshold
                if width > 1:
                    active = metrics.median_filter(active, width)
                turns = metrics.turns_of_frames(active, prediction.frame_seconds)
                parts.append(metrics.diarization_errors(turns, item.label))
            totals[threshold, width] = metrics.add_errors(parts)
        errors = totals[THRESHOLD, MEDIAN]
        return Scores(
            {
                "der": errors.rate,
                "der_best": min(total.rate for total in totals.values()),
                "missed": 100 * errors.missed / errors.scored,
                "false_alarm": 100 * errors.false_alarm / errors.scored,
                "confused": 100 * errors.confused / errors.scored,
            }
        )


def _corpus(splits: Mapping[SplitName, Sequence[Item]], notes: Sequence[str]) -> Corpus:
    for split in SPLITS:
        if not splits.get(split):
            raise ArmhubertError(f"the {split} split has no recordings: check the data root")
        for item in splits[split]:
            if not item.label:
                raise ArmhubertError(
                    f"recording {item.key} of the {split} split has no speech: take it out of its list"
                )
    most = {split: max(len({turn.speaker for turn in item.label}) for item in splits[split]) for split in SPLITS}
    if most["train"] < 2:
        raise ArmhubertError(
            "diarization needs recordings of at least 2 speakers, but all of the train split have 1: add some"
        )
    for split in ("dev", "test"):
        if most[split] > most["train"]:
            raise ArmhubertError(
                f"the {split} split has recordings of {most[split]} speakers, but training has none of more than "
                f"{most['train']}: correct the lists"
            )
    return Corpus({split: Split(tuple(splits[split])) for split in SPLITS}, notes=tuple(notes), extra=most["train"])


# ---- Kaldi and Libri2Mix ---------------------------------------------------


def _read_all(
    read: Callable[[Path, Path], Iterator[Item]], folders: Mapping[SplitName, Sequence[Path]], root: Path
) -> dict[SplitName, list[Item]]:
    return {split: [item for path in paths for item in read(path, root)] for split, paths in folders.items()}


def _kaldi_folders(root: Path, options: Options) -> dict[SplitName, list[Path]] | None:
    return _split_folders(root, options, lambda folder: (folder / "wav.scp").is_file())


def _librimix_folders(root: Path, options: Options) -> dict[SplitName, list[Path]] | None:
    bases = [
        root,
        *(root / name for name in ("wav16k/max", "wav16k/min", "Libri2Mix/wav16k/max", "Libri2Mix/wav16k/min")),
    ]
    for base in bases:
        found = _split_folders(base, options, lambda folder: (folder / "s1").is_dir() and (folder / "s2").is_dir())
        if found is not None:
            return found
    return None


def _split_folders(base: Path, options: Options, holds: Callable[[Path], bool]) -> dict[SplitName, list[Path]] | None:
    """The folders of each split in `base` for which `holds`, all that are named, else one; None where no split has any.

    Raises:
        ArmhubertError: a split has none, or not all that are named.
    """
    found: dict[SplitName, list[Path]] = {}
    for split in SPLITS:
        named = getattr(options, split)
        names = named or (split, *({"dev": ("valid",), "test": ("eval",)}.get(split, ())))
        folders = [base / name for name in names] + ([] if named else sorted(base.glob(f"{split}-*")))
        usable = [folder for folder in folders if folder.is_dir() and holds(folder)]
        if named and usable and (wrong := [folder for folder in folders if folder not in usable]):
            raise ArmhubertError(f"{split} subset {wrong[0]} has no recordings as {usable[0]} has: correct the name")
        if usable:
            found[split] = usable if named else usable[:1]
    if not found:
        return None
    if absent := [split for split in SPLITS if split not in found]:
        raise ArmhubertError(
            f"{base} has data for {', '.join(found)}, but none for {', '.join(absent)}: add the folder, or name one"
        )
    return found


def read_kaldi(folder: Path, root: Path) -> Iterator[Item]:
    """Recordings of a Kaldi data folder: wav.scp with segments and utt2spk, or with rttm.

    Paths in wav.scp are absolute, or relative to the folder or the data root.

    Raises:
        ArmhubertError: a list is missing or malformed, names what another does not have, or holds a command.
    """
    turns: dict[str, list[Turn]] = {}
    if (folder / "rttm").is_file():
        source = folder / "rttm"
        for line in read_lines(source, "rttm"):
            fields = line.split()
            if fields[0] == "SPEAKER":
                recording, turn = _turn(source, line, fields, (1, 3, 4, 7), duration=True)
                turns.setdefault(recording, []).append(turn)
    else:
        source = folder / "segments"
        speaker = dict(_pairs(folder / "utt2spk", "list of speakers"))
        for line in read_lines(source, "list of segments"):
            fields = line.split()
            if fields[0] not in speaker:
                raise ArmhubertError(
                    f"utterance {fields[0]!r} of {source} has no speaker in {folder / 'utt2spk'}: add it"
                )
            recording, turn = _turn(source, line, [*fields[:4], speaker[fields[0]]], (1, 2, 3, 4), duration=False)
            turns.setdefault(recording, []).append(turn)
    recordings = dict(_pairs(folder / "wav.scp", "list of recordings"))
    if absent := sorted(turns.keys() - recordings.keys()):
        raise ArmhubertError(
            f"{len(absent)} recordings of {source} are not in {folder / 'wav.scp'} ({some(absent)}): add them"
        )
    for name, text in recordings.items():
        if text.endswith("|") or text == "-":
            raise ArmhubertError(f"{folder / 'wav.scp'} has a command for {name!r}, which is not run: name audio files")
        path = next((base / text for base in (folder, root) if (base / text).is_file()), None)
        if path is None:
            raise ArmhubertError(f"recording {name!r} of {folder / 'wav.scp'} has no audio file: expected {text}")
        yield Item(name, (Part(str(path.absolute())),), tuple(sorted(turns.get(name, ()))))


def _pairs(path: Path, what: str) -> Iterator[tuple[str, str]]:
    for line in read_lines(path, what):
        key, *value = line.split(maxsplit=1)
        if not value:
            raise ArmhubertError(f"{path}: every line must be a name, a space and a value, got {line[:60]!r}")
        yield key, value[0]


def _turn(
    path: Path, line: str, fields: Sequence[str], columns: tuple[int, int, int, int], duration: bool
) -> tuple[str, Turn]:
    try:
        recording, start, end, speaker = (fields[column] for column in columns)
        first, last = float(start), float(end) + (float(start) if duration else 0.0)
        if not 0 <= first <= last < float("inf"):
            raise ValueError
    except (IndexError, ValueError):
        raise ArmhubertError(
            f"{path}: times must be seconds, the end not before the start, got {line[:60]!r}"
        ) from None
    return recording, Turn(first, last, speaker)


def read_librimix(folder: Path, root: Path) -> Iterator[Item]:
    """Mixtures of Libri2Mix, whose turns are measured on the clean sources in s1 and s2.

    Raises:
        ArmhubertError: no mixtures, or one without its sources.
    """
    mixed = next((folder / name for name in _MIXED if (folder / name).is_dir()), None)
    if mixed is None:
        raise ArmhubertError(f"{folder} has sources but no mixtures: expected one of {', '.join(_MIXED)}")
    sources = sorted(path for path in folder.glob("s[0-9]") if path.is_dir())
    cleans: dict[Path, list[tuple[str, Path]]] = {}
    for path in audio_files(mixed):
        cleans[path] = []
        for source in sources:
            clean = next(
                (clean for s in sorted(AUDIO_SUFFIXES) if (clean := source / f"{path.stem}{s}").is_file()), None
            )
            if clean is None:
                raise ArmhubertError(f"mixture {path} has no source in {source}: complete the data, or remove it")
            cleans[path].append((source.name, clean))
    talks = listen_all([clean for named in cleans.values() for _, clean in named])
    for path, named in cleans.items():
        turns = [turn for name, clean in named for turn in as_turns(talks[clean].spoken, name)]
        yield Item.of_file(path.absolute(), root.absolute(), tuple(sorted(turns)))


# ---- head ------------------------------------------------------------------


class FrameActivity(Head):
    """Who speaks in each frame: LSTM of 512, linear to the speakers, trained free of their order.

    Args:
        width: D.
        speakers: most in one recording.
    """

    def __init__(self, width: int, speakers: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(width, 512, batch_first=True)
        self.classify = nn.Linear(512, speakers)

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, speakers]."""
        return self.classify(self.recurrent(batch.features)[0])

    def loss(self, batch: Batch) -> Tensor:
        """Binary cross entropy of each recording's best order, summed over frames, over the number of frames.

        Permutation-free training: Fujita et al., "End-to-end neural speaker diarization with permutation-free
        objectives", Interspeech 2019, equation 3.
        """
        from scipy.optimize import linear_sum_assignment

        logits = self.logits(batch)
        targets = torch.zeros_like(logits)
        for row, item, first in zip(targets, batch.items, batch.first, strict=True):
            activity = frame_activity(item.label, first, row.shape[0], batch.hop)
            row[:, : activity.shape[1]] = activity
        said, true = torch.broadcast_tensors(logits[..., None], targets[:, :, None])  # [B, T, outputs, speakers]
        mask = frame_mask(batch.lengths, logits.shape[1])[..., None, None]
        costs = (F.binary_cross_entropy_with_logits(said, true, reduction="none") * mask).sum(1)
        found = [linear_sum_assignment(cost) for cost in costs.detach().cpu().nan_to_num()]
        losses = [cost[outputs, speakers].mean() for cost, (outputs, speakers) in zip(costs, found, strict=True)]
        return torch.stack(losses).sum() / batch.lengths.sum()

    def predict(self, batch: Batch) -> list[Activity]:
        """Probabilities of each recording's frames."""
        rows = self.logits(batch).detach().sigmoid().float().cpu()
        seconds = batch.hop / SAMPLE_RATE
        return [
            Activity(row[:length].numpy(), seconds) for row, length in zip(rows, batch.lengths.tolist(), strict=True)
        ]


def frame_activity(turns: Sequence[Turn], first: int, frames: int, hop: int) -> Tensor:
    """float32 [frames, speakers of the turns]: 1 where a speaker is active in frames `first` to `first + frames`."""
    speakers = sorted({turn.speaker for turn in turns})
    activity = torch.zeros(frames, len(speakers))
    for turn in turns:
        start, end = (round(time * SAMPLE_RATE / hop) - first for time in (turn.start, turn.end))
        activity[max(0, start) : max(0, end), speakers.index(turn.speaker)] = 1
    return activity
