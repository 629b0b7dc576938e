"""The features that heads are trained on: read from a cache, or computed by the upstream as they are needed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from armhubert.data import Utterance, plan_by_length
from armhubert.errors import ArmhubertError
from armhubert.superb.audio import Recordings, ahead, padded
from armhubert.superb.cache import FeatureCache
from armhubert.superb.progress import CachePlanned, Caching, Stopped
from armhubert.superb.task import Item
from armhubert.superb.upstream import Upstream

BATCH_SECONDS = 60.0
"""Audio in a batch where the task does not set its size: a minute of HuBERT Base's layers takes 120 MB."""


class Features:
    """The features of items, from the cache where there is one, else from the upstream."""

    def __init__(
        self, upstream: Upstream, recordings: Recordings, cache: FeatureCache | None, device: torch.device, workers: int
    ) -> None:
        self.upstream, self.recordings, self.cache = upstream, recordings, cache
        self.device, self.workers = device, workers

    def stream(self, groups: Sequence[Sequence[Item]]) -> Iterator[tuple[Tensor, Tensor]]:
        """([L, B, T, D] float32, valid frames [B]) of each group, on the device."""
        if self.cache is not None:
            cache, digest = self.cache, self.recordings.digest
            for rows in ahead(lambda group: [cache.read(digest(item)) for item in group], groups, self.workers):
                lengths = torch.tensor([row.shape[1] for row in rows])
                layers = rows[0].new_zeros(rows[0].shape[0], len(rows), int(lengths.max()), rows[0].shape[2])
                for number, row in enumerate(rows):
                    layers[:, number, : row.shape[1]] = row
                yield layers.to(self.device).float(), lengths.to(self.device)  # fp16 until here
        else:
            for waveforms, lengths in ahead(self._read, groups, self.workers):
                yield self.upstream(waveforms.to(self.device), lengths.to(self.device))

    def groups(self, items: Sequence[Item]) -> list[list[int]]:
        """Places of items in batches of similar length, the longest first, of bounded memory."""
        found = [Utterance(item.key, self.recordings.samples(item)) for item in items]
        return [[crop.utterance for crop in batch] for batch in plan_by_length(found, BATCH_SECONDS)]

    def _read(self, group: Sequence[Item]) -> tuple[Tensor, Tensor]:
        return padded([self.recordings.waveform(item) for item in group])

    def fill(self, items: Sequence[Item], should_stop: Callable[[], bool]) -> Iterator[CachePlanned | Caching]:
        """Compute what the cache does not have yet; says first how much it will be.

        Raises:
            ArmhubertError: it does not fit on the disk.
            Stopped: the user asked to; what was computed is in the cache.
        """
        assert self.cache is not None
        by_digest = {self.recordings.digest(item): item for item in items}
        frames = [self.upstream.frames(self.recordings.samples(item)) for item in by_digest.values()]
        plan = self.cache.plan(list(by_digest), frames)
        yield CachePlanned(plan)
        if plan.bytes > 0.95 * plan.free:
            raise ArmhubertError(
                f"the features need {plan.bytes / 1e9:.1f} GB and {plan.folder} has {plan.free / 1e9:.1f} GB free: "
                "choose another disk with cache=..., or run without"
            )
        if not plan.items:
            return
        with self.cache.writer() as writer:
            missing = [(digest, item) for digest, item in by_digest.items() if digest not in self.cache]
            if not missing:
                return  # another process has been faster
            groups = [[missing[place] for place in group] for group in self.groups([item for _, item in missing])]
            done = 0
            waveforms = ahead(lambda group: self._read([item for _, item in group]), groups, self.workers)
            with contextlib.closing(waveforms):  # type: ignore[type-var]
                for group, (batch, lengths) in zip(groups, waveforms, strict=True):
                    states = self.upstream(batch.to(self.device), lengths.to(self.device))
                    for row, (digest, _) in enumerate(group):
                        writer.add(digest, states.layers[:, row, : int(states.lengths[row])])
                    done += len(group)
                    yield Caching(done, len(missing))
                    if should_stop():
                        raise Stopped
