# mypy: disallow-untyped-defs=False
# (jit functions are typed by Triton)
"""Triton kernel of the convolutional positional embedding; formula and dispatch are in positional_convolution.py.

Legend: B utterances, T frames, G groups of WIDTH channels, padded to LANES; K taps; J frames that a row makes.
A group's frames lie LANES numbers apart, so the taps of J adjacent frames are (K + J - 1) LANES adjacent numbers: the
convolution is one matrix product for each utterance and group, whose rows start J LANES apart and whose columns are J
frames of LANES channels, wide enough for a matrix unit. A frame's columns are the group's weights, moved by its place
in the row.
"""

import triton
import triton.language as tl
from torch import Tensor

from armhubert.kernels.runtime import launch_options, product_precision
from armhubert.kernels.triton_conv_frontend import Config
from armhubert.kernels.triton_gelu import gelu


@triton.jit(do_not_specialize=["B", "T", "P"])
def positional_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, B, T, P,
    G: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, J: tl.constexpr, INNER: tl.constexpr, ROW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns of one utterance and group. What is read is padded and needs no mask."""
    blocks_n: tl.constexpr = J * LANES // BLOCK_N
    blocks_m = tl.cdiv(T, J * BLOCK_M)
    # groups change last, so that programs which run together share weights
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m0 = tl.program_id(0) // blocks_n % blocks_m * BLOCK_M
    b = (tl.program_id(0) // (blocks_n * blocks_m) % B).to(tl.int64)
    g = tl.program_id(0) // (blocks_n * blocks_m) // B
    m = m0 + tl.arange(0, BLOCK_M)
    frame, lane = n // LANES, n % LANES
    x_ptr += (b * G + g) * P * LANES + (m * (J * LANES))[:, None]
    w_ptr += ((g * LANES + lane) * ROW + (J - 1 - frame) * LANES)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, INNER, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x, w = tl.load(x_ptr + k[None, :]), tl.load(w_ptr + k[None, :])
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)  # [BM, BK] @ [BK, BN]
    channel = g * WIDTH + lane
    acc += tl.load(bias_ptr + channel, mask=lane < WIDTH, other=0.0).to(tl.float32)[None, :]
    low = out_ptr.dtype.element_ty
    t = m[:, None] * J + frame[None, :]
    at = out_ptr + (b * T + t) * (G * WIDTH) + channel[None, :]
    tl.store(at, gelu(acc, low).to(low), mask=(t < T) & (lane < WIDTH)[None, :])


COLUMNS = 128
"""Fewest columns of a group's product: J frames of LANES channels."""


def config(rows: int) -> Config:
    """The configuration shipped for so many rows of an utterance."""
    return Config(64, 128, 64, 4, 3) if rows <= 64 else Config(128, 128, 64, 8, 3)


def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of the convolution of x [B, T, C] with weight [C, C/G, K], bias [C] -> [B, T, C], contiguous."""
    B, T, C = x.shape
    width, taps = weight.shape[1:]
    groups, lanes = C // width, max(16, triton.next_power_of_2(width))
    J = max(1, COLUMNS // lanes)
    shipped = config(triton.cdiv(T, J))
    inner = triton.cdiv((taps + J - 1) * lanes, shipped.BLOCK_K) * shipped.BLOCK_K
    row = (J - 1) * lanes + inner
    frames = triton.cdiv(T, J * shipped.BLOCK_M) * J * shipped.BLOCK_M + inner // lanes
    padded = x.new_zeros(B, groups, frames, lanes)
    padded[:, :, taps // 2 : taps // 2 + T, :width] = x.unflatten(2, (groups, width)).transpose(1, 2)
    matrix = weight.new_zeros(groups, lanes, row // lanes, lanes)
    matrix[:, :width, J - 1 : J - 1 + taps, :width] = weight.unflatten(0, (groups, width)).transpose(2, 3)
    out = x.new_empty(B, T, C)
    grid = (B * groups * triton.cdiv(T, J * shipped.BLOCK_M) * (J * lanes // shipped.BLOCK_N),)
    positional_kernel[grid](
        padded, matrix, bias.contiguous(), out, B, T, frames,
        G=groups, WIDTH=width, LANES=lanes, J=J, INNER=inner, ROW=row, PRECISION=product_precision(x.dtype),
        **launch_options(shipped),
    )  # fmt: skip
    return out
