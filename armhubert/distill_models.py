"""The models of a distillation: the teacher, and the student as it starts."""

import torch

from armhubert.config import SAMPLE_RATE
from armhubert.distill_config import DistillConfig, student_config
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.kernels.runtime import resolve_impl
from armhubert.student import ARMHuBERT
from armhubert.teacher import layer_mapping, load_teacher


def check_views(config: DistillConfig, teacher: SpeechEncoder) -> None:
    """Raise ArmhubertError where the loss needs a masked view that the teacher does not have."""
    if "masking" in config.terms and teacher.mask_embedding is None:
        raise ArmhubertError(
            f"teacher {config.teacher} has no mask embedding, so it has no masked view: "
            "use loss='plain' or loss='star', or the same weights from the hub"
        )


def load_models(config: DistillConfig, device: torch.device) -> tuple[SpeechEncoder, ARMHuBERT, int]:
    """Teacher, new student, and how many tensors it has from the teacher.

    Raises:
        ArmhubertError: no teacher, settings that do not make a student of it, or kernels that do not run on `device`.
    """
    if config.impl == "triton":
        try:
            resolve_impl(config.impl, torch.empty(0, device=device))
        except ValueError as error:
            raise ArmhubertError(str(error)) from None
    teacher = load_teacher(config.teacher, device=device)
    check_views(config, teacher)
    wanted = student_config(config, teacher.config)
    if config.max_seconds * SAMPLE_RATE < wanted.receptive_field:
        raise ArmhubertError(
            f"max_seconds must be at least {wanted.receptive_field / SAMPLE_RATE}, one frame, got {config.max_seconds}"
        )
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(config.seed)
        student = ARMHuBERT(wanted, impl=config.impl).to(device)
    return teacher, student, copy_matching(student, teacher) if config.init == "teacher" else 0


@torch.no_grad()
def copy_matching(student: ARMHuBERT, teacher: SpeechEncoder) -> int:
    """Start the student from the teacher's tensors where names and shapes agree; returns how many were copied.

    A student layer takes from the teacher layer it learns from; a reusing layer's values from that layer's values.
    """
    theirs = teacher.state_dict()
    mapping = layer_mapping(student.config.layers, teacher.config.layers)
    copied = 0
    for name, parameter in student.named_parameters():
        source = name
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            source = f"layers.{mapping[int(number)] - 1}.{rest}"
        tensor = theirs.get(source)
        if tensor is None and ".attention.value." in source:
            fused = theirs.get(source.replace(".value.", ".qkv."))
            tensor = None if fused is None else fused.chunk(3)[2]
        if tensor is not None and tensor.shape == parameter.shape:
            parameter.copy_(tensor)
            copied += 1
    return copied
