"""Attention with map reuse by PyTorch: the path on a CPU and under a compiler, and the oracle of the tests.

Formulas and public functions are in reuse_attention.py, Triton's kernels in triton_reuse_attention.py. `attend` and
`reattend` choose a way, the first case that applies:

    case                                        attend       reattend, exact          reattend, resoftmax
    a compiler or exporter traces               sdpa         sdpa                     composite
    dropout                                     recomputed
    bfloat16 in inference, large, on a CPU      by pieces    kept maps,               kept maps,
      where that pays (`_pieces_pay`)                          else by pieces           else by pieces
    float32, large, on a CPU where oneDNN       by heads     kept maps,               kept maps,
      multiplies faster (`_heads_pay`)                         else by heads            else recomputed
    anything else                               sdpa         sdpa                     recomputed

- sdpa: PyTorch's `scaled_dot_product_attention`, which keeps no map and draws its own dropout.
- composite: the second softmax in operations that can be traced, over the map of the whole batch.
- recomputed: a piece of an utterance's map at a time, made again in backward, so that no whole map ever exists.
- by pieces: the same with products in bfloat16, in inference; pieces may be kept.
- by heads: a whole map at a time, that of one head, its products by oneDNN; maps may be kept, and are for backward.
- kept maps: those that `attend` has kept, times the new values.

Maps that were kept without gradients are passed over where q or k need one.

Legend: B utterances, T frames, n valid frames of an utterance, H heads, d head width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from armhubert.kernels import onednn
from armhubert.kernels.runtime import frame_mask, needs_gradient, once_differentiable, tracing

Maps = tuple[Tensor, ...]
"""What `attend` keeps for `reattend`; `AttentionMap.probabilities` says in which form."""

# ---- which way --------------------------------------------------------------

BY_PIECES = 2**18
"""Fewest multiply-adds of one head's product for which bfloat16 attention by pieces beats sdpa."""
BY_HEADS = 2**21
"""Fewest multiply-adds of one head's product, for each thread, for which attention by heads beats sdpa: each product
is a parallel region of its own (measured with two threads)."""
KEPT = 2**26
"""Most bytes of maps that pay in inference: attention goes by heads if one utterance's maps fit, and keeps maps, by
heads or by pieces, if those of the batch do. malloc gives what is larger back to the system and maps it anew, page by
page; longer utterances are no faster by heads either."""
KEPT_FOR_BACKWARD = 2**28
"""Most bytes of a batch's maps for which attention goes by heads with gradients: the computing layer then keeps them
until its backward pass, where they save products as well."""
LONGEST = 768
"""Longest sum over frames that oneDNN computes in one piece here. Its rounding error grows with the length, but up to
this length the map's own rounding error hides it. After a second softmax the map has almost none, so `onednn.LONGEST`
applies there."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    *,
    keep: bool,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Maps | None]:
    """softmax(q k^T / sqrt(d)) v of [B, T, H, d] -> [B, T, H d], and with `keep` the maps, where keeping them pays."""
    gradients = needs_gradient(q, k, v)
    if tracing():
        return _sdpa(q, k, v, lengths, dropout), None
    if dropout:
        return _Recomputed.apply(q, k, v, lengths, seed, dropout, False), None
    by_heads = _heads_pay(q, gradients)
    maps: Maps = ()
    if _pieces_pay(q, gradients):
        out, maps = _by_pieces(q, k, v, lengths, keep and _batch_fits(q))
    elif by_heads and gradients:
        out, *kept = _ByHeads.apply(q, k, v, lengths)
        maps = tuple(kept) if keep else ()
    elif by_heads:
        out, maps = _by_heads(q, k, v, lengths, keep and _batch_fits(q))
    else:
        out = _sdpa(q, k, v, lengths)
    return out, maps or None


def reattend(maps: Maps | None, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, resoftmax: bool) -> Tensor:
    """The map of q and k, which `attend` may have kept, times values v [B, T, H, d] -> [B, T, H d]."""
    gradients = needs_gradient(q, k, v)
    if maps is not None and needs_gradient(q, k) and not maps[0].requires_grad:
        maps = None  # made where no gradient was asked for, they would lead none to q and k
    if tracing():
        return _resoftmax_composite(q, k, v, lengths) if resoftmax else _sdpa(q, k, v, lengths)
    if _pieces_pay(q, gradients):
        if maps is None:
            return _by_pieces(q, k, v, lengths, False, resoftmax)[0]
        return _apply_pieces(maps, v, lengths, resoftmax)
    if maps is not None and _heads_pay(q, gradients):
        return _ApplyMaps.apply(resoftmax, v, *maps) if gradients else _apply_maps(maps, v, resoftmax)
    if resoftmax:
        return _Recomputed.apply(q, k, v, lengths, None, 0.0, True)
    return attend(q, k, v, lengths, keep=False)[0]


def _pieces_pay(q: Tensor, gradients: bool) -> bool:
    """Whether attention by pieces beats sdpa: in bfloat16, where PyTorch's own is as slow as in float32 or slower.

    That is so on AMD's processors with AVX-512. Zen 4 was measured by pieces, Zen 5 not yet.
    """
    return (
        not gradients
        and q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.dtype in onednn.DTYPES
        and onednn.AVX512
        and not onednn.MKL_AT_ITS_BEST
        and q.shape[1] ** 2 * q.shape[3] >= BY_PIECES
    )


def _heads_pay(q: Tensor, gradients: bool) -> bool:
    """Whether attention by heads beats sdpa, which multiplies by MKL: see `armhubert.kernels.onednn`."""
    B, T, H, d = q.shape
    if not onednn.serves(q) or T * T * d < BY_HEADS * torch.get_num_threads():
        return False
    size = H * T * T * q.itemsize
    return T <= LONGEST and B * size <= KEPT_FOR_BACKWARD if gradients else size <= KEPT


def _batch_fits(q: Tensor) -> bool:
    """Whether the maps of the whole batch are small enough to be kept in inference."""
    B, T, H, _ = q.shape
    return B * H * T * T * q.itemsize <= KEPT


# ---- sdpa and composite -----------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float = 0.0) -> Tensor:
    """[B, T, H, d] -> [B, T, H d], PyTorch's own attention over valid keys."""
    T = q.shape[1]
    valid = None
    if lengths is not None and (tracing() or not _all_full(lengths, T)):
        valid = frame_mask(lengths, T)[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, valid, dropout).transpose(1, 2).flatten(2)


def _all_full(lengths: Tensor, T: int) -> bool:
    """Whether nothing is padded; False too where the answer would cost a synchronisation."""
    return lengths.device.type == "cpu" and bool((lengths == T).all())


def _resoftmax_composite(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """The second softmax for compilers and exporters, over the map of the whole batch."""
    logits = torch.matmul(q.transpose(1, 2) * q.shape[-1] ** -0.5, k.permute(0, 2, 3, 1))
    valid = None if lengths is None else frame_mask(lengths, q.shape[1])[:, None, None]
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    p = logits.softmax(-1)
    if valid is not None:
        p = p.masked_fill(~valid, -torch.inf)
    return torch.matmul(p.softmax(-1), v.transpose(1, 2)).transpose(1, 2).flatten(2)


# ---- shared by the ways below -----------------------------------------------


def _valid(lengths: Tensor | None, B: int, T: int) -> list[int]:
    """Valid frames of each utterance."""
    return [T] * B if lengths is None else lengths.tolist()


def _softmax_(logits: Tensor) -> Tensor:
    """Softmax over keys, in place on a CPU: a second tensor of this size would leave no room in the cache."""
    return torch.softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)


def _pieces(H: int, n: int, device: torch.device, entries: int) -> Iterator[tuple[slice, slice]]:
    """Heads and query rows to work on together: a few heads, or a few rows of one; all of an utterance off the CPU."""
    if device.type != "cpu":
        yield slice(0, H), slice(0, n)
        return
    heads, rows = max(1, entries // (n * n)), max(1, min(n, entries // n))
    for h in range(0, H, heads):
        for row in range(0, n, rows):
            yield slice(h, min(H, h + heads)), slice(row, min(n, row + rows))


# ---- by heads ---------------------------------------------------------------


def _by_heads(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, keep: bool) -> tuple[Tensor, Maps]:
    """[B, T, H, d] -> [B, T, H d], padded rows 0, and with `keep` the maps, [n, n] of each utterance and head.

    Each is a tensor of its own, since malloc maps large ones anew each time, page by page.
    """
    B, T, H, d = q.shape
    out = q.new_zeros(B, T, H, d)
    maps = []
    for b, n in enumerate(_valid(lengths, B, T)):
        queries = (q[b, :n].transpose(0, 1) * d**-0.5).contiguous()  # [H, n, d]
        keys = k[b, :n].transpose(0, 1).contiguous()
        values = v[b, :n].permute(1, 2, 0).contiguous()  # [H, d, n]
        for head in range(H):
            p = _softmax_(onednn.product(queries[head], keys[head]))
            out[b, :n, head] = _product(p, values[head])
            if keep:
                maps.append(p)
    return out.flatten(2), tuple(maps)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T where the sum goes over frames: [N, n] and [N', n] or a view of its transpose -> [N, N']."""
    return onednn.product(x, weight, longest=LONGEST)


def _gradients_of_product(p: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the product of p [n, n] and v [n, d] from its own, u: for p, and for v the transpose, [d, n]."""
    return onednn.product(u, v), _product(u.t().contiguous(), p.t())


_gradient_of_softmax = torch.ops.aten._softmax_backward_data


class _ByHeads(torch.autograd.Function):
    """`_by_heads` with gradients: the maps are outputs, for which the layers that reuse them return gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        out, maps = _by_heads(q, k, v, lengths, True)
        ctx.save_for_backward(q, k, v, *maps)
        ctx.set_materialize_grads(False)
        return out, *maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, *d_maps: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *maps = ctx.saved_tensors
        B, T, H, d = q.shape
        dq, dk, dv = (q.new_zeros(B, H, d, T) for _ in range(3))
        for b in range(B):
            n = len(maps[b * H])
            queries, keys = ((x[b, :n] * d**-0.5).permute(1, 2, 0).contiguous() for x in (q, k))  # [H, d, n]
            values = v[b, :n].transpose(0, 1).contiguous()  # [H, n, d]
            us = None if d_out is None else d_out[b, :n].reshape(n, H, d).transpose(0, 1).contiguous()
            for head in range(H):
                p, dp = maps[b * H + head], d_maps[b * H + head]
                if us is not None:
                    own, dv[b, head, :, :n] = _gradients_of_product(p, values[head], us[head])
                    dp = own if dp is None else own.add_(dp)
                if dp is not None:
                    ds = _gradient_of_softmax(dp, p, -1, p.dtype)
                    dq[b, head, :, :n] = _product(keys[head], ds)
                    dk[b, head, :, :n] = _product(queries[head], ds.t())
        return *(x.permute(0, 3, 1, 2) for x in (dq, dk, dv)), None


def _apply_maps(maps: Maps, v: Tensor, resoftmax: bool) -> Tensor:
    """Kept maps times values [B, T, H, d] -> [B, T, H d], padded rows 0."""
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    B, _, H, _ = v.shape
    for b in range(B):
        n = len(maps[b * H])
        values = v[b, :n].permute(1, 2, 0).contiguous()  # [H, d, n]
        for head, (p, v_h) in enumerate(zip(maps[b * H : (b + 1) * H], values, strict=True)):
            out[b, :n, head] = onednn.product(p.softmax(-1), v_h) if resoftmax else _product(p, v_h)
    return out.flatten(2)


class _ApplyMaps(torch.autograd.Function):
    """`_apply_maps` with gradients."""

    @staticmethod
    def forward(ctx: Any, resoftmax: bool, v: Tensor, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(v, *maps)
        ctx.resoftmax = resoftmax
        return _apply_maps(maps, v, resoftmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        v, *maps = ctx.saved_tensors
        B, T, H, d = v.shape
        dv = v.new_zeros(B, H, d, T)
        d_maps = []
        for b in range(B):
            n = len(maps[b * H])
            values = v[b, :n].transpose(0, 1).contiguous()  # [H, n, d]
            us = d_out[b, :n].reshape(n, H, d).transpose(0, 1).contiguous()
            for head, p in enumerate(maps[b * H : (b + 1) * H]):
                weights = p.softmax(-1) if ctx.resoftmax else p
                dp, dv[b, head, :, :n] = _gradients_of_product(weights, values[head], us[head])
                d_maps.append(_gradient_of_softmax(dp, weights, -1, p.dtype) if ctx.resoftmax else dp)
        return None, dv.permute(0, 3, 1, 2), *d_maps


# ---- by pieces --------------------------------------------------------------

LOW_PIECE = 2**21
"""Entries of a bfloat16 map worked on at a time (4 MB)."""
LARGE_LOGIT = 16
"""Magnitude from which bfloat16's steps are too coarse for logits: half a step is 3 % of a probability."""


def _low_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """Logits [h, r, n] in bfloat16 of queries [h, r, d] and keys [h, n, d]; large ones less about their row's maximum.

    Subtracting it is part of the product, which is added up and scaled in float32, so that what matters most is rounded
    least.
    """
    scale = queries.shape[-1] ** -0.5

    def product(x: Tensor, y: Tensor) -> Tensor:
        return torch.baddbmm(x.new_empty(1, 1, 1), x, y.transpose(1, 2), beta=0, alpha=scale)

    logits = product(queries, keys)
    if logits.max() <= LARGE_LOGIT and logits.min() >= -LARGE_LOGIT:
        return logits
    highest = logits.amax(-1, keepdim=True) / scale
    return product(torch.cat([queries, highest], -1), F.pad(keys, (0, 1), value=-1.0))


def _by_pieces(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, keep: bool, resoftmax: bool = False
) -> tuple[Tensor, Maps]:
    """Like `_by_heads`, but a piece of an utterance's map at a time; with `resoftmax` its softmax weighs the values."""
    B, T, H, d = q.shape
    out = q.new_zeros(B, T, H, d)
    maps = []
    for b, n in enumerate(_valid(lengths, B, T)):
        queries, keys, values = (x[b, :n].transpose(0, 1).contiguous() for x in (q, k, v))  # [H, n, d]
        for h, r in _pieces(H, n, v.device, LOW_PIECE):
            p = _softmax_(_low_logits(queries[h, r], keys[h]))
            if resoftmax:
                p = _softmax_(p)
            out[b, r, h] = torch.bmm(p, values[h]).transpose(0, 1)
            if keep:
                maps.append(p)
    return out.flatten(2), tuple(maps)


def _apply_pieces(maps: Maps, v: Tensor, lengths: Tensor | None, resoftmax: bool) -> Tensor:
    """Maps that `_by_pieces` kept times values [B, T, H, d] -> [B, T, H d], padded rows 0."""
    B, T, H, _ = v.shape
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    kept = iter(maps)
    for b, n in enumerate(_valid(lengths, B, T)):
        values = v[b, :n].transpose(0, 1).contiguous()
        for h, r in _pieces(H, n, v.device, LOW_PIECE):
            p = next(kept)
            out[b, r, h] = torch.bmm(p.softmax(-1) if resoftmax else p, values[h]).transpose(0, 1)
    return out.flatten(2)


# ---- recomputed -------------------------------------------------------------

PIECE = 2**18
"""Entries of a map worked on at a time on a CPU, 1 MB of float32: they stay cached, in pages that malloc reuses."""


SPREAD = 0x9E3779B97F4A7C15
"""Odd, near 2**64 / the golden ratio: its multiples are far from each other modulo 2**63."""


def _generators(seed: Tensor | None, B: int) -> list[torch.Generator | None]:
    """Each utterance's generator of dropout factors, which are drawn piece by piece, in backward as in forward.

    Seeds are spread, so that those of neighbours (a step's number, say) share no utterance's factors.
    """
    if seed is None:
        return [None] * B
    first = int(seed) * SPREAD
    return [torch.Generator(seed.device).manual_seed((first + b) % 2**63) for b in range(B)]


def _keep_mask(p: Tensor, generator: torch.Generator, dropout: float) -> Tensor:
    """The next dropout factors, 0 or 1 / (1 - dropout), in the shape and dtype of a piece of a map."""
    keep = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.float32) >= dropout
    return keep.to(p.dtype).mul_(1 / (1 - dropout))


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """Scaled queries [h, r, d] and keys [h, n, d] -> [h, r, n], at least float32."""
    return torch.bmm(q, k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    resoftmax: bool,
) -> Tensor:
    """Output [B, T, H d], padded rows 0, of a piece of an utterance's map at a time: no whole map ever exists.

    With gradients, keeping the pieces for layers that reuse the map does not pay: they must be written and read again,
    in pages that are fresh each time, and a pair of layers takes longer than with the map made twice (CPU, 4 x 499).
    """
    B, T, H, d = q.shape
    out = q.new_zeros(B, T, H, d)
    generators = _generators(seed, B)
    for b, n in enumerate(_valid(lengths, B, T)):
        q_b, k_b, v_b = (x[b, :n].transpose(0, 1) for x in (q, k, v))
        q_b = q_b * d**-0.5
        generator = generators[b]
        for h, r in _pieces(H, n, q.device, PIECE):
            p = _softmax_(_logits(q_b[h, r], k_b[h]))
            if resoftmax:
                p = _softmax_(p)
            if generator is not None:
                p *= _keep_mask(p, generator, dropout)
            out[b, r, h] = torch.bmm(p.to(v.dtype), v_b[h]).transpose(0, 1)
    return out.flatten(2)


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    resoftmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from a piece of an utterance's map at a time; the formulas are in reuse_attention.py."""
    B, T, H, d = q.shape
    dq, dk, dv = (x.new_zeros(B, H, T, d) for x in (q, k, v))
    generators = _generators(seed, B)
    for b, n in enumerate(_valid(lengths, B, T)):
        q_b, k_b, v_b = (x[b, :n].transpose(0, 1) for x in (q, k, v))
        q_b = q_b * d**-0.5
        u_b, o_b = (x[b, :n].view(n, H, d).transpose(0, 1) for x in (d_out, out))
        dq_b, dk_b, dv_b = (x[b, :, :n] for x in (dq, dk, dv))
        generator = generators[b]
        for h, r in _pieces(H, n, q.device, PIECE):
            u = u_b[h, r]
            p = _softmax_(_logits(q_b[h, r], k_b[h]))
            factors = None if generator is None else _keep_mask(p, generator, dropout)
            weights = p.softmax(-1) if resoftmax else p if factors is None else p * factors
            dv_b[h] += torch.bmm(weights.to(q.dtype).transpose(1, 2), u)
            delta = (u.to(p.dtype) * o_b[h, r]).sum(-1, keepdim=True)
            dp = torch.bmm(u, v_b[h].transpose(1, 2)).to(p.dtype)
            if resoftmax:
                dp = dp.sub_(delta).mul_(weights)
                delta = (p * dp).sum(-1, keepdim=True)
            elif factors is not None:
                dp *= factors
            ds = dp.sub_(delta).mul_(p).to(q.dtype)
            dq_b[h, r] = torch.bmm(ds, k_b[h]).mul_(d**-0.5)
            dk_b[h] += torch.bmm(ds.transpose(1, 2), q_b[h, r])
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class _Recomputed(torch.autograd.Function):
    """`attention_forward` with gradients, for which the map is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        seed: Tensor | None,
        dropout: float,
        resoftmax: bool,
    ) -> Tensor:
        out = attention_forward(q, k, v, lengths, seed, dropout, resoftmax)
        ctx.save_for_backward(q, k, v, out, lengths, seed)
        ctx.settings = dropout, resoftmax
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lengths, seed = ctx.saved_tensors
        grads = attention_backward(d_out.contiguous(), q, k, v, out, lengths, seed, *ctx.settings)
        return *grads, None, None, None, None
