"""DistilHuBERT as s3prl writes it: a `.ckpt` with its settings under `Config` and its tensors under `Distiller`.

The two-layer HuBERT without its prediction heads, as in the Hugging Face model made from it. s3prl's upstream returns
six states: projected frames, the two layers' outputs, the heads' predictions of teacher layers 4, 8 and 12. Ours are
the input of the first layer and the two layers' outputs; the heads are listed as ignored.
Source: Chang et al., DistilHuBERT (arXiv 2110.01900); the heads serve its training only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from armhubert.config import EncoderConfig
from armhubert.convert import fairseq
from armhubert.convert.tensors import complete, tensors_of
from armhubert.errors import ArmhubertError, shown
from armhubert.settings import build
from armhubert.weights import Weights

_HEADS = ("output_layer.", "task_embedding.")


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether there are `Config` and `Distiller`."""
    return isinstance(content.get("Config"), Mapping) and isinstance(content.get("Distiller"), Mapping)


def load(content: Mapping[str, Any], path: Path) -> Weights:
    """An s3prl distiller checkpoint.

    Raises:
        ArmhubertError: an encoder that depends on the task, or settings that this encoder does not have.
    """
    section = content["Config"].get("distiller")
    if not isinstance(section, Mapping):
        raise ArmhubertError(f"{path}: its Config must hold a 'distiller' section")
    tensors = tensors_of(content["Distiller"], path)
    encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEADS)}
    config = build(EncoderConfig, _settings(section, encoder, path), f"Config in {path}")
    with complete(path):
        state = fairseq.rename(encoder, config)
    others = {str(key) for key in content} - {"Config", "Distiller"}
    return Weights(config, state, str(path), (*sorted(tensors.keys() - encoder.keys()), *sorted(others)))


def _settings(section: Mapping[str, Any], encoder: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """EncoderConfig's fields from the `distiller` section: fairseq's names, s3prl's defaults."""
    for key, supported in (
        ("attention_type", ("original",)),
        # the others make the encoder's input or width depend on the predicted layer
        ("task_emb_type", ("expand-last", "self-hidden", "none")),
    ):
        if (value := section.get(key, supported[0])) not in supported:
            raise ArmhubertError(f"{path}: {key} must be {' or '.join(map(repr, supported))}, got {shown(value)}")
    theirs = {"encoder_layers": 1, **section}
    if "extractor_conv_feature_layers" in section:
        theirs["conv_feature_layers"] = section["extractor_conv_feature_layers"]
    return fairseq.settings_of(theirs, encoder, str(path)) | {
        "feature_norm": False,
        "activation_dropout": section.get("activation_dropout", 0.1),
    }
