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

Backward recomputes z_0 and every a_l; only z_1 .. z_{L-1} are kept.

Legend: B utterances, S samples, L layers, T_l frames, C_l channels, K taps of the first layer.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from armhubert.kernels import onednn
from armhubert.kernels.runtime import (
    Impl,
    autocast,
    check_lengths,
    frame_counts,
    frame_mask,
    needs_gradient,
    register,
    resolve_impl,
    tracing,
)


class Norm(NamedTuple):
    """Affine part and epsilon of a normalisation over (or of each of) C channels."""

    weight: Tensor
    """[C]."""
    bias: Tensor
    """[C]."""
    eps: float = 1e-5


class Convolution(NamedTuple):
    """One layer of the stack."""

    weight: Tensor
    """[C', C, k] as nn.Conv1d keeps it; C = 1 in the first layer."""
    stride: int
    bias: Tensor | None = None
    """[C']."""
    norm: Norm | None = None
    """LayerNorm over C'; every layer has one or none has."""


class Moments(NamedTuple):
    """Sums over the first layer's windows, float64 and additive: a long recording's are the sums of its parts'."""

    windows: Tensor
    """[B], how many."""
    sum: Tensor
    """[B, K]."""
    outer: Tensor
    """[B, K, K] sum of w w^T."""

    def plus(self, other: "Moments") -> "Moments":
        """Of both parts together."""
        return Moments(self.windows + other.windows, self.sum + other.sum, self.outer + other.outer)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean [B, K] and covariance [B, K, K]; zeros where there is no window."""
        windows = self.windows.clamp(min=1)
        mean = self.sum / windows[:, None]
        return mean, self.outer / windows[:, None, None] - mean[:, :, None] * mean[:, None]


# ---- PyTorch: the CPU path and the oracle of the tests ----------------------

CHUNK = 8_200_000
"""Numbers in the widest map of a chunk: 10 s of the default student, 33 MB, about the most that malloc keeps mapped."""
ROWS = 64
"""Frames a row for oneDNN's channels-last weight gradient, which over thousands in a row is five times slower."""


def _window_sums(x: Tensor, kernel: int, stride: int, frames: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, S] -> sum [B, K] and sum of outer products [B, K, K] over valid windows, float64."""
    windows = x.double().unfold(-1, kernel, stride)  # [B, T, K]
    if frames is not None:
        windows = torch.where(frame_mask(frames, windows.shape[1])[..., None], windows, 0)
    return windows.sum(1), windows.transpose(1, 2) @ windows


def _chunks(counts: list[int], taps: Sequence[int], strides: Sequence[int], widest: int) -> Iterator[tuple[int, ...]]:
    """Ranges of output frames, and of the first layer's frames that they are made from: first, last, low, high."""
    step = max(1, CHUNK * counts[-1] // (counts[0] * widest))
    for first in range(0, counts[-1], step):
        last = min(first + step, counts[-1])
        low, high = first, last
        for kernel, stride in zip(reversed(taps[1:]), reversed(strides[1:]), strict=True):
            low, high = low * stride, (high - 1) * stride + kernel
        yield first, last, low, high


def _image(x: Tensor) -> Tensor:
    """[T, C] -> [1, C, 1, T], the same memory: oneDNN's channels-last convolutions are 2-D."""
    return x[None].transpose(1, 2).unsqueeze(2)


def _weight_images(weights: Sequence[Tensor]) -> list[Tensor]:
    """[C', C, k] -> [C', C, 1, k], laid out as oneDNN reads them: once, not for every chunk."""
    return [weight[:, :, None].contiguous(memory_format=torch.channels_last) for weight in weights]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """[T, C], [C', C, 1, k] -> [T', C'].

    An image of one row has no second to stride to, but a stride keeps PyTorch from preferring its own 1x1 convolution
    to oneDNN's on one thread, where it is half as fast.
    """
    return F.conv2d(_image(x), weight, bias, (2, stride))[0, :, 0].t().contiguous()


def _convolve_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """GELU(_convolve(...)) without gradients."""
    return onednn.convolve_gelu(_image(x), weight, bias, (2, stride))[0, :, 0].t().contiguous()


def _norm(z: Tensor, norms: Sequence[Tensor], layer: int, eps: float) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], norms[2 * layer], norms[2 * layer + 1], eps) if norms else z


def _first_windows(x: Tensor, shift: Tensor, low: int, high: int, w0: Tensor, stride: int) -> Tensor:
    """Centred windows low..high of one utterance [S] -> [high - low, K]."""
    samples = x[low * stride : (high - 1) * stride + w0.shape[1]]
    return (samples.unfold(0, w0.shape[1], stride) - shift).to(w0.dtype)


def frontend_forward(
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
    """An utterance and a few seconds at a time, so that no map leaves the cache: exact, as nothing is padded.

    shift (m) [B, K], w0 [B, C, K] and b0 [B, C] belong to one utterance each; biases and norms (weight, bias of each
    layer) are empty where the architecture has none. -> out [B, T, C]; with `keep`, z_1 .. z_{L-1} of every chunk.
    """
    taps = [w0.shape[2], *(w.shape[2] for w in weights)]
    counts = frame_counts(x.shape[1], taps, strides)
    widest = max(w0.shape[1], *(w.shape[0] for w in weights)) if weights else w0.shape[1]
    images = _weight_images(weights)
    out = w0.new_empty(len(x), counts[-1], weights[-1].shape[0] if weights else w0.shape[1])
    kept: list[Tensor] = []
    for b in range(len(x)):
        for first, last, low, high in _chunks(counts, taps, strides, widest):
            windows = _first_windows(x[b], shift[b], low, high, w0[b], strides[0])
            if not keep and not norms:
                a = _convolve_gelu(windows, w0[b][..., None, None], b0[b].to(w0.dtype), 1)
                for layer, weight in enumerate(images):
                    a = _convolve_gelu(a, weight, biases[layer] if biases else None, strides[layer + 1])
                out[b, first:last] = a
                continue
            z = torch.addmm(b0[b].to(w0.dtype), windows, w0[b].t())
            for layer, weight in enumerate(images):
                a = _norm(z, norms, layer, eps)
                a = F.gelu(a) if keep and layer and a is z else torch.ops.aten.gelu_(a)  # never over a kept map
                z = _convolve(a, weight, biases[layer] if biases else None, strides[layer + 1])
                if keep:
                    kept.append(z)
            out[b, first:last] = F.gelu(_norm(z, norms, len(weights), eps))
    return out, kept


def _add_weight_gradient(total: Tensor, gz: Tensor, a: Tensor, weight: Tensor, stride: int) -> None:
    """[T', C'] and [T, C], for weights [C', C, 1, k], added to [C', C, k]: blocks of ROWS frames, then what remains."""
    (T, N), C, kernel = gz.shape, a.shape[1], weight.shape[3]
    for start, count, rows in ((0, T // ROWS, ROWS), (T - T % ROWS, 1, T % ROWS)):
        if not count or not rows:
            continue
        # inputs of neighbouring blocks overlap where k > s
        inputs = a[start * stride :].as_strided((count, (rows - 1) * stride + kernel, C), (rows * stride * C, C, 1))
        part = torch.ops.aten.convolution_backward(
            gz[start : start + count * rows].view(count, rows, N).transpose(1, 2).unsqueeze(2),
            inputs.contiguous().transpose(1, 2).unsqueeze(2),
            weight, None, [1, stride], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False],
        )[1]  # fmt: skip
        total += part[:, :, 0]


def _input_gradient(gz: Tensor, a: Tensor, weight: Tensor, stride: int) -> Tensor:
    """[T', C'] -> [T, C], the shape of a."""
    g = torch.ops.aten.convolution_backward(
        _image(gz), _image(a), weight, None, [2, stride], [0, 0], [1, 1], False, [0, 0], 1,
        [True, False, False],
    )[0]  # fmt: skip
    return g[0, :, 0].t().contiguous()


def _activation_gradient(
    g: Tensor, z: Tensor, norms: Sequence[Tensor], d_norms: list[Tensor], layer: int, eps: float
) -> Tensor:
    """Gradient of a_l -> gradient of z_l; those of the norm are added to d_norms."""
    if not norms:
        return torch.ops.aten.gelu_backward(g, z)
    weight, bias = norms[2 * layer], norms[2 * layer + 1]
    y, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], weight, bias, eps)
    gz, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        torch.ops.aten.gelu_backward(g, y), z, list(z.shape[-1:]), mean, rstd, weight, bias, [True, True, True]
    )
    d_norms[2 * layer] += d_weight
    d_norms[2 * layer + 1] += d_bias
    return gz


def waveform_gradient(gz: Tensor, w0: Tensor, stride: int, samples: int) -> Tensor:
    """[B, T, C], [B, C, K] -> [B, S]: each utterance's own convolution, transposed."""
    B, T, C = gz.shape
    g = F.conv_transpose1d(gz.transpose(1, 2).reshape(1, B * C, T), w0.reshape(B * C, 1, -1), stride=stride, groups=B)
    return F.pad(g[0], (0, samples - g.shape[-1]))


def frontend_backward(
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
    """Chunk by chunk as forward. -> gradients of w0, b0, x (empty unless need_x), weights, biases, norms."""
    images = _weight_images(weights)
    taps = [w0.shape[2], *(w.shape[2] for w in weights)]
    counts = frame_counts(x.shape[1], taps, strides)
    widest = max(w0.shape[1], *(w.shape[0] for w in weights)) if weights else w0.shape[1]
    d_w0, d_b0 = (t.new_zeros(t.shape) for t in (w0, b0))
    d_x = x.new_zeros(x.shape if need_x else (0,))
    d_weights, d_biases, d_norms = ([torch.zeros_like(t) for t in ts] for ts in (weights, biases, norms))
    remaining = iter(kept)
    for b in range(len(x)):
        for first, last, low, high in _chunks(counts, taps, strides, widest):
            windows = _first_windows(x[b], shift[b], low, high, w0[b], strides[0])
            maps = [torch.addmm(b0[b].to(w0.dtype), windows, w0[b].t()), *(next(remaining) for _ in weights)]
            upper = g[b, first:last].contiguous()
            for layer in range(len(weights), 0, -1):
                weight, stride = images[layer - 1], strides[layer]
                gz = _activation_gradient(upper, maps[layer], norms, d_norms, layer, eps)
                a = F.gelu(_norm(maps[layer - 1], norms, layer - 1, eps))
                _add_weight_gradient(d_weights[layer - 1], gz, a, weight, stride)
                if biases:
                    d_biases[layer - 1] += gz.sum(0)
                upper = _input_gradient(gz, a, weight, stride)
            gz = _activation_gradient(upper, maps[0], norms, d_norms, 0, eps)
            d_w0[b] += gz.t() @ windows
            d_b0[b] += gz.sum(0)
            if need_x:
                start, stop = low * strides[0], (high - 1) * strides[0] + taps[0]
                d_x[b, start:stop] += waveform_gradient(gz[None], w0[b : b + 1], strides[0], stop - start)[0]
    return [d_w0, d_b0, d_x, *d_weights, *d_biases, *d_norms]


def _composite(
    x: Tensor,
    shift: Tensor,
    w0: Tensor,
    b0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    strides: Sequence[int],
    eps: float,
) -> tuple[Tensor, list[Tensor]]:
    """The whole batch in plain PyTorch, for compilers, exporters and other devices. -> out and z_0 .. z_{L-1}."""
    windows = (x.unfold(-1, w0.shape[2], strides[0]) - shift[:, None]).to(w0.dtype)
    z = torch.baddbmm(b0.to(w0.dtype)[:, None], windows, w0.transpose(1, 2))  # [B, T, C]
    maps = [z]
    for layer, weight in enumerate(weights):
        a = F.gelu(_norm(z, norms, layer, eps))
        z = F.conv1d(a.transpose(1, 2), weight, biases[layer] if biases else None, strides[layer + 1]).transpose(1, 2)
        maps.append(z)
    return F.gelu(_norm(z, norms, len(weights), eps)), maps


# ---- registered ops ---------------------------------------------------------


def padded_counts(counts: Sequence[Any], strides: Sequence[int]) -> list[Any]:
    """Rows that an utterance has in each layer's buffer, at least its frames, so that P_{l-1} = s_l P_l.

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


def _op_forward_torch(
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
    """What the Triton op returns, z_1 .. z_{L-1} [B, P_l, C_l] with rows of zeros, where there is no GPU."""
    out, maps = _composite(x, shift, w0, b0, weights, biases, norms, strides, eps)
    padded = padded_counts([z.shape[1] for z in maps], strides)
    kept = [F.pad(z, (0, 0, 0, rows - z.shape[1])) for z, rows in zip(maps, padded, strict=True)]
    return out.contiguous(), [z.contiguous() for z in kept[1:]] if keep else []


def _op_backward_torch(
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
    _, chunked = frontend_forward(x, shift, w0, b0, weights, biases, norms, strides, eps, True)
    return frontend_backward(g, x, shift, w0, b0, weights, biases, norms, chunked, strides, eps, need_x)


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
    torch_fn=_op_forward_torch,
    fake_fn=_fake_forward,
)
_backward = register(
    "conv_frontend_bwd",
    f"(Tensor g, Tensor x, {_STACK}, Tensor[] kept, SymInt[] strides, float eps, bool need_x) -> Tensor[]",
    triton_fn="triton_conv_frontend:backward",
    torch_fn=_op_backward_torch,
    fake_fn=_fake_backward,
)
_sums = register(
    "window_sums",
    "(Tensor x, int kernel, int stride, Tensor? frames) -> (Tensor, Tensor)",
    triton_fn="triton_conv_frontend:window_sums",
    torch_fn=_window_sums,
    fake_fn=_fake_sums,
)


class _FrontEnd(torch.autograd.Function):
    """out of settings, x, shift, w0, b0, then L - 1 weights, their biases and all norms."""

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
        run = _forward if use_op else frontend_forward
        out, kept = run(x, shift, w0, b0, *groups, strides, eps, keep)
        ctx.save_for_backward(x, shift, w0, b0, *parameters, *kept)
        ctx.settings = use_op, strides, eps, sizes, len(parameters)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        use_op, strides, eps, sizes, count = ctx.settings
        x, shift, w0, b0, *rest = ctx.saved_tensors
        groups, kept = _split(rest[:count], sizes), rest[count:]
        need_x = ctx.needs_input_grad[5]
        run = _backward if use_op else frontend_backward
        d_w0, d_b0, d_x, *d_parameters = run(g.contiguous(), x, shift, w0, b0, *groups, kept, strides, eps, need_x)
        return (None, None, None, None, None, d_x if need_x else None, None, d_w0, d_b0, *d_parameters)


def _split(parameters: Sequence[Tensor], sizes: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """-> weights, biases, norms."""
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
        impl: "auto", "triton" or "torch".

    Returns:
        Moments, float64, differentiable. Parts of a recording that start at multiples of `stride` and overlap by
        kernel - stride samples add up (`Moments.plus`) to the moments of the whole.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an implementation that cannot run here.
    """
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
    use_op = resolve_impl(impl, waveforms) == "triton" and not waveforms.requires_grad
    return Moments(count, *(_sums if use_op else _window_sums)(waveforms, kernel, stride, frames))


def _check(
    waveforms: Tensor, layers: Sequence[Convolution], channel_norm: Norm | None, moments: Moments | None
) -> None:
    if waveforms.dim() != 2 or not waveforms.is_floating_point():
        raise ValueError(f"waveforms must be floating point [B, S], got {waveforms.dtype} {tuple(waveforms.shape)}")
    if not layers:
        raise ValueError("layers must hold at least one Convolution, got none")
    channels, samples = 1, waveforms.shape[1]
    for index, (weight, stride, bias, norm) in enumerate(layers):
        name = f"layers[{index}]"
        if weight.dim() != 3 or weight.shape[1] != channels or stride < 1:
            raise ValueError(
                f"{name} must have weight [C', {channels}, k] and a stride of 1 or more, got {tuple(weight.shape)} and "
                f"{stride}"
            )
        channels = weight.shape[0]
        vectors = {} if bias is None else {"bias": bias}
        if norm is not None:
            vectors |= {"norm.weight": norm.weight, "norm.bias": norm.bias}
        if index == 0 and channel_norm is not None:
            vectors |= {"channel_norm.weight": channel_norm.weight, "channel_norm.bias": channel_norm.bias}
        for what, vector in vectors.items():
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
        B, K = waveforms.shape[0], layers[0].weight.shape[2]
        shapes = tuple(tuple(t.shape) for t in moments)
        if channel_norm is None or shapes != ((B,), (B, K), (B, K, K)):
            raise ValueError(f"moments need a channel_norm and shapes [{B}], [{B}, {K}], [{B}, {K}, {K}], got {shapes}")


def _fold(weight: Tensor, norm: Norm, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """First convolution and channel norm -> m [B, K], weights [B, C, K], bias [B, C], float64 (module docstring)."""
    mean, covariance = moments.statistics()
    taps = weight[:, 0].double()
    variance = ((taps @ covariance) * taps).sum(-1)  # [B, C]
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
        lengths: [B] int, valid samples of each utterance, S at most and at least one frame's; None: all S. Only the
            channel norm's statistics ask for them, as no valid frame sees padding otherwise.
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
            inner: Impl = "torch" if chosen == "torch" else "auto"
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
        return _composite(waveforms, shift, w0, b0, weights, biases, norms, strides, eps)[0]
    keep = needs_gradient(waveforms, w0, b0, *weights, *biases, *norms)
    sizes = (len(weights), len(biases))
    return _FrontEnd.apply(
        chosen == "triton", keep, strides, eps, sizes, waveforms, shift, w0, b0, *weights, *biases, *norms
    )


def _dtypes(*groups: Sequence[Tensor]) -> list[str]:
    return sorted({str(t.dtype) for group in groups for t in group})
