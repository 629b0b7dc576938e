"""Memory that nobody wrote, filled with NaN: what a kernel forgets to write, or reads too early, shows."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

# torch.device as a context remembers torch.empty and its like at first use: let it meet them before they are poisoned.
with torch.device("meta"):
    torch.empty(0)


def _poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = make(*args, **kwargs)
        return t if t.requires_grad or not t.is_floating_point() else t.fill_(torch.nan)

    return poisoned


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Until the block ends, new uninitialised floating point tensors are NaN."""
    with (
        mock.patch.object(torch, "empty", _poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", _poisoning(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty)),
    ):
        yield
