"""Folders that `ARMHuBERT.save_pretrained` and `armhubert distill` write, and those that transformers makes of them."""

import dataclasses
from pathlib import Path
from typing import Any

from armhubert.config import EncoderConfig
from armhubert.convert.tensors import read_folder
from armhubert.settings import build
from armhubert.weights import Weights

_PREFIX = "armhubert."


def load(folder: Path, config: dict[str, Any]) -> Weights:
    """config.json (already read) and the weights; of a model saved by `armhubert.huggingface`, the student in it."""
    settings = {k: v for k, v in config.items() if k not in ("model_type", "armhubert_version")}
    if "transformers_version" in config:  # its own settings, and those of fine-tuning, stand among ours
        known = {field.name for field in dataclasses.fields(EncoderConfig)}
        settings = {k: v for k, v in settings.items() if k in known}
    parsed, state = build(EncoderConfig, settings, str(folder / "config.json")), read_folder(folder)
    ignored: tuple[str, ...] = ()
    if any(name.startswith(_PREFIX) for name in state):
        ignored = tuple(sorted(name for name in state if not name.startswith(_PREFIX)))
        state = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
    return Weights(parsed, state, str(folder), ignored)
