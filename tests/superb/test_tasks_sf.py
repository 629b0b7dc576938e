import json

import pytest
import torch

from armhubert.errors import ArmhubertError
from armhubert.superb.heads import CTCRecurrent
from armhubert.superb.task import SPLITS, Batch, Options
from armhubert.superb.tasks.sf import SlotFilling, decode, encode, normalize, parse_slots, plain

TASK = SlotFilling()


# ---- slot tokens -----------------------------------------------------------


def test_tokens_round_trip():
    tokens = encode(["PLAY", "THE", "BEATLES", "NOW"], ["O", "artist", "artist", "O"])
    assert "".join(token if len(token) == 1 else f"<{token}>" for token in tokens) == (
        "PLAY <B-artist>THE BEATLES<E-artist> NOW"
    )
    text = decode(tokens)
    assert text == "PLAY B-artist THE BEATLES E-artist NOW"
    assert parse_slots(text) == {"artist": ["THE BEATLES"]}
    assert plain(text) == "PLAY THE BEATLES NOW"


def test_neighbouring_slots():
    text = decode(encode(["A", "B", "C"], ["x", "y", "y"]))
    assert text == "B-x A E-x B-y B C E-y"
    assert parse_slots(text) == {"x": ["A"], "y": ["B C"]}


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("", {}),
        ("PLAY B-artist BOB", {}),  # never closed
        ("BOB E-artist", {}),
        ("B-a X E-b Y E-a", {"a": ["X Y"]}),  # what closes another slot inside a value is dropped
        ("B-a X B-b Y E-a Z E-b", {"a": ["X Y"]}),  # as s3prl: the value ends at the first own end
        ("B-a X E-a B-a Y E-a", {"a": ["X", "Y"]}),
    ],
)
def test_broken_predictions(text, slots):
    assert parse_slots(text) == slots


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("Élan", "ELAN"),
        ("?", ""),
        ("don't", "DON'T"),
        ("&", "AND"),
        ("Ærø", "ARO"),
        ('"x"', "X"),
        ("…", ""),
        ("7", "7"),
    ],
)
def test_normalize(word, expected):
    assert normalize(word) == expected


# ---- Audio SNIPS -----------------------------------------------------------


@pytest.fixture
def snips(waves):
    voices = {"train": "Ivy", "valid": "Amy", "test": "Emma"}
    names = [f"{split}/{voice}-snips-{split}-{n}.wav" for split, voice in voices.items() for n in range(2)]
    root = waves(*names, "train/Stranger-snips-train-0.wav", seconds=0.05)
    lines = []
    for split, voice in voices.items():
        lines.append(f"{voice}-snips-{split}-0 BOS PLAY BOB , NOW EOS\tO O artist O O PlayMusic")
        lines.append(f"{voice}-snips-{split}-1 BOS RAIN IN NEW YORK EOS\tO O O B-city I-city GetWeather")
    (root / "all.iob.snips.txt").write_text("\n".join(lines) + "\n")
    return root


def test_audio_snips(snips):
    corpus = TASK.read(snips, Options())
    assert {split: len(found.items) for split, found in corpus.splits.items()} == {"train": 2, "dev": 2, "test": 2}
    assert [decode(item.label) for item in corpus.splits["dev"].items] == [
        "PLAY B-artist BOB E-artist NOW",
        "RAIN IN B-city NEW YORK E-city",
    ]
    assert {"B-artist", "E-artist", "B-city", "E-city", " "} < set(corpus.labels[0])


def test_snips_without_labels(snips):
    path = snips / "all.iob.snips.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:1] + lines[2:]) + "\n")
    with pytest.raises(ArmhubertError, match=r"1 slots of the dev split are not in the training split \(city\)"):
        TASK.read(snips, Options())
    path.write_text("Ivy-snips-train-0 BOS PLAY BOB EOS\tO O artist\n")
    with pytest.raises(ArmhubertError, match="must be `name BOS words EOS`"):
        TASK.read(snips, Options())


def test_snips_without_a_split(snips):
    for path in (snips / "valid").iterdir():
        path.unlink()
    (snips / "valid").rmdir()
    with pytest.raises(ArmhubertError, match="has no folder valid"):
        TASK.read(snips, Options())


# ---- JSON labels -----------------------------------------------------------


@pytest.fixture
def labelled(waves):
    root = waves(*(f"{n:02d}.wav" for n in range(20)), seconds=0.05)

    def write(text=None, last=None):
        entries = {}
        for n in range(20):
            drink = ("tea", "iced coffee")[n % 2]
            entry = {"intent": "order", "slots": {"drink": drink, "milk": "oat milk"}}
            if text:
                entry["text"] = text.format(drink=drink)
            entries[f"{n:02d}.wav"] = entry
        if last is not None:
            entries["19.wav"] = last
        (root / "labels.json").write_text(json.dumps(entries))
        return root

    return write


def test_json_with_transcripts(labelled):
    last = {"intent": "order", "slots": {"drink": "tea,", "milk": "oat milk."}, "text": "An tea, with oat milk."}
    corpus = TASK.read(labelled("An {drink}, with oat milk.", last=last), Options())
    assert sum(len(found.items) for found in corpus.splits.values()) == 20
    texts = {decode(item.label) for found in corpus.splits.values() for item in found.items}
    assert texts == {
        "AN B-drink TEA E-drink WITH B-milk OAT MILK E-milk",
        "AN B-drink ICED COFFEE E-drink WITH B-milk OAT MILK E-milk",
    }
    assert not any("no transcripts" in note for note in corpus.notes)


def test_json_without_transcripts(labelled):
    corpus = TASK.read(labelled(), Options())
    assert any(
        note.startswith("no transcripts: the text to recognise is the slot values alone") for note in corpus.notes
    )
    texts = {decode(item.label) for found in corpus.splits.values() for item in found.items}
    assert "B-drink TEA E-drink B-milk OAT MILK E-milk" in texts


@pytest.mark.parametrize("text", [{}, {"text": "green tea please"}])
def test_names_of_several_words_are_told_apart(waves, text):
    slots = {"drink kind": "tea", "drink colour": "green"}
    labels = {f"{n}": {"intent": "a", "slots": slots, "split": split, **text} for n, split in enumerate(SPLITS)}
    root = waves("0.wav", "1.wav", "2.wav")
    (root / "labels.json").write_text(json.dumps(labels))
    (item,) = TASK.read(root, Options()).splits["test"].items
    assert parse_slots(decode(item.label)) == {"drink_kind": ["TEA"], "drink_colour": ["GREEN"]}


def test_some_transcripts(labelled):
    with pytest.raises(ArmhubertError, match="1 of 20 labels have no text"):
        TASK.read(labelled("{drink} and oat milk", last={"intent": "a", "slots": {"drink": "tea"}}), Options())


def test_a_value_that_is_not_said(labelled):
    last = {"intent": "a", "slots": {"drink": "water"}, "text": "nothing of the kind"}
    corpus = TASK.read(labelled("{drink} and oat milk", last=last), Options())
    assert any("1 utterances left out: their transcript does not contain a slot value" in note for note in corpus.notes)


def test_no_labels(waves):
    with pytest.raises(ArmhubertError, match=r"has none of all\.iob\.snips\.txt, label/label\.json"):
        TASK.read(waves("0.wav"), Options())


def test_no_slots_at_all(waves):
    root = waves(*(f"{n:02d}.wav" for n in range(20)), seconds=0.05)
    (root / "labels.json").write_text(json.dumps({f"{n:02d}": {"intent": "a", "text": "hello"} for n in range(20)}))
    with pytest.raises(ArmhubertError, match="no utterance of the train split fills a slot"):
        TASK.read(root, Options())


def test_gradients_reach_the_layer_weights(snips):
    corpus = TASK.read(snips, Options())
    items = corpus.splits["train"].items
    layers, weights = torch.randn(3, 2, 60, 240), torch.zeros(3, requires_grad=True)
    features = torch.einsum("lbtd,l->btd", layers, weights.softmax(0))
    head = CTCRecurrent(240, corpus.labels[0], size=8).train()  # as TASK.head, but small
    head.loss(Batch(features, torch.tensor([60, 50]), items, (0, 0), 320)).backward()
    assert weights.grad is not None
    assert weights.grad.abs().sum() > 0
    assert all(
        token in corpus.labels[0]
        for tokens in head.eval().predict(Batch(features.detach(), torch.tensor([60, 50]), items, (0, 0), 320))
        for token in tokens
    )


# ---- score -----------------------------------------------------------------


def test_score_by_hand(snips):
    corpus = TASK.read(snips, Options())
    split = corpus.splits["test"]
    guesses = [list(split.items[0].label), list(encode(["RAIN", "IN", "NEW", "PORK"], ["O", "O", "O", "city"]))]
    scores = TASK.score(guesses, split, corpus)
    # Slot types are right. Values: BOB, and PORK for NEW YORK: 4 deletions and 1 substitution of 11 characters.
    assert scores.metrics["slot_f1"] == 100.0
    assert scores.metrics["slot_cer"] == pytest.approx(100 * 5 / 11)
    assert scores.metrics["wer"] == pytest.approx(100 / 7)
    empty = TASK.score([[], []], split, corpus)
    assert empty.metrics == {"slot_f1": 0.0, "slot_cer": 100.0, "wer": 100.0}


def test_real_speech(shared_speech):
    corpus = TASK.read(shared_speech / "intents", Options())
    assert sum(len(found.items) for found in corpus.splits.values()) == 619
    assert sum(token.startswith("B-") for token in corpus.labels[0]) == 6
