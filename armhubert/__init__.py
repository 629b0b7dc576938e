"""Compress speech self-supervised models by attention map reusing and masking distillation."""
