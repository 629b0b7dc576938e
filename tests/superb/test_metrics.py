"""Every metric against numbers worked out by hand, and against properties that must hold for any input."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from armhubert.errors import ArmhubertError
from armhubert.superb import metrics
from armhubert.superb.metrics import DiarizationErrors, Turn

PROPERTY = settings(max_examples=60, deadline=None)


# ---- accuracy and edit distances -------------------------------------------


def test_accuracy_is_percent():
    assert metrics.accuracy(["a", "b", "a", "c"], ["a", "b", "b", "b"]) == 50.0


def test_joint_accuracy_needs_every_slot():
    truth = [("on", "light", "none"), ("off", "light", "none"), ("on", "heat", "up")]
    guess = [("on", "light", "none"), ("off", "light", "up"), ("on", "heat", "up")]
    assert metrics.accuracy(guess, truth) == pytest.approx(200 / 3)


def test_mean_recall_weighs_classes_alike():
    assert metrics.mean_recall(["a", "a", "a", "a"], ["a", "a", "a", "b"]) == 50.0
    assert metrics.mean_recall(["a", "b", "b", "c"], ["a", "a", "b", "b"]) == 50.0


def test_accuracy_of_nothing():
    with pytest.raises(ArmhubertError, match="at least one test utterance"):
        metrics.accuracy([], [])


def test_edits_by_hand():
    # a b c -> a x c d: one substitution, one insertion; e f -> f: one deletion
    assert metrics.error_rate([list("axcd"), list("f")], [list("abc"), list("ef")]) == 60.0


def test_phones_are_tokens_not_letters():
    assert metrics.error_rate([["AA", "B"]], [["AH", "B"]]) == 50.0


def test_wer_and_cer():
    assert metrics.wer(["the cat  sat "], ["the cat sat down"]) == 25.0
    assert metrics.cer(["helo"], ["hello"]) == 20.0


def test_empty_references():
    assert metrics.error_rate([[]], [[]]) == 0.0
    assert metrics.wer(["a", "b c"], ["", "b c"]) == 50.0  # one insertion, two reference words
    assert metrics.wer([""], ["b c"]) == 100.0
    with pytest.raises(ArmhubertError, match="all transcripts are empty"):
        metrics.wer(["a"], [""])


def test_errors_by_token():
    # "a b a" -> "a c a c": b replaced, c inserted, which belongs to no token; "b" deleted
    found = metrics.errors_by_token([["a", "c", "a", "c"], []], [["a", "b", "a"], ["b"]])
    assert found == {"a": (0, 2), "b": (2, 2)}


texts = st.lists(st.text("ab c", max_size=8), min_size=1, max_size=6)


@PROPERTY
@given(texts, texts)
def test_edit_properties(predictions, references):
    number = min(len(predictions), len(references))
    predictions, references = predictions[:number], references[:number]
    before, after = sum(map(len, references)), sum(map(len, predictions))
    assume(before and after)
    edits = round(metrics.cer(predictions, references) * before / 100)
    assert edits == round(metrics.cer(references, predictions) * after / 100)
    assert edits >= abs(after - before)
    assert edits <= sum(max(len(a), len(b)) for a, b in zip(predictions, references, strict=True))
    assert metrics.cer(references, references) == 0.0
    by_token = metrics.errors_by_token(predictions, references)
    assert sum(errors for errors, _ in by_token.values()) <= edits
    assert sum(count for _, count in by_token.values()) == before


# ---- slots -----------------------------------------------------------------


def test_slot_type_f1_by_hand():
    truth = [{"artist": ["BOB"], "song": ["X"]}, {}, {"city": ["ROME"]}, {}]
    guess = [{"artist": ["ANY"], "year": ["Y"], "song": ["Z"]}, {}, {}, {"city": ["A"]}]
    # precision 2/3, recall 1: F1 0.8; both empty: 1; one of them empty: 0, 0
    assert metrics.slot_type_f1(guess, truth) == pytest.approx(100 * (0.8 + 1 + 0 + 0) / 4)


def test_slot_cer_by_hand():
    truth = [{"artist": ["BOB", "ANN"], "city": ["ROME"]}]
    guess = [{"artist": ["ANNE", "BOP"], "year": ["1999"]}]
    # BOB-BOP 1, ANN-ANNE 1, ROME-nothing 4, of 10 characters; the year costs nothing
    assert metrics.slot_value_cer(guess, truth) == pytest.approx(60.0)


def test_slot_cer_without_slots():
    with pytest.raises(ArmhubertError, match="at least one slot value"):
        metrics.slot_value_cer([{"a": ["b"]}], [{}])


# ---- detection -------------------------------------------------------------


def test_perfect_and_reversed_detectors():
    targets = [True, True, False, False]
    assert metrics.equal_error_rate(metrics.detection_curve(targets, [4, 3, 2, 1])) == 0.0
    assert metrics.equal_error_rate(metrics.detection_curve(targets, [1, 2, 3, 4])) == 100.0
    assert metrics.min_dcf(metrics.detection_curve(targets, [4, 3, 2, 1])) == 0.0
    assert metrics.min_dcf(metrics.detection_curve(targets, [1, 2, 3, 4])) == 1.0  # to reject all is best


def test_one_score_for_all_is_a_coin():
    assert metrics.equal_error_rate(metrics.detection_curve([True, False, False], [0.5, 0.5, 0.5])) == 50.0


def test_equal_error_rate_between_points():
    # Scores from the top: T, N, T, N, N. After the first: miss 1/2, alarm 0; after the second: miss 1/2, alarm 1/3;
    # after the third: miss 0, alarm 1/3. They cross where the alarm is 1/3.
    curve = metrics.detection_curve([True, False, True, False, False], [5, 4, 3, 2, 1])
    assert metrics.equal_error_rate(curve) == pytest.approx(100 / 3)
    # Two targets and a non-target share a score: from (0, 1) to (1/2, 0) in one step, crossing at 1/3.
    curve = metrics.detection_curve([True, True, False, False], [2, 2, 2, 1])
    assert metrics.equal_error_rate(curve) == pytest.approx(100 / 3)


def test_min_dcf_by_hand():
    # One target rejected at the best threshold, no alarm: cost p / min(p, 1 - p) times 1/2.
    curve = metrics.detection_curve([True, False, True, False, False], [5, 4, 3, 2, 1])
    assert metrics.min_dcf(curve) == pytest.approx(0.5)
    # Of 1,000 non-targets one is above the second target: accepting it costs 0.99 / 1000 / 0.01, less than 1/2.
    curve = metrics.detection_curve([True, False, True] + [False] * 999, [5, 4, 3] + [1] * 999)
    assert metrics.min_dcf(curve) == pytest.approx(0.099)


@pytest.mark.parametrize("targets", [[True, True], [False, False]])
def test_trials_of_one_kind(targets):
    with pytest.raises(ArmhubertError, match="trials of both kinds"):
        metrics.detection_curve(targets, [0.1, 0.2])


def test_scores_that_are_not_finite():
    with pytest.raises(ArmhubertError, match="1 of 2 that are not"):
        metrics.detection_curve([True, False], [float("nan"), 0.0])


trials = st.lists(st.tuples(st.booleans(), st.integers(-5, 5)), min_size=2, max_size=40).filter(
    lambda rows: len({target for target, _ in rows}) == 2
)


@PROPERTY
@given(trials)
def test_detection_properties(rows):
    targets, scores = zip(*rows, strict=True)
    curve = metrics.detection_curve(targets, scores)
    assert (np.diff(curve.false_alarms) >= 0).all()
    assert (np.diff(curve.misses) <= 0).all()
    assert (curve.false_alarms[0], curve.misses[0]) == (0, 1)
    assert (curve.false_alarms[-1], curve.misses[-1]) == (1, 0)
    thresholds = [np.inf, *sorted(set(scores), reverse=True)]
    for alarm, miss, threshold in zip(*curve, thresholds, strict=True):
        accepted = np.array(scores) >= threshold
        assert miss == pytest.approx((~accepted)[np.array(targets)].mean())
        assert alarm == pytest.approx(accepted[~np.array(targets)].mean())
    rate = metrics.equal_error_rate(curve)
    assert 0 <= rate <= 100
    # A detector that is turned round errs in the opposite share, and no increasing map of the scores matters.
    turned = metrics.equal_error_rate(metrics.detection_curve(targets, [-s for s in scores]))
    assert turned == pytest.approx(100 - rate)
    mapped = metrics.equal_error_rate(metrics.detection_curve(targets, [np.exp(s) for s in scores]))
    assert mapped == pytest.approx(rate)
    assert 0 <= metrics.min_dcf(curve) <= 1


# ---- diarization -----------------------------------------------------------


def test_diarization_by_hand():
    reference = [Turn(0, 10, "ann"), Turn(8, 12, "bob")]
    # x stands for ann (8 s in common), y for bob (4 s): ann is missed from 8 to 10, y alone speaks from 12 to 13.
    prediction = [Turn(0, 8, "x"), Turn(8, 13, "y")]
    assert metrics.diarization_errors(prediction, reference) == DiarizationErrors(2, 1, 0, 14)
    # The same speaker throughout: bob's 4 s are not heard as his; overlap is missed, the rest of his time confused.
    prediction = [Turn(0, 12, "x")]
    assert metrics.diarization_errors(prediction, reference) == DiarizationErrors(2, 0, 2, 14)
    assert metrics.diarization_errors(prediction, reference).rate == pytest.approx(100 * 4 / 14)


def test_the_best_mapping_is_global():
    # Greedily, x would take ann (6 s) and leave y with nothing (0 s): 6. The best is x-bob 5, y-ann 4: 9.
    reference = [Turn(0, 10, "ann"), Turn(10, 15, "bob")]
    prediction = [Turn(0, 6, "x"), Turn(6, 10, "y"), Turn(10, 15, "x")]
    assert metrics.diarization_errors(prediction, reference).confused == pytest.approx(6)


def test_overlapping_turns_of_one_speaker_count_once():
    reference = [Turn(0, 6, "ann"), Turn(4, 10, "ann")]
    assert metrics.diarization_errors([Turn(0, 10, "x")], reference) == DiarizationErrors(0, 0, 0, 10)


def test_silence_and_nothing():
    assert metrics.diarization_errors([], [Turn(0, 2, "ann")]) == DiarizationErrors(2, 0, 0, 2)
    assert metrics.diarization_errors([], []) == DiarizationErrors(0, 0, 0, 0)
    with pytest.raises(ArmhubertError, match="needs reference speech"):
        _ = metrics.diarization_errors([Turn(0, 2, "x")], []).rate


def test_recordings_add_up():
    parts = [DiarizationErrors(1, 0, 0, 2), DiarizationErrors(0, 1, 0, 8)]
    assert metrics.add_errors(parts).rate == 20.0


seconds = st.integers(0, 12)
turns = st.lists(
    st.builds(lambda a, b, who: Turn(min(a, b), max(a, b), who), seconds, seconds, st.sampled_from("pqr")), max_size=6
)


@PROPERTY
@given(turns, turns)
def test_diarization_properties(prediction, reference):
    found = metrics.diarization_errors(prediction, reference)
    # Frame by frame, with every mapping tried: boundaries are whole seconds.
    frames = {name: np.zeros((12, 3), bool) for name in ("said", "heard")}
    for name, some in (("said", reference), ("heard", prediction)):
        for turn in some:
            frames[name][int(turn.start) : int(turn.end), "pqr".index(turn.speaker)] = True
    said, heard = frames["said"], frames["heard"]
    correct = max((said & heard[:, order]).sum() for order in map(list, itertools.permutations(range(3))))
    assert found.scored == said.sum()
    assert found.missed == np.maximum(said.sum(1) - heard.sum(1), 0).sum()
    assert found.false_alarm == np.maximum(heard.sum(1) - said.sum(1), 0).sum()
    assert found.confused == pytest.approx(np.minimum(said.sum(1), heard.sum(1)).sum() - correct)
    renamed = [turn._replace(speaker={"p": "r", "q": "p", "r": "q"}[turn.speaker]) for turn in prediction]
    assert metrics.diarization_errors(renamed, reference) == pytest.approx(found)
    assert metrics.diarization_errors(reference, reference)[:3] == (0, 0, 0)


def test_median_filter_is_scipys():
    from scipy.signal import medfilt

    active = np.random.default_rng(0).random((50, 2)) > 0.5
    for width in (1, 3, 11):
        expected = medfilt(active.astype(float), (width, 1)).astype(bool)
        assert (metrics.median_filter(active, width) == expected).all()


def test_turns_of_frames():
    active = np.array([[1, 0], [1, 1], [0, 1], [1, 1]], bool)
    assert metrics.turns_of_frames(active, 0.02) == [
        Turn(0.0, 0.04, "0"),
        Turn(pytest.approx(0.06), 0.08, "0"),
        Turn(0.02, 0.08, "1"),
    ]


# ---- spoken term detection -------------------------------------------------


def test_beta_is_quessts():
    # P_target 0.0008, C_miss 100, C_fa 1: an effective prior of 0.0741289, as its tool is called.
    prior = 1 / (1 + metrics.TWV_BETA)
    assert prior == pytest.approx(0.0741289, abs=1e-6)


def test_term_weighted_value_by_hand():
    scores = [[3, 2, 1, 0], [3, 0, 2, 1]]
    relevant = [[1, 0, 0, 0], [0, 0, 1, 0]]
    # Above 3: the first query found, a false alarm in 1 of 16 documents of the second: 1/2 - beta / 32.
    # Above 2: both found, one alarm each: 1 - beta / 16, which is more.
    found = metrics.max_term_weighted_value(scores, relevant, documents=17)
    assert found == pytest.approx(1 - metrics.TWV_BETA / 16)
    assert metrics.max_term_weighted_value(scores, relevant) == 0.0  # an alarm in 1 of 3 costs more than a hit


def test_queries_that_occur_nowhere_do_not_count():
    found = metrics.max_term_weighted_value([[9, 1], [8, 9]], [[1, 0], [0, 0]])
    assert found == pytest.approx(1.0)
    with pytest.raises(ArmhubertError, match="at least one document"):
        metrics.max_term_weighted_value([[1, 2]], [[0, 0]])


def test_what_is_not_searched_is_missed_or_rightly_rejected():
    scores, relevant = [[2, 2, 1]], [[1, 0, 0]]
    # One of 4 queries is searched; its alarm is 1 of 40 - 1 documents.
    found = metrics.max_term_weighted_value(scores, relevant, queries=4, documents=40)
    assert found == pytest.approx((1 - metrics.TWV_BETA / 39) / 4)


@PROPERTY
@given(st.integers(0, 10**6))
def test_term_weighted_value_properties(seed):
    draw = random.Random(seed)
    scores = np.array([[draw.randint(0, 6) for _ in range(5)] for _ in range(3)])
    relevant = np.array([[draw.random() < 0.4 for _ in range(5)] for _ in range(3)])
    relevant[0, 0] = True
    found = metrics.max_term_weighted_value(scores, relevant, documents=40)
    kept = relevant.any(1)
    best = 0.0
    for threshold in range(8):
        detected = scores >= threshold
        losses = []
        for row, truth in zip(detected[kept], relevant[kept], strict=True):
            alarm = row[~truth].sum() / (40 - truth.sum())
            losses.append((~row)[truth].mean() + metrics.TWV_BETA * alarm)
        best = max(best, 1 - float(np.mean(losses)))
    assert found == pytest.approx(best)
    assert 0 <= found <= 1
