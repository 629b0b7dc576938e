"""Which modules must be called: those that hooks wait for, and those that others have put in the place of ours.

Several modules here are computed from their weights, a stack of them in one op. That is not for these.
"""

from collections.abc import Iterable
from itertools import islice

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether hooks wait for one of these modules, or for any module."""
    return _has_any_global_hook() or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )


def hooked_within(module: nn.Module) -> bool:
    """Whether hooks wait for a part of `module`."""
    return hooked(islice(module.modules(), 1, None))


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` computes what `kind` does; its weights may be parametrised."""
    return type(module).forward is kind.forward and "forward" not in vars(module)
