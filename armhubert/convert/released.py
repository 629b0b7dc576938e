"""Students of the authors' released code: `.ckpt` with their run configuration `.yaml` beside it.

ARMHuBERT, ARMHuBERT-S, ARMwavLM-S, MaskHuBERT, and STaRHuBERT, which has neither heads nor a mask embedding.

Their maps pass through the softmax a second time (`resoftmax`); a converted student reads them the same way.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armhubert.config import EncoderConfig
from armhubert.convert import fairseq
from armhubert.convert.tensors import complete, tensors_of
from armhubert.errors import ArmhubertError, shown
from armhubert.settings import build, read_mapping
from armhubert.weights import Weights

_PREFIX = "student_model."
_HEAD = re.compile(r"proj_head\.\d+\.lin_proj\.(weight|bias)")


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
    student = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in tensors.items()
        # STaRHuBERT's last projection serves its training only
        if name.startswith(_PREFIX) and not name.startswith(f"{_PREFIX}final_proj.")
    }
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
    others = sorted(str(key) for key in content if key != "state_dict")
    ignored = (*sorted(tensors.keys() - {_PREFIX + name for name in student}), *others)
    with complete(path):
        state = rename(student, config)
    return Weights(config, state, str(path), ignored)


def _settings(section: Mapping[str, Any], student: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """EncoderConfig's fields from the `distiller` section."""
    for key, needed in (("enable_tr_layer", False), ("pred_head_inter_dim", 0)):
        value = section.get(key, needed)
        if isinstance(value, Tensor) or value != needed:
            raise ArmhubertError(f"{source}: {key} must be {needed!r}, got {shown(value)}")
    heads = [name for name in student if re.fullmatch(r"proj_head\.\d+\.lin_proj\.weight", name)]
    if heads and student[heads[0]].ndim != 2:
        raise ArmhubertError(f"{heads[0]} must be a matrix, got shape {list(student[heads[0]].shape)}")
    pattern = _read_pattern(str(section.get("reuse_pattern", "[]")), source)
    return fairseq.settings_of(section, student, str(source)) | {
        "pattern": pattern,
        "attention_mode": "resoftmax" if "R" in pattern else "exact",
        "projection_width": student[heads[0]].shape[0] if heads else None,
        "scale_layer_gradients": section.get("layer_grad_scale", False),
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


def rename(student: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Tensors (weights, or gradients) by the released names -> by ours.

    Raises:
        KeyError: the name of a projection or head that is missing.
    """
    heads = {name: tensor for name, tensor in student.items() if _HEAD.fullmatch(name)}
    state = fairseq.rename({name: tensor for name, tensor in student.items() if name not in heads}, config)
    if config.projection_width is not None:
        for kind in ("weight", "bias"):
            layers = [heads[f"proj_head.{layer}.lin_proj.{kind}"] for layer in range(config.layers)]
            if len({layer.shape for layer in layers}) > 1:
                raise ArmhubertError(f"proj_head.*.lin_proj.{kind} must have one shape in all layers")
            state[f"heads.{kind}"] = torch.stack(layers)
    return state
