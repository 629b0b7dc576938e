"""Speech, models and checkpoint files that several test modules make."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import torchaudio

GOLDEN = Path(__file__).parent / "golden" / "released"
STACK = [(8, 10, 5)] + [(8, 3, 2)] * 4 + [(32, 2, 2)] * 2
SECONDS = (1.3, 0.6, 1.1, 0.9, 0.75, 1.0)
SHAPE = {
    "width": 32,
    "layers": 2,
    "heads": 2,
    "ffn": 32,
    "conv_layers": str(STACK),
}
"""A tiny student, as fields of DistillConfig."""
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 24),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
"""A small HuBERT, wav2vec 2.0 or WavLM, as fields of transformers' configurations."""
LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}


# runs


def two_processes(*command: str) -> subprocess.CompletedProcess[str]:
    """What torchrun starts, with arguments; at most four minutes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def write_speech(folder: Path, seconds: tuple[float, ...] = SECONDS) -> Path:
    """Modulated noise, one file a length."""
    folder.mkdir(parents=True)
    for number, length in enumerate(seconds):
        rng = np.random.default_rng(number)
        time = np.arange(round(length * 16_000)) / 16_000
        wave = 0.1 * rng.standard_normal(len(time)) * (1 + np.sin(2 * np.pi * (3 + number) * time))
        soundfile.write(folder / f"{number}.wav", wave, 16_000)
    return folder


def write_teacher(folder: Path, layers: int = 2, seed: int = 0) -> Path:
    """A random HuBERT in Hugging Face's layout."""
    width = 32
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def weight(name: str, *shape: int) -> None:
        fan = max(1, int(np.prod(shape[1:])))
        state[name] = torch.randn(*shape, generator=generator) * fan**-0.5

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(size, generator=generator)

    def linear(name: str, out: int, into: int) -> None:
        weight(f"{name}.weight", out, into)
        state[f"{name}.bias"] = 0.1 * torch.randn(out, generator=generator)

    before = 1
    for number, (channels, kernel, _) in enumerate(STACK):
        weight(f"feature_extractor.conv_layers.{number}.conv.weight", channels, before, kernel)
        before = channels
    norm("feature_extractor.conv_layers.0.layer_norm", STACK[0][0])
    norm("feature_projection.layer_norm", before)
    linear("feature_projection.projection", width, before)
    state["masked_spec_embed"] = torch.rand(width, generator=generator)
    weight("encoder.pos_conv_embed.conv.parametrizations.weight.original1", width, width // 4, 16)
    state["encoder.pos_conv_embed.conv.parametrizations.weight.original0"] = torch.ones(1, 1, 16)
    state["encoder.pos_conv_embed.conv.bias"] = torch.zeros(width)
    norm("encoder.layer_norm", width)
    for layer in range(layers):
        prefix = f"encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{prefix}attention.{name}", width, width)
        linear(f"{prefix}feed_forward.intermediate_dense", 48, width)
        linear(f"{prefix}feed_forward.output_dense", width, 48)
        norm(f"{prefix}layer_norm", width)
        norm(f"{prefix}final_layer_norm", width)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "hubert",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": [c for c, _, _ in STACK],
        "conv_kernel": [k for _, k, _ in STACK],
        "conv_stride": [s for _, _, s in STACK],
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digests(folder: Path) -> dict[str, str]:
    """What is in a folder, byte for byte."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# small models of other libraries


def transformers_model(kind: str, **settings) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **settings)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def torchaudio_model(kind: str, aux: int | None = 5) -> torch.nn.Module:
    torch.manual_seed(0)
    stack = [(16, 10, 5), (16, 3, 2), (24, 2, 2)]
    rest = {
        "encoder_projection_dropout": 0.0,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_drop": 0.0,
    }
    shape = {
        "extractor_conv_layer_config": stack,
        "encoder_embed_dim": 48,
        "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 3,
        "encoder_num_heads": 4,
    }
    if kind == "wavlm":
        model = torchaudio.models.wavlm_model(
            extractor_mode="group_norm", extractor_conv_bias=False, encoder_ff_interm_features=64,
            encoder_layer_norm_first=False, encoder_num_buckets=16, encoder_max_distance=40, aux_num_out=None,
            **shape, **rest,
        )  # fmt: skip
    else:
        model = torchaudio.models.wav2vec2_model(
            extractor_mode="layer_norm" if kind == "large" else "group_norm", extractor_conv_bias=kind == "large",
            encoder_ff_interm_features=64, encoder_layer_norm_first=kind == "large", aux_num_out=aux, **shape, **rest,
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


# fairseq's names


def fairseq_name(name: str) -> str:
    """transformers' name of a parameter -> fairseq's, as transformers' conversion scripts pair them."""
    if name == "masked_spec_embed":
        return "mask_emb"
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    name = name.replace("feature_projection.projection", "post_extract_proj")
    name = name.replace("feature_projection.layer_norm", "layer_norm")
    name = name.replace("pos_conv_embed.conv.", "pos_conv.0.")
    name = name.replace("feed_forward.intermediate_dense", "fc1").replace("feed_forward.output_dense", "fc2")
    name = re.sub(r"(encoder\.layers\.\d+)\.layer_norm", r"\1.self_attn_layer_norm", name)
    name = name.replace("attention.gru_rel_pos_const", "self_attn.grep_a")
    name = name.replace("attention.rel_attn_embed", "self_attn.relative_attention_bias")
    name = name.replace("attention.gru_rel_pos_linear", "self_attn.grep_linear")
    name = re.sub(r"\.attention\.", ".self_attn.", name)
    return re.sub(r"(conv_layers\.\d+)\.conv\.", r"\1.0.", name)


def fairseq_state(model: torch.nn.Module, *, layer_norm: bool) -> dict[str, torch.Tensor]:
    """The parameters by fairseq's names; a layer norm sits one level deeper there than a group norm."""
    norm = r"\1.2.1." if layer_norm else r"\1.2."
    return {
        re.sub(r"(conv_layers\.\d+)\.layer_norm\.", norm, fairseq_name(name)): value.detach().clone()
        for name, value in model.state_dict().items()
    }


def model_settings(*, large: bool, **changes) -> dict:
    return {
        "extractor_mode": "layer_norm" if large else "default",
        "encoder_layers": 3,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 64,
        "encoder_attention_heads": 4,
        "activation_fn": "gelu",
        "layer_norm_first": large,
        "conv_feature_layers": "[(16, 10, 5)] + [(16, 3, 2)] + [(24,2,2)]",
        "conv_bias": large,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "dropout": 0.1,
        "activation_dropout": 0.05,
        "dropout_input": 0.2,
    } | changes
