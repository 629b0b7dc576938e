"""Subsequence dynamic time warping as s3prl's QbE has it, of one document against many queries at once.

With query frame i, document frame j and local cost d, Giorgino's "asymmetric" step pattern (J. Stat. Softw. 31(7),
2009; dtw-python, which s3prl calls with open begin and end) is

    D(i, j) = d(i, j) + min(D(i - 1, j), D(i - 1, j - 1), D(i - 1, j - 2)),   D(0, j) = d(0, j),

and the cost of a match is min_j D(I - 1, j) / I. A row depends on the row before it alone: so rows are computed one by
one, each for all document frames and all queries that are long enough.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MIN_FRAMES = 5
"""Shorter queries match every document alike (s3prl)."""

_FLOOR = 1e-9


class Queries(NamedTuple):
    """Queries ready to be matched: sorted by length, frames of unit length."""

    frames: Tensor
    """[Q, I, D], zero beyond each length."""
    lengths: tuple[int, ...]
    """[Q], descending."""
    order: Tensor
    """[Q] int64: the place of each in what was given."""


def prepare_queries(queries: Sequence[Tensor]) -> Queries:
    """Queries [I, D] each, any lengths; all on one device."""
    order = sorted(range(len(queries)), key=lambda place: -len(queries[place]))
    frames = pad_sequence([F.normalize(queries[place], dim=1) for place in order], batch_first=True)
    return Queries(frames, tuple(len(queries[place]) for place in order), torch.tensor(order))


def match_document(queries: Queries, document: Tensor) -> Tensor:
    """Negative cost [Q] of each query, in the order given, against a document [J, D]; higher is likelier to be in it.

    The local cost is exp(1 - cosine) - 1, then scaled to 0 to 1 over the document for each query frame. Queries below
    `MIN_FRAMES` score 0.
    """
    unit = F.normalize(document, dim=1)
    scores = torch.zeros(len(queries.lengths), dtype=unit.dtype, device=unit.device)
    active = sum(length >= MIN_FRAMES for length in queries.lengths)
    total = torch.zeros(0)
    for i in range(queries.lengths[0] if active else 0):
        while active and queries.lengths[active - 1] <= i:
            active -= 1
        cost = torch.expm1(1 - queries.frames[:active, i] @ unit.T)  # [active, J]
        low, high = cost.amin(1, keepdim=True), cost.amax(1, keepdim=True)
        cost = (cost - low) / (high - low).clamp(min=_FLOOR)
        if i:
            before = total[:active]
            best = before.clone()
            torch.minimum(best[:, 1:], before[:, :-1], out=best[:, 1:])
            torch.minimum(best[:, 2:], before[:, :-2], out=best[:, 2:])
            cost += best
        total = cost
        for place in range(active - 1, -1, -1):
            if queries.lengths[place] != i + 1:
                break
            scores[place] = -total[place].min() / (i + 1)
    result = torch.empty_like(scores)
    result[queries.order.to(scores.device)] = scores
    return result
