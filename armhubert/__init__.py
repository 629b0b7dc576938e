"""Compress speech self-supervised models by attention map reusing and masking distillation."""

from armhubert.encoder import EncoderOutput, SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.student import ARMHuBERT
from armhubert.teacher import load_teacher

__all__ = ["ARMHuBERT", "ArmhubertError", "EncoderOutput", "SpeechEncoder", "__version__", "load_teacher"]

__version__ = "0.1.0"
