"""torchaudio's pretrained pipelines (HUBERT_BASE, HUBERT_LARGE, WAV2VEC2_BASE, WAVLM_BASE, ...) and state dicts.

torchaudio's importers drop the mask embedding, so these teachers have no masked view: distil from them with
`--loss plain` or `star`, or take the same weights from the hub.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armhubert.config import EncoderConfig
from armhubert.convert import huggingface, shapes
from armhubert.convert.tensors import complete, tensors_of
from armhubert.errors import ArmhubertError, brief
from armhubert.packages import import_torchaudio
from armhubert.settings import build
from armhubert.weights import Weights


def is_pipeline(name: str) -> bool:
    """Whether `name` reads like a pipeline's (capitals, digits, underscores)."""
    return re.fullmatch(r"(HUBERT|WAV2VEC2|WAVLM)_[A-Z0-9_]+", name) is not None


def load(name: str) -> Weights:
    """Weights of the pipeline `name`, downloaded and cached by torch.hub.

    Raises:
        ArmhubertError: no such pipeline, or the download failed.
    """
    torchaudio = import_torchaudio()
    bundle = getattr(torchaudio.pipelines, name, None)
    if bundle is None or not hasattr(bundle, "get_model"):
        known = sorted(n for n in dir(torchaudio.pipelines) if is_pipeline(n))
        raise ArmhubertError(f"torchaudio has no pipeline {name!r}; known: {', '.join(known)}")
    try:
        model = bundle.get_model()
    except (OSError, RuntimeError) as error:
        reason = brief(error)
        raise ArmhubertError(f"cannot fetch {name} through torch.hub: {reason}; check the network") from None
    model = getattr(model, "model", model)  # torchaudio wraps models that normalise their input
    return from_model(model, name, normalize=bool(bundle._normalize_waveform))


def from_model(model: torch.nn.Module, source: str, *, normalize: bool) -> Weights:
    """Weights of a torchaudio Wav2Vec2Model (HuBERT, wav2vec 2.0 or WavLM)."""
    names: dict[str, Tensor] = {}
    ignored = []
    for name, tensor in model.state_dict().items():
        if name.startswith("aux."):
            ignored.append(name)
        else:
            names.update(_transformers_names(name, tensor))
    config = build(EncoderConfig, _settings(model, normalize), source)
    return Weights(config, huggingface.rename(names, config), source, tuple(ignored))


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether these are tensors by torchaudio's names, bare or under `state_dict`."""
    return _prefix(_bare(content)) is not None


def load_state(content: Mapping[str, Any], path: Path) -> Weights:
    """The state dict of a torchaudio Wav2Vec2Model or HuBERTPretrainModel, whatever stands before its names.

    A state dict has no configuration: see `armhubert.convert.shapes`. Pretraining models have their mask embedding.

    Raises:
        ArmhubertError: tensors or sizes that tell no encoder.
    """
    bare = _bare(content)
    tensors, prefix = tensors_of(bare, path), _prefix(bare)
    assert prefix is not None, "recognised"
    names: dict[str, Tensor] = {}
    ignored = [] if bare is content else sorted(str(key) for key in content if key != "state_dict")
    mask = next((name for name in tensors if name.endswith("mask_generator.mask_embedding")), None)
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if name == mask:
            names["masked_spec_embed"] = tensor
        elif name.startswith(prefix) and short.startswith(("feature_extractor.", "encoder.")):
            names.update(_transformers_names(short, tensor))
        else:
            ignored.append(name)
    settings, inferred = shapes.infer(names, path)
    config = build(EncoderConfig, settings, str(path))
    with complete(path):
        state = huggingface.rename(names, config)
    return Weights(config, state, str(path), tuple(ignored), inferred)


def _bare(content: Mapping[str, Any]) -> Mapping[str, Any]:
    state = content.get("state_dict")
    return state if isinstance(state, Mapping) else content


def _prefix(tensors: Mapping[str, Any]) -> str | None:
    """What stands before torchaudio's names; None: these are not torchaudio's."""
    telling = "encoder.transformer.pos_conv_embed.conv.bias"
    found = [name.removesuffix(telling) for name in tensors if isinstance(name, str) and name.endswith(telling)]
    return found[0] if len(found) == 1 else None


def _transformers_names(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    """torchaudio's names are transformers' but for two prefixes and WavLM's fused projections."""
    name = name.replace("encoder.feature_projection.", "feature_projection.").replace(
        "encoder.transformer.", "encoder."
    )
    name = name.replace(".attention.attention.", ".attention.")
    if match := re.fullmatch(r"(.*\.attention\.)in_proj_(weight|bias)", name):
        if tensor.ndim == 0 or len(tensor) % 3:
            raise ArmhubertError(f"{name} must hold queries, keys and values, got shape {list(tensor.shape)}")
        return {f"{match[1]}{x}_proj.{match[2]}": part for x, part in zip("qkv", tensor.chunk(3), strict=True)}
    return {name: tensor}


def _settings(model: Any, normalize: bool) -> dict[str, Any]:
    """EncoderConfig's fields, read off the modules."""
    convs = [layer.conv for layer in model.feature_extractor.conv_layers]
    transformer = model.encoder.transformer
    layer, position = transformer.layers[0], transformer.pos_conv_embed.conv
    attention = layer.attention
    has_bias = hasattr(attention, "gru_rel_pos_linear")
    embedding = getattr(attention, "rel_attn_embed", None)
    return {
        "conv_layers": [
            (
                c.out_channels,
                c.kernel_size[0] if isinstance(c.kernel_size, tuple) else c.kernel_size,
                c.stride[0] if isinstance(c.stride, tuple) else c.stride,
            )
            for c in convs
        ],
        "width": position.out_channels,
        "layers": len(transformer.layers),
        "heads": attention.num_heads,
        "ffn": layer.feed_forward.intermediate_dense.out_features,
        "conv_norm": "layer" if model.feature_extractor.conv_layers[-1].layer_norm is not None else "group",
        "conv_bias": convs[0].bias is not None,
        "feature_projection": True,
        "mask_embedding": False,
        # the layers' flag says where the norm sits; the Transformer's own is its opposite
        "norm_first": layer.layer_norm_first,
        "position_kernel": position.kernel_size[0],
        "position_groups": position.groups,
        "position_buckets": embedding.num_embeddings if has_bias and embedding is not None else 0,
        "position_max_distance": attention.max_distance if has_bias else 800,
        "normalize_input": normalize,
    }
