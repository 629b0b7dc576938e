"""Waveform -> frames: the convolution stack of HuBERT, wav2vec 2.0, WavLM and their students, channels last.

    z_0 = w_0 * x + b_0,   z_l = w_l * a_{l-1} + b_l,   a_l = GELU(norm_l(z_l)),   out = a_{L-1}        nothing padded

with norm_l one of: nothing; LayerNorm over channels in every layer; a group norm with one group a channel ("channel
norm") after the first convolution only. Channels last, k adjacent frames are k C adjacent numbers, so a convolution is
a matrix product whose rows start s C apart: no im2col, and the output is [B, T, C] as the encoder wants it.

The channel norm needs no pass over z_0, the widest map. With m [K] and R [K, K] the mean and covariance of the first
layer's K-sample windows over an utterance's valid frames (float64),

    mean_c = w_c . m,   var_c = w_c R w_c,   s_c = g_c / sqrt(var_c + eps)
    norm(z)_c = (s_c w_c) * (x - m) + b_c

so that conv + norm is one convolution with weights per utterance: exact, differentiable, and independent of padding.
The mean is taken off the windows, tap by tap, since a mean that is large beside the deviation would cost the product
its last digits; m is rounded to float32 for that, and what rounding leaves goes through the bias. A bias of that
convolution cancels.
Sources: Baevski et al., wav2vec 2.0 (arXiv 2006.11477), feature encoder; the closed form is ours.

Backward recomputes z_0 and every a_l; only z_1 .. z_{L-1} are kept. Here are the public functions, the registered ops
and their gradients; torch_conv_frontend.py and triton_conv_frontend.py compute.

Legend: B utterances, S samples, L layers, T_l frames, C_l channels, K taps of the first layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from armhubert.kernels import torch_conv_frontend as twin
from armhubert.kernels.runtime import (
    Impl,
    autocast,
    check_lengths,
    check_tensors,
    frame_counts,
    needs_gradient,
    once_differentiable,
    register,
    resolve_impl,
    tracing,
)


class Norm(NamedTuple):
    """Affine part and epsilon of a normalisation over (or of each of) C channels."""

    weight: Tensor
    """Factor of each channel, [C]."""
    bias: Tensor
    """Offset of each channel, [C]."""
    eps: float = 1e-5


class Convolution(NamedTuple):
    """One layer of the stack."""

    weight: Tensor
    """Weight [C', C, k] as nn.Conv1d keeps it; C = 1 in the first layer."""
    stride: int
    bias: Tensor | None = None
    """One number for each output channel, [C']; None: no bias."""
    norm: Norm | None = None
    """LayerNorm over the C' channels; either every layer has one or none has."""


class Moments(NamedTuple):
    """Sums over the first layer's windows, in float64; those of a long recording are the sums of its parts'."""

    windows: Tensor
    """Number of windows, [B]."""
    sum: Tensor
    """Sum of the windows, [B, K]."""
    outer: Tensor
    """Sum of the windows' outer products w w^T, [B, K, K]."""

    def plus(self, other: "Moments") -> "Moments":
        """Moments of both parts together."""
        return Moments(self.windows + other.windows, self.sum + other.sum, self.outer + other.outer)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean [B, K] and covariance [B, K, K] of the windows; zeros where there is none."""
        windows = self.windows.clamp(min=1)
        mean = self.sum / windows[:, None]
        return mean, self.outer / windows[:, None, None] - mean[:, :, None] * mean[:, None]


# ---- registered ops ---------------------------------------------------------


def padded_counts(counts: Sequence[Any], strides: Sequence[int]) -> list[Any]:
    """Rows of an utterance in each layer's buffer: at least its frames, and such that P_{l-1} = s_l P_l.

    Then row r of a batch's map needs rows s r .. s r + k - 1 of the one before, whatever the utterance, and a layer is
    one matrix product for the whole batch.
    """
    last, below = counts[-1], 1
    for count, stride in zip(reversed(counts[:-1]), reversed(strides[1:]), strict=True):
        below *= stride
        last = torch.sym_max(last, (count + below - 1) // below)
    padded = [last]
    for stride in reversed(strides[1:]):
        padded.append(padded[-1] * stride)
    return padded[::-1]


def _fake_forward(
    x: Tensor,
    shift: Tensor,
    w0: Tensor,
    b0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    strides: Sequence[int],
    eps: float,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    counts = frame_counts(x.shape[1], [w0.shape[2], *(w.shape[2] for w in weights)], strides)
    out = w0.new_empty(x.shape[0], counts[-1], weights[-1].shape[0] if weights else w0.shape[1])
    rows = padded_counts(counts, strides)[1:]
    return out, [w0.new_empty(x.shape[0], r, w.shape[0]) for r, w in zip(rows, weights, strict=True)] if keep else []


def _fake_backward(
    g: Tensor,
    x: Tensor,
    shift: Tensor,
    w0: Tensor,
    b0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    kept: Sequence[Tensor],
    strides: Sequence[int],
    eps: float,
    need_x: bool,
) -> list[Tensor]:
    d_x = x.new_empty(x.shape if need_x else (0,))
    rest = [t.new_empty(t.shape) for t in (*weights, *biases, *norms)]
    return [w0.new_empty(w0.shape), b0.new_empty(b0.shape), d_x, *rest]


def _fake_sums(x: Tensor, kernel: int, stride: int, frames: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], kernel
    return x.new_empty(shape, dtype=torch.float64), x.new_empty((*shape, kernel), dtype=torch.float64)


_STACK = "Tensor shift, Tensor w0, Tensor b0, Tensor[] weights, Tensor[] biases, Tensor[] norms"
_forward = register(
    "conv_frontend_fwd",
    f"(Tensor x, {_STACK}, SymInt[] strides, float eps, bool keep) -> (Tensor, Tensor[])",
    triton_fn="triton_conv_frontend:forward",
    fake_fn=_fake_forward,
)
_backward = register(
    "conv_frontend_bwd",
    f"(Tensor g, Tensor x, {_STACK}, Tensor[] kept, SymInt[] strides, float eps, bool need_x) -> Tensor[]",
    triton_fn="triton_conv_frontend:backward",
    fake_fn=_fake_backward,
)
_sums = register(
    "window_sums",
    "(Tensor x, int kernel, int stride, Tensor? frames) -> (Tensor, Tensor)",
    triton_fn="triton_conv_frontend:window_sums",
    fake_fn=_fake_sums,
)


class _FrontEnd(torch.autograd.Function):
    """Output of the stack, from settings, x, shift, w0, b0, then L - 1 weights, their biases and all norms."""

    @staticmethod
    def forward(
        ctx: Any,
        use_op: bool,
        keep: bool,
        strides: list[int],
        eps: float,
        sizes: tuple[int, int],
        x: Tensor,
        shift: Tensor,
        w0: Tensor,
        b0: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        groups = _split(parameters, sizes)
        run = _forward if use_op else twin.forward
        out, kept = run(x, shift, w0, b0, *groups, strides, eps, keep)
        ctx.save_for_backward(x, shift, w0, b0, *parameters, *kept)
        ctx.settings = use_op, strides, eps, sizes, len(parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        use_op, strides, eps, sizes, count = ctx.settings
        x, shift, w0, b0, *rest = ctx.saved_tensors
        groups, kept = _split(rest[:count], sizes), rest[count:]
        need_x = ctx.needs_input_grad[5]
        run = _backward if use_op else twin.backward
        d_w0, d_b0, d_x, *d_parameters = run(g, x, shift, w0, b0, *groups, kept, strides, eps, need_x)
        return (None, None, None, None, None, d_x if need_x else None, None, d_w0, d_b0, *d_parameters)


def _split(parameters: Sequence[Tensor], sizes: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The flat parameters as weights, biases and norms."""
    first, second = sizes[0], sum(sizes)
    return list(parameters[:first]), list(parameters[first:second]), list(parameters[second:])


# ---- public -----------------------------------------------------------------


def window_moments(
    waveforms: Tensor, kernel: int, stride: int, lengths: Tensor | None = None, *, impl: Impl = "auto"
) -> Moments:
    """Sums over the K-sample windows of each utterance, from which the channel norm's statistics follow.

    Args:
        waveforms: [B, S], any floating dtype.
        kernel, stride: of the first convolution.
        lengths: [B] int, valid samples; None: all S. Windows that reach beyond them are left out.
        impl: "auto", "triton" or "torch"; gradients of waveforms are PyTorch's alone.

    Returns:
        Moments, float64, differentiable. Parts of a recording that start at multiples of `stride` and overlap by
        kernel - stride samples add up (`Moments.plus`) to the moments of the whole.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an implementation that cannot run here.
    """
    check_tensors({"waveforms": waveforms})
    if waveforms.dim() != 2 or not waveforms.is_floating_point():
        raise ValueError(f"waveforms must be floating point [B, S], got {waveforms.dtype} {tuple(waveforms.shape)}")
    if kernel < 1 or stride < 1 or waveforms.shape[1] < kernel:
        raise ValueError(
            f"kernel and stride must be 1 or more and a window fit the waveform, got kernel {kernel}, stride {stride} "
            f"and {waveforms.shape[1]} samples"
        )
    check_lengths(lengths, waveforms.shape[0], waveforms.shape[1], waveforms.device, least=0, unit="samples")
    T = (waveforms.shape[1] - kernel) // stride + 1
    frames = None if lengths is None else ((lengths - kernel) // stride + 1).clamp(0, T)
    count = waveforms.new_full((waveforms.shape[0],), T, dtype=torch.float64) if frames is None else frames.double()
    use_op = resolve_impl(impl, waveforms) == "triton"
    if use_op and needs_gradient(waveforms):
        if impl == "triton":
            raise ValueError("impl='triton' has no gradients of waveforms' moments: use impl='auto' or 'torch'")
        use_op = False
    return Moments(count, *(_sums if use_op else twin.window_sums)(waveforms, kernel, stride, frames))


def _check(
    waveforms: Tensor, layers: Sequence[Convolution], channel_norm: Norm | None, moments: Moments | None
) -> None:
    check_tensors({"waveforms": waveforms})
    if waveforms.dim() != 2 or not waveforms.is_floating_point():
        raise ValueError(f"waveforms must be floating point [B, S], got {waveforms.dtype} {tuple(waveforms.shape)}")
    if not layers:
        raise ValueError("layers must hold at least one Convolution, got none")
    channels, samples = 1, waveforms.shape[1]
    for index, (weight, stride, bias, norm) in enumerate(layers):
        name = f"layers[{index}]"
        check_tensors({f"{name}: weight": weight})
        if weight.dim() != 3 or weight.shape[1] != channels or stride < 1:
            raise ValueError(
                f"{name} must have weight [C', {channels}, k] and a stride of 1 or more, got {tuple(weight.shape)} and "
                f"{stride}"
            )
        channels = weight.shape[0]
        vectors = {} if bias is None else {"bias": bias}
        for affine in (norm, channel_norm):
            if affine is not None and not isinstance(affine, Norm):
                raise ValueError(f"norms must be Norm(weight, bias, eps), got a {type(affine).__name__}")
        if norm is not None:
            vectors |= {"norm.weight": norm.weight, "norm.bias": norm.bias}
        if index == 0 and channel_norm is not None:
            vectors |= {"channel_norm.weight": channel_norm.weight, "channel_norm.bias": channel_norm.bias}
        for what, vector in vectors.items():
            check_tensors({f"{name}: {what}": vector})
            if vector.shape != (channels,):
                raise ValueError(f"{name}: {what} must be [{channels}], got {tuple(vector.shape)}")
        for what, tensor in {"weight": weight, **vectors}.items():
            if tensor.device != waveforms.device:
                raise ValueError(f"{name}: {what} must be on {waveforms.device} like waveforms, got {tensor.device}")
        if samples < weight.shape[2]:
            raise ValueError(
                f"waveforms must be long enough for one frame, got {waveforms.shape[1]} samples: {name} has "
                f"{weight.shape[2]} taps and {samples} inputs; pad them"
            )
        samples = (samples - weight.shape[2]) // stride + 1
    norms = [layer.norm for layer in layers]
    if any(norm is None for norm in norms) and any(norm is not None for norm in norms):
        raise ValueError("every layer must have a LayerNorm or none may, got a mixture")
    if norms[0] is not None and channel_norm is not None:
        raise ValueError("channel_norm and LayerNorms exclude each other, got both")
    if len({norm.eps for norm in norms if norm is not None}) > 1:
        raise ValueError(f"the LayerNorms must share one eps, got {[norm.eps for norm in norms if norm is not None]}")
    if moments is not None:
        if not isinstance(moments, Moments):
            raise ValueError(f"moments must be the Moments of window_moments, got a {type(moments).__name__}")
        B, K = waveforms.shape[0], layers[0].weight.shape[2]
        shapes = tuple(tuple(t.shape) for t in moments)
        if channel_norm is None or shapes != ((B,), (B, K), (B, K, K)):
            raise ValueError(f"moments need a channel_norm and shapes [{B}], [{B}, {K}], [{B}, {K}, {K}], got {shapes}")
        if any(t.dtype != torch.float64 or t.device != waveforms.device for t in moments):
            places = [f"{t.dtype} on {t.device}" for t in moments]
            raise ValueError(f"moments must be float64 on {waveforms.device} like waveforms, got {', '.join(places)}")


def _fold(weight: Tensor, norm: Norm, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """First convolution and channel norm as one convolution: m [B, K], weights [B, C, K] and bias [B, C] in float64."""
    mean, covariance = moments.statistics()
    taps = weight[:, 0].double()
    variance = ((taps @ covariance) * taps).sum(-1).clamp(min=0)  # [B, C]; rounding may leave less than 0
    folded = (norm.weight.double() * (variance + norm.eps).rsqrt())[..., None] * taps
    # Inductor removes a cast to float32 and back, and the rounding with it, where nothing lies between
    shift = (mean.detach().float() * 0.5).double() * 2
    bias = norm.bias.double() - (folded @ (mean - shift)[..., None])[..., 0]
    return shift, folded, bias


def conv_frontend(
    waveforms: Tensor,
    layers: Sequence[Convolution],
    *,
    channel_norm: Norm | None = None,
    lengths: Tensor | None = None,
    moments: Moments | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The convolution stack with its norms, GELU (exact) after each layer.

    Args:
        waveforms: [B, S], any floating dtype; the compute dtype is that of the weights (or autocast's).
        layers: Convolutions of one dtype, the first of one input channel.
        channel_norm: group norm with one group a channel after the first convolution, whose bias then cancels.
        lengths: [B] int, valid samples of each utterance, from the first convolution's taps to S; None: all S. Only
            the channel norm's statistics ask for them, as no valid frame sees padding otherwise.
        moments: statistics for the channel norm instead of the waveforms' own, e.g. of the whole recording that
            these are chunks of; from `window_moments`.
        impl: "auto", "triton" or "torch".

    Returns:
        [B, T, C] in the compute dtype. Frames past an utterance's valid ones are finite and otherwise unspecified.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit, lengths together with moments, or an
            implementation that cannot run here.
    """
    _check(waveforms, layers, channel_norm, moments)
    if lengths is not None and moments is not None:
        raise ValueError("give lengths or moments, got both: moments already say which samples count")
    (first, stride, first_bias, first_norm), *rest = layers
    check_lengths(
        lengths, waveforms.shape[0], waveforms.shape[1], waveforms.device, least=first.shape[2], unit="samples"
    )
    low = autocast(first, *(layer.weight for layer in rest))
    biased = any(layer.bias is not None for layer in rest)
    biases = autocast(*(w.new_zeros(w.shape[0]) if b is None else b for w, _, b, _ in rest)) if biased else ()
    norms = autocast(*(t for layer in layers if layer.norm for t in layer.norm[:2])) if first_norm else ()
    dtype = low[0].dtype
    if not dtype.is_floating_point or any(t.dtype != dtype for t in (*low, *biases, *norms)):
        raise ValueError(f"weights, biases and norms must share one floating dtype, got {_dtypes(low, biases, norms)}")
    chosen = resolve_impl(impl, low[0])
    B = waveforms.shape[0]
    high = torch.promote_types(dtype, torch.float32)
    if channel_norm is not None:
        if moments is None:
            inner: Impl = "torch" if chosen == "torch" else "auto"  # whose gradients, if asked for, are PyTorch's
            moments = window_moments(waveforms, first.shape[2], stride, lengths, impl=inner)
        shift, w0, b0 = _fold(first, channel_norm, moments)
    else:
        shift = waveforms.new_zeros((B, first.shape[2]), dtype=high)
        w0 = low[0][:, 0].expand(B, -1, -1)
        b0 = (first.new_zeros(first.shape[0]) if first_bias is None else first_bias).expand(B, -1)
    shift, w0, b0 = shift.to(high), w0.to(dtype), b0.to(high)
    strides = [layer.stride for layer in layers]
    eps = first_norm.eps if first_norm is not None else 0.0
    weights = low[1:]
    if chosen == "torch" and (waveforms.device.type != "cpu" or tracing()):
        return twin.composite(waveforms, shift, w0, b0, weights, biases, norms, strides, eps)[0]
    keep = needs_gradient(waveforms, w0, b0, *weights, *biases, *norms)
    sizes = (len(weights), len(biases))
    return _FrontEnd.apply(
        chosen == "triton", keep, strides, eps, sizes, waveforms, shift, w0, b0, *weights, *biases, *norms
    )


def _dtypes(*groups: Sequence[Tensor]) -> list[str]:
    return sorted({str(t.dtype) for group in groups for t in group})
