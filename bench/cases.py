"""The registry of benchmark cases: one cell names an op, a shape and a setting, and builds its candidates.

`make bench` times the cells on a CPU, `bench/gpu.sh` on a GPU, both against the same baselines:

- released: eager PyTorch as in the released code: bmm, softmax, bmm, the map stored; a reusing layer puts the stored
  map through the softmax again ("resoftmax") or not ("exact"); the loss is linear, where, mse layer by layer, float32
  distances as autocast makes them.
- sdpa: PyTorch's fused attention on the shared q and k.
- flex: FlexAttention, compiled.
- compiled: torch.compile of the PyTorch twin.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from armhubert.kernels import AttentionMap, Distance, Impl, Setting, attend, costs, distillation_loss, reattend

Forward = Callable[[], Tensor | tuple[Tensor, ...]]


class Cell(NamedTuple):
    """One benchmark case. Widths default to the preset `armhubert`."""

    op: str
    """attend, reattend, pair (a computing and a reusing layer) or loss."""
    B: int
    T: int
    H: int = 12
    d: int = 40
    setting: Setting = "exact"
    ragged: bool = False
    """Lengths from T / 2 to T instead of none."""
    L: int = 12
    Dt: int = 768
    distance: Distance = "mse"
    slow: bool = False
    """Also against baselines that must be compiled first."""

    @property
    def D(self) -> int:
        """Model width."""
        return self.H * self.d

    @property
    def label(self) -> str:
        """What tables call it."""
        detail = {"loss": self.distance, "attend": ""}.get(self.op, self.setting)
        widths = f"H{self.H} d{self.d}" if self.op != "loss" else f"L{self.L} {self.D}-{self.Dt}"
        return " ".join(p for p in (self.op, detail, f"B{self.B} T{self.T}", widths, "ragged" * self.ragged) if p)

    def floor(self, gpu: costs.Gpu | None, *, backward: bool) -> float | None:
        """Seconds that no implementation in 16-bit beats, of the forward pass or of forward and backward."""
        if gpu is None:
            return None
        return sum(cost.floor(gpu) for cost in self._costs(backward))

    def cost(self, *, backward: bool) -> tuple[float, float]:
        """Fewest bytes and operations."""
        parts = self._costs(backward)
        return sum(c.bytes for c in parts), sum(c.operations for c in parts)

    def _costs(self, backward: bool) -> list[costs.Cost]:
        B, T, H, d = self.B, self.T, self.H, self.d
        parts = []
        for back in (False, True)[: 1 + backward]:
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


def _released_apply(
    logits: Tensor, v: Tensor, lengths: Tensor | None, B: int, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    rows, T, _ = logits.shape
    if lengths is not None:
        padding = torch.arange(T, device=logits.device) >= lengths[:, None]
        logits = logits.view(B, rows // B, T, T).masked_fill(padding[:, None, None], -torch.inf).view(rows, T, T)
    p = logits.float().softmax(-1).to(logits.dtype)
    out = torch.bmm(F.dropout(p, dropout), v)
    return out.view(B, rows // B, T, -1).transpose(1, 2).reshape(B, T, -1), p


def released_reattend(
    stored: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    setting: Setting = "exact",
    lengths: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """A stored map applied to new values, through the softmax a second time for "resoftmax"."""
    B, T, _D = x.shape
    H = stored.shape[0] // B
    v = F.linear(x, weight, bias).view(B, T, H, -1).transpose(1, 2).reshape(B * H, T, -1)
    if setting == "resoftmax":
        return _released_apply(stored, v, lengths, B)[0]
    return torch.bmm(stored, v).view(B, H, T, -1).transpose(1, 2).reshape(B, T, -1)


def sdpa_attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, *, dropout: float = 0.0, **_: Any
) -> tuple[Tensor, AttentionMap]:
    """PyTorch's fused attention."""
    mask = None
    if lengths is not None:
        mask = (torch.arange(q.shape[1], device=q.device) < lengths[:, None])[:, None, None]
    heads = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2), AttentionMap(q, k, None, lengths)


def sdpa_reattend(kept: AttentionMap, x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """PyTorch's fused attention on the shared q and k ("exact" only)."""
    v = F.linear(x, weight, bias).view(kept.queries.shape)
    return sdpa_attend(kept.queries, kept.keys, v, kept.lengths)[0]


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
        frames = measure(F.linear(h, W, b).float(), target.float(), reduction="none").mean(-1)
        if lengths is not None:
            frames = frames * (torch.arange(h.shape[1], device=h.device) < lengths[:, None])
        sums.append(frames.sum())
    return torch.stack(sums)


def _flex(lengths: Tensor | None, T: int, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if lengths is not None:
        block_mask = create_block_mask(lambda b, h, i, j: j < lengths[b], len(lengths), None, T, T, device=device.type)  # type: ignore[no-untyped-call]
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask)
        return out.transpose(1, 2).flatten(2)  # type: ignore[union-attr]

    return run


# ---- building a cell --------------------------------------------------------


def build(
    cell: Cell, device: torch.device, dtype: torch.dtype, *, impl: Impl = "auto", grad: bool = False
) -> dict[str, Candidate]:
    """The candidates of a cell by name, "ours" first; each with leaves of its own that share their values."""
    return _loss(cell, device, dtype, impl, grad) if cell.op == "loss" else _attention(cell, device, dtype, impl, grad)


def lengths_of(cell: Cell, device: torch.device) -> Tensor | None:
    """Valid frames of a ragged cell, evenly spread from T down to T / 2; None of a full one."""
    if not cell.ragged:
        return None
    return torch.linspace(cell.T, max(1, cell.T // 2), cell.B, dtype=torch.float64).long().to(device)


def _attention(cell: Cell, device: torch.device, dtype: torch.dtype, impl: Impl, grad: bool) -> dict[str, Candidate]:
    B, T, H, d, D = cell.B, cell.T, cell.H, cell.d, cell.D
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * scale
        return t.to(dtype)

    qkv = draw(B, T, 3, H, d)
    x, weight, bias = draw(B, T, D), draw(H * d, D, scale=D**-0.5), draw(H * d)
    lengths = lengths_of(cell, device)

    def leaves(*values: Tensor) -> list[Tensor]:
        return [t.detach().requires_grad_(grad) for t in values]

    def ways(name: str, make_map: Callable[..., Any], reuse: Callable[..., Tensor]) -> tuple[str, Candidate]:
        """The cell's op by one pair of functions; a lone reusing layer starts from a finished map."""
        q, k, v, inner, W, b = leaves(*qkv.unbind(2), x, weight, bias)
        options: dict[str, Any] = {"setting": cell.setting, "impl": impl}
        if name.startswith("released"):
            options["lengths"] = lengths
        if cell.op == "attend":
            return name, Candidate(lambda: make_map(q, k, v, lengths, impl=impl)[0], [q, k, v])
        if cell.op == "pair":

            def both() -> tuple[Tensor, Tensor]:
                out, kept = make_map(q, k, v, lengths, impl=impl)
                return out, reuse(kept, inner, W, b, **options)

            return name, Candidate(both, [q, k, v, inner, W, b])
        with torch.no_grad():
            kept = make_map(q, k, v, lengths, impl=impl)[1]
        if isinstance(kept, Tensor):
            (kept,) = leaves(kept)
            return name, Candidate(lambda: reuse(kept, inner, W, b, **options), [kept, inner, W, b])
        handle = kept._replace(queries=q, keys=k)
        return name, Candidate(lambda: reuse(handle, inner, W, b, **options), [q, k, inner, W, b])

    found = dict([ways("ours", attend, reattend), ways("released", released_attend, released_reattend)])
    exact = cell.setting == "exact" or cell.op == "attend"
    if exact:
        found |= [ways("sdpa", sdpa_attend, sdpa_reattend)]
    if cell.slow:
        options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}

        def twin_attend(*args: Any, impl: Impl) -> Any:
            return attend(*args, impl="torch")

        def twin_reattend(*args: Any, impl: Impl, setting: Setting) -> Tensor:
            return reattend(*args, setting=setting, impl="torch")

        name, twin = ways("compiled", twin_attend, twin_reattend)
        found[name] = twin._replace(forward=torch.compile(twin.forward, **options))
        if exact:
            attention = _flex(lengths, T, device)

            def flex_attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, impl: Impl) -> Any:
                return attention(q, k, v), AttentionMap(q, k, None, lengths)

            def flex_reattend(kept: AttentionMap, x: Tensor, W: Tensor, b: Tensor, **_: Any) -> Tensor:
                return attention(kept.queries, kept.keys, F.linear(x, W, b).view(kept.queries.shape))

            found |= [ways("flex", flex_attend, flex_reattend)]
    return found


def _loss(cell: Cell, device: torch.device, dtype: torch.dtype, impl: Impl, grad: bool) -> dict[str, Candidate]:
    L, B, T, D, Dt = cell.L, cell.B, cell.T, cell.D, cell.Dt
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    hidden = [draw(B, T, D) for _ in range(L)]
    weight, bias = draw(L, Dt, D) * D**-0.5, draw(L, Dt)
    clean, masked = ([draw(B, T, Dt) for _ in range(L)] for _ in range(2))
    mask = torch.rand(B, T, generator=generator, device=device) < 0.7
    lengths = lengths_of(cell, device)

    def way(run: Callable[..., Tensor], **options: Any) -> Candidate:
        leaves = [t.detach().requires_grad_(grad) for t in (weight, bias, *hidden)]
        W, b, *h = leaves
        forward = lambda: run(h, W, b, clean, masked, mask, lengths, distance=cell.distance, **options)  # noqa: E731
        return Candidate(forward, leaves)

    found = {"ours": way(distillation_loss, impl=impl), "released": way(released_loss)}
    if cell.slow:
        options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs", "dynamic": False}
        found["compiled"] = way(torch.compile(distillation_loss, **options), impl="torch")
        found["compiled released"] = way(torch.compile(released_loss, **options))
    return found


# ---- the cells --------------------------------------------------------------


def gpu_cells() -> Iterator[Cell]:
    """What bench/gpu.sh times, the most telling first."""
    yield Cell("reattend", 16, 499, slow=True)
    yield Cell("loss", 16, 499, slow=True)
    yield Cell("pair", 16, 499, slow=True)
    yield Cell("attend", 16, 499, slow=True)
    yield Cell("reattend", 16, 499, setting="resoftmax", slow=True)
    yield Cell("reattend", 16, 499, ragged=True, slow=True)
    for B, T in ((1, 499), (64, 250), (1, 50), (4, 1499), (64, 499), (1, 3000), (16, 100), (64, 50), (4, 200)):
        yield Cell("reattend", B, T)
    for B, T in ((1, 499), (16, 1499), (64, 250)):
        yield Cell("reattend", B, T, setting="resoftmax")
    for B, T in ((1, 499), (64, 499), (1, 50), (16, 1499), (4, 3000)):
        yield Cell("attend", B, T)
    for B, T in ((1, 499), (64, 499), (4, 499), (1, 50), (16, 1499)):
        yield Cell("loss", B, T)
    yield Cell("loss", 16, 499, distance="l1")
    yield Cell("loss", 16, 499, ragged=True)
    yield Cell("loss", 16, 499, d=36)
    yield Cell("attend", 16, 499, d=36)
    yield Cell("reattend", 16, 499, d=36)
    yield Cell("pair", 16, 499, setting="resoftmax")
    yield Cell("pair", 16, 1499)
    yield Cell("reattend", 16, 1499)
    yield Cell("reattend", 64, 3000)


def cpu_cells() -> Iterator[Cell]:
    """What `make bench` times on the CPU twins."""
    for setting in ("exact", "resoftmax"):
        for B, T in ((4, 499), (1, 499)):
            yield Cell("pair", B, T, setting=setting)
    yield Cell("pair", 2, 1499)
    yield Cell("reattend", 4, 499)
    yield Cell("attend", 4, 499)
    yield Cell("pair", 4, 499, ragged=True)
    yield Cell("loss", 4, 199)
    yield Cell("loss", 1, 499, distance="l1")


def rehearsal_cells() -> Iterator[Cell]:
    """Tiny cells of every kind, for a run without a GPU."""
    small: dict[str, Any] = {"B": 2, "T": 9, "H": 2, "d": 16}
    for op in ("attend", "reattend", "pair"):
        yield Cell(op, **small, slow=op == "reattend")
    yield Cell("pair", **small, setting="resoftmax", ragged=True)
    yield Cell("reattend", **small, ragged=True)
    yield Cell("loss", **small, L=2, Dt=24, slow=True)
    yield Cell("loss", **small, L=2, Dt=24, distance="l1", ragged=True)
