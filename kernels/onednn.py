"""Linear maps on a CPU by oneDNN: y = x W^T + b, and GELU(y).

PyTorch gives float32 matrix products to MKL, which keeps its AVX-512 kernels for Intel's processors; oneDNN, which
PyTorch carries for convolutions and for its compiler, does not ask who made the processor, and adds the bias and makes
the GELU before a product leaves the registers. Measured, 499 rows of 480 to 864 numbers: the product alone is twice as
fast on an AMD EPYC with AVX-512 (Zen 5) and as fast on an Intel Xeon (Sapphire Rapids), where only inference gains, by
the two passes that it saves. On an AMD EPYC without AVX-512 (Zen 2) nothing gains, and sums in pieces lose a quarter;
one that runs AVX-512 in halves (Zen 4) gains in bfloat16 alone, since MKL's AVX2 kernels reach nine tenths of its peak.
There, on a GPU, in other dtypes and under a compiler it is PyTorch's own linear.
"""

import platform
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armhubert.kernels.runtime import needs_gradient, once_differentiable, tracing

ROWS = 1024
"""Rows that are multiplied at a time where sums are added up in pieces, so that they stay in a cache."""


def _mkldnn_op(name: str) -> Any:
    """One of the ops that PyTorch's compiler uses, or None where this build of PyTorch lacks it."""
    return getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None


_linear_pointwise = _mkldnn_op("_linear_pointwise")
_convolution_pointwise = _mkldnn_op("_convolution_pointwise")


def emulated(dtype: torch.dtype) -> bool:
    """Whether this processor has no instructions for products of `dtype`, which then take many times float32's time."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    supported = _mkldnn_op(f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported")
    return supported is None or not supported()


DTYPES = (torch.float32,) if emulated(torch.bfloat16) else (torch.float32, torch.bfloat16)
"""Dtypes whose products oneDNN computes natively on this processor."""

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether the processor has AVX-512; without it oneDNN gains nothing."""


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return platform.processor()  # names vendor and family on Windows


def _in_halves(processor: str) -> bool:
    """Whether the processor runs AVX-512 on units of 256 bits, as AMD's did before family 26 (Zen 5)."""
    family = re.search(r"family\s*:?\s*(\d+)", processor, re.IGNORECASE)
    return "AuthenticAMD" in processor and family is not None and int(family[1]) < 26


_PROCESSOR = _processor()
MKL_AT_ITS_BEST = torch.backends.mkl.is_available() and "GenuineIntel" in _PROCESSOR
"""Whether PyTorch multiplies by MKL on one of Intel's processors, the only ones that MKL's AVX-512 kernels serve."""
IN_HALVES = _in_halves(_PROCESSOR)
"""Whether AVX-512 runs on units of 256 bits, so that MKL's AVX2 kernels come near the peak and keep float32."""
SMALLEST = 1 << (26 if MKL_AT_ITS_BEST else 23)
"""Fewest multiply-adds for which oneDNN pays: a call costs tens of microseconds and a pass over the weights."""
LONGEST = 1024 if MKL_AT_ITS_BEST else 384
"""Longest sum that oneDNN computes in one piece, so that its error stays below twice MKL's; MKL has other kernels, and
other errors, for other makers' processors."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """`torch.nn.functional.linear`, faster on CPUs: x [..., D], weight [D', D], bias [D'] -> [..., D'].

    With `gelu`, the result is its exact GELU.
    """
    if not _by_onednn(x, weight, bias):
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    rows = x.reshape(-1, x.shape[-1])
    if needs_gradient(x, weight, bias):
        y = _Linear.apply(rows, weight, bias)
        y = F.gelu(y) if gelu else y
    else:
        y = product(rows.contiguous(), weight.contiguous(), bias, gelu=gelu)
    return y.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """`product` with gradients: [N, D], [D', D], [D'] -> [N, D']."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.contiguous(), weight.contiguous(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(g.contiguous(), weight.t().contiguous()) if need_x else None,
            product(g.t().contiguous(), x.t().contiguous()) if need_weight else None,
            g.sum(0) if need_bias else None,
        )


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, longest: int | None = None
) -> Tensor:
    """x W^T + b without gradients: [N, D], [D', D], [D'] -> [N, D'].

    oneDNN computes a sum of D products in one piece, with up to twice MKL's rounding error; pieces of at most `longest`
    (LONGEST) halve the error. x is to be contiguous, and the weight or its transpose: other strides would give the same
    numbers, a hundred times slower.
    """
    assert _linear_pointwise is not None
    N, D = x.shape
    width = -(-D // -(-D // (longest or LONGEST))) if x.dtype == torch.float32 else D
    if width == D:
        y: Tensor = _linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")
        return y
    columns = [(first, weight[:, first : first + width].contiguous()) for first in range(0, D, width)]
    y = x.new_empty(N, len(weight))
    for start in range(0, N, ROWS):
        rows = x[start : start + ROWS]
        parts = [
            _linear_pointwise(
                rows[:, first : first + width].contiguous(), part, None if first else bias, "none", [], ""
            )
            for first, part in columns
        ]
        torch.add(sum(parts[1:-1], parts[0]), parts[-1], out=y[start : start + ROWS])
    return torch.ops.aten.gelu_(y) if gelu else y


def convolve_gelu(image: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
    """GELU of a convolution, without gradients: [B, C, h, w] and [C', C, k, l], channels last -> [B, C', h', w']."""
    if _convolution_pointwise is None or image.dtype not in DTYPES:
        return torch.ops.aten.gelu_(F.conv2d(image, weight, bias, stride))
    y: Tensor = _convolution_pointwise(image, weight, bias, [0, 0], [*stride], [1, 1], 1, "gelu", [], "none")
    return y


def serves(x: Tensor) -> bool:
    """Whether oneDNN is faster for float32 products of `x`: on AVX-512 that MKL neglects, where `runs` allows it."""
    return not (MKL_AT_ITS_BEST or IN_HALVES) and x.dtype == torch.float32 and runs(x)


def runs(x: Tensor) -> bool:
    """Whether `product` may be called for `x`: on a CPU with AVX-512, without a compiler or autocast."""
    return (
        x.device.type == "cpu"
        and AVX512
        and _linear_pointwise is not None
        and not tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        runs(x)  # first: under a compiler the other conditions would be guards
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]  # what does not fit, or is broadcast, is PyTorch's to judge
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype))
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and type(weight) in (Tensor, nn.Parameter)  # quantised weights are subclasses with a product of their own
        and not (IN_HALVES and x.dtype == torch.float32)
        and x.numel() * len(weight) >= SMALLEST
        and (serves(x) or not needs_gradient(x, weight))
    )
