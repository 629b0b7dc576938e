"""Microsoft's WavLM `.pt` (Base, Base+, Large): `cfg`, a flat dict, and `model`, by fairseq's names.

Format: WavLM.py of its repository (microsoft/unilm, wavlm), whose defaults stand where `cfg` is silent.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armhubert.convert import fairseq
from armhubert.convert.pickles import fields, scalar
from armhubert.convert.tensors import tensors_of
from armhubert.errors import ArmhubertError, shown
from armhubert.weights import Weights


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether `cfg` asks for gated relative positions, which fairseq's own models do not have."""
    return isinstance(content.get("model"), Mapping) and "gru_rel_pos" in fields(content.get("cfg"))


def load(content: Mapping[str, Any], path: Path) -> Weights:
    """A WavLM checkpoint.

    Raises:
        ArmhubertError: positions that are not both relative and gated, or damaged settings or tensors.
    """
    section = {key: scalar(value) for key, value in fields(content["cfg"]).items()}
    for key in ("relative_position_embedding", "gru_rel_pos"):
        if section.get(key, False) is not True:
            raise ArmhubertError(
                f"{path}: {key} must be true, as in every published WavLM, got {shown(section.get(key))}"
            )
    encoder = fairseq.find_encoder(tensors_of(content["model"], path), path)
    settings = fairseq.settings_of(section, encoder.tensors, str(path)) | {
        "position_buckets": section.get("num_buckets", 320),
        "position_max_distance": section.get("max_distance", 1280),
        "normalize_input": fairseq.normalized(section),
    }
    return fairseq.converted(encoder, settings, path, sorted(str(k) for k in content if k not in ("cfg", "model")))
