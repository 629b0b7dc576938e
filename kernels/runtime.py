"""What every kernel module needs to know about the machine, in one place. Importing it does not import Triton."""

import contextlib
import functools
import importlib
import importlib.util
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Impl = Literal["auto", "triton", "torch"]

# triton.jit picks interpreter or compiler when the decorator runs, so this is read once, like Triton itself does.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
try:
    HAS_TRITON = importlib.util.find_spec("triton") is not None
except (ImportError, ValueError):  # an import hook, or a None in sys.modules, forbids it
    HAS_TRITON = False

NAMESPACE = "armhubert"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP_FUSION = {"enable_fp_fusion": True}
"""Option of every launch: a product and a sum as one instruction, which Triton 3.10 is to do only where asked."""


def launch_options(shipped: Any) -> dict[str, Any]:
    """What a launch is given of a shipped configuration: a limit of registers holds on sm_90, where it was chosen."""
    options: dict[str, Any] = {**shipped._asdict(), **FP_FUSION}
    if options.get("maxnreg") is None or INTERPRET or _architecture() != 90:
        options.pop("maxnreg", None)
    return options


def _architecture() -> Any:
    """Of what Triton compiles for, which need not be in the machine (`armhubert.bench lowering`): 90, "gfx942"."""
    from triton.runtime import driver

    return driver.active.get_current_target().arch


def register(name: str, schema: str, *, triton_fn: str, fake_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Register one op that launches Triton's kernels, on CUDA and, under the interpreter, on the CPU.

    `triton_fn` names a function as "module:function" inside this package: it is imported at the first launch, so that
    the package works and imports fast where Triton is absent. A schema string and a hand-written fake keep the op
    opaque to the compiler: tracing never launches anything. The PyTorch twin is no part of the op: public functions
    call it instead (`resolve_impl`).
    """
    module, function = triton_fn.split(":")

    def launch(*args: Any) -> Any:
        run = getattr(importlib.import_module(f"armhubert.kernels.{module}"), function)
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        # Triton launches on the current device, whatever the tensors' own
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return run(*args)

    qualname = f"{NAMESPACE}::{name}"
    torch.library.define(qualname, schema)
    torch.library.impl(qualname, "CUDA", launch)
    if INTERPRET:
        torch.library.impl(qualname, "CPU", launch)
    torch.library.register_fake(qualname, fake_fn)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def resolve_impl(impl: Impl, x: Tensor) -> Literal["triton", "torch"]:
    """Pick the implementation; an explicit request never falls back silently.

    "auto" takes Triton where its kernels can run on `x`, and PyTorch everywhere else.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "torch":
        return "torch"
    runnable = HAS_TRITON and _supported(x)
    if impl == "auto":
        return "triton" if runnable and x.dtype in TRITON_DTYPES else "torch"
    if not HAS_TRITON:
        raise ValueError("impl='triton' needs the package triton (pip install triton), which is not installed")
    if not runnable:
        raise ValueError(
            f"impl='triton' needs a tensor on a GPU of compute capability 8.0 or later, got device={x.device}; "
            "move the input, or set TRITON_INTERPRET=1 before importing armhubert"
        )
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(f"impl='triton' takes float32, float16 or bfloat16, got {x.dtype}; use impl='torch'")
    return "triton"


def tracing() -> bool:
    """Whether a compiler, exporter or torch.jit.trace records what is computed: then nothing may depend on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _supported(x: Tensor) -> bool:
    """Whether Triton serves the device of x: a GPU since Ampere, one of AMD's, or a CPU under the interpreter."""
    if not x.is_cuda:
        return INTERPRET and x.device.type == "cpu"
    return _recent(x.device.index)


def _recent(device: int) -> bool:
    return _capability(device) >= (8, 0)


# A compiler cannot trace that question: what torch.compiler.assume_constant_result does, without its import of Dynamo.
_recent._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def product_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: "tf32" of float32 where the caller allows it to PyTorch's own products, else "ieee"."""
    # by its new name: allow_tf32 raises once a caller has set that one
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if torch.version.hip is None or _architecture() == "gfx942" else "ieee"


def adjacent(t: Tensor) -> Tensor:
    """The tensor with its last dimension's numbers side by side, for kernels that are told the other strides."""
    return t if t.stride(-1) == 1 else t.contiguous()


def contiguous(t: Tensor | None) -> Tensor | None:
    """The tensor made contiguous, for kernels that are not told its strides."""
    return None if t is None else t.contiguous()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch.autocast has x multiplied: its own where that is off, and of integers and float64."""
    kind = x.device.type
    # is_autocast_available says the same of meta, but PyTorch 2.11 cannot trace it
    if kind == "meta" or not x.is_floating_point() or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as torch.autocast hands them to a matrix product; None is left alone."""
    wanted = [None if t is None else autocast_dtype(t) for t in tensors]
    # quantised tensors have a dtype, and no other
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t, dtype in zip(tensors, wanted, strict=True))


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of them; forward mode, which marks no tensor, may."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Underivable(torch.autograd.Function):
    """The first `count` tensors as they are; whoever asks how they depend on any of the others is refused."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("armhubert's ops have no second derivatives: keep them out of what is derived twice")


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd.Function: second derivatives raise a RuntimeError.

    PyTorch's own decorator leaves them out without a word where autograd reaches the inputs by another path.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return outputs
        return _Underivable.apply(len(outputs), *outputs, *gradients, *ctx.saved_tensors)

    return wrapped


def frame_mask(lengths: Tensor, T: int) -> Tensor:
    """Mask [B, T] that is True inside each utterance, from lengths [B] in frames or samples."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def frame_counts(samples: Any, taps: Sequence[int], strides: Sequence[int]) -> list[Any]:
    """Number of frames after each convolution of so many samples."""
    counts = []
    for kernel, stride in zip(taps, strides, strict=True):
        samples = (samples - kernel) // stride + 1
        counts.append(samples)
    return counts


def brief(value: object) -> str:
    """The value in one short line, for messages."""
    return " ".join(reprlib.repr(value).split())


def check_tensors(tensors: Mapping[str, Any], *, optional: bool = False) -> None:
    """Refuse arguments, given by their names, that are not tensors; with `optional`, None is allowed."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise ValueError(f"{name} must be a tensor{' or None' * optional}, got {brief(value)}")


def check_lengths(
    lengths: Tensor | None, B: int, T: int, device: torch.device, *, least: int = 1, unit: str = "frames"
) -> None:
    """Refuse lengths that are not integers [B] on the data's device, or not within least..T.

    Values on a GPU are not read, as that would be a synchronisation, nor those that a compiler traces.
    """
    check_tensors({"lengths": lengths}, optional=True)
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != (B,):
        raise ValueError(f"lengths must be int32 or int64 [{B}], got {lengths.dtype} {tuple(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"lengths must be on {device} like the data, got {lengths.device}")
    if lengths.device.type == "cpu" and lengths.numel() and not tracing():
        low, high = (int(v) for v in lengths.aminmax())
        if low < least or high > T:
            raise ValueError(f"lengths must be within {least}..{T} {unit} (of the batch), got {lengths.tolist()}")
