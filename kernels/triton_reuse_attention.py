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
from armhubert.kernels.runtime import adjacent, contiguous, launch_options, product_precision

LOG2E = tl.constexpr(1.4426950408889634)
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
def _valid_keys(tile, other, n0, valid, BLOCK_N: tl.constexpr):
    """A tile [M, N] with `other` at invalid keys, which only the last block has: the others pay a branch, no masks."""
    if n0 + BLOCK_N > valid:
        tile = tl.where((n0 + tl.arange(0, BLOCK_N) < valid)[None, :], tile, other)
    return tile


@triton.jit
def _philox(seed, c0, c1, c2, c3):
    """tl.philox with one wide product where that has two, for the high and the low half: fewer instructions."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32 & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _dropout_factors(seed_ptr, pair, m0, i, n0, j, threshold, inverse_keep):
    """Dropout's factors of map entries (m0 + i, n0 + j) of one utterance and head: the same in every kernel.

    Entries (m, n), (m, n + 8), (m + 8, n) and (m + 8, n + 8) take the four words of one draw from a counter. In a
    matrix unit's tiles, also transposed ones, they are one thread's, and the compiler makes one draw of the four that
    are written here. It sees that by indices inside a tile, so the tile's start, a multiple of 16, is added afterwards.
    """
    row = (m0 // 2 + (i // 16 * 8 + i % 8)).to(tl.uint32, bitcast=True)
    column = (n0 // 2 + (j // 16 * 8 + j % 8)).to(tl.uint32, bitcast=True)
    a, b, c, d = _philox(tl.load(seed_ptr), row, column, pair.to(tl.uint32), tl.full([], 0, tl.uint32))
    word = tl.where(i % 16 < 8, tl.where(j % 16 < 8, a, b), tl.where(j % 16 < 8, c, d))
    return tl.where(word.to(tl.int32, bitcast=True) >= threshold, inverse_keep, 0.0)


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
        k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        s = _valid_keys(_inner(q, q_tail, k, k_tail, TAIL, PRECISION), float("-inf"), n0, valid, BLOCK_N)
        new_top = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(s * (scale * LOG2E) - new_top[:, None])
        total = total * rescale + tl.sum(p, 1)
        if seed_ptr is not None:
            i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
            p *= _dropout_factors(seed_ptr, pair, m0, i, n0, j, threshold, inverse_keep)
        acc *= rescale[:, None]
        if TAIL > 0:
            acc_tail *= rescale[:, None]
        v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        acc, acc_tail = _accumulate(acc, acc_tail, p.to(v.dtype), v, v_tail, TAIL, PRECISION)
        top = new_top
    row = m < valid
    factor = tl.where(row, 1.0 / tl.where(row, total, 1.0), 0.0)[:, None]
    out_ptr += (b * T * H + h) * D
    _store(out_ptr, m0, H * D, T, acc * factor, acc_tail * factor, D, HEAD, TAIL, BLOCK_M)
    lse = tl.where(row, top + tl.log2(tl.where(row, total, 1.0)), 0.0)
    tl.store(lse_ptr + pair * T + m, lse, mask=m < T)
    if map_ptr is not None:
        # a row's sum is known only now, so its logits are made once more
        pitch = _pitch(T)
        map_ptr += pair * T * pitch
        for n0 in range(0, pitch, BLOCK_N):
            k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
            p = _probabilities(q, q_tail, k, k_tail, lse, n0, valid, scale, TAIL, PRECISION, BLOCK_N)
            p = tl.where(row[:, None], p, 0.0)
            _store_columns(map_ptr, m0, pitch, T, p, n0, pitch, BLOCK_M, BLOCK_N)


@triton.jit
def _expm1(p, dtype: tl.constexpr):
    """exp(p) - 1 within 0 <= p <= 1, of which it errs by 4e-6, or by 4e-9 and rounding where `dtype` is float32.

    A polynomial: the unit for exponentials is the busy one here, and small p keep their digits.
    """
    if dtype == tl.float32:
        series = 0.0003059550987754148 * p + 0.0012353440643184126
        series = series * p + 0.008436728543975215
        series = series * p + 0.0416321720475402
        series = series * p + 0.16667188063779398
        series = series * p + 0.4999997413149445
    else:
        series = 0.012537741930595267 * p + 0.03797293177769474
        series = series * p + 0.16788653980584048
        series = series * p + 0.49987847689308346
    return p * p * series + p


@triton.jit
def _weigh(p, dtype: tl.constexpr, RESOFTMAX: tl.constexpr):
    """A tile of the map -> weights of v: itself, or exp(p) - 1, the second softmax's part beyond the plain mean."""
    if RESOFTMAX:
        return _expm1(p, dtype)
    return p


@triton.jit
def _probabilities(
    q, q_tail, k, k_tail, lse, n0, valid, scale, TAIL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Tile of a map made again: no maximum, as the log-sum-exp is known. -> [M, N], 0 at invalid keys."""
    s = _inner(q, q_tail, k, k_tail, TAIL, PRECISION)
    return _valid_keys(tl.exp2(s * (scale * LOG2E) - lse[:, None]), 0.0, n0, valid, BLOCK_N)


@triton.jit
def _finish(
    out_ptr, norm_ptr, acc, acc_tail, total, v_sum, v_sum_tail, b, h, m0, valid, T, H,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, RESOFTMAX: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the sum of all values and normalise (resoftmax), clear padded rows and store."""
    m = m0 + tl.arange(0, BLOCK_M)
    row = m < valid
    factor = tl.where(row, 1.0, 0.0)
    if RESOFTMAX:
        norm = tl.where(row, total + tl.cast(valid, tl.float32), 1.0)
        if norm_ptr is not None:
            tl.store(norm_ptr + (b * H + h) * T + m, norm, mask=m < T)
        factor = factor / norm
        acc += tl.sum(v_sum, 0)[None, :]
        if TAIL > 0:
            acc_tail += tl.sum(v_sum_tail, 0)[None, :]
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
    """A map made again from q, k and its log-sum-exp, times given values."""
    b, h, m0, valid = _place(T, H, lengths_ptr, BLOCK_M)
    m = m0 + tl.arange(0, BLOCK_M)
    q, q_tail = _load(_head(q_ptr, b, h, q_b, q_h, ALIGN), m0, q_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_M)
    lse = tl.load(lse_ptr + (b * H + h) * T + m, mask=m < valid, other=0.0)
    k_ptr = _head(k_ptr, b, h, k_b, k_h, ALIGN)
    v_ptr = _head(v_ptr, b, h, v_b, v_h, ALIGN)
    acc, acc_tail = _zeros(BLOCK_M, HEAD, TAIL)
    total = tl.zeros([BLOCK_M], tl.float32)
    v_sum, v_sum_tail = _zeros(BLOCK_N, HEAD, TAIL)
    for n0 in range(0, tl.where(m0 < valid, valid, 0), BLOCK_N):
        k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        p = _probabilities(q, q_tail, k, k_tail, lse, n0, valid, scale, TAIL, PRECISION, BLOCK_N)
        p = _weigh(p, k.dtype, RESOFTMAX)
        acc, acc_tail = _accumulate(acc, acc_tail, p.to(v.dtype), v, v_tail, TAIL, PRECISION)
        if RESOFTMAX:
            total += tl.sum(p, 1)
            v_sum += v.to(tl.float32)
            if TAIL > 0:
                v_sum_tail += v_tail.to(tl.float32)
    _finish(
        out_ptr, norm_ptr, acc, acc_tail, total, v_sum, v_sum_tail, b, h, m0, valid, T, H,
        D, HEAD, TAIL, RESOFTMAX, BLOCK_M,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def reattend_stored_kernel(
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
    v_sum, v_sum_tail = _zeros(BLOCK_N, HEAD, TAIL)
    for n0 in range(0, tl.where(m0 < valid, valid, 0), BLOCK_N):
        p = _columns(map_ptr, m0, pitch, valid, n0, pitch, PITCH, BLOCK_M, BLOCK_N, True)
        v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        if RESOFTMAX:
            e = _weigh(p.to(tl.float32), v.dtype, RESOFTMAX)
            total += tl.sum(e, 1)
            v_sum += v.to(tl.float32)
            if TAIL > 0:
                v_sum_tail += v_tail.to(tl.float32)
            p = e.to(v.dtype)
        acc, acc_tail = _accumulate(acc, acc_tail, p, v, v_tail, TAIL, PRECISION)
    _finish(
        out_ptr, None, acc, acc_tail, total, v_sum, v_sum_tail, b, h, m0, valid, T, H,
        D, HEAD, TAIL, RESOFTMAX, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _biased(acc, bias_ptr, h, col, row, D: tl.constexpr, WIDTH: tl.constexpr):
    """Columns col : col + WIDTH of one head's projection with their bias, 0 in rows that are not valid."""
    if bias_ptr is not None:
        column = col + tl.arange(0, WIDTH)
        acc += tl.load(bias_ptr + h * D + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    return tl.where(row[:, None], acc, 0.0)


@triton.jit
def _project(
    x_ptr, weight_ptr, bias_ptr, n0, x_t, h, valid,
    C: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One head's values of a block of frames, x W_h^T + b_h, as two tiles in float32."""
    CHECK: tl.constexpr = C % BLOCK_C > 0
    w_align: tl.constexpr = _dense_align(C)
    first, end = h * D, h * D + D
    v, v_tail = _zeros(BLOCK_N, HEAD, TAIL)
    for c0 in range(0, C, BLOCK_C):
        x = _columns(x_ptr, n0, x_t, valid, c0, C, ALIGN, BLOCK_N, BLOCK_C, CHECK)
        w = _columns(weight_ptr, first, C, end, c0, C, w_align, HEAD, BLOCK_C, CHECK)
        v = tl.dot(x, tl.trans(w), v, input_precision=PRECISION)
        if TAIL > 0:
            w_tail = _columns(weight_ptr, first + HEAD, C, end, c0, C, w_align, TAIL, BLOCK_C, CHECK)
            v_tail = tl.dot(x, tl.trans(w_tail), v_tail, input_precision=PRECISION)
    row = n0 + tl.arange(0, BLOCK_N) < valid
    v = _biased(v, bias_ptr, h, 0, row, D, HEAD)
    if TAIL > 0:
        v_tail = _biased(v_tail, bias_ptr, h, HEAD, row, D, TAIL)
    return v, v_tail


@triton.jit(do_not_specialize=["T"])
def reattend_fused_kernel(
    q_ptr, k_ptr, x_ptr, weight_ptr, bias_ptr, lse_ptr, lengths_ptr, out_ptr, norm_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, x_b, x_t,
    T, H, scale,
    C: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, RESOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A map made again, times values that are projected here, tile by tile, and never written to memory."""
    b, h, m0, valid = _place(T, H, lengths_ptr, BLOCK_M)
    m = m0 + tl.arange(0, BLOCK_M)
    q, q_tail = _load(_head(q_ptr, b, h, q_b, q_h, ALIGN), m0, q_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_M)
    lse = tl.load(lse_ptr + (b * H + h) * T + m, mask=m < valid, other=0.0)
    k_ptr = _head(k_ptr, b, h, k_b, k_h, ALIGN)
    x_ptr += b * x_b
    acc, acc_tail = _zeros(BLOCK_M, HEAD, TAIL)
    total = tl.zeros([BLOCK_M], tl.float32)
    v_sum, v_sum_tail = _zeros(BLOCK_N, HEAD, TAIL)
    for n0 in range(0, tl.where(m0 < valid, valid, 0), BLOCK_N):
        v, v_tail = _project(
            x_ptr, weight_ptr, bias_ptr, n0, x_t, h, valid, C, D, HEAD, TAIL, ALIGN, PRECISION, BLOCK_N, BLOCK_C
        )  # fmt: skip
        k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        p = _probabilities(q, q_tail, k, k_tail, lse, n0, valid, scale, TAIL, PRECISION, BLOCK_N)
        p = _weigh(p, k.dtype, RESOFTMAX)
        low = k.dtype
        acc, acc_tail = _accumulate(acc, acc_tail, p.to(low), v.to(low), v_tail.to(low), TAIL, PRECISION)
        if RESOFTMAX:
            total += tl.sum(p, 1)
            v_sum += v
            if TAIL > 0:
                v_sum_tail += v_tail
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
    a, a_tail, b, b_tail, p, factor, shift, TAIL: tl.constexpr, PRECISION: tl.constexpr, RESOFTMAX: tl.constexpr
):  # fmt: skip
    """dp of reuse_attention.py's docstring for a tile after dropout, of u and v or, transposed, of v and u."""
    dp = _inner(a, a_tail, b, b_tail, TAIL, PRECISION)
    if RESOFTMAX:
        dp = (_expm1(p, a.dtype) + 1.0) * (dp * factor - shift)
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
    factor, shift = delta, delta  # for the second softmax alone
    keys = tl.where(m0 < valid, valid, 0)
    divisor = _divisor(valid, RESOFTMAX)
    if RESOFTMAX:
        factor = divisor / tl.load(norm_ptr + rows, mask=row, other=1.0)
        shift = delta * factor
        tl.store(shift_ptr + rows, shift, mask=m < T)
        # the first softmax's row term has no closed form here: one pass over the keys for it
        delta = tl.zeros([BLOCK_M], tl.float32)
        for n0 in range(0, keys, BLOCK_N):
            k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
            v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
            p = _probabilities(q, q_tail, k, k_tail, lse, n0, valid, scale, TAIL, PRECISION, BLOCK_N)
            dp = _map_gradient(u, u_tail, v, v_tail, p, factor[:, None], shift[:, None], TAIL, PRECISION, True)
            delta += tl.sum(p * dp, 1)
    tl.store(delta_ptr + rows, delta, mask=m < T)
    dq, dq_tail = _zeros(BLOCK_M, HEAD, TAIL)
    for n0 in range(0, keys, BLOCK_N):
        k, k_tail = _load(k_ptr, n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        v, v_tail = _load(v_ptr, n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
        p = _probabilities(q, q_tail, k, k_tail, lse, n0, valid, scale, TAIL, PRECISION, BLOCK_N)
        drop = 1.0
        if DROPOUT:
            i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
            drop = _dropout_factors(seed_ptr, pair, m0, i, n0, j, threshold, inverse_keep)
        dp = _map_gradient(u, u_tail, v, v_tail, p, factor[:, None], shift[:, None], TAIL, PRECISION, RESOFTMAX)
        ds = (p * (dp * drop - delta[:, None])).to(k.dtype)
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
    DROPOUT: tl.constexpr = seed_ptr is not None
    k, k_tail = _load(_head(k_ptr, b, h, k_b, k_h, ALIGN), n0, k_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
    v, v_tail = _load(_head(v_ptr, b, h, v_b, v_h, ALIGN), n0, v_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_N)
    q_ptr = _head(q_ptr, b, h, q_b, q_h, ALIGN)
    dense = (b * T * H + h) * D
    dk, dk_tail = _zeros(BLOCK_N, HEAD, TAIL)
    dv, dv_tail = _zeros(BLOCK_N, HEAD, TAIL)
    divisor = _divisor(valid, RESOFTMAX)
    u_sum, u_sum_tail = _zeros(BLOCK_M, HEAD, TAIL)
    for m0 in range(0, tl.where(n0 < valid, valid, 0), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        row = m < valid
        rows = pair * T + m
        q, q_tail = _load(q_ptr, m0, q_t, valid, D, HEAD, TAIL, ALIGN, BLOCK_M)
        u, u_tail = _load(g_ptr + dense, m0, H * D, valid, D, HEAD, TAIL, _dense_align(D), BLOCK_M)
        lse = tl.load(lse_ptr + rows, mask=row, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=row, other=0.0)
        factor, shift = delta, delta  # for the second softmax alone
        # rows of invalid keys are not cleared: they reach nothing but their own gradients, which are cleared at the end
        p = tl.exp2(_inner(k, k_tail, q, q_tail, TAIL, PRECISION) * (scale * LOG2E) - lse[None, :])  # [N, M]
        weights = _weigh(p, q.dtype, RESOFTMAX)
        if RESOFTMAX:
            factor = divisor / tl.load(norm_ptr + rows, mask=row, other=divisor)  # 1 in padding: T leaves float16
            shift = tl.load(shift_ptr + rows, mask=row, other=0.0)
            weights *= factor[None, :]
            u_sum += u.to(tl.float32) * factor[:, None]
            if TAIL > 0:
                u_sum_tail += u_tail.to(tl.float32) * factor[:, None]
        drop = 1.0
        if DROPOUT:
            i, j = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
            drop = _dropout_factors(seed_ptr, pair, m0, i, n0, j, threshold, inverse_keep)
            weights *= drop
        dv, dv_tail = _accumulate(dv, dv_tail, weights.to(q.dtype), u, u_tail, TAIL, PRECISION)
        dp = _map_gradient(v, v_tail, u, u_tail, p, factor[None, :], shift[None, :], TAIL, PRECISION, RESOFTMAX)
        ds = (p * (dp * drop - delta[None, :])).to(q.dtype)
        dk, dk_tail = _accumulate(dk, dk_tail, ds, q, q_tail, TAIL, PRECISION)
    key = (n0 + tl.arange(0, BLOCK_N) < valid)[:, None]
    if RESOFTMAX:
        dv = (dv + tl.sum(u_sum, 0)[None, :]) / divisor
        if TAIL > 0:
            dv_tail = (dv_tail + tl.sum(u_sum_tail, 0)[None, :]) / divisor
    scale /= divisor
    dk, dk_tail = tl.where(key, dk * scale, 0.0), tl.where(key, dk_tail * scale, 0.0)
    _store(dk_ptr + dense, n0, H * D, T, dk, dk_tail, D, HEAD, TAIL, BLOCK_N)
    _store(dv_ptr + dense, n0, H * D, T, tl.where(key, dv, 0.0), tl.where(key, dv_tail, 0.0), D, HEAD, TAIL, BLOCK_N)


# ---- shipped configurations -------------------------------------------------


class Config(NamedTuple):
    """Blocks of queries and keys, and how the compiler schedules them."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Most registers of a thread (sm_90), fewer than the compiler would take, so that more programs are resident."""


def head_tiles(d: int) -> tuple[int, int]:
    """Head width -> HEAD and TAIL, the least padding that tensor cores take: 40 -> 32 + 16, 64 -> 64, 80 -> 64 + 16."""
    if d <= 16:
        return 16, 0
    head = 1 << (d.bit_length() - 1)
    if head == d:
        return head, 0
    tail = max(16, triton.next_power_of_2(d - head))
    return (2 * head, 0) if tail == head else (head, tail)


def config(kernel: str, d: int, dtype: torch.dtype, *, dropout: bool = False, resoftmax: bool = False) -> Config:
    """The configuration shipped for a kernel: fixed, so that no call pays for autotuning and reruns are equal.

    Dropout and the second softmax keep more values alive in a tile. Chosen so that nothing spills on sm_90, and 8 to 16
    warps are resident there: between products a kernel waits for the matrix unit.
    """
    crowded = dropout or resoftmax
    if dtype == torch.float32:
        return _float32_config(kernel, d, crowded)
    narrow = d <= 48 and d % 8 == 0  # rows that are not aligned take more registers
    if kernel == "attend" and dropout:
        return Config(64, 64, 4, 2, 128 if narrow else None)
    if kernel == "reattend" and resoftmax and narrow:
        return Config(128, 64, 8, 2, 128)
    if kernel == "backward_q" and dropout and narrow:
        return Config(64, 64, 4, 2, 168)
    if kernel == "backward_kv" and (crowded or d > 48):
        return Config(32, 64, 8 if d > 64 and crowded else 4, 2)
    if kernel == "backward_q" and d > 64:
        return Config(64, 32, 4, 2)
    if "backward" in kernel:
        return Config(64, 64, 4, 2)
    if kernel == "reattend_stored":  # it reads and hardly computes: small blocks, many loads in flight
        return Config(64, 64 if crowded else 128, 4, 2 if d > 64 else 3)
    return Config(128, 64, 8, 2)


def _float32_config(kernel: str, d: int, crowded: bool) -> Config:
    """True float32 has no tensor cores: operands live in registers, so tiles are small and warps are many.

    Wide heads keep to the 99 KiB of shared memory that a program has on sm_86, sm_89 and sm_120.
    """
    small = Config(32, 16, 8, 1)
    if kernel == "attend":
        return Config(64, 32, 8, 2) if d <= 64 else Config(32, 32 if crowded else 16, 8, 2)
    if kernel in ("reattend", "reattend_stored"):
        if d > 64:
            return small
        if crowded and d <= 48:
            return Config(64, 16, 8, 2) if kernel == "reattend" else Config(64, 32, 8, 1)
        return Config(64, 32, 8, 2)
    if kernel == "reattend_fused":
        if d > 64 or (crowded and d <= 48):
            return small
        return Config(32, 32, 8, 2)
    if kernel == "backward_q":
        if d > 64:
            return Config(32, 16, 8, 2)
        if crowded:
            return Config(32, 32, 8, 1) if d > 48 else Config(64, 32, 8, 3)
        return Config(64, 32, 8, 2)
    if d > 64 and crowded:
        return small
    return Config(16, 32, 8, 1) if crowded and d > 48 else Config(32, 32, 8, 1)


def inner_block(d: int, dtype: torch.dtype) -> int:
    """Step along the model's width where values are projected inside: wide steps wait less often."""
    if dtype == torch.float32:
        return 32 if d <= 64 else 16
    return 128 if d <= 48 else 64


# ---- launchers --------------------------------------------------------------


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
    return int(dropout * 2**32) - 2**31, 1 / (1 - dropout)


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
    q, k, v = map(adjacent, (q, k, v))
    B, T, H, D = q.shape
    out = q.new_empty(B, T, H * D)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    stored = q.new_empty((B, H, T, pitched(T)) if keep else (0,))
    strides = _strides(q, k, v)
    shipped = config("attend", D, q.dtype, dropout=seed is not None)
    attend_kernel[_grid(q.shape, shipped.BLOCK_M)](
        q, k, v, contiguous(lengths), seed, out, lse, stored if keep else None, *strides, T, H, D**-0.5,
        *_scalars(dropout), **_tiles(D), ALIGN=_align(*strides), PRECISION=product_precision(q.dtype),
        **launch_options(shipped),
    )  # fmt: skip
    return out, lse, stored


def reattend_stored_forward(stored: Tensor, v: Tensor, lengths: Tensor | None, resoftmax: bool) -> Tensor:
    """A stored map [B, H, T, pitched(T)] times v [B, T, H, D] -> out [B, T, H D]."""
    v = adjacent(v)
    B, T, H, D = v.shape
    out = v.new_empty(B, T, H * D)
    strides = _strides(v)
    shipped = config("reattend_stored", D, v.dtype, resoftmax=resoftmax)
    reattend_stored_kernel[_grid(v.shape, shipped.BLOCK_M)](
        stored.contiguous(), v, contiguous(lengths), out, *strides, T, H,
        **_tiles(D), ALIGN=_align(*strides), PRECISION=product_precision(v.dtype), RESOFTMAX=resoftmax,
        **launch_options(shipped),
    )  # fmt: skip
    return out


def reattend_forward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, lengths: Tensor | None, resoftmax: bool
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H D], and the normaliser [B, H, T] of the second softmax (empty unless resoftmax)."""
    q, k, v = map(adjacent, (q, k, v))
    B, T, H, D = q.shape
    out = q.new_empty(B, T, H * D)
    norm = lse.new_empty((B, H, T) if resoftmax else (0,))
    strides = _strides(q, k, v)
    shipped = config("reattend", D, q.dtype, resoftmax=resoftmax)
    reattend_kernel[_grid(q.shape, shipped.BLOCK_M)](
        q, k, v, lse.contiguous(), contiguous(lengths), out, norm, *strides, T, H, D**-0.5,
        **_tiles(D), ALIGN=_align(*strides), PRECISION=product_precision(q.dtype), RESOFTMAX=resoftmax,
        **launch_options(shipped),
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
    q, k, x = map(adjacent, (q, k, x))
    B, T, H, D = q.shape
    out = q.new_empty(B, T, H * D)
    norm = lse.new_empty((B, H, T) if resoftmax else (0,))
    strides = _strides(q, k, x)
    shipped = config("reattend_fused", D, q.dtype, resoftmax=resoftmax)
    reattend_fused_kernel[_grid(q.shape, shipped.BLOCK_M)](
        q, k, x, weight.contiguous(), contiguous(bias), lse.contiguous(), contiguous(lengths), out, norm, *strides,
        T, H, D**-0.5, C=x.shape[2], **_tiles(D), ALIGN=_align(*strides), PRECISION=product_precision(q.dtype),
        RESOFTMAX=resoftmax, BLOCK_C=inner_block(D, q.dtype), **launch_options(shipped),
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
    q, k, v = map(adjacent, (q, k, v))
    B, T, H, D = q.shape
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    delta = lse.new_empty(B, H, T)
    shift = lse.new_empty(B, H, T) if resoftmax else delta
    strides = _strides(q, k, v)
    common: dict[str, Any] = {
        **_tiles(D), "ALIGN": _align(*strides), "PRECISION": product_precision(q.dtype), "RESOFTMAX": resoftmax
    }  # fmt: skip
    scalars = (*strides, T, H, D**-0.5, *_scalars(dropout))
    g, out, lse, norm = (t.contiguous() for t in (d_out, out, lse, norm))
    lengths = contiguous(lengths)
    crowds: dict[str, bool] = {"dropout": seed is not None, "resoftmax": resoftmax}
    shipped = config("backward_q", D, q.dtype, **crowds)
    backward_q_kernel[_grid(q.shape, shipped.BLOCK_M)](
        g, q, k, v, out, lse, norm, lengths, seed, dq, delta, shift, *scalars, **common, **launch_options(shipped)
    )
    shipped = config("backward_kv", D, q.dtype, **crowds)
    backward_kv_kernel[_grid(q.shape, shipped.BLOCK_N)](
        g, q, k, v, lse, norm, delta, shift, lengths, seed, dk, dv, *scalars, **common, **launch_options(shipped)
    )
    return dq, dk, dv
