from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from oracle import INTERPRET, RUNS_TRITON

from armhubert.bench.poison import poisoned_memory
from armhubert.kernels import onednn


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


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """What a kernel forgets to write shows up as NaN."""
    with poisoned_memory():
        yield


class _Numpy(ModuleType):
    """NumPy, but for products of tiles: a sum's order is then the same whatever the tile's shape, as on a GPU.

    BLAS adds in another order where matrices are small, so that logits made again in backward, in tiles of another
    shape, would differ from forward's by more than float32 rounds.
    """

    SIZE = 128

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def matmul(self, a: np.ndarray, b: np.ndarray, **options: Any) -> np.ndarray:
        (rows, inner), columns = a.shape, b.shape[1]
        if max(rows, columns) > self.SIZE:
            return np.matmul(a, b, **options)
        left, right = np.zeros((self.SIZE, inner), a.dtype), np.zeros((inner, self.SIZE), b.dtype)
        left[:rows], right[:, :columns] = a, b
        return np.matmul(left, right, **options)[:rows, :columns]


if INTERPRET:
    from triton.runtime import interpreter

    interpreter.np = _Numpy("numpy")


@pytest.fixture
def neglected_by_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AVX-512 whose float32 products go to oneDNN."""
    monkeypatch.setattr(onednn, "AVX512", True)
    monkeypatch.setattr(onednn, "IN_HALVES", False)
    monkeypatch.setattr(onednn, "MKL_AT_ITS_BEST", False)
