import math
import os
from itertools import permutations
from threading import current_thread

import numpy as np
import pytest
import soundfile
import torch

from armhubert.audio import read_audio
from armhubert.errors import ArmhubertError
from armhubert.superb import simulate
from armhubert.superb.metrics import Turn
from armhubert.superb.simulate import mixtures, speech_intervals
from armhubert.superb.task import Batch, Corpus, Item, Options, Split
from armhubert.superb.tasks.sd import Activity, FrameActivity, SpeakerDiarization, frame_activity, read_kaldi

TASK = SpeakerDiarization()


def tone(path, *stretches):
    """A file of three seconds that is loud in the stretches (seconds) and almost silent elsewhere."""
    wave = np.random.default_rng(0).normal(size=3 * 16_000) * 1e-5
    for start, end in stretches:
        wave[int(start * 16_000) : int(end * 16_000)] *= 1e4
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, 16_000, subtype="FLOAT")


# ---- who speaks when -------------------------------------------------------


def test_speech_intervals(tmp_path):
    tone(tmp_path / "a.wav", (0.5, 1.0), (1.1, 1.5), (2.0, 2.5), (2.8, 2.85))
    found = speech_intervals(read_audio(tmp_path / "a.wav").numpy())
    # The pause of 0.1 s is bridged, the burst of 0.05 s dropped; levels are averaged over 30 ms.
    assert [(a / 16_000, b / 16_000) for a, b in found] == [
        (pytest.approx(0.5, abs=0.011), pytest.approx(1.5, abs=0.011)),
        (pytest.approx(2.0, abs=0.011), pytest.approx(2.5, abs=0.011)),
    ]
    assert speech_intervals(np.zeros(0, np.float32)) == []


def test_speech_intervals_against_hand_labels(shared_speech):
    agree = total = 0
    for path in sorted((shared_speech / "timit-sample").glob("dr1-*/*.flac")):
        wave = read_audio(path).numpy()
        truth, found = np.zeros((2, len(wave)), bool)
        for line in path.with_suffix(".phn").read_text().splitlines():
            start, end, phone = line.split()
            if phone not in ("h#", "pau"):
                truth[int(start) : int(end)] = True
        for a, b in speech_intervals(wave):
            found[a:b] = True
        agree, total = agree + int((truth == found).sum()), total + len(wave)
    assert agree / total > 0.93


def test_a_recording_is_listened_to_once_until_it_changes(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(simulate, "read_audio", lambda path: heard.append(current_thread().name) or read_audio(path))
    names = [f"{split}/{part}/a" for split in ("train", "dev", "test") for part in ("s1", "s2", "mix_both")]
    for seed, name in enumerate(names):
        tone(tmp_path / f"{name}.wav", (0.2, 1.0 + 0.1 * seed))
    first = TASK.read(tmp_path, Options())
    assert len(heard) == 6
    assert TASK.read(tmp_path, Options()) == first
    assert len(heard) == 6
    tone(tmp_path / "test/s1/a.wav", (0.5, 2.5))
    os.utime(tmp_path / "test/s1/a.wav", ns=(0, 0))
    assert TASK.read(tmp_path, Options()) != first
    assert len(heard) == 7
    assert all(name.startswith("listen") for name in heard)
    assert any("SUPERB takes it from LibriMix's rttm" in note for note in first.notes)


# ---- simulated mixtures ----------------------------------------------------


@pytest.fixture
def speech(tmp_path):
    for speaker in range(8):
        for number in range(4):
            tone(tmp_path / f"s{speaker}" / f"{number}.wav", (0.2, 1.0 + 0.2 * number), (2.0, 2.6))
    return tmp_path


def test_mixtures_are_a_function_of_the_seed(speech):
    people = {f"s{n}": sorted((speech / f"s{n}").iterdir()) for n in range(3)}
    found = mixtures(people, 10, seed=3, split="dev")
    assert len(found) == 10
    assert mixtures(people, 10, seed=3, split="dev") == found
    assert mixtures(people, 10, seed=4, split="dev") != found
    assert mixtures(people, 10, seed=3, split="test") != found
    for item in found:
        first, second = item.parts
        assert first.offset == 0
        assert 0 <= second.offset < 3 * 16_000
        assert len({turn.speaker for turn in item.label}) == 2
        for part in item.parts:
            wave = read_audio(part.path).numpy()
            spoken = np.concatenate([wave[a:b] for a, b in speech_intervals(wave)])
            level = 20 * math.log10(part.gain * float(np.sqrt(np.square(spoken).mean())))
            assert -33.01 <= level <= -24.99


def test_turns_are_where_the_mixture_is_loud(speech):
    people = {f"s{n}": sorted((speech / f"s{n}").iterdir()) for n in range(3)}
    for item in mixtures(people, 3, seed=0, split="train"):
        mixed = np.zeros(10 * 16_000)
        for part in item.parts:
            wave = read_audio(part.path).numpy() * part.gain
            mixed[part.offset : part.offset + len(wave)] += wave
        active = np.zeros(len(mixed), bool)
        for turn in item.label:
            active[round(turn.start * 16_000) : round(turn.end * 16_000)] = True
        assert np.abs(mixed[active]).mean() > 50 * np.abs(mixed[~active]).mean()


def test_a_mixture_of_one(speech):
    with pytest.raises(ArmhubertError, match="at least 2 speakers, but the dev split has 1"):
        mixtures({"s0": sorted((speech / "s0").iterdir())}, 3, seed=0, split="dev")


def test_silent_recordings(waves):
    root = waves("a/1.wav", "b/1.wav")
    for path in root.rglob("*.wav"):
        soundfile.write(path, np.zeros(100), 16_000)
    with pytest.raises(ArmhubertError, match="hold no speech"):
        mixtures({name: [root / name / "1.wav"] for name in "ab"}, 2, seed=0, split="test")


def test_folders_of_speakers(speech):
    corpus = TASK.read(speech, Options())
    assert corpus.extra == 2
    assert {split: len(found.items) for split, found in corpus.splits.items()} == {"train": 8, "dev": 4, "test": 4}
    heard = {
        split: {turn.speaker for item in found.items for turn in item.label} for split, found in corpus.splits.items()
    }
    assert not heard["train"] & heard["test"]
    assert not heard["train"] & heard["dev"]


# ---- Kaldi and Libri2Mix ---------------------------------------------------


@pytest.fixture
def kaldi(waves):
    root = waves("audio/m1.wav", "audio/m2.wav")
    for split in ("train", "dev", "test"):
        (root / split).mkdir()
        (root / split / "wav.scp").write_text(f"m1 {root}/audio/m1.wav\nm2 audio/m2.wav\n")
        (root / split / "segments").write_text("u1 m1 0.0 0.3\nu2 m1 0.2 0.5\nu3 m2 0.1 0.4\n")
        (root / split / "utt2spk").write_text("u1 ann\nu2 bob\nu3 ann\n")
    return root


def test_kaldi(kaldi):
    corpus = TASK.read(kaldi, Options())
    first, second = corpus.splits["dev"].items
    assert first.label == (Turn(0.0, 0.3, "ann"), Turn(0.2, 0.5, "bob"))
    assert second.parts[0].path == str(kaldi / "audio" / "m2.wav")
    assert corpus.extra == 2
    (kaldi / "dev" / "rttm").write_text(
        "SPKR-INFO m1 1 <NA> <NA> <NA> unknown ann <NA>\nSPEAKER m1 1 0.10 0.25 <NA> <NA> ann <NA>\n"
        "SPEAKER m2 1 0.00 0.20 <NA> <NA> bob <NA>\n"
    )
    assert TASK.read(kaldi, Options()).splits["dev"].items[0].label == (Turn(0.1, 0.35, "ann"),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("utt2spk", "u1 ann\nu2 bob\n", "utterance 'u3' .* has no speaker"),
        ("segments", "u1 m1 0.3 0.1\n", "times must be seconds, the end not before the start"),
        ("segments", "u1 m1 zero 0.1\n", "times must be seconds"),
        ("segments", "u1 m9 0 0.1\n", r"1 recordings of .*segments are not in .*wav.scp \(m9\)"),
        ("segments", "u1 m1 0 0.1\n", "recording m2 of the train split has no speech"),
        ("wav.scp", "m1 sox a.wav - |\nm2 audio/m2.wav\n", "a command for 'm1', which is not run"),
        ("wav.scp", "m1 audio/gone.wav\nm2 audio/m2.wav\n", "recording 'm1' .* has no audio file"),
        ("wav.scp", "m1\n", "every line must be a name, a space and a value"),
        ("utt2spk", None, "list of speakers is missing"),
    ],
)
def test_broken_kaldi(kaldi, name, text, message):
    path = kaldi / "train" / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ArmhubertError, match=message):
        TASK.read(kaldi, Options())


def test_a_split_that_is_absent(kaldi):
    for path in (kaldi / "test").iterdir():
        path.unlink()
    with pytest.raises(ArmhubertError, match="has data for train, dev, but none for test"):
        TASK.read(kaldi, Options())


def test_every_folder_that_is_named_is_taken(kaldi):
    (kaldi / "more").mkdir()
    for name in ("wav.scp", "segments", "utt2spk"):
        (kaldi / "more" / name).write_text((kaldi / "train" / name).read_text().replace("m", "n"))
    (kaldi / "more" / "wav.scp").write_text("n1 audio/m1.wav\nn2 audio/m2.wav\n")
    corpus = TASK.read(kaldi, Options(train=("train", "more")))
    assert [item.key for item in corpus.splits["train"].items] == ["m1", "m2", "n1", "n2"]
    with pytest.raises(ArmhubertError, match=r"train subset .*/gone has no recordings as .*/train has"):
        TASK.read(kaldi, Options(train=("train", "gone")))


def test_one_speaker_throughout(kaldi):
    for split in ("train", "dev", "test"):
        (kaldi / split / "utt2spk").write_text("u1 ann\nu2 ann\nu3 ann\n")
    with pytest.raises(ArmhubertError, match="at least 2 speakers, but all of the train split have 1"):
        TASK.read(kaldi, Options())


def test_more_speakers_in_test(kaldi):
    (kaldi / "test" / "segments").write_text("u1 m1 0.0 0.3\nu2 m1 0.2 0.5\nu4 m1 0.2 0.5\nu3 m2 0.1 0.4\n")
    (kaldi / "test" / "utt2spk").write_text("u1 ann\nu2 bob\nu3 ann\nu4 cat\n")
    with pytest.raises(ArmhubertError, match="recordings of 3 speakers, but training has none of more than 2"):
        TASK.read(kaldi, Options())


def test_librimix(tmp_path):
    for split in ("train-100", "dev", "test"):
        base = tmp_path / "wav16k" / "max" / split
        tone(base / "mix_both" / "x_y.wav", (0.5, 2.5))
        tone(base / "s1" / "x_y.wav", (0.5, 1.5))
        tone(base / "s2" / "x_y.wav", (1.0, 2.5))
    corpus = TASK.read(tmp_path, Options())
    (item,) = corpus.splits["train"].items
    assert [turn.speaker for turn in item.label] == ["s1", "s2"]
    assert item.label[1].start == pytest.approx(1.0, abs=0.02)
    (tmp_path / "wav16k" / "max" / "dev" / "s2" / "x_y.wav").unlink()
    with pytest.raises(ArmhubertError, match=r"has no source in .*s2"):
        TASK.read(tmp_path, Options())


def test_read_kaldi_gives_a_generator(kaldi):
    assert [item.key for item in read_kaldi(kaldi / "dev", kaldi)] == ["m1", "m2"]


# ---- head and score --------------------------------------------------------


def test_frames_of_turns():
    turns = (Turn(0.0, 0.05, "q"), Turn(0.04, 0.2, "p"))
    # Frames of 20 ms, from the second on: q until frame round(2.5) = 2, p from 2.
    assert frame_activity(turns, 1, 4, 320).tolist() == [[0, 1], [1, 0], [1, 0], [1, 0]]
    assert frame_activity(turns, 20, 2, 320).sum() == 0


def items_of(turns):
    return tuple(
        Item(str(n), (), tuple(Turn(a * 0.02, b * 0.02, who) for a, b, who in some)) for n, some in enumerate(turns)
    )


def test_loss_is_s3prls(filled, golden_features):
    # SuperbDiarizationModel and pit_loss of s3prl 0.4.18: 0.7540842890739441, the last recording in the other order.
    items = items_of([[(0, 10, "p"), (6, 25, "q")], [(3, 9, "p"), (9, 20, "q")], [(0, 4, "q"), (2, 17, "p")]])
    features, lengths = golden_features
    head = filled(FrameActivity(6, 2))
    loss = head.loss(Batch(features, lengths, items, (0, 0, 0), 320))
    assert loss.item() == pytest.approx(0.7540842890739441, abs=1e-6)


def test_loss_is_free_of_the_order(golden_features):
    features, lengths = golden_features
    head = FrameActivity(6, 2)
    one = items_of([[(0, 10, "p"), (6, 25, "q")]] * 3)
    other = items_of([[(0, 10, "z"), (6, 25, "b")]] * 3)
    losses = [head.loss(Batch(features, lengths, items, (0, 0, 0), 320)).item() for items in (one, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("speakers", [4, 10])
def test_the_best_of_all_orders_is_taken(golden_features, speakers):
    torch.manual_seed(0)
    features, lengths = golden_features
    head = FrameActivity(6, speakers)
    head.classify.weight.data *= 50  # outputs that differ
    items = items_of([[(n, 5 + 2 * n, name) for n, name in enumerate("abcdefghij"[:speakers])]] * 3)
    batch = Batch(features, lengths, items, (0, 0, 0), 320)
    loss = head.loss(batch).item()
    if speakers < 10:  # ten have 3,628,800 orders
        logits, targets = head.logits(batch), frame_activity(items[0].label, 0, 30, 320)
        expected = 0.0
        for row, length in zip(logits, lengths.tolist(), strict=True):
            orders = [row[:length, list(order)] for order in permutations(range(speakers))]
            entropy = torch.nn.functional.binary_cross_entropy_with_logits
            expected += length * min(entropy(order, targets[:length]).item() for order in orders)
        assert loss == pytest.approx(expected / int(lengths.sum()), rel=1e-5)
    assert math.isfinite(loss)


def test_a_loss_that_is_not_finite_is_told_as_such(golden_features):
    features, lengths = golden_features
    head = FrameActivity(6, 2)
    head.classify.bias.data[0] = math.nan
    items = items_of([[(0, 10, "p"), (6, 25, "q")]] * 3)
    assert math.isnan(head.loss(Batch(features, lengths, items, (0, 0, 0), 320)).item())


def test_crops_see_their_part(golden_features):
    features, lengths = golden_features
    head = FrameActivity(6, 2)
    early = items_of([[(0, 10, "p"), (6, 25, "q")]])
    late = items_of([[(40, 50, "p"), (46, 65, "q")]])
    losses = [
        head.loss(Batch(features[:1], lengths[:1], items, (first,), 320)).item()
        for items, first in ((early, 0), (late, 40))
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_predictions_are_probabilities(golden_features):
    features, lengths = golden_features
    found = FrameActivity(6, 2).predict(Batch(features, lengths, items_of([[], [], []]), (0, 0, 0), 160))
    assert [activity.probabilities.shape for activity in found] == [(30, 2), (22, 2), (17, 2)]
    assert found[0].frame_seconds == 0.01


def test_score_by_hand():
    # 1 s of ann, then 1 s of bob; predicted the other way round by name, and bob's last half second at 0.45.
    item = items_of([[(0, 50, "ann"), (50, 100, "bob")]])
    probabilities = np.zeros((100, 2), np.float32)
    probabilities[:50, 1] = probabilities[50:75, 0] = 0.9
    probabilities[75:, 0] = 0.45
    scores = TASK.score([Activity(probabilities, 0.02)], Split(item), Corpus({}))
    assert scores.metrics["der"] == pytest.approx(25.0)
    assert scores.metrics["missed"] == pytest.approx(25.0)
    assert scores.metrics["confused"] == scores.metrics["false_alarm"] == 0.0
    assert scores.metrics["der_best"] == pytest.approx(0.0, abs=1e-9)


def test_a_median_filter_removes_blips():
    item = items_of([[(0, 100, "ann"), (0, 100, "bob")]])
    probabilities = np.ones((100, 2), np.float32)
    probabilities[40:44] = 0
    scores = TASK.score([Activity(probabilities, 0.02)], Split(item), Corpus({}))
    assert scores.metrics["der"] == pytest.approx(0.0, abs=1e-9)


def test_head_learns(golden_features):
    _, lengths = golden_features
    items = items_of([[(0, 10, "p"), (6, 25, "q")]] * 3)
    features = torch.randn(3, 30, 6)
    features[..., :2] += 3 * frame_activity(items[0].label, 0, 30, 320)
    batch = Batch(features, lengths, items, (0, 0, 0), 320)
    head = FrameActivity(6, 2)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    first = head.loss(batch).item()
    for _ in range(10):
        optimizer.zero_grad()
        head.loss(batch).backward()
        optimizer.step()
    assert head.loss(batch).item() < 0.6 * first
