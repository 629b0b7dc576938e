# mypy: disallow-untyped-defs=False
# (jit functions are typed by Triton, and choose between tiles of different shapes by statement)
"""Triton kernel of the masked distillation loss; formula and public function are in masked_distillation.py.

Legend: L layers, N = B T frames, C student width, E teacher width. One program holds a tile [BLOCK_N, BLOCK_E] of one
layer's residual in registers, bias less the one view each frame needs plus the product, and sums it before it could be
stored. Partial sums are added in a fixed order afterwards: reruns are bitwise equal.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from armhubert.kernels.runtime import contiguous, launch_options, product_precision

# ---- kernel -----------------------------------------------------------------


@triton.jit
def _pick(pointers, layer, L: tl.constexpr):
    """pointers[layer] for an index known at run time only."""
    chosen = pointers[0]
    for index in tl.static_range(1, L):
        chosen = tl.where(layer == index, pointers[index], chosen)
    return chosen


@triton.jit(do_not_specialize=["N", "T"])
def forward_kernel(
    hidden, weight_ptr, bias_ptr, clean, masked, mask_ptr, lengths_ptr, residual_ptr, partial_ptr,
    h_n, clean_n, masked_n, N, T,
    L: tl.constexpr, C: tl.constexpr, E: tl.constexpr, L1: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile: prediction - target, its distance summed into `partial`, itself (or its sign) kept where KEEP."""
    blocks_e = tl.cdiv(E, BLOCK_E)
    blocks_n = tl.cdiv(N, BLOCK_N)
    # neighbours share a tile of hidden, which therefore stays in cache
    e0 = tl.program_id(0) % blocks_e * BLOCK_E
    n0 = tl.program_id(0) // blocks_e % blocks_n * BLOCK_N
    layer = tl.program_id(0) // (blocks_e * blocks_n)
    row = tl.arange(0, BLOCK_N)
    n = n0 + row
    e = e0 + tl.arange(0, BLOCK_E)
    valid = n < N
    if lengths_ptr is not None:
        valid = valid & (n % T < tl.load(lengths_ptr + n // T, mask=valid, other=0))
    # the block's start is added in 64 bits, so that only offsets inside the block are 32 bits wide
    start = tl.cast(n0, tl.int64)
    column = e < E

    tile = valid[:, None] & column[None, :]
    target_ptr = _pick(clean, layer, L) + start * clean_n + (row * clean_n)[:, None] + e[None, :]
    if masked is None:
        target = tl.load(target_ptr, mask=tile, other=0.0).to(tl.float32)
    else:
        # one view per frame: the other is never fetched
        seen = (tl.load(mask_ptr + n, mask=valid, other=0) != 0)[:, None]
        other_ptr = _pick(masked, layer, L) + start * masked_n + (row * masked_n)[:, None] + e[None, :]
        target = tl.load(target_ptr, mask=tile & seen, other=0.0).to(tl.float32)
        target += tl.load(other_ptr, mask=tile & ~seen, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + layer * E + e, mask=column, other=0.0).to(tl.float32)
    rest = tl.where(tile, bias[None, :] - target, 0.0)
    # In 16 bits the sum starts from the rest, so that nothing is left to be read when the product is there. A small
    # prediction of a large target would lose digits by that, which float32 has.
    LAST: tl.constexpr = weight_ptr.dtype.element_ty == tl.float32
    residual = tl.zeros([BLOCK_N, BLOCK_E], tl.float32) if LAST else rest

    h_ptr = _pick(hidden, layer, L) + start * h_n + (row * h_n)[:, None]
    weight_ptr += (tl.cast(layer, tl.int64) * E + e)[:, None] * C
    # a tile of padding costs no product
    for c0 in range(0, tl.where(tl.max(valid.to(tl.int32), 0) > 0, C, 0), BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        h_mask = valid[:, None]
        w_mask = column[:, None]
        if C % BLOCK_C > 0:
            h_mask = h_mask & (c < C)[None, :]
            w_mask = w_mask & (c < C)[None, :]
        h = tl.load(h_ptr + c[None, :], mask=h_mask, other=0.0)
        w = tl.load(weight_ptr + c[None, :], mask=w_mask, other=0.0)
        residual = tl.dot(h, tl.trans(w), residual, input_precision=PRECISION)  # [BN, BC] @ [BC, BE]
    if LAST:
        residual += rest
    distance = tl.abs(residual) if L1 else residual * residual
    tl.store(partial_ptr + tl.program_id(0), tl.sum(distance))
    if KEEP:
        if L1:
            residual = tl.where(residual > 0, 1.0, tl.where(residual < 0, -1.0, 0.0))
        at = residual_ptr + (tl.cast(layer, tl.int64) * N + start) * E + (row * E)[:, None] + e[None, :]
        tl.store(at, residual.to(residual_ptr.dtype.element_ty), mask=(n < N)[:, None] & column[None, :])


# ---- shipped configurations and launcher ------------------------------------


class Config(NamedTuple):
    """Tile of the prediction, step along the student's width, and how the compiler schedules it."""

    BLOCK_N: int
    BLOCK_E: int
    BLOCK_C: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Most registers of a thread (sm_90): two programs are resident then, one adding up while the other multiplies."""


def config(dtype: torch.dtype) -> Config:
    """The configuration shipped: fixed, so that no call pays for autotuning and reruns are equal."""
    if dtype == torch.float32:
        return Config(64, 64, 16, 8, 3)
    return Config(128, 128, 64, 8, 3, 128)


def _frames(layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Layers [B, T, D] as [B T, D] with one row stride and adjacent columns, copied only where need be."""
    flat = tuple(layer.flatten(0, 1) for layer in layers)
    if all(x.stride(-1) == 1 and x.stride(0) == flat[0].stride(0) for x in flat):
        return flat
    return tuple(x.contiguous() for x in flat)


def _pointers(layers: Sequence[Tensor]) -> tuple[Any, ...]:
    """Pointers for the kernel to choose from: AMD's compiler fails to choose between tensors known to be small."""
    return tuple(triton.reinterpret(x, x.dtype) for x in layers)


def forward(
    hidden: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    clean: Sequence[Tensor],
    masked: Sequence[Tensor] | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    l1: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [L] in float32, and residual or sign [L, B, T, E] in the dtype of hidden (empty unless keep)."""
    L, E, C = weight.shape
    B, T, _ = hidden[0].shape
    N = B * T
    residual = weight.new_empty((L, B, T, E) if keep else (0,))
    shipped = config(weight.dtype)
    tiles = triton.cdiv(E, shipped.BLOCK_E) * triton.cdiv(N, shipped.BLOCK_N)
    partial = weight.new_empty(L, tiles, dtype=torch.float32)
    hidden, clean = _frames(hidden), _frames(clean)
    masked = None if masked is None else _frames(masked)
    views = _pointers(clean), None if masked is None else _pointers(masked)
    forward_kernel[(L * tiles,)](
        _pointers(hidden), weight.contiguous(), bias.contiguous(), *views, contiguous(mask), contiguous(lengths),
        residual, partial,
        hidden[0].stride(0), clean[0].stride(0), 0 if masked is None else masked[0].stride(0), N, T,
        L=L, C=C, E=E, L1=l1, KEEP=keep, PRECISION=product_precision(weight.dtype), **launch_options(shipped),
    )  # fmt: skip
    return partial.sum(1) / E, residual
