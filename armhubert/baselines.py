"""What a student is compared with: other libraries' models on random weights, and the released way of computing one.

Every baseline maps waveforms [B, S] to features [B, T, D]. The figures of a profile depend on shapes, not on the values
of weights, so nothing is downloaded.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from armhubert.config import EncoderConfig
from armhubert.encoder import ComputingAttention, EncoderLayer, PositionalConv, ReusingAttention, SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.frontend import FrontEnd, normalize_waveform
from armhubert.packages import import_torchaudio

HUBERT_BASE = EncoderConfig(
    conv_layers=((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2),
    width=768,
    layers=12,
    heads=12,
    ffn=3072,
    feature_projection=True,
)


def has_released_way(config: EncoderConfig) -> bool:
    """Whether the released code could compute such a model."""
    return not config.position_buckets and config.layer_heads is None and config.layer_ffn is None


def released_front_end(front_end: FrontEnd, waveforms: Tensor) -> Tensor:
    """[B, S] -> [B, T, C]: each convolution, norm and GELU a pass of its own, padding inside the group norm."""
    x = waveforms[:, None]
    for layer in (front_end.first, *front_end.rest):
        x = layer.conv(x)
        if isinstance(layer.norm, nn.GroupNorm):
            x = layer.norm(x)
        elif layer.norm is not None:
            x = layer.norm(x.transpose(1, 2)).transpose(1, 2)
        x = F.gelu(x)
    return x.transpose(1, 2)


def released_position(position: PositionalConv, x: Tensor) -> Tensor:
    """[B, T, D] -> [B, T, D]: PyTorch's convolution, then GELU."""
    return F.gelu(position.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


class ReleasedWay(nn.Module):
    """A student computed as the authors' released code does, with the student's own weights.

    Convolution, group norm and GELU as passes of their own; a softmax over a map that is stored, and put through the
    softmax again in reusing layers. Equal to the student in `resoftmax` mode where nothing is padded, and slower: it is
    the baseline of our speed, not an implementation to use.
    """

    def __init__(self, student: SpeechEncoder) -> None:
        super().__init__()
        if not has_released_way(student.config):
            raise ArmhubertError(
                "the released code has no pruned layers and no position bias: leave out the baseline 'released'"
            )
        self.student = student

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, S] -> [B, T, D]."""
        model = self.student
        if model.config.normalize_input:
            waveforms = normalize_waveform(waveforms, None)
        x = model.feature_norm(released_front_end(model.front_end, waveforms))
        if isinstance(model.feature_projection, nn.Linear):
            x = _linear(model.feature_projection, x)
        x = x + released_position(model.position, x)
        x = x if model.config.norm_first else model.norm(x)
        probabilities = x.new_empty(0)
        for layer in model.layers:
            assert isinstance(layer, EncoderLayer)
            x, probabilities = self._layer(layer, x, probabilities)
        return model.norm(x) if model.config.norm_first else x

    def _layer(self, layer: EncoderLayer, x: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(layer.attention, (ComputingAttention, ReusingAttention)), "released students have no other"
        inputs = layer.attention_norm(x) if layer.norm_first else x
        batch, heads = len(x), self.student.config.heads
        if isinstance(layer.attention, ReusingAttention):
            probabilities = probabilities.softmax(-1)
            values = rearrange(_linear(layer.attention.value, inputs), "b t (h d) -> (b h) t d", h=heads)
        else:
            q, k, values = rearrange(
                _linear(layer.attention.qkv, inputs), "b t (three h d) -> three (b h) t d", three=3, h=heads
            ).contiguous()
            probabilities = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).softmax(-1)
        out = rearrange(torch.bmm(probabilities, values), "(b h) t d -> b t (h d)", b=batch)
        x = x + _linear(layer.attention.output, out)
        assert layer.up is not None
        assert layer.down is not None
        if layer.norm_first:
            return x + _linear(layer.down, F.gelu(_linear(layer.up, layer.ffn_norm(x)))), probabilities
        x = layer.attention_norm(x)
        return layer.ffn_norm(x + _linear(layer.down, F.gelu(_linear(layer.up, x)))), probabilities


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """PyTorch's own linear map, whatever the layer would use."""
    return F.linear(x, layer.weight, layer.bias)


class _Last(nn.Module):
    """Another library's model as waveforms -> last hidden state."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.pick = model, pick

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, S] -> [B, T, D]."""
        return self.pick(self.model(waveforms))


def _transformers(kind: str, **settings: Any) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise ArmhubertError(
            "this baseline needs transformers, which is not installed: "
            'pip install "armhubert[transformers]", or take hubert-base-torchaudio'
        ) from None
    config = getattr(transformers, f"{kind}Config")(**settings)
    return _Last(getattr(transformers, f"{kind}Model")(config), lambda output: output.last_hidden_state)


def _torchaudio() -> nn.Module:
    return _Last(import_torchaudio().models.hubert_base(), lambda output: output[0])


BASELINES: Mapping[str, Callable[[], nn.Module]] = {
    "hubert-base": lambda: _transformers("Hubert", attn_implementation="sdpa"),
    "hubert-base-torchaudio": _torchaudio,
    "wavlm-base": lambda: _transformers("WavLM"),
    "distilhubert": lambda: _transformers(
        "Hubert", num_hidden_layers=2, feat_proj_layer_norm=False, attn_implementation="sdpa"
    ),
}
"""Baselines by name, on random weights; `released` beside them is the student's own weights in `ReleasedWay`."""


def default_baselines(config: EncoderConfig) -> tuple[str, ...]:
    """What a model is compared with where nothing is said: what is installed, and its own released way."""
    installed = find_spec("transformers") is not None
    others = ("hubert-base", "distilhubert") if installed else ("hubert-base-torchaudio",)
    return (*others, "released") if has_released_way(config) else others


def baseline(name: str) -> nn.Module:
    """A named baseline in eval mode, without touching the global random state.

    Raises:
        ArmhubertError: the library that it comes from is not installed.
    """
    with torch.random.fork_rng([]):
        return BASELINES[name]().eval().requires_grad_(False)
