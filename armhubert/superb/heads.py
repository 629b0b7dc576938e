"""SUPERB's heads, as s3prl builds them. Shapes: B utterances, T frames, D features, C classes or tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armhubert.superb.task import Batch, Head

PROJECTION = 256


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """[B] -> [B, T] bool, true for valid frames."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


class PooledClassifier(Head):
    """ks, sid, er, ic: linear to 256, mean over time, one linear map to all groups of classes; no non-linearity.

    Args:
        width: D.
        groups: names of the classes of each group; an item's label is a tuple with one of each.
    """

    def __init__(self, width: int, groups: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.groups = tuple(map(tuple, groups))
        self.place = [{label: number for number, label in enumerate(group)} for group in self.groups]
        self.project = nn.Linear(width, PROJECTION)
        self.classify = nn.Linear(PROJECTION, sum(map(len, self.groups)))

    def logits(self, batch: Batch) -> tuple[Tensor, ...]:
        """Of each group, [B, C]."""
        x = self.project(batch.features)
        mask = frame_mask(batch.lengths, x.shape[1])[..., None]
        pooled = (x * mask).sum(1) / batch.lengths[:, None]
        return self.classify(pooled).split([len(group) for group in self.groups], dim=1)

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the groups' cross entropies."""
        losses = [
            F.cross_entropy(
                logits, torch.tensor([place[item.label[group]] for item in batch.items], device=logits.device)
            )
            for group, (logits, place) in enumerate(zip(self.logits(batch), self.place, strict=True))
        ]
        return torch.stack(losses).sum()

    def predict(self, batch: Batch) -> list[tuple[str, ...]]:
        """The most likely class of each group."""
        best = [logits.argmax(1).tolist() for logits in self.logits(batch)]
        return [tuple(group[i] for group, i in zip(self.groups, row, strict=True)) for row in zip(*best, strict=True)]
