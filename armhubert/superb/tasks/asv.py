"""Automatic speaker verification: VoxCeleb1's trials, any trial list, or trials drawn from folders of speakers."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armhubert.errors import ArmhubertError
from armhubert.superb import metrics
from armhubert.superb.speakers import (
    LAYOUTS,
    Speakers,
    SpeakerSplits,
    hold_out_speakers,
    recordings,
    seconds,
    speaker_splits,
    subsets,
)
from armhubert.superb.task import (
    Batch,
    Corpus,
    Detection,
    Head,
    Item,
    Metric,
    Options,
    Part,
    Scores,
    Split,
    Task,
    TrainingSettings,
    generator,
    read_lines,
    some,
)

TRIAL_LISTS = ("trials.txt", "veri_test2.txt", "voxceleb1_test_v2.txt", "veri_test.txt", "voxceleb1_test.txt")
"""Looked for in the data root, in this order; the second and third are VoxCeleb1-O as cleaned, which SUPERB uses."""

MIN_TRAIN_SECONDS = 2.0
"""Shorter training recordings are left out; s3prl measures them without the silence that it trims."""

DRAWN_TRIALS = 18_860
"""Most trials of each kind where they are drawn: VoxCeleb1-O has as many."""

_DEV_RECORDINGS = 20  # of each dev speaker: dev is scored often
_MIN_SECONDS = 0.4  # 15 frames of 20 ms are the x-vector's field of view, and a deviation needs 2 values

Trials = tuple[tuple[str, str, bool], ...]


class SpeakerVerification(Task):
    """Embeddings of unseen speakers, scored by their cosine."""

    name = "asv"
    title = "Speaker verification"
    data = f"speech by speaker ({LAYOUTS}), and a trial list ({', '.join(TRIAL_LISTS[:2])}: `1 a.wav b.wav`) or none"
    folders = ("VoxCeleb1", "voxceleb1", "LibriSpeech")
    reads = ("train", "dev", "test")
    metrics = (Metric("eer", "EER", False), Metric("min_dcf", "minDCF", False, ""))
    defaults = TrainingSettings(
        learning_rate=1e-4,
        batch=10,
        accumulate=5,
        steps=200_000,
        clip=1e3,
        optimizer="AdamW",
        validate_every=10_000,
        crop_seconds=8.0,
    )

    def read(self, root: Path, options: Options) -> Corpus:
        """Train and dev speakers are others than those of the trials; dev trials are drawn."""
        listed = next((root / name for name in TRIAL_LISTS if (root / name).is_file()), None)
        if listed is not None:
            options.refuse(listed, "dev", "test")
            splits, test = _with_list(root, listed, options)
        else:
            if (root / "test" / "wav").is_dir() and (root / "dev" / "wav").is_dir():
                raise ArmhubertError(
                    f"the trial list of VoxCeleb1 is missing: put {TRIAL_LISTS[1]} (lines `1 a.wav b.wav`) into {root}"
                )
            splits = speaker_splits(root, options)
            trials = draw_trials(splits.test, root, options.seed)
            test = _trial_split(splits.test, root, trials)
            drawn = f"no trial list: {len(trials)} trials drawn from {len(splits.test)} test speakers"
            splits = splits._replace(notes=(*splits.notes, drawn))
        for name in ("dev", "test"):
            if shared := splits.train.keys() & getattr(splits, name).keys():
                raise ArmhubertError(
                    f"{len(shared)} speakers are in training and in {name} ({some(shared)}): "
                    "verification needs unseen speakers; correct the folders"
                )
        dev = {name: list(paths)[:_DEV_RECORDINGS] for name, paths in splits.dev.items()}
        found = [(speaker, path) for speaker in sorted(splits.train) for path in splits.train[speaker]]
        train = [
            Item(_key(path, root), (Part(str(path)),), (speaker,))
            for speaker, path in found
            if seconds(path) > MIN_TRAIN_SECONDS
        ]
        notes = [*splits.notes, "not as in s3prl: silence is not trimmed, and no speaker of dev is trained on"]
        if short := len(found) - len(train):
            notes.append(f"{short} training recordings of at most {MIN_TRAIN_SECONDS:g} s left out")
        speakers = tuple(sorted({item.label[0] for item in train}))
        if len(speakers) < 2:
            raise ArmhubertError(
                f"training needs at least 2 speakers with recordings above {MIN_TRAIN_SECONDS:g} s, "
                f"got {len(speakers)}: add speakers"
            )
        return Corpus(
            {
                "train": Split(tuple(train)),
                "dev": _trial_split(dev, root, draw_trials(dev, root, options.seed)),
                "test": test,
            },
            (speakers,),
            tuple(notes),
        )

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> "XVector":
        """X-vector with AM-softmax over the training speakers."""
        return XVector(width, corpus.labels[0])

    def score(self, predictions: Sequence[Tensor], split: Split, corpus: Corpus) -> Scores:
        """EER and minDCF of the trials' cosines."""
        place = {item.key: number for number, item in enumerate(split.items)}
        unit = F.normalize(torch.stack(list(predictions)).double(), dim=1)
        left = torch.tensor([place[one] for one, _, _ in split.trials])
        right = torch.tensor([place[other] for _, other, _ in split.trials])
        cosine = (unit[left] * unit[right]).sum(1).tolist()
        targets = [same for _, _, same in split.trials]
        curve = metrics.detection_curve(targets, cosine)
        return Scores(
            {"eer": metrics.equal_error_rate(curve), "min_dcf": metrics.min_dcf(curve)},
            detection=Detection(tuple(cosine), tuple(targets)),
        )


# ---- trials ----------------------------------------------------------------


def read_trials(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(file, file, same speaker) of `1 a.wav b.wav` (VoxCeleb) or `a.wav b.wav target` (Kaldi) in every line.

    Raises:
        ArmhubertError: the list is missing, or a line is neither.
    """
    known = {"1": True, "target": True, "0": False, "nontarget": False}
    for line in read_lines(path, "trial list"):
        fields = line.split()
        if len(fields) == 3 and fields[0] in known:
            yield fields[1], fields[2], known[fields[0]]
        elif len(fields) == 3 and fields[2] in known:
            yield fields[0], fields[1], known[fields[2]]
        else:
            raise ArmhubertError(f"{path}: every line must be `1 a.wav b.wav` or `0 a.wav b.wav`, got {line[:60]!r}")


def draw_trials(speakers: Speakers, root: Path, seed: int, most: int = DRAWN_TRIALS) -> Trials:
    """All pairs of recordings, or `most` of the same speaker and `most` of different ones where there are more.

    Raises:
        ArmhubertError: fewer than two speakers, or none with two recordings.
    """
    if len(speakers) < 2 or all(len(paths) < 2 for paths in speakers.values()):
        raise ArmhubertError(
            f"drawing trials needs at least 2 speakers, one of them with 2 recordings, got {len(speakers)} speakers "
            f"and {sum(map(len, speakers.values()))} recordings: add data or a trial list"
        )
    names = sorted(speakers)
    keys = [(_key(path, root), name) for name in names for path in speakers[name]]
    draw = generator(seed, "trials")
    same = [pair for name in names for pair in combinations(sorted(_key(path, root) for path in speakers[name]), 2)]
    if len(same) > most:
        same = [same[place] for place in sorted(draw.choice(len(same), most, replace=False).tolist())]
    total = len(keys) * (len(keys) - 1) // 2
    different: list[tuple[str, str]] = []
    if total <= 4 * most:
        different = [(a, b) for (a, one), (b, other) in combinations(keys, 2) if one != other]
        if len(different) > most:
            different = [
                different[place] for place in sorted(draw.choice(len(different), most, replace=False).tolist())
            ]
    else:
        chosen: dict[tuple[int, int], None] = {}
        others = total - sum(len(paths) * (len(paths) - 1) // 2 for paths in speakers.values())
        while len(chosen) < min(most, others // 2):
            i, j = sorted(draw.integers(len(keys), size=2).tolist())
            if keys[i][1] != keys[j][1]:
                chosen[i, j] = None
        different = [(keys[i][0], keys[j][0]) for i, j in chosen]
    return tuple([(a, b, True) for a, b in same] + [(a, b, False) for a, b in different])


def _with_list(root: Path, listed: Path, options: Options) -> tuple[SpeakerSplits, Split]:
    """Speakers for training and dev, and the test split of a trial list."""
    trials = list(read_trials(listed))
    if len(kinds := {same for _, _, same in trials}) < 2:
        have = "no trials" if not kinds else f"only trials of {'the same speaker' if True in kinds else 'two speakers'}"
        raise ArmhubertError(f"{listed} has {have}: error rates need both kinds; complete it")
    bases = [path for path in (root / "test" / "wav", root / "test", root / "wav", root) if path.is_dir()]
    files: dict[str, Path] = {}
    missing = []
    for name in dict.fromkeys(name for one, other, _ in trials for name in (one, other)):
        path = next((base / name for base in bases if (base / name).is_file()), None)
        if path is None:
            missing.append(name)
        else:
            files[name] = path.absolute()
    if missing:
        raise ArmhubertError(
            f"{len(missing)} recordings of {listed} have no audio below {root} ({some(missing)}): "
            "complete the data, or take these trials out of the list"
        )
    for name, path in files.items():
        if 0 < seconds(path) < _MIN_SECONDS:
            raise ArmhubertError(
                f"{name} in {listed} is shorter than {_MIN_SECONDS:g} s: take its trials out of the list"
            )
    used = set(files.values())
    held = root / "test" if (root / "test").is_dir() else None
    everything = {
        name: paths
        for name, paths in recordings(subsets(root, "train", options.train) or [root]).items()
        if not any(path in used or (held is not None and path.is_relative_to(held.absolute())) for path in paths)
    }
    has = f"{root} has {len(everything)} speakers that no trial uses"
    dev = {name: everything[name] for name in hold_out_speakers(everything, options.seed, "dev", has)}
    train = {name: paths for name, paths in everything.items() if name not in dev}
    items = tuple(Item(name, (Part(str(path)),), ()) for name, path in files.items())
    notes = (f"dev trials are drawn from {len(dev)} speakers held out of training",)
    return SpeakerSplits(train, dev, {}, notes), Split(items, tuple(trials))


def _trial_split(speakers: Speakers, root: Path, trials: Trials) -> Split:
    used = {key for one, other, _ in trials for key in (one, other)}
    items = []
    for name in sorted(speakers):
        for path in speakers[name]:
            key = _key(path, root)
            if key in used:
                if 0 < seconds(path) < _MIN_SECONDS:
                    raise ArmhubertError(f"{path} is shorter than {_MIN_SECONDS:g} s: remove it")
                items.append(Item(key, (Part(str(path)),), (name,)))
    return Split(tuple(items), trials)


def _key(path: Path, root: Path) -> str:
    return path.relative_to(root.absolute()).with_suffix("").as_posix()


# ---- head ------------------------------------------------------------------

HIDDEN, AGGREGATED, EMBEDDING = 512, 1500, 512
CONTEXTS = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))
"""Kernel and dilation of the x-vector's layers: together they see 15 frames."""
FIELD = 1 + sum((kernel - 1) * dilation for kernel, dilation in CONTEXTS)


class XVector(Head):
    """X-vector (Snyder et al., ICASSP 2018) with AM-softmax (Wang et al., arXiv 1801.05599), scale 30 and margin 0.4.

    Linear to 512, five dilated convolutions with ReLU and no batch norm, mean and standard deviation over time, linear
    with ReLU: the embedding. In training another such layer lies between embedding and softmax, as in s3prl.

    Args:
        width: D.
        speakers: names of the training speakers.
    """

    scale, margin = 30.0, 0.4

    def __init__(self, width: int, speakers: Sequence[str]) -> None:
        super().__init__()
        self.place = {name: number for number, name in enumerate(speakers)}
        self.project = nn.Linear(width, HIDDEN)
        sizes = (HIDDEN,) * len(CONTEXTS) + (AGGREGATED,)
        self.frames = nn.ModuleList(
            nn.Conv1d(inputs, outputs, kernel, dilation=dilation)
            for inputs, outputs, (kernel, dilation) in zip(sizes, sizes[1:], CONTEXTS, strict=False)
        )
        self.embed = nn.Linear(2 * AGGREGATED, EMBEDDING)
        self.discard = nn.Linear(EMBEDDING, EMBEDDING)
        self.speakers = nn.Parameter(torch.empty(EMBEDDING, len(self.place)))
        nn.init.xavier_normal_(self.speakers)

    def embeddings(self, batch: Batch) -> Tensor:
        """[B, 512], not of unit length."""
        x = self.project(batch.features).transpose(1, 2)
        lengths = (batch.lengths - (FIELD - 1)).tolist()
        for item, length in zip(batch.items, lengths, strict=True):
            if length < 2:
                raise ArmhubertError(
                    f"{item.key} has {length + FIELD - 1} frames, but an x-vector needs {FIELD + 1}: leave it out"
                )
        for layer in self.frames:
            x = F.relu(layer(x))
        pooled = [
            torch.cat([row[:, :length].mean(1), row[:, :length].std(1)]) for row, length in zip(x, lengths, strict=True)
        ]
        return F.relu(self.embed(torch.stack(pooled)))

    def loss(self, batch: Batch) -> Tensor:
        """AM-softmax over the training speakers, averaged."""
        x = F.relu(self.discard(self.embeddings(batch)))
        cosine = F.normalize(x, dim=1) @ F.normalize(self.speakers, dim=0)
        labels = torch.tensor([self.place[item.label[0]] for item in batch.items], device=x.device)
        logits = self.scale * (cosine - self.margin * F.one_hot(labels, cosine.shape[1]))
        return F.cross_entropy(logits, labels)

    def predict(self, batch: Batch) -> list[Tensor]:
        """Embeddings, [512] each."""
        return list(self.embeddings(batch).detach().float().cpu())
