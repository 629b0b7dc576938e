"""Span masks: which frames the student does not see (fairseq's `compute_mask_indices` with the released settings)."""

from bisect import bisect_right
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

MIN_SPANS = 2
GAP = 1


def span_mask(frames: int, probability: float, rng: np.random.Generator, *, mean_length: int = 10) -> Tensor:
    """One utterance's mask.

    int(p T / mean + u) spans, u uniform in [0, 1), at least 2; lengths uniform on 0..2 mean; longest first, each placed
    uniformly in a free part chosen with a chance proportional to its size; spans keep a frame between them. Spans that
    find no room are left out, so short utterances are masked less than p.

    Args:
        frames: T, valid frames of the utterance.
        probability: p, in [0, 1]; 0 masks nothing.
        rng: where all chance comes from.
        mean_length: mean span length in frames.

    Returns:
        [T] bool, True where masked.
    """
    mask = np.zeros(frames, dtype=bool)
    if probability == 0:
        return torch.from_numpy(mask)
    count = max(MIN_SPANS, int(probability * frames / mean_length + rng.random()))
    lengths = np.sort(rng.integers(0, 2 * mean_length + 1, size=count))[::-1]
    if lengths[0] == 0:
        lengths[0] = min(mean_length, frames - 1)
    shortest = int(lengths[-1])
    parts = [(0, frames)]  # free stretches [start, end)
    for length in lengths.tolist():
        room = list(accumulate(end - start if end - start >= length + GAP else 0 for start, end in parts))
        if not room or room[-1] == 0:
            break
        start, end = parts.pop(bisect_right(room, rng.random() * room[-1]))
        first = int(rng.integers(start, end - length))
        last = first + length
        mask[first:last] = True
        if first - GAP - start >= shortest:
            parts.append((start, first - GAP + 1))
        if end - last - GAP > shortest:
            parts.append((last + GAP, end))
    return torch.from_numpy(mask)


def batch_mask(masks: list[Tensor], size: int) -> Tensor:
    """Masks of a batch's utterances, padded with False to `size` frames: [B, size] bool."""
    out = torch.zeros(len(masks), size, dtype=torch.bool)
    for row, mask in zip(out, masks, strict=True):
        row[: len(mask)] = mask
    return out


def scheduled_probability(start: float, end: float | None, progress: float) -> float:
    """The mask probability at `progress` in [0, 1] of the run: linear from `start` to `end`; constant where None."""
    return start if end is None else start + (end - start) * progress
