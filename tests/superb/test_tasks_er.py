import pytest

from armhubert.errors import ArmhubertError
from armhubert.superb.task import Options
from armhubert.superb.tasks.er import RAVDESS_CLASSES, EmotionRecognition

TASK = EmotionRecognition()


def speakers_of(corpus, place):
    return {split: {item.key.split("/")[place] for item in found.items} for split, found in corpus.splits.items()}


def test_ravdess(waves):
    root = waves(*(f"Actor_{a:02d}/03-01-{e:02d}-01-01-01-{a:02d}.wav" for a in range(1, 11) for e in (1, 3, 5)))
    tested = set()
    for fold in range(TASK.folds):
        corpus = TASK.read(root, Options(fold=fold))
        heard = speakers_of(corpus, 0)
        assert [len(heard[split]) for split in ("train", "dev", "test")] == [6, 2, 2]
        assert not heard["train"] & heard["test"]
        assert not heard["dev"] & (heard["test"] | heard["train"])
        # Odd actors are men, even ones women: a pair of each.
        assert len({int(name[-2:]) % 2 for name in heard["test"]}) == 2
        tested |= heard["test"]
        assert corpus.labels == (("angry", "happy", "neutral"),)
    assert len(tested) == 10
    assert corpus.notes[0] == "emotions and speakers are those of RAVDESS's file names"
    assert RAVDESS_CLASSES[0] == "neutral"
    assert RAVDESS_CLASSES[7] == "surprised"


@pytest.mark.parametrize("emotion_first", [True, False])
def test_folders(waves, emotion_first):
    pairs = [(emotion, f"00{s}") for emotion in ("angry", "Happy", "sad") for s in range(5)]
    root = waves(*(f"{a}/{b}/1.wav" if emotion_first else f"{b}/{a}/1.wav" for a, b in pairs))
    corpus = TASK.read(root, Options(fold=2))
    assert corpus.labels == (("Happy", "angry", "sad"),)
    assert len(corpus.splits["test"].items) == 3
    assert speakers_of(corpus, int(emotion_first))["test"] == {"002"}
    assert len(corpus.notes) == 1


def test_emotions_by_names_that_are_not_known_are_told(waves):
    root = waves(*(f"{emotion}/00{s}/1.wav" for emotion in ("freude", "wut") for s in range(5)))
    corpus = TASK.read(root, Options())
    assert corpus.labels == (("freude", "wut"),)
    assert "the upper folders are taken for them" in corpus.notes[0]


def test_files_without_speaker(waves):
    with pytest.raises(ArmhubertError, match="not in a folder of an emotion and one of a speaker"):
        TASK.read(waves("angry/1.wav", "sad/2.wav"), Options())


def test_an_emotion_without_audio(waves):
    root = waves(*(f"{e}/s{s}/1.wav" for e in ("angry", "sad") for s in range(5)))
    (root / "calm").mkdir()
    with pytest.raises(ArmhubertError, match=r"1 folders of .* hold no audio \(calm\)"):
        TASK.read(root, Options())


def test_few_speakers(waves):
    with pytest.raises(ArmhubertError, match="at least 5 speakers, got 1"):
        TASK.read(waves("angry/ann/1.wav", "sad/ann/2.wav"), Options())


def test_an_emotion_of_one_speaker_only(waves):
    names = [f"{e}/s{s}/1.wav" for e in ("angry", "sad") for s in range(5)]
    with pytest.raises(ArmhubertError, match=r"1 emotions of the test split are not in the training split \(calm\)"):
        TASK.read(waves(*names, "calm/s0/1.wav"), Options(fold=0))


def test_one_emotion(waves):
    with pytest.raises(ArmhubertError, match=r"at least 2 emotions, got 1 \(angry\)"):
        TASK.read(waves(*(f"angry/s{s}/1.wav" for s in range(5))), Options())


def test_a_name_outside_ravdess(waves):
    names = [f"Actor_0{a}/03-01-01-01-01-01-0{a}.wav" for a in range(1, 6)]
    with pytest.raises(ArmhubertError, match="has emotion 09 in its name"):
        TASK.read(waves(*names, "Actor_01/03-01-09-01-01-01-01.wav"), Options())


@pytest.fixture
def iemocap(waves):
    scenes = [
        f"Session{session}/sentences/wav/Ses0{session}F_impro01/Ses0{session}F_impro01" for session in range(1, 6)
    ]
    root = waves(*(f"{scene}_F{number:03d}.wav" for scene in scenes for number in range(10)), seconds=0.05)
    emotions = ["neu", "hap", "exc", "ang", "sad", "fru", "xxx", "neu", "ang", "sad"]
    for session in range(1, 6):
        source = root / f"Session{session}/dialog/EmoEvaluation/Ses0{session}F_impro01.txt"
        source.parent.mkdir(parents=True)
        lines = [
            f"[6.2901 - 8.2357]\tSes0{session}F_impro01_F{n:03d}\t{emotion}\t[2.5, 2.5, 2.5]\nC-E2:\tNeutral;\t()"
            for n, emotion in enumerate(emotions)
        ]
        source.write_text("% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n" + "\n".join(lines) + "\n")
    return root


def test_iemocap(iemocap):
    corpus = TASK.read(iemocap, Options(fold=3))
    assert corpus.labels == (("angry", "happy", "neutral", "sad"),)
    assert {item.key.split("/")[0] for item in corpus.splits["test"].items} == {"Session4"}
    counts = {split: len(found.items) for split, found in corpus.splits.items()}
    assert counts == {"train": 25, "dev": 7, "test": 8}  # 8 of 10 are of the four classes; dev is a fifth of 32
    labels = [item.label[0] for item in corpus.splits["test"].items]
    assert labels.count("happy") == 2  # one of them excited


def test_broken_iemocap(iemocap):
    (iemocap / "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F000.wav").unlink()
    assert any("1 labelled utterances have no audio" in note for note in TASK.read(iemocap, Options()).notes)
    (iemocap / "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt").unlink()
    with pytest.raises(ArmhubertError, match="labels of IEMOCAP are missing"):
        TASK.read(iemocap, Options())


def test_a_session_that_is_absent(waves):
    with pytest.raises(ArmhubertError, match="IEMOCAP has 5 sessions"):
        TASK.read(waves("Session1/sentences/wav/a/b.wav"), Options())


def test_real_speech(shared_speech):
    corpus = TASK.read(shared_speech / "emotions", Options())
    assert sum(len(found.items) for found in corpus.splits.values()) == 1434
    assert len(corpus.labels[0]) == 8
