"""Students of the authors' released code: `.ckpt` with their run configuration `.yaml` beside it.

Their maps pass through the softmax a second time (`resoftmax`); a converted student reads them the same way.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armhubert.config import EncoderConfig, build, parse_conv_layers, read_mapping
from armhubert.convert.tensors import fused_qkv, renamed, tensors_of
from armhubert.errors import ArmhubertError
from armhubert.weights import Weights

_PREFIX = "student_model."


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's `state_dict` has tensors called student_model.*."""
    state = content.get("state_dict")
    return isinstance(state, Mapping) and any(isinstance(k, str) and k.startswith(_PREFIX) for k in state)


def load(content: Mapping[str, Any], path: Path) -> Weights:
    """A released checkpoint.

    Raises:
        ArmhubertError: no `.yaml` beside it, or settings that no released student has.
    """
    tensors = tensors_of(content["state_dict"], path)
    student = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
    settings = path.with_suffix(".yaml")
    if not settings.is_file():
        found = sorted(path.parent.glob("*.yaml"))
        if len(found) != 1:
            raise ArmhubertError(f"{path} needs its run configuration {settings.name} beside it")
        (settings,) = found
    section = read_mapping(settings).get("distiller")
    if not isinstance(section, dict):
        raise ArmhubertError(f"{settings} must hold a 'distiller' section")
    config = build(EncoderConfig, _settings(section, student, settings), str(settings))
    ignored = tuple(sorted(tensors.keys() - {_PREFIX + name for name in student}))
    try:
        return Weights(config, rename(student, config), str(path), ignored)
    except KeyError as error:
        raise ArmhubertError(f"{path} lacks {error.args[0]}: its weights do not fit {settings.name}") from None


def _settings(section: Mapping[str, Any], student: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """EncoderConfig's fields from the `distiller` section."""
    for key, needed in (
        ("layer_type", "transformer"),
        ("pos_conv_depth", 1),
        ("activation_fn", "gelu"),
        ("enable_tr_layer", False),
        ("pred_head_inter_dim", 0),
    ):
        if section.get(key, needed) != needed:
            raise ArmhubertError(f"{source}: {key} must be {needed!r}, got {section[key]!r}")
    heads = [name for name in student if re.fullmatch(r"proj_head\.\d+\.lin_proj\.weight", name)]
    if heads and student[heads[0]].ndim != 2:
        raise ArmhubertError(f"{heads[0]} must be a matrix, got shape {list(student[heads[0]].shape)}")
    pattern = _read_pattern(str(section.get("reuse_pattern", "[]")), source)
    return {
        "conv_layers": parse_conv_layers(str(section.get("conv_feature_layers"))),
        "width": section.get("encoder_embed_dim"),
        "layers": section.get("encoder_layers"),
        "heads": section.get("encoder_attention_heads"),
        "ffn": section.get("encoder_ffn_embed_dim"),
        "pattern": pattern,
        "attention_mode": "resoftmax" if "R" in pattern else "exact",
        "head_width": student[heads[0]].shape[0] if heads else None,
        "scale_layer_gradients": section.get("layer_grad_scale", False),
        "conv_norm": "layer" if section.get("extractor_mode") == "layer_norm" else "group",
        "conv_bias": section.get("conv_bias", False),
        "feature_projection": "post_extract_proj.weight" in student,
        "norm_first": section.get("layer_norm_first", False),
        "position_kernel": section.get("conv_pos", 128),
        "position_groups": section.get("conv_pos_groups", 16),
        "dropout": section.get("dropout", 0.0),
        "attention_dropout": section.get("attention_dropout", 0.0),
        "activation_dropout": section.get("activation_dropout", 0.0),
        "input_dropout": section.get("dropout_input", 0.0),
    }


def _read_pattern(text: str, source: Path) -> str:
    """`[True, False] * 6`-like text -> letters, by a grammar."""
    letters = ""
    for term in re.sub(r"\s", "", text).split("+"):
        match = re.fullmatch(r"\[((?:(?:True|False),?)*)\](?:\*(\d{1,2}))?", term)
        if match is None:
            raise ArmhubertError(f"{source}: reuse_pattern must read like '[True, False] * 6', got {text!r}")
        letters += "".join({"True": "C", "False": "R"}[flag] for flag in re.findall("True|False", match[1])) * int(
            match[2] or 1
        )
    return letters


_NAMES = (
    (r"mask_emb", "mask_embedding"),
    (r"feature_extractor\.conv_layers\.0\.0\.(weight|bias)", r"front_end.first.conv.\1"),
    (r"feature_extractor\.conv_layers\.0\.2\.(weight|bias)", r"front_end.first.norm.\1"),
    (r"post_extract_proj\.(\w+)", r"feature_projection.\1"),
    (r"layer_norm\.(\w+)", r"feature_norm.\1"),
    (r"encoder\.pos_conv\.0\.bias", "position.conv.bias"),
    (r"encoder\.pos_conv\.0\.weight_g", "position.conv.parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", "position.conv.parametrizations.weight.original1"),
    (r"encoder\.layer_norm\.(\w+)", r"norm.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"layers.\1.attention.output.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(\w+)", r"layers.\1.attention_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(\w+)", r"layers.\1.up.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(\w+)", r"layers.\1.down.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(\w+)", r"layers.\1.ffn_norm.\2"),
)


def rename(student: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Tensors (weights, or gradients) by the released names -> by ours."""
    state = {}
    for name, tensor in student.items():
        if re.fullmatch(r"encoder\.layers\.\d+\.self_attn\.[qkv]_proj\.\w+|proj_head\.\d+\.lin_proj\.\w+", name):
            continue
        if match := re.fullmatch(r"feature_extractor\.conv_layers\.([1-9]\d*)\.0\.(weight|bias)", name):
            state[f"front_end.rest.{int(match[1]) - 1}.conv.{match[2]}"] = tensor
            continue
        state[renamed(name, _NAMES)] = tensor
    for layer, letter in enumerate(config.pattern):
        prefix = f"encoder.layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            if letter == "C":
                state[f"layers.{layer}.attention.qkv.{kind}"] = fused_qkv(student, prefix, kind)
            else:
                state[f"layers.{layer}.attention.value.{kind}"] = student[f"{prefix}v_proj.{kind}"]
    if config.head_width is not None:
        for kind in ("weight", "bias"):
            heads = [student[f"proj_head.{layer}.lin_proj.{kind}"] for layer in range(config.layers)]
            if len({head.shape for head in heads}) > 1:
                raise ArmhubertError(f"proj_head.*.lin_proj.{kind} must have one shape in all layers")
            state[f"heads.{kind}"] = torch.stack(heads)
    return state
