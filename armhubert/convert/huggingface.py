"""Hugging Face folders and hub ids: hubert, wav2vec2 and wavlm models of transformers, without transformers."""

import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from armhubert.config import EncoderConfig
from armhubert.convert.tensors import complete, fused_qkv, read_folder, renamed
from armhubert.errors import ArmhubertError
from armhubert.settings import build, read_mapping
from armhubert.weights import Weights

SUPPORTED = ("hubert", "wav2vec2", "wavlm")

_SETTINGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
_WEIGHTS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],  # not the adapters beside them
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)
"""By preference: pickles are fetched where there is nothing else."""
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def download(hub_id: str) -> Path:
    """The local copy of a hub model, fetched by huggingface_hub where it is not cached: settings first, then weights.

    Raises:
        ArmhubertError: no such model, no network and not cached, a cache that cannot be written, or a model that is not
            supported, of which no weights are fetched.
    """
    folder = _fetch(hub_id, _SETTINGS)
    if not (folder / "config.json").is_file():
        return folder
    config = read_mapping(folder / "config.json")
    if config.get("model_type") != "armhubert":
        _settings(folder, config)
    for weights in _WEIGHTS:
        folder = _fetch(hub_id, [*_SETTINGS, *weights])
        if any(folder.glob("model.safetensors*")):
            break
    return folder


def _fetch(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise ArmhubertError(
                f"cannot keep {hub_id!r} in the hub's cache: {error.strerror}; "
                "free space, or set HF_HOME to another folder"
            ) from None
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArmhubertError(
            f"{hub_id!r} is no folder or file here, and the hub does not give it either "
            f"({first.removeprefix('Got: ').rstrip('. ')}): check the path, or the id and the network"
        ) from None


def load(folder: Path, config: Mapping[str, Any]) -> Weights:
    """A folder's config.json (already read), weights, and what the feature extractor does where that is told."""
    settings = _settings(folder, config)
    encoder, ignored = _encoder_names(read_folder(folder))
    # transformers leaves the embedding out where a fine-tuned model was trained without masking
    settings["mask_embedding"] = "masked_spec_embed" in encoder
    source = str(folder / "config.json")
    parsed = build(EncoderConfig, settings, source)
    with complete(folder):
        state = rename(encoder, parsed)
    return Weights(parsed, state, str(folder), tuple(ignored))


def _settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """EncoderConfig's fields from a transformers configuration; absent keys have transformers' defaults."""
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise ArmhubertError(f"{folder} is a {kind!r} model; supported: {', '.join(SUPPORTED)} and armhubert students")
    for key, needed in (("hidden_act", "gelu"), ("feat_extract_activation", "gelu")):
        if config.get(key, needed) != needed:
            raise ArmhubertError(f"{folder} has {key} {config[key]!r}; only {needed!r} is supported")
    for key in ("conv_pos_batch_norm", "add_adapter", "adapter_attn_dim"):
        if config.get(key):
            raise ArmhubertError(f"{folder} has {key} set, which is not supported")
    stack = (
        config.get("conv_dim", (512,) * 7),
        config.get("conv_kernel", (10, 3, 3, 3, 3, 2, 2)),
        config.get("conv_stride", (5, 2, 2, 2, 2, 2, 2)),
    )
    if not all(isinstance(part, (list, tuple)) and len(part) == len(stack[0]) for part in stack):
        raise ArmhubertError(f"{folder}: conv_dim, conv_kernel and conv_stride must be lists of one length")
    norm = config.get("feat_extract_norm", "group")
    extractor = _feature_extractor(folder)
    buckets = config.get("num_buckets", 320) if kind == "wavlm" else 0
    return {
        "conv_layers": list(zip(*stack, strict=True)),
        "width": config.get("hidden_size", 768),
        "layers": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "ffn": config.get("intermediate_size", 3072),
        "conv_norm": norm,
        "conv_bias": config.get("conv_bias", False),
        "feature_norm": config.get("feat_proj_layer_norm", True),
        "feature_projection": True,
        "norm_first": config.get("do_stable_layer_norm", False),
        "position_kernel": config.get("num_conv_pos_embeddings", 128),
        "position_groups": config.get("num_conv_pos_embedding_groups", 16),
        "position_buckets": buckets,
        "position_max_distance": config.get("max_bucket_distance", 800),
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "dropout": config.get("hidden_dropout", 0.1),
        "attention_dropout": config.get("attention_dropout", 0.1),
        "activation_dropout": config.get("activation_dropout", 0.1),
        "input_dropout": config.get("feat_proj_dropout", 0.0),
        # Where nothing says otherwise: layer-norm models were trained on normalised input, group-norm models were not.
        "normalize_input": norm == "layer" if extractor is None else extractor.get("do_normalize", True),
    }


def _feature_extractor(folder: Path) -> Mapping[str, Any] | None:
    """The feature extractor's settings, found as transformers does: in the processor's file, then in one of its own."""
    processor, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    if processor.is_file() and isinstance(inside := read_mapping(processor).get("feature_extractor"), dict):
        return inside
    return read_mapping(alone) if alone.is_file() else None


def _encoder_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Split off a `hubert.` / `wav2vec2.` / `wavlm.` prefix and what is no part of the encoder."""
    prefix = next((p for k in state for p in (f"{kind}." for kind in SUPPORTED) if k.startswith(p)), "")
    encoder, ignored = {}, []
    for name, tensor in state.items():
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and short.startswith(
            ("feature_extractor.", "feature_projection.", "encoder.", "masked_spec_embed")
        ):
            encoder[short] = tensor
        else:
            ignored.append(name)
    return encoder, ignored


_NAMES = (
    (r"masked_spec_embed", "mask_embedding"),
    (r"feature_extractor\.conv_layers\.0\.conv\.(\w+)", r"front_end.first.conv.\1"),
    (r"feature_extractor\.conv_layers\.0\.layer_norm\.(\w+)", r"front_end.first.norm.\1"),
    (r"feature_projection\.layer_norm\.(\w+)", r"feature_norm.\1"),
    (r"feature_projection\.projection\.(\w+)", r"feature_projection.\1"),
    (r"encoder\.pos_conv_embed\.conv\.(bias|parametrizations\.weight\.original[01])", r"position.conv.\1"),
    (r"encoder\.pos_conv_embed\.conv\.weight_g", "position.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv_embed\.conv\.weight_v", "position.conv.parametrizations.weight.original1"),
    (r"encoder\.layer_norm\.(\w+)", r"norm.\1"),
    (r"encoder\.layers\.(\d+)\.attention\.out_proj\.(\w+)", r"layers.\1.attention.output.\2"),
    (r"encoder\.layers\.(\d+)\.attention\.gru_rel_pos_linear\.(\w+)", r"layers.\1.attention.gate.\2"),
    (r"encoder\.layers\.(\d+)\.layer_norm\.(\w+)", r"layers.\1.attention_norm.\2"),
    (r"encoder\.layers\.(\d+)\.feed_forward\.intermediate_dense\.(\w+)", r"layers.\1.up.\2"),
    (r"encoder\.layers\.(\d+)\.feed_forward\.output_dense\.(\w+)", r"layers.\1.down.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(\w+)", r"layers.\1.ffn_norm.\2"),
    (r"encoder\.layers\.0\.attention\.rel_attn_embed\.weight", "relative_positions.embedding.weight"),
)


def rename(encoder: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Tensors by transformers' names -> by ours; a reusing layer has no queries and keys.

    Raises:
        KeyError: the name of a projection that is missing; any other tensor is missed when the model is built.
    """
    state = {}
    for name, tensor in encoder.items():
        if re.fullmatch(r"encoder\.layers\.\d+\.attention\.[qkv]_proj\.(weight|bias)", name):
            continue
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.attention\.gru_rel_pos_const", name):
            state[f"layers.{match[1]}.attention.gate_scale"] = tensor.flatten()
        elif match := re.fullmatch(r"feature_extractor\.conv_layers\.([1-9]\d{0,3})\.(conv|layer_norm)\.(\w+)", name):
            part = "norm" if match[2] == "layer_norm" else "conv"
            state[f"front_end.rest.{int(match[1]) - 1}.{part}.{match[3]}"] = tensor
        else:
            state[renamed(name, _NAMES)] = tensor
    for layer in filter(config.kept_heads, range(config.layers)):
        prefix = f"encoder.layers.{layer}.attention."
        for kind in ("weight", "bias"):
            if config.pattern[layer] == "R":
                state[f"layers.{layer}.attention.value.{kind}"] = encoder[f"{prefix}v_proj.{kind}"]
            else:
                state[f"layers.{layer}.attention.qkv.{kind}"] = fused_qkv(encoder, prefix, kind)
    return state
