"""DistilHuBERT and DPHuBERT: against s3prl (stored), transformers, torchaudio and a plain reference written here."""

import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchaudio
from safetensors.torch import load_file
from torch import Tensor

from armhubert import ARMHuBERT, ArmhubertError, SpeechEncoder, load_teacher
from armhubert.config import EncoderConfig
from armhubert.convert import folder, huggingface, load_weights
from armhubert.settings import build
from armhubert.student import count_parameters

GOLDEN = Path(__file__).parent / "golden"


def close(ours: Tensor, theirs: Tensor, bound: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= bound * max(1.0, theirs.abs().max().item())


def batch_independent(model: SpeechEncoder, samples: int = 1600, short: int = 1013) -> None:
    """The shorter utterance gives the same features alone and padded."""
    waveforms = torch.randn(2, samples, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both = model(waveforms, torch.tensor([samples, short]))
        alone = model(waveforms[1:, :short])
    frames = int(alone.lengths[0])
    assert frames == int(both.lengths[1])
    for padded, own in zip(both.hidden_states, alone.hidden_states, strict=True):
        close(padded[1:, :frames], own, 1e-5)


def refused(action, *parts: str) -> None:
    with pytest.raises(ArmhubertError) as caught:
        action()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# ---- DistilHuBERT ----------------------------------------------------------


def test_s3prl_distilhubert_gives_its_layer_outputs():
    golden = load_file(GOLDEN / "distilhubert.safetensors")
    model = load_teacher(GOLDEN / "distilhubert.ckpt")
    alone = model(golden["waveforms"][1:, : golden["lengths"][1]])
    for layer in (1, 2):
        close(alone.hidden_states[layer], golden[f"alone.layer{layer}"])
    assert alone.lengths.tolist() == golden["alone.frames"].tolist()


def test_s3prl_lets_padding_into_the_first_norm_and_so_do_we_on_request():
    golden = load_file(GOLDEN / "distilhubert.safetensors")
    weights = load_weights(GOLDEN / "distilhubert.ckpt").with_config(padding="as_trained")
    with torch.no_grad():
        ours = SpeechEncoder.from_weights(weights)(golden["waveforms"], golden["lengths"])
    assert ours.lengths.tolist() == golden["batch.frames"].tolist()
    for layer in (1, 2):
        for utterance, frames in enumerate(ours.lengths.tolist()):
            close(ours.hidden_states[layer][utterance, :frames], golden[f"batch.layer{layer}"][utterance, :frames])


def test_s3prl_distilhubert_does_not_depend_on_the_batch():
    batch_independent(load_teacher(GOLDEN / "distilhubert.ckpt"))


def test_s3prl_prediction_heads_are_ignored_and_said_so():
    weights = load_weights(GOLDEN / "distilhubert.ckpt")
    assert weights.ignored == (
        "output_layer.0.bias",
        "output_layer.0.weight",
        "output_layer.2.bias",
        "output_layer.2.weight",
        "Args",
        "Optimizer",
        "Step",
    )
    assert not weights.config.feature_norm
    assert not weights.config.mask_embedding


@pytest.fixture
def distiller(tmp_path):
    """Writes the golden checkpoint with changed settings, tensors left out or added."""

    def write(settings=(), drop=(), add=()) -> Path:
        golden = load_weights_of_golden()
        section = golden["Config"]["distiller"] | dict(settings)
        tensors = {k: v for k, v in golden["Distiller"].items() if k not in drop} | dict(add)
        path = tmp_path / "changed.ckpt"
        torch.save({"Config": {"distiller": section}, "Distiller": tensors}, path)
        return path

    return write


def load_weights_of_golden() -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / "distilhubert.ckpt", weights_only=True)


def test_distiller_settings_that_change_the_encoder_are_refused(distiller):
    refused(lambda: load_weights(distiller({"task_emb_type": "add"})), "task_emb_type", "'add'")
    refused(lambda: load_weights(distiller({"attention_type": "sparse"})), "attention_type", "'sparse'")
    refused(lambda: load_weights(distiller({"activation_fn": "relu"})), "activation_fn", "'relu'")
    refused(lambda: load_weights(distiller({"encoder_layers": 0})), "layers", "0")
    hostile = {"extractor_conv_feature_layers": "__import__('os').system('true')"}
    refused(lambda: load_weights(distiller(hostile)), "conv_layers", "__import__")


def test_distiller_tensors_that_do_not_fit_are_refused(distiller):
    name = "encoder.layers.1.self_attn.k_proj.weight"
    refused(lambda: load_teacher(distiller(drop=[name])), "lacks", name)
    refused(lambda: load_teacher(distiller({"encoder_layers": 1})), "too many")
    refused(lambda: load_teacher(distiller(add={"encoder.more": torch.ones(1)})), "encoder.more")


def test_a_distiller_checkpoint_without_its_section_is_refused(tmp_path):
    torch.save({"Config": {}, "Distiller": {}}, tmp_path / "x.ckpt")
    refused(lambda: load_weights(tmp_path / "x.ckpt"), "'distiller' section")


# config.json of ntu-spml/distilhubert, without what concerns training
HF_DISTILHUBERT = {
    "model_type": "hubert",
    "conv_bias": False,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "do_stable_layer_norm": False,
    "feat_extract_activation": "gelu",
    "feat_extract_norm": "group",
    "feat_proj_layer_norm": False,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "num_hidden_layers": 2,
}


def test_distilhubert_of_the_hub_is_transformers_hubert(tmp_path):
    import transformers

    narrow = {"conv_dim": [24] * 7, "hidden_size": 48, "intermediate_size": 96, "num_conv_pos_embeddings": 16}
    theirs = transformers.HubertModel(transformers.HubertConfig(**HF_DISTILHUBERT | narrow)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = load_teacher(tmp_path)
    assert isinstance(ours.feature_norm, torch.nn.Identity)
    waveforms = torch.randn(2, 4000)
    with torch.no_grad():
        expected = theirs(waveforms, output_hidden_states=True)
        got = ours(waveforms)
    assert len(got.hidden_states) == 3
    for mine, its in zip(got.hidden_states, expected.hidden_states, strict=True):
        close(mine, its)
    close(got.last_hidden_state, expected.last_hidden_state)
    batch_independent(ours, 4000, 2613)


def test_distilhubert_has_23_49_million_parameters():
    settings = huggingface._settings(Path("distilhubert"), HF_DISTILHUBERT)
    with torch.device("meta"):
        model = SpeechEncoder(build(EncoderConfig, settings | {"mask_embedding": False}, "config.json"))
    assert count_parameters(model).total == 23_491_200  # as s3prl's model without its prediction heads


# ---- DPHuBERT --------------------------------------------------------------

CONV = [(16, 10, 5), (14, 3, 2), (12, 3, 2), (10, 2, 2)]


def dphubert_config(**changes) -> dict:
    """`config` of a pruned HuBERT as DPHuBERT's prune.py writes it, small."""
    layers = 4
    return {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": CONV,
        "extractor_conv_bias": False,
        "encoder_embed_dim": 32,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": layers,
        "encoder_use_attention": [True, False, True, True],
        "encoder_use_feed_forward": [True, True, False, True],
        "encoder_num_heads": [3, 0, 1, 4],
        "encoder_head_dim": 8,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": [40, 24, 0, 7],
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.05,
        "aux_num_out": None,
        "normalize_waveform": False,
        "extractor_prune_conv_channels": False,
        "encoder_prune_attention_heads": False,
        "encoder_prune_attention_layer": False,
        "encoder_prune_feed_forward_intermediate": False,
        "encoder_prune_feed_forward_layer": False,
    } | changes


def wavlm_config(**changes) -> dict:
    config = dphubert_config(
        encoder_total_num_heads=[4] * 4,
        encoder_remaining_heads=[[0, 1, 3], [], [2], [0, 1, 2, 3]],
        encoder_num_buckets=32,
        encoder_max_distance=64,
        **changes,
    )
    del config["encoder_num_heads"], config["encoder_head_dim"]
    return config


def dphubert_state(config: dict) -> dict[str, Tensor]:
    """Random tensors under the names, and of the shapes, that DPHuBERT's modules give them."""
    draw = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=draw) * inputs**-0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=draw)

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=draw)
        state[f"{name}.bias"] = 0.1 * torch.randn(size, generator=draw)

    inputs, width = 1, config["encoder_embed_dim"]
    for i, (channels, kernel, _) in enumerate(config["extractor_conv_layer_config"]):
        name = f"feature_extractor.conv_layers.{i}"
        state[f"{name}.conv.weight"] = torch.randn(channels, inputs, kernel, generator=draw) * (inputs * kernel) ** -0.5
        if config["extractor_conv_bias"]:
            state[f"{name}.conv.bias"] = 0.1 * torch.randn(channels, generator=draw)
        if i == 0 or config["extractor_mode"] == "layer_norm":
            norm(f"{name}.layer_norm", channels)
        inputs = channels
    state["feature_extractor.dummy_weight"] = torch.rand(inputs, generator=draw)
    norm("encoder.feature_projection.layer_norm", inputs)
    linear("encoder.feature_projection.projection", inputs, width)
    kernel, groups = config["encoder_pos_conv_kernel"], config["encoder_pos_conv_groups"]
    position = "encoder.transformer.pos_conv_embed.conv"
    state[f"{position}.bias"] = 0.1 * torch.randn(width, generator=draw)
    state[f"{position}.weight_g"] = 0.5 + torch.rand(1, 1, kernel, generator=draw)
    state[f"{position}.weight_v"] = torch.randn(width, width // groups, kernel, generator=draw)
    norm("encoder.transformer.layer_norm", width)
    wavlm = "encoder_remaining_heads" in config
    for i in range(config["encoder_num_layers"]):
        name = f"encoder.transformer.layers.{i}"
        norm(f"{name}.layer_norm", width)
        norm(f"{name}.final_layer_norm", width)
        if config["encoder_use_attention"][i]:
            heads = len(config["encoder_remaining_heads"][i]) if wavlm else config["encoder_num_heads"][i]
            total = config["encoder_total_num_heads"][i] if wavlm else 0
            head_width = width // total if wavlm else config["encoder_head_dim"]
            for letter in "kvq":
                linear(f"{name}.attention.{letter}_proj", width, heads * head_width)
            linear(f"{name}.attention.out_proj", heads * head_width, width)
            if wavlm:
                linear(f"{name}.attention.gru_rel_pos_linear", head_width, 8)
                state[f"{name}.attention.gru_rel_pos_const"] = 1 + torch.rand(1, total, 1, 1, generator=draw)
                if i == 0:
                    shape = (config["encoder_num_buckets"], total)
                    state[f"{name}.attention.rel_attn_embed.weight"] = torch.randn(shape, generator=draw)
        if config["encoder_use_feed_forward"][i]:
            linear(f"{name}.feed_forward.intermediate_dense", width, config["encoder_ff_interm_features"][i])
            linear(f"{name}.feed_forward.output_dense", config["encoder_ff_interm_features"][i], width)
    return state


def reference(config: dict, state: dict[str, Tensor], wave: Tensor) -> list[Tensor]:
    """Hidden states [1, T, D] of one unpadded utterance [1, S], straight from the published architecture."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    first = config["encoder_layer_norm_first"]
    x = (F.layer_norm(wave, wave.shape[-1:]) if config["normalize_waveform"] else wave)[:, None]
    for i, (_, _, stride) in enumerate(config["extractor_conv_layer_config"]):
        name = f"feature_extractor.conv_layers.{i}"
        x = F.conv1d(x, state[f"{name}.conv.weight"], state.get(f"{name}.conv.bias"), stride)
        if config["extractor_mode"] == "layer_norm":
            x = norm(x.mT, f"{name}.layer_norm").mT
        elif i == 0:
            affine = state[f"{name}.layer_norm.weight"], state[f"{name}.layer_norm.bias"]
            x = F.group_norm(x, x.shape[1], *affine)
        x = F.gelu(x)
    x = x.mT * state["feature_extractor.dummy_weight"]
    x = linear(norm(x, "encoder.feature_projection.layer_norm"), "encoder.feature_projection.projection")

    name = "encoder.transformer.pos_conv_embed.conv"
    v = state[f"{name}.weight_v"]
    kernel = state[f"{name}.weight_g"] * v / v.norm(dim=(0, 1), keepdim=True)
    padding, groups = config["encoder_pos_conv_kernel"] // 2, config["encoder_pos_conv_groups"]
    position = F.conv1d(x.mT, kernel, state[f"{name}.bias"], padding=padding, groups=groups)[..., : x.shape[1]]
    x = x + F.gelu(position).mT
    if not first:
        x = norm(x, "encoder.transformer.layer_norm")

    hidden, bias = [x], None
    for i in range(config["encoder_num_layers"]):
        name = f"encoder.transformer.layers.{i}"
        if config["encoder_use_attention"][i]:
            y = norm(x, f"{name}.layer_norm") if first else x
            if i == 0 and "encoder_remaining_heads" in config:
                bias = position_bias(config, state, y.shape[1])
            x = x + attention(config, state, i, y, bias, linear)
        if not first:
            x = norm(x, f"{name}.layer_norm")
        if config["encoder_use_feed_forward"][i]:
            y = norm(x, f"{name}.final_layer_norm") if first else x
            y = F.gelu(linear(y, f"{name}.feed_forward.intermediate_dense"))
            x = x + linear(y, f"{name}.feed_forward.output_dense")
        if not first:
            x = norm(x, f"{name}.final_layer_norm")
        hidden.append(x)
    return hidden


def attention(config: dict, state: dict[str, Tensor], layer: int, x: Tensor, bias: Tensor | None, linear) -> Tensor:
    """One head at a time: [1, T, D] -> [1, T, D]."""
    name = f"encoder.transformer.layers.{layer}.attention"
    wavlm = "encoder_remaining_heads" in config
    kept = config["encoder_remaining_heads"][layer] if wavlm else range(config["encoder_num_heads"][layer])
    q, k, v = (linear(x, f"{name}.{letter}_proj") for letter in "qkv")
    d = q.shape[-1] // len(kept)
    outputs = []
    for slot, head in enumerate(kept):
        own = slice(slot * d, (slot + 1) * d)
        logits = q[..., own] @ k[..., own].mT / math.sqrt(d)
        if bias is not None:
            gates = linear(x[..., head * d : (head + 1) * d], f"{name}.gru_rel_pos_linear")  # [1, T, 8]
            a, b = torch.sigmoid(gates[..., :4].sum(-1)), torch.sigmoid(gates[..., 4:].sum(-1))
            constant = state[f"{name}.gru_rel_pos_const"].flatten()[head]
            logits = logits + (a * (b * constant - 1) + 2)[..., None] * bias[..., head]
        outputs.append(logits.softmax(-1) @ v[..., own])
    return linear(torch.cat(outputs, -1), f"{name}.out_proj")


def position_bias(config: dict, state: dict[str, Tensor], frames: int) -> Tensor:
    """[T, T, heads], the bucket of each distance worked out in Python numbers."""
    half = config["encoder_num_buckets"] // 2
    exact = half // 2

    def bucket(distance: int) -> int:
        number, far = half * (distance > 0), abs(distance)
        if far < exact:
            return number + far
        share = math.log(far / exact) / math.log(config["encoder_max_distance"] / exact)
        return number + min(half - 1, exact + int(share * (half - exact)))

    index = torch.tensor([[bucket(j - i) for j in range(frames)] for i in range(frames)])
    return state["encoder.transformer.layers.0.attention.rel_attn_embed.weight"][index]


def save(path: Path, config: dict, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": state, "config": config, "distill_linear_projs": {"0.weight": torch.ones(2, 2)}}, path)
    return path


LAYER_NORM = {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}
PRUNED = {
    "hubert": dphubert_config(),
    "hubert pre-norm": dphubert_config(**LAYER_NORM),
    "hubert normalised": dphubert_config(normalize_waveform=True),
    "wavlm": wavlm_config(),
    "wavlm pre-norm": wavlm_config(**LAYER_NORM),
    "wavlm without its first attention": wavlm_config() | {
        "encoder_use_attention": [False, True, True, True],
        "encoder_remaining_heads": [[], [0, 2], [1], [0, 1, 2, 3]],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PRUNED)
def test_pruned_dphubert_is_the_published_architecture(kind, tmp_path):
    config = PRUNED[kind]
    state = dphubert_state(config)
    model = load_teacher(save(tmp_path / "pruned.pth", config, state))
    wave = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(wave), reference(config, state, wave)
    assert len(ours.hidden_states) == len(theirs) == 5
    for mine, its in zip(ours.hidden_states, theirs, strict=True):
        close(mine, its)
    batch_independent(model)


def test_pruned_blocks_are_gone(tmp_path):
    config = PRUNED["hubert"]
    weights = load_weights(save(tmp_path / "pruned.pth", config, dphubert_state(config)))
    model = SpeechEncoder.from_weights(weights)
    assert [layer.attention is None for layer in model.layers] == [False, True, False, False]
    assert [layer.up is None for layer in model.layers] == [False, False, True, False]
    assert weights.config.layer_heads == ((0, 1, 2), (), (0,), (0, 1, 2, 3))
    assert weights.config.layer_ffn == (40, 24, 0, 7)
    # every number of the file, the running scale of the channels included, and nothing more
    assert count_parameters(model).total == sum(t.numel() for t in weights.state.values())
    assert sum(t.numel() for t in weights.state.values()) == sum(t.numel() for t in dphubert_state(config).values())


def test_the_card_of_a_pruned_model_tells_what_is_left(tmp_path):
    folder.convert(save(tmp_path / "pruned.pth", PRUNED["hubert"], dphubert_state(PRUNED["hubert"])), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "# pruned.pth, converted" in card
    assert "0 to 4 of 4 heads, FFN 0 to 40" in card
    assert "license: other" in card
    assert "The weights are the source's, under its licence" in card
    assert "distillation" not in card


def test_what_is_no_part_of_the_encoder_is_ignored_and_said_so(tmp_path):
    path = save(tmp_path / "pruned.pth", PRUNED["hubert"], dphubert_state(PRUNED["hubert"]))
    assert load_weights(path).ignored == ("distill_linear_projs",)
    biasless = "wavlm without its first attention"
    ignored = load_weights(save(path, PRUNED[biasless], dphubert_state(PRUNED[biasless]))).ignored
    assert len(ignored) == 1 + 3 * 3
    assert sum("gru_rel_pos" in name for name in ignored) == 9


def unpruned(model: torch.nn.Module, width: int, heads: int, wavlm: bool) -> tuple[dict, dict[str, Tensor]]:
    """A torchaudio model in DPHuBERT's format, as its convert scripts write it."""
    layers = len(model.encoder.transformer.layers)
    config = dphubert_config(
        encoder_num_layers=layers,
        encoder_use_attention=[True] * layers,
        encoder_use_feed_forward=[True] * layers,
        encoder_num_heads=[heads] * layers,
        encoder_head_dim=width // heads,
        encoder_ff_interm_features=[40] * layers,
    )
    if wavlm:
        del config["encoder_num_heads"], config["encoder_head_dim"]
        config["encoder_total_num_heads"] = [heads] * layers
        config["encoder_remaining_heads"] = [list(range(heads))] * layers
        config |= {"encoder_num_buckets": 32, "encoder_max_distance": 64}
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        )
        name = name.replace(".attention.attention.", ".attention.")
        if name.endswith(("in_proj_weight", "in_proj_bias")):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            state[name] = tensor
    return config, state


@pytest.mark.parametrize("wavlm", [False, True])
def test_unpruned_dphubert_is_torchaudios_model(wavlm, tmp_path):
    settings = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": CONV,
        "extractor_conv_bias": False,
        "encoder_embed_dim": 32,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 3,
        "encoder_num_heads": 4,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": 40,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
    }
    if wavlm:
        build_model = torchaudio.models.wavlm_model
        settings |= {"encoder_num_buckets": 32, "encoder_max_distance": 64}
    else:
        build_model = torchaudio.models.wav2vec2_model
    theirs = build_model(**settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config, state = unpruned(theirs, 32, 4, wavlm)
    state["feature_extractor.dummy_weight"] = torch.ones(CONV[-1][0])
    weights = load_weights(save(tmp_path / "unpruned.pth", config, state))
    assert weights.config.as_dict().keys().isdisjoint({"layer_heads", "layer_ffn", "feature_scale"})
    assert "feature_extractor.dummy_weight" in weights.ignored
    waveforms = torch.randn(2, 1600)
    with torch.no_grad():
        expected, _ = theirs.extract_features(waveforms)
        ours = SpeechEncoder.from_weights(weights)(waveforms)
    for mine, its in zip(ours.hidden_states[1:], expected, strict=True):
        close(mine, its)


def test_a_pruned_model_is_saved_and_read_again_and_loads_as_a_student(tmp_path):
    path = save(tmp_path / "pruned.pth", PRUNED["wavlm"], dphubert_state(PRUNED["wavlm"]))
    model = ARMHuBERT.from_pretrained(path)
    model.save_pretrained(tmp_path / "ours")
    again = ARMHuBERT.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    wave = torch.randn(1, 1600)
    with torch.no_grad():
        assert torch.equal(again(wave).last_hidden_state, model(wave).last_hidden_state)


def test_a_pruned_model_trains(tmp_path):
    path = save(tmp_path / "pruned.pth", PRUNED["wavlm"], dphubert_state(PRUNED["wavlm"]))
    model = ARMHuBERT.from_pretrained(path).train()
    model(torch.randn(2, 1600), torch.tensor([1600, 1200])).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_dphubert_files_that_contradict_themselves_are_refused(tmp_path):
    def load(kind: str = "hubert", drop: tuple[str, ...] = (), add: dict | None = None, **changes) -> None:
        state = {k: v for k, v in dphubert_state(PRUNED[kind]).items() if k not in drop} | (add or {})
        load_teacher(save(tmp_path / "x.pth", PRUNED[kind] | changes, state))

    name = "encoder.transformer.layers.0.attention.q_proj.weight"
    refused(lambda: load(drop=(name,)), "lacks", "q_proj")
    mask = "encoder.transformer.layers.0.attention.hard_concrete_for_heads.log_alpha"
    refused(lambda: load(add={mask: torch.ones(3)}), "not pruned yet")
    refused(lambda: load(encoder_num_heads=[3, 0, 1]), "one entry a layer")
    refused(lambda: load(encoder_num_heads=[3, 0, 1, 10**12]), "0..4")
    refused(lambda: load(encoder_num_heads=[2, 0, 1, 4]), "shape")
    refused(lambda: load(encoder_head_dim=0), "encoder_head_dim")
    refused(lambda: load(encoder_num_layers=5), "encoder_use_attention", "5 layers, got 4")
    refused(lambda: load(encoder_num_layers=10**9), "encoder_num_layers", "at most")
    refused(lambda: load(encoder_embed_dim=8 * 10**12, encoder_num_heads=[10**12] * 4), "0..1000")
    refused(lambda: load(extractor_conv_layer_config=[]), "conv_layers")
    refused(lambda: load(add={"feature_extractor.dummy_weight": torch.ones(3)}), "feature_scale", "shape")
    refused(lambda: load(encoder_ff_interm_features=[40, 24, 0]), "one entry a layer")
    refused(lambda: load(encoder_ff_interm_features=[40, 24, 0, -7]), "layer_ffn")
    refused(lambda: load(encoder_use_attention="all"), "encoder_use_attention", "list")
    refused(lambda: load(extractor_mode="batch_norm"), "extractor_mode")
    refused(lambda: load("wavlm", encoder_remaining_heads=[[0, 1, 4], [], [2], [0, 1, 2, 3]]), "layer_heads")
    refused(lambda: load("wavlm", encoder_remaining_heads=[[0, 3, 1], [], [2], [0, 1, 2, 3]]), "ascending")
    refused(lambda: load("wavlm", encoder_total_num_heads=[4, 4, 2, 4]), "encoder_total_num_heads")
    constant = "encoder.transformer.layers.2.attention.gru_rel_pos_const"
    refused(lambda: load("wavlm", add={constant: torch.ones(3)}), "gru_rel_pos_const of layer 2")


# ---- the settings of pruned encoders ---------------------------------------

PLAIN = {"conv_layers": CONV, "width": 32, "layers": 2, "heads": 4, "ffn": 16, "feature_projection": True}


def test_plain_models_keep_their_settings_file():
    config = build(EncoderConfig, PLAIN, "x")
    assert not {"layer_heads", "layer_ffn", "feature_scale"} & config.as_dict().keys()
    pruned = build(EncoderConfig, PLAIN | {"layer_heads": [[0], []], "layer_ffn": [16, 0], "feature_scale": True}, "x")
    assert build(EncoderConfig, pruned.as_dict(), "x") == pruned
    assert [pruned.kept_heads(1), config.kept_heads(1)] == [(), (0, 1, 2, 3)]
    assert [pruned.ffn_width(1), config.ffn_width(1)] == [0, 16]
    assert config.sizes == "width 32, 4 heads, FFN 16"
    assert pruned.sizes == "width 32, 0 to 1 of 4 heads, FFN 0 to 16"
    even = build(EncoderConfig, PLAIN | {"layer_heads": [[0], [3]], "layer_ffn": [8, 8]}, "x")
    assert even.sizes == "width 32, 1 of 4 heads, FFN 8"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_heads": [[0]]}, "layer_heads must have one entry a layer"),
        ({"layer_ffn": [1, 2, 3]}, "layer_ffn must have one entry a layer"),
        ({"layer_heads": [[0], [1, 1]]}, "ascending"),
        ({"layer_heads": [[0], [-1, 2]]}, "heads 0..3"),
        ({"layer_heads": [[0], [0, 4]]}, "heads 0..3"),
        ({"layer_ffn": [17, 1]}, "layer_ffn must lie in 0..16"),
        ({"layer_heads": [[0], [0]], "pattern": "CR"}, "reused maps have all heads"),
        ({"layer_heads": [0, 1]}, "must be a list"),
    ],
)
def test_settings_of_pruned_layers_are_checked(change, words):
    refused(lambda: build(EncoderConfig, PLAIN | change, "x"), words)
