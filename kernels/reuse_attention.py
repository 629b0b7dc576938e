"""Attention whose map is kept, and layers that reuse a kept map with values of their own.

    computing layer:  A_h = softmax_j(q_h k_h^T / sqrt(d))  over valid keys j,   out = concat_h(A_h v_h)
    reusing layer:    out = concat_h(A_h V_h),   V = X W^T + b                              ("exact")
                      out = concat_h(softmax_j(A_h) V_h)                                    ("resoftmax")

The map is a handle (q, k, log-sum-exp, lengths), not a tensor: a reusing layer recomputes p_ij = exp(s_ij - lse_i) tile
by tile, in memory linear in T; where that pays, the computing layer stores it besides (`variants.py`; with gradients
only on a CPU, `KEPT_FOR_BACKWARD`). "resoftmax" is what the released ARMHuBERT weights were trained with: the map went
through the softmax twice. Its second softmax needs no maximum, since probabilities lie in [0, 1]: with e = exp(A) - 1,

    softmax(A) V = (sum_valid V + e V) / (T_valid + sum e).

Backward, with p = A, D_i = dout_i . out_i, Z_i = T_valid + sum_j e_ij, u = dout (exact) or dout / Z (resoftmax):

    exact:      dV_j = sum_i p_ij u_i            dp_ij = u_i . V_j
    resoftmax:  dV_j = sum_i (1 + e_ij) u_i      dp_ij = (1 + e_ij) (u_i . V_j - D_i / Z_i)
    both:       ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij),   dq_i = sum_j ds_ij k_j / sqrt(d),   dk_j alike

so gradients reach q and k of the computing layer from every layer that reuses its map, and no [T, T] tensor is kept.
Source: Jang et al., Recycle-and-Distill (arXiv 2305.11685), attention map reusing.

Legend: B utterances, T frames, H heads, d head width, D model width.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from armhubert.kernels import onednn
from armhubert.kernels.onednn import linear
from armhubert.kernels.runtime import (
    Impl,
    autocast,
    check_lengths,
    frame_mask,
    needs_gradient,
    register,
    resolve_impl,
    tracing,
)
from armhubert.kernels.variants import project_inside, store_map

Setting = Literal["exact", "resoftmax"]
MAX_HEAD_WIDTH = 128
PITCH = 8
"""Rows of a stored map start at multiples of so many numbers, at least 16 bytes."""


def pitched(T: Any) -> Any:
    """Numbers from row to row of a stored map of T frames."""
    return (T + PITCH - 1) // PITCH * PITCH


class AttentionMap(NamedTuple):
    """What a reusing layer needs of a computing layer's attention: enough to recompute softmax(q k^T) tile by tile."""

    queries: Tensor
    """[B, T, H, d], any strides (a view of a fused projection)."""
    keys: Tensor
    """[B, T, H, d]."""
    log_sum_exp: Tensor | None
    """[B, H, T] float32, natural log of the sum of exponentials of the scaled logits; None from the PyTorch twin."""
    lengths: Tensor | None
    """[B] valid frames; None if all T are."""
    probabilities: tuple[Tensor, ...] | None = None
    """The map itself, where storing it pays. From the PyTorch twin, of each utterance in turn, n its valid frames,
    [n, n] of each head, in bfloat16 pieces [h, r, n] of a few heads or rows; from Triton, never with gradients, one
    [B, H, T, pitched(T)], 0 at padded rows and invalid keys."""


# ---- PyTorch: the CPU path and the oracle of the tests ----------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, dropout: float = 0.0) -> Tensor:
    """[B, T, H, d] -> [B, T, H d], PyTorch's own attention over valid keys."""
    T = q.shape[1]
    valid = None
    if lengths is not None and (tracing() or not _all_full(lengths, T)):
        valid = frame_mask(lengths, T)[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, valid, dropout).transpose(1, 2).flatten(2)


def _all_full(lengths: Tensor, T: int) -> bool:
    """Whether nothing is padded, asked only where the answer costs no synchronisation."""
    return lengths.device.type == "cpu" and bool((lengths == T).all())


def _valid(lengths: Tensor | None, B: int, T: int) -> list[int]:
    """Valid frames of each utterance."""
    return [T] * B if lengths is None else lengths.tolist()


def _generator(seed: Tensor | None, b: int) -> torch.Generator | None:
    """What the dropout factors of utterance b are drawn from, piece by piece, forward as backward."""
    return None if seed is None else torch.Generator(seed.device).manual_seed((int(seed) + b) % 2**63)


def _keep_mask(p: Tensor, generator: torch.Generator, dropout: float) -> Tensor:
    """The next dropout factors, 0 or 1 / (1 - dropout), in the shape and dtype of a piece of a map."""
    keep = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.float32) >= dropout
    return keep.to(p.dtype).mul_(1 / (1 - dropout))


BY_HEADS = 2**21
"""Multiply-adds of one head's product, a thread, from which a head at a time by oneDNN beats
scaled_dot_product_attention: each product is a parallel region of its own (measured with two threads)."""
KEPT = 2**26
"""Most bytes of a batch's maps to keep: malloc gives more than that back to the system and maps it anew, page by page.
Longer utterances are no faster head by head either."""
KEPT_FOR_BACKWARD = 2**28
"""Likewise with gradients, where keeping saves products as well: as much memory as a computing layer should hold until
its backward pass."""
LONGEST = 768
"""Frames that oneDNN adds up in one go here, where the rounding of the map itself hides a part of its own; not so after
the second softmax, which leaves hardly any of it."""


def _heads_apart(q: Tensor, gradients: bool) -> bool:
    """Whether to go head by head: `_sdpa` multiplies by MKL, see `armhubert.kernels.onednn`."""
    B, T, H, d = q.shape
    if not onednn.serves(q) or T * T * d < BY_HEADS * torch.get_num_threads():
        return False
    size = H * T * T * q.itemsize
    return T <= LONGEST and B * size <= KEPT_FOR_BACKWARD if gradients else size <= KEPT


def _softmax_(logits: Tensor) -> Tensor:
    """In place on a CPU: a second tensor of this size would leave no room in the cache."""
    return torch.softmax(logits, -1, out=logits if logits.device.type == "cpu" else None)


def _by_heads(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """[B, T, H, d] -> [B, T, H d], padded rows 0, and with `keep` the maps, see `AttentionMap`.

    A map a head, since malloc maps large tensors anew each time, page by page.
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
    """Of p v, [n, n] and [n, d], whose gradient is u: for p, and for v the transpose [d, n]."""
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
    @torch.autograd.function.once_differentiable
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


def _apply_maps(maps: tuple[Tensor, ...], v: Tensor, resoftmax: bool) -> Tensor:
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
    @torch.autograd.function.once_differentiable
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


PIECE = 2**18
"""Entries of a map worked on at a time on a CPU (1 MB of float32): cached, and in pages that malloc uses again."""
LOW_PIECE = 2**21
"""Likewise in bfloat16 (4 MB)."""
BY_PIECES = 2**18
"""Multiply-adds of one head's product from which products by oneDNN and a softmax, a piece at a time, beat
scaled_dot_product_attention in bfloat16."""
LARGE_LOGIT = 16
"""Magnitude from which bfloat16's steps are too coarse for logits: half a step is 3 % of a probability."""


def _pieces(H: int, n: int, device: torch.device, entries: int) -> Iterator[tuple[slice, slice]]:
    """Heads and query rows to work on together: a few heads, or a few rows of one; all of an utterance off the CPU."""
    if device.type != "cpu":
        yield slice(0, H), slice(0, n)
        return
    heads, rows = max(1, entries // (n * n)), max(1, min(n, entries // n))
    for h in range(0, H, heads):
        for row in range(0, n, rows):
            yield slice(h, min(H, h + heads)), slice(row, min(n, row + rows))


def _pieces_pay(q: Tensor) -> bool:
    """Whether to go by pieces: in bfloat16, where PyTorch's own attention is as slow as in float32 or slower.

    So it is on AMD's processors with AVX-512. Zen 4 was measured by pieces, Zen 5 not yet.
    """
    return (
        not tracing()
        and q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.dtype in onednn.DTYPES
        and onednn.AVX512
        and not onednn.MKL_AT_ITS_BEST
        and q.shape[1] ** 2 * q.shape[3] >= BY_PIECES
    )


def _low_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """Queries [h, r, d] and keys [h, n, d] -> [h, r, n], bfloat16; large ones less about their row's maximum.

    That joins the product, which is added up and scaled in float32, so that what matters most is rounded least.
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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `_by_heads`, a piece of an utterance's map at a time; with `resoftmax`, its softmax times the values."""
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


def _apply_pieces(maps: tuple[Tensor, ...], v: Tensor, lengths: Tensor | None, resoftmax: bool) -> Tensor:
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


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, keep: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Attention without dropout by PyTorch, and its maps where they are wanted and keeping them pays."""
    gradients = needs_gradient(q, k, v)
    by_pieces = not gradients and _pieces_pay(q)
    if not by_pieces and not _heads_apart(q, gradients):
        return _sdpa(q, k, v, lengths), None
    if gradients:
        out, *kept = _ByHeads.apply(q, k, v, lengths)
        maps = tuple(kept) if keep else ()
    else:
        B, T, H, _ = q.shape
        attention = _by_pieces if by_pieces else _by_heads
        out, maps = attention(q, k, v, lengths, keep and B * H * T * T * q.itemsize <= KEPT)
    return out, maps or None


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
    """A piece of an utterance's map at a time, so that no whole map ever exists. -> [B, T, H d], padded rows 0.

    With gradients, keeping the map for the layers that reuse it does not pay: it must be written and read again, in
    pages that are fresh each time, and a pair of layers takes longer than with the map made twice (CPU, 4 x 499).
    """
    B, T, H, d = q.shape
    out = q.new_zeros(B, T, H, d)
    for b, n in enumerate(_valid(lengths, B, T)):
        q_b, k_b, v_b = (x[b, :n].transpose(0, 1) for x in (q, k, v))
        q_b = q_b * d**-0.5
        generator = _generator(seed, b)
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
    """Gradients for q, k, v, a piece of an utterance's map at a time; the formulas are in the module docstring."""
    B, T, H, d = q.shape
    dq, dk, dv = (x.new_zeros(B, H, T, d) for x in (q, k, v))
    for b, n in enumerate(_valid(lengths, B, T)):
        q_b, k_b, v_b = (x[b, :n].transpose(0, 1) for x in (q, k, v))
        q_b = q_b * d**-0.5
        u_b, o_b = (x[b, :n].view(n, H, d).transpose(0, 1) for x in (d_out, out))
        dq_b, dk_b, dv_b = (x[b, :, :n] for x in (dq, dk, dv))
        generator = _generator(seed, b)
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


def _resoftmax_composite(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """The second softmax in traceable PyTorch, for compilers and exporters: they see the whole batch's map."""
    logits = torch.matmul(q.transpose(1, 2) * q.shape[-1] ** -0.5, k.permute(0, 2, 3, 1))
    valid = None if lengths is None else frame_mask(lengths, q.shape[1])[:, None, None]
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    p = logits.softmax(-1)
    if valid is not None:
        p = p.masked_fill(~valid, -torch.inf)
    return torch.matmul(p.softmax(-1), v.transpose(1, 2)).transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """out of q, k, v by the registered op, with the log-sum-exp, or by its PyTorch twin, with nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        use_op: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        seed: Tensor | None,
        dropout: float,
        resoftmax: bool,
    ) -> tuple[Tensor, Tensor]:
        if use_op:
            out, lse, _ = _attend_fwd(q, k, v, lengths, seed, dropout, False)
        else:
            out, lse = attention_forward(q, k, v, lengths, seed, dropout, resoftmax), q.new_empty(0)
        ctx.save_for_backward(q, k, v, out, lse, lengths, seed)
        ctx.settings = use_op, dropout, resoftmax
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, lengths, seed = ctx.saved_tensors
        use_op, *settings = ctx.settings
        d_out = d_out.contiguous()
        if use_op:
            grads = _attention_bwd(d_out, q, k, v, out, lse, lse.new_empty(0), lengths, seed, *settings)
        else:
            grads = attention_backward(d_out, q, k, v, out, lengths, seed, *settings)
        return None, *grads, None, None, None, None


class _Reuse(torch.autograd.Function):
    """out of a kept map (q, k, lse) and values: v itself, or x, weight and bias to project inside the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        lengths: Tensor | None,
        resoftmax: bool,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        if weight is None:
            out, norm = _reattend_fwd(q, k, x, lse, lengths, resoftmax)
        else:
            out, norm = _reattend_fused_fwd(q, k, x, weight, bias, lse, lengths, resoftmax)
        ctx.save_for_backward(q, k, lse, lengths, x, weight, bias, out, norm)
        ctx.resoftmax = resoftmax
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse, lengths, x, weight, bias, out, norm = ctx.saved_tensors
        v = x if weight is None else linear(x, weight, bias).view(q.shape)
        dq, dk, dv = _attention_bwd(d_out.contiguous(), q, k, v, out, lse, norm, lengths, None, 0.0, ctx.resoftmax)
        if weight is None:
            return dq, dk, None, None, None, dv, None, None
        dv = dv.flatten(2)  # [B, T, H d]
        dx = dv @ weight
        d_weight = dv.flatten(0, 1).t() @ x.reshape(-1, x.shape[-1])
        d_bias = None if bias is None else dv.sum((0, 1))
        return dq, dk, None, None, None, dx, d_weight, d_bias


# ---- registered ops ---------------------------------------------------------


def _attend_fwd_torch(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, seed: Tensor | None, dropout: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lse, _, p = _row_sums(q, k, lengths)
    kept = F.pad(p, (0, pitched(p.shape[-1]) - p.shape[-1])).to(q.dtype) if keep else q.new_empty(0)
    return attention_forward(q, k, v, lengths, seed, dropout, False), lse, kept


def _row_sums(q: Tensor, k: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels save of each row, [B, H, T]: log-sum-exp, and Z of the second softmax; padded rows 0 and 1.

    And the map [B, H, T, T], padded rows 0.
    """
    T = q.shape[1]
    valid = frame_mask(q.new_full((len(q),), T, dtype=torch.int64) if lengths is None else lengths, T)
    logits = torch.matmul(q.transpose(1, 2) * q.shape[-1] ** -0.5, k.permute(0, 2, 3, 1))
    logits = logits.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~valid[:, None, None], -torch.inf)
    p = logits.softmax(-1)
    norm = p.exp().masked_fill(~valid[:, None, None], 0).sum(-1)
    row = valid[:, None]
    return torch.where(row, logits.logsumexp(-1), 0), torch.where(row, norm, 1), torch.where(row[..., None], p, 0)


def _attend_fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, seed: Tensor | None, dropout: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, d = q.shape
    kept = q.new_empty((B, H, T, pitched(T)) if keep else (0,))
    return q.new_empty(B, T, H * d), _float_rows(q, B, H, T), kept


def _reattend_kept_fwd_torch(kept: Tensor, v: Tensor, lengths: Tensor | None, resoftmax: bool) -> Tensor:
    p = kept[..., : v.shape[1]]
    if resoftmax:
        weights = p.to(torch.promote_types(p.dtype, torch.float32))
        if lengths is not None:
            weights = weights.masked_fill(~frame_mask(lengths, v.shape[1])[:, None, None], -torch.inf)
        p = weights.softmax(-1).to(p.dtype)
    return torch.matmul(p, v.transpose(1, 2)).transpose(1, 2).flatten(2)


def _reattend_kept_fwd_fake(kept: Tensor, v: Tensor, lengths: Tensor | None, resoftmax: bool) -> Tensor:
    B, T, H, d = v.shape
    return v.new_empty(B, T, H * d)


def _reattend_fwd_torch(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, lengths: Tensor | None, resoftmax: bool
) -> tuple[Tensor, Tensor]:
    out = attention_forward(q, k, v, lengths, None, 0.0, resoftmax)
    return out, _row_sums(q, k, lengths)[1] if resoftmax else lse.new_empty(0)


def _reattend_fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, lengths: Tensor | None, resoftmax: bool
) -> tuple[Tensor, Tensor]:
    B, T, H, d = q.shape
    return q.new_empty(B, T, H * d), _float_rows(q, B, H, T) if resoftmax else lse.new_empty(0)


def _reattend_fused_fwd_torch(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    lengths: Tensor | None,
    resoftmax: bool,
) -> tuple[Tensor, Tensor]:
    return _reattend_fwd_torch(q, k, linear(x, weight, bias).view(q.shape), lse, lengths, resoftmax)


def _reattend_fused_fwd_fake(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    lengths: Tensor | None,
    resoftmax: bool,
) -> tuple[Tensor, Tensor]:
    return _reattend_fwd_fake(q, k, x, lse, lengths, resoftmax)


def _attention_bwd_torch(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    norm: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    resoftmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = attention_backward(d_out, q, k, v, out, lengths, seed, dropout, resoftmax)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _attention_bwd_fake(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _float_rows(q: Tensor, B: int, H: int, T: int) -> Tensor:
    return q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))


_attend_fwd = register(
    "attend_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? seed, float dropout, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    triton_fn="triton_reuse_attention:attend_forward",
    torch_fn=_attend_fwd_torch,
    fake_fn=_attend_fwd_fake,
)
_reattend_fwd = register(
    "reattend_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? lengths, bool resoftmax) -> (Tensor, Tensor)",
    triton_fn="triton_reuse_attention:reattend_forward",
    torch_fn=_reattend_fwd_torch,
    fake_fn=_reattend_fwd_fake,
)
_reattend_fused_fwd = register(
    "reattend_fused_fwd",
    "(Tensor q, Tensor k, Tensor x, Tensor weight, Tensor? bias, Tensor lse, Tensor? lengths, bool resoftmax) "
    "-> (Tensor, Tensor)",
    triton_fn="triton_reuse_attention:reattend_fused_forward",
    torch_fn=_reattend_fused_fwd_torch,
    fake_fn=_reattend_fused_fwd_fake,
)
_reattend_kept_fwd = register(
    "reattend_kept_fwd",
    "(Tensor kept, Tensor v, Tensor? lengths, bool resoftmax) -> Tensor",
    triton_fn="triton_reuse_attention:reattend_kept_forward",
    torch_fn=_reattend_kept_fwd_torch,
    fake_fn=_reattend_kept_fwd_fake,
)
_attention_bwd = register(
    "attention_bwd",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor norm, Tensor? lengths, Tensor? seed, "
    "float dropout, bool resoftmax) -> (Tensor, Tensor, Tensor)",
    triton_fn="triton_reuse_attention:attention_backward",
    torch_fn=_attention_bwd_torch,
    fake_fn=_attention_bwd_fake,
)


# ---- public -----------------------------------------------------------------


def _resolve(impl: Impl, q: Tensor) -> Literal["triton", "torch"]:
    """As resolve_impl, knowing that the kernels hold whole heads in registers: at most 128 columns."""
    chosen = resolve_impl(impl, q)
    if chosen == "triton" and q.shape[-1] > MAX_HEAD_WIDTH:
        if impl == "triton":
            raise ValueError(f"head width must be 1..{MAX_HEAD_WIDTH} for impl='triton', got {q.shape[-1]}")
        return "torch"
    return chosen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    reused: int = 1,
    impl: Impl = "auto",
) -> tuple[Tensor, AttentionMap]:
    """softmax(q k^T / sqrt(d)) v over valid keys, and a handle to its map for the layers that reuse it.

    Args:
        q, k, v: [B, T, H, d], one dtype and device, any strides (views of one fused projection are fine).
        lengths: [B] int32 or int64, valid frames of each utterance, 1..T; None if all T are.
        dropout: probability of dropping an entry of this layer's map; the handle is the map before dropout.
        seed: of the dropout: an int, or an int64 tensor of one element on q's device (no synchronisation). None draws
            one from PyTorch's generator, so torch.manual_seed and activation checkpointing govern it.
        reused: how many layers will reuse the map: whether to store it for them depends on that, no value does.
        impl: "auto", "triton" or "torch". The two draw different dropout masks from one seed.

    Returns:
        out: [B, T, H d], heads side by side, ready for the output projection. Rows of padded frames are finite and
            otherwise unspecified; valid rows do not depend on padding or on the rest of the batch.
        map: AttentionMap. Differentiable: gradients of reusing layers reach q and k.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit, or an implementation that cannot run here.
    """
    if q.dim() != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k and v must share one shape [B, T, H, d], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    q, k, v = autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    B, T = q.shape[:2]
    check_lengths(lengths, B, T, q.device)
    chosen = _resolve(impl, q)
    if chosen == "torch" and not dropout:
        out, maps = _softmax_attention(q, k, v, lengths, bool(reused))
        return out, AttentionMap(q, k, None, lengths, maps)
    if chosen == "torch" and tracing():
        if seed is not None:
            raise ValueError("a dropout seed cannot be honoured by impl='torch' under torch.compile; pass seed=None")
        return _sdpa(q, k, v, lengths, dropout), AttentionMap(q, k, None, lengths)
    key = _seed_tensor(seed, q.device) if dropout else None
    if chosen == "triton" and not needs_gradient(q, k, v) and store_map(q, reused):
        out, lse, kept = _attend_fwd(q, k, v, lengths, key, dropout, True)
        return out, AttentionMap(q, k, lse, lengths, (kept,))
    out, lse = _Attention.apply(chosen == "triton", q, k, v, lengths, key, dropout, False)
    return out, AttentionMap(q, k, lse if chosen == "triton" else None, lengths)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """[1] int64 on the device, without a synchronisation."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if isinstance(seed, int):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"seed must be an int or one int64 on {device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    return seed.view(1)


def reattend(
    attention_map: AttentionMap,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    setting: Setting = "exact",
    impl: Impl = "auto",
) -> Tensor:
    """Apply a kept map to new values: concat_h(A_h V_h) with V = x weight^T + bias.

    Args:
        attention_map: from `attend`, of the same batch.
        x: [B, T, D].
        weight: [H d, D]; None: x holds the values themselves, [B, T, H d].
        bias: [H d] or None.
        setting: "exact" (the paper) or "resoftmax" (a second softmax over the probabilities of valid keys, as the
            released weights were trained).
        impl: "auto" (the implementation that made the map), "triton" or "torch".

    Returns:
        [B, T, H d]. Rows of padded frames are finite and otherwise unspecified.

    Raises:
        ValueError: a map of another batch, width or dtype, or an implementation that cannot run here.
    """
    q, k, lse, lengths, maps = attention_map
    B, T, H, d = q.shape
    if setting not in ("exact", "resoftmax"):
        raise ValueError(f"setting must be 'exact' or 'resoftmax', got {setting!r}")
    if x.dim() != 3 or x.shape[:2] != (B, T):
        raise ValueError(f"x must be [{B}, {T}, D] like the map's batch, got {tuple(x.shape)}")
    if weight is None and (x.shape[2] != H * d or bias is not None):
        raise ValueError(
            f"without weight, x must be values [{B}, {T}, {H * d}] and bias None, got {tuple(x.shape)} and "
            f"{'None' if bias is None else 'a bias'}"
        )
    if weight is not None and weight.shape != (H * d, x.shape[2]):
        raise ValueError(
            f"weight must be [{H * d}, {x.shape[2]}]: heads x width of the map, width of x; got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (H * d,):
        raise ValueError(f"bias must be [{H * d}], got {tuple(bias.shape)}")
    if any(t.device != q.device for t in (x, weight, bias) if t is not None):
        raise ValueError(f"x, weight and bias must be on {q.device} like the map, got {_each('device', x, weight)}")
    x, weight, bias = autocast(x, weight, bias)
    if any(t.dtype != q.dtype for t in (x, weight, bias) if t is not None):
        raise ValueError(f"x, weight and bias must have the map's dtype {q.dtype}, got {_each('dtype', x, weight)}")
    if impl == "triton" and lse is None:
        raise ValueError("impl='triton' needs a map with log_sum_exp: make it with attend(impl='triton')")
    resoftmax = setting == "resoftmax"

    def values() -> Tensor:
        return (x if weight is None else linear(x, weight, bias)).unflatten(2, (H, d))

    if _resolve(impl, q) == "torch" or lse is None:
        v = values()
        gradients = needs_gradient(q, k, v)
        by_pieces = not gradients and _pieces_pay(q)
        maps = maps if lse is None else None  # Triton's are of another form
        if maps is not None and needs_gradient(q, k) and not maps[0].requires_grad:
            maps = None  # made where no gradient was asked for, they would lead none to q and k
        if maps is not None and by_pieces:
            return _apply_pieces(maps, v, lengths, resoftmax)
        if maps is not None and _heads_apart(q, gradients):
            return _ApplyMaps.apply(resoftmax, v, *maps) if gradients else _apply_maps(maps, v, resoftmax)
        if not resoftmax:
            return _softmax_attention(q, k, v, lengths, False)[0]
        if by_pieces:
            return _by_pieces(q, k, v, lengths, False, resoftmax=True)[0]
        if tracing():
            return _resoftmax_composite(q, k, v, lengths)
        return _Attention.apply(False, q, k, v, lengths, None, 0.0, True)[0]
    if maps is not None and not needs_gradient(q, k, x, weight, bias):
        return _reattend_kept_fwd(maps[0], values(), lengths, resoftmax)
    if weight is not None and project_inside(q):
        return _Reuse.apply(q, k, lse, lengths, resoftmax, x, weight, bias)
    return _Reuse.apply(q, k, lse, lengths, resoftmax, values(), None, None)


def _each(name: str, *tensors: Tensor | None) -> str:
    return " and ".join(str(getattr(tensor, name)) for tensor in tensors if tensor is not None)
