"""The metrics of SUPERB (Yang et al., arXiv 2105.01051), each as its scoring tool defines it.

Rates are in percent, as SUPERB prints them; times are seconds. Predictions come first, what is true second. Edit
distances are RapidFuzz's, the best speaker mapping is SciPy's assignment; the rest is a few lines of NumPy.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rapidfuzz.distance import Levenshtein

from armhubert.errors import ArmhubertError

# ------------------------------------------------------------------------------------------------- classes and labels


def accuracy(predictions: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Percentage of predictions that equal the truth; of tuples (one value a slot) only where every slot is right.

    Raises:
        ArmhubertError: there is nothing to compare.
    """
    _require_pairs("accuracy", predictions, truth)
    return 100 * sum(a == b for a, b in zip(predictions, truth, strict=True)) / len(truth)


def mean_recall(predictions: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Accuracy within each class that the truth has, averaged over the classes: that of balanced data, in percent."""
    total = Counter(truth)
    right = Counter(b for a, b in zip(predictions, truth, strict=True) if a == b)
    return 100 * sum(right[label] / count for label, count in total.items()) / len(total)


# ---------------------------------------------------------------------------------------------------- edit distances


def error_rate(predictions: Sequence[Sequence[Hashable]], references: Sequence[Sequence[Hashable]]) -> float:
    """Edits of all utterances together, in percent of the reference tokens: PER where the tokens are phones.

    May exceed 100. An empty reference adds its insertions and no token; where references and predictions are all empty,
    the rate is 0.

    Raises:
        ArmhubertError: all references are empty, and a prediction is not.
    """
    errors = sum(Levenshtein.distance(a, b) for a, b in zip(references, predictions, strict=True))
    tokens = sum(map(len, references))
    if errors and not tokens:
        raise ArmhubertError(
            "an error rate needs at least one reference token, but all transcripts are empty: check the transcripts"
        )
    return 100 * errors / max(1, tokens)


def wer(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Word error rate, percent; words are what white space separates."""
    return error_rate([text.split() for text in predictions], [text.split() for text in references])


def cer(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Character error rate, percent; spaces between words are characters, as in SUPERB."""
    return error_rate(predictions, references)


def errors_by_token(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, tuple[int, int]]:
    """(deletions and substitutions, occurrences) of each reference token, the most frequent token first.

    Insertions belong to no reference token.
    """
    occurrences = Counter(token for reference in references for token in reference)
    errors = Counter(
        reference[operation.src_pos]
        for prediction, reference in zip(predictions, references, strict=True)
        for operation in Levenshtein.editops(reference, prediction)
        if operation.tag != "insert"
    )
    return {token: (errors[token], number) for token, number in occurrences.most_common()}


# ------------------------------------------------------------------------------------------------------ slot filling

Slots = Mapping[str, Sequence[str]]
"""Values of each slot type in one utterance, in the order spoken."""


def slot_type_f1(predictions: Sequence[Slots], references: Sequence[Slots]) -> float:
    """Percent: F1 of the set of slot types of each utterance, averaged over utterances; 100 where both are empty.

    SUPERB's slot F1 as s3prl computes it (`s3prl/metric/slot_filling.py`, `slot_type_f1`); values do not enter.

    Raises:
        ArmhubertError: there is nothing to compare.
    """
    _require_pairs("slot F1", predictions, references)
    total = 0.0
    for prediction, reference in zip(predictions, references, strict=True):
        if not reference and not prediction:
            total += 1
            continue
        # Harmonic mean of precision and recall: 2 |A n B| / (|A| + |B|).
        total += 2 * len(reference.keys() & prediction.keys()) / (len(reference) + len(prediction))
    return 100 * total / len(references)


def slot_value_cer(predictions: Sequence[Slots], references: Sequence[Slots]) -> float:
    """Percent: CER of slot values over all reference values together; a slot that was not predicted counts as deleted.

    Of several predicted values of a type, the one nearest to the reference value counts; predicted types that the
    reference lacks cost nothing. As s3prl's `slot_value_cer`.

    Raises:
        ArmhubertError: no reference has a slot.
    """
    errors = characters = 0
    for prediction, reference in zip(predictions, references, strict=True):
        for slot, values in reference.items():
            predicted = prediction.get(slot) or ("",)
            for value in values:
                characters += len(value)
                errors += min(Levenshtein.distance(value, other) for other in predicted)
    if not characters:
        raise ArmhubertError("slot CER needs at least one slot value in the test data, got none: check the labels")
    return 100 * errors / characters


# ------------------------------------------------------------------------------------------------- verification trials


class DetectionCurve(NamedTuple):
    """Error rates of a detector at every threshold, from accepting nothing to accepting everything."""

    false_alarms: NDArray[np.float64]
    """[K], ascending from 0 to 1: accepted share of the other trials."""
    misses: NDArray[np.float64]
    """[K], descending from 1 to 0: rejected share of the target trials."""


def detection_curve(targets: ArrayLike, scores: ArrayLike) -> DetectionCurve:
    """The curve of trials: whether each is a target [N], and its score [N]. Equal scores share a point.

    Raises:
        ArmhubertError: target or non-target trials are missing, or a score is not finite.
    """
    is_target = np.asarray(targets, dtype=bool).ravel()
    score = np.asarray(scores, dtype=np.float64).ravel()
    assert len(is_target) == len(score), (len(is_target), len(score))
    number = int(is_target.sum())
    if not 0 < number < len(is_target):
        raise ArmhubertError(
            "an equal error rate needs trials of both kinds, same and different speaker, got "
            f"{number} and {len(is_target) - number}: complete the trial list"
        )
    if not np.isfinite(score).all():
        raise ArmhubertError(
            f"scores must be finite, got {int((~np.isfinite(score)).sum())} of {len(score)} that are not: "
            "lower the learning rate"
        )
    order = np.argsort(-score, kind="stable")
    score, is_target = score[order], is_target[order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # the last trial of each score
    accepted = np.cumsum(is_target)[last]
    others = last + 1 - accepted
    return DetectionCurve(
        np.concatenate([[0.0], others / (len(score) - number)]),
        np.concatenate([[1.0], 1 - accepted / number]),
    )


def equal_error_rate(curve: DetectionCurve) -> float:
    """Percent: where misses equal false alarms, the curve joined by straight lines; as s3prl's `compute_eer`."""
    after = int(np.argmax(curve.misses <= curve.false_alarms))  # never 0, where misses are 1 and false alarms 0
    false_alarm, miss = curve.false_alarms[after - 1], curve.misses[after - 1]
    rise, fall = curve.false_alarms[after] - false_alarm, miss - curve.misses[after]
    return 100 * float(false_alarm + rise * (miss - false_alarm) / (rise + fall))


TARGET_PRIOR = 0.01
"""As s3prl's SUPERB ASV prints minDCF (`compute_minDCF(..., p_target=0.01)`); the VoxCeleb challenges take 0.05."""


def min_dcf(curve: DetectionCurve) -> float:
    """Least detection cost over all thresholds, over that of rejecting all; both kinds of error cost the same.

    NIST SRE 2016 evaluation plan, section 3, equations 2 and 3.
    """
    costs = TARGET_PRIOR * curve.misses + (1 - TARGET_PRIOR) * curve.false_alarms
    return float(costs.min() / TARGET_PRIOR)


# --------------------------------------------------------------------------------------------------------- diarization


class Turn(NamedTuple):
    """Somebody speaks."""

    start: float
    """Seconds."""
    end: float
    speaker: str


class DiarizationErrors(NamedTuple):
    """Speaker time of one recording or, added up, of many, in seconds."""

    missed: float
    false_alarm: float
    confused: float
    scored: float
    """Reference speaker time; two who speak at once count twice."""

    @property
    def rate(self) -> float:
        """DER, percent: may exceed 100.

        Raises:
            ArmhubertError: the references hold no speech.
        """
        if not self.scored:
            raise ArmhubertError("a diarization error rate needs reference speech, got none: check the references")
        return 100 * (self.missed + self.false_alarm + self.confused) / self.scored


def add_errors(parts: Iterable[DiarizationErrors]) -> DiarizationErrors:
    """The errors of several recordings together: their times add up, rates do not."""
    return DiarizationErrors(*map(sum, zip(*parts, strict=True)))


def diarization_errors(prediction: Sequence[Turn], reference: Sequence[Turn]) -> DiarizationErrors:
    """Diarization error of one recording as NIST's md-eval defines it (RT-09 evaluation plan, section 6.1).

    Overlapping speech is scored. The mapping from predicted to reference speakers is one to one and has the most time
    in common. There is no collar around reference boundaries, for s3prl calls dscore, whose default is 0; 0.25 s are
    common elsewhere. Turns of one speaker that overlap are merged.
    """
    from scipy.optimize import linear_sum_assignment

    speakers = sorted({turn.speaker for turn in reference})
    guesses = sorted({turn.speaker for turn in prediction})
    edges = np.unique([time for turn in (*reference, *prediction) for time in (turn.start, turn.end)])
    if len(edges) < 2:
        return DiarizationErrors(0.0, 0.0, 0.0, 0.0)
    middles, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    actual, guessed = _activity(reference, speakers, middles), _activity(prediction, guesses, middles)
    common = actual.T.astype(np.float64) @ (guessed * lengths[:, None])  # [speakers, guesses], seconds
    rows, columns = linear_sum_assignment(common, maximize=True)
    correct = float(common[rows, columns].sum())
    said, heard = actual.sum(1), guessed.sum(1)
    return DiarizationErrors(
        float((np.maximum(said - heard, 0) * lengths).sum()),
        float((np.maximum(heard - said, 0) * lengths).sum()),
        max(0.0, float((np.minimum(said, heard) * lengths).sum()) - correct),
        float((said * lengths).sum()),
    )


def _activity(turns: Sequence[Turn], speakers: Sequence[str], times: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[len(times), len(speakers)]: who speaks when."""
    active = np.zeros((len(times), len(speakers)), dtype=bool)
    column = {speaker: index for index, speaker in enumerate(speakers)}
    for turn in turns:
        first, last = np.searchsorted(times, (turn.start, turn.end))
        active[first:last, column[turn.speaker]] = True
    return active


def median_filter(active: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """[T, S] -> [T, S]: each speaker's activity by the majority of `width` (odd) frames, silence beyond the ends."""
    assert width % 2 == 1, width
    half = width // 2
    counts = np.cumsum(np.pad(active.astype(np.int64), ((half + 1, half), (0, 0))), axis=0)
    majority: NDArray[np.bool_] = counts[width:] - counts[:-width] > half
    return majority


def turns_of_frames(active: NDArray[np.bool_], frame_seconds: float) -> list[Turn]:
    """[T, S] -> turns of speakers "0" to "S - 1"; frame t lasts from t to t + 1 times `frame_seconds`."""
    turns = []
    for speaker, column in enumerate(active.T):
        changes = np.flatnonzero(np.diff(np.concatenate([[False], column, [False]]).astype(np.int8)))
        turns += [
            Turn(start * frame_seconds, end * frame_seconds, str(speaker))
            for start, end in changes.reshape(-1, 2).tolist()
        ]
    return turns


# ----------------------------------------------------------------------------------------------- spoken term detection

TWV_BETA = (1 - 0.0008) * 1 / (0.0008 * 100)
"""What a false alarm costs against a miss in QUESST 2014: its `score-TWV-Cnxe.sh` has P_target 0.0008, C_fa 1 and
C_miss 100, an effective prior of 0.0741, so 12.49."""


def max_term_weighted_value(
    scores: ArrayLike,
    relevant: ArrayLike,
    *,
    queries: int | None = None,
    documents: int | None = None,
) -> float:
    """MTWV: max over one threshold for all queries of 1 - mean over queries of (P_miss + TWV_BETA P_fa).

    Fiscus et al., "Results of the 2006 spoken term detection evaluation" (SIGIR SSCS 2007), with a trial for each pair
    of query and document as in QUESST 2014 (Anguera et al., "QUESST2014", ICASSP 2015). Queries that occur nowhere are
    left out, as its tool does.

    Args:
        scores: [Q, D], higher where the query is likelier to be in the document.
        relevant: [Q, D], whether it is.
        queries: number of queries to average over, where some that occur were not searched for: those are missed.
        documents: number of documents, where some were not searched: nothing is detected there.

    Returns:
        At most 1; at least 0, for a threshold above all scores detects nothing.

    Raises:
        ArmhubertError: no query occurs in any document.
    """
    score = np.asarray(scores, dtype=np.float64)
    truth = np.asarray(relevant, dtype=bool)
    assert score.shape == truth.shape, (score.shape, truth.shape)
    assert score.ndim == 2, score.shape
    kept = truth.any(1)
    if not kept.any():
        raise ArmhubertError(
            "MTWV needs a query that occurs in at least one document, got none: check the relevance lists"
        )
    score, truth = score[kept], truth[kept]
    hits = truth.sum(1, keepdims=True)
    others = np.maximum((documents or score.shape[1]) - hits, 1)
    gain = np.where(truth, 1 / hits, -TWV_BETA / others).ravel() / (queries or len(score))
    order = np.argsort(-score.ravel(), kind="stable")
    sorted_scores = score.ravel()[order]
    last = np.append(np.flatnonzero(np.diff(sorted_scores)), len(order) - 1)
    return max(0.0, float(np.cumsum(gain[order])[last].max()))


def _require_pairs(name: str, predictions: Sequence[object], references: Sequence[object]) -> None:
    assert len(predictions) == len(references), (len(predictions), len(references))
    if not references:
        raise ArmhubertError(f"{name} needs at least one test utterance, got none: check the test data")
