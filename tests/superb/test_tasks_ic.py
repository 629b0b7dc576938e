import json

import pytest
import torch

from armhubert.errors import ArmhubertError
from armhubert.superb.task import Batch, Options
from armhubert.superb.tasks.ic import ABSENT, IntentClassification

TASK = IntentClassification()


@pytest.fixture
def fluent(waves):
    names = [f"wavs/speakers/a/{n}.wav" for n in range(6)]
    root = waves(*names, seconds=0.05)
    (root / "data").mkdir()
    rows = {"train": (0, 1, 2), "valid": (3,), "test": (4, 5)}
    for split, numbers in rows.items():
        lines = [
            f'{n},wavs/speakers/a/{n}.wav,a,"Turn it, please",{"activate" if n % 2 else "deactivate"},lights,none'
            for n in numbers
        ]
        header = ",path,speakerId,transcription,action,object,location"
        (root / "data" / f"{split}_data.csv").write_text("\n".join([header, *lines]) + "\n")
    return root


def test_fluent_speech_commands(fluent):
    corpus = TASK.read(fluent, Options())
    assert corpus.labels == (("activate", "deactivate"), ("lights",), ("none",))
    assert corpus.extra == ("action", "object", "location")
    assert [item.label[0] for item in corpus.splits["test"].items] == ["deactivate", "activate"]
    assert corpus.splits["dev"].items[0].key == "wavs/speakers/a/3"


def test_fluent_without_some_audio(fluent):
    (fluent / "wavs/speakers/a/2.wav").unlink()
    corpus = TASK.read(fluent, Options())
    assert corpus.notes == (
        "1 recordings of the lists have no audio and are left out (wavs/speakers/a/2.wav)",
        "1 actions have no utterance in the dev split (deactivate)",
    )
    (fluent / "wavs/speakers/a/3.wav").unlink()
    with pytest.raises(ArmhubertError, match="the dev split has no utterances"):
        TASK.read(fluent, Options())


def test_fluent_lists(fluent):
    path = fluent / "data" / "test_data.csv"
    text = path.read_text()
    path.write_text(text.replace("lights", "lamp"))
    with pytest.raises(ArmhubertError, match=r"1 objects of the test split are not in the training split \(lamp\)"):
        TASK.read(fluent, Options())
    path.write_text(text.replace("object", "thing"))
    with pytest.raises(ArmhubertError, match="has a row without object"):
        TASK.read(fluent, Options())
    path.unlink()
    with pytest.raises(ArmhubertError, match="test list of Fluent Speech Commands is missing"):
        TASK.read(fluent, Options())


# ---- JSON labels -----------------------------------------------------------


def write_labels(root, entries):
    (root / "label").mkdir(exist_ok=True)
    (root / "label" / "label.json").write_text(json.dumps(entries))
    return root


@pytest.fixture
def labelled(waves):
    root = waves(*(f"audio/{n:02d}.wav" for n in range(30)), seconds=0.05)
    entries = {
        f"{n:02d}.wav": {
            "intent": "order",
            "slots": {"drink": ("tea", " coffee")[n % 2], "milk": "oat"} if n % 3 else {},
        }
        for n in range(30)
    }
    return write_labels(root, entries)


def test_json(labelled):
    corpus = TASK.read(labelled, Options())
    assert corpus.extra == ("intent", "drink", "milk")
    assert corpus.labels == (("order",), ("coffee", ABSENT, "tea"), (ABSENT, "oat"))
    assert {split: len(found.items) for split, found in corpus.splits.items()} == {"train": 24, "dev": 3, "test": 3}
    assert TASK.read(labelled, Options()) == corpus
    keys = [{item.key for item in TASK.read(labelled, Options(seed=s)).splits["test"].items} for s in (0, 1)]
    assert keys[0] != keys[1]


def test_training_has_every_value(waves):
    root = waves(*(f"{n:02d}.wav" for n in range(20)), seconds=0.05)
    write_labels(root, {f"{n:02d}": {"intent": f"only {n}"} for n in range(20)})
    with pytest.raises(ArmhubertError, match="the dev split has no utterances"):
        TASK.read(root, Options())
    write_labels(root, {f"{n:02d}": {"intent": f"twice {n // 2}"} for n in range(20)})
    corpus = TASK.read(root, Options())
    assert len(corpus.labels[0]) == 10
    for seed in range(5):
        corpus = TASK.read(root, Options(seed=seed))
        assert sum(len(found.items) for found in corpus.splits.values()) == 20
        assert {item.label[0] for item in corpus.splits["train"].items} == set(corpus.labels[0])


def test_audio_without_label_and_the_reverse(labelled):
    (labelled / "audio" / "00.wav").unlink()
    (labelled / "audio" / "01.wav").rename(labelled / "audio" / "extra.wav")
    notes = TASK.read(labelled, Options()).notes
    assert "2 labels have no audio and are left out (00.wav, 01.wav)" in notes
    assert "1 recordings have no label and are left out (extra)" in notes


def test_splits_and_speakers_of_the_labels(waves):
    root = waves(*(f"{n}.wav" for n in range(6)), seconds=0.05)
    entry = {str(n): {"intent": "ab"[n % 2], "split": ("train", "valid", "test")[n // 2]} for n in range(6)}
    corpus = TASK.read(write_labels(root, entry), Options())
    assert {split: len(found.items) for split, found in corpus.splits.items()} == {"train": 2, "dev": 2, "test": 2}
    del entry["5"]["split"]
    with pytest.raises(ArmhubertError, match="1 of 6 labels have no split"):
        TASK.read(write_labels(root, entry), Options())
    entry["5"]["split"] = "holdout"
    with pytest.raises(ArmhubertError, match="must be train, dev or test, got 'holdout'"):
        TASK.read(write_labels(root, entry), Options())
    entry = {str(n): {"intent": "ab"[n % 2], "speaker": f"s{n // 2}"} for n in range(6)}
    corpus = TASK.read(write_labels(root, entry), Options())
    people = {split: {int(item.key) // 2 for item in found.items} for split, found in corpus.splits.items()}
    assert sorted(map(len, people.values())) == [1, 1, 1]
    assert any("by speaker" in note for note in corpus.notes)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"0.wav": "order"}, "must have intent"),
        ({"0.wav": {"intent": 3}}, "must have intent"),
        ({"0.wav": {"intent": "a", "slots": {"x": 3}}}, "got slots"),
        ({"0.wav": {"intent": "a", "slots": {"x": " "}}}, "got slots"),
        ({"9.wav": {"intent": "a"}}, "none of the 1 labels"),
        ([1], "must hold a mapping"),
    ],
)
def test_malformed_labels(waves, entries, message):
    with pytest.raises(ArmhubertError, match=message):
        TASK.read(write_labels(waves("0.wav"), entries), Options())


def test_no_labels(waves):
    with pytest.raises(ArmhubertError, match=r"labels are missing: .*label/label\.json"):
        TASK.read(waves("0.wav"), Options())


def test_two_recordings_of_one_name(waves):
    root = write_labels(waves("a/0.wav", "b/0.wav"), {"0.wav": {"intent": "a"}})
    with pytest.raises(ArmhubertError, match="have the same name"):
        TASK.read(root, Options())


# ---- head and score --------------------------------------------------------


def test_head_has_a_group_a_slot(labelled):
    corpus = TASK.read(labelled, Options())
    items = corpus.splits["train"].items[:4]
    batch = Batch(torch.randn(4, 9, 5), torch.tensor([9, 5, 7, 3]), items, (0,) * 4, 320)
    head = TASK.head(5, corpus, TASK.defaults)
    assert [logits.shape for logits in head.logits(batch)] == [(4, 1), (4, 3), (4, 2)]
    assert torch.isfinite(head.loss(batch))


def test_score_by_hand(labelled):
    corpus = TASK.read(labelled, Options())
    split = corpus.splits["test"]
    truth = [item.label for item in split.items]
    wrong = [*truth[:-1], (truth[-1][0], "another", truth[-1][2])]
    scores = TASK.score(wrong, split, corpus)
    assert scores.metrics["accuracy"] == pytest.approx(200 / 3)
    assert scores.metrics["slot_accuracy"] == pytest.approx(100 * 8 / 9)
    assert scores.by_label == {"intent": (0, 3), "drink": (1, 3), "milk": (0, 3)}
    assert len(scores.examples) == 1
    assert TASK.score(truth, split, corpus).metrics["accuracy"] == 100.0


def test_real_speech(shared_speech):
    corpus = TASK.read(shared_speech / "intents", Options())
    assert sum(len(found.items) for found in corpus.splits.values()) == 619
    assert len(corpus.labels) == 7
