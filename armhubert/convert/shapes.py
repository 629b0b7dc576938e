"""An encoder's settings from its tensors alone, for files without configuration: torchaudio's state dicts.

Shapes tell widths, kernels, depth and which norms there are. They do not tell strides, heads, where the Transformer's
norms sit or whether the input was normalised: these are those of the published models of that size, or are read from a
file of the same name ending in .yaml or .json, beside the weights, with EncoderConfig's field names.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from armhubert.config import EncoderConfig
from armhubert.errors import ArmhubertError
from armhubert.settings import coerced, read_mapping

_STRIDES: dict[tuple[int, ...], tuple[int, ...]] = {(10, 3, 3, 3, 3, 2, 2): (5, 2, 2, 2, 2, 2, 2)}
_HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}
_FFN = "encoder.layers.0.feed_forward.intermediate_dense.weight"


def infer(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """EncoderConfig's fields, and `name=value` of those that shapes do not tell.

    Args:
        tensors: an encoder's, by transformers' names.
        path: the file they come from; settings are looked for beside it.

    Raises:
        ArmhubertError: tensors that belong to no encoder, or sizes of no published model and no settings beside.
    """
    given = _beside(path)
    kernels = _conv_weights(tensors, path)
    width, inner, taps = _sized(tensors, _position(tensors, path), 3, path)
    found: dict[str, Any] = {
        "width": width,
        "layers": 1 + max((int(m[1]) for m in map(_LAYER.match, tensors) if m), default=-1),
        "ffn": _sized(tensors, _FFN, 2, path)[0],
        "conv_norm": "layer" if "feature_extractor.conv_layers.1.layer_norm.weight" in tensors else "group",
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in tensors,
        "feature_norm": "feature_projection.layer_norm.weight" in tensors,
        "feature_projection": "feature_projection.projection.weight" in tensors,
        "mask_embedding": "masked_spec_embed" in tensors,
        "position_kernel": taps,
        "position_groups": width // max(1, inner),
    }
    assumed: dict[str, Any] = {
        "norm_first": found["conv_norm"] == "layer",
        "normalize_input": found["conv_norm"] == "layer",
    }
    if "encoder.layers.0.attention.rel_attn_embed.weight" in tensors:
        buckets, found["heads"] = _sized(tensors, "encoder.layers.0.attention.rel_attn_embed.weight", 2, path)
        found["position_buckets"] = buckets
        assumed["position_max_distance"] = 800
    elif found["width"] in _HEADS:
        assumed["heads"] = _HEADS[found["width"]]
    sizes = tuple(kernel for _, kernel in kernels)
    if sizes in _STRIDES:
        assumed["conv_layers"] = [(c, k, s) for (c, k), s in zip(kernels, _STRIDES[sizes], strict=True)]
    if unknown := sorted({"heads", "conv_layers"} - {*found, *assumed, *given}):
        raise ArmhubertError(
            f"{path} does not tell its {' and '.join(unknown)}, and its sizes are of no published model: "
            f"write them into {path.with_suffix('.yaml').name} beside it, as `{unknown[0]}: ...`"
        )
    told = tuple(f"{name}={value}" for name, value in assumed.items() if name not in given and name != "conv_layers")
    if "conv_layers" in assumed and "conv_layers" not in given:
        told += (f"strides={list(_STRIDES[sizes])}",)
    return found | assumed | given, told


_LAYER = re.compile(r"encoder\.layers\.(\d{1,4})\.")


def _beside(path: Path) -> dict[str, Any]:
    for suffix in (".yaml", ".json"):
        if path.with_suffix(suffix).is_file() and path.suffix != suffix:
            settings = path.with_suffix(suffix)
            return coerced(EncoderConfig, read_mapping(settings), str(settings))
    return {}


def _position(tensors: Mapping[str, Tensor], path: Path) -> str:
    for name in ("weight_v", "parametrizations.weight.original1"):
        if f"encoder.pos_conv_embed.conv.{name}" in tensors:
            return f"encoder.pos_conv_embed.conv.{name}"
    raise ArmhubertError(
        f"{path} has no positional convolution with weight norm: it is no HuBERT, wav2vec 2.0 or WavLM"
    )


def _conv_weights(tensors: Mapping[str, Tensor], path: Path) -> list[tuple[int, int]]:
    """(channels, kernel) of each waveform convolution."""
    layers: list[tuple[int, int]] = []
    while (name := f"feature_extractor.conv_layers.{len(layers)}.conv.weight") in tensors:
        channels, _, kernel = _sized(tensors, name, 3, path)
        layers.append((channels, kernel))
    return layers


def _sized(tensors: Mapping[str, Tensor], name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    if name not in tensors:
        raise ArmhubertError(f"{path} lacks {name} (by transformers' names)")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise ArmhubertError(f"{path}: {name} must have {dimensions} dimensions, got shape {list(shape)}")
    return shape
