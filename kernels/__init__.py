"""The public ops, nothing else."""

from armhubert.kernels.conv_frontend import Convolution, Moments, Norm, conv_frontend, window_moments
from armhubert.kernels.masked_distillation import Distance, distillation_loss
from armhubert.kernels.onednn import linear
from armhubert.kernels.reuse_attention import AttentionMap, AttentionMode, attend, reattend
from armhubert.kernels.runtime import Impl

__all__ = [
    "AttentionMap",
    "AttentionMode",
    "Convolution",
    "Distance",
    "Impl",
    "Moments",
    "Norm",
    "attend",
    "conv_frontend",
    "distillation_loss",
    "linear",
    "reattend",
    "window_moments",
]
