# mypy: disallow-untyped-defs=False
# (jit functions are typed by Triton)
"""Triton kernels of the convolution front end; formulas and public functions are in conv_frontend.py.

Legend: B utterances, T valid frames, P rows an utterance has in a buffer (padded_counts: P of one layer is the stride
times P of the next), C input and N output channels, K taps of the first layer. Maps lie channels last, [B P, C]: row r
of a layer needs rows s r .. s r + k - 1 of the one before, k C adjacent numbers, so a layer is one matrix product over
the batch whose left rows start s C apart. Rows past an utterance's T are stored as 0.

The first layer's map, the widest, is not stored where a 1x1 convolution follows: its tiles are made, activated and
consumed in registers. Every program owns what it writes: no atomics, so reruns are bitwise equal.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from armhubert.kernels.conv_frontend import padded_counts
from armhubert.kernels.runtime import FP_FUSION, adjacent, contiguous, frame_counts, launch_options, product_precision
from armhubert.kernels.torch_conv_frontend import waveform_gradient
from armhubert.kernels.triton_gelu import gelu, normal_cdf

# ---- tiles ------------------------------------------------------------------


@triton.jit
def _windows(
    x_ptr, shift_ptr, b, x_b, m0, T, dtype: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Centred windows m0 .. m0 + ROWS of one utterance, 0 from row T and tap K on. -> [ROWS, TAPS]"""
    row = tl.arange(0, ROWS)
    tap = tl.arange(0, TAPS)
    x_ptr += b * x_b + tl.cast(m0, tl.int64) * STRIDE
    mask = (m0 + row < T)[:, None] & (tap < K)[None, :]
    x = tl.load(x_ptr + (row * STRIDE)[:, None] + tap[None, :], mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * K + tap, mask=tap < K, other=0.0)
    return tl.where(mask, x - shift[None, :], 0.0).to(dtype)


@triton.jit
def _first(
    windows, w_ptr, bias_ptr, c0, w_b, b,
    C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Channels c0 .. c0 + WIDTH of the first layer for a tile of windows. -> [ROWS, WIDTH] float32"""
    c = c0 + tl.arange(0, WIDTH)
    tap = tl.arange(0, TAPS)
    mask = (c < C)[:, None] & (tap < K)[None, :]
    w = tl.load(w_ptr + b * w_b + (c * K)[:, None] + tap[None, :], mask=mask, other=0.0)
    bias = tl.load(bias_ptr + b * C + c, mask=c < C, other=0.0)
    return tl.dot(windows, tl.trans(w), input_precision=PRECISION) + bias[None, :]


@triton.jit
def _put(ptr, at, column, tile, keep, N: tl.constexpr):
    """Rows `at` (64 bits) of a map of N channels."""
    tl.store(
        ptr + (at * N)[:, None] + column[None, :], tile.to(ptr.dtype.element_ty), mask=keep[:, None] & (column < N)
    )


# ---- forward ----------------------------------------------------------------


@triton.jit(do_not_specialize=["x_b", "T"])
def window_sums_kernel(
    x_ptr, frames_ptr, out_ptr, x_b, T,
    K: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Outer products (rows 0 .. K - 1) and sum (row K) of a block of windows, float64."""
    blocks = tl.cdiv(T, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    m0 = tl.program_id(0) % blocks * BLOCK_M
    valid = T
    if frames_ptr is not None:
        valid = tl.minimum(tl.load(frames_ptr + b).to(tl.int32), T)
    row = tl.arange(0, BLOCK_M)
    tap = tl.arange(0, TAPS)
    x_ptr += b * x_b + tl.cast(m0, tl.int64) * STRIDE
    live = m0 + row < valid
    at = x_ptr + row * STRIDE
    windows = tl.load(at[:, None] + tap[None, :], mask=live[:, None] & (tap < K)[None, :], other=0.0).to(tl.float64)
    out_ptr += tl.program_id(0).to(tl.int64) * ((K + 1) * K) + tap
    for k in range(K):
        x = tl.load(at + k, mask=live, other=0.0).to(tl.float64)
        tl.store(out_ptr + k * K, tl.sum(windows * x[:, None], 0), mask=tap < K)
    tl.store(out_ptr + K * K, tl.sum(windows, 0), mask=tap < K)


@triton.jit(do_not_specialize=["x_b", "T", "P"])
def wave_kernel(
    x_ptr, shift_ptr, w_ptr, bias_ptr, out_ptr, x_b, w_b, T, P,
    K: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr, N: tl.constexpr, ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first layer of one utterance, with GELU where ACTIVATE."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(P, BLOCK_M)
    n0 = tl.program_id(0) % blocks_n * BLOCK_N
    m0 = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M
    b = (tl.program_id(0) // (blocks_n * blocks_m)).to(tl.int64)
    windows = _windows(x_ptr, shift_ptr, b, x_b, m0, T, w_ptr.dtype.element_ty, K, STRIDE, TAPS, BLOCK_M)
    z = _first(windows, w_ptr, bias_ptr, n0, w_b, b, N, K, TAPS, BLOCK_N, PRECISION)
    if ACTIVATE:
        z = gelu(z, out_ptr.dtype.element_ty)
    m = m0 + tl.arange(0, BLOCK_M)
    z = tl.where((m < T)[:, None], z, 0.0)
    _put(out_ptr, b * P + m, n0 + tl.arange(0, BLOCK_N), z, m < P, N)


@triton.jit(do_not_specialize=["x_b", "T", "P", "out_P"])
def wave_pointwise_kernel(
    x_ptr, shift_ptr, w0_ptr, bias0_ptr, w_ptr, bias_ptr, out_ptr, z_ptr, x_b, w_b, T, P, out_P,
    K: tl.constexpr, STRIDE: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """First layer, GELU, 1x1 convolution, GELU; the first layer's map exists in registers only."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_m = tl.cdiv(P, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m0 = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M
    b = (tl.program_id(0) // (blocks_n * blocks_m)).to(tl.int64)
    windows = _windows(x_ptr, shift_ptr, b, x_b, m0, T, w_ptr.dtype.element_ty, K, STRIDE, TAPS, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for c0 in range(0, C, BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K)
        z = _first(windows, w0_ptr, bias0_ptr, c0, w_b, b, C, K, TAPS, BLOCK_K, PRECISION)
        w = tl.load(w_ptr + (n * C)[:, None] + c[None, :], mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
        acc = tl.dot(gelu(z, w.dtype).to(w.dtype), tl.trans(w), acc, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    m = m0 + tl.arange(0, BLOCK_M)
    if m0 + BLOCK_M > T:
        acc = tl.where((m < T)[:, None], acc, 0.0)
    if z_ptr is not None:
        _put(z_ptr, b * P + m, n, acc, m < P, N)
    _put(out_ptr, b * out_P + m, n, gelu(acc, out_ptr.dtype.element_ty), m < out_P, N)


@triton.jit(do_not_specialize=["rows", "rows_in", "T", "P", "out_P"])
def conv_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, z_ptr, rows, rows_in, T, P, out_P,
    C: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One layer over the batch: z (where z_ptr) and GELU(z) (where out_ptr), of which the last layer stores T rows."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    # neighbours share a tile of x, which therefore stays in cache
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    b = m // P
    t = m % P
    row = m.to(tl.int64)
    # a window that leaves the buffer belongs to a row of padding
    live = (m < rows) & (t < T) & (row * STRIDE + TAPS <= rows_in)
    x_ptr += (row * (STRIDE * C))[:, None]
    w_ptr += (n * (TAPS * C))[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, TAPS * C, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_mask = live[:, None]
        w_mask = (n < N)[:, None]
        if TAPS * C % BLOCK_K > 0:
            x_mask = x_mask & (k < TAPS * C)[None, :]
            w_mask = w_mask & (k < TAPS * C)[None, :]
        x = tl.load(x_ptr + k[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_ptr + k[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        acc = tl.where(live[:, None], acc, 0.0)  # without a bias they are 0 already
    if z_ptr is not None:
        _put(z_ptr, row, n, acc, m < rows, N)
    if out_ptr is not None:
        a = gelu(acc, out_ptr.dtype.element_ty)
        _put(out_ptr, b.to(tl.int64) * out_P + t, n, a, (m < rows) & (t < out_P), N)


@triton.jit(do_not_specialize=["rows", "T", "P", "out_P"])
def norm_kernel(
    z_ptr, weight_ptr, bias_ptr, out_ptr, rows, T, P, out_P, eps,
    N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """LayerNorm over channels, then GELU."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, WIDTH)
    t = m % P
    mask = (m < rows)[:, None] & (n < N)[None, :]
    z = tl.load(z_ptr + (m.to(tl.int64) * N)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(z, 1) / N
    z = tl.where(mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(z * z, 1) / N + eps)
    weight = tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    a = gelu(z * rstd[:, None] * weight[None, :] + bias[None, :], out_ptr.dtype.element_ty)
    a = tl.where((t < T)[:, None], a, 0.0)
    _put(out_ptr, (m // P).to(tl.int64) * out_P + t, n, a, (m < rows) & (t < out_P), N)


# ---- backward ---------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "T", "P", "g_P"])
def gelu_backward_kernel(
    g_ptr, z_ptr, gz_ptr, a_ptr, rows, T, P, g_P, N: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Gradient of z, 0 on rows of padding; where a_ptr, GELU(z) too, which the weight gradient above it needs."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, WIDTH)
    t = m % P
    row = m.to(tl.int64)
    live = ((m < rows) & (t < T))[:, None] & (n < N)[None, :]
    z = tl.load(z_ptr + (row * N)[:, None] + n[None, :], mask=live, other=0.0).to(tl.float32)
    g_row = (m // P).to(tl.int64) * g_P + t
    g = tl.load(g_ptr + (g_row * N)[:, None] + n[None, :], mask=live, other=0.0).to(tl.float32)
    phi = normal_cdf(z, z_ptr.dtype.element_ty)
    slope = phi + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    _put(gz_ptr, row, n, g * slope, m < rows, N)
    if a_ptr is not None:
        _put(a_ptr, row, n, z * phi, m < rows, N)


# ---- shipped configurations -------------------------------------------------


class Config(NamedTuple):
    """Tile of the output, step along the inner dimension, and how the compiler schedules it."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def config(kernel: str, dtype: torch.dtype) -> Config:
    """The configuration shipped for `wave`, `wave_pointwise` or `conv`: fixed, so reruns are equal and no call tunes.

    Chosen so that nothing spills on sm_90.
    """
    single = dtype == torch.float32
    if kernel == "wave":
        return Config(64, 64, 16, 8, 1) if single else Config(128, 128, 16, 8, 1)
    if kernel == "wave_pointwise":
        # 4 warps of 16 rows: with 8, two would share the rows, and each make and activate the first layer's tile
        return Config(64, 64, 32, 8, 1) if single else Config(64, 256, 32, 4, 2)
    return Config(64, 64, 32, 8, 2) if single else Config(128, 128, 64, 8, 3)


SUMS_BLOCK, SUMS_WARPS = 256, 4
NORM_BLOCK, NORM_WARPS = 4, 4
GELU_NUMBERS, GELU_WARPS = 2048, 4

# ---- launchers --------------------------------------------------------------


def _taps(kernel: int) -> int:
    """Number of taps, rounded up to what a tensor core takes."""
    return max(16, triton.next_power_of_2(kernel))


def _matrix(weight: Tensor) -> Tensor:
    """[C', C, k] -> [C', k C], in the order of channels-last windows."""
    return weight.transpose(1, 2).flatten(1).contiguous()


def window_sums(x: Tensor, kernel: int, stride: int, frames: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum [B, K] and sum of outer products [B, K, K] of the valid windows of x [B, S], in float64."""
    x = adjacent(x)
    B, T = len(x), (x.shape[1] - kernel) // stride + 1
    blocks = triton.cdiv(T, SUMS_BLOCK)
    partial = x.new_empty(B, blocks, kernel + 1, kernel, dtype=torch.float64)
    window_sums_kernel[(B * blocks,)](
        x, contiguous(frames), partial, x.stride(0), T, K=kernel, STRIDE=stride, TAPS=triton.next_power_of_2(kernel),
        BLOCK_M=SUMS_BLOCK, num_warps=SUMS_WARPS, **FP_FUSION,
    )  # fmt: skip
    return partial[:, :, kernel].sum(1), partial[:, :, :kernel].sum(1)  # two tensors: an op's outputs share no memory


def _wave(x: Tensor, shift: Tensor, w0: Tensor, b0: Tensor, stride: int, T: int, P: int, activate: bool) -> Tensor:
    """The first layer's map, or with `activate` its GELU, [B, P, C]."""
    B, C, K = w0.shape
    out = w0.new_empty(B, P, C)
    shipped = config("wave", w0.dtype)
    grid = (B * triton.cdiv(P, shipped.BLOCK_M) * triton.cdiv(C, shipped.BLOCK_N),)
    wave_kernel[grid](
        x, shift, w0, b0, out, x.stride(0), w0.stride(0), T, P,
        K=K, STRIDE=stride, TAPS=_taps(K), N=C, ACTIVATE=activate, PRECISION=product_precision(w0.dtype),
        BLOCK_M=shipped.BLOCK_M, BLOCK_N=shipped.BLOCK_N, num_warps=shipped.num_warps, num_stages=shipped.num_stages,
        **FP_FUSION,
    )  # fmt: skip
    return out


def _dense(x: Tensor, shift: Tensor, w0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the first layer's kernels read, with adjacent samples and taps; w0 may be one matrix for all utterances."""
    x = adjacent(x)
    return x, shift.contiguous(), w0 if w0.stride()[1:] == (w0.shape[2], 1) else w0.contiguous(), b0.contiguous()


def forward(
    x: Tensor,
    shift: Tensor,
    w0: Tensor,
    b0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    strides: Sequence[int],
    eps: float,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Output [B, T, C] and, with `keep`, z_1 .. z_{L-1} [B, P_l, C_l]."""
    B, _, K = w0.shape
    x, shift, w0, b0 = _dense(x, shift, w0, b0)
    counts = frame_counts(x.shape[1], [K, *(w.shape[2] for w in weights)], strides)
    padded = padded_counts(counts, strides)
    final = len(weights)
    kept: list[Tensor] = []
    common: dict[str, Any] = {"PRECISION": product_precision(w0.dtype)}

    def target(layer: int, channels: int) -> tuple[Tensor, int]:
        """The buffer of a_l and its rows an utterance: the last layer's holds valid frames only."""
        rows = counts[layer] if layer == final else padded[layer]
        return w0.new_empty(B, rows, channels), rows

    start = 1
    if weights and not norms and weights[0].shape[2] == strides[1] == 1:
        N, C = weights[0].shape[:2]
        a, rows = target(1, N)
        z = w0.new_empty(B, padded[1], N) if keep else None
        shipped = config("wave_pointwise", w0.dtype)
        grid = (B * triton.cdiv(padded[0], shipped.BLOCK_M) * triton.cdiv(N, shipped.BLOCK_N),)
        wave_pointwise_kernel[grid](
            x, shift, w0, b0, weights[0].flatten(1).contiguous(), biases[0].contiguous() if biases else None, a, z,
            x.stride(0), w0.stride(0), counts[0], padded[0], rows,
            K=K, STRIDE=strides[0], TAPS=_taps(K), C=C, N=N, **common, **launch_options(shipped),
        )  # fmt: skip
        kept += [] if z is None else [z]
        start = 2
    else:
        a = _wave(x, shift, w0, b0, strides[0], counts[0], padded[0], not norms)
        if norms:
            a = _norm_gelu(a, norms, 0, eps, counts[0], counts[0] if final == 0 else padded[0])
    for layer in range(start, final + 1):
        weight = weights[layer - 1]
        N, C, taps = weight.shape
        T, P = counts[layer], padded[layer]
        out, rows = (None, P) if norms else target(layer, N)
        z = w0.new_empty(B, P, N) if keep or norms else None
        shipped = config("conv", w0.dtype)
        conv_kernel[(triton.cdiv(B * P, shipped.BLOCK_M) * triton.cdiv(N, shipped.BLOCK_N),)](
            a, _matrix(weight), biases[layer - 1].contiguous() if biases else None, out, z,
            B * P, B * padded[layer - 1], T, P, rows,
            C=C, N=N, TAPS=taps, STRIDE=strides[layer], **common, **launch_options(shipped),
        )  # fmt: skip
        if z is not None and keep:
            kept.append(z)
        if out is None:
            assert z is not None
            a = _norm_gelu(z, norms, layer, eps, T, T if layer == final else P)
        else:
            a = out
    return a, kept


def _norm_gelu(z: Tensor, norms: Sequence[Tensor], layer: int, eps: float, T: int, rows: int) -> Tensor:
    """[B, P, C] -> GELU(LayerNorm(z)), [B, rows, C]."""
    B, P, N = z.shape
    out = z.new_empty(B, rows, N)
    norm_kernel[(triton.cdiv(B * P, NORM_BLOCK),)](
        z, norms[2 * layer].contiguous(), norms[2 * layer + 1].contiguous(), out, B * P, T, P, rows, eps,
        N=N, WIDTH=triton.next_power_of_2(N), BLOCK_M=NORM_BLOCK, num_warps=NORM_WARPS, **FP_FUSION,
    )  # fmt: skip
    return out


def _activation_backward(
    g: Tensor, z: Tensor, norms: Sequence[Tensor], layer: int, eps: float, T: int, activation: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Gradient of z_l [B, P, C] from that of a_l [B, T or P, C]; a_l itself where asked for; gradients of the norm."""
    P, N = z.shape[1:]
    y = z
    if norms:
        weight, bias = norms[2 * layer], norms[2 * layer + 1]
        y, mean, rstd = torch.native_layer_norm(z, (N,), weight, bias, eps)
    gy = z.new_empty(z.shape)
    a = z.new_empty(z.shape) if activation else None
    width = triton.next_power_of_2(N)
    block, rows = max(1, GELU_NUMBERS // width), len(z) * P
    gelu_backward_kernel[(triton.cdiv(rows, block),)](
        g, y, gy, a, rows, T, P, g.shape[1], N=N, WIDTH=width, BLOCK_M=block, num_warps=GELU_WARPS, **FP_FUSION
    )
    if not norms:
        return gy, a, []
    gz, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        gy, z, [N], mean, rstd, weight, bias, [True, True, True]
    )
    return gz, a, [d_weight, d_bias]


def _taps_by_stride(taps: int, stride: int) -> list[tuple[int, int, int]]:
    """Taps in groups of a stride: first tap, taps, and the rows of the [B P, s C] view that the group is ahead."""
    return [(j, min(stride, taps - j), j // stride) for j in range(0, taps, stride)]


def _input_gradient(gz: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Gradient of a layer's input [B, P s, C] from gz [B, P, N]: matrix products into the s-fold view of the input."""
    B, P, N = gz.shape
    C, taps, matrix = weight.shape[1], weight.shape[2], _matrix(weight)
    g = gz.view(B * P, N)
    if taps < stride:
        out = gz.new_zeros(B * P, stride * C)
        out[:, : taps * C] = g @ matrix
    else:
        out = g @ matrix[:, : stride * C]
    for first, count, ahead in _taps_by_stride(taps, stride)[1:]:
        out[ahead:, : count * C] += g[: max(B * P - ahead, 0)] @ matrix[:, first * C : (first + count) * C]
    return out.view(B, P * stride, C)


def _weight_gradient(gz: Tensor, a: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Gradient of the weight [N, C, k] from gz [B, P, N] and a [B, P s, C]: products on the s-fold view of a."""
    N, C, taps = weight.shape
    g = gz.view(-1, N)
    inputs = a.view(len(g), stride * C)
    parts = [
        (g[: max(len(g) - ahead, 0)].t() @ inputs[ahead:, : count * C]).view(N, count, C)
        for _, count, ahead in _taps_by_stride(taps, stride)
    ]
    return torch.cat(parts, 1).transpose(1, 2).contiguous()  # as the op's fake says


def backward(
    g: Tensor,
    x: Tensor,
    shift: Tensor,
    w0: Tensor,
    b0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    kept: Sequence[Tensor],
    strides: Sequence[int],
    eps: float,
    need_x: bool,
) -> list[Tensor]:
    """Gradients of w0, b0, x (empty unless need_x), weights, biases and norms. Matrix products are PyTorch's own."""
    x, shift, w0, b0 = _dense(x, shift, w0, b0)
    K, stride = w0.shape[2], strides[0]
    counts = frame_counts(x.shape[1], [K, *(w.shape[2] for w in weights)], strides)
    maps = [_wave(x, shift, w0, b0, stride, counts[0], padded_counts(counts, strides)[0], False), *kept]
    final = len(weights)
    d_weights: list[Tensor] = [w0] * final
    d_biases: list[Tensor] = [w0] * len(biases)
    d_norms: list[Tensor] = [w0] * len(norms)
    upper = above = g.contiguous()
    for layer in range(final, -1, -1):
        gz, a, d_norms[2 * layer : 2 * layer + 2] = _activation_backward(
            upper, maps[layer], norms, layer, eps, counts[layer], layer < final
        )
        if a is not None:  # the layer above needed a_l for its weights
            d_weights[layer] = _weight_gradient(above, a, weights[layer], strides[layer + 1])
        if layer:
            if biases:
                d_biases[layer - 1] = gz.sum((0, 1))
            upper = _input_gradient(gz, weights[layer - 1], strides[layer])
        above = gz
    gz = above[:, : counts[0]]
    windows = (x.unfold(-1, K, stride) - shift[:, None]).to(w0.dtype)
    d_x = waveform_gradient(gz, w0, stride, x.shape[1]).to(x.dtype) if need_x else x.new_empty(0)
    return [gz.transpose(1, 2) @ windows, gz.sum(1, dtype=b0.dtype), d_x, *d_weights, *d_biases, *d_norms]
