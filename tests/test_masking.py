import numpy as np
import pytest
import torch

from armhubert.masking import batch_mask, scheduled_probability, span_mask


@pytest.mark.parametrize(
    ("p", "frames", "share"), [(0.8, 100, 0.70), (0.8, 300, 0.76), (0.8, 600, 0.79), (0.4, 100, 0.40), (0.4, 300, 0.40)]
)
def test_the_masked_share_is_that_of_the_released_settings(p, frames, share):
    drawn = [span_mask(frames, p, np.random.default_rng([7, i])).float().mean() for i in range(300)]
    assert float(np.mean(drawn)) == pytest.approx(share, abs=0.02)


def test_spans_are_at_most_twice_the_mean_and_keep_a_frame_between_them():
    for i in range(50):
        mask = span_mask(400, 0.8, np.random.default_rng([1, i]), mean_length=5)
        runs = [len(run) for run in "".join("x" if m else " " for m in mask.tolist()).split()]
        assert max(runs) <= 10


@pytest.mark.parametrize("frames", [1, 2, 3, 10])
def test_short_utterances_get_a_mask_that_fits(frames):
    for i in range(20):
        assert span_mask(frames, 0.8, np.random.default_rng([2, i])).shape == (frames,)


def test_a_mask_is_a_function_of_its_generator():
    first, again, other = (span_mask(200, 0.8, np.random.default_rng(seed)) for seed in ([3, 1], [3, 1], [3, 2]))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_probability_zero_masks_nothing():
    assert not span_mask(100, 0.0, np.random.default_rng(0)).any()


def test_padding_is_never_masked():
    masks = [torch.ones(3, dtype=torch.bool), torch.ones(5, dtype=torch.bool)]
    assert batch_mask(masks, 6).tolist() == [[True] * 3 + [False] * 3, [True] * 5 + [False]]


def test_the_probability_changes_linearly_over_the_run():
    assert scheduled_probability(0.8, None, 0.5) == 0.8
    assert scheduled_probability(0.8, 0.4, 0.5) == pytest.approx(0.6)


class Recorder:
    """A generator that keeps the span lengths it drew and counts the spans that found a place."""

    def __init__(self, seed: list[int]) -> None:
        self.rng, self.lengths, self.placed = np.random.default_rng(seed), [], 0

    def integers(self, *args, size=None):
        drawn = self.rng.integers(*args, size=size)
        if size is not None:
            self.lengths = sorted(drawn.tolist(), reverse=True)
        else:  # the place of one
            self.placed += 1
        return drawn

    def random(self) -> float:
        return self.rng.random()


@pytest.mark.parametrize(("p", "frames"), [(0.8, 400), (0.4, 150), (1.0, 60)])
def test_every_placed_span_is_a_run_of_its_own_so_none_overlap_or_touch(p, frames):
    for i in range(60):
        rng = Recorder([4, i])
        mask = span_mask(frames, p, rng)
        runs = [len(run) for run in "".join("x" if m else " " for m in mask.tolist()).split()]
        assert sorted(runs, reverse=True) == [n for n in rng.lengths[: rng.placed] if n]


@pytest.mark.parametrize("frames", [1, 40])
def test_certainty_masks_something_but_never_everything(frames):
    drawn = [span_mask(frames, 1.0, np.random.default_rng([5, i])) for i in range(50)]
    assert not any(mask.all() for mask in drawn)
    assert frames == 1 or all(mask.any() for mask in drawn)


def test_there_are_two_spans_at_least_and_lengths_that_are_all_drawn_as_0_leave_one_of_the_mean():
    rng = [Recorder([6, i]) for i in range(100)]
    masks = [span_mask(30, 0.01, generator, mean_length=1) for generator in rng]
    assert {len(generator.lengths) for generator in rng} == {2}
    empty = [mask for mask, generator in zip(masks, rng, strict=True) if not any(generator.lengths)]
    assert empty
    assert all(mask.sum() == 1 for mask in empty)
