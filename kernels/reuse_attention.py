"""Attention whose map is kept, and layers that reuse a kept map with values of their own.

    computing layer:  A_h = softmax_j(q_h k_h^T / sqrt(d))  over valid keys j,   out = concat_h(A_h v_h)
    reusing layer:    out = concat_h(A_h V_h),   V = X W^T + b                              ("exact")
                      out = concat_h(softmax_j(A_h) V_h)                                    ("resoftmax")

The map is a handle (q, k, log-sum-exp, lengths), not a tensor: a reusing layer recomputes p_ij = exp(s_ij - lse_i), in
powers of 2, tile by tile, in memory linear in T; where that pays, the computing layer stores it besides (`variants.py`;
with gradients only on a CPU, `torch_reuse_attention.KEPT_FOR_BACKWARD`). "resoftmax" is what the released ARMHuBERT
weights were trained with: the map went through the softmax twice. Its second softmax needs no maximum, since
probabilities lie in [0, 1]: with e = exp(A) - 1,

    softmax(A) V = (sum_valid V + e V) / (T_valid + sum e).

Backward, with p = A, D_i = dout_i . out_i, Z_i = T_valid + sum_j e_ij, u = dout (exact) or dout / Z (resoftmax):

    exact:      dV_j = sum_i p_ij u_i            dp_ij = u_i . V_j
    resoftmax:  dV_j = sum_i (1 + e_ij) u_i      dp_ij = (1 + e_ij) (u_i . V_j - D_i / Z_i)
    both:       ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij),   dq_i = sum_j ds_ij k_j / sqrt(d),   dk_j alike

so gradients reach q and k of the computing layer from every layer that reuses its map, and no [T, T] tensor is kept.
Source: Jang et al., Recycle-and-Distill (arXiv 2305.11685), attention map reusing.

Here are the public functions, the registered ops and their gradients; torch_reuse_attention.py and
triton_reuse_attention.py compute.

Legend: B utterances, T frames, H heads, d head width, D model width.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from armhubert.kernels import torch_reuse_attention as twin
from armhubert.kernels.onednn import linear
from armhubert.kernels.runtime import (
    Impl,
    autocast,
    brief,
    check_lengths,
    check_tensors,
    frame_mask,
    needs_gradient,
    once_differentiable,
    register,
    resolve_impl,
    tracing,
)
from armhubert.kernels.variants import project_inside, store_map

AttentionMode = Literal["exact", "resoftmax"]
"""How a reusing layer reads the map: "exact", as in the paper, or through a second softmax, as in the released code."""
MAX_HEAD_WIDTH = 128
PITCH = 8
"""Rows of a map that Triton stores start at multiples of this many numbers, 16 bytes or more."""


def pitched(T: Any) -> Any:
    """Numbers from the start of a row to that of the next in a map of T frames that Triton stores."""
    return (T + PITCH - 1) // PITCH * PITCH


class AttentionMap(NamedTuple):
    """What a reusing layer needs of a computing layer's attention: enough to recompute softmax(q k^T) tile by tile."""

    queries: Tensor
    """The computing layer's queries, [B, T, H, d], with any strides (a view of a fused projection)."""
    keys: Tensor
    """The computing layer's keys, [B, T, H, d]."""
    log_sum_exp: Tensor | None
    """log2 of each row's sum of exponentials of scaled logits, [B, H, T] float32; None from the PyTorch twin."""
    lengths: Tensor | None
    """Valid frames of each utterance, [B]; None if all T are."""
    probabilities: tuple[Tensor, ...] | None = None
    """The stored map, if storing pays; its form depends on who made it. Triton (inference only): one tensor
    [B, H, T, pitched(T)], zero at padded rows and invalid keys. PyTorch, float32: one [n, n] per utterance and head, n
    the utterance's valid frames. PyTorch, bfloat16 (inference only): for each utterance, pieces [h, r, n] of some heads
    and rows, in the order of `torch_reuse_attention._pieces`."""


# ---- autograd ---------------------------------------------------------------


class _Attend(torch.autograd.Function):
    """Output and log-sum-exp of q, k and v by the registered ops."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, seed: Tensor | None, dropout: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, _ = _attend_fwd(q, k, v, lengths, seed, dropout, False)
        ctx.save_for_backward(q, k, v, out, lse, lengths, seed)
        ctx.dropout = dropout
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, lengths, seed = ctx.saved_tensors
        norm = lse.new_empty(0)  # of a second softmax
        grads = _attention_bwd(d_out, q, k, v, out, lse, norm, lengths, seed, ctx.dropout, False)
        return *grads, None, None, None


class _Reattend(torch.autograd.Function):
    """Output of a kept map (q, k, lse) and values: v itself, or x, weight and bias to project inside the kernel."""

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
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lse, lengths, x, weight, bias, out, norm = ctx.saved_tensors
        v = x if weight is None else linear(x, weight, bias).view(q.shape)
        dq, dk, dv = _attention_bwd(d_out, q, k, v, out, lse, norm, lengths, None, 0.0, ctx.resoftmax)
        if weight is None:
            return dq, dk, None, None, None, dv, None, None
        dv = dv.flatten(2)  # [B, T, H d]
        dx = dv @ weight
        d_weight = dv.flatten(0, 1).t() @ x.reshape(-1, x.shape[-1])
        d_bias = None if bias is None else dv.sum((0, 1))
        return dq, dk, None, None, None, dx, d_weight, d_bias


# ---- registered ops ---------------------------------------------------------


def _attend_fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, seed: Tensor | None, dropout: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, d = q.shape
    stored = q.new_empty((B, H, T, pitched(T)) if keep else (0,))
    return q.new_empty(B, T, H * d), _float_rows(q, B, H, T), stored


def _reattend_stored_fwd_fake(stored: Tensor, v: Tensor, lengths: Tensor | None, resoftmax: bool) -> Tensor:
    B, T, H, d = v.shape
    return v.new_empty(B, T, H * d)


def _reattend_fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, lengths: Tensor | None, resoftmax: bool
) -> tuple[Tensor, Tensor]:
    B, T, H, d = q.shape
    return q.new_empty(B, T, H * d), _float_rows(q, B, H, T) if resoftmax else lse.new_empty(0)


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


def _attention_bwd_fake(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _float_rows(q: Tensor, B: int, H: int, T: int) -> Tensor:
    return q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))


_attend_fwd = register(
    "attend_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? seed, float dropout, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    triton_fn="triton_reuse_attention:attend_forward",
    fake_fn=_attend_fwd_fake,
)
_reattend_fwd = register(
    "reattend_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? lengths, bool resoftmax) -> (Tensor, Tensor)",
    triton_fn="triton_reuse_attention:reattend_forward",
    fake_fn=_reattend_fwd_fake,
)
_reattend_fused_fwd = register(
    "reattend_fused_fwd",
    "(Tensor q, Tensor k, Tensor x, Tensor weight, Tensor? bias, Tensor lse, Tensor? lengths, bool resoftmax) "
    "-> (Tensor, Tensor)",
    triton_fn="triton_reuse_attention:reattend_fused_forward",
    fake_fn=_reattend_fused_fwd_fake,
)
_reattend_stored_fwd = register(
    "reattend_stored_fwd",
    "(Tensor stored, Tensor v, Tensor? lengths, bool resoftmax) -> Tensor",
    triton_fn="triton_reuse_attention:reattend_stored_forward",
    fake_fn=_reattend_stored_fwd_fake,
)
_attention_bwd = register(
    "attention_bwd",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor norm, Tensor? lengths, Tensor? seed, "
    "float dropout, bool resoftmax) -> (Tensor, Tensor, Tensor)",
    triton_fn="triton_reuse_attention:attention_backward",
    fake_fn=_attention_bwd_fake,
)


# ---- public -----------------------------------------------------------------


def _resolve(impl: Impl, q: Tensor) -> Literal["triton", "torch"]:
    """Like resolve_impl, but the kernels hold whole heads in registers: wider ones than 128 columns go to PyTorch."""
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
    reusing_layers: int = 1,
    impl: Impl = "auto",
) -> tuple[Tensor, AttentionMap]:
    """softmax(q k^T / sqrt(d)) v over valid keys, and a handle to its map for the layers that reuse it.

    Args:
        q, k, v: [B, T, H, d], one dtype and device, any strides (views of one fused projection are fine).
        lengths: [B] int32 or int64, valid frames of each utterance, 1..T; None if all T are.
        dropout: probability of dropping an entry of this layer's map; the handle is the map before dropout.
        seed: seed of the dropout, an int or an int64 tensor of one element on q's device (no synchronisation). None
            draws one from PyTorch's generator, so torch.manual_seed and activation checkpointing govern it.
        reusing_layers: number of layers that will reuse the map; it only decides whether the map is stored, results do
            not depend on it but for rounding.
        impl: "auto", "triton" or "torch". The two draw different dropout masks from one seed.

    Returns:
        out: [B, T, H d], heads side by side, ready for the output projection. Rows of padded frames are finite and
            otherwise unspecified; valid rows do not depend on padding or on the rest of the batch.
        map: AttentionMap. Differentiable: gradients of reusing layers reach q and k.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit, or an implementation that cannot run here.
    """
    check_tensors({"q": q, "k": k, "v": v})
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
    traced = chosen == "torch" and tracing()  # the twin then leaves dropout to PyTorch
    if dropout and traced and seed is not None:
        raise ValueError("a dropout seed cannot be honoured by impl='torch' under torch.compile; pass seed=None")
    key = _seed_tensor(seed, q.device) if dropout and not traced else None
    if chosen == "torch":
        out, maps = twin.attend(q, k, v, lengths, keep=bool(reusing_layers), dropout=dropout, seed=key)
        return out, AttentionMap(q, k, None, lengths, maps)
    if not needs_gradient(q, k, v) and store_map(q, reusing_layers):
        out, lse, stored = _attend_fwd(q, k, v, lengths, key, dropout, True)
        return out, AttentionMap(q, k, lse, lengths, (stored,))
    out, lse = _Attend.apply(q, k, v, lengths, key, dropout)
    return out, AttentionMap(q, k, lse, lengths)


def _seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as one int64, [1], on the device, made without a synchronisation."""
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if isinstance(seed, int):
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        raise ValueError(f"seed must be an int or one int64 on {device}, got {brief(seed)}")
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
    mode: AttentionMode = "exact",
    impl: Impl = "auto",
) -> Tensor:
    """Apply a kept map to new values: concat_h(A_h V_h) with V = x weight^T + bias.

    Args:
        attention_map: from `attend`, of the same batch.
        x: [B, T, D].
        weight: [H d, D]; None: x holds the values themselves, [B, T, H d].
        bias: [H d] or None.
        mode: "exact" (the paper) or "resoftmax" (a second softmax over the probabilities of valid keys, as the
            released weights were trained).
        impl: "auto" (the implementation that made the map), "triton" or "torch".

    Returns:
        [B, T, H d]. Rows of padded frames are finite and otherwise unspecified.

    Raises:
        ValueError: a map of another batch, width or dtype, or an implementation that cannot run here.
    """
    _check_map(attention_map)
    check_tensors({"x": x})
    check_tensors({"weight": weight, "bias": bias}, optional=True)
    q, k, lse, lengths, maps = attention_map
    B, T, H, d = q.shape
    _check_mode(mode)
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
        raise ValueError(
            f"x, weight and bias must be on {q.device} like the map, got {_each('device', x, weight, bias)}"
        )
    x, weight, bias = autocast(x, weight, bias)
    if any(t.dtype != q.dtype for t in (x, weight, bias) if t is not None):
        raise ValueError(
            f"x, weight and bias must have the map's dtype {q.dtype}, got {_each('dtype', x, weight, bias)}"
        )
    if impl == "triton" and lse is None:
        raise ValueError("impl='triton' needs a map with log_sum_exp: make it with attend(impl='triton')")
    resoftmax = mode == "resoftmax"

    def values() -> Tensor:
        return (x if weight is None else linear(x, weight, bias)).unflatten(2, (H, d))

    if _resolve(impl, q) == "torch" or lse is None:
        kept = maps if lse is None else None  # Triton's are of another form
        return twin.reattend(kept, q, k, values(), lengths, resoftmax)
    if maps is not None and not needs_gradient(q, k, x, weight, bias):
        return _reattend_stored_fwd(maps[0], values(), lengths, resoftmax)
    if weight is not None and project_inside(q):
        return _Reattend.apply(q, k, lse, lengths, resoftmax, x, weight, bias)
    return _Reattend.apply(q, k, lse, lengths, resoftmax, values(), None, None)


def attention_probabilities(attention_map: AttentionMap, *, mode: AttentionMode = "exact") -> Tensor:
    """The map as a tensor, to look at: what `reattend` in this mode multiplies values with. By PyTorch, on any device.

    Args:
        attention_map: from `attend`.
        mode: "exact" is the map that the computing layer applied, too, before dropout.

    Returns:
        [B, H, T, T] in float32 (float64 of float64): rows of queries, which add up to 1; rows of padded frames and
        columns of invalid keys are 0. Differentiable.

    Raises:
        ValueError: no AttentionMap, or no such mode.
    """
    _check_map(attention_map)
    _check_mode(mode)
    q, k, _, lengths, _ = attention_map
    wide = torch.promote_types(q.dtype, torch.float32)
    valid = None if lengths is None else frame_mask(lengths, q.shape[1])

    def softmax(logits: Tensor) -> Tensor:
        return (logits if valid is None else logits.masked_fill(~valid[:, None, None], -torch.inf)).softmax(-1)

    with torch.autocast(q.device.type, enabled=False):
        p = softmax(torch.matmul(q.to(wide).transpose(1, 2) * q.shape[-1] ** -0.5, k.to(wide).permute(0, 2, 3, 1)))
    if mode == "resoftmax":
        p = softmax(p)
    return p if valid is None else torch.where(valid[:, None, :, None], p, 0)


def _check_map(attention_map: AttentionMap) -> None:
    if not isinstance(attention_map, AttentionMap):
        raise ValueError(f"attention_map must be the AttentionMap of attend, got a {type(attention_map).__name__}")


def _check_mode(mode: AttentionMode) -> None:
    if mode not in ("exact", "resoftmax"):
        raise ValueError(f"mode must be 'exact' or 'resoftmax', got {mode!r}")


def _each(name: str, *tensors: Tensor | None) -> str:
    return " and ".join(str(getattr(tensor, name)) for tensor in tensors if tensor is not None)
