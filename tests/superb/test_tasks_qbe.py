import math

import numpy as np
import pytest
import torch

from armhubert.errors import ArmhubertError
from armhubert.superb import metrics
from armhubert.superb.dtw import match_document, prepare_queries
from armhubert.superb.simulate import spoken_words
from armhubert.superb.task import Corpus, Item, Options, Split
from armhubert.superb.tasks.qbe import DOCUMENT, QUERY, QueryByExample, Search, standardise

TASK = QueryByExample()


# ---- dynamic time warping --------------------------------------------------


def by_definition(query, document):
    """The recursion cell by cell."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, document)]
    cost = np.exp(1 - unit[0] @ unit[1].T) - 1
    low, high = cost.min(1, keepdims=True), cost.max(1, keepdims=True)
    cost = (cost - low) / np.maximum(high - low, 1e-9)
    total = cost.copy()
    for i in range(1, len(query)):
        for j in range(len(document)):
            total[i, j] += min(total[i - 1, j - step] for step in range(3) if j >= step)
    return -total[-1].min() / len(query)


def test_warping_is_the_recursion():
    queries = [torch.randn(n, 6, dtype=torch.float64) for n in (5, 12, 7, 30, 12)]
    prepared = prepare_queries(queries)
    for frames in (1, 2, 3, 40):
        document = torch.randn(frames, 6, dtype=torch.float64)
        expected = [by_definition(query.numpy(), document.numpy()) for query in queries]
        assert match_document(prepared, document).tolist() == pytest.approx(expected)


def test_warping_is_s3prls():
    # dtw-python 1.x as s3prl's quesst14_dtw calls it, cosine_exp and min-max normalised: -0.008562358709039956.
    query = torch.sin(torch.arange(42) * 0.3).view(7, 6).double()
    document = torch.sin(torch.arange(120) * 0.17 + 1).view(20, 6).double()
    found = match_document(prepare_queries([query]), document)
    assert found.item() == pytest.approx(-0.008562358709039956, rel=1e-6)


def test_an_excerpt_matches_perfectly():
    document = torch.randn(50, 8)
    prepared = prepare_queries([document[10:20], torch.randn(10, 8)])
    found = match_document(prepared, document)
    assert found[0].item() == pytest.approx(0, abs=1e-5)
    assert found[1].item() < -0.01


def test_short_queries_score_nothing():
    assert match_document(prepare_queries([torch.randn(4, 8)]), torch.randn(9, 8)).tolist() == [0.0]


def test_queries_do_not_depend_on_each_other():
    queries, document = [torch.randn(n, 8) for n in (9, 5, 20)], torch.randn(30, 8)
    together = match_document(prepare_queries(queries), document)
    alone = [match_document(prepare_queries([query]), document).item() for query in queries]
    assert together.tolist() == pytest.approx(alone, rel=1e-4, abs=1e-6)


# ---- search ----------------------------------------------------------------


def planted(good):
    """Two layers of noise, and one in which documents hold the queries' frames."""
    draw = torch.Generator().manual_seed(0)

    def noise(frames):
        return torch.randn(3, frames, 8, generator=draw) * 3 + 5

    queries = {name: noise(12) for name in ("d0", "d1", "t0", "t1")}
    documents = {f"doc{n}": noise(40) for n in range(30)}
    relevant = {}
    for n, (name, query) in enumerate(queries.items()):
        held = [f"doc{(3 * n + k) % 30}" for k in range(2)]
        relevant[name] = frozenset(held)
        for document in held:
            documents[document][good, 5:17] = query[good]
    items = {name: Item(name, (), QUERY) for name in queries} | {name: Item(name, (), DOCUMENT) for name in documents}
    splits = {
        split: Split(tuple(items[name] for name in (*names, *documents)))
        for split, names in (("dev", ("d0", "d1")), ("test", ("t0", "t1")))
    }
    truth = {split: {name: relevant[name] for name in queries if name[0] == split[0]} for split in splits}
    corpus = Corpus(splits, extra=Search(truth, {"dev": None, "test": None}, None))
    features = {**queries, **documents}

    def states(split):
        return (features[item.key] for item in corpus.splits[split].items)

    return corpus, states, features


def test_the_best_layer_of_dev_is_used_for_test():
    corpus, states, _ = planted(good=2)
    *progress, scores = TASK.search(states, corpus)
    assert scores["dev"].metrics == {"mtwv": pytest.approx(1.0), "layer": 2}
    assert scores["test"].metrics == {"mtwv": pytest.approx(1.0), "layer": 2}
    assert progress == [(done, 94) for done in range(1, 95)]


def test_search_is_the_protocol_written_out():
    corpus, states, features = planted(good=0)
    *_, scores = TASK.search(states, corpus)
    for split in ("dev", "test"):
        queries = [i.key for i in corpus.splits[split].items if i.label == QUERY]
        documents = [i.key for i in corpus.splits[split].items if i.label == DOCUMENT]
        frames = torch.cat([features[name][0] for name in queries + documents]).double()
        mean, deviation = frames.mean(0), frames.std(0)
        normal = {name: ((features[name][0] - mean) / deviation).numpy() for name in queries + documents}
        table = np.array([[by_definition(normal[q], normal[d]) for d in documents] for q in queries])
        relevant = [[d in corpus.extra.relevant[split][q] for d in documents] for q in queries]
        expected = metrics.max_term_weighted_value(standardise(table), relevant)
        assert scores[split].metrics["mtwv"] == pytest.approx(expected, abs=1e-9)


def test_standardise():
    found = standardise(np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert found[0].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    assert found[1].tolist() == [0, 0, 0]


# ---- QUESST 2014 -----------------------------------------------------------


@pytest.fixture
def quesst(waves):
    documents = [f"Audio/quesst14_0000{n}.wav" for n in range(3)]
    queries = [f"{split}_queries/quesst14_{split}_000{n}.wav" for split in ("dev", "eval") for n in range(2)]
    root = waves(*documents, *queries, seconds=0.05)
    scoring = root / "scoring"
    for split in ("dev", "eval"):
        truth = scoring / f"groundtruth_quesst14_{split}"
        truth.mkdir(parents=True)
        (truth / f"quesst14_{split}.rttm").write_text(
            f"LEXEME quesst14_00000 1 0.0 3.1 quesst14_{split}_0000 lex <NA> 0.5\n"
            f"LEXEME quesst14_00002 1 0.0 3.1 quesst14_{split}_0001 lex <NA> 0.5\n"
            f"LEXEME quesst14_77777 1 0.0 3.1 quesst14_{split}_0009 lex <NA> 0.5\n"
        )
        names = [name for name in queries if f"/quesst14_{split}" in name]
        lines = [f"quesst14Database/{name} nnenglish" for name in names]
        lines.append(f"quesst14Database/{split}_queries/quesst14_{split}_0009.wav albanian")
        (scoring / f"language_key_{split}.lst").write_text("\n".join(lines) + "\n")
    lines = [f"quesst14Database/{name} nnenglish" for name in documents]
    lines.append("quesst14Database/Audio/quesst14_77777.wav albanian")
    (scoring / "language_key_utterances.lst").write_text("\n".join(lines) + "\n")
    return root


def test_quesst(quesst):
    corpus = TASK.read(quesst, Options())
    assert [item.label for item in corpus.splits["test"].items] == [QUERY] * 2 + [DOCUMENT] * 3
    assert corpus.extra.relevant["test"] == {
        "quesst14_eval_0000": {"quesst14_00000"},
        "quesst14_eval_0001": {"quesst14_00002"},
    }
    # Three queries occur somewhere, in four documents of all languages: SUPERB's figures average over those.
    assert corpus.extra.queries == {"dev": 3, "test": 3}
    assert corpus.extra.documents == 4
    with pytest.raises(ArmhubertError, match=r"scoring says what test is: leave out test="):
        TASK.read(quesst, Options(test=("test",)))


def test_quesst_without_some_audio(quesst):
    (quesst / "Audio" / "quesst14_00001.wav").unlink()
    with pytest.raises(ArmhubertError, match=r"1 recordings of .*utterances\.lst have no audio"):
        TASK.read(quesst, Options())


def test_broken_quesst(quesst):
    (quesst / "scoring" / "language_key_eval.lst").write_text("a.wav nnenglish\n")
    with pytest.raises(ArmhubertError, match="every line must be `quesst14Database/folder"):
        TASK.read(quesst, Options())
    (quesst / "scoring" / "language_key_eval.lst").write_text("a/b.wav albanian\n")
    with pytest.raises(ArmhubertError, match="lists nothing in nnenglish"):
        TASK.read(quesst, Options())
    (quesst / "scoring" / "language_key_eval.lst").unlink()
    with pytest.raises(ArmhubertError, match="list of QUESST 2014 is missing"):
        TASK.read(quesst, Options())


# ---- simulated -------------------------------------------------------------


@pytest.fixture
def aligned(waves):
    """Six speakers of whom each says four words of a second; one recording with a transcript alone."""
    words = ["apple", "banana", "cherry", "damson"]
    names = [f"dr1-s{s}/u.wav" for s in range(6)]
    root = waves(*names, "LibriSpeech/9/1/9-1-0.wav", seconds=4)
    for name in names:
        lines = [f"{16000 * n} {16000 * n + 12000} {word}" for n, word in enumerate([*words[:3], "it"])]
        (root / name).with_suffix(".wrd").write_text("\n".join(lines) + "\n")
    (root / "LibriSpeech/9/1/9-1.trans.txt").write_text("9-1-0 A BANANA AND A CHERRY AND AN APPLE\n")
    return root


def test_queries_cut_from_word_times(aligned):
    corpus = TASK.read(aligned, Options())
    assert TASK.read(aligned, Options()) == corpus
    dev, test = ([i for i in corpus.splits[split].items if i.label == QUERY] for split in ("dev", "test"))
    documents = {i.key for i in corpus.splits["test"].items if i.label == DOCUMENT}
    assert {i.key for i in corpus.splits["dev"].items if i.label == DOCUMENT} == documents
    words = [{item.key.split("/")[0] for item in items} for items in (dev, test)]
    assert words[0] | words[1] == {"apple", "banana", "cherry"}  # "it" is too short
    assert not words[0] & words[1]
    asking = {item.key.split("/")[1] for item in dev + test}
    assert len(asking) == 2
    assert not any(key.split("/")[0] in asking for key in documents)
    for split, items in (("dev", dev), ("test", test)):
        for item in items:
            (part,) = item.parts
            assert part.count == 12_000
            relevant = corpus.extra.relevant[split][item.key]
            assert relevant == documents


def test_documents_can_be_chosen(aligned):
    corpus = TASK.read(aligned, Options(test=("LibriSpeech",)))
    found = [item.key for item in corpus.splits["test"].items if item.label == DOCUMENT]
    assert found == ["LibriSpeech/9/1/9-1-0"]


def test_speech_without_word_times(waves):
    root = waves("9/1/9-1-0.wav", "8/1/8-1-0.wav")
    (root / "9/1/9-1.trans.txt").write_text("9-1-0 A BANANA\n")
    with pytest.raises(ArmhubertError, match=r"word times by at least 2 speakers, but .* has 0 by 0"):
        TASK.read(root, Options())


def test_librispeech_alignments(waves):
    root = waves("9/1/9-1-0.wav")
    path = root / "9/1/9-1.alignment.txt"
    path.write_text('9-1-0 ",GO,,HOME," "0.5,0.75,1.0,1.25,1.4"\n')
    (found,) = spoken_words(root)
    assert found.words == ("go", "home")
    assert found.aligned == (("go", 8000, 12000), ("home", 16000, 20000))
    path.write_text('9-1-0 ",GO" "0.5"\n')
    with pytest.raises(ArmhubertError, match="and as many"):
        list(spoken_words(root))


def test_word_times_of_timit_in_capitals(waves):
    root = waves("TRAIN/DR1/FCJF0/SA1.WAV")
    (root / "TRAIN/DR1/FCJF0/SA1.WRD").write_text("0 4000 SHE\n4000 8000 had\n")
    (spoken,) = spoken_words(root)
    assert (spoken.speaker, spoken.words, len(spoken.aligned)) == ("FCJF0", ("she", "had"), 2)


def test_malformed_word_times(waves):
    root = waves("dr1-s/u.wav")
    (root / "dr1-s/u.wrd").write_text("0 ten apple\n")
    with pytest.raises(ArmhubertError, match="every line must be first sample, last sample and word"):
        list(spoken_words(root))


def test_real_speech(shared_speech):
    corpus = TASK.read(shared_speech / "timit-sample", Options())
    assert sum(item.label == QUERY for item in corpus.splits["test"].items) >= 10
    assert all(corpus.extra.relevant["test"].values())
