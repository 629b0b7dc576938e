"""The one speech encoder: HuBERT, wav2vec 2.0, WavLM and our students are settings of it.

Shapes: B utterances, S samples, T frames, D width, H heads, d = D / H.

    waveforms [B, S] -> front end -> mask embedding -> positional convolution -> layers -> hidden states [B, T, D]

An utterance's features do not depend on its batch (`padding="independent"`): see `armhubert.frontend` for the
convolutions; past them, padded frames are zeroed before the positional convolution and never attended to.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from armhubert.config import EncoderConfig
from armhubert.errors import ArmhubertError
from armhubert.frontend import ChannelNormConv, ConvLayer, FrontEnd, normalize_waveform
from armhubert.hooks import computes_as, hooked, hooked_within
from armhubert.kernels import (
    AttentionMap,
    Impl,
    attend,
    attention_probabilities,
    linear,
    positional_convolution,
    reattend,
)
from armhubert.kernels.runtime import autocast, frame_mask, needs_gradient, tracing
from armhubert.settings import documented
from armhubert.weights import Weights


@documented
class EncoderOutput(NamedTuple):
    """Features of a batch."""

    last_hidden_state: Tensor
    """[B, T, D]; of pre-norm models after the final LayerNorm."""
    hidden_states: tuple[Tensor, ...]
    """Input of layer 0, then each layer's output: L + 1 tensors [B, T, D]; empty where they were not asked for."""
    projections: tuple[Tensor, ...] | None
    """Head outputs, L tensors [B, T, D_t]; None where the model has no heads or they were not asked for."""
    lengths: Tensor
    """Valid frames [B], int64."""
    attentions: tuple[Tensor | None, ...] = ()
    """The map [B, h, T, T] that each of L layers applies, before dropout, in float32: one row for each query, and h
    heads. Rows of padded frames are unspecified. None where pruning left a layer no heads; empty where they were not
    asked for."""


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The identity, with its gradient multiplied by `factor`.

    In distillation through their heads, ARM students scale what flows back along the residual stream out of layer
    i = 0..L-1 by m_i = (L - i) / (L - i + 1), and what enters through head i by 1 - m_i before that.
    """
    return _ScaleGradient.apply(x, factor) if torch.is_grad_enabled() and x.requires_grad else x


class Linear(nn.Linear):
    """`torch.nn.Linear` through `armhubert.kernels.linear`, which is faster on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D']."""
        return linear(x, self.weight, self.bias)


def _fusible(layer: nn.Module) -> bool:
    """Whether only `layer`'s weights matter, so that what follows may take them instead of its output.

    An adapter (LoRA) or quantised layer in its place is to be called, and so is one whose output hooks wait for, or
    whose weight is no plain tensor.
    """
    if type(layer) is not Linear or not computes_as(layer, Linear) or hooked((layer,)):
        return False
    return type(layer.weight) in (Tensor, nn.Parameter)


# ---- attention -------------------------------------------------------------


class ComputingAttention(nn.Module):
    """Self-attention that computes its map and hands it on."""

    def __init__(self, config: EncoderConfig, heads: int, reusing_layers: int, impl: Impl) -> None:
        super().__init__()
        self.heads, self.dropout, self.impl = heads, config.attention_dropout, impl
        self.reusing_layers = reusing_layers
        inner = heads * (config.width // config.heads)
        self.qkv = Linear(config.width, 3 * inner)
        self.output = Linear(inner, config.width)

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, AttentionMap]:
        """[B, T, D], valid frames [B] (None: all) -> [B, T, D] and the map, before dropout."""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b t h d", three=3, h=self.heads)
        dropout = self.dropout if self.training else 0.0
        out, attention_map = attend(
            q, k, v, lengths, dropout=dropout, reusing_layers=self.reusing_layers, impl=self.impl
        )
        return self.output(out), attention_map


class ReusingAttention(nn.Module):
    """Attention without queries and keys: the kept map of the last computing layer, applied to this layer's values."""

    def __init__(self, config: EncoderConfig, impl: Impl) -> None:
        super().__init__()
        self.mode, self.impl = config.attention_mode, impl
        self.value = Linear(config.width, config.width)
        self.output = Linear(config.width, config.width)

    def forward(self, x: Tensor, attention_map: AttentionMap) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        values = (x, self.value.weight, self.value.bias) if _fusible(self.value) else (self.value(x),)
        return self.output(reattend(attention_map, *values, mode=self.mode, impl=self.impl))


class RelativePositions(nn.Module):
    """WavLM's distance buckets: T -> bias [H, T, T], shared by all layers and gated by each (WavLM, section III-A)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.max_distance = config.position_max_distance
        self.embedding = nn.Embedding(config.position_buckets, config.heads)

    def forward(self, size: int) -> Tensor:
        """Bias of `size` queries and keys, [H, T, T]."""
        position = torch.arange(size, device=self.embedding.weight.device)
        relative = position[None, :] - position[:, None]
        half = self.embedding.num_embeddings // 2
        exact = half // 2
        distance = relative.abs()
        far = exact + torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact) * (
            half - exact
        )
        bucket = torch.where(distance < exact, distance, far.long().clamp(max=half - 1)) + half * (relative > 0)
        return self.embedding(bucket).permute(2, 0, 1)


class GatedPositionAttention(nn.Module):
    """WavLM's self-attention: logits gain the relative position bias, gated by each query.

    A pruned layer keeps h of the H heads; each goes on reading its own slice of the input and its own bias.
    """

    def __init__(self, config: EncoderConfig, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.all_heads, self.dropout = config.heads, config.attention_dropout
        self.kept = None if len(kept) == config.heads else list(kept)
        head_width = config.width // config.heads
        self.qkv = Linear(config.width, 3 * len(kept) * head_width)
        self.output = Linear(len(kept) * head_width, config.width)
        self.gate = nn.Linear(head_width, 8)
        self.gate_scale = nn.Parameter(torch.ones(len(kept)))

    def forward(self, x: Tensor, lengths: Tensor | None, position_bias: Tensor) -> Tensor:
        """[B, T, D], valid frames [B], bias [H, T, T] -> [B, T, D]."""
        q, k, v, bias = self._operands(x, lengths, position_bias)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype), dropout_p=self.dropout if self.training else 0.0
        )
        return self.output(rearrange(out, "b h t d -> b t (h d)"))

    def probabilities(self, x: Tensor, lengths: Tensor | None, position_bias: Tensor) -> Tensor:
        """The map [B, h, T, T] that `forward` applies, before dropout."""
        q, k, _, bias = self._operands(x, lengths, position_bias)
        return (q.float() @ k.float().mT * q.shape[-1] ** -0.5 + bias).softmax(-1)

    def _operands(
        self, x: Tensor, lengths: Tensor | None, position_bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, h, T, d], and what is added to the logits [B, h, T, T]."""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=len(self.gate_scale))
        per_head = rearrange(x, "b t (h d) -> b h t d", h=self.all_heads)
        if self.kept is not None:
            per_head, position_bias = per_head[:, self.kept], position_bias[self.kept]
        reset, update = torch.sigmoid(self.gate(per_head).unflatten(-1, (2, 4)).sum(-1)).chunk(2, -1)  # [B, H, T, 1]
        bias = (reset * (update * self.gate_scale[:, None, None] - 1) + 2) * position_bias
        if lengths is not None:
            bias = bias.masked_fill(~frame_mask(lengths, x.shape[1])[:, None, None], float("-inf"))
        return q, k, v, bias


# ---- layers ----------------------------------------------------------------


class EncoderLayer(nn.Module):
    """Transformer layer `index`, post-norm or pre-norm, with whichever attention the configuration gives it, if any."""

    def __init__(self, config: EncoderConfig, index: int, impl: Impl) -> None:
        super().__init__()
        self.norm_first, self.dropout, self.activation_dropout = (
            config.norm_first,
            config.dropout,
            config.activation_dropout,
        )
        kept, ffn = config.kept_heads(index), config.ffn_width(index)
        self.attention: ComputingAttention | ReusingAttention | GatedPositionAttention | None = None
        if config.pattern[index] == "R":
            self.attention = ReusingAttention(config, impl)
        elif kept and config.position_buckets:
            self.attention = GatedPositionAttention(config, kept)
        elif kept:
            following = config.pattern[index + 1 :]
            reusing_layers = len(following) - len(following.lstrip("R"))
            self.attention = ComputingAttention(config, len(kept), reusing_layers, impl)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.up = Linear(config.width, ffn) if ffn else None
        self.down = Linear(ffn, config.width) if ffn else None
        self.ffn_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(
        self, x: Tensor, attention_map: AttentionMap | None, lengths: Tensor | None, position_bias: Tensor | None
    ) -> tuple[Tensor, AttentionMap | None]:
        """[B, T, D] and the last computed map -> [B, T, D] and the map for the next layer."""
        update, attention_map = self._attend(
            self.attention_norm(x) if self.norm_first else x, attention_map, lengths, position_bias
        )
        x = x if update is None else x + self._drop(update)
        if self.norm_first:
            update = self._feed_forward(self.ffn_norm(x))
            return x if update is None else x + update, attention_map
        x = self.attention_norm(x)
        update = self._feed_forward(x)
        return self.ffn_norm(x if update is None else x + update), attention_map

    def probabilities(
        self, x: Tensor, attention_map: AttentionMap | None, lengths: Tensor | None, position_bias: Tensor | None
    ) -> Tensor | None:
        """The map [B, h, T, T] of this layer, given its input [B, T, D] and the map that it handed on."""
        if self.attention is None:
            return None
        if isinstance(self.attention, GatedPositionAttention):
            assert position_bias is not None
            return self.attention.probabilities(
                self.attention_norm(x) if self.norm_first else x, lengths, position_bias
            )
        assert attention_map is not None
        mode = self.attention.mode if isinstance(self.attention, ReusingAttention) else "exact"
        return attention_probabilities(attention_map, mode=mode)

    def _attend(
        self, x: Tensor, attention_map: AttentionMap | None, lengths: Tensor | None, position_bias: Tensor | None
    ) -> tuple[Tensor | None, AttentionMap | None]:
        if self.attention is None:
            return None, None
        if isinstance(self.attention, ReusingAttention):
            assert attention_map is not None, "the configuration guarantees a computing layer first"
            return self.attention(x, attention_map), attention_map
        if isinstance(self.attention, GatedPositionAttention):
            return self.attention(x, lengths, position_bias), None
        return self.attention(x, lengths)

    def _feed_forward(self, x: Tensor) -> Tensor | None:
        if self.up is None or self.down is None:
            return None
        up = self.up
        x = linear(x, up.weight, up.bias, gelu=True) if _fusible(up) else F.gelu(up(x))
        return self._drop(self.down(F.dropout(x, self.activation_dropout, self.training)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class PositionalConv(nn.Module):
    """Convolutional positional embedding: grouped convolution over time, weight-normed along it, then GELU."""

    def __init__(self, config: EncoderConfig, *, impl: Impl = "auto") -> None:
        super().__init__()
        self.impl = impl
        kernel = config.position_kernel
        conv = nn.Conv1d(config.width, config.width, kernel, padding=kernel // 2, groups=config.position_groups)
        shape, meta = conv.weight.shape, conv.weight.is_meta
        if meta:  # on which norms are traced in Python, for which PyTorch imports its compiler: one number stands in
            conv.weight = nn.Parameter(torch.ones(1, 1, 1, device="cpu"))
        else:
            nn.init.normal_(conv.weight, std=math.sqrt(4 / (kernel * config.width)))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = weight_norm(conv, dim=2)
        if meta:
            self.conv.parametrizations.weight.original0 = nn.Parameter(torch.empty(1, 1, kernel, device="meta"))
            self.conv.parametrizations.weight.original1 = nn.Parameter(torch.empty(shape, device="meta"))
        self._spectrum: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        convolve: Callable[[Tensor], Tensor] = self.conv
        if computes_as(self.conv, nn.Conv1d) and self.conv.bias is not None and not hooked((self.conv,)):
            taps, learns = self.conv.kernel_size[0], needs_gradient(x, *self.conv.parameters())
            if positional_convolution.serves(x, taps, learns):
                return F.gelu(positional_convolution.convolve(x, self._kernel(), self.conv.bias))
            if positional_convolution.fuses(x, taps, learns, self.impl):
                y: Tensor = positional_convolution.fused(*autocast(x, self.conv.weight, self.conv.bias))
                return y
            convolve = self._convolve
        return F.gelu(convolve(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)

    def _convolve(self, x: Tensor) -> Tensor:
        """[B, D, T] -> [B, D, T + 1] (of an even kernel)."""
        conv = self.conv
        narrow = x.device.type == "cpu" and conv.in_channels // conv.groups < 16
        dtype = torch.get_autocast_dtype("cpu") if narrow and torch.is_autocast_enabled("cpu") else x.dtype
        if not narrow or dtype != torch.bfloat16:
            y: Tensor = conv(x)
            return y
        # oneDNN computes groups of fewer than 16 channels wrongly in bfloat16, on processors with AMX (PyTorch 2.12)
        with torch.autocast("cpu", enabled=False):
            weight, bias = conv.weight.float(), None if conv.bias is None else conv.bias.float()
            return F.conv1d(x.float(), weight, bias, 1, conv.padding, 1, conv.groups).to(dtype)

    def _kernel(self) -> Tensor:
        """The kernel's spectrum, made anew when the weights, in whatever parametrization, have changed.

        Versions tell of changes in place; a sample of the values, of changes behind `.data`.
        """
        parameters = list(self.conv.parameters())
        versions = [None if t.is_inference() else t._version for t in parameters]
        sample = torch.cat([t.flatten()[:: 1 + t.numel() // 4096] for t in parameters])
        if self._spectrum is None or self._spectrum[0] != versions or not torch.equal(self._spectrum[1], sample):
            self._spectrum = versions, sample, positional_convolution.spectrum(self.conv.weight)
        return self._spectrum[2]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._spectrum = None  # .to() replaces values without a trace
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spectrum": None}


# ---- the encoder -----------------------------------------------------------


FRAMES_A_THREAD = 256
"""Frames a thread in a group that a CPU infers together: enough for its matrix products, few enough for a cache."""


def similar_lengths(frames: list[int], most: int) -> list[list[int]]:
    """Rows of a batch in groups of at most `most` frames, or of one row, whose shortest has 9/10 of the longest."""
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(frames)), key=lambda row: -frames[row]):
        if not groups or frames[row] < 0.9 * longest or (len(groups[-1]) + 1) * longest > most:
            groups.append([])
            longest = frames[row]
        groups[-1].append(row)
    return groups


class SpeechEncoder(nn.Module):
    """HuBERT, wav2vec 2.0 or WavLM as a feature extractor; the base of `ARMHuBERT`.

    Args:
        config: what to build.
        impl: implementation of the attention and waveform convolution ops: `auto` (Triton on a GPU, PyTorch elsewhere),
            `triton` or `torch`. The positional convolution follows it in 16 bits without gradients, and is PyTorch's
            otherwise.

    Raises:
        ArmhubertError: no such implementation.
    """

    def __init__(self, config: EncoderConfig, *, impl: Impl = "auto") -> None:
        super().__init__()
        if impl not in get_args(Impl):
            raise ArmhubertError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
        self.config = config
        channels = config.conv_layers[-1][0]
        self.front_end = FrontEnd(config, impl=impl)
        self.feature_scale = nn.Parameter(torch.ones(channels)) if config.feature_scale else None
        self.feature_norm = nn.LayerNorm(channels, eps=config.norm_eps) if config.feature_norm else nn.Identity()
        self.feature_projection = Linear(channels, config.width) if config.feature_projection else nn.Identity()
        self.mask_embedding = nn.Parameter(torch.rand(config.width)) if config.mask_embedding else None
        self.position = PositionalConv(config, impl=impl)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.relative_positions = RelativePositions(config) if config.position_buckets else None
        self.layers = nn.ModuleList(EncoderLayer(config, index, impl) for index in range(config.layers))
        self.gradient_checkpointing = False
        if not next(self.parameters()).is_meta:
            for module in self.modules():
                _initialize(module)

    @classmethod
    def from_weights(
        cls,
        weights: Weights,
        *,
        impl: Impl = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """A model in eval mode with these weights; every parameter must be there, with the right shape.

        Raises:
            ArmhubertError: tensors that are missing, left over or of another shape than the configuration's.
        """
        with torch.device("meta"):
            model = cls(weights.config, impl=impl)
        expected = model.state_dict()
        if missing := sorted(expected.keys() - weights.state.keys()):
            raise ArmhubertError(f"{weights.source} lacks {_count(missing)}: its weights do not fit its configuration")
        if extra := sorted(weights.state.keys() - expected.keys()):
            raise ArmhubertError(f"{weights.source} has {_count(extra)} too many: they do not fit its configuration")
        for name, tensor in weights.state.items():
            if tensor.shape != expected[name].shape:
                raise ArmhubertError(
                    f"{weights.source}: {name} must have shape {list(expected[name].shape)} by its configuration, "
                    f"got {list(tensor.shape)}"
                )
        model.load_state_dict({k: v.to(device, dtype) for k, v in weights.state.items()}, assign=True)
        return model.eval()

    # The stages, in order. `forward` runs them all; a teacher runs the first once for its two views.

    def embed(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Everything before the mask: [B, S], valid samples [B] -> frames [B, T, D], valid frames [B] (None: all)."""
        if self.config.normalize_input:
            waveforms = normalize_waveform(waveforms, lengths)
        elif self.config.padding == "independent" and lengths is not None and _gradients_may_follow():
            # What padding holds reaches no feature, but a NaN there would reach gradients, as 0 times NaN.
            waveforms = torch.where(frame_mask(lengths, waveforms.shape[1]), waveforms, 0)
        x = self.project(self.front_end(waveforms.to(self.norm.weight.dtype), lengths))
        return x, None if lengths is None else self.config.frames(lengths)

    def project(self, x: Tensor) -> Tensor:
        """From the convolutions' channels to the width: [B, T, C] -> [B, T, D]."""
        if self.feature_scale is not None:
            x = x * self.feature_scale
        x = self.feature_projection(self.feature_norm(x))
        return F.dropout(x, self.config.input_dropout, self.training)

    def layer_inputs(self, x: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
        """Mask embedding, zeroed padding, positional embedding: the input of layer 0, [B, T, D]."""
        if mask is not None:
            if self.mask_embedding is None:
                raise ArmhubertError(
                    "this model has no mask embedding, so no frame can be masked: use weights with one"
                )
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        if lengths is not None:
            x = torch.where(frame_mask(lengths, x.shape[1])[..., None], x, 0)
        x = x + self.position(x)
        if not self.config.norm_first:
            x = self.norm(x)
        return F.dropout(x, self.config.dropout, self.training)

    def layer_outputs(
        self,
        x: Tensor,
        lengths: Tensor | None,
        *,
        through_heads: bool = False,
        attentions: list[Tensor | None] | None = None,
    ) -> Iterator[Tensor]:
        """Each layer's output [B, T, D] as soon as it is there; a caller that needs no more may stop.

        `through_heads`: gradients come through distillation heads too, and are scaled as the configuration says.
        `attentions`: a list that receives each layer's map, as in `EncoderOutput`.
        """
        attention_map: AttentionMap | None = None
        bias = self.relative_positions(x.shape[1]) if self.relative_positions is not None else None
        keep_nothing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(cast(Iterable[EncoderLayer], self.layers)):
            before = x
            if keep_nothing:
                x, attention_map = checkpoint(layer, x, attention_map, lengths, bias, use_reentrant=False)
                if attention_map is not None:  # later layers make the map again, as backward does
                    attention_map = attention_map._replace(probabilities=None)
            else:
                x, attention_map = layer(x, attention_map, lengths, bias)
            if attentions is not None:
                attentions.append(layer.probabilities(before, attention_map, lengths, bias))
            if through_heads and self.config.scale_layer_gradients:
                x = scale_gradient(x, self._stream_factor(i))
            yield x

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        hidden_states: bool = True,
        attentions: bool = False,
    ) -> EncoderOutput:
        """Features of a batch of waveforms.

        Args:
            waveforms: [B, S] at 16 kHz, float.
            lengths: valid samples of each utterance [B], integer; None: all S.
            mask: [B, T] bool, frames to replace by the mask embedding; None: none.
            hidden_states: False leaves them out of the output, which takes less memory.
            attentions: True adds each layer's map, which takes memory for B h T^2 numbers a layer.

        Returns:
            The features, without projections; those of padded frames are unspecified.

        Raises:
            ArmhubertError: shapes or lengths that do not fit.
        """
        self.check_inputs(waveforms, lengths, mask)
        lengths = None if lengths is None else lengths.long()
        if not attentions and self._works_in_groups(waveforms):
            return self._in_groups(waveforms, lengths, mask, hidden_states)
        return self._at_once(waveforms, lengths, mask, hidden_states, attentions)

    def _at_once(
        self,
        waveforms: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        hidden_states: bool,
        attentions: bool = False,
    ) -> EncoderOutput:
        x, frames = self.embed(waveforms, lengths)
        inputs = self.layer_inputs(x, frames, mask)
        kept = [inputs] if hidden_states else []
        maps: list[Tensor | None] | None = [] if attentions else None
        for x in self.layer_outputs(inputs, frames, attentions=maps):
            if hidden_states:
                kept.append(x)
        if frames is None:
            frames = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
        last = self.norm(x) if self.config.norm_first else x
        return EncoderOutput(last, tuple(kept), None, frames, tuple(maps or ()))

    def _works_in_groups(self, waveforms: Tensor) -> bool:
        """Whether to infer a few utterances at a time: on a CPU a large batch is no faster, and leaves the caches."""
        return (
            not tracing()  # first: for a compiler the batch would be a constant
            and waveforms.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not self.training
            and self.config.padding == "independent"
            and len(waveforms) > 1
            and not hooked_within(self)  # hooks are to see the batch as it is
        )

    def _in_groups(
        self, waveforms: Tensor, lengths: Tensor | None, mask: Tensor | None, hidden_states: bool
    ) -> EncoderOutput:
        """Groups of utterances of about one length, without the padding of the others: the same features."""
        batch, samples = waveforms.shape
        sizes = [samples] * batch if lengths is None else lengths.tolist()
        frames = torch.tensor([self.config.frames(size) for size in sizes], device=waveforms.device)
        whole: list[Tensor] = []
        for group in similar_lengths(frames.tolist(), FRAMES_A_THREAD * torch.get_num_threads()):
            longest = max(sizes[row] for row in group)
            equal = all(sizes[row] == longest for row in group)
            output = self._at_once(
                waveforms[group, :longest],
                None if equal else torch.tensor([sizes[row] for row in group], device=waveforms.device),
                None if mask is None else mask[group, : self.config.frames(longest)],
                hidden_states,
            )
            parts = [*output.hidden_states]
            if self.config.norm_first or not hidden_states:
                parts.append(output.last_hidden_state)
            if not whole:
                whole = [part.new_zeros(batch, self.config.frames(samples), part.shape[2]) for part in parts]
            for target, part in zip(whole, parts, strict=True):
                target[group, : part.shape[1]] = part
        states = tuple(whole[: len(self.layers) + 1]) if hidden_states else ()
        return EncoderOutput(whole[-1], states, None, frames)

    def _stream_factor(self, layer: int) -> float:
        remaining = self.config.layers - layer
        return remaining / (remaining + 1)

    def check_inputs(self, waveforms: Tensor, lengths: Tensor | None, mask: Tensor | None = None) -> None:
        """Raise an ArmhubertError unless these are what `forward` takes; for callers that run the stages themselves."""
        if not isinstance(waveforms, Tensor):
            raise ArmhubertError(f"waveforms must be a tensor [B, S], got a {type(waveforms).__name__}")
        if waveforms.ndim != 2 or not waveforms.is_floating_point():
            remedy = ": add a batch dimension, waveforms[None]" if waveforms.ndim == 1 else ""
            raise ArmhubertError(
                f"waveforms must be floating point [B, S], got {waveforms.dtype} {list(waveforms.shape)}{remedy}"
            )
        batch, samples = waveforms.shape
        shortest = self.config.receptive_field
        if samples < shortest:
            raise ArmhubertError(
                f"waveforms must have at least {shortest} samples (one frame), got {samples}: pad them"
            )
        if lengths is not None:
            if not isinstance(lengths, Tensor):
                raise ArmhubertError(f"lengths must be a tensor of integers [{batch}], got a {type(lengths).__name__}")
            if lengths.shape != (batch,) or lengths.is_floating_point():
                raise ArmhubertError(f"lengths must be integers [{batch}], got {lengths.dtype} {list(lengths.shape)}")
            # Reading values would stop a GPU's queue and a compiler's trace; on the CPU it is free.
            if lengths.device.type == "cpu" and lengths.numel() and not tracing():
                low, high = int(lengths.min()), int(lengths.max())
                if low < shortest or high > samples:
                    raise ArmhubertError(f"lengths must lie in {shortest}..{samples} samples, got {low}..{high}")
        if mask is not None and not isinstance(mask, Tensor):
            raise ArmhubertError(f"mask must be a bool tensor [B, T], got a {type(mask).__name__}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, self.config.frames(samples))):
            expected = [batch, self.config.frames(samples)]
            raise ArmhubertError(f"mask must be bool {expected}, got {mask.dtype} {list(mask.shape)}")


def _gradients_may_follow() -> bool:
    return torch.is_grad_enabled() and not torch.jit.is_tracing()  # whose check compares runs with and without


def _count(names: list[str]) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def _initialize(module: nn.Module) -> None:
    """Weights as fairseq starts them: normal(0, 0.02) in the Transformer, Kaiming in the waveform convolutions."""
    if isinstance(module, (ComputingAttention, ReusingAttention, GatedPositionAttention, EncoderLayer, SpeechEncoder)):
        for child in module.children():
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=0.02)
                nn.init.zeros_(child.bias)
    elif isinstance(module, (ConvLayer, ChannelNormConv)):
        nn.init.kaiming_normal_(module.conv.weight)
