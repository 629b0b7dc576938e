"""Folders that `ARMHuBERT.save_pretrained` and `armhubert distill` write."""

from pathlib import Path
from typing import Any

from armhubert.config import EncoderConfig, build
from armhubert.convert.tensors import read_folder
from armhubert.weights import Weights


def load(folder: Path, config: dict[str, Any]) -> Weights:
    """config.json (already read) and model.safetensors."""
    settings = {k: v for k, v in config.items() if k not in ("model_type", "armhubert_version")}
    return Weights(build(EncoderConfig, settings, str(folder / "config.json")), read_folder(folder), str(folder))
