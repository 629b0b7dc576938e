import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_TRITON = INTERPRET or DEVICE == "cuda"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`needs_triton` tests run where kernels can: on a GPU or in the interpreter; `needs_compiler` ones where it can compile."""
    for item in items:
        if item.get_closest_marker("needs_triton") and not RUNS_TRITON:
            item.add_marker(pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1"))
        if item.get_closest_marker("needs_compiler") and INTERPRET:
            item.add_marker(pytest.mark.skip(reason="the interpreter has no compiler"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_triton: launches a kernel")
    config.addinivalue_line("markers", "needs_compiler: compiles a kernel for a named GPU")


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write shows up as NaN."""

    def poison(t: torch.Tensor) -> torch.Tensor:
        return t.fill_(torch.nan) if t.is_floating_point() and not torch.compiler.is_compiling() else t

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
