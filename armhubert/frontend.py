"""Waveform -> frames: the convolution stack that HuBERT, wav2vec 2.0, WavLM and their students share.

Padding never reaches a valid frame: convolutions have no padding of their own, so a valid frame sees valid samples
only, and the one statistic over time (the first layer's group norm) is taken over each utterance's own frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armhubert.config import EncoderConfig
from armhubert.errors import ArmhubertError
from armhubert.hooks import computes_as, hooked_within
from armhubert.kernels import Convolution, Impl, Moments, Norm, conv_frontend, window_moments
from armhubert.kernels.runtime import frame_mask


def normalize_waveform(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero mean and unit variance over each utterance's valid samples; padding becomes 0. [B, S] -> [B, S].

    Hugging Face's `do_normalize`: (x - mean) / sqrt(var + 1e-7).
    """
    x = waveforms.float()
    if lengths is None:
        x = x - x.mean(-1, keepdim=True)
        return (x * (x.square().mean(-1, keepdim=True) + 1e-7).rsqrt()).to(waveforms.dtype)
    return _standardize(x, frame_mask(lengths, x.shape[1]), lengths[:, None], 1e-7).to(waveforms.dtype)


def _standardize(x: Tensor, valid: Tensor, count: Tensor, eps: float) -> Tensor:
    """Zero mean and unit variance over the `count` valid numbers of the last dimension; the rest becomes 0."""
    x = torch.where(valid, x, 0)
    x = torch.where(valid, x - x.sum(-1, keepdim=True) / count, 0)
    return x * (x.square().sum(-1, keepdim=True) / count + eps).rsqrt()


class ChannelNormConv(nn.Module):
    """The first convolution, its group norm (one group a channel) and GELU; a bias would cancel."""

    def __init__(self, channels: int, kernel: int, stride: int, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, channels, kernel, stride, bias=bias)
        self.norm = nn.GroupNorm(channels, channels)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, 1, S], valid samples [B] (None: all) -> [B, C, T].

        The norm itself knows of no lengths: with them its weights are taken, unless it is another's.
        """
        x = self.conv(x)
        if lengths is None or not _is_channel_norm(self.norm):
            return F.gelu(self.norm(x))
        frames = (lengths - self.kernel) // self.stride + 1
        y = _standardize(x.float(), frame_mask(frames, x.shape[2])[:, None], frames[:, None, None], self.norm.eps)
        return F.gelu(y.to(x.dtype) * self.norm.weight[:, None] + self.norm.bias[:, None])


class ConvLayer(nn.Module):
    """A convolution over frames, LayerNorm over channels where the architecture has it, and GELU."""

    def __init__(self, inputs: int, channels: int, kernel: int, stride: int, config: EncoderConfig) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, channels, kernel, stride, bias=config.conv_bias)
        self.norm = nn.LayerNorm(channels) if config.conv_norm == "layer" else None

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, C, T] -> [B, C', T']."""
        x = self.conv(x)
        return F.gelu(x if self.norm is None else self.norm(x.transpose(1, 2)).transpose(1, 2))


class FrontEnd(nn.Module):
    """The convolution stack, GELU after each layer. Waveforms [B, S] -> frames [B, T, C].

    The whole stack is one op, `armhubert.kernels.conv_frontend`, that takes the layers' weights. The layers are called
    where hooks wait for one of them, and where one is another's, but in the chunks of a long recording (`moments`).
    """

    def __init__(self, config: EncoderConfig, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.independent, self.impl = config.padding == "independent", impl
        (channels, kernel, stride), *rest = config.conv_layers
        self.first: ChannelNormConv | ConvLayer
        if config.conv_norm == "group":
            self.first = ChannelNormConv(channels, kernel, stride, bias=config.conv_bias)
        else:
            self.first = ConvLayer(1, channels, kernel, stride, config)
        self.rest = nn.ModuleList()
        for outputs, kernel, stride in rest:
            self.rest.append(ConvLayer(channels, outputs, kernel, stride, config))
            channels = outputs

    def moments(self, waveforms: Tensor) -> Moments | None:
        """What the group norm takes from [B, S], additive over parts of a recording; None where there is no such norm.

        Parts start at multiples of the first convolution's stride and overlap by its kernel less its stride.
        """
        if isinstance(self.first, ConvLayer):
            return None
        return window_moments(waveforms, self.first.kernel, self.first.stride, impl=self.impl)

    def forward(self, waveforms: Tensor, lengths: Tensor | None, moments: Moments | None = None) -> Tensor:
        """[B, S] samples, valid samples [B] (None: all) -> [B, T, C].

        With `moments`, the group norm takes its statistics from there: those of a whole recording, given with each of
        its chunks, make the chunks' frames equal the recording's.
        """
        lengths = lengths if self.independent else None
        layers = (self.first, *self.rest)
        plain = all(map(_is_plain, layers))
        if moments is not None and not plain:
            raise ArmhubertError(
                "a recording in chunks is computed from the weights of the waveform convolutions, in whose place other "
                "modules are: give it whole"
            )
        if not plain or (moments is None and hooked_within(self)):
            x = waveforms[:, None]
            for layer in layers:
                x = layer(x, lengths)
            return x.transpose(1, 2)
        norm = None
        if isinstance(self.first, ChannelNormConv):
            norm = Norm(self.first.norm.weight, self.first.norm.bias, self.first.norm.eps)
        return conv_frontend(
            waveforms,
            [_convolution(layer) for layer in layers],
            channel_norm=norm,
            lengths=lengths if moments is None else None,
            moments=moments,
            impl=self.impl,
        )


def _is_plain(layer: nn.Module) -> bool:
    """Whether the weights of `layer` tell what it computes."""
    if isinstance(layer, ChannelNormConv):
        return computes_as(layer, ChannelNormConv) and _is_plain_conv(layer.conv) and _is_channel_norm(layer.norm)
    if isinstance(layer, ConvLayer):
        norm = layer.norm is None or computes_as(layer.norm, nn.LayerNorm)
        return computes_as(layer, ConvLayer) and _is_plain_conv(layer.conv) and norm
    return False


def _is_plain_conv(conv: nn.Module) -> bool:
    if not isinstance(conv, nn.Conv1d) or not computes_as(conv, nn.Conv1d):
        return False
    return (conv.padding, conv.dilation, conv.groups) == ((0,), (1,), 1)


def _is_channel_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.GroupNorm) and computes_as(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels


def _convolution(layer: nn.Module) -> Convolution:
    assert isinstance(layer, (ChannelNormConv, ConvLayer))
    norm = layer.norm
    return Convolution(
        layer.conv.weight,
        layer.conv.stride[0],
        layer.conv.bias,
        Norm(norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else None,
    )
