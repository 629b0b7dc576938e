"""The convolution front end by PyTorch: the path on a CPU and under a compiler, and the oracle of the tests.

Formulas and public functions are in conv_frontend.py, Triton's kernels in triton_conv_frontend.py. On a CPU `forward`
and `backward` take an utterance and a few seconds at a time, through oneDNN's channels-last convolutions. Compilers,
exporters and other devices get `composite`, the whole batch in operations that can be traced.

Legend: B utterances, S samples, L layers, T frames, C channels, k taps, K taps of the first layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from armhubert.kernels import onednn
from armhubert.kernels.runtime import frame_counts, frame_mask

CHUNK = 8_200_000
"""Numbers in the widest map of a chunk: 10 s of the default student, 33 MB, about the most that malloc keeps mapped."""
ROWS = 64
"""Frames in a row of oneDNN's channels-last weight gradient, which over rows of thousands is five times slower."""


def window_sums(x: Tensor, kernel: int, stride: int, frames: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum [B, K] and sum of outer products [B, K, K] of the valid windows of x [B, S], in float64."""
    windows = x.double().unfold(-1, kernel, stride)  # [B, T, K]
    if frames is not None:
        windows = torch.where(frame_mask(frames, windows.shape[1])[..., None], windows, 0)
    return windows.sum(1), windows.transpose(1, 2) @ windows


def _chunks(
    samples: int, w0: Tensor, weights: Sequence[Tensor], strides: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Ranges of an utterance's output frames, and of the first layer's frames that they are made from.

    Each is first, last, low, high; the last one's `last` is the number of output frames.
    """
    taps = [w0.shape[2], *(w.shape[2] for w in weights)]
    counts = frame_counts(samples, taps, strides)
    widest = max([w0.shape[1], *(w.shape[0] for w in weights)])
    step = max(1, CHUNK * counts[-1] // (counts[0] * widest))
    chunks = []
    for first in range(0, counts[-1], step):
        last = min(first + step, counts[-1])
        low, high = first, last
        for kernel, stride in zip(reversed(taps[1:]), reversed(strides[1:]), strict=True):
            low, high = low * stride, (high - 1) * stride + kernel
        chunks.append((first, last, low, high))
    return chunks


def _image(x: Tensor) -> Tensor:
    """[T, C] -> [1, C, 1, T], the same memory: oneDNN's channels-last convolutions are 2-D."""
    return x[None].transpose(1, 2).unsqueeze(2)


def _weight_images(weights: Sequence[Tensor]) -> list[Tensor]:
    """[C', C, k] -> [C', C, 1, k], laid out as oneDNN reads them: once, not for every chunk."""
    return [weight[:, :, None].contiguous(memory_format=torch.channels_last) for weight in weights]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """One layer: [T, C], [C', C, 1, k] -> [T', C'].

    An image of one row has no second to stride to, but a stride keeps PyTorch from preferring its own 1x1 convolution
    to oneDNN's on one thread, where it is half as fast.
    """
    return F.conv2d(_image(x), weight, bias, (2, stride))[0, :, 0].t().contiguous()


def _convolve_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """GELU of what `_convolve` gives, without gradients."""
    return onednn.convolve_gelu(_image(x), weight, bias, (2, stride))[0, :, 0].t().contiguous()


def _norm(z: Tensor, norms: Sequence[Tensor], layer: int, eps: float) -> Tensor:
    if not norms:
        return z
    # autocast gives a norm's result in float32
    return F.layer_norm(z, z.shape[-1:], norms[2 * layer], norms[2 * layer + 1], eps).to(z.dtype)


def _first_windows(x: Tensor, shift: Tensor, low: int, high: int, w0: Tensor, stride: int) -> Tensor:
    """Centred windows low..high of one utterance [S] -> [high - low, K]."""
    samples = x[low * stride : (high - 1) * stride + w0.shape[1]]
    return (samples.unfold(0, w0.shape[1], stride) - shift).to(w0.dtype)


def forward(
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
    """Output [B, T, C] and, with `keep`, z_1 .. z_{L-1} of every chunk.

    An utterance and a few seconds are worked on at a time, so that no map leaves the cache; as nothing is padded, the
    result is exact. shift (m) [B, K], w0 [B, C, K] and b0 [B, C] belong to one utterance each; biases and norms
    (weight, bias of each layer) are empty where the architecture has none.
    """
    chunks = _chunks(x.shape[1], w0, weights, strides)
    images = _weight_images(weights)
    out = w0.new_empty(len(x), chunks[-1][1], weights[-1].shape[0] if weights else w0.shape[1])
    kept: list[Tensor] = []
    for b in range(len(x)):
        for first, last, low, high in chunks:
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
    """Add to total [C', C, k] the weight's gradient from gz [T', C'] and a [T, C], ROWS frames at a time."""
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
    """Gradient of a layer's input a [T, C] from gz [T', C']."""
    g = torch.ops.aten.convolution_backward(
        _image(gz), _image(a), weight, None, [2, stride], [0, 0], [1, 1], False, [0, 0], 1,
        [True, False, False],
    )[0]  # fmt: skip
    return g[0, :, 0].t().contiguous()


def _activation_gradient(
    g: Tensor, z: Tensor, norms: Sequence[Tensor], d_norms: list[Tensor], layer: int, eps: float
) -> Tensor:
    """Gradient of z_l from that of a_l; the gradients of the norm are added to d_norms."""
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
    """Gradient of the waveforms [B, S] from gz [B, T, C]: each utterance's own convolution w0 [B, C, K], transposed."""
    B, T, C = gz.shape
    g = F.conv_transpose1d(gz.transpose(1, 2).reshape(1, B * C, T), w0.reshape(B * C, 1, -1), stride=stride, groups=B)
    return F.pad(g[0], (0, samples - g.shape[-1]))


def backward(
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
    """Gradients of w0, b0, x (empty unless need_x), weights, biases and norms, chunk by chunk like `forward`."""
    chunks = _chunks(x.shape[1], w0, weights, strides)
    images = _weight_images(weights)
    d_w0, d_b0 = (t.new_zeros(t.shape) for t in (w0, b0))
    d_x = x.new_zeros(x.shape if need_x else (0,))
    d_weights, d_biases, d_norms = ([torch.zeros_like(t) for t in ts] for ts in (weights, biases, norms))
    remaining = iter(kept)
    for b in range(len(x)):
        for first, last, low, high in chunks:
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
                start, stop = low * strides[0], (high - 1) * strides[0] + w0.shape[2]
                d_x[b, start:stop] += waveform_gradient(gz[None], w0[b : b + 1], strides[0], stop - start)[0]
    return [d_w0, d_b0, d_x, *d_weights, *d_biases, *d_norms]


def composite(
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
    """Output and z_0 .. z_{L-1} of the whole batch in plain PyTorch, for compilers, exporters and other devices."""
    windows = (x.unfold(-1, w0.shape[2], strides[0]) - shift[:, None]).to(w0.dtype)
    z = torch.baddbmm(b0.to(w0.dtype)[:, None], windows, w0.transpose(1, 2))  # [B, T, C]
    maps = [z]
    for layer, weight in enumerate(weights):
        a = F.gelu(_norm(z, norms, layer, eps))
        z = F.conv1d(a.transpose(1, 2), weight, biases[layer] if biases else None, strides[layer + 1]).transpose(1, 2)
        maps.append(z)
    return F.gelu(_norm(z, norms, len(weights), eps)), maps
