"""What a user can get wrong with an evaluation: one line before any training, exit code 2, nothing half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from corpora import librispeech, write_wave

from armhubert.superb import runner
from armhubert.superb.config import EvaluateConfig
from armhubert.superb.tasks.ks import WORDS

SMALL = ["--steps", "2", "--batch", "4", "--workers", "0", "--device", "cpu", "-o", "run"]
KS = ["--task", "ks", "-d", "data", *SMALL]
PR = ["--task", "pr", "-d", "data", *SMALL]
ASR = ["--task", "asr", "-d", "data", "--head-size", "8", *SMALL]


def speech(text: str | None = None) -> None:
    librispeech(
        Path("data"), lambda name: write_wave(Path("data") / name), train_clean_100=4, dev_clean=2, test_clean=2
    )
    if text is not None:
        Path("data/lexicon.txt").write_text(text)


def empty(subset: str, suffix: str) -> None:
    speech()
    for path in Path("data", subset).rglob(f"*{suffix}"):
        path.unlink()


def wordless() -> None:
    speech()
    for path in Path("data/train-clean-100").rglob("*.txt"):
        path.write_text("".join(f"{line.split()[0]}\n" for line in path.read_text().splitlines()))


def words(*names: str, count: int = 24, lists: tuple[str, str] | None = None) -> None:
    for name in names:
        for number in range(count):
            write_wave(Path("data", name, f"{number}.wav"), 0.2, seed=number)
    for path, content in zip(("validation_list.txt", "testing_list.txt"), lists or (), strict=False):
        Path("data", path).write_text(content)


def slots(unseen: str) -> None:
    labels = {}
    for number, split in enumerate(("train", "train", "dev", "test")):
        write_wave(Path("data", f"{number}.wav"))
        values = {"size": "small" if split != "test" else unseen}
        labels[f"{number}.wav"] = {"intent": "ab"[number % 2], "slots": values, "split": split}
    Path("data/labels.json").write_text(json.dumps(labels))


def model(content: bytes | str) -> None:
    speech()
    Path("lm.arpa").write_bytes(content if isinstance(content, bytes) else content.encode())


def upstream(code: str) -> None:
    words("cat", "dog")
    Path("mine.py").write_text(code)


def other_cache() -> None:
    words("cat", "dog")
    list(runner.evaluate(EvaluateConfig(model="fbank", task="ks", data="data", out="first", steps=1, cache="cache")))
    (meta,) = Path("cache").glob("*/upstream.json")
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "identity": "other", "source": "hubert"}))


CASES: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "list missing": (lambda: words("cat", *WORDS), KS, "list of Speech Commands is missing: expected"),
    "list names nothing": (
        lambda: words("cat", "dog", lists=("cat/0.wav\n", "gone.wav\n")), KS, "the test split has no utterances"
    ),
    "audio missing": (lambda: empty("test-clean", ".wav"), PR, "none of the 2 transcripts in"),
    "transcripts missing": (lambda: empty("train-clean-100", ".txt"), PR, "holds no training data"),
    "transcripts empty": (wordless, ASR, "without words left out): check the folder"),
    "lexicon missing": (lambda: empty(".", "lexicon.txt"), PR, "no lexicon beside"),
    "lexicon of other words": (lambda: speech("DOG D AO G\n"), PR, "(2 words: CAT, HELLO): give a lexicon"),
    "lexicon of other phones": (lambda: speech("DOG x y z\n"), [*PR, "--g2p"], "which --g2p cannot read"),
    "lexicon without phones": (lambda: speech("DOG\n"), PR, "lexicon.txt:1: a word must be followed by its phones"),
    "one class": (lambda: words("cat"), KS, "training needs at least 2 keywords, got 1 (cat)"),
    "one speaker": (lambda: words("ann"), ["--task", "sid", *KS[2:]], "at least 2 speakers, got 1 (ann)"),
    "one speaker, asv": (lambda: words("ann"), ["--task", "asv", *KS[2:]], "has 1 speakers with audio, too few"),
    "one speaker, sd": (lambda: words("ann"), ["--task", "sd", *KS[2:]], "has 1 speakers with audio, too few"),
    "one recording twice": (
        lambda: (words("ann", "bob"), write_wave(Path("data/ann/3.flac"))),
        ["--task", "sid", *KS[2:]], "data/ann/3.wav differ in their endings alone, one recording twice: remove one",
    ),
    "unseen keyword": (
        lambda: words("cat", "dog", lists=("cat/0.wav\n", "".join(f"dog/{n}.wav\n" for n in range(24)))),
        KS, "training needs at least 2 keywords, got 1 (cat)",
    ),
    "unseen value": (lambda: slots("huge"), ["--task", "ic", *KS[2:]], "1 size values of the test split are not"),
    "cache of another model": (other_cache, [*KS, "--cache", "cache"], "features of another model (hubert): remove it"),
    "cache is a file": (lambda: words("cat", "dog"), [*KS, "--cache", "data/cat/0.wav"], "cannot write"),
    "no language model": (speech, [*ASR, "--language-model", "lm.arpa"], "lm.arpa cannot be read"),
    "binary language model": (lambda: model(b"\xff\x00"), [*ASR, "--language-model", "lm.arpa"], "give an ARPA file"),
    "empty language model": (lambda: model(""), [*ASR, "--language-model", "lm.arpa"], "an ARPA file with unigrams"),
    "no rates": (lambda: words("cat"), [*KS, "--sweep", "lr", "--rates", ",,"], "at least 2 rates"),
    "rate nan": (lambda: words("cat"), [*KS, "--sweep", "lr", "--rates", "nan,1"], "must be a number, got nan"),
    "rate below 0": (lambda: words("cat"), [*KS, "--sweep", "lr", "--rates=-1,1"], "different and above 0"),
    "rates without sweep": (lambda: words("cat"), [*KS, "--rates", "1e-3,1e-4"], "add --sweep lr"),
    "upstream that fails": (
        lambda: upstream("def make():\n    raise KeyError('boom')\n"), ["mine.py:make", *KS], "fails (KeyError: 'boom')"
    ),
    "upstream with an error": (lambda: upstream("x = = 1\n"), ["mine.py:make", *KS], "(SyntaxError: invalid syntax"),
    "suite with --force": (
        lambda: words("cat"), ["fbank", "--suite", "superb", "-d", "data", "--force"], "leave out --force"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_before_training(case, call, tmp_path):
    prepare, argv, says = CASES[case]
    prepare()
    named = argv if not argv[0].startswith("--") else ["fbank", *argv]
    code, out, err = call("evaluate", *named)
    lines = [line for line in err.splitlines() if not line.startswith("examine audio")]
    assert (code, out) == (2, "")
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not [path for path in tmp_path.glob("run/**/*") if path.name != runner.SCAN_CACHE]


def test_a_suite_loads_every_model_before_it_runs_one(call, tmp_path):
    words("cat", "dog")
    (tmp_path / "data").rename(tmp_path / "keywords")
    code, _, err = call("evaluate", "fbank", "no-such-model", "--suite", "superb", "-d", ".", *SMALL)
    assert code == 2
    assert "no model at 'no-such-model'" in err
    assert not list(tmp_path.glob("run/**/result.json"))


def test_classes_without_utterances_are_noted(call):
    words("cat", "dog")
    Path("data/owl").mkdir()
    write_wave(Path("data/bee/2_nohash_0.wav"))
    code, _, err = call("evaluate", "fbank", *KS, "--dry-run")
    assert code == 0
    assert "note: 1 folders without audio are left out (owl)" in err
    assert "1 keywords have no utterance in the dev split (bee)" in err
    assert not Path("run").exists()


@pytest.fixture
def stopped(call):
    """A run that was interrupted after its second step."""
    words("cat", "dog")
    steps = iter(range(100))
    config = EvaluateConfig(model="fbank", task="ks", data="data", out="run", steps=4, batch=4, workers=0, device="cpu")
    list(runner.evaluate(config, should_stop=lambda: next(steps) >= 2))
    return Path("run/checkpoint.pt")


def is_told(call, path):
    code, _, err = call("evaluate", "--resume", "run")
    assert code == 2
    assert err.splitlines()[-1].startswith((f"error: {path}", "error: run was begun with other"))
    assert err.splitlines()[-1].endswith(("start anew with --force", "start anew with --force, or name another --out"))


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_told(content, stopped, call):
    stopped.write_bytes(content)
    is_told(call, stopped)


def test_a_checkpoint_that_lacks_something_is_told(stopped, call):
    whole = torch.load(stopped)
    for name in ("identity", "probe", "optimizer", "state"):
        for other in ({}, {name: {"strange": 1}}, {name: []}):
            torch.save({key: value for key, value in whole.items() if key != name} | other, stopped)
            is_told(call, stopped)
