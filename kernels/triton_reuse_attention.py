# mypy: disallow-untyped-defs=False
# ruff: noqa: SIM108
# (jit functions are typed by Triton, and choose between tiles of different shapes by statement)
"""Triton kernels of attention with map reuse; formulas and public functions are in reuse_attention.py.

Legend: B utterances, T frames, H heads, D head width, C model width; M a block of queries, N a block of keys.
Heads are read as two tiles, HEAD and TAIL columns wide, so that a width of 40 costs 32 + 16 and not 64; TAIL = 0 leaves
the second tile out. Rows of padded frames are loaded as 0, hence add nothing anywhere, and stored as 0.
Every program owns what it writes: no atomics, so reruns are bitwise equal.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from armhubert.kernels.reuse_attention import PITCH as _PITCH
from armhubert.kernels.reuse_attention import pitched
from armhubert.kernels.runtime import FUSED, contiguous, float32_precision

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# 7 rounds of Philox 4x32 pass BigCrush; its authors' default of 10 is a safety margin
ROUNDS = tl.constexpr(7)
PITCH = tl.constexpr(_PITCH)

# ---- tiles ------------------------------------------------------------------


@triton.jit
def _columns(
    base, start, stride, rows, col, cols,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """base[start : start + ROWS, col : col + WIDTH], 0 from row `rows` and, with CHECK, from column `cols` on."""
    row = tl.arange(0, ROWS)
    column = col + tl.arange(0, WIDTH)
    # the block's start is added in 64 bits, so that only offsets inside the block are 32 bits wide
    base += tl.multiple_of(tl.cast(start, tl.int64) * stride, ALIGN)
    at = base + tl.multiple_of(row * stride, ALIGN)[:, None] + column[None, :]
    mask = (start + row < rows)[:, None]
    if CHECK:
        mask = mask & (column < cols)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _load(
    base, start, stride, rows,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head as two tiles; without a TAIL the second is the first again and is never used."""
    head = _columns(base, start, stride, rows, 0, D, ALIGN, ROWS, HEAD, HEAD > D)
    if TAIL > 0:
        tail = _columns(base, start, stride, rows, HEAD, D, ALIGN, ROWS, TAIL, HEAD + TAIL > D)
    else:
        tail = head
    return head, tail


@triton.jit
def _store_columns(base, start, stride, rows, tile, col, cols, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, ROWS)
    column = col + tl.arange(0, WIDTH)
    at = base + tl.cast(start, tl.int64) * stride + (row * stride)[:, None] + column[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=(start + row < rows)[:, None] & (column < cols)[None, :])


@triton.jit
def _store(
    base, start, stride, rows, head, tail,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _store_columns(base, start, stride, rows, head, 0, D, ROWS, HEAD)
    if TAIL > 0:
        _store_columns(base, start, stride, rows, tail, HEAD, D, ROWS, TAIL)


@triton.jit
def _inner(a, a_tail, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """[R, D] and [S, D] -> [R, S] float32, products of rows."""
    out = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TAIL > 0:
        out = tl.dot(a_tail, tl.trans(b_tail), out, input_precision=PRECISION)
    return out


@triton.jit
def _accumulate(acc, acc_tail, a, b, b_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """acc + [R, S] @ [S, D] in two tiles."""
    acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if TAIL > 0:
        acc_tail = tl.dot(a, b_tail, acc_tail, input_precision=PRECISION)
    return acc, acc_tail


@triton.jit
def _zeros(ROWS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    head = tl.zeros([ROWS, HEAD], tl.float32)
    if TAIL > 0:
        tail = tl.zeros([ROWS, TAIL], tl.float32)
    else:
        tail = head
    return head, tail


@triton.jit
def _place(T, H, lengths_ptr, BLOCK: tl.constexpr):
    """This program's utterance, head, first row and the utterance's valid frames."""
    blocks = tl.cdiv(T, BLOCK)
    pair = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK
    b = pair // H
    valid = T
    if lengths_ptr is not None:
        valid = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), T)
    return b.to(tl.int64), pair % H, start, valid


@triton.jit
def _head(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    return ptr + tl.multiple_of(b * stride_b + tl.cast(h, tl.int64) * stride_h, ALIGN)


@triton.jit
def _pitch(T):
    """Numbers from one row of a stored map to the next: rows start at multiples of 16 bytes."""
    return tl.cdiv(T, PITCH) * PITCH


@triton.constexpr_function
def _dense_align(D):
    """Of the rows of contiguous [B, T, H, D]: D alone says it."""
    return min(D & -D, 16)


@triton.jit
def _kept(seed_ptr, pair, m, n, T, threshold):
    """Dropout's choice for map entries (m, n) of one utterance and head, from a counter: the same in every kernel."""
    entry = (m * T + n).to(tl.uint32, bitcast=True)
    zero = entry * 0
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), entry, zero + pair.to(tl.uint32), zero, zero, ROUNDS)
    return (bits >> 1).to(tl.int32) >= threshold


# ---- forward ----------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, seed_ptr, out_ptr, lse_ptr, map_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, H, scale, threshold, inverse_keep,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T scale) v with a running maximum, the log-sum-exp of each row and, where map_ptr, the map."""
    b, h, m0, valid = _place(T, H, lengths_ptr, BLOCK_M)
    pair = b * H + h
    m = m0 + tl.arange(0, BLOCK_M)
    q, q_tail = _load(_head(q_ptr, b, h, q_b, q_h, ALIGN), m0, q_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_M)
    k_ptr = _head(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = _head(v_ptr, b, h, v_b, v_h, ALIGN)
    acc, acc_tail = _zeros(BLOCK_M, HEAD, TAIL)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(0, tl.where(m0 < valid, valid, 0), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        s = _inner(q, q_tail, k, k_tail, TAIL, PRECISION) * (scale * LOG2E)
        s = tl.where((n < valid)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * rescale + tl.sum(p, 1)
        if seed_ptr is not None:
            p = tl.where(_kept(seed_ptr, pair, m[:, None], n[None, :], T, threshold), p, 0.0)
        acc *= rescale[:, None]
        if TAIL > 0:
            acc_tail *= rescale[:, None]
        v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        acc, acc_tail = _accumulate(acc, acc_tail, p.to(v.dtype), v, v_tail, TAIL, PRECISION)
        top = new_top
    row = m < valid
    factor = tl.where(row, inverse_keep / tl.where(row, total, 1.0), 0.0)[:, None]
    out_ptr += (b * T * H + h) * D
    _store(out_ptr, m0, H * D, T, acc * factor, acc_tail * factor, D, HEAD, TAIL, BLOCK_M)
    lse = tl.where(row, (top + tl.log2(tl.where(row, total, 1.0))) * LN2, 0.0)
    tl.store(lse_ptr + pair * T + m, lse, mask=m < T)
    if map_ptr is not None:
        # a row's sum is known only now, so its logits are made once more
        pitch = _pitch(T)
        map_ptr += pair * T * pitch
        for n0 in range(0, pitch, BLOCK_N):
            k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
            key = n0 + tl.arange(0, BLOCK_N) < valid
            p = tl.where(row[:, None], _probabilities(q, q_tail, k, k_tail, lse, key, scale, TAIL, PRECISION), 0.0)
            _store_columns(map_ptr, m0, pitch, T, p, n0, pitch, BLOCK_M, BLOCK_N)


@triton.jit
def _weigh(p, RESOFTMAX: tl.constexpr):
    """A tile of the map -> weights of v: itself, or exp(p) - 1, the second softmax's part beyond the plain mean."""
    if RESOFTMAX:
        return tl.exp2(p * LOG2E) - 1.0
    return p


@triton.jit
def _probabilities(q, q_tail, k, k_tail, lse, key, scale, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """Tile of the kept map: the log-sum-exp is known, so there is no maximum to track. -> [M, N], 0 at invalid keys."""
    s = _inner(q, q_tail, k, k_tail, TAIL, PRECISION) * (scale * LOG2E)
    return tl.where(key[None, :], tl.exp2(s - (lse * LOG2E)[:, None]), 0.0)


@triton.jit
def _finish(
    out_ptr, norm_ptr, acc, acc_tail, total, v_sum, v_sum_tail, b, h, m0, valid, T, H,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, RESOFTMAX: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Normalise (resoftmax), clear padded rows and store."""
    m = m0 + tl.arange(0, BLOCK_M)
    row = m < valid
    factor = tl.where(row, 1.0, 0.0)
    if RESOFTMAX:
        norm = tl.where(row, total + tl.cast(valid, tl.float32), 1.0)
        if norm_ptr is not None:
            tl.store(norm_ptr + (b * H + h) * T + m, norm, mask=m < T)
        factor = factor / norm
        acc += v_sum[None, :]
        if TAIL > 0:
            acc_tail += v_sum_tail[None, :]
    out_ptr += (b * T * H + h) * D
    _store(out_ptr, m0, H * D, T, acc * factor[:, None], acc_tail * factor[:, None], D, HEAD, TAIL, BLOCK_M)


@triton.jit(do_not_specialize=["T"])
def reattend_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, lengths_ptr, out_ptr, norm_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, H, scale,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    RESOFTMAX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A kept map times given values."""
    b, h, m0, valid = _place(T, H, lengths_ptr, BLOCK_M)
    m = m0 + tl.arange(0, BLOCK_M)
    q, q_tail = _load(_head(q_ptr, b, h, q_b, q_h, ALIGN), m0, q_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_M)
    lse = tl.load(lse_ptr + (b * H + h) * T + m, mask=m < valid, other=0.0)
    k_ptr = _head(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = _head(v_ptr, b, h, v_b, v_h, ALIGN)
    acc, acc_tail = _zeros(BLOCK_M, HEAD, TAIL)
    total = tl.zeros([BLOCK_M], tl.float32)
    v_sum = tl.zeros([HEAD], tl.float32)
    v_sum_tail = tl.zeros([TAIL if TAIL > 0 else HEAD], tl.float32)
    for n0 in range(0, tl.where(m0 < valid, valid, 0), BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N) < valid
        k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        p = _weigh(_probabilities(q, q_tail, k, k_tail, lse, key, scale, TAIL, PRECISION), RESOFTMAX)
        acc, acc_tail = _accumulate(acc, acc_tail, p.to(v.dtype), v, v_tail, TAIL, PRECISION)
        if RESOFTMAX:
            total += tl.sum(p, 1)
            v_sum += tl.sum(v.to(tl.float32), 0)
            if TAIL > 0:
                v_sum_tail += tl.sum(v_tail.to(tl.float32), 0)
    _finish(
        out_ptr, norm_ptr, acc, acc_tail, total, v_sum, v_sum_tail, b, h, m0, valid, T, H,
        D, HEAD, TAIL, RESOFTMAX, BLOCK_M,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def reattend_kept_kernel(
    map_ptr, v_ptr, lengths_ptr, out_ptr, v_b, v_t, v_h, T, H,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    RESOFTMAX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A stored map times given values: no queries, no keys, and nothing to normalise in the plain form."""
    b, h, m0, valid = _place(T, H, lengths_ptr, BLOCK_M)
    pitch = _pitch(T)
    map_ptr += (b * H + h) * T * pitch
    v_ptr = _head(v_ptr, b, h, v_b, v_h, ALIGN)
    acc, acc_tail = _zeros(BLOCK_M, HEAD, TAIL)
    total = tl.zeros([BLOCK_M], tl.float32)
    v_sum = tl.zeros([HEAD], tl.float32)
    v_sum_tail = tl.zeros([TAIL if TAIL > 0 else HEAD], tl.float32)
    for n0 in range(0, tl.where(m0 < valid, valid, 0), BLOCK_N):
        p = _columns(map_ptr, m0, pitch, valid, n0, pitch, PITCH, BLOCK_M, BLOCK_N, True)
        v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        if RESOFTMAX:
            e = _weigh(p.to(tl.float32), RESOFTMAX)
            total += tl.sum(e, 1)
            v_sum += tl.sum(v.to(tl.float32), 0)
            if TAIL > 0:
                v_sum_tail += tl.sum(v_tail.to(tl.float32), 0)
            p = e.to(v.dtype)
        acc, acc_tail = _accumulate(acc, acc_tail, p, v, v_tail, TAIL, PRECISION)
    _finish(
        out_ptr, None, acc, acc_tail, total, v_sum, v_sum_tail, b, h, m0, valid, T, H,
        D, HEAD, TAIL, RESOFTMAX, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _project(
    x_ptr, weight_ptr, bias_ptr, n0, x_t, h, col, valid,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Columns col : col + WIDTH of one head's values, x W_h^T + b_h for a block of frames. -> [N, WIDTH] float32"""
    column = col + tl.arange(0, WIDTH)
    acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = _columns(x_ptr, n0, x_t, valid, c0, C, ALIGN, BLOCK_N, BLOCK_C, C % BLOCK_C > 0)
        at = weight_ptr + (h * D + column)[:, None] * C + c[None, :]
        w = tl.load(at, mask=(column < D)[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + h * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    return tl.where((n0 + tl.arange(0, BLOCK_N) < valid)[:, None], acc, 0.0)


@triton.jit(do_not_specialize=["T"])
def reattend_fused_kernel(
    q_ptr, k_ptr, x_ptr, weight_ptr, bias_ptr, lse_ptr, lengths_ptr, out_ptr, norm_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, x_b, x_t,
    T, H, scale,
    C: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, RESOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A kept map times values that are projected here, tile by tile, and never written to memory."""
    b, h, m0, valid = _place(T, H, lengths_ptr, BLOCK_M)
    m = m0 + tl.arange(0, BLOCK_M)
    q, q_tail = _load(_head(q_ptr, b, h, q_b, q_h, ALIGN), m0, q_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_M)
    lse = tl.load(lse_ptr + (b * H + h) * T + m, mask=m < valid, other=0.0)
    k_ptr = _head(k_ptr, b, h, k_b, k_h, ALIGN)
    x_ptr += b * x_b
    acc, acc_tail = _zeros(BLOCK_M, HEAD, TAIL)
    total = tl.zeros([BLOCK_M], tl.float32)
    v_sum = tl.zeros([HEAD], tl.float32)
    v_sum_tail = tl.zeros([TAIL if TAIL > 0 else HEAD], tl.float32)
    for n0 in range(0, tl.where(m0 < valid, valid, 0), BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N) < valid
        v = _project(
            x_ptr, weight_ptr, bias_ptr, n0, x_t, h, 0, valid, C, D, HEAD, ALIGN, PRECISION, BLOCK_N, BLOCK_C
        )  # fmt: skip
        v_tail = v
        if TAIL > 0:
            v_tail = _project(
                x_ptr, weight_ptr, bias_ptr, n0, x_t, h, HEAD, valid, C, D, TAIL, ALIGN, PRECISION, BLOCK_N, BLOCK_C
            )  # fmt: skip
        k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        p = _weigh(_probabilities(q, q_tail, k, k_tail, lse, key, scale, TAIL, PRECISION), RESOFTMAX)
        low = k.dtype
        acc, acc_tail = _accumulate(acc, acc_tail, p.to(low), v.to(low), v_tail.to(low), TAIL, PRECISION)
        if RESOFTMAX:
            total += tl.sum(p, 1)
            v_sum += tl.sum(v, 0)
            if TAIL > 0:
                v_sum_tail += tl.sum(v_tail, 0)
    _finish(
        out_ptr, norm_ptr, acc, acc_tail, total, v_sum, v_sum_tail, b, h, m0, valid, T, H,
        D, HEAD, TAIL, RESOFTMAX, BLOCK_M,
    )  # fmt: skip


# ---- backward ---------------------------------------------------------------
# The second softmax divides by Z, T to T + 1.72: its gradients carry T / Z, as 1 / Z would leave float16's range where
# gradients are small, and are divided by T when they are stored.


@triton.jit
def _divisor(valid, RESOFTMAX: tl.constexpr):
    """What the gradients of a second softmax are multiplied with on the way."""
    if RESOFTMAX:
        return tl.cast(tl.maximum(valid, 1), tl.float32)
    return 1.0


@triton.jit
def _map_gradient(
    u, u_tail, v, v_tail, p, shift, keep, inverse_keep,
    TAIL: tl.constexpr, PRECISION: tl.constexpr, RESOFTMAX: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of the map before dropout, dp in the module docstring of reuse_attention.py."""
    dp = _inner(u, u_tail, v, v_tail, TAIL, PRECISION)
    if RESOFTMAX:
        dp = tl.exp2(p * LOG2E) * (dp - shift)
    if DROPOUT:
        dp = tl.where(keep, dp * inverse_keep, 0.0)
    return dp


@triton.jit(do_not_specialize=["T"])
def backward_q_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, norm_ptr, lengths_ptr, seed_ptr, dq_ptr, delta_ptr, shift_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, H, scale, threshold, inverse_keep,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    RESOFTMAX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and the row terms that backward_kv_kernel needs: delta = sum_j p dp, and shift = D T / Z for resoftmax."""
    b, h, m0, valid = _place(T, H, lengths_ptr, BLOCK_M)
    pair = b * H + h
    m = m0 + tl.arange(0, BLOCK_M)
    row = m < valid
    rows = pair * T + m
    DROPOUT: tl.constexpr = seed_ptr is not None
    q, q_tail = _load(_head(q_ptr, b, h, q_b, q_h, ALIGN), m0, q_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_M)
    k_ptr = _head(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = _head(v_ptr, b, h, v_b, v_h, ALIGN)
    dense = (b * T * H + h) * D
    u, u_tail = _load(g_ptr + dense, m0, H * D, valid, D, HEAD, TAIL, _dense_align(D), BLOCK_M)
    o, o_tail = _load(out_ptr + dense, m0, H * D, valid, D, HEAD, TAIL, _dense_align(D), BLOCK_M)
    lse = tl.load(lse_ptr + rows, mask=row, other=0.0)
    delta = tl.sum(u.to(tl.float32) * o.to(tl.float32), 1)
    if TAIL > 0:
        delta += tl.sum(u_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
    shift = delta
    keys = tl.where(m0 < valid, valid, 0)
    divisor = _divisor(valid, RESOFTMAX)
    if RESOFTMAX:
        factor = divisor / tl.load(norm_ptr + rows, mask=row, other=1.0)
        u = (u.to(tl.float32) * factor[:, None]).to(q.dtype)
        if TAIL > 0:
            u_tail = (u_tail.to(tl.float32) * factor[:, None]).to(q.dtype)
        shift = delta * factor
        tl.store(shift_ptr + rows, shift, mask=m < T)
        # the first softmax's row term has no closed form here: one pass over the keys for it
        delta = tl.zeros([BLOCK_M], tl.float32)
        for n0 in range(0, keys, BLOCK_N):
            key = n0 + tl.arange(0, BLOCK_N) < valid
            k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
            v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
            p = _probabilities(q, q_tail, k, k_tail, lse, key, scale, TAIL, PRECISION)
            dp = _map_gradient(
                u, u_tail, v, v_tail, p, shift[:, None], True, inverse_keep, TAIL, PRECISION, True, False
            )  # fmt: skip
            delta += tl.sum(p * dp, 1)
    tl.store(delta_ptr + rows, delta, mask=m < T)
    dq, dq_tail = _zeros(BLOCK_M, HEAD, TAIL)
    for n0 in range(0, keys, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        p = _probabilities(q, q_tail, k, k_tail, lse, n < valid, scale, TAIL, PRECISION)
        keep = True
        if DROPOUT:
            keep = _kept(seed_ptr, pair, m[:, None], n[None, :], T, threshold)
        dp = _map_gradient(
            u, u_tail, v, v_tail, p, shift[:, None], keep, inverse_keep, TAIL, PRECISION, RESOFTMAX, DROPOUT
        )  # fmt: skip
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq, dq_tail = _accumulate(dq, dq_tail, ds, k, k_tail, TAIL, PRECISION)
    scale /= divisor
    _store(dq_ptr + dense, m0, H * D, T, dq * scale, dq_tail * scale, D, HEAD, TAIL, BLOCK_M)


@triton.jit(do_not_specialize=["T"])
def backward_kv_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, norm_ptr, delta_ptr, shift_ptr, lengths_ptr, seed_ptr, dk_ptr, dv_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, H, scale, threshold, inverse_keep,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    RESOFTMAX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys; tiles of the map are transposed, [N, M]."""
    b, h, n0, valid = _place(T, H, lengths_ptr, BLOCK_N)
    pair = b * H + h
    n = n0 + tl.arange(0, BLOCK_N)
    DROPOUT: tl.constexpr = seed_ptr is not None
    k, k_tail = _load(_head(k_ptr, b, h, k_b, k_h, ALIGN), n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
    v, v_tail = _load(_head(v_ptr, b, h, v_b, v_h, ALIGN), n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
    q_ptr = _head(q_ptr, b, h, q_b, q_h, ALIGN)
    dense = (b * T * H + h) * D
    dk, dk_tail = _zeros(BLOCK_N, HEAD, TAIL)
    dv, dv_tail = _zeros(BLOCK_N, HEAD, TAIL)
    divisor = _divisor(valid, RESOFTMAX)
    u_sum = tl.zeros([HEAD], tl.float32)
    u_sum_tail = tl.zeros([TAIL if TAIL > 0 else HEAD], tl.float32)
    for m0 in range(0, tl.where(n0 < valid, valid, 0), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        row = m < valid
        rows = pair * T + m
        q, q_tail = _load(q_ptr, m0, q_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_M)
        u, u_tail = _load(g_ptr + dense, m0, H * D, valid, D, HEAD, TAIL, _dense_align(D), BLOCK_M)
        lse = tl.load(lse_ptr + rows, mask=row, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=row, other=0.0)
        shift = delta
        s = _inner(k, k_tail, q, q_tail, TAIL, PRECISION) * (scale * LOG2E)
        p = tl.where((n < valid)[:, None], tl.exp2(s - (lse * LOG2E)[None, :]), 0.0)  # [N, M]
        weights = _weigh(p, RESOFTMAX)
        if RESOFTMAX:
            factor = divisor / tl.load(norm_ptr + rows, mask=row, other=1.0)
            shift = tl.load(shift_ptr + rows, mask=row, other=0.0)
            scaled = u.to(tl.float32) * factor[:, None]
            u_sum += tl.sum(scaled, 0)
            u = scaled.to(q.dtype)
            if TAIL > 0:
                scaled_tail = u_tail.to(tl.float32) * factor[:, None]
                u_sum_tail += tl.sum(scaled_tail, 0)
                u_tail = scaled_tail.to(q.dtype)
        keep = True
        if DROPOUT:
            keep = _kept(seed_ptr, pair, m[None, :], n[:, None], T, threshold)
            weights = tl.where(keep, weights * inverse_keep, 0.0)
        dv, dv_tail = _accumulate(dv, dv_tail, weights.to(q.dtype), u, u_tail, TAIL, PRECISION)
        dp = _map_gradient(
            v, v_tail, u, u_tail, p, shift[None, :], keep, inverse_keep, TAIL, PRECISION, RESOFTMAX, DROPOUT
        )  # fmt: skip
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk, dk_tail = _accumulate(dk, dk_tail, ds, q, q_tail, TAIL, PRECISION)
    if RESOFTMAX:
        key = tl.where(n < valid, 1 / divisor, 0.0)[:, None]
        dv = key * (dv + u_sum[None, :])
        if TAIL > 0:
            dv_tail = key * (dv_tail + u_sum_tail[None, :])
    scale /= divisor
    _store(dk_ptr + dense, n0, H * D, T, dk * scale, dk_tail * scale, D, HEAD, TAIL, BLOCK_N)
    _store(dv_ptr + dense, n0, H * D, T, dv, dv_tail, D, HEAD, TAIL, BLOCK_N)


# ---- shipped configurations -------------------------------------------------


class Config(NamedTuple):
    """Blocks of queries and keys, and how the compiler schedules them."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def head_tiles(d: int) -> tuple[int, int]:
    """Head width -> HEAD and TAIL, the least padding that tensor cores take: 40 -> 32 + 16, 64 -> 64, 80 -> 64 + 16."""
    if d <= 16:
        return 16, 0
    head = 1 << (d.bit_length() - 1)
    if head == d:
        return head, 0
    tail = max(16, triton.next_power_of_2(d - head))
    return (2 * head, 0) if tail == head else (head, tail)


def config(kernel: str, d: int, dtype: torch.dtype, crowded: bool = False) -> Config:
    """The configuration shipped for a kernel: fixed, so that no call pays for autotuning and reruns are equal.

    `crowded` (dropout or the second softmax) keeps more values alive in a tile. Chosen so that nothing spills on sm_90.
    """
    if dtype == torch.float32:
        return _float32_config(kernel, d, crowded)
    if kernel == "backward_kv" and (crowded or d > 48):
        return Config(32, 64, 8 if d > 64 and crowded else 4, 2)
    if kernel == "backward_q" and d > 64:
        return Config(64, 32, 4, 2)
    if "backward" in kernel:
        return Config(64, 64, 4, 2)
    if kernel == "reattend_kept":  # it reads and hardly computes: small blocks, many loads in flight
        return Config(64, 64 if crowded else 128, 4, 2 if d > 64 else 3)
    return Config(128, 64, 8, 2)


def _float32_config(kernel: str, d: int, crowded: bool) -> Config:
    """True float32 has no tensor cores: operands live in registers, so tiles are small and warps are many.

    Wide heads keep to the 99 KiB of shared memory that a program has on sm_86, sm_89 and sm_120.
    """
    small = Config(32, 16, 8, 1)
    if kernel == "attend":
        return Config(64, 32, 8, 2) if d <= 64 else Config(32, 16, 8, 2)
    if kernel in ("reattend", "reattend_kept"):
        if d > 64:
            return small
        if crowded and d <= 48:
            return Config(64, 16, 8, 2) if kernel == "reattend" else Config(64, 32, 8, 1)
        return Config(64, 32, 8, 2)
    if kernel == "reattend_fused":
        if d > 64 or (crowded and d <= 48):
            return small
        return Config(32, 32, 8, 2) if d > 48 else Config(64, 32, 8, 2)
    if kernel == "backward_q":
        if d > 64:
            return Config(32, 16, 8, 2)
        if crowded:
            return Config(32, 32, 8, 1) if d > 48 else Config(64, 32, 8, 3)
        return Config(64, 32, 8, 2)
    if d > 64 and crowded:
        return small
    return Config(16, 32, 8, 1) if crowded and d > 48 else Config(32, 32, 8, 1)


# ---- launchers --------------------------------------------------------------


def _rows_dense(*tensors: Tensor) -> list[Tensor]:
    """The tensors with adjacent columns, as wide loads need them; every other stride is free."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _align(*strides: int) -> int:
    """The largest power of two, at most 16, that divides every stride: what the compiler may assume of row starts."""
    align = 16
    for stride in strides:
        while stride % align:
            align //= 2
    return align


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:-1]]


def _scalars(dropout: float) -> tuple[int, float]:
    return int(dropout * 2**31), 1 / (1 - dropout)


def _tiles(d: int) -> dict[str, int]:
    head, tail = head_tiles(d)
    return {"D": d, "HEAD": head, "TAIL": tail}


def _grid(shape: torch.Size, block: int) -> tuple[int]:
    B, T, H, _ = shape
    return (triton.cdiv(T, block) * B * H,)


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, seed: Tensor | None, dropout: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, H D], log-sum-exp [B, H, T] in float32 and, with `keep`, the map [B, H, T, pitched(T)]."""
    q, k, v = _rows_dense(q, k, v)
    B, T, H, D = q.shape
    out = q.new_empty(B, T, H * D)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    kept = q.new_empty((B, H, T, pitched(T)) if keep else (0,))
    strides = _strides(q, k, v)
    shipped = config("attend", D, q.dtype, seed is not None)
    attend_kernel[_grid(q.shape, shipped.BLOCK_M)](
        q, k, v, contiguous(lengths), seed, out, lse, kept if keep else None, *strides, T, H, D**-0.5,
        *_scalars(dropout), **_tiles(D), ALIGN=_align(*strides), PRECISION=float32_precision(), **shipped._asdict(),
        **FUSED,
    )  # fmt: skip
    return out, lse, kept


def reattend_kept_forward(kept: Tensor, v: Tensor, lengths: Tensor | None, resoftmax: bool) -> Tensor:
    """A stored map [B, H, T, pitched(T)] times v [B, T, H, D] -> out [B, T, H D]."""
    (v,) = _rows_dense(v)
    B, T, H, D = v.shape
    out = v.new_empty(B, T, H * D)
    strides = _strides(v)
    shipped = config("reattend_kept", D, v.dtype, resoftmax)
    reattend_kept_kernel[_grid(v.shape, shipped.BLOCK_M)](
        kept.contiguous(), v, contiguous(lengths), out, *strides, T, H,
        **_tiles(D), ALIGN=_align(*strides), PRECISION=float32_precision(), RESOFTMAX=resoftmax, **shipped._asdict(),
        **FUSED,
    )  # fmt: skip
    return out


def reattend_forward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, lengths: Tensor | None, resoftmax: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H D], and the normaliser [B, H, T] of the second softmax (empty unless resoftmax)."""
    q, k, v = _rows_dense(q, k, v)
    B, T, H, D = q.shape
    out = q.new_empty(B, T, H * D)
    norm = lse.new_empty((B, H, T) if resoftmax else (0,))
    strides = _strides(q, k, v)
    shipped = config("reattend", D, q.dtype, resoftmax)
    reattend_kernel[_grid(q.shape, shipped.BLOCK_M)](
        q, k, v, lse.contiguous(), contiguous(lengths), out, norm, *strides, T, H, D**-0.5,
        **_tiles(D), ALIGN=_align(*strides), PRECISION=float32_precision(), RESOFTMAX=resoftmax, **shipped._asdict(),
        **FUSED,
    )  # fmt: skip
    return out, norm


def reattend_fused_forward(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    lengths: Tensor | None,
    resoftmax: bool,
) -> tuple[Tensor, Tensor]:
    """Like reattend_forward, with v = x weight^T + bias projected inside the kernel."""
    q, k, x = _rows_dense(q, k, x)
    B, T, H, D = q.shape
    out = q.new_empty(B, T, H * D)
    norm = lse.new_empty((B, H, T) if resoftmax else (0,))
    strides = _strides(q, k, x)
    shipped = config("reattend_fused", D, q.dtype, resoftmax)
    reattend_fused_kernel[_grid(q.shape, shipped.BLOCK_M)](
        q, k, x, weight.contiguous(), contiguous(bias), lse.contiguous(), contiguous(lengths), out, norm, *strides,
        T, H, D**-0.5, C=x.shape[2], **_tiles(D), ALIGN=_align(*strides), PRECISION=float32_precision(),
        RESOFTMAX=resoftmax, BLOCK_C=32, **shipped._asdict(), **FUSED,
    )  # fmt: skip
    return out, norm


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    norm: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    resoftmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous [B, T, H, D]."""
    q, k, v = _rows_dense(q, k, v)
    B, T, H, D = q.shape
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    delta = lse.new_empty(B, H, T)
    shift = lse.new_empty(B, H, T) if resoftmax else delta
    strides = _strides(q, k, v)
    common: dict[str, Any] = {
        **_tiles(D), "ALIGN": _align(*strides), "PRECISION": float32_precision(), "RESOFTMAX": resoftmax
    }  # fmt: skip
    scalars = (*strides, T, H, D**-0.5, *_scalars(dropout))
    g, out, lse, norm = (t.contiguous() for t in (d_out, out, lse, norm))
    lengths = contiguous(lengths)
    crowded = resoftmax or seed is not None
    shipped = config("backward_q", D, q.dtype, crowded)
    backward_q_kernel[_grid(q.shape, shipped.BLOCK_M)](
        g, q, k, v, out, lse, norm, lengths, seed, dq, delta, shift, *scalars, **common, **shipped._asdict(), **FUSED
    )
    shipped = config("backward_kv", D, q.dtype, crowded)
    backward_kv_kernel[_grid(q.shape, shipped.BLOCK_N)](
        g, q, k, v, lse, norm, delta, shift, lengths, seed, dk, dv, *scalars, **common, **shipped._asdict(), **FUSED
    )
    return dq, dk, dv
