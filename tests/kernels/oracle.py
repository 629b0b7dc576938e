"""Where kernels run here, and what is asked of them."""

import os
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from armhubert.bench.gpu_check import judge
from armhubert.kernels import onednn

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_TRITON = INTERPRET or DEVICE == "cuda"
NEEDS_ONEDNN = pytest.mark.skipif(
    not onednn.AVX512 or onednn.IN_HALVES, reason="only where oneDNN multiplies is it held to MKL's errors"
)
# the interpreter has no bfloat16 arithmetic
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def assert_no_worse_than_torch(name: str, got: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    """Error against float64 at most twice the sum of PyTorch's own in the same dtype and one rounding step.

    A step of its own would not do: on a few numbers PyTorch may have the luck to round exactly.
    """
    row = judge([name], [got], [low], [high])
    assert row["ok"], row["at"]


def check_op(op: Any, arguments: tuple[Any, ...]) -> None:
    """opcheck, and what it does not ask: strides of the fake are real, since a compiler reads outputs by them."""
    torch.library.opcheck(op, arguments)
    mode = FakeTensorMode()
    fakes = tree_map(lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t, arguments)
    with mode:
        promised = tree_leaves(op(*fakes))
    for index, (real, fake) in enumerate(zip(tree_leaves(op(*arguments)), promised, strict=True)):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype), (op, index)
        strides = [(a, b) for a, b, size in zip(real.stride(), fake.stride(), real.shape, strict=True) if size > 1]
        assert all(a == b for a, b in strides) or not real.numel(), (op, index, real.stride(), fake.stride())
