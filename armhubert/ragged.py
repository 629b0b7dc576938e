"""What batches of unequal recordings cost: throughput on LibriSpeech's lengths against equal ones of as much audio."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from armhubert.clock import Timing, interleave
from armhubert.config import SAMPLE_RATE
from armhubert.data import Crop, Utterance, pack, padding_waste, plan_by_length

LIBRISPEECH = (
    2.8, 3.9, 5.1, 6.7, 8.1, 9.2, 10.1, 11.0, 11.8, 12.2, 12.6, 12.9, 13.1, 13.4, 13.6, 13.8,
    14.0, 14.2, 14.4, 14.5, 14.7, 14.8, 14.9, 15.1, 15.2, 15.4, 15.5, 15.6, 15.7, 15.8, 16.1, 16.4,
)  # fmt: skip
"""Seconds: the 32 middle quantiles of mini LibriSpeech's train-clean-5, whose mean is also theirs."""

BATCH_SECONDS = 60.0
"""Padded audio of a batch, as `armhubert extract` has it."""

WAYS = ("equal", "sorted", "unsorted")
"""Every recording as long as their mean; by length, as `extract` and `distill` batch them; in no order."""


class Ragged(NamedTuple):
    """One candidate on the same amount of audio, batched in each of the `WAYS`."""

    name: str
    audio_seconds: float
    """Without padding."""
    timings: dict[str, Timing]
    """Times of one pass over all batches, by way."""
    padding: dict[str, float]
    """Share of a way's samples."""

    def rate(self, way: str) -> float:
        """Seconds of audio a second, padding not counted."""
        return self.audio_seconds / self.timings[way].median


def measure(
    runs: Mapping[str, Callable[..., Tensor]],
    device: torch.device,
    *,
    repeats: int,
    warmup: int,
) -> list[Ragged]:
    """All candidates and ways in turn, on recordings of `LIBRISPEECH`'s lengths.

    Args:
        runs: candidates by name: waveforms [B, S], valid samples [B] or None -> features.
        device: where they are.
        repeats: interleaved runs.
        warmup: runs before timing.
    """
    samples = [round(s * SAMPLE_RATE) for s in LIBRISPEECH]
    plans = _plans(samples)
    batched = {way: [_batch(batch, way, device) for batch in plan] for way, plan in plans.items()}

    def passes(run: Callable[..., Tensor], way: str) -> Callable[[], None]:
        def once() -> None:
            for waveforms, valid in batched[way]:
                run(waveforms, valid)

        return once

    timings = interleave(
        {f"{way}/{name}": passes(run, way) for name, run in runs.items() for way in WAYS},
        repeats=repeats,
        warmup=warmup,
        device=device,
    )
    padding = {way: padding_waste(plan) for way, plan in plans.items()}
    audio = sum(samples) / SAMPLE_RATE
    return [Ragged(name, audio, {way: timings[f"{way}/{name}"] for way in WAYS}, padding) for name in runs]


def _plans(samples: list[int]) -> dict[str, list[list[Crop]]]:
    def by_length(counts: list[int]) -> list[list[Crop]]:
        return plan_by_length([Utterance("", count) for count in counts], BATCH_SECONDS)

    mean = round(sum(samples) / len(samples))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    unsorted = pack((Crop(index, 0, samples[index]) for index in order), int(BATCH_SECONDS * SAMPLE_RATE))
    return {"equal": by_length([mean] * len(samples)), "sorted": by_length(samples), "unsorted": unsorted}


def _batch(crops: list[Crop], way: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Noise [B, S], zero beyond each length, and the lengths [B]; None where they are all the same by intention."""
    generator = torch.Generator().manual_seed(0)
    waveforms = torch.zeros(len(crops), max(crop.samples for crop in crops))
    for row, crop in zip(waveforms, crops, strict=True):
        row[: crop.samples].normal_(0, 0.1, generator=generator)
    lengths = torch.tensor([crop.samples for crop in crops])
    return waveforms.to(device), None if way == "equal" else lengths.to(device)
