"""DPHuBERT's `.pth`: HuBERT, wav2vec 2.0 or WavLM by torchaudio's names, pruned, its own `config` beside `state_dict`.

Pruning took away convolution channels, attention heads, feed-forward units and whole blocks, each layer its own; what
it kept of the last convolution's channels it scales (`dummy_weight`). DPHuBERT's own `extract_features` returns the
projected frames first, then each layer's output; here the first hidden state is the input of layer 0, as everywhere.
Source: Peng et al., DPHuBERT (arXiv 2305.17651); the format is that of its repository's prune.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from armhubert.config import MAX_LAYERS, ConvLayer, EncoderConfig
from armhubert.convert import huggingface
from armhubert.convert.tensors import complete, tensors_of
from armhubert.errors import ArmhubertError, shown
from armhubert.settings import build
from armhubert.weights import Weights

_SCALE = "feature_extractor.dummy_weight"
_MAX_HEADS = 1000
"""Far above any encoder; lists of heads are made from numbers in a file."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What DPHuBERT's `config` says about the encoder, by its own names."""

    extractor_mode: Literal["group_norm", "layer_norm"]
    extractor_conv_layer_config: tuple[ConvLayer, ...]
    extractor_conv_bias: bool
    normalize_waveform: bool
    encoder_embed_dim: int
    encoder_pos_conv_kernel: int
    encoder_pos_conv_groups: int
    encoder_num_layers: int
    encoder_use_attention: tuple[bool, ...]
    encoder_use_feed_forward: tuple[bool, ...]
    encoder_ff_interm_features: tuple[int, ...]
    encoder_layer_norm_first: bool
    encoder_dropout: float = 0.0
    encoder_attention_dropout: float = 0.0
    encoder_ff_interm_dropout: float = 0.0
    encoder_projection_dropout: float = 0.0
    encoder_num_heads: tuple[int, ...] = ()
    """Heads that each layer has kept, of embed_dim / head_dim; not in WavLM's."""
    encoder_head_dim: int = 0
    encoder_remaining_heads: tuple[tuple[int, ...], ...] = ()
    """WavLM only: which heads each layer has kept."""
    encoder_total_num_heads: tuple[int, ...] = ()
    encoder_num_buckets: int = 320
    encoder_max_distance: int = 800


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether there is a `state_dict` and a `config` that says which blocks each layer uses."""
    config = content.get("config")
    return (
        isinstance(content.get("state_dict"), Mapping)
        and isinstance(config, Mapping)
        and {"extractor_conv_layer_config", "encoder_use_attention"} <= config.keys()
    )


def load(content: Mapping[str, Any], path: Path) -> Weights:
    """A pruned model, or an unpruned one in the same format.

    Raises:
        ArmhubertError: a model that is still being pruned, or tensors that do not fit the `config`.
    """
    tensors = tensors_of(content["state_dict"], path)
    if unpruned := next((name for name in tensors if ".hard_concrete" in name), None):
        raise ArmhubertError(f"{path} is not pruned yet (it has {unpruned}): run DPHuBERT's prune.py on it first")
    known = {field.name for field in dataclasses.fields(_Settings)}
    source = f"config in {path}"
    kept = content["config"].get("encoder_remaining_heads", ())
    if isinstance(kept, (list, tuple)) and sum(len(heads) for heads in kept if isinstance(heads, (list, tuple))) > (
        MAX_LAYERS * _MAX_HEADS
    ):  # before it is copied: one list may stand in many places
        raise ArmhubertError(f"{source}: encoder_remaining_heads must be at most {_MAX_HEADS} heads a layer")
    theirs = build(_Settings, {k: v for k, v in content["config"].items() if k in known}, source)
    settings = _settings(theirs, source) | {"feature_scale": _scales(tensors.get(_SCALE), theirs)}
    config = build(EncoderConfig, settings, source)
    encoder, ignored = {}, []
    for name, tensor in tensors.items():
        if name.startswith("aux.") or (name == _SCALE and not config.feature_scale):
            ignored.append(name)
        elif not config.position_buckets and ".attention.gru_rel_pos_" in name:
            ignored.append(name)  # gates of a bias that went with the first layer's attention
        else:
            short = name.replace("encoder.feature_projection.", "feature_projection.")
            encoder[short.replace("encoder.transformer.", "encoder.")] = tensor
    with complete(path):
        state = huggingface.rename(encoder, config)
    if config.feature_scale:
        state["feature_scale"] = state.pop(_SCALE)
    if config.position_buckets:
        _keep_gates(state, config, path)
    others = sorted(str(key) for key in content if key not in ("config", "state_dict"))
    return Weights(config, state, str(path), (*ignored, *others))


def _kept_heads(theirs: _Settings, source: str) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The heads of each layer, none where its attention is gone, and how many the layers once had."""
    kept: Sequence[Sequence[int]]
    if theirs.encoder_remaining_heads:
        totals = set(theirs.encoder_total_num_heads)
        if len(totals) != 1:
            raise ArmhubertError(f"{source}: encoder_total_num_heads must be one number in all layers, got {totals}")
        (heads,), kept = totals, theirs.encoder_remaining_heads
    else:
        width = theirs.encoder_head_dim
        if width < 1 or theirs.encoder_embed_dim % width:
            raise ArmhubertError(
                f"{source}: encoder_head_dim must divide encoder_embed_dim, got {width} and {theirs.encoder_embed_dim}"
            )
        heads = theirs.encoder_embed_dim // width
        if not all(0 <= count <= min(heads, _MAX_HEADS) for count in theirs.encoder_num_heads):
            raise ArmhubertError(
                f"{source}: encoder_num_heads must lie in 0..{min(heads, _MAX_HEADS)}, "
                f"got {shown(theirs.encoder_num_heads)}"
            )
        kept = [range(count) for count in theirs.encoder_num_heads]
    return tuple(tuple(k) if used else () for k, used in zip(kept, theirs.encoder_use_attention, strict=True)), heads


def _settings(theirs: _Settings, source: str) -> dict[str, Any]:
    """EncoderConfig's fields; a model of which nothing was pruned is a plain one."""
    layers = theirs.encoder_num_layers
    if not 1 <= layers <= MAX_LAYERS:
        raise ArmhubertError(f"{source}: encoder_num_layers must be at least 1 and at most {MAX_LAYERS}, got {layers}")
    for name in (
        "encoder_use_attention",
        "encoder_use_feed_forward",
        "encoder_ff_interm_features",
        "encoder_remaining_heads" if theirs.encoder_remaining_heads else "encoder_num_heads",
    ):
        if len(getattr(theirs, name)) != layers:
            raise ArmhubertError(
                f"{source}: {name} must have one entry a layer: {layers} layers, got {len(getattr(theirs, name))}"
            )
    kept, heads = _kept_heads(theirs, source)
    widths = zip(theirs.encoder_ff_interm_features, theirs.encoder_use_feed_forward, strict=True)
    ffn = tuple(width if used else 0 for width, used in widths)
    return {
        "conv_layers": theirs.extractor_conv_layer_config,
        "width": theirs.encoder_embed_dim,
        "layers": theirs.encoder_num_layers,
        "heads": heads,
        "ffn": max(1, *ffn),
        "conv_norm": theirs.extractor_mode.removesuffix("_norm"),
        "conv_bias": theirs.extractor_conv_bias,
        "feature_projection": True,
        "mask_embedding": False,
        "norm_first": theirs.encoder_layer_norm_first,
        "position_kernel": theirs.encoder_pos_conv_kernel,
        "position_groups": theirs.encoder_pos_conv_groups,
        # the first layer's attention carries the bias of all
        "position_buckets": theirs.encoder_num_buckets if theirs.encoder_remaining_heads and kept[0] else 0,
        "position_max_distance": theirs.encoder_max_distance,
        "normalize_input": theirs.normalize_waveform,
        "dropout": theirs.encoder_dropout,
        "attention_dropout": theirs.encoder_attention_dropout,
        "activation_dropout": theirs.encoder_ff_interm_dropout,
        "input_dropout": theirs.encoder_projection_dropout,
        "layer_heads": None if all(len(layer) == heads for layer in kept) else kept,
        "layer_ffn": None if len(set(ffn)) == 1 and ffn[0] else ffn,
    }


def _scales(scale: Tensor | None, theirs: _Settings) -> bool:
    """Whether the channels' scale does anything; one of a wrong shape is left for the model to refuse."""
    if scale is None:
        return False
    channels = [layer[0] for layer in theirs.extractor_conv_layer_config]
    return list(scale.shape) != channels[-1:] or bool((scale != 1).any())


def _keep_gates(state: dict[str, Tensor], config: EncoderConfig, path: Path) -> None:
    """Keep the gates' constants of the heads that are left: the format stores those of all."""
    for layer in range(config.layers):
        name, kept = f"layers.{layer}.attention.gate_scale", config.kept_heads(layer)
        if not kept or name not in state:
            continue
        if state[name].numel() != config.heads:
            raise ArmhubertError(
                f"{path}: gru_rel_pos_const of layer {layer} must have {config.heads} values, got {state[name].numel()}"
            )
        state[name] = state[name][list(kept)]
