"""Compress speech self-supervised models by attention map reusing and masking distillation."""

import importlib
from typing import TYPE_CHECKING, Any

from armhubert.errors import ArmhubertError

if TYPE_CHECKING:
    from armhubert.config import EncoderConfig, preset
    from armhubert.encoder import EncoderOutput, SpeechEncoder
    from armhubert.student import ARMHuBERT
    from armhubert.teacher import load_teacher

__all__ = [
    "ARMHuBERT",
    "ArmhubertError",
    "EncoderConfig",
    "EncoderOutput",
    "SpeechEncoder",
    "__version__",
    "load_teacher",
    "preset",
]

__version__ = "0.1.0"

_HOMES = {
    "ARMHuBERT": "student",
    "EncoderConfig": "config",
    "EncoderOutput": "encoder",
    "SpeechEncoder": "encoder",
    "load_teacher": "teacher",
    "preset": "config",
}


def __getattr__(name: str) -> Any:
    # At the first use: `armhubert --help` should not wait for PyTorch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
