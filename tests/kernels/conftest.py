import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_TRITON = INTERPRET or DEVICE == "cuda"
# the interpreter has no bfloat16 arithmetic
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture(autouse=True, scope="session")
def _true_float32() -> Iterator[None]:
    """cuDNN's convolutions default to tf32: the error that float32 is judged by would be hundreds of times larger."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def assert_no_worse_than_torch(name: str, got: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    """Error against float64 at most twice PyTorch's own in the same dtype, plus one rounding step."""
    step = torch.finfo(low.dtype).eps * high.abs().max().item()
    budget = 2 * ((low.double() - high).abs().max().item() + step)
    assert torch.isfinite(got).all(), name
    error = (got.double() - high).abs().max().item()
    assert error <= budget, f"{name}: {error:.3e} > {budget:.3e}"


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here: kernels need a GPU or the interpreter, which in turn has no compiler."""
    for item in items:
        if item.get_closest_marker("needs_triton") and not RUNS_TRITON:
            item.add_marker(pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1"))
        if item.get_closest_marker("needs_compiler") and INTERPRET:
            item.add_marker(pytest.mark.skip(reason="the interpreter has no compiler"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_triton: launches a kernel")
    config.addinivalue_line("markers", "needs_compiler: compiles a kernel for a named GPU")


# torch.device as a context remembers torch.empty and its like at first use: let it meet them before they are poisoned.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write shows up as NaN."""

    def poison(t: torch.Tensor) -> torch.Tensor:
        return t if t.requires_grad or not t.is_floating_point() else t.fill_(torch.nan)

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
