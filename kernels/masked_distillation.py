"""Masked distillation loss: every layer's head, the choice of the teacher's view, distance and sum, in one op.

    pred_l[n]   = W_l h_l[n] + b_l                                     n = a frame of the batch
    target_l[n] = clean_l[n]    where mask[n]   (the teacher saw the frame, the student did not)
                = masked_l[n]   elsewhere
    loss_l      = sum over valid frames n of mean_d |pred_l[n, d] - target_l[n, d]|^p,    p = 2 (mse) or 1 (l1)

The op chooses between the views itself, for callers that hold both. This library's training does not: its teacher mixes
the views layer by layer (`armhubert.teacher.teacher_targets`), so that only the layer it is at exists in both, and the
loss gets the mixture as `clean`, without `masked` and `mask` (`armhubert.losses.Objective.frame_loss`).

Source: Jang et al., Recycle-and-Distill (arXiv 2305.11685), eq. of the masking distillation; padded frames are not
counted here. The caller divides by the number of valid frames and weighs the layers.

Legend: L layers, B utterances, T frames, D student width, Dt teacher width, N = B T.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from armhubert.kernels.onednn import linear
from armhubert.kernels.runtime import (
    Impl,
    autocast,
    check_lengths,
    check_tensors,
    frame_mask,
    needs_gradient,
    once_differentiable,
    register,
    resolve_impl,
)

Distance = Literal["mse", "l1"]
Layers = Tensor | Sequence[Tensor]

# ---- PyTorch: the CPU path and the oracle of the tests ----------------------


def _residual(
    h: Tensor, W: Tensor, b: Tensor, clean: Tensor, masked: Tensor | None, mask: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Prediction minus target of one layer, zero on padded frames: [B, T, Dt] in the dtype of h."""
    residual = linear(h, W, b)
    if masked is None or mask is None:
        residual -= clean
    else:
        residual -= torch.where(mask[..., None], clean, masked)
    if lengths is not None:
        residual.masked_fill_(~frame_mask(lengths, h.shape[1])[..., None], 0)
    return residual


def distillation_forward(
    hidden: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    clean: Sequence[Tensor],
    masked: Sequence[Tensor] | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    l1: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [L] in float32, a layer at a time; with `keep` also the residuals, or for l1 their signs, [L, B, T, Dt]."""
    L, (B, T, _), Dt = len(hidden), hidden[0].shape, weight.shape[1]
    acc = torch.promote_types(hidden[0].dtype, torch.float32)
    loss = torch.empty(L, dtype=acc, device=weight.device)
    residuals = hidden[0].new_empty((L, B, T, Dt) if keep else (0,))
    for layer in range(L):
        view = None if masked is None else masked[layer]
        residual = _residual(hidden[layer], weight[layer], bias[layer], clean[layer], view, mask, lengths)
        flat = residual.flatten()
        if l1:
            loss[layer] = flat.abs().sum(dtype=acc) / Dt
        elif flat.dtype == acc:
            loss[layer] = flat.dot(flat) / Dt
        else:
            loss[layer] = flat.to(acc).square_().sum() / Dt
        if keep:
            residuals[layer] = residual.sign_() if l1 else residual
    return loss, residuals


def distillation_backward(
    g: Tensor, residuals: Tensor, hidden: Sequence[Tensor], weight: Tensor, l1: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients for hidden, weight and bias by plain matrix products from the kept residual.

    The prediction's gradient is g 2/Dt residual (mse) or g 1/Dt sign (l1), scaled first so that float16 sums do not
    overflow.
    """
    L, Dt, D = weight.shape
    d_hidden, d_weight, d_bias = [], torch.empty_like(weight), weight.new_empty(L, Dt)
    scale = g * ((1 if l1 else 2) / Dt)
    for layer in range(L):
        residual = residuals[layer].reshape(-1, Dt)  # [N, Dt]
        # a factor of one dimension keeps its precision; without any, it would be rounded to 16 bits first
        d_pred = torch.mul(residual, scale[layer : layer + 1], out=torch.empty_like(residual))
        d_hidden.append((d_pred @ weight[layer]).view(hidden[layer].shape))
        torch.mm(d_pred.t(), hidden[layer].reshape(-1, D), out=d_weight[layer])
        torch.sum(d_pred, 0, out=d_bias[layer])
    return d_hidden, d_weight, d_bias


# ---- registered ops ---------------------------------------------------------


def _fake_forward(
    hidden: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    clean: Sequence[Tensor],
    masked: Sequence[Tensor] | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    l1: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    h = hidden[0]
    loss = h.new_empty(len(hidden), dtype=torch.promote_types(h.dtype, torch.float32))
    return loss, h.new_empty((len(hidden), *h.shape[:2], weight.shape[1]) if keep else (0,))


def _fake_backward(
    g: Tensor, residuals: Tensor, hidden: Sequence[Tensor], weight: Tensor, l1: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    d_hidden = [h.new_empty(h.shape) for h in hidden]
    return d_hidden, torch.empty_like(weight), weight.new_empty(weight.shape[:2])


_forward = register(
    "distillation_fwd",
    "(Tensor[] hidden, Tensor weight, Tensor bias, Tensor[] clean, Tensor[]? masked, Tensor? mask, Tensor? lengths, "
    "bool l1, bool keep) -> (Tensor, Tensor)",
    triton_fn="triton_masked_distillation:forward",
    fake_fn=_fake_forward,
)
_backward = register(
    "distillation_bwd",
    "(Tensor g, Tensor residuals, Tensor[] hidden, Tensor weight, bool l1) -> (Tensor[], Tensor, Tensor)",
    triton_fn="masked_distillation:distillation_backward",
    fake_fn=_fake_backward,
)


class _Distillation(torch.autograd.Function):
    """Loss [L]; its inputs are switches, weight, bias, mask, lengths, then hidden, clean and masked layers."""

    @staticmethod
    def forward(
        ctx: Any,
        use_op: bool,
        l1: bool,
        keep: bool,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        *layers: Tensor,
    ) -> Tensor:
        L = weight.shape[0]
        hidden, clean, masked = layers[:L], layers[L : 2 * L], layers[2 * L :] or None
        run = _forward if use_op else distillation_forward
        loss, residuals = run(hidden, weight, bias, clean, masked, mask, lengths, l1, keep)
        ctx.save_for_backward(residuals, weight, *hidden)
        ctx.use_op, ctx.l1, ctx.targets = use_op, l1, len(layers) - L
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        residuals, weight, *hidden = ctx.saved_tensors
        run = _backward if ctx.use_op else distillation_backward
        d_hidden, d_weight, d_bias = run(g, residuals, hidden, weight, ctx.l1)
        return (None, None, None, d_weight, d_bias, None, None, *d_hidden, *[None] * ctx.targets)


# ---- public -----------------------------------------------------------------


def _check(
    hidden: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor,
    clean: tuple[Tensor, ...],
    masked: tuple[Tensor, ...] | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    distance: str,
) -> None:
    if distance not in ("mse", "l1"):
        raise ValueError(f"distance must be 'mse' or 'l1', got {distance!r}")
    targets = {"clean": clean} if masked is None else {"clean": clean, "masked": masked}
    layers_by_name = {"hidden": hidden, **targets}
    check_tensors({"weight": weight, "bias": bias})
    check_tensors({"mask": mask}, optional=True)
    check_tensors({f"{name}[{index}]": t for name, layers in layers_by_name.items() for index, t in enumerate(layers)})
    if weight.dim() != 3 or bias.shape != weight.shape[:2]:
        raise ValueError(
            f"weight must be [L, Dt, D] and bias [L, Dt], got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if bias.device != weight.device:
        raise ValueError(f"bias must be on {weight.device} like weight, got {bias.device}")
    L, Dt, D = weight.shape
    if len(hidden) != L or not L:
        raise ValueError(f"hidden must have one [B, T, D] for each of the {L} layers of weight, got {len(hidden)}")
    if hidden[0].dim() != 3:
        raise ValueError(f"hidden layers must be [B, T, {D}], got {tuple(hidden[0].shape)}")
    B, T, _ = hidden[0].shape
    for name, layers in layers_by_name.items():
        width = D if name == "hidden" else Dt
        if len(layers) != L:
            raise ValueError(f"{name} must have {L} layers, got {len(layers)}")
        for index, layer in enumerate(layers):
            if layer.shape != (B, T, width):
                raise ValueError(f"{name}[{index}] must be [{B}, {T}, {width}], got {tuple(layer.shape)}")
            if layer.device != weight.device:
                raise ValueError(f"{name}[{index}] must be on {weight.device} like weight, got {layer.device}")
    every = [layer for layers in targets.values() for layer in layers]
    if len(kinds := {str(layer.dtype) for layer in every}) > 1:
        raise ValueError(f"clean and masked must share one dtype, got {', '.join(sorted(kinds))}")
    if any(layer.requires_grad for layer in every):
        raise ValueError("the teacher's targets get no gradient: detach clean and masked (requires_grad=True)")
    if masked is not None and mask is None:
        raise ValueError("masked needs mask ([B, T] bool): it says which frames are compared with clean")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, T) or mask.device != weight.device):
        raise ValueError(
            f"mask must be bool [{B}, {T}] on {weight.device}, got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )
    check_lengths(lengths, B, T, weight.device)


def distillation_loss(
    hidden: Layers,
    weight: Tensor,
    bias: Tensor,
    clean: Layers,
    masked: Layers | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    distance: Distance = "mse",
    impl: Impl = "auto",
) -> Tensor:
    """Distance between each layer's projected hidden state and the teacher's view of every frame, summed over frames.

    Args:
        hidden: student layers, [L, B, T, D] or L tensors [B, T, D] (no stacking copy).
        weight: heads [L, Dt, D].
        bias: heads [L, Dt].
        clean: teacher layers that saw the whole utterance, or targets mixed of both views already, [L, B, T, Dt] or L
            tensors [B, T, Dt].
        masked: teacher layers that saw the masked utterance, like clean; None compares with clean everywhere.
        mask: [B, T] bool, True where the student's input frame was masked; needed with masked, not read without.
        lengths: [B] int, valid frames of each utterance; None if all T are.
        distance: "mse" or "l1".
        impl: "auto", "triton" or "torch".

    Returns:
        [L] float32 (float64 for float64 inputs): per layer, the sum over valid frames of the mean over Dt of the
        distance. Targets may have a dtype of their own. Padded frames may hold anything finite.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, targets that require grad, or an
            implementation that cannot run here.
    """
    hidden_layers = hidden.unbind() if isinstance(hidden, Tensor) else tuple(hidden)
    clean_layers = clean.unbind() if isinstance(clean, Tensor) else tuple(clean)
    masked_layers = masked.unbind() if isinstance(masked, Tensor) else None if masked is None else tuple(masked)
    _check(hidden_layers, weight, bias, clean_layers, masked_layers, mask, lengths, distance)
    weight, bias, *hidden_low = autocast(weight, bias, *hidden_layers)
    if len(kinds := {str(t.dtype) for t in (weight, bias, *hidden_low)}) > 1:
        raise ValueError(f"hidden, weight and bias must share one dtype, got {', '.join(sorted(kinds))}")
    if masked_layers is None:
        mask = None
    keep = needs_gradient(weight, bias, *hidden_low)
    use_op = resolve_impl(impl, weight) == "triton"
    loss = _Distillation.apply(
        use_op,
        distance == "l1",
        keep,
        weight,
        bias,
        mask,
        lengths,
        *hidden_low,
        *clean_layers,
        *(masked_layers or ()),
    )
    return loss
