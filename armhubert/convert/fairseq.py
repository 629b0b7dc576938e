"""fairseq's `.pt`: HuBERT and wav2vec 2.0, pretrained or fine-tuned for CTC, and the files that s3prl makes of them.

Settings come from `cfg` (omegaconf, or a plain dict) or, in older files, `args` (argparse); of a fine-tuned model from
the `w2v_args` inside. Where a fine-tuned file only points at its pretrained one, they are inferred from the tensors'
shapes. fairseq's names are translated to transformers', as its published conversion does, and those to ours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from armhubert.config import EncoderConfig, parse_conv_layers
from armhubert.convert import huggingface, shapes
from armhubert.convert.pickles import fields, scalar
from armhubert.convert.tensors import complete, renamed, tensors_of
from armhubert.errors import ArmhubertError, shown
from armhubert.settings import build
from armhubert.weights import Weights

_CONV_LAYERS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
_FIRST = "feature_extractor.conv_layers.0.0.weight"
_OURS = ("feature_extractor.", "post_extract_proj.", "layer_norm.", "encoder.", "mask_emb")


class Encoder(NamedTuple):
    """The encoder inside a larger model."""

    prefix: str
    """What stands before its names; `w2v_encoder.w2v_model.` in a fine-tuned one."""
    tensors: dict[str, Tensor]
    """By fairseq's names, without the prefix."""
    ignored: tuple[str, ...]
    """The names of the rest: quantisers, projections, label embeddings, CTC heads."""


def recognise(content: Mapping[str, Any]) -> bool:
    """Whether there are tensors under `model` and settings under `cfg` or `args`."""
    return isinstance(content.get("model"), Mapping) and ("cfg" in content or "args" in content)


def recognise_s3prl(content: Mapping[str, Any]) -> bool:
    """Whether it is s3prl's conversion of such a file."""
    return {"task_cfg", "model_cfg", "model_weight"} <= content.keys()


def load(content: Mapping[str, Any], path: Path) -> Weights:
    """A fairseq checkpoint.

    Raises:
        ArmhubertError: data2vec, a Conformer, or another model than these two; damaged settings or tensors.
    """
    root = fields(content.get("cfg")) or fields(content.get("args"))
    model, task = (root["model"], root.get("task")) if "model" in root else (root, root)
    others = sorted(str(key) for key in content if key not in ("model", "cfg", "args"))
    return _load(content["model"], fields(model), fields(task), path, others)


def load_s3prl(content: Mapping[str, Any], path: Path) -> Weights:
    """A checkpoint that s3prl has converted: `task_cfg`, `model_cfg`, `model_weight`.

    Raises:
        ArmhubertError: as `load`.
    """
    others = sorted(str(key) for key in content if key not in ("task_cfg", "model_cfg", "model_weight"))
    return _load(content["model_weight"], fields(content["model_cfg"]), fields(content["task_cfg"]), path, others)


def _load(tensors: Any, model: Mapping[str, Any], task: Mapping[str, Any], path: Path, others: list[str]) -> Weights:
    kind = scalar(model.get("_name", model.get("arch")))
    deep = isinstance(tensors, Mapping) and "encoder.pos_conv.0.0.weight" in tensors
    if deep or (isinstance(kind, str) and "data2vec" in kind):
        raise ArmhubertError(
            f"{path} is a data2vec model, whose positional convolutions are another architecture: "
            "supported are HuBERT, wav2vec 2.0 and WavLM"
        )
    encoder = find_encoder(tensors_of(tensors, path), path)
    inferred: tuple[str, ...] = ()
    if encoder.prefix.endswith("w2v_model."):
        inner = fields(model.get("w2v_args"))
        outer_normalize = normalized(task) or normalized(model)
        model, task = (fields(inner["model"]), fields(inner.get("task"))) if "model" in inner else (inner, inner)
        if not model:  # the file only points at the pretrained one
            names = {renamed(name, NAMES): tensor for name, tensor in encoder.tensors.items()}
            settings, inferred = shapes.infer(names, path)
            settings["normalize_input"] = outer_normalize
            inferred = tuple(what for what in inferred if not what.startswith("normalize_input"))
            return converted(encoder, settings, path, others)._replace(inferred=inferred)
    settings = settings_of(model, encoder.tensors, str(path)) | {"normalize_input": normalized(task)}
    return converted(encoder, settings, path, others)


def normalized(task: Mapping[str, Any]) -> bool:
    """Whether the model was trained on waveforms of zero mean and unit variance."""
    return scalar(task.get("normalize")) is True


def find_encoder(tensors: Mapping[str, Tensor], path: Path) -> Encoder:
    """Split the encoder's tensors from the rest.

    Raises:
        ArmhubertError: there is no encoder, or more than one.
    """
    prefixes = [name.removesuffix(_FIRST) for name in tensors if name.endswith(_FIRST)]
    if len(prefixes) != 1:
        raise ArmhubertError(
            f"{path} is no fairseq HuBERT or wav2vec 2.0: it must have one tensor called {_FIRST}, got {len(prefixes)}"
        )
    (prefix,) = prefixes
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    encoder = {name: tensor for name, tensor in inside.items() if name.startswith(_OURS)}
    ignored = sorted(tensors.keys() - {prefix + name for name in encoder})
    return Encoder(prefix, encoder, tuple(ignored))


def converted(encoder: Encoder, settings: Mapping[str, Any], path: Path, others: list[str]) -> Weights:
    """Tensors and EncoderConfig's fields -> weights.

    Raises:
        ArmhubertError: settings or tensors that do not fit.
    """
    config = build(EncoderConfig, settings, f"the settings in {path}")
    with complete(path):
        state = rename(encoder.tensors, config)
    return Weights(config, state, str(path), (*encoder.ignored, *others))


def settings_of(section: Mapping[str, Any], encoder: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """EncoderConfig's fields from fairseq's names for them; absent ones have fairseq's defaults.

    Raises:
        ArmhubertError: an architecture that this encoder does not have.
    """
    section = {key: scalar(value) for key, value in section.items()}
    for key, needed in (
        ("layer_type", "transformer"),
        ("pos_conv_depth", 1),
        ("activation_fn", "gelu"),
        ("quantize_input", False),
        ("conv_pos_batch_norm", False),
        ("pos_enc_type", "abs"),
        ("crop_seq_to_multiple", 1),
    ):
        value = section.get(key, needed)
        if isinstance(value, Tensor) or value not in (needed, None):
            raise ArmhubertError(f"{source}: {key} must be {needed!r}, got {shown(value)}")
    mode = section.get("extractor_mode", "default")
    if mode not in ("default", "layer_norm"):
        raise ArmhubertError(f"{source}: extractor_mode must be 'default' or 'layer_norm', got {shown(mode)}")
    if not isinstance(layers := section.get("conv_feature_layers", _CONV_LAYERS), str):
        raise ArmhubertError(f"{source}: conv_feature_layers must be text, got {shown(layers)}")
    return {
        "conv_layers": parse_conv_layers(layers),
        "width": section.get("encoder_embed_dim", 768),
        "layers": section.get("encoder_layers", 12),
        "heads": section.get("encoder_attention_heads", 12),
        "ffn": section.get("encoder_ffn_embed_dim", 3072),
        "conv_norm": "layer" if mode == "layer_norm" else "group",
        "conv_bias": section.get("conv_bias", False),
        "feature_projection": "post_extract_proj.weight" in encoder,
        "mask_embedding": "mask_emb" in encoder,
        "norm_first": section.get("layer_norm_first", False),
        "position_kernel": section.get("conv_pos", 128),
        "position_groups": section.get("conv_pos_groups", 16),
        "dropout": section.get("dropout", 0.1),
        "attention_dropout": section.get("attention_dropout", 0.1),
        "activation_dropout": section.get("activation_dropout", 0.0),
        "input_dropout": section.get("dropout_input", 0.0),
    }


NAMES = (
    (r"mask_emb", "masked_spec_embed"),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(weight|bias)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(0)\.2\.(weight|bias)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(weight|bias)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"post_extract_proj\.(\w+)", r"feature_projection.projection.\1"),
    (r"layer_norm\.(\w+)", r"feature_projection.layer_norm.\1"),
    (r"encoder\.pos_conv\.0\.([\w.]+)", r"encoder.pos_conv_embed.conv.\1"),
    (r"(encoder\.layers\.\d+\.)self_attn\.((?:[qkv]|out)_proj\.\w+)", r"\1attention.\2"),
    (r"(encoder\.layers\.\d+\.)self_attn\.grep_linear\.(\w+)", r"\1attention.gru_rel_pos_linear.\2"),
    (r"(encoder\.layers\.\d+\.)self_attn\.grep_a", r"\1attention.gru_rel_pos_const"),
    (r"(encoder\.layers\.\d+\.)self_attn\.relative_attention_bias\.weight", r"\1attention.rel_attn_embed.weight"),
    (r"(encoder\.layers\.\d+\.)self_attn_layer_norm\.(\w+)", r"\1layer_norm.\2"),
    (r"(encoder\.layers\.\d+\.)fc1\.(\w+)", r"\1feed_forward.intermediate_dense.\2"),
    (r"(encoder\.layers\.\d+\.)fc2\.(\w+)", r"\1feed_forward.output_dense.\2"),
)
"""fairseq's and Microsoft's names -> transformers'; the rest are the same in both."""


def rename(encoder: Mapping[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Tensors by fairseq's names -> by ours.

    Raises:
        KeyError: the name of a projection that is missing.
    """
    try:
        return huggingface.rename({renamed(name, NAMES): tensor for name, tensor in encoder.items()}, config)
    except KeyError as error:
        raise KeyError(str(error.args[0]).replace(".attention.", ".self_attn.")) from None
