"""Linear maps on a CPU by oneDNN: y = x W^T + b.

PyTorch gives float32 matrix products to MKL, which keeps its AVX-512 kernels for Intel's processors; oneDNN, which
PyTorch carries for convolutions and for its compiler, does not ask who made the processor. Measured on an AMD EPYC
(Zen 5), 499 rows of 480 to 864 numbers: twice as fast, on one thread and on two. On a GPU, in other dtypes and under a
compiler it is PyTorch's own linear.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 1 << 23
"""Multiply-adds from which oneDNN's own cost (tens of microseconds) is small beside the gain."""
LONGEST = 384
"""Products that oneDNN adds up in one go."""
ROWS = 1024
"""Rows at a time where there are several pieces, so that they stay in a cache."""

_linear_pointwise = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, faster on CPUs: x [..., D], weight [D', D], bias [D'] -> [..., D']."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _Linear.apply(rows, weight, bias).reshape(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """[N, D], [D', D], [D'] -> [N, D']."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.contiguous(), weight.contiguous(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(g.contiguous(), weight.t().contiguous()) if need_x else None,
            product(g.t().contiguous(), x.t().contiguous()) if need_weight else None,
            g.sum(0) if need_bias else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b where `serves(x)`, without gradients: [N, D], [D', D], [D'], all contiguous -> [N, D'].

    oneDNN adds up a whole row of D products in one go, which costs up to twice MKL's rounding error; in pieces it costs
    half of that. Strided operands would be right as well, and a hundred times slower.
    """
    assert _linear_pointwise is not None
    N, D = x.shape
    width = -(-D // -(-D // LONGEST))
    if width == D:
        y: Tensor = _linear_pointwise(x, weight, bias, "none", [], "")
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
    return y


def serves(x: Tensor) -> bool:
    """Whether products of `x` are oneDNN's to make here: float32 on a CPU, no compiler, no autocast."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and _linear_pointwise is not None
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        serves(x)  # first: under a compiler the other conditions would be guards
        and weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)  # quantised weights are subclasses with a product of their own
        and x.numel() * len(weight) >= SMALLEST
    )
