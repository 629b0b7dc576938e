"""The public ops, nothing else."""

from armhubert.kernels.masked_distillation import Distance, distillation_loss
from armhubert.kernels.reuse_attention import AttentionMap, Setting, attend, reattend
from armhubert.kernels.runtime import Impl

__all__ = ["AttentionMap", "Distance", "Impl", "Setting", "attend", "distillation_loss", "reattend"]
