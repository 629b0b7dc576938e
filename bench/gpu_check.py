"""Correctness of every kernel on the device itself, against float64 on the same device.

The rule is that of the tests: the error against float64 is at most twice PyTorch's own in the same dtype plus one
rounding step. Each check is a job of its own (see isolate.py); its row says `ok`, the worst ratio of error to what is
allowed, and where. Without a GPU the checks run on the CPU twins (a rehearsal) or, with TRITON_INTERPRET=1, on the
kernels under the interpreter.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armhubert.baselines import HUBERT_BASE
from armhubert.bench.gpu_clock import captured
from armhubert.bench.poison import poisoned_memory
from armhubert.config import EncoderConfig, preset
from armhubert.frontend import FrontEnd
from armhubert.kernels import Impl, attend, distillation_loss, positional_convolution, reattend
from armhubert.kernels import reuse_attention as attention_module
from armhubert.kernels.runtime import INTERPRET, frame_mask
from armhubert.student import ARMHuBERT

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Job(NamedTuple):
    """One check: its name in CHECKS, where it runs, and its arguments."""

    check: str
    device: str
    arguments: dict[str, Any]

    @property
    def label(self) -> str:
        """What tables call it."""
        return " ".join([self.check, *(f"{k}={v}" for k, v in self.arguments.items())])


def kernels_of(device: str) -> Impl:
    """What is checked: the kernels where they can run, else the twins (a rehearsal)."""
    return "triton" if device == "cuda" or INTERPRET else "torch"


UNPOISONED = ("compile", "graph", "large")
"""Checks that trace or capture what they run, or fill the memory."""


def work(job: Job) -> dict[str, Any]:
    """Run one check -> {"ok", "ratio", "at"}."""
    torch.backends.cudnn.allow_tf32 = False  # or the error that float32 is judged by would be tf32's
    with contextlib.nullcontext() if job.check in UNPOISONED else poisoned_memory():
        return CHECKS[job.check](device=job.device, **job.arguments)


# ---- judging ----------------------------------------------------------------


def judge(
    names: list[str], got: list[Tensor], low: list[Tensor], high: list[Tensor], scales: dict[str, float] | None = None
) -> dict[str, Any]:
    """The worst ratio of an error to what the rule allows.

    A rounding step is one of the largest true value or, where that is larger, of the name's scale: that of the addends
    of a sum that is truly 0.
    """
    assert names
    worst, at = -1.0, ""
    for name, g, t, h in zip(names, got, low, high, strict=True):
        assert g.shape == t.shape == h.shape, (name, g.shape, t.shape, h.shape)
        assert bool(torch.isfinite(h).all()), f"{name}: the true value is not finite"
        step = torch.finfo(t.dtype).eps * max(h.abs().max().item(), (scales or {}).get(name, 0.0))
        allowed = 2 * ((t.double() - h).abs().max().item() + step)
        error = (g.double() - h).abs().max().item() if bool(torch.isfinite(g).all()) else float("inf")
        ratio = error / allowed if allowed > 0 else (0.0 if error == 0 else float("inf"))
        if ratio > worst:
            worst, at = ratio, f"{name}: {error:.2e}, allowed {allowed:.2e}"
    return {"ok": worst <= 1, "ratio": round(worst, 4) if worst < 1e9 else None, "at": at}


def verdict(ok: bool, at: str, ratio: float | None = None) -> dict[str, Any]:
    """A row of a check that is not a matter of rounding."""
    return {"ok": bool(ok), "ratio": ratio, "at": at}


def untried(why: str) -> dict[str, Any]:
    """A row of a check that this machine cannot run."""
    return {"ok": True, "untried": True, "at": f"{why}: not tried"}


def same(names: list[str], first: list[Tensor], second: list[Tensor]) -> dict[str, Any]:
    """Bitwise equality."""
    different = [n for n, a, b in zip(names, first, second, strict=True) if not torch.equal(a, b)]
    return verdict(not different, f"differ: {', '.join(different)}" if different else "bitwise equal")


def draw(device: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same numbers on every device, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)


def ragged(device: str, B: int, T: int) -> Tensor:
    """Lengths from T downwards."""
    return torch.tensor([max(1, T - (T * b) // (2 * B) - b) for b in range(B)], device=device)


# ---- attention --------------------------------------------------------------

PAIR = ["computed", "reused", "d_q", "d_k", "d_v", "d_x", "d_weight", "d_bias"]


class Pair(NamedTuple):
    """Inputs of a computing and a reusing layer, and what their outputs' gradients are."""

    qkv: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor
    g: Tensor
    lengths: Tensor | None

    def to(self, dtype: torch.dtype) -> "Pair":
        """In another precision."""
        qkv, x, weight, bias, g = (t.to(dtype) for t in self[:5])
        return Pair(qkv, x, weight, bias, g, self.lengths)

    def run(self, impl: Impl, mode: Any, *, heads_first: bool = False, **options: Any) -> list[Tensor]:
        """Outputs on valid frames, and every gradient."""
        q, k, v = (t.detach() for t in self.qkv.unbind(2))
        if heads_first:
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        leaves = [t.detach().requires_grad_() for t in (q, k, v, self.x, self.weight, self.bias)]
        q, k, v, x, weight, bias = leaves
        computed, kept = attend(q, k, v, self.lengths, impl=impl, **options)
        reused = reattend(kept, x, weight, bias, mode=mode, impl=impl)
        grads = torch.autograd.grad([computed, reused], leaves, [*self.g.unbind()])
        valid = 1 if self.lengths is None else frame_mask(self.lengths, x.shape[1])[..., None]
        return [(computed * valid).detach(), (reused * valid).detach(), *grads]

    def outputs(self, impl: Impl, mode: Any) -> list[Tensor]:
        """Outputs on valid frames alone, as inference computes them."""
        q, k, v = self.qkv.unbind(2)
        with torch.no_grad():
            computed, kept = attend(q, k, v, self.lengths, impl=impl)
            reused = reattend(kept, self.x, self.weight, self.bias, mode=mode, impl=impl)
        valid = 1 if self.lengths is None else frame_mask(self.lengths, self.x.shape[1])[..., None]
        return [computed * valid, reused * valid]

    def scales(self) -> dict[str, float]:
        """With one frame d_q and d_k are truly 0, each a difference of two equal sums: the scale of what they add."""
        B, T, _, H, d = self.qkv.shape
        if T > 1:
            return {}
        q, k, v = self.qkv.double().unbind(2)
        reused = F.linear(self.x.double(), self.weight.double(), self.bias.double()).view(B, T, H, d)
        first, second = self.g.double().view(2, B, T, H, d)
        added = ((first * v).abs().sum(-1) + (second * reused).abs().sum(-1)).max() * d**-0.5
        return {"d_q": (added * k.abs().max()).item(), "d_k": (added * q.abs().max()).item()}


def pair(device: str, dtype: str, B: int, T: int, H: int, d: int, D: int, pad: bool) -> Pair:
    """Values as `dtype` holds them, so that float64 starts from the same numbers."""
    kind = DTYPES[dtype]
    lengths = ragged(device, B, T) if pad else None
    g = draw(device, 2, B, T, H * d, dtype=kind, seed=4)
    if lengths is not None:
        g = g * frame_mask(lengths, T)[..., None]
    return Pair(
        draw(device, B, T, 3, H, d, dtype=kind, seed=T + d),
        draw(device, B, T, D, dtype=kind, seed=1),
        (draw(device, H * d, D, seed=2) / D**0.5).to(kind),
        draw(device, H * d, dtype=kind, seed=3),
        g,
        lengths,
    )


def check_attention(
    device: str,
    dtype: str,
    mode: str,
    B: int,
    T: int,
    H: int,
    d: int,
    D: int,
    pad: bool = True,
    variant: str = "shipped",
    heads_first: bool = False,
) -> dict[str, Any]:
    """A computing and a reusing layer, outputs and gradients.

    `variant` forces the projection inside or outside, or a stored map, which is for inference: outputs alone.
    """
    inputs = pair(device, dtype, B, T, H, d, D, pad)
    if variant == "stored":
        with mock.patch.object(attention_module, "store_map", return_value=True):
            got = inputs.outputs(kernels_of(device), mode)
        low, high = inputs.outputs("torch", mode), inputs.to(torch.float64).outputs("torch", mode)
        return judge(PAIR[:2], got, low, high)
    forced = {"inside": True, "outside": False}.get(variant)
    context: Any = contextlib.nullcontext()
    if forced is not None:
        context = mock.patch.object(attention_module, "project_inside", return_value=forced)
    with context:
        got = inputs.run(kernels_of(device), mode, heads_first=heads_first)
    low = inputs.run("torch", mode)
    high = inputs.to(torch.float64).run("torch", mode)
    return judge(PAIR, got, low, high, inputs.scales())


def _keep_mask(device: str, seed: int, B: int, T: int, H: int, dropout: float, impl: Impl) -> Tensor:
    """The entries that dropout keeps, [B, H, T, T] bool: with equal logits and one-hot values the output shows them."""
    width = min(T, 128)
    flat = torch.zeros(B, T, H, width, device=device)
    columns = []
    for first in range(0, T, width):
        one_hot = torch.zeros(T, width, device=device)
        index = torch.arange(first, min(T, first + width), device=device)
        one_hot[index, index - first] = 1
        values = one_hot[None, :, None].expand(B, T, H, width)
        out, _ = attend(flat, flat, values, dropout=dropout, seed=seed, impl=impl)
        columns.append(out.view(B, T, H, width)[..., : len(index)].transpose(1, 2) > 0)
    return torch.cat(columns, -1)


def _attention_with_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, valid: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) times dropout factors, times v, in the dtype of q with a float32 (or wider) softmax."""
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    p = logits.to(wide).masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", (p * keep).to(q.dtype), v).flatten(2)


def check_dropout(device: str, dtype: str, B: int, T: int, H: int, d: int, p: float) -> dict[str, Any]:
    """Forward and gradients against float64 with the kernel's own mask; the mask's mean and its independence."""
    impl, seed = kernels_of(device), 2**40 + 5
    kind = DTYPES[dtype]
    keep = _keep_mask(device, seed, B, T, H, p, impl)
    share, sigma = keep.double().mean().item(), (p * (1 - p) / keep.numel()) ** 0.5
    if abs(share - (1 - p)) > 5 * sigma:
        return verdict(False, f"{share:.5f} of the entries kept, not {1 - p} +- {5 * sigma:.5f}")
    rows = keep.double().mean(-1).var().item() / (p * (1 - p) / T)  # variance of row means over that of chance
    if T > 30 and not 0.7 < rows < 1.4:
        return verdict(False, f"variance of row means is {rows:.2f} of what chance gives")
    other = _keep_mask(device, seed + 1, B, T, H, p, impl)
    for name, twin in (("seed", other), ("head", keep.roll(1, 1)), ("utterance", keep.roll(1, 0))):
        agree = (keep == twin).double().mean().item()
        expected = p * p + (1 - p) * (1 - p)
        if name != "seed" and {"head": H, "utterance": B}[name] < 2:
            continue
        if abs(agree - expected) > 8 * (expected * (1 - expected) / keep.numel()) ** 0.5 * 2:
            return verdict(False, f"masks of another {name} agree in {agree:.4f}, chance gives {expected:.4f}")
    # the twin's mask depends on the lengths, the kernels' does not
    lengths = torch.full((B,), T, device=device) if impl == "torch" else ragged(device, B, T)
    valid = frame_mask(lengths, T)
    q, k, v, g = (draw(device, B, T, H, d, dtype=kind, seed=s) for s in range(4))
    g = g.flatten(2) * valid[..., None]
    factors = keep.double() / (1 - p)

    def results(run: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
        out = run(*leaves)
        return [(out * valid[..., None]).detach(), *torch.autograd.grad(out, leaves, g.to(kind))]

    got = results(lambda q, k, v: attend(q, k, v, lengths, dropout=p, seed=seed, impl=impl)[0], kind)
    low = results(lambda q, k, v: _attention_with_mask(q, k, v, factors.to(torch.float32), valid), kind)
    high = results(lambda q, k, v: _attention_with_mask(q, k, v, factors, valid), torch.float64)
    row = judge(["out", "d_q", "d_k", "d_v"], got, low, high)
    return {**row, "at": f"{row['at']}; kept {share:.4f} of {1 - p}"}


def check_padding(device: str, dtype: str, mode: str) -> dict[str, Any]:
    """An utterance in a padded batch, large finite garbage behind it, against itself alone."""
    impl, kind = kernels_of(device), DTYPES[dtype]
    q, k, v = (draw(device, 2, 121, 2, 40, dtype=kind, seed=s) for s in range(3))
    x, weight = draw(device, 2, 121, 80, dtype=kind), (draw(device, 80, 80) / 9).to(kind)
    for t in (q, k, v, x):
        t[1, 73:] = 1e3
    lengths = torch.tensor([121, 73], device=device)
    out, kept = attend(q, k, v, lengths, impl=impl)
    reused = reattend(kept, x, weight, mode=mode, impl=impl)  # type: ignore[arg-type]
    alone, kept_alone = attend(q[1:, :73], k[1:, :73], v[1:, :73], impl=impl)
    reused_alone = reattend(kept_alone, x[1:, :73], weight, mode=mode, impl=impl)  # type: ignore[arg-type]
    step = torch.finfo(kind).eps
    gap = max(
        ((a - b).abs().max() / b.abs().max()).item() / step
        for a, b in ((out[1:, :73].double(), alone.double()), (reused[1:, :73].double(), reused_alone.double()))
    )
    finite = bool(torch.isfinite(out).all() and torch.isfinite(reused).all())
    return verdict(gap <= 4 and finite, f"{gap:.2f} rounding steps apart, finite {finite}", gap / 4)


def check_rerun(device: str, dtype: str, op: str) -> dict[str, Any]:
    """Outputs and gradients of two runs, bit for bit."""
    impl = kernels_of(device)
    if op == "loss":
        run = partial(loss_inputs(device, dtype, 3, 4, 257, 240, 200).run, impl, "mse")
        return same(loss_names(3), run(), run())
    if op == "conv":
        inputs = front_end_inputs(device, dtype, "mini", 3, 0.7)
        return same(inputs.names, *(inputs.run(impl, DTYPES[dtype]) for _ in range(2)))
    options: dict[str, Any] = {"dropout": 0.1, "seed": 3} if op == "dropout" else {}
    mode = "resoftmax" if op == "resoftmax" else "exact"
    run = partial(pair(device, dtype, 4, 257, 4, 40, 160, True).run, impl, mode, **options)
    return same(PAIR, run(), run())


def check_compile(device: str, op: str) -> dict[str, Any]:
    """torch.compile(fullgraph=True) with dynamic shapes, forward and backward, equals eager."""
    impl = kernels_of(device)
    torch._dynamo.reset()

    def run(q: Tensor, k: Tensor, v: Tensor, x: Tensor, weight: Tensor, lengths: Tensor) -> Tensor:
        out, kept = attend(q, k, v, lengths, impl=impl)
        mode = "resoftmax" if op == "resoftmax" else "exact"
        return (out + reattend(kept, x, weight, mode=mode, impl=impl)).float().square().mean()  # type: ignore[arg-type]

    def frames(module: FrontEnd, waveforms: Tensor, lengths: Tensor) -> Tensor:
        return module(waveforms, lengths).float().square().mean()

    ways: dict[str, Callable[..., Any]] = {"loss": distillation_loss, "conv": frames}
    way = ways.get(op, run)
    compiled = torch.compile(way, fullgraph=True, dynamic=True)
    worst = 0.0
    for T in (67, 150):
        if op == "loss":
            inputs = loss_inputs(device, "fp32", 2, 2, T, 48, 40)
            eager, traced = (inputs.run(impl, "mse", call=call) for call in (way, compiled))
        else:
            if op == "conv":
                waves = front_end_inputs(device, "fp32", "mini", 2, T / 100)
                waves.module.impl = impl
                leaves: list[Tensor] = list(waves.module.parameters())
                arguments: list[Any] = [waves.module, waves.waveforms, waves.lengths]
            else:
                leaves = [draw(device, 2, T, 3, 40, seed=s).requires_grad_() for s in range(3)]
                leaves += [draw(device, 2, T, 120).requires_grad_(), (draw(device, 120, 120) / 11).requires_grad_()]
                arguments = [*leaves, torch.tensor([T, T // 2], device=device)]
            losses = [call(*arguments) for call in (way, compiled)]
            eager, traced = ([loss.detach(), *torch.autograd.grad(loss, leaves)] for loss in losses)
        worst = max(
            [worst, *(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(traced, eager, strict=True))]
        )
    return verdict(worst < 1e-4, f"largest relative difference to eager {worst:.1e}", worst / 1e-4)


def check_graph(device: str, op: str, dtype: str) -> dict[str, Any]:
    """Captured in a CUDA graph and replayed on new values: bitwise what eager gives; dropout draws anew each replay."""
    if device != "cuda":
        return untried("no CUDA device")
    impl, names = kernels_of(device), PAIR
    run: Callable[[], list[Tensor]]
    if op == "loss":
        losses, other = (loss_inputs(device, dtype, 3, 2, 150, 96, 72, seed=seed) for seed in (0, 50))
        targets, sources, names = losses.tensors(), other.tensors(), loss_names(3)
        run = partial(losses.run, impl, "mse")
    elif op == "conv":
        waves = front_end_inputs(device, dtype, "mini", 3, 0.7)
        targets, sources, names = [waves.waveforms], [waves.waveforms.flip(1)], waves.names
        run = partial(waves.run, impl, DTYPES[dtype])
    else:
        inputs = pair(device, dtype, 2, 150, 3, 40, 120, True)
        targets, sources = [inputs.qkv, inputs.x], [inputs.qkv.flip(0), inputs.x.flip(1)]
        options: dict[str, Any] = {"dropout": 0.2} if op == "dropout" else {}
        run = partial(inputs.run, impl, "resoftmax" if op == "resoftmax" else "exact", **options)
    replay = captured(run, torch.device(device))
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
    first = [t.clone() for t in replay()]
    if op == "dropout":
        return verdict(not torch.equal(first[0], replay()[0]), "another mask at each replay")
    return same(names, first, run())


def check_tf32(device: str) -> dict[str, Any]:
    """float32 products in tf32, where the caller allows it: operands lose up to 2^-10 each by truncation, twice over in
    gradients.
    """
    if device != "cuda":
        return untried("no CUDA device")
    inputs = pair(device, "fp32", 2, 300, 2, 40, 80, True)
    high = inputs.to(torch.float64).run("torch", "exact")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        got = inputs.run("triton", "exact")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    worst = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, high, strict=True))
    return verdict(worst < 5e-3, f"largest relative error {worst:.1e}", worst / 5e-3)


def check_autocast(device: str, dtype: str) -> dict[str, Any]:
    """float32 inputs under autocast: dtypes, and values near the float32 ones."""
    impl, kind = kernels_of(device), DTYPES[dtype]
    inputs = pair(device, "fp32", 2, 90, 2, 40, 80, True)
    want = inputs.run(impl, "exact")
    with torch.autocast(device, dtype=kind):
        got = inputs.run(impl, "exact")
        loss = loss_inputs(device, "fp32", 2, 2, 90, 48, 40).run(impl, "mse")
    if got[0].dtype != kind or got[2].dtype != torch.float32 or loss[0].dtype != torch.float32:
        return verdict(False, f"dtypes {got[0].dtype}, {got[2].dtype}, {loss[0].dtype}")
    worst = max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))
    return verdict(worst < 0.03, f"largest relative difference to float32 {worst:.1e}", worst / 0.03)


def check_checkpointing(device: str) -> dict[str, Any]:
    """Activation checkpointing repeats the same dropout: equal gradients."""
    impl = kernels_of(device)
    q, x, weight = draw(device, 2, 150, 2, 40), draw(device, 2, 150, 80), draw(device, 80, 80) / 9
    q.requires_grad_()

    def both(q: Tensor, x: Tensor) -> Tensor:
        out, kept = attend(q, q, q, dropout=0.3, impl=impl)
        return out + reattend(kept, x, weight, impl=impl)

    grads: list[Tensor] = []
    for run in (both, lambda *a: checkpoint(both, *a, use_reentrant=False)):
        torch.manual_seed(5)
        grads += torch.autograd.grad(run(q, x).square().mean(), q)
    with torch.inference_mode():
        finite = bool(torch.isfinite(both(q, x)).all())
    return verdict(torch.equal(grads[0], grads[1]) and finite, "gradients bitwise equal, inference_mode finite")


def check_large(device: str, op: str) -> dict[str, Any]:
    """More than 2^31 elements in one tensor: the last utterance (or layer) equals itself alone."""
    needed = 15e9 if op == "loss" else 40e9
    if device != "cuda" or torch.cuda.mem_get_info()[0] < needed:
        return untried(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    if op == "loss":
        L, B, T, D, Dt = 12, 64, 6000, 40, 768  # residual: 3.5e9 elements
        h, c = torch.randn(B, T, D, device=device).bfloat16(), torch.randn(B, T, Dt, device=device).bfloat16()
        W, b = torch.randn(L, Dt, D, device=device).bfloat16() / 6, torch.zeros(L, Dt, device=device).bfloat16()
        W[-1] = W[0]
        W.requires_grad_()
        loss = distillation_loss([h] * L, W, b, [c] * L, impl="triton")
        (d_weight,) = torch.autograd.grad(loss.sum() / (B * T), W)
        equal = torch.equal(loss[0], loss[-1]) and torch.equal(d_weight[0], d_weight[-1])
        return verdict(equal and bool(d_weight.isfinite().all()), "first and last layer equal, 3.5e9 elements")
    B, T, H, d = 260, 6000, 12, 40  # q, k, v together: 2.2e9 elements
    qkv = torch.randn(B, T, 3, H, d, device=device, dtype=torch.bfloat16)
    x, weight = (
        torch.randn(B, T, 16, device=device, dtype=torch.bfloat16),
        torch.randn(H * d, 16, device=device).bfloat16(),
    )
    outputs = []
    for rows in (slice(None), slice(B - 1, None)):
        part = qkv[rows].detach().requires_grad_()
        out, kept = attend(*part.unbind(2), impl="triton")
        reused = reattend(kept, x[rows], weight, impl="triton")
        (grad,) = torch.autograd.grad((out[-1].float().square() + reused[-1].float().square()).mean(), part)
        outputs.append([t[-1].clone() for t in (out.detach(), reused.detach(), grad)])
        del out, kept, reused, grad, part
    gaps = [((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in zip(*outputs, strict=True)]
    return verdict(
        max(gaps) < 0.02, f"last of {B} utterances and itself alone: {max(gaps):.1e} apart", max(gaps) / 0.02
    )


# ---- loss -------------------------------------------------------------------


class LossInputs(NamedTuple):
    """Inputs of distillation_loss."""

    hidden: list[Tensor]
    weight: Tensor
    bias: Tensor
    clean: Tensor
    masked: Tensor | None
    mask: Tensor
    lengths: Tensor

    def tensors(self) -> list[Tensor]:
        """Everything that has values to exchange."""
        return [*self.hidden, self.weight, self.bias, self.clean, *([] if self.masked is None else [self.masked])]

    def to(self, dtype: torch.dtype) -> "LossInputs":
        """In another precision."""
        masked = None if self.masked is None else self.masked.to(dtype)
        hidden = [h.to(dtype) for h in self.hidden]
        return LossInputs(
            hidden, self.weight.to(dtype), self.bias.to(dtype), self.clean.to(dtype), masked, self.mask, self.lengths
        )

    def apart(self) -> "LossInputs":
        """Targets farther from the student's values than rounding goes: where they meet, the gradient of l1 jumps."""
        weight, bias = self.weight.double(), self.bias.double()
        values = torch.stack([F.linear(h.double(), W, b) for h, W, b in zip(self.hidden, weight, bias, strict=True)])

        def away(target: Tensor) -> Tensor:
            gap = target - values
            moved = torch.full_like(gap, 0.2).copysign(gap) * (gap.abs() < 0.1)
            return (target + moved).to(target.dtype)

        return self._replace(clean=away(self.clean), masked=None if self.masked is None else away(self.masked))

    def run(self, impl: Impl, distance: Any, call: Callable[..., Tensor] = distillation_loss) -> list[Tensor]:
        """Loss and every gradient."""
        leaves = [t.detach().requires_grad_() for t in (self.weight, self.bias, *self.hidden)]
        weight, bias, *hidden = leaves
        loss = call(
            hidden, weight, bias, self.clean, self.masked, self.mask, self.lengths, distance=distance, impl=impl
        )
        per_layer = torch.linspace(0.1, 1, len(hidden), device=loss.device) / self.lengths.sum()
        return [loss.detach(), *torch.autograd.grad((loss * per_layer).sum(), leaves)]


def loss_names(L: int) -> list[str]:
    """Names of what LossInputs.run returns."""
    return ["loss", "d_weight", "d_bias", *(f"d_hidden[{i}]" for i in range(L))]


def loss_inputs(
    device: str, dtype: str, L: int, B: int, T: int, D: int, Dt: int, views: int = 2, seed: int = 0
) -> LossInputs:
    """Values as `dtype` holds them; the view that a frame does not need is NaN, so that reading it shows."""
    kind = DTYPES[dtype]
    mask = (torch.rand(B, T, generator=torch.Generator().manual_seed(9)) < 0.5).to(device)
    clean, masked = (draw(device, L, B, T, Dt, dtype=kind, seed=seed + s) for s in (1, 2))
    if views == 2:
        clean[:, ~mask], masked[:, mask] = torch.nan, torch.nan
    return LossInputs(
        [draw(device, B, T, D, dtype=kind, seed=seed + 10 + i) for i in range(L)],
        (draw(device, L, Dt, D, seed=seed + 3) / D**0.5).to(kind),
        draw(device, L, Dt, dtype=kind, seed=seed + 4),
        clean,
        masked if views == 2 else None,
        mask,
        ragged(device, B, T),
    )


def check_loss(
    device: str, dtype: str, distance: str, L: int, B: int, T: int, D: int, Dt: int, views: int = 2
) -> dict[str, Any]:
    """Loss and gradients."""
    inputs = loss_inputs(device, dtype, L, B, T, D, Dt, views)
    if distance == "l1":
        inputs = inputs.apart()
    got, low = (inputs.run(impl, distance) for impl in (kernels_of(device), "torch"))
    return judge(loss_names(L), got, low, inputs.to(torch.float64).run("torch", distance))


# ---- front end --------------------------------------------------------------

STACKS: dict[str, EncoderConfig] = {
    "student": preset("armhubert"),
    "teacher": HUBERT_BASE,
    "layer norms": dataclasses.replace(HUBERT_BASE, conv_norm="layer", conv_bias=True),
    "mini": preset("mini"),
}


class FrontEndInputs(NamedTuple):
    """A front end with random weights and norms, and waveforms."""

    module: FrontEnd
    waveforms: Tensor
    lengths: Tensor
    g: Tensor
    valid: Tensor

    @property
    def names(self) -> list[str]:
        """Names of what `run` returns."""
        return ["out", *(name for name, _ in self.module.named_parameters())]

    def run(self, impl: Impl, dtype: torch.dtype) -> list[Tensor]:
        """Frames and every gradient."""
        module = copy.deepcopy(self.module).to(dtype)
        module.impl = impl
        out = module(self.waveforms.to(dtype), self.lengths) * self.valid
        return [out.detach(), *torch.autograd.grad(out, list(module.parameters()), self.g.to(dtype))]


def front_end_inputs(device: str, dtype: str, stack: str, B: int, seconds: float) -> FrontEndInputs:
    """Everything as `dtype` holds it."""
    config, samples = STACKS[stack], int(seconds * 16_000)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        module = FrontEnd(config)
        for name, parameter in module.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
    module = module.to(device, DTYPES[dtype])
    lengths = torch.tensor([max(config.receptive_field, samples * (B - b) // B) for b in range(B)], device=device)
    frames = config.frames(samples)
    g = draw(device, B, frames, config.conv_layers[-1][0], dtype=DTYPES[dtype], seed=5)
    valid = frame_mask(config.frames(lengths), frames)[..., None]
    waveforms = (0.1 * draw(device, B, samples, seed=6) + 0.01).to(DTYPES[dtype])
    return FrontEndInputs(module, waveforms, lengths, g * valid, valid)


def check_conv(device: str, dtype: str, stack: str, B: int, seconds: float) -> dict[str, Any]:
    """The waveform stack, frames and every gradient, ragged."""
    inputs = front_end_inputs(device, dtype, stack, B, seconds)
    got, low = (inputs.run(impl, DTYPES[dtype]) for impl in (kernels_of(device), "torch"))
    return judge(inputs.names, got, low, inputs.run("torch", torch.float64))


# ---- positional convolution -------------------------------------------------


def check_position(device: str, dtype: str, B: int, T: int, C: int, groups: int, taps: int) -> dict[str, Any]:
    """GELU of the grouped convolution over time, forward: it serves inference, in 16 bits."""
    if kernels_of(device) == "torch":
        return untried("no CUDA device")
    kind = DTYPES[dtype]
    x, bias = draw(device, B, T, C, dtype=kind, seed=1), draw(device, C, dtype=kind, seed=3)
    weight = (draw(device, C, C // groups, taps, seed=2) / (C // groups * taps) ** 0.5).to(kind)

    def direct(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.conv1d(x.transpose(1, 2), weight, bias, padding=taps // 2, groups=groups)[..., :T])

    got = positional_convolution.fused(x, weight, bias).transpose(1, 2)
    high = direct(x.double(), weight.double(), bias.double())
    return judge(["out"], [got], [direct(x, weight, bias)], [high])


# ---- the student ------------------------------------------------------------


def check_student(device: str, name: str, mode: str, dtype: str, seconds: float) -> dict[str, Any]:
    """Whole student, inference, then forward and backward through the heads: kernels, twins, float64; ragged batch."""
    zero: dict[str, Any] = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "input_dropout"), 0.0)
    config = dataclasses.replace(preset(name), **zero, attention_mode=mode)  # type: ignore[arg-type]
    samples = int(16000 * seconds)
    waveforms = draw(device, 3, samples, dtype=torch.float64) * 0.1
    lengths = torch.tensor([samples, samples * 2 // 3, samples // 2], device=device)
    state: dict[str, Tensor] | None = None
    results = []
    for impl, kind in ((kernels_of(device), DTYPES[dtype]), ("torch", DTYPES[dtype]), ("torch", torch.float64)):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = ARMHuBERT(config, impl=impl)
        if state is None:
            state = {key: value.to(DTYPES[dtype]).double() for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        model.to(device, kind).train()
        output = model(waveforms.to(DTYPES[dtype]).to(kind), lengths)
        valid = frame_mask(output.lengths, output.last_hidden_state.shape[1])[..., None]
        last = output.last_hidden_state * valid
        named = dict(model.named_parameters())
        watched = [
            named[key] for key in ("layers.0.attention.qkv.weight", "layers.1.attention.value.weight", "heads.weight")
        ]
        loss = torch.stack([(p * valid).double().square().mean() for p in output.projections or ()]).sum()
        loss = loss * 2**12  # or gradients would underflow in float16
        with torch.inference_mode():
            inferred = model.eval()(waveforms.to(DTYPES[dtype]).to(kind), lengths).last_hidden_state * valid
        results.append([inferred, last.detach(), *torch.autograd.grad(loss, watched)])
        del model, output
    got, low, high = results
    names = ["inference", "last_hidden_state", "d_qkv of layer 0", "d_value of layer 1", "d_heads"]
    return judge(names, got, low, high)


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention": check_attention,
    "dropout": check_dropout,
    "padding": check_padding,
    "rerun": check_rerun,
    "compile": check_compile,
    "graph": check_graph,
    "autocast": check_autocast,
    "tf32": check_tf32,
    "checkpointing": check_checkpointing,
    "large": check_large,
    "loss": check_loss,
    "conv": check_conv,
    "position": check_position,
    "student": check_student,
}


# ---- which --------------------------------------------------------------


def jobs(device: str, quick: bool) -> list[Job]:
    """Every check; with `quick`, a few tiny ones of each kind. The most telling come first."""
    found = _quick_jobs() if quick else _jobs()
    dtypes = ("fp32", "fp16") if device == "cpu" and INTERPRET else tuple(DTYPES)
    return [Job(check, device, a) for check, a in found if a.get("dtype", "fp32") in dtypes]


def _quick_jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    shape = {"B": 2, "T": 13, "H": 2, "d": 20, "D": 24}
    for dtype in DTYPES:
        yield "attention", {"dtype": dtype, "mode": "exact", **shape}
        yield "attention", {"dtype": dtype, "mode": "resoftmax", **shape, "variant": "outside"}
        yield "attention", {"dtype": dtype, "mode": "resoftmax", **shape, "variant": "stored"}
        yield "loss", {"dtype": dtype, "distance": "mse", "L": 2, "B": 2, "T": 9, "D": 16, "Dt": 12}
    yield "dropout", {"dtype": "fp32", "B": 2, "T": 33, "H": 2, "d": 20, "p": 0.3}
    yield "padding", {"dtype": "fp32", "mode": "exact"}
    for op in ("exact", "dropout", "loss"):
        yield "rerun", {"dtype": "fp32", "op": op}
    for op in ("exact", "loss"):
        yield "graph", {"dtype": "fp32", "op": op}
    if not INTERPRET:
        yield "compile", {"op": "loss"}
        yield "autocast", {"dtype": "bf16"}
    yield "checkpointing", {}
    yield "large", {"op": "attention"}
    yield "tf32", {}
    for stack in ("mini", "layer norms"):
        yield "conv", {"dtype": "fp32", "stack": stack, "B": 2, "seconds": 0.06}
    yield "rerun", {"dtype": "fp32", "op": "conv"}
    yield "graph", {"dtype": "fp32", "op": "conv"}
    for dtype in ("bf16", "fp16"):
        yield "position", {"dtype": dtype, "B": 2, "T": 9, "C": 24, "groups": 2, "taps": 32}
    yield "student", {"name": "mini", "mode": "exact", "dtype": "fp32", "seconds": 0.2}


def _jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    full = {"B": 4, "T": 499, "H": 12, "d": 40, "D": 480}
    for dtype in ("bf16", "fp32", "fp16"):
        yield "student", {"name": "mini", "mode": "exact", "dtype": dtype, "seconds": 3.0}
        for mode in ("exact", "resoftmax"):
            yield "attention", {"dtype": dtype, "mode": mode, **full}
            yield "attention", {"dtype": dtype, "mode": mode, **full, "variant": "inside"}
            yield "attention", {"dtype": dtype, "mode": mode, **full, "variant": "stored"}
        yield "loss", {"dtype": dtype, "distance": "mse", "L": 12, "B": 4, "T": 499, "D": 480, "Dt": 768}
        yield "dropout", {"dtype": dtype, "B": 2, "T": 200, "H": 3, "d": 40, "p": 0.1}
        for stack in ("student", "teacher", "layer norms", "mini"):
            yield "conv", {"dtype": dtype, "stack": stack, "B": 3, "seconds": 1.3}
        yield "rerun", {"dtype": dtype, "op": "dropout"}
        yield "graph", {"dtype": dtype, "op": "exact"}
    for op in ("exact", "resoftmax", "loss", "conv"):
        yield "compile", {"op": op}
    for dtype in ("bf16", "fp16"):
        for B, T, C, groups, taps in ((3, 499, 480, 16, 128), (2, 130, 768, 16, 128), (2, 7, 96, 16, 33)):
            yield "position", {"dtype": dtype, "B": B, "T": T, "C": C, "groups": groups, "taps": taps}
        yield "autocast", {"dtype": dtype}
    yield "checkpointing", {}
    yield "tf32", {}
    for op in ("attention", "loss"):
        yield "large", {"op": op}
    for dtype in ("bf16", "fp32", "fp16"):
        for op in ("resoftmax", "dropout", "loss", "conv"):
            yield "graph", {"dtype": dtype, "op": op}
        yield "conv", {"dtype": dtype, "stack": "student", "B": 1, "seconds": 0.025}
        for op in ("exact", "resoftmax", "loss", "conv"):
            yield "rerun", {"dtype": dtype, "op": op}
        for mode in ("exact", "resoftmax"):
            yield "padding", {"dtype": dtype, "mode": mode}
            shapes = (
                (2, 1, 2, 64, 20),
                (3, 7, 2, 36, 20),
                (3, 63, 2, 40, 33),
                (2, 129, 3, 36, 108),
                (2, 500, 2, 64, 128),
            )
            for B, T, H, d, D in shapes:
                shape = {"B": B, "T": T, "H": H, "d": d, "D": D}
                yield "attention", {"dtype": dtype, "mode": mode, **shape}
                yield "attention", {"dtype": dtype, "mode": mode, **shape, "variant": "stored"}
        for L, B, T, D, Dt in ((1, 1, 1, 8, 3), (3, 2, 63, 40, 72), (12, 2, 7, 36, 24), (1, 1, 129, 48, 130)):
            for distance in ("mse", "l1"):
                yield "loss", {"dtype": dtype, "distance": distance, "L": L, "B": B, "T": T, "D": D, "Dt": Dt}
        yield "loss", {"dtype": dtype, "distance": "l1", "L": 12, "B": 4, "T": 100, "D": 432, "Dt": 768}
        yield "loss", {"dtype": dtype, "distance": "mse", "L": 2, "B": 2, "T": 90, "D": 64, "Dt": 80, "views": 1}
        yield "dropout", {"dtype": dtype, "B": 2, "T": 70, "H": 2, "d": 64, "p": 0.5}
        yield "attention", {"dtype": dtype, "mode": "exact", **full, "pad": False, "heads_first": True}
    for mode in ("exact", "resoftmax"):
        for dtype in ("bf16", "fp32"):
            yield "student", {"name": "armhubert", "mode": mode, "dtype": dtype, "seconds": 6.0}
    for dtype in ("bf16", "fp32"):
        for T, B in ((1500, 2), (6000, 1)):
            shape = {"B": B, "T": T, "H": 2, "d": 40, "D": 80}
            yield "attention", {"dtype": dtype, "mode": "resoftmax" if T == 1500 else "exact", **shape}
    for dtype in ("bf16", "fp32", "fp16"):
        for d in (12, 24, 80, 128):
            for mode in ("exact", "resoftmax"):
                yield "attention", {"dtype": dtype, "mode": mode, "B": 2, "T": 150, "H": 2, "d": d, "D": 33}
