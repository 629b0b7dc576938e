"""The convolutional positional embedding: a grouped convolution over time with a long kernel, then GELU.

    y_t = GELU(bias + sum_k W_k x_{t + k - K/2}),   zeros outside, t = 0 .. T - 1

128 taps over 30 channels a group are 0.9 G multiply-accumulates for 10 s of the default student, in products too narrow
for a matrix unit. In training, and wherever neither way below serves, PyTorch's convolution does; without gradients:

- on a CPU, in the frequency domain. By overlap-save, blocks of N = 2 K frames overlapping by K - 1 go through a Fourier
  transform, are multiplied with the kernel's, group by group, and come back: a fiftieth of the operations, and closer
  to float64 than the direct sum. The kernel's transform takes as long as a short utterance's convolution, so it is made
  once; in training it would be made, and go through backward, in every step.
- on a GPU, in 16 bits, by a Triton kernel: several frames side by side make a product wide enough for the matrix unit
  (triton_positional_convolution.py), and bias and GELU are its epilogue.

Sources: Baevski et al., wav2vec 2.0 (arXiv 2006.11477), for the embedding; overlap-save is textbook.

Legend: B utterances, T frames, C channels, G groups, K taps, F = N/2 + 1 frequencies.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from armhubert.kernels.runtime import Impl, autocast_dtype, register, resolve_impl, tracing

SHORTEST = 40
"""Fewest frames of a batch for which the transform pays."""
FEWEST_TAPS = 32
"""Fewest kernel taps for which PyTorch's convolution is left."""
CHUNK = 8
"""Blocks that are worked on together, so that their transforms stay in a cache."""

# ---- on a CPU ---------------------------------------------------------------


def serves(x: Tensor, taps: int, needs_gradient: bool) -> bool:
    """Whether the transform pays for x [B, T, C] and K taps: on a CPU, without gradients, under no compiler."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not needs_gradient
        and not tracing()
        and x.shape[0] * x.shape[1] >= SHORTEST
        and taps >= FEWEST_TAPS
    )


def spectrum(weight: Tensor) -> Tensor:
    """Transform of the kernel: weight [C, C/G, K] -> [F, G, C/G, C/G] complex64, inputs before outputs."""
    outputs, inputs, taps = weight.shape
    bins = torch.fft.rfft(weight.float().flip(-1), 2 * taps)
    return bins.view(outputs // inputs, inputs, inputs, -1).permute(3, 0, 2, 1).contiguous()


def convolve(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Convolve x [B, T, C] by the kernel's `spectrum` and add bias [C], in float32 -> [B, T, C] in x's dtype."""
    B, T, C = x.shape
    frequencies, groups, width, _ = kernel.shape
    taps = frequencies - 1
    step = taps + 1
    blocks = -(-T // step)
    padded = F.pad(x, (0, 0, taps // 2, blocks * step + taps - 1 - taps // 2 - T))
    out = x.new_empty(B, blocks * step, C)
    for b in range(B):
        windows = padded[b].unfold(0, 2 * taps, step)  # [blocks, C, N]
        for first in range(0, blocks, CHUNK):
            bins = torch.fft.rfft(windows[first : first + CHUNK].float())  # [n, C, F]
            n = len(bins)
            bins = bins.view(n, groups, width, frequencies).permute(3, 1, 0, 2)
            bins = torch.bmm(bins.reshape(-1, n, width), kernel.view(-1, width, width))
            bins = bins.view(frequencies, groups, n, width).permute(2, 1, 3, 0)
            waves = torch.fft.irfft(bins.reshape(n, C, frequencies), 2 * taps)[..., taps - 1 :]  # [n, C, step]
            rows = out[b, first * step : (first + n) * step]
            torch.add(waves.transpose(1, 2).reshape(-1, C), bias, out=rows)
    return out[:, :T]


# ---- on a GPU ---------------------------------------------------------------


def fuses(x: Tensor, taps: int, needs_gradient: bool, impl: Impl) -> bool:
    """Whether the Triton kernel serves x [B, T, C] and K taps: in 16 bits, also autocast's, without gradients."""
    if needs_gradient or taps < FEWEST_TAPS:
        return False
    return autocast_dtype(x) in (torch.float16, torch.bfloat16) and resolve_impl(impl, x) == "triton"


def _fused_fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


fused: Any = register(
    "positional_convolution",
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    triton_fn="triton_positional_convolution:forward",
    fake_fn=_fused_fake,
)
"""GELU of the convolution of x [B, T, C] with weight [C, C/G, K] and bias [C], all of one dtype -> [B, T, C]."""
