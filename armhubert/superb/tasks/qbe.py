"""Query by example: QUESST 2014, or queries cut from speech with word times. Nothing is trained."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armhubert.config import SAMPLE_RATE
from armhubert.errors import ArmhubertError
from armhubert.superb import metrics
from armhubert.superb.dtw import match_document, prepare_queries
from armhubert.superb.simulate import Spoken, Word, spoken_words
from armhubert.superb.task import (
    Corpus,
    Item,
    Metric,
    Options,
    Part,
    Scores,
    Split,
    SplitName,
    Task,
    TrainingSettings,
    generator,
    read_lines,
    some,
)

QUERY, DOCUMENT = "query", "document"
"""Labels of items; a split has its queries first."""

LANGUAGE = "nnenglish"
"""The part of QUESST 2014 that SUPERB searches: English by non-natives."""

MIN_QUERY_SECONDS, MIN_QUERY_LETTERS = 0.3, 4
"""Shortest words that are cut out as queries: nobody searches for shorter ones."""

QUERIES_OF_A_WORD = 3
DOCUMENTS = 2_438
"""Most documents of a simulated set: QUESST's English part has as many."""


class Search(NamedTuple):
    """What there is to find."""

    relevant: Mapping[SplitName, Mapping[str, frozenset[str]]]
    """Documents in which a query occurs, by query, for dev and test."""
    queries: Mapping[SplitName, int | None]
    """Number of queries to average over, where that is more than are searched for."""
    documents: int | None
    """Number of documents, where that is more than are searched."""


class QueryByExample(Task):
    """Every layer is tried on dev's queries; the best is used for test's, in the same documents."""

    name = "qbe"
    title = "Query by example"
    data = (
        "QUESST 2014 (quesst14Database), or recordings with word times (TIMIT's .wrd, LibriSpeech alignments) to cut "
        "queries from; recordings with transcripts alone (LibriSpeech) are searched too"
    )
    folders = ("quesst14Database", "timit-sample", "TIMIT")
    reads = ("test",)
    metrics = (Metric("mtwv", "MTWV", True, ""), Metric("layer", "Layer", None, ""))
    defaults = TrainingSettings(steps=0)

    def read(self, root: Path, options: Options) -> Corpus:
        """Simulated: speakers of queries and of documents are different ones, words of dev and test too."""
        if (root / "scoring").is_dir():
            options.refuse(root / "scoring", "test")
            return _read_quesst(root)
        return _simulate(root, options)

    def search(
        self, states: Callable[[SplitName], Iterator[Tensor]], corpus: Corpus
    ) -> Iterator[tuple[int, int] | Mapping[SplitName, Scores]]:
        """SUPERB's search: frames are normalised over queries and documents; see `armhubert.superb.dtw` for the rest.

        Documents pass by one at a time, three times: for the means and deviations of their features, to match dev's
        queries in every layer, and to match test's in the layer that was best. Scores are standardised for each query.
        """
        names = {split: [i.key for i in corpus.splits[split].items if i.label == QUERY] for split in ("dev", "test")}
        documents = [item.key for item in corpus.splits["dev"].items if item.label == DOCUMENT]
        done, total = 0, sum(map(len, names.values())) + 3 * len(documents)
        queries: dict[SplitName, list[Tensor]] = {"dev": [], "test": []}
        moments = _Moments()
        for split, count in (("test", len(names["test"])), ("dev", len(names["dev"]) + len(documents))):
            for place, features in enumerate(islice(states(split), count)):
                if place < len(names[split]):
                    queries[split].append(features)
                else:
                    moments.add(features)
                done += 1
                yield done, total
        best, values = 0, {}
        for split in ("dev", "test"):
            scale = moments.with_queries(queries[split])
            normal = [scale.apply(features) for features in queries[split]]
            layers = list(range(len(scale.mean))) if split == "dev" else [best]
            prepared = {layer: prepare_queries([query[layer] for query in normal]) for layer in layers}
            scores = {layer: np.zeros((len(normal), len(documents))) for layer in layers}
            for number, features in enumerate(islice(states(split), len(normal), None)):
                document = scale.apply(features)
                for layer in layers:
                    scores[layer][:, number] = match_document(prepared[layer], document[layer]).numpy()
                done += 1
                yield done, total
            found = [_mtwv(scores[layer], names[split], documents, split, corpus.extra) for layer in layers]
            values[split] = max(found)
            if split == "dev":
                best = int(np.argmax(found))
        yield {split: Scores({"mtwv": value, "layer": best}) for split, value in values.items()}


def standardise(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """[Q, D], each query's scores shifted and scaled to mean 0 and deviation 1 over the documents."""
    centred = scores - scores.mean(1, keepdims=True)
    standard: NDArray[np.float64] = centred / np.maximum(scores.std(1, keepdims=True), 1e-9)
    return standard


def _mtwv(
    scores: NDArray[np.float64], queries: Sequence[str], documents: Sequence[str], split: SplitName, search: Search
) -> float:
    relevant = np.array([[doc in search.relevant[split][query] for doc in documents] for query in queries])
    number = search.queries[split]
    return metrics.max_term_weighted_value(standardise(scores), relevant, queries=number, documents=search.documents)


# ---- normalisation ---------------------------------------------------------


class _Scale(NamedTuple):
    """Mean and deviation of each layer and feature."""

    mean: Tensor
    """[L, D], float64."""
    deviation: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """[L, T, D] -> [L, T, D], float32."""
        return ((features - self.mean[:, None]) / self.deviation[:, None]).float()


class _Moments:
    """Sums over the frames of the documents."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, features: Tensor) -> None:
        """[L, T, D]."""
        wide = features.double()
        self.count += wide.shape[1]
        self.sum = self.sum + wide.sum(1)
        self.squares = self.squares + wide.square().sum(1)

    def with_queries(self, queries: Sequence[Tensor]) -> _Scale:
        """Mean and (unbiased) deviation over the documents and these queries."""
        whole = _Moments()
        whole.count, whole.sum, whole.squares = self.count, self.sum, self.squares
        for features in queries:
            whole.add(features)
        mean = torch.as_tensor(whole.sum) / whole.count
        variance = (torch.as_tensor(whole.squares) - whole.count * mean.square()) / (whole.count - 1)
        return _Scale(mean, variance.clamp(min=0).sqrt().clamp(min=1e-9))


# ---- QUESST 2014 -----------------------------------------------------------


def _read_quesst(root: Path) -> Corpus:
    """The English queries and documents; averaged, as SUPERB's figures are, over the queries of all languages.

    s3prl gives the English scores to QUESST's tool with the truth of all languages and a default score of -10 for what
    it has not searched: queries in other languages count as missed, documents in other languages as rightly rejected.
    """
    lists = {name: root / "scoring" / f"language_key_{name}.lst" for name in ("utterances", "dev", "eval")}
    keys = {name: list(_language_key(path)) for name, path in lists.items()}
    english = {name: [path for path, language in found if language == LANGUAGE] for name, found in keys.items()}
    for name, found in english.items():
        if not found:
            raise ArmhubertError(f"{lists[name]} lists nothing in {LANGUAGE}: it is not QUESST 2014's")
        absent = [path for path in found if not (root / path).is_file()]
        if absent:
            raise ArmhubertError(
                f"{len(absent)} recordings of {lists[name]} have no audio ({some(absent)}): complete the data"
            )
    documents = _items(root, english["utterances"], DOCUMENT)
    here = {item.key for item in documents}
    splits, relevant, numbers = {}, {}, {}
    for split, name in (("dev", "dev"), ("test", "eval")):
        source = root / "scoring" / f"groundtruth_quesst14_{name}" / f"quesst14_{name}.rttm"
        truth: dict[str, set[str]] = {}
        for line in read_lines(source, "truth of QUESST 2014"):
            match = re.match(rf"LEXEME\s+(\S+).*?\b(quesst14_{name}_\d+)\b", line)
            if match is not None:
                truth.setdefault(match[2], set()).add(match[1])
        queries = _items(root, english[name], QUERY)
        relevant[split] = {item.key: frozenset(truth.get(item.key, set()) & here) for item in queries}
        numbers[split] = len(truth)
        splits[split] = Split((*queries, *documents))
    notes = (
        f"{len(english['dev'])} dev and {len(english['eval'])} test queries, {len(documents)} documents, all English; "
        f"averaged over {numbers['dev']} and {numbers['test']} queries of all languages, as published figures are",
    )
    return Corpus(splits, notes=notes, extra=Search(relevant, numbers, len(keys["utterances"])))


def _language_key(path: Path) -> Iterator[tuple[str, str]]:
    for line in read_lines(path, "list of QUESST 2014"):
        fields = line.split()
        if len(fields) != 2 or "/" not in fields[0]:
            raise ArmhubertError(
                f"{path}: every line must be `quesst14Database/folder/file.wav language`, got {line[:60]!r}"
            )
        yield fields[0].partition("/")[2], fields[1]


def _items(root: Path, paths: Sequence[str], kind: str) -> tuple[Item, ...]:
    return tuple(Item(Path(path).stem, (Part(str((root / path).absolute())),), kind) for path in paths)


# ---- simulated -------------------------------------------------------------


def _simulate(root: Path, options: Options) -> Corpus:
    """Queries are words of some aligned speakers; documents are others, or those in `options.test`."""
    recordings = list(spoken_words(root))
    aligned = [recording for recording in recordings if recording.aligned]
    speakers = sorted({recording.speaker for recording in aligned})
    if len(speakers) < 2:
        raise ArmhubertError(
            f"queries are cut from recordings with word times by at least 2 speakers, but {root} has "
            f"{len(aligned)} by {len(speakers)}: give TIMIT (.wrd), LibriSpeech's .alignment.txt, or QUESST 2014"
        )
    draw = generator(options.seed, "queries")
    asking = {speakers[place] for place in draw.permutation(len(speakers))[: max(1, len(speakers) // 3)]}
    searched = [recording for recording in recordings if recording.speaker not in asking]
    if options.test:
        folders = [root / name for name in options.test]
        searched = [spoken for spoken in searched if any(spoken.path.is_relative_to(f.absolute()) for f in folders)]
    if not searched:
        raise ArmhubertError(f"no recording with a transcript is left to search in {root}: name other test folders")
    if len(searched) > DOCUMENTS:
        searched = [searched[place] for place in sorted(draw.choice(len(searched), DOCUMENTS, replace=False).tolist())]
    occurrences = Counter(word for recording in searched for word in set(recording.words))

    base = root.absolute()
    cuts: dict[str, list[tuple[Spoken, Word]]] = {}
    for recording in aligned:
        if recording.speaker in asking:
            for word in recording.aligned:
                long_enough = word.end - word.start >= MIN_QUERY_SECONDS * SAMPLE_RATE
                if long_enough and len(word.text) >= MIN_QUERY_LETTERS and occurrences[word.text]:
                    cuts.setdefault(word.text, []).append((recording, word))
    words = sorted(cuts)
    if len(words) < 2:
        raise ArmhubertError(
            f"{len(words)} words of {MIN_QUERY_LETTERS} letters and {MIN_QUERY_SECONDS:g} s occur both among the "
            f"{len(asking)} query speakers and in the {len(searched)} documents, at least 2 are needed: add data"
        )
    shuffled = [words[place] for place in draw.permutation(len(words))]
    documents = tuple(Item.of_file(recording.path, base, DOCUMENT) for recording in searched)
    holding = {
        word: frozenset(item.key for item, spoken in zip(documents, searched, strict=True) if word in spoken.words)
        for word in words
    }
    splits: dict[SplitName, Split] = {}
    relevant: dict[SplitName, dict[str, frozenset[str]]] = {}
    for split, chosen in (("dev", shuffled[::2]), ("test", shuffled[1::2])):
        queries = []
        relevant[split] = {}
        for word in sorted(chosen):
            places = draw.permutation(len(cuts[word]))[:QUERIES_OF_A_WORD]
            for recording, cut in (cuts[word][place] for place in places):
                key = f"{word}/{recording.path.relative_to(base).with_suffix('').as_posix()}@{cut.start}"
                queries.append(Item(key, (Part(str(recording.path), cut.start, cut.end - cut.start),), QUERY))
                relevant[split][key] = holding[word]
        splits[split] = Split((*queries, *documents))
    counts = {split: sum(item.label == QUERY for item in splits[split].items) for split in ("dev", "test")}
    notes = (
        f"queries cut from {len(asking)} of {len(speakers)} speakers with word times (seed {options.seed}): "
        f"{counts['dev']} dev, {counts['test']} test; {len(documents)} documents by other speakers",
    )
    return Corpus(splits, notes=notes, extra=Search(relevant, {"dev": None, "test": None}, None))
