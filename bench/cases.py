"""The registry of benchmark cases: one cell names an op, a shape and settings, and builds its candidates.

`make bench` times the cells on a CPU, `bench/gpu.sh` on a GPU, both against the same baselines:

- released: eager PyTorch as in the released code: bmm, softmax, bmm, the map stored; a reusing layer puts the stored
  map through the softmax again ("resoftmax") or not ("exact"); the loss is linear, where, mse layer by layer, float32
  distances as autocast makes them; convolution, group norm and GELU as passes of their own.
- sdpa: PyTorch's fused attention on the shared q and k; on a GPU each of its backends by name: flash, cudnn, efficient.
- flex: FlexAttention, compiled.
- compiled: torch.compile of the PyTorch twin.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from armhubert.baselines import HUBERT_BASE, released_front_end, released_position
from armhubert.bench import costs
from armhubert.config import armhubert
from armhubert.encoder import PositionalConv
from armhubert.frontend import FrontEnd
from armhubert.kernels import AttentionMap, AttentionMode, Distance, Impl, attend, distillation_loss, reattend
from armhubert.kernels.costs import Cost, Gpu

Forward = Callable[[], Tensor | tuple[Tensor, ...]]

STACKS = {"student": armhubert(), "teacher": HUBERT_BASE}


class Cell(NamedTuple):
    """One benchmark case. Widths default to the preset `armhubert`."""

    op: str
    """attend, reattend, pair (a computing and a reusing layer), loss, conv (the waveform stack) or position (the
    convolutional positional embedding, whose gradients are PyTorch's: it is timed forward only)."""
    B: int
    T: int
    H: int = 12
    d: int = 40
    mode: AttentionMode = "exact"
    ragged: bool = False
    """Lengths from T / 2 to T instead of none."""
    L: int = 12
    Dt: int = 768
    distance: Distance = "mse"
    stack: str = "student"
    """Whose convolutions: those of the preset `armhubert` or, for "teacher", of HuBERT Base."""
    slow: bool = False
    """Also against baselines that must be compiled first."""

    @property
    def D(self) -> int:
        """Model width."""
        return self.H * self.d

    @property
    def label(self) -> str:
        """What tables call it."""
        own = {"loss": self.distance, "attend": "", "conv": self.stack, "position": self.stack}
        detail = own.get(self.op, self.mode)
        heads = f"H{self.H} d{self.d}"
        widths = {"loss": f"L{self.L} {self.D}-{self.Dt}", "conv": "", "position": ""}.get(self.op, heads)
        return " ".join(p for p in (self.op, detail, f"B{self.B} T{self.T}", widths, "ragged" * self.ragged) if p)

    @property
    def slow_baselines(self) -> tuple[str, ...]:
        """Those that must be compiled first."""
        if not self.slow:
            return ()
        exact = self.mode == "exact" or self.op == "attend"
        of_op = {
            "loss": ("compiled released", "compiled"),
            "conv": ("compiled released",),
            "position": ("compiled released",),
        }
        return of_op.get(self.op, ("flex", "compiled") if exact else ("compiled",))

    @property
    def samples(self) -> int:
        """Samples of a waveform that gives T frames."""
        config = STACKS[self.stack]
        return (self.T - 1) * config.hop + config.receptive_field

    def floor(self, gpu: Gpu | None, *, backward: bool) -> float | None:
        """Seconds that no implementation in 16-bit beats, of the forward pass or of forward and backward."""
        if gpu is None:
            return None
        return sum(cost.floor(gpu) for cost in self._costs(backward))

    def cost(self, *, backward: bool) -> tuple[float, float]:
        """Fewest bytes and operations."""
        parts = self._costs(backward)
        return sum(c.bytes for c in parts), sum(c.operations for c in parts)

    def _costs(self, backward: bool) -> list[Cost]:
        B, T, H, d = self.B, self.T, self.H, self.d
        parts = []
        for back in (False, True)[: 1 + backward]:
            if self.op == "conv":
                layers = STACKS[self.stack].conv_layers
                parts.append(costs.conv_frontend(B, self.samples, layers, backward=back))
            if self.op == "position":
                config = STACKS[self.stack]
                sizes = config.width, config.position_groups, config.position_kernel
                parts.append(costs.positional_convolution(B, T, *sizes, backward=back))
            if self.op == "loss":
                parts.append(costs.distillation(self.L, B, T, self.D, self.Dt, backward=back))
            if self.op in ("attend", "pair"):
                parts.append(costs.attend(B, T, H, d, backward=back))
            if self.op in ("reattend", "pair"):
                parts.append(costs.reattend(B, T, H, d, self.D, backward=back))
        return parts


class Candidate(NamedTuple):
    """One way to compute a cell, on inputs of its own."""

    forward: Forward
    leaves: list[Tensor]
    """What gradients are asked for."""

    def forward_backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """A step with gradients of the outputs drawn once."""
        outputs = _tuple(self.forward())
        generator = torch.Generator(outputs[0].device).manual_seed(7)
        cotangents = [
            torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32).to(o.dtype) for o in outputs
        ]
        return lambda: torch.autograd.grad(_tuple(self.forward()), self.leaves, cotangents)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


# ---- baselines --------------------------------------------------------------


def released_attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, dropout: float = 0.0, **_: Any
) -> tuple[Tensor, Tensor]:
    """[B, T, H, d] -> out [B, T, H d] and the stored map [B H, T, T], padding masked as -inf."""
    B, T, H, d = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B * H, T, d) for x in (q, k, v))
    logits = torch.bmm(q * d**-0.5, k.transpose(1, 2))
    return _released_apply(logits, v, lengths, B, dropout)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _released_apply(
    logits: Tensor, v: Tensor, lengths: Tensor | None, B: int, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    rows, T, _ = logits.shape
    if lengths is not None:
        padding = torch.arange(T, device=logits.device) >= lengths[:, None]
        logits = logits.view(B, rows // B, T, T).masked_fill(padding[:, None, None], -torch.inf).view(rows, T, T)
    p = _wide(logits).softmax(-1).to(logits.dtype)
    out = torch.bmm(F.dropout(p, dropout), v)
    return out.view(B, rows // B, T, -1).transpose(1, 2).reshape(B, T, -1), p


def released_reattend(
    stored: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mode: AttentionMode = "exact",
    lengths: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """A stored map applied to new values, through the softmax a second time for "resoftmax"."""
    B, T, _D = x.shape
    H = stored.shape[0] // B
    v = F.linear(x, weight, bias).view(B, T, H, -1).transpose(1, 2).reshape(B * H, T, -1)
    if mode == "resoftmax":
        return _released_apply(stored, v, lengths, B)[0]
    return torch.bmm(stored, v).view(B, H, T, -1).transpose(1, 2).reshape(B, T, -1)


def sdpa_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    dropout: float = 0.0,
    backend: SDPBackend | None = None,
    **_: Any,
) -> tuple[Tensor, AttentionMap]:
    """PyTorch's fused attention, by one backend or whichever PyTorch prefers."""
    mask = None
    if lengths is not None:
        mask = (torch.arange(q.shape[1], device=q.device) < lengths[:, None])[:, None, None]
    q_heads, k_heads, v_heads = (t.transpose(1, 2) for t in (q, k, v))
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2), AttentionMap(q, k, None, lengths)


def sdpa_reattend(
    kept: AttentionMap,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: SDPBackend | None = None,
    **_: Any,
) -> Tensor:
    """PyTorch's fused attention on the shared q and k ("exact" only)."""
    v = F.linear(x, weight, bias).view(kept.queries.shape)
    return sdpa_attend(kept.queries, kept.keys, v, kept.lengths, backend=backend)[0]


def released_loss(
    hidden: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    clean: list[Tensor],
    masked: list[Tensor],
    mask: Tensor,
    lengths: Tensor | None,
    *,
    distance: Distance = "mse",
) -> Tensor:
    """Linear, where, distance and sum, a layer at a time: [L] float32."""
    measure = F.mse_loss if distance == "mse" else F.l1_loss
    sums = []
    for h, W, b, seen, unseen in zip(hidden, weight, bias, clean, masked, strict=True):
        target = torch.where(mask[..., None], seen, unseen)
        frames = measure(_wide(F.linear(h, W, b)), _wide(target), reduction="none").mean(-1)
        if lengths is not None:
            frames = frames * (torch.arange(h.shape[1], device=h.device) < lengths[:, None])
        sums.append(frames.sum())
    return torch.stack(sums)


def _flex(lengths: Tensor | None, T: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if lengths is not None:
        block_mask = create_block_mask(lambda b, h, i, j: j < lengths[b], len(lengths), None, T, T, device=device.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask)
        return out.transpose(1, 2).flatten(2)

    return run


# ---- building a cell --------------------------------------------------------

Makers = dict[str, Callable[[], Candidate]]
_SDPA: dict[str, dict[str, SDPBackend | None]] = {
    "cpu": {"sdpa": None},
    "cuda": {
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}
_COMPILED: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}


def build(cell: Cell, device: torch.device, dtype: torch.dtype, *, impl: Impl = "auto", grad: bool = False) -> Makers:
    """What makes each candidate of a cell, "ours" first: apart, so that one that cannot be made costs no other.

    Candidates have leaves of their own, with one set of values.
    """
    of_op = {"loss": _loss, "conv": _conv, "position": _position}
    return of_op.get(cell.op, _attention)(cell, device, dtype, impl, grad)


def lengths_of(cell: Cell, device: torch.device) -> Tensor | None:
    """Valid frames of a ragged cell, evenly spread from T down to T / 2; None of a full one."""
    if not cell.ragged:
        return None
    return torch.linspace(cell.T, max(1, cell.T // 2), cell.B, dtype=torch.float64).long().to(device)


def _attention(cell: Cell, device: torch.device, dtype: torch.dtype, impl: Impl, grad: bool) -> Makers:
    B, T, H, d, D = cell.B, cell.T, cell.H, cell.d, cell.D
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * scale
        return t.to(dtype)

    values = *draw(B, T, 3, H, d).unbind(2), draw(B, T, D), draw(H * d, D, scale=D**-0.5), draw(H * d)
    lengths = lengths_of(cell, device)

    def by(make_map: Callable[..., Any], reuse: Callable[..., Tensor]) -> Candidate:
        """The cell's op by one pair of functions; a lone reusing layer starts from a finished map."""
        q, k, v, x, weight, bias = leaves = [t.detach().requires_grad_(grad) for t in values]
        if cell.op == "attend":
            return Candidate(lambda: make_map(q, k, v, lengths)[0], [q, k, v])
        if cell.op == "pair":

            def both() -> tuple[Tensor, Tensor]:
                out, kept = make_map(q, k, v, lengths)
                return out, reuse(kept, x, weight, bias)

            return Candidate(both, leaves)
        with torch.no_grad():
            kept = make_map(q, k, v, lengths)[1]
        if isinstance(kept, Tensor):
            stored = kept.detach().requires_grad_(grad)
            return Candidate(lambda: reuse(stored, x, weight, bias), [stored, x, weight, bias])
        handle = kept._replace(queries=q, keys=k)
        return Candidate(lambda: reuse(handle, x, weight, bias), [q, k, x, weight, bias])

    def compiled() -> Candidate:
        twin = by(partial(attend, impl="torch"), partial(reattend, mode=cell.mode, impl="torch"))
        return twin._replace(forward=torch.compile(twin.forward, **_COMPILED))

    def flex() -> Candidate:
        attention = _flex(lengths, T, device)

        def make_map(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, AttentionMap]:
            out = v if cell.op == "reattend" else attention(q, k, v)
            return out, AttentionMap(q, k, None, lengths)

        def reuse(kept: AttentionMap, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return attention(kept.queries, kept.keys, F.linear(x, weight, bias).view(kept.queries.shape))

        return by(make_map, reuse)

    makers: Makers = {
        "ours": lambda: by(partial(attend, impl=impl), partial(reattend, mode=cell.mode, impl=impl)),
        "released": lambda: by(released_attend, partial(released_reattend, mode=cell.mode, lengths=lengths)),
    }
    if cell.mode == "exact" or cell.op == "attend":
        for name, backend in _SDPA[device.type].items():
            ways = partial(sdpa_attend, backend=backend), partial(sdpa_reattend, backend=backend)
            makers[name] = partial(by, *ways)
    slow = {"compiled": compiled, "flex": flex}
    return makers | {name: slow[name] for name in cell.slow_baselines}


def _loss(cell: Cell, device: torch.device, dtype: torch.dtype, impl: Impl, grad: bool) -> Makers:
    L, B, T, D, Dt = cell.L, cell.B, cell.T, cell.D, cell.Dt
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    hidden = [draw(B, T, D) for _ in range(L)]
    weight, bias = draw(L, Dt, D) * D**-0.5, draw(L, Dt)
    clean, masked = ([draw(B, T, Dt) for _ in range(L)] for _ in range(2))
    mask = torch.rand(B, T, generator=generator, device=device) < 0.7
    lengths = lengths_of(cell, device)

    def by(run: Callable[..., Tensor]) -> Candidate:
        W, b, *h = leaves = [t.detach().requires_grad_(grad) for t in (weight, bias, *hidden)]
        return Candidate(lambda: run(h, W, b, clean, masked, mask, lengths, distance=cell.distance), leaves)

    makers: Makers = {
        "ours": lambda: by(partial(distillation_loss, impl=impl)),
        "released": lambda: by(released_loss),
    }
    slow = {"compiled": partial(distillation_loss, impl="torch"), "compiled released": released_loss}
    return makers | {name: lambda run=slow[name]: by(torch.compile(run, **_COMPILED)) for name in cell.slow_baselines}


def _conv(cell: Cell, device: torch.device, dtype: torch.dtype, impl: Impl, grad: bool) -> Makers:
    config = STACKS[cell.stack]
    lengths = lengths_of(cell, device)
    samples = None if lengths is None else (lengths - 1) * config.hop + config.receptive_field
    front_end = partial(FrontEnd, config, impl=impl)
    return _by_module(cell, front_end, released_front_end, (cell.B, cell.samples), device, dtype, grad, samples)


def _position(cell: Cell, device: torch.device, dtype: torch.dtype, impl: Impl, grad: bool) -> Makers:
    config = STACKS[cell.stack]
    position = partial(PositionalConv, config, impl=impl)
    return _by_module(cell, position, released_position, (cell.B, cell.T, config.width), device, dtype, grad)


def _by_module(
    cell: Cell,
    make: Callable[[], nn.Module],
    released: Callable[..., Tensor],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    grad: bool,
    *options: Any,
) -> Makers:
    """A module of ours, given `options` too, and the released way with its weights."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        module = make().to(device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device).to(dtype)

    def by(run: Callable[..., Tensor], *options: Any) -> Candidate:
        own = copy.deepcopy(module).requires_grad_(grad)
        return Candidate(lambda: run(own, x, *options), list(own.parameters()))

    makers: Makers = {"ours": lambda: by(type(module).forward, *options), "released": lambda: by(released)}
    for name in cell.slow_baselines:
        makers[name] = lambda: by(torch.compile(released, **_COMPILED))
    return makers


# ---- the cells --------------------------------------------------------------


def gpu_cells() -> Iterator[Cell]:
    """What bench/gpu.sh times, the most telling first."""
    yield Cell("reattend", 16, 499, slow=True)
    yield Cell("loss", 16, 499, slow=True)
    yield Cell("pair", 16, 499, slow=True)
    yield Cell("attend", 16, 499, slow=True)
    yield Cell("conv", 16, 499, slow=True)
    yield Cell("position", 16, 499, slow=True)
    yield Cell("reattend", 16, 499, mode="resoftmax", slow=True)
    yield Cell("reattend", 16, 499, ragged=True, slow=True)
    for B, T in ((1, 499), (64, 250), (1, 50), (4, 1499), (64, 499), (1, 3000), (16, 100), (64, 50), (4, 200)):
        yield Cell("reattend", B, T)
    for B, T in ((1, 499), (16, 1499), (64, 250)):
        yield Cell("reattend", B, T, mode="resoftmax")
    for B, T in ((1, 499), (64, 499), (1, 50), (16, 1499), (4, 3000)):
        yield Cell("attend", B, T)
    for B, T in ((1, 499), (64, 499), (4, 499), (1, 50), (16, 1499)):
        yield Cell("loss", B, T)
    yield Cell("loss", 16, 499, distance="l1")
    yield Cell("loss", 16, 499, ragged=True)
    yield Cell("loss", 16, 499, d=36)
    for B, T in ((1, 499), (64, 249), (16, 1499)):
        yield Cell("conv", B, T)
    yield Cell("conv", 16, 499, stack="teacher")
    for B, T in ((1, 499), (64, 250), (4, 1499)):
        yield Cell("position", B, T)
    yield Cell("position", 16, 499, stack="teacher")
    yield Cell("attend", 16, 499, d=36)
    yield Cell("reattend", 16, 499, d=36)
    yield Cell("pair", 16, 499, mode="resoftmax")
    yield Cell("pair", 16, 1499)
    yield Cell("reattend", 16, 1499)
    yield Cell("reattend", 64, 3000)


def cpu_cells() -> Iterator[Cell]:
    """What `make bench` times on the CPU twins."""
    for mode in ("exact", "resoftmax"):
        for B, T in ((4, 499), (1, 499)):
            yield Cell("pair", B, T, mode=mode)
    yield Cell("pair", 2, 1499)
    yield Cell("reattend", 4, 499)
    yield Cell("attend", 4, 499)
    yield Cell("pair", 4, 499, ragged=True)
    yield Cell("conv", 1, 499)
    yield Cell("conv", 4, 249, ragged=True)
    yield Cell("loss", 4, 199)
    yield Cell("loss", 1, 499, distance="l1")


def rehearsal_cells() -> Iterator[Cell]:
    """Tiny cells of every kind, for a run without a GPU."""
    small: dict[str, Any] = {"B": 2, "T": 9, "H": 2, "d": 16}
    for op in ("attend", "reattend", "pair"):
        yield Cell(op, **small, slow=op == "reattend")
    yield Cell("pair", **small, mode="resoftmax", ragged=True)
    yield Cell("reattend", **small, ragged=True)
    yield Cell("loss", **small, L=2, Dt=24)
    yield Cell("conv", 1, 9, ragged=True)
    yield Cell("position", 1, 60)
    yield Cell("loss", **small, L=2, Dt=24, distance="l1", ragged=True)
