"""The public ops, for a GPU by Triton and elsewhere by PyTorch; `impl` chooses, where there is a choice.

attend             attention that hands on its map, an `AttentionMap`, for other layers to reuse
reattend           a reused map applied to the values of another layer, as `AttentionMode` says
attention_probabilities  the map itself, a tensor to look at
distillation_loss  every layer's head, the choice of the teacher's view, and the distance to it
conv_frontend      waveforms -> frames: the stack of `Convolution`s, their `Norm`s and GELUs
window_moments     the `Moments` of waveforms, or of parts of one, that conv_frontend's channel norm needs
linear             `torch.nn.functional.linear`, faster on CPUs
"""

from armhubert.kernels.conv_frontend import Convolution, Moments, Norm, conv_frontend, window_moments
from armhubert.kernels.masked_distillation import Distance, distillation_loss
from armhubert.kernels.onednn import linear
from armhubert.kernels.reuse_attention import AttentionMap, AttentionMode, attend, attention_probabilities, reattend
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
    "attention_probabilities",
    "conv_frontend",
    "distillation_loss",
    "linear",
    "reattend",
    "window_moments",
]
