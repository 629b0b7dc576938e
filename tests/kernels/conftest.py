from collections.abc import Iterator

import pytest
import torch
from oracle import INTERPRET, RUNS_TRITON


@pytest.fixture(autouse=True, scope="session")
def _true_float32() -> Iterator[None]:
    """cuDNN's convolutions default to tf32: the error that float32 is judged by would be hundreds of times larger."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


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
