"""The distillation losses: masking distillation, its plain form, and STaR's temporal relations.

Every term is a sum over valid frames for each student layer, so that terms of several micro-batches and processes add
up; the training loop divides by the number of valid frames of the whole step.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from armhubert.errors import ArmhubertError, nearest
from armhubert.kernels import Distance, Impl, distillation_loss
from armhubert.kernels.runtime import frame_mask
from armhubert.student import ARMHuBERT
from armhubert.teacher import TeacherTargets

TERMS = ("masking", "plain", "star")


def parse_loss(text: str) -> dict[str, float]:
    """`masking`, or weighted terms such as `masking=1,star=0.5`.

    Raises:
        ArmhubertError: an unknown term, one named twice, or a weight that is not a positive number.
    """
    weights: dict[str, float] = {}
    for term in text.split(","):
        match = re.fullmatch(r"\s*([\w-]*)\s*(?:=\s*(\S+))?\s*", term)
        name = match[1] if match else term
        if name not in TERMS:
            raise ArmhubertError(f"unknown loss term {name!r} in {text!r}{nearest(name, TERMS)}")
        try:
            weight = float(match[2] or 1) if match else 0.0
        except ValueError:
            weight = 0.0
        if name in weights or not 0 < weight < float("inf"):
            raise ArmhubertError(
                f"loss must read like 'masking=1,star=0.5', positive weights, a term once; got {text!r}"
            )
        weights[name] = weight
    return weights


def layer_weights(layers: int, lower: float) -> Tensor:
    """a_l: 1 for the last layer, `lower` for the others. [L]."""
    weights = torch.full((layers,), lower)
    weights[-1] = 1.0
    return weights


def temporal_gram(x: Tensor, y: Tensor) -> Tensor:
    """X Y^T / D: the relation of every two frames. [B, T, D] twice -> [B, T, T], in float32."""
    return torch.bmm(x.float(), y.float().transpose(1, 2)) / x.shape[-1]


def star_loss(
    student: Sequence[Tensor],
    student_inputs: Sequence[Tensor],
    teacher: Sequence[Tensor],
    teacher_inputs: Sequence[Tensor],
    frames: Tensor | None,
) -> Tensor:
    """STaR: temporal Gram matrices of each layer's output, and of its input with its output (arXiv 2312.09040).

    The paper leaves weights and normalisation open; here, for each of the two matrices, the squared difference is
    averaged over the second frame and summed over the first, valid frames only, so that it is on the scale of the
    frame-wise losses.

    Args:
        student, student_inputs: outputs and inputs of the student's layers, L tensors [B, T, D].
        teacher, teacher_inputs: the same of the teacher, L tensors [B, T, D_t].
        frames: valid frames [B]; None: all.

    Returns:
        [L] float32.
    """
    size = student[0].shape[1]
    if frames is None:
        weight = torch.tensor(1 / size, device=student[0].device)
    else:
        valid = frame_mask(frames, size)
        weight = (valid[:, :, None] & valid[:, None, :]) / frames[:, None, None]
    losses = []
    with torch.autocast(
        student[0].device.type, enabled=False
    ):  # Gram matrices of 16-bit products lose the small relations
        for s_in, s_out, t_in, t_out in zip(student_inputs, student, teacher_inputs, teacher, strict=True):
            across = (temporal_gram(s_out, s_out) - temporal_gram(t_out, t_out)).square()
            within = (temporal_gram(s_in, s_out) - temporal_gram(t_in, t_out)).square()
            losses.append(((across + within) * weight).sum())
    return torch.stack(losses)


class Objective(nn.Module):
    """The student inside its loss: what a distributed engine wraps.

    Args:
        student: with heads where `masking` or `plain` is asked for.
        terms: weight of each loss term.
        distance: of the frame-wise terms.
        impl: implementation of the fused loss.
    """

    def __init__(self, student: ARMHuBERT, terms: Mapping[str, float], distance: Distance, impl: Impl) -> None:
        super().__init__()
        self.student, self.terms, self.distance, self.impl = student, dict(terms), distance, impl
        if "masking" not in terms and student.mask_embedding is not None:
            student.mask_embedding.requires_grad_(False)  # unused, and every trained parameter must get a gradient

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None, mask: Tensor | None, targets: TeacherTargets
    ) -> Tensor:
        """Each term's sum over valid frames, by layer: [terms, L] float32, unweighted, in the order of `terms`."""
        return self.compare(*self.views(waveforms, lengths, mask), targets)

    @property
    def needs(self) -> dict[str, bool]:
        """What `teacher_targets` must give, as its keywords."""
        return {
            "masking": "masking" in self.terms,
            "clean": bool(self.terms.keys() & {"plain", "star"}),
            "inputs": "star" in self.terms,
        }

    def views(
        self, waveforms: Tensor, lengths: Tensor | None, mask: Tensor | None
    ) -> tuple[list[tuple[Tensor, ...]], Tensor | None]:
        """The student's hidden states, input of layer 0 first, of every view; valid frames [B].

        The student sees the masked view for `masking` and the clean view for `plain` and `star`; where it needs both,
        they share its front end and go through its layers as one batch, like the teacher's.
        """
        views: list[Tensor | None] = []
        if "masking" in self.terms:
            views.append(mask)
        if self.terms.keys() & {"plain", "star"}:
            views.append(None)
        x, frames = self.student.embed(waveforms, lengths)
        inputs = torch.cat([self.student.layer_inputs(x, frames, view) for view in views])
        repeated = None if frames is None else frames.repeat(len(views))
        through_heads = self.student.heads is not None
        hidden = (inputs, *self.student.layer_outputs(inputs, repeated, through_heads=through_heads))
        return list(zip(*(h.chunk(len(views)) for h in hidden), strict=True)), frames

    def compare(self, by_view: Sequence[Sequence[Tensor]], frames: Tensor | None, targets: TeacherTargets) -> Tensor:
        """What `forward` returns, from what `views` does."""
        sums = []
        for term in self.terms:
            if term == "masking":
                sums.append(self.frame_loss(by_view[0], targets.masking, frames))
            elif term == "plain":
                sums.append(self.frame_loss(by_view[-1], targets.clean, frames))
            else:
                sums.append(relation_loss(by_view[-1], targets, frames))
        return torch.stack(sums)

    def frame_loss(self, hidden: Sequence[Tensor], target: Sequence[Tensor] | None, frames: Tensor | None) -> Tensor:
        """Distance between head outputs and `target`, [L]."""
        heads = self.student.heads
        assert heads is not None, "the configuration gives heads to a student with frame-wise losses"
        assert target is not None
        inputs = self.student.head_inputs(tuple(hidden))
        return distillation_loss(
            inputs, heads.weight, heads.bias, target, lengths=frames, distance=self.distance, impl=self.impl
        )


def relation_loss(hidden: Sequence[Tensor], targets: TeacherTargets, frames: Tensor | None) -> Tensor:
    """STaR's loss between the student's hidden states (input of layer 0 first) and the teacher's clean view, [L]."""
    assert targets.clean is not None
    assert targets.clean_inputs is not None
    return star_loss(hidden[1:], hidden[:-1], targets.clean, targets.clean_inputs, frames)
