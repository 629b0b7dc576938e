import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from armhubert.errors import ArmhubertError
from armhubert.superb.speakers import speaker_splits
from armhubert.superb.task import Batch, Item, Options, Split
from armhubert.superb.tasks.asv import FIELD, SpeakerVerification, XVector, draw_trials, read_trials

TASK = SpeakerVerification()


def speakers(number, prefix=""):
    return [f"{prefix}s{s:02d}/u{u}.wav" for s in range(number) for u in range(2)]


# ---- readers ---------------------------------------------------------------


def test_folders_of_speakers(waves):
    root = waves(*speakers(9), seconds=2.1)
    corpus = TASK.read(root, Options())
    names = {split: {item.label[0] for item in found.items} for split, found in corpus.splits.items()}
    assert [len(names[split]) for split in ("train", "dev", "test")] == [5, 2, 2]
    for one, other in itertools.combinations(names.values(), 2):
        assert not one & other
    assert corpus.labels == (tuple(sorted(names["train"])),)
    assert "no trial list: 6 trials drawn from 2 test speakers" in corpus.notes
    assert any("silence is not trimmed" in note for note in corpus.notes)
    assert TASK.read(root, Options()) == corpus
    assert TASK.read(root, Options(seed=1)) != corpus


@pytest.mark.parametrize("transcripts", [True, False])
def test_librispeech_subsets(waves, transcripts):
    names = [f"{subset}/{s}/1/{s}-1-{u}.wav" for subset, many in
             (("train-clean-100", 3), ("dev-clean", 2), ("test-clean", 2)) for s in
             (f"{subset}{n}" for n in range(many)) for u in range(2)]  # fmt: skip
    root = waves(*names, seconds=2.1)
    for name in names if transcripts else ():
        (root / name).with_name("x.trans.txt").write_text("x SOME WORDS\n")
    corpus = TASK.read(root, Options())
    assert {split: len(found.items) for split, found in corpus.splits.items()} == {"train": 6, "dev": 4, "test": 4}
    assert all(item.key.startswith("test-clean/") for item in corpus.splits["test"].items)


def test_voxceleb_layout(waves):
    root = waves(
        *speakers(6, prefix="dev/wav/id1"), "test/wav/idA/v/1.wav", "test/wav/idA/v/2.wav", "test/wav/idB/v/1.wav",
        seconds=2.1,
    )  # fmt: skip
    with pytest.raises(ArmhubertError, match=r"trial list of VoxCeleb1 is missing: put veri_test2\.txt"):
        TASK.read(root, Options())
    (root / "veri_test2.txt").write_text("1 idA/v/1.wav idA/v/2.wav\n0 idA/v/1.wav idB/v/1.wav\n")
    corpus = TASK.read(root, Options())
    assert corpus.splits["test"].trials == (
        ("idA/v/1.wav", "idA/v/2.wav", True),
        ("idA/v/1.wav", "idB/v/1.wav", False),
    )
    assert [item.key for item in corpus.splits["test"].items] == ["idA/v/1.wav", "idA/v/2.wav", "idB/v/1.wav"]
    assert len(corpus.labels[0]) == 4
    assert not any(label.startswith("idA") for label in corpus.labels[0])
    with pytest.raises(ArmhubertError, match=r"veri_test2\.txt says what test is: leave out test="):
        TASK.read(root, Options(test=("test",)))


def test_trials_whose_files_are_absent(waves):
    root = waves(*speakers(6), seconds=2.1)
    (root / "trials.txt").write_text("1 s00/u0.wav s00/u1.wav\n0 s00/u0.wav gone/u0.wav\n")
    with pytest.raises(ArmhubertError, match=r"1 recordings of .*trials\.txt have no audio below .*gone/u0\.wav"):
        TASK.read(root, Options())


def test_speakers_of_trials_are_not_trained_on(waves):
    root = waves(*speakers(7), seconds=2.1)
    (root / "trials.txt").write_text("s00/u0.wav s00/u1.wav target\ns00/u0.wav s01/u0.wav nontarget\n")
    corpus = TASK.read(root, Options())
    heard = {item.label[0] for split in ("train", "dev") for item in corpus.splits[split].items}
    assert heard == {"s02", "s03", "s04", "s05", "s06"}


def test_a_malformed_trial(tmp_path):
    (tmp_path / "trials.txt").write_text("1 a.wav b.wav\n2 a.wav c.wav\n")
    with pytest.raises(ArmhubertError, match=r"every line must be `1 a\.wav b\.wav`.*got '2 a\.wav c\.wav'"):
        list(read_trials(tmp_path / "trials.txt"))


@pytest.mark.parametrize(("text", "what"), [("", "no trials"), ("1 s00/u0.wav s00/u1.wav\n", "of the same speaker")])
def test_a_trial_list_of_one_kind(waves, text, what):
    root = waves(*speakers(6))
    (root / "trials.txt").write_text(text)
    with pytest.raises(ArmhubertError, match=what):
        TASK.read(root, Options())


def test_too_few_speakers(waves):
    with pytest.raises(ArmhubertError, match="has 1 speakers with audio, too few to hold out 2 for test"):
        TASK.read(waves("ann/1.wav", "ann/2.wav"), Options())


def test_no_folders_of_speakers(waves):
    with pytest.raises(ArmhubertError, match="no folders of speakers"):
        TASK.read(waves("1.wav", "2.wav"), Options())


def test_a_speaker_in_training_and_test(waves):
    root = waves(
        *speakers(4, prefix="train/"), *speakers(2, prefix="dev/x"), "test/s00/8.wav", "test/s00/9.wav", "test/t/1.wav"
    )
    with pytest.raises(ArmhubertError, match=r"1 speakers are in training and in test \(s00\)"):
        TASK.read(root, Options())


def test_short_training_recordings(waves):
    root = waves(*speakers(9), seconds=1.0)
    with pytest.raises(ArmhubertError, match="at least 2 speakers with recordings above 2 s, got 0"):
        TASK.read(root, Options())


def test_unknown_subset(waves):
    with pytest.raises(ArmhubertError, match="train subset 'nope' is not a folder"):
        speaker_splits(waves(*speakers(9)), Options(train=("nope",)))


def test_drawn_trials_are_limited_and_distinct(tmp_path):
    found = {f"s{s}": [tmp_path / f"s{s}" / f"{u}.wav" for u in range(6)] for s in range(30)}
    for most in (20, 10_000):
        trials = draw_trials(found, tmp_path, seed=0, most=most)
        same = [trial for trial in trials if trial[2]]
        assert len(same) == min(most, 30 * 15)
        assert len(trials) - len(same) == min(most, 30 * 29 // 2 * 36)
        assert len({frozenset(trial[:2]) for trial in trials}) == len(trials)
        for a, b, is_same in trials:
            assert is_same == (a.split("/")[0] == b.split("/")[0])
        assert draw_trials(found, tmp_path, seed=0, most=most) == trials


# ---- head ------------------------------------------------------------------


def batch_of(features, lengths, labels):
    items = tuple(Item(str(n), (), (label,)) for n, label in enumerate(labels))
    return Batch(features, lengths, items, (0,) * len(items), 320)


def test_x_vector_is_s3prls(filled, golden_features):
    # SuperbXvector and amsoftmax of s3prl 0.4.18 with these weights and features, 4 speakers: 13.10988712310791.
    head = filled(XVector(6, ["a", "b", "c", "d"]))
    loss = head.train().loss(batch_of(*golden_features, ["a", "d", "b"]))
    assert loss.item() == pytest.approx(13.10988712310791, abs=1e-5)
    embeddings = torch.stack(head.eval().predict(batch_of(*golden_features, ["a", "d", "b"])))
    assert embeddings.shape == (3, 512)
    assert embeddings[0, :3].tolist() == pytest.approx([0.0, 0.5357093214988708, 1.7864465713500977], abs=1e-5)


def test_embeddings_do_not_depend_on_the_batch(golden_features):
    features, lengths = golden_features
    head = XVector(6, ["a", "b"]).eval()
    together = head.predict(batch_of(features, lengths, "aab"))
    for row, length, embedding in zip(features, lengths, together, strict=True):
        (alone,) = head.predict(batch_of(row[None, :length], length[None], "a"))
        torch.testing.assert_close(alone, embedding, rtol=1e-4, atol=1e-6)


def test_too_few_frames(golden_features):
    features, _ = golden_features
    head = XVector(6, ["a", "b"])
    head.loss(batch_of(features[:1], torch.tensor([FIELD + 1]), "a"))
    with pytest.raises(ArmhubertError, match="0 has 15 frames, but an x-vector needs 16"):
        head.loss(batch_of(features[:1], torch.tensor([FIELD]), "a"))


def test_score_by_hand():
    items = tuple(Item(name, (), ()) for name in "abc")
    split = Split(items, (("a", "b", True), ("a", "c", False), ("b", "c", False)))
    near, far = [1.0, 0.0], [0.0, 2.0]
    scores = TASK.score([torch.tensor(near), torch.tensor([2.0, 0.1]), torch.tensor(far)], split, None)
    assert scores.metrics == {"eer": 0.0, "min_dcf": 0.0}
    assert scores.detection.scores[1] == 0.0
    scores = TASK.score([torch.tensor(near), torch.tensor(far), torch.tensor(near)], split, None)
    assert scores.metrics["eer"] > 0
    assert np.isfinite(scores.metrics["min_dcf"])


def test_real_speech(shared_speech: Path):
    corpus = TASK.read(shared_speech / "LibriSpeech", Options())
    assert len(corpus.splits["test"].items) == 200
    assert sum(same for _, _, same in corpus.splits["test"].trials) == 20 * 45
