"""Waveform -> frames: the convolution stack that HuBERT, wav2vec 2.0, WavLM and their students share.

Padding never reaches a valid frame: convolutions have no padding of their own, so a valid frame sees valid samples
only, and the one statistic over time (the first layer's group norm) is taken over each utterance's own frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armhubert.config import EncoderConfig


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """[B] lengths -> [B, size] bool, True inside each utterance."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def normalize_waveform(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero mean and unit variance over each utterance's valid samples; padding becomes 0. [B, S] -> [B, S].

    Hugging Face's `do_normalize`: (x - mean) / sqrt(var + 1e-7).
    """
    x = waveforms.float()
    if lengths is None:
        x = x - x.mean(-1, keepdim=True)
        return (x * (x.square().mean(-1, keepdim=True) + 1e-7).rsqrt()).to(waveforms.dtype)
    valid = valid_mask(lengths, x.shape[1])
    x = torch.where(valid, x, 0)
    x = torch.where(valid, x - x.sum(-1, keepdim=True) / lengths[:, None], 0)
    return (x * (x.square().sum(-1, keepdim=True) / lengths[:, None] + 1e-7).rsqrt()).to(waveforms.dtype)


class ChannelNormConv(nn.Module):
    """The first convolution and its group norm (one group a channel) as one convolution an utterance.

    The convolution is linear in its K-sample windows and every channel is a group of its own, so mean and variance
    over the valid frames follow in closed form from the windows' mean m [K] and covariance R [K, K]:

        mean_c = w_c . m,   var_c = w_c R w_c,   s_c = g_c / sqrt(var_c + eps)
        norm(conv(x))_c = (s_c w_c) * (x - m) + b_c

    Exact, differentiable, and without a pass over the widest activation of the model ([B, C, T], T = 3,200 a second).
    A bias of the convolution would cancel, so it takes no part.
    """

    def __init__(self, channels: int, kernel: int, stride: int, *, bias: bool, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, channels, kernel, stride, bias=bias)
        self.norm = nn.GroupNorm(channels, channels, eps=eps)

    def forward(self, waveforms: Tensor, frames: Tensor | None) -> Tensor:
        """[B, S], valid output frames [B] (None: all) -> [B, C, T]."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        windows = waveforms.unfold(-1, kernel, stride).transpose(1, 2)  # [B, K, T]
        # float64: the variance of quiet speech is a small difference of products of neighbouring samples
        wide = windows.double()
        if frames is None:
            mean = wide.mean(-1, keepdim=True)  # [B, K, 1]
            centred = wide - mean
            covariance = centred @ centred.transpose(1, 2) / wide.shape[-1]  # [B, K, K]
        else:
            valid = valid_mask(frames, wide.shape[-1])[:, None]
            mean = torch.where(valid, wide, 0).sum(-1, keepdim=True) / frames[:, None, None]
            centred = torch.where(valid, wide - mean, 0)
            covariance = centred @ centred.transpose(1, 2) / frames[:, None, None]
        weight = self.conv.weight[:, 0].double()  # [C, K]
        variance = ((weight @ covariance) * weight).sum(-1)  # [B, C]
        scale = self.norm.weight.double() * (variance + self.norm.eps).rsqrt()
        folded = scale[..., None] * weight  # [B, C, K]
        # centred windows: a mean that is large beside the deviation would cost the product its last digits
        bias = self.norm.bias[:, None].to(windows.dtype).expand(len(waveforms), -1, 1)
        return torch.baddbmm(bias, folded.to(windows.dtype), centred.to(windows.dtype))


class ConvLayer(nn.Module):
    """A convolution over frames, then LayerNorm over channels where the architecture has it."""

    def __init__(self, inputs: int, channels: int, kernel: int, stride: int, config: EncoderConfig) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, channels, kernel, stride, bias=config.conv_bias)
        self.norm = nn.LayerNorm(channels, eps=config.norm_eps) if config.conv_norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T']."""
        x = self.conv(x)
        return x if self.norm is None else self.norm(x.transpose(1, 2)).transpose(1, 2)


class FrontEnd(nn.Module):
    """The convolution stack, GELU after each layer. Waveforms [B, S] -> frames [B, T, C]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.independent = config.padding == "independent"
        (channels, kernel, stride), *rest = config.conv_layers
        self.first: nn.Module
        if config.conv_norm == "group":
            self.first = ChannelNormConv(channels, kernel, stride, bias=config.conv_bias, eps=config.norm_eps)
        else:
            self.first = ConvLayer(1, channels, kernel, stride, config)
        self.rest = nn.ModuleList()
        for outputs, kernel, stride in rest:
            self.rest.append(ConvLayer(channels, outputs, kernel, stride, config))
            channels = outputs

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, S] samples, valid samples [B] (None: all) -> [B, T, C]."""
        if isinstance(self.first, ChannelNormConv):
            frames = None
            if lengths is not None and self.independent:
                frames = (lengths - self.first.conv.kernel_size[0]) // self.first.conv.stride[0] + 1
            x = self.first(waveforms, frames)
        else:
            x = self.first(waveforms[:, None])
        x = F.gelu(x)
        for layer in self.rest:
            x = F.gelu(layer(x))
        return x.transpose(1, 2)
