"""Readers and scores of pr, asr, ks and sid."""

import dataclasses
import gzip
import importlib.util
import re
import sys

import pytest
import torch
from corpora import librispeech

from armhubert.errors import ArmhubertError
from armhubert.superb.g2p import pronounce
from armhubert.superb.heads import Beam, CTCHead, CTCLinear, CTCRecurrent, PooledClassifier, beam_decoder
from armhubert.superb.simulate import spoken_words
from armhubert.superb.task import Batch, Corpus, Item, Options, Split
from armhubert.superb.tasks import TASKS
from armhubert.superb.tasks.asr import arpa_words
from armhubert.superb.tasks.ks import GAIN, WORDS, which_split
from armhubert.superb.tasks.pr import read_lexicon


def test_pr_takes_superbs_subsets_and_the_first_pronunciation(tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=4, dev_clean=2, test_clean=2, train_other_500=2)
    corpus = TASKS["pr"].read(tmp_path, Options())
    assert {name: len(split.items) for name, split in corpus.splits.items()} == {"train": 4, "dev": 2, "test": 2}
    assert corpus.splits["test"].items[0].label == ("HH", "AH0", "L", "OW1", "K", "AE1", "T")
    assert corpus.notes == ()
    assert corpus.labels[0] == ("AE1", "AH0", "HH", "K", "L", "OW1", "T")


def test_lexicons_of_other_tools(tmp_path):
    text = ";;; # CMUdict\n;;;\naalborg AO1 L B # place\nHELLO\t0.99\t0.2\tHH AH0\n#HASH-MARK  HH AE1\nCAT 1.0 K AE1\n"
    (tmp_path / "lexicon.txt").write_text(text)
    assert read_lexicon(tmp_path / "lexicon.txt") == {
        "AALBORG": ("AO1", "L", "B"), "HELLO": ("HH", "AH0"), "#HASH-MARK": ("HH", "AE1"), "CAT": ("K", "AE1"),
    }  # fmt: skip


def test_pr_lists_words_outside_the_lexicon(tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=4, dev_clean=2, test_clean=2)
    (tmp_path / "lexicon.txt").write_text("CAT\tK AE T\n")
    corpus = TASKS["pr"].read(tmp_path, Options())
    assert len(corpus.splits["train"].items) == 2
    assert any("1 words are outside the lexicon (HELLO)" in note for note in corpus.notes)
    (tmp_path / "lexicon.txt").write_text("DOG\tD AO G\n")
    with pytest.raises(ArmhubertError, match="every train utterance has words outside the lexicon"):
        TASKS["pr"].read(tmp_path, Options())
    (tmp_path / "lexicon.txt").unlink()
    with pytest.raises(ArmhubertError, match="no lexicon beside"):
        TASKS["pr"].read(tmp_path, Options())


def test_g2p_pronounces_words_outside_the_lexicon(tmp_path, waves):
    pytest.importorskip("phonemizer")
    librispeech(tmp_path, waves, train_clean_100=4, dev_clean=2, test_clean=2)
    with open(tmp_path / "test-clean/11/1/11-1.trans.txt", "w") as file:
        file.write("11-1-0001 CAT 4TH ZWINGLI\n")
    (tmp_path / "lexicon.txt").write_text("CAT\tK AE1 T\nHALLO\tHH AH0 L OW1\nZIPPING\tZ IH1 P IH0 NG\n")
    corpus = TASKS["pr"].read(tmp_path, Options(g2p=True))
    assert corpus.splits["train"].items[0].label == ("HH", "AH0", "L", "OW1", "K", "AE1", "T")
    made = next(note for note in corpus.notes if "machine pronunciations" in note)
    assert re.match(r"1 words .* by espeak-ng \d\.\d+.* \(HELLO HH AH0 L OW1\)", made)  # ZWINGLI has phones of no word
    assert any("2 words are outside the lexicon (4TH, ZWINGLI)" in note for note in corpus.notes)
    (tmp_path / "lexicon.txt").write_text("CAT\tK AE T\nHALLO\tHH AH L OW\n")
    assert TASKS["pr"].read(tmp_path, Options(g2p=True)).splits["train"].items[0].label[:4] == ("HH", "AH", "L", "OW")


def test_g2p_without_its_libraries_tells_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ArmhubertError, match=r"pip install 'armhubert\[g2p\]'"):
        pronounce(["HELLO"], stress=False)


def test_the_head_of_asr_and_sf_has_the_size_that_was_set():
    corpus = Corpus({}, (("A", "B"),))
    for name in ("asr", "sf"):
        assert TASKS[name].defaults.head_size == 1024
        head = TASKS[name].head(6, corpus, dataclasses.replace(TASKS[name].defaults, head_size=12))
        assert head.recurrent[1].weight_ih_l0.shape == (4 * 12, 2 * 12)


def test_transcripts_without_audio_and_the_reverse_are_told(tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=6, dev_clean=2, test_clean=2)
    (tmp_path / "train-clean-100/10/1/10-1-0000.wav").unlink()
    waves("train-clean-100/10/1/10-1-0099.wav")
    notes = TASKS["asr"].read(tmp_path, Options()).notes
    assert any("1 transcripts (10-1-0000) without audio" in note for note in notes)
    assert any("1 recordings (10-1-0099) without transcript" in note for note in notes)


def test_what_macos_leaves_beside_files_is_not_read(tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=6, dev_clean=2)
    waves("timit/SX1.WAV")
    (tmp_path / "timit/SX1.PHN").write_text("0 10 k\n10 20 ae\n20 30 t\n")
    options = Options(test=("timit",))
    before = {name: TASKS[name].read(tmp_path, options if name == "pr" else Options()) for name in ("pr", "sid")}
    spoken = list(spoken_words(tmp_path))
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\xff")
    assert {name: TASKS[name].read(tmp_path, options if name == "pr" else Options()) for name in before} == before
    assert list(spoken_words(tmp_path)) == spoken


def test_dev_is_held_out_where_there_is_none(tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_5=20, test_clean_open=2)
    corpus = TASKS["asr"].read(tmp_path, Options())
    keys = {name: {item.key for item in split.items} for name, split in corpus.splits.items()}
    assert len(keys["dev"]) == 2
    assert not keys["dev"] & keys["train"]
    assert any("2 utterances of train are held out" in note for note in corpus.notes)


@pytest.mark.parametrize("name", ["dr1-a/sx1.wav", "DR1/FCJF0/SX1.WAV"])
def test_further_test_sets_and_timit(name, tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=4, dev_clean=2, test_clean=2)
    audio = waves(f"timit/{name}") / "timit" / name
    labels = "0 9 h#\n9 20 dh\n20 30 ix\n30 40 kcl\n40 50 k\n50 60 axr\n60 70 h#\n"
    audio.with_suffix(".PHN" if name.isupper() else ".phn").write_text(labels)
    corpus = TASKS["pr"].read(tmp_path, Options(test=("test-clean", "timit")))
    assert corpus.splits["test:timit"].items[0].label == ("DH", "IH", "K", "ER")
    assert corpus.splits["test"].items[0].label[:2] == ("HH", "AH0")
    assert corpus.labels[0] == ("AE1", "AH0", "HH", "K", "L", "OW1", "T")
    assert any("phones of test:timit that training lacks count as errors: DH, ER, IH" in n for n in corpus.notes)
    spoken = ["DH", "IH1", "K", "ER0"]
    assert TASKS["pr"].score([spoken], corpus.splits["test:timit"], corpus).metrics["per"] == 0
    assert TASKS["pr"].score([["HH", "AH1"]], Split((Item("a", (), ("HH", "AH0")),)), corpus).metrics["per"] == 50


def test_named_subsets_must_exist(tmp_path, waves):
    librispeech(tmp_path, waves, train_clean_100=2, dev_clean=2, test_clean=2)
    with pytest.raises(ArmhubertError, match="subset 'train-clean' does not exist"):
        TASKS["asr"].read(tmp_path, Options(train=("train-clean",)))


def test_asr_scores_words_and_characters():
    split = Split((Item("a", (), tuple("HELLO CAT")), Item("b", (), tuple("CAT"))))
    scores = TASKS["asr"].score([list("HELLO CUT "), list("CAT")], split, Corpus({"test": split}))
    assert scores.metrics["wer"] == pytest.approx(100 / 3)
    assert scores.metrics["cer"] == pytest.approx(100 / 12)


def test_arpa_words(tmp_path):
    text = "\\data\\\nngram 1=3\n\n\\1-grams:\n-1.0\t<s>\t-0.5\n-1.0\thello\t-0.3\n-2.0\tcat\n\n\\2-grams:\n-1 a b\n"
    (tmp_path / "lm.arpa").write_text(text)
    with gzip.open(tmp_path / "lm.arpa.gz", "wt") as file:
        file.write(text)
    assert arpa_words(tmp_path / "lm.arpa") == arpa_words(tmp_path / "lm.arpa.gz") == ("cat", "hello")
    (tmp_path / "lm.bin").write_bytes(b"\xff\xfe\x00mmap lm")
    with pytest.raises(ArmhubertError, match="language model"):
        arpa_words(tmp_path / "lm.bin")


def test_ks_reads_speech_commands(tmp_path, waves):
    names = [f"{word}/{number}_nohash_0.wav" for word in ("yes", "no", "bed") for number in range(4)]
    waves(*(f"sc/{name}" for name in names))
    waves("sc/_background_noise_/hum.wav", seconds=20)
    (tmp_path / "sc/validation_list.txt").write_text("yes/0_nohash_0.wav\nno/0_nohash_0.wav\nbed/0_nohash_0.wav\n")
    (tmp_path / "sc/testing_list.txt").write_text("yes/1_nohash_0.wav\nno/1_nohash_0.wav\nbed/1_nohash_0.wav\n")
    corpus = TASKS["ks"].read(tmp_path / "sc", Options())
    assert corpus.labels[0] == ("_silence_", "_unknown_", "no", "yes")
    test = [item for item in corpus.splits["test"].items if item.label != ("_silence_",)]
    assert sorted(item.key for item in test) == ["bed/1_nohash_0", "no/1_nohash_0", "yes/1_nohash_0"]
    silence = [item for split in corpus.splits.values() for item in split.items if item.label == ("_silence_",)]
    assert len(silence) == 20
    assert {part.gain for item in silence for part in item.parts} == {GAIN}
    waves(*(f"speech_commands_test_set_v0.01/{word}/x.wav" for word in ("yes", "_silence_", "_unknown_")))
    corpus = TASKS["ks"].read(tmp_path / "sc", Options())
    assert sorted(item.label[0] for item in corpus.splits["test"].items) == ["_silence_", "_unknown_", "yes"]


def test_ks_needs_the_official_lists(tmp_path, waves):
    waves(*(f"{word}/a.wav" for word in WORDS))
    with pytest.raises(ArmhubertError, match="list of Speech Commands is missing"):
        TASKS["ks"].read(tmp_path, Options())


def test_ks_takes_a_users_own_words_for_what_they_are(tmp_path, waves):
    waves(*(f"{word}/{n}_nohash_0.wav" for word in ("yes", "no", "apple") for n in range(24)))
    corpus = TASKS["ks"].read(tmp_path, Options())
    assert corpus.labels == (("apple", "no", "yes"),)
    assert any(note.startswith("no lists: split 80/10/10") for note in corpus.notes)


def test_ks_trains_on_all_that_no_list_names(tmp_path, waves):
    waves(*(f"t/{word}/{n}.wav" for word in ("cat", "dog") for n in range(12)))
    (tmp_path / "t/validation_list.txt").write_text("cat/0.wav\ndog/0.wav\n")
    (tmp_path / "t/testing_list.txt").write_text("cat/1.wav\ndog/1.wav\n")
    corpus = TASKS["ks"].read(tmp_path / "t", Options())
    keys = {name: [item.key for item in split.items] for name, split in corpus.splits.items()}
    assert (keys["dev"], keys["test"], len(keys["train"])) == (["cat/0", "dog/0"], ["cat/1", "dog/1"], 20)


def test_speech_commands_rule_keeps_speakers_together():
    assert which_split("0a7c2a8d_nohash_0.wav") == which_split("0a7c2a8d_nohash_1.wav")
    assert {which_split(f"{n}.wav") for n in range(200)} == {"train", "dev", "test"}


def test_ks_labels_unseen_in_training(tmp_path, waves):
    waves(*(f"t/yes/{n}.wav" for n in range(3)), *(f"t/no/{n}.wav" for n in range(3)), "t/up/0.wav")
    (tmp_path / "t/validation_list.txt").write_text("yes/0.wav\n")
    (tmp_path / "t/testing_list.txt").write_text("no/0.wav\nup/0.wav\n")
    with pytest.raises(ArmhubertError, match=r"1 keywords of the test split are not in the training split \(up\)"):
        TASKS["ks"].read(tmp_path / "t", Options())


def test_sid_reads_folders_of_speakers_and_voxceleb(tmp_path, waves):
    waves(*(f"folders/{speaker}/x/{n}.wav" for speaker in ("ann", "bob") for n in range(10)), "folders/eve/0.wav")
    corpus = TASKS["sid"].read(tmp_path / "folders", Options())
    assert {name: len(split.items) for name, split in corpus.splits.items()} == {"train": 16, "dev": 2, "test": 2}
    assert corpus.labels == (("ann", "bob"),)
    assert any("1 speakers with fewer than 3" in note for note in corpus.notes)
    names = [f"id1000{s}/video/0000{n}.wav" for s in (1, 2) for n in range(3)]
    waves(*(f"vox/dev/wav/{name}" for name in names))
    lines = [f"{number % 3 + 1} {name}" for number, name in enumerate(names)]
    (tmp_path / "vox/iden_split.txt").write_text("\n".join([*lines, "1 id10001/gone/00000.wav"]))
    corpus = TASKS["sid"].read(tmp_path / "vox", Options())
    assert [item.key for item in corpus.splits["dev"].items] == ["id10001/video/00001", "id10002/video/00001"]
    assert any("1 recordings of iden_split.txt are missing" in note for note in corpus.notes)
    with pytest.raises(ArmhubertError, match=r"iden_split\.txt says what train is: leave out train="):
        TASKS["sid"].read(tmp_path / "vox", Options(train=("wav",)))


def test_sid_takes_speakers_with_a_recording_for_each_split(tmp_path, waves):
    waves(*(f"{speaker}/{n}.wav" for speaker in ("ann", "bob") for n in range(3)))
    corpus = TASKS["sid"].read(tmp_path, Options())
    for split in ("train", "dev", "test"):
        assert {item.label for item in corpus.splits[split].items} == {("ann",), ("bob",)}
        assert len(corpus.splits[split].items) == 2


def test_sid_holds_out_a_tenth_of_each_speaker_whatever_files_are_called(tmp_path, waves):
    waves(*(f"{speaker}/{n}.wav" for place, speaker in enumerate("abcdefgh") for n in range(place, place + 10)))
    corpus = TASKS["sid"].read(tmp_path, Options())
    assert {name: len(split.items) for name, split in corpus.splits.items()} == {"train": 64, "dev": 8, "test": 8}


def test_sid_takes_every_subset_that_is_named(tmp_path, waves):
    waves(*(f"{subset}/{speaker}/{n}.wav" for subset, speaker in ("ac", "ad", "be") for n in range(3)))
    corpus = TASKS["sid"].read(tmp_path, Options(train=("a", "b")))
    assert corpus.labels == (("c", "d", "e"),)
    (item,) = (item for item in corpus.splits["train"].items if item.label == ("e",))
    assert item.key.startswith("b/e/")
    (item, _) = TASKS["sid"].read(tmp_path, Options(train=("a",))).splits["train"].items
    assert item.key.startswith("c/")


def test_one_speaker_is_not_enough(tmp_path, waves):
    waves(*(f"only/{n}.wav" for n in range(10)))
    with pytest.raises(ArmhubertError, match="at least 2 speakers, got 1"):
        TASKS["sid"].read(tmp_path, Options())


def batch(items, frames=30, width=6):
    features = torch.randn(len(items), frames, width, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([frames, *[frames - 8] * (len(items) - 1)])
    features = features * (torch.arange(frames) < lengths[:, None])[..., None]
    return Batch(features, lengths, tuple(items), (0,) * len(items), 320)


@pytest.mark.parametrize("head", [CTCLinear(6, "ABC"), CTCRecurrent(6, "ABC", size=5), PooledClassifier(6, ["ABC"])])
def test_heads_do_not_mix_utterances(head):
    head.eval()
    items = [Item("a", (), ("A",)), Item("b", (), ("B",))]
    both = batch(items)
    alone = Batch(both.features[1:, :22], both.lengths[1:], both.items[1:], (0,), 320)
    with torch.no_grad():
        first = Batch(both.features[:1], both.lengths[:1], both.items[:1], (0,), 320)
        expected = (float(head.loss(first)) + float(head.loss(alone))) / 2
        assert float(head.loss(both)) == pytest.approx(expected, abs=1e-5)
        assert head.predict(both)[1] == head.predict(alone)[0]


def test_ctc_collapses_repeats_and_blanks():
    head = CTCLinear(4, ["A", "B"])
    assert head.collapse(torch.tensor([0, 3, 3, 0, 3, 4, 1, 2, 4])) == ["A", "A", "B", "B"]


ARPA = """\\data\\
ngram 1=5
ngram 2=1

\\1-grams:
-99\t<s>\t0
-1.0\t</s>
-1.0\t<unk>\t0
-0.3\tCAT\t0
-3.0\tCUT\t0

\\2-grams:
-0.5\tCUT CUT

\\end\\
"""


@pytest.mark.parametrize(("cat", "cut"), [("CAT", "CUT"), ("cat", "cut")])
def test_beam_search_prefers_likely_words(tmp_path, cat, cut):
    tokens = sorted(" ACTU")
    (tmp_path / "lm.arpa").write_text(ARPA.replace("CAT", cat).replace("CUT", cut))
    head = CTCRecurrent(3, tokens, size=4).eval()
    path = ["<blank>", "C", "<blank>", "U", "<blank>", "T", " ", "<blank>"]
    scores = torch.full((1, len(path), len(head.tokens)), -8.0)
    for frame, token in enumerate(path):
        scores[0, frame, head.place[token]] = 0.0
    scores[0, 3, head.place["A"]] = -0.5
    head.logits = lambda batch: scores  # type: ignore[method-assign]
    batch = Batch(torch.zeros(1, len(path), 3), torch.tensor([len(path)]), (Item("a", (), tuple("CAT")),), (0,), 320)
    assert "".join(CTCHead.predict(head, batch)[0]).strip() == "CUT"
    beam = Beam(str(tmp_path / "lm.arpa"), arpa_words(tmp_path / "lm.arpa"))
    if importlib.util.find_spec("flashlight") is None:
        with pytest.raises(ArmhubertError, match="needs flashlight-text"):
            beam_decoder(beam, tokens)
    else:
        head.decoder = beam_decoder(beam, tokens)
        assert "".join(head.predict(batch)[0]) == "CAT"
        with pytest.raises(ArmhubertError, match="none of the 1 words of language model"):
            beam_decoder(Beam(beam.language_model, ("DOG",)), tokens)
        (tmp_path / "lm.arpa").write_text(ARPA.replace("ngram 2=1\n", ""))
        with pytest.raises(ArmhubertError, match=r"lm\.arpa cannot be used: This ngram .* at least a bigram model"):
            beam_decoder(beam, tokens)
