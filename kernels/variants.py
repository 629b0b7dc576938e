"""Which way of reusing a map is fastest on a GPU: by a measured table of its family, else by the cost model.

Three ways: the map recomputed and values projected inside the kernel; the map recomputed, values projected before; the
map stored by the computing layer, where no gradient is asked for. Storing must pay for making the logits twice, since a
row's sum is known only after its last key: never for one reusing layer by the model, for several in float32, which has
no matrix units.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armhubert.kernels import costs

BATCHES, FRAMES = (1, 4, 16, 64), (50, 100, 128, 200, 256, 384, 512, 1024)
"""The grid of batch sizes and frames that is measured, and predicted, with the widths of the preset `armhubert`."""
STORED_BYTES = 2**28
"""Most bytes that a stored map may take."""
WORTHWHILE = 0.97
"""Storing is chosen only where it takes less than this share of the time: it costs memory."""
FILE = Path(__file__).with_name("variants.json")

Table = dict[str, list[list[int]]]


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Turn the seconds that each way takes in the cells of a grid into a table of choices.

    Args:
        rows: for each cell, B and T, and the seconds of a reusing layer that projects values inside the kernel
            (`inside_s`), before it (`outside_s`), or reads a stored map (`stored_s`), and the seconds that storing
            adds to the computing layer (`storing_s`).

    Returns:
        inside: pairs [B, T]: a batch of up to B utterances projects inside the kernel if it has up to T frames, the
            last of the grid before projecting inside first loses.
        stored: triples [B, T, n]: a batch of up to B utterances and T frames stores a map that at least n layers
            reuse; n = 0: it never does.
    """
    cells = sorted(rows, key=lambda row: (row["B"], row["T"]))
    inside: dict[int, list[int]] = {}
    stored = []
    for row in cells:
        longest = inside.setdefault(row["B"], [row["B"], 0, 1])
        if row["inside_s"] > row["outside_s"]:
            longest[2] = 0
        elif longest[2]:
            longest[1] = row["T"]
        gain = min(row["inside_s"], row["outside_s"]) * WORTHWHILE - row["stored_s"]
        layers = 0 if gain <= 0 else max(1, -int(-row["storing_s"] // gain))
        stored.append([row["B"], row["T"], layers])
    return {"inside": [entry[:2] for entry in inside.values()], "stored": stored}


def predicted(gpu: costs.Gpu, itemsize: int) -> Iterator[dict[str, Any]]:
    """Rows of the grid for `table`, as the cost model predicts them."""
    for B in BATCHES:
        for T in FRAMES:
            yield {"B": B, "T": T, **costs.ways_to_reuse(B, T, 12, 40, 480, gpu, itemsize)}


def measured() -> dict[str, Table]:
    """Tables by GPU family that `python -m armhubert.bench gpu adopt` made of bench/gpu.sh's times in bfloat16."""
    found: dict[str, Table] = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
    return found


@cache
def choices(device: int | None, itemsize: int) -> Table:
    """Table of a CUDA device, measured or else predicted; None, for the interpreter, gets an H100's."""
    if device is None:
        return table(predicted(costs.GPUS["H100"], itemsize))
    properties = torch.cuda.get_device_properties(device)
    if itemsize == 2 and (found := measured().get(f"sm_{properties.major}{properties.minor}")):
        return found
    return table(predicted(costs.named(properties.name) or costs.GPUS["H100"], itemsize))


def project_inside(q: Tensor) -> bool:
    """Whether one fused kernel beats projection then attention, for the map of q [B, T, H, d].

    Under a compiler the answer is always no: a choice by shape would be a guard, and a recompilation.
    """
    if torch.compiler.is_compiling():
        return False
    B, T = q.shape[:2]
    entries = choices(q.device.index, q.itemsize)["inside"]
    return next((longest for batch, longest in entries if batch >= B), entries[-1][1]) >= T


def store_map(q: Tensor, reusing_layers: int) -> bool:
    """Whether storing the map of q pays where so many layers reuse it; with gradients none is stored."""
    if torch.compiler.is_compiling():
        return False
    B, T, H, _ = q.shape
    if not reusing_layers or B * H * T * T * q.itemsize > STORED_BYTES:
        return False
    entries = choices(q.device.index, q.itemsize)["stored"]
    layers = next((n for batch, frames, n in entries if batch >= B and frames >= T), 0)
    return 0 < layers <= reusing_layers
