"""Checkpoint files of fairseq, s3prl, Microsoft and torchaudio, built as those projects write them."""

import argparse
import enum
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchaudio
from made import GOLDEN, LARGE, fairseq_state, model_settings, one_line, torchaudio_model, transformers_model
from safetensors.torch import load_file

from armhubert import ARMHuBERT, ArmhubertError, SpeechEncoder, load_teacher
from armhubert.convert import load_weights
from armhubert.convert.pickles import StandIn, fields, read_pickle, scalar

# ---- fairseq's objects -----------------------------------------------------


@pytest.fixture
def fairseq(monkeypatch) -> types.SimpleNamespace:
    """Classes of fairseq and omegaconf that exist while a file is written and not when it is read."""

    def module(name: str, **classes: type) -> None:
        made = types.ModuleType(name)
        for label, cls in classes.items():
            cls.__module__, cls.__qualname__ = name, label
            setattr(made, label, cls)
        monkeypatch.setitem(sys.modules, name, made)

    class Dictionary:
        def __init__(self) -> None:
            self.symbols, self.count = ["<s>", "<pad>", "</s>", "<unk>", "E", "T"], [1] * 6
            self.indices = {symbol: i for i, symbol in enumerate(self.symbols)}

    class AverageMeter:
        def __init__(self) -> None:
            self.__setstate__({"val": 3, "sum": 7.5})

        def __setstate__(self, state: dict) -> None:
            self.__dict__.update(state)

    class Metadata:
        def __init__(self) -> None:
            self.ref_type, self.optional, self.key = dict, True, None

    class AnyNode:
        def __init__(self, value: object, parent: object) -> None:
            self._metadata, self._parent, self._val = Metadata(), parent, value

    class DictConfig:
        def __init__(self, content: dict, parent: object = None) -> None:
            self._metadata, self._parent = Metadata(), parent
            self._content = {
                k: DictConfig(v, self) if isinstance(v, dict) else AnyNode(v, self) for k, v in content.items()
            }

        def __getstate__(self) -> dict:
            return dict(self.__dict__)

    class Mode(enum.Enum):
        default = "default"
        layer_norm = "layer_norm"

    for package in ("fairseq", "fairseq.data", "fairseq.logging", "fairseq.dataclass", "omegaconf"):
        module(package)
    module("fairseq.data.dictionary", Dictionary=Dictionary)
    module("fairseq.logging.meters", AverageMeter=AverageMeter)
    module("fairseq.dataclass.constants", Mode=Mode)
    module("omegaconf.dictconfig", DictConfig=DictConfig)
    module("omegaconf.base", Metadata=Metadata)
    module("omegaconf.nodes", AnyNode=AnyNode)

    def forget() -> None:
        for name in [n for n in sys.modules if n.split(".")[0] in ("fairseq", "omegaconf")]:
            monkeypatch.delitem(sys.modules, name)

    return types.SimpleNamespace(
        Dictionary=Dictionary, AverageMeter=AverageMeter, DictConfig=DictConfig, Mode=Mode, forget=forget
    )


def extras(fairseq) -> dict:
    """What else a fairseq checkpoint holds."""
    return {
        "criterion": OrderedDict(),
        "optimizer_history": [{"criterion_name": "HubertCriterion", "num_updates": 400000}],
        "task_state": {"dictionaries": [fairseq.Dictionary()]},
        "extra_state": {"train_iterator": {"epoch": 7}, "val_loss": 1.5, "meter": fairseq.AverageMeter()},
        "last_optimizer_state": None,
    }


def same_hidden_states(ours: SpeechEncoder, theirs: torch.nn.Module) -> None:
    """All of them to 1e-4; alone, masked, and padded as transformers pads (right only without a group norm)."""
    x = torch.randn(2, 3000)
    mask = torch.zeros(2, ours.config.frames(3000), dtype=torch.bool)
    mask[0, 10:40] = True
    with torch.no_grad():
        for frames in (None, mask) if ours.mask_embedding is not None else (None,):
            want = theirs(x, mask_time_indices=frames, output_hidden_states=True).hidden_states
            got = ours(x, mask=frames).hidden_states
            assert len(want) == len(got) == ours.config.layers + 1
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        lengths = torch.tensor([3000, 1700])
        x = torch.where(torch.arange(3000) < lengths[:, None], x, 0)
        attention = (torch.arange(3000) < lengths[:, None]).long()
        want = theirs(x, attention_mask=attention, output_hidden_states=True).hidden_states
        got = ours(x, lengths)
        for a, b in zip(got.hidden_states, want, strict=True):
            for i, valid in enumerate(got.lengths):
                torch.testing.assert_close(a[i, :valid], b[i, :valid], atol=1e-4, rtol=0)


def encoder(path: Path, **changes) -> SpeechEncoder:
    return SpeechEncoder.from_weights(load_weights(path).with_config(normalize_input=False, **changes))


# ---- fairseq ---------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_the_names_are_those_that_torchaudio_imports(large):
    from torchaudio.models.wav2vec2.utils.import_fairseq import _map_key

    theirs = transformers_model("Hubert", **(LARGE if large else {}))
    wanted = {n for n in theirs.state_dict() if n != "masked_spec_embed"}
    got = set()
    for name in fairseq_state(theirs, layer_norm=large):
        if (imported := _map_key(name)) is not None:
            imported = imported.replace("encoder.feature_projection.", "feature_projection.")
            imported = imported.replace("encoder.transformer.", "encoder.")
            imported = imported.replace("conv.weight_g", "conv.parametrizations.weight.original0")
            got.add(imported.replace("conv.weight_v", "conv.parametrizations.weight.original1"))
    assert got == wanted


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
@pytest.mark.parametrize("kind", ["Hubert", "Wav2Vec2"])
@pytest.mark.parametrize(("style", "legacy"), [("cfg", False), ("plain cfg", False), ("args", True)])
def test_fairseq_checkpoints_give_every_hidden_state(kind, large, style, legacy, fairseq, tmp_path):
    theirs = transformers_model(kind, **(LARGE if large else {}))
    head = {"final_proj.weight": torch.zeros(8, 48), "label_embs_concat": torch.zeros(5, 8)}
    if kind == "Wav2Vec2":
        head = {"quantizer.vars": torch.zeros(1, 4, 8), "project_q.weight": torch.zeros(8, 8)}
    content = extras(fairseq) | {"model": OrderedDict(fairseq_state(theirs, layer_norm=large) | head)}
    settings = model_settings(large=large)
    task = {"_name": "hubert_pretraining", "normalize": large, "sample_rate": 16000}
    if style == "args":
        content["args"] = argparse.Namespace(arch="hubert_base", **settings, **task)
    else:
        mode = fairseq.Mode(settings["extractor_mode"])
        cfg = {"model": settings | {"_name": "hubert", "extractor_mode": mode}, "task": task, "common": {"seed": 1}}
        content |= {"args": None, "cfg": fairseq.DictConfig(cfg) if style == "cfg" else cfg}
    path = tmp_path / "model.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    fairseq.forget()
    weights = load_weights(path)
    config = weights.config
    assert config.normalize_input == large
    assert (config.dropout, config.activation_dropout, config.input_dropout) == (0.1, 0.05, 0.2)
    assert config.attention_dropout == 0.1  # fairseq's default
    assert set(head) | {"criterion", "task_state", "extra_state"} <= set(weights.ignored)
    assert weights.inferred == ()
    same_hidden_states(encoder(path, padding="independent" if large else "as_trained"), theirs)


@pytest.mark.parametrize("inner", ["namespace", "cfg", "absent"])
def test_the_encoder_of_a_fine_tuned_model_is_found(inner, fairseq, tmp_path):
    theirs = transformers_model("Wav2Vec2", **LARGE)
    state = {f"w2v_encoder.w2v_model.{k}": v for k, v in fairseq_state(theirs, layer_norm=True).items()}
    state |= {"w2v_encoder.proj.weight": torch.zeros(32, 48), "w2v_encoder.proj.bias": torch.zeros(32)}
    settings, task = model_settings(large=True), {"normalize": True}
    outer = {"_name": "wav2vec_ctc", "w2v_path": "/checkpoint/somewhere.pt", "apply_mask": True}
    path = tmp_path / "ctc.pt"
    if inner == "namespace":
        args = argparse.Namespace(arch="wav2vec_ctc", w2v_args=argparse.Namespace(**settings, **task), normalize=True)
        torch.save(extras(fairseq) | {"args": args, "model": state}, path)
    else:
        w2v_args = {"model": settings, "task": task} if inner == "cfg" else None
        cfg = fairseq.DictConfig({"model": outer | {"w2v_args": w2v_args}, "task": {"normalize": True}})
        torch.save(extras(fairseq) | {"args": None, "cfg": cfg, "model": state}, path)
    fairseq.forget()
    if inner == "absent":
        with pytest.raises(ArmhubertError, match=r"does not tell its conv_layers and heads.*ctc\.yaml") as caught:
            load_weights(path)
        one_line(caught)
        path.with_suffix(".yaml").write_text("heads: 4\nconv_layers: [[16, 10, 5], [16, 3, 2], [24, 2, 2]]\n")
    weights = load_weights(path)
    assert weights.config.normalize_input
    assert {"w2v_encoder.proj.weight", "w2v_encoder.proj.bias"} <= set(weights.ignored)
    assert weights.inferred == (("norm_first=True",) if inner == "absent" else ())
    same_hidden_states(encoder(path), theirs)


def test_what_s3prl_converts_is_read(tmp_path):
    theirs = transformers_model("Hubert")
    content = {
        "task_cfg": {"_name": "hubert_pretraining", "normalize": False},
        "model_cfg": model_settings(large=False, _name="hubert"),
        "model_weight": fairseq_state(theirs, layer_norm=False) | {"label_embs_concat": torch.zeros(5, 8)},
        "dictionaries_symbols": [["<s>", "</s>"]],
    }
    torch.save(content, tmp_path / "s3prl.pt")
    assert load_weights(tmp_path / "s3prl.pt").ignored == ("label_embs_concat", "dictionaries_symbols")
    same_hidden_states(encoder(tmp_path / "s3prl.pt", padding="as_trained"), theirs)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"_name": "data2vec_audio"}, "data2vec"),
        ({"layer_type": "conformer"}, "layer_type must be 'transformer'"),
        ({"activation_fn": "relu"}, "activation_fn must be 'gelu'"),
        ({"quantize_input": True}, "quantize_input must be False"),
        ({"conv_feature_layers": "__import__('os').mkdir('executed')"}, "must read like"),
        ({"extractor_mode": "batch"}, "extractor_mode must be"),
        ({"encoder_attention_heads": 5}, "divisible by heads"),
        ({"encoder_layers": 4}, r"lacks encoder\.layers\.3\.self_attn"),
        ({"encoder_ffn_embed_dim": 72}, "must have shape"),
        ({"encoder_embed_dim": [1]}, "must be a whole number"),
    ],
)
def test_other_fairseq_models_and_damaged_settings_are_one_line(changes, rule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = fairseq_state(transformers_model("Hubert"), layer_norm=False)
    cfg = {"model": model_settings(large=False, _name="hubert") | changes, "task": {"normalize": False}}
    torch.save({"cfg": cfg, "model": state}, "model.pt")
    with pytest.raises(ArmhubertError, match=rule) as caught:
        load_teacher("model.pt")
    one_line(caught)
    assert not Path("executed").exists()


def test_a_fairseq_tensor_that_is_missing_left_over_or_of_another_shape_is_one_line(tmp_path):
    state = fairseq_state(transformers_model("Hubert"), layer_norm=False)
    cfg = {"model": model_settings(large=False), "task": {"normalize": False}}

    def refused(changed: dict, rule: str) -> None:
        torch.save({"cfg": cfg, "model": changed}, tmp_path / "model.pt")
        with pytest.raises(ArmhubertError, match=rule) as caught:
            load_teacher(tmp_path / "model.pt")
        one_line(caught)

    for name in ("encoder.layers.1.fc1.weight", "layer_norm.bias", "encoder.layers.2.self_attn.v_proj.bias"):
        refused({k: v for k, v in state.items() if k != name}, "lacks")
        refused(state | {name: torch.zeros(3)}, "shape")
    refused({k: v for k, v in state.items() if "conv_layers.0" not in k}, "is no fairseq")
    refused(state | {"encoder.layers.0.adapter.weight": torch.zeros(3)}, "too many")
    refused(state | {"encoder.extra": "text"}, "names to tensors, got 'text'")
    refused({}, "is no fairseq")


# ---- Microsoft -------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_microsoft_wavlm_gives_every_hidden_state(large, tmp_path):
    theirs = transformers_model("WavLM", num_buckets=32, max_bucket_distance=60, **(LARGE if large else {}))
    state = fairseq_state(theirs, layer_norm=large)
    assert state["encoder.layers.1.self_attn.grep_a"].shape == (1, 4, 1, 1)
    assert {"encoder.layers.0.self_attn.relative_attention_bias.weight"} == {n for n in state if "relative" in n}
    cfg = model_settings(large=large, normalize=large, encoder_layerdrop=0.05) | {
        "relative_position_embedding": True,
        "num_buckets": 32,
        "max_distance": 60,
        "gru_rel_pos": True,
    }
    torch.save({"cfg": cfg, "model": state}, tmp_path / "WavLM.pt")
    weights = load_weights(tmp_path / "WavLM.pt")
    assert weights.config.normalize_input == large
    assert weights.ignored == ()
    same_hidden_states(encoder(tmp_path / "WavLM.pt", padding="independent" if large else "as_trained"), theirs)
    torch.save({"cfg": cfg | {"gru_rel_pos": False}, "model": state}, tmp_path / "WavLM.pt")
    with pytest.raises(ArmhubertError, match="gru_rel_pos must be true") as caught:
        load_weights(tmp_path / "WavLM.pt")
    one_line(caught)


# ---- torchaudio ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["base", "large", "wavlm"])
@pytest.mark.parametrize("form", ["bare", "lightning", "safetensors"])
def test_torchaudio_state_dicts_need_what_shapes_do_not_tell(kind, form, tmp_path):
    theirs = torchaudio_model(kind)
    path = tmp_path / ("m.safetensors" if form == "safetensors" else "m.pt")
    state = theirs.state_dict()
    if form == "bare":
        torch.save(state, path)
    elif form == "lightning":
        torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3}, path)
    else:
        import safetensors.torch

        safetensors.torch.save_file(state, path)
    with pytest.raises(ArmhubertError, match=r"does not tell its conv_layers.*m\.yaml beside") as caught:
        load_weights(path)
    one_line(caught)
    more = "position_max_distance: 40\n" if kind == "wavlm" else "heads: 4\n"
    (tmp_path / "m.yaml").write_text("conv_layers: [[16, 10, 5], [16, 3, 2], [24, 2, 2]]\n" + more)
    weights = load_weights(path)
    assert f"norm_first={kind == 'large'}" in weights.inferred
    assert any("aux." in name for name in weights.ignored) == (kind != "wavlm")
    ours, x = encoder(path), torch.randn(2, 3000)
    with torch.no_grad():
        want, _ = theirs.extract_features(x)
        for a, b in zip(ours(x).hidden_states[1:], want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        if kind == "large":  # torchaudio pads right only without a group norm
            lengths = torch.tensor([3000, 1700])
            want, valid = theirs.extract_features(x, lengths)
            got = ours(x, lengths)
            assert got.lengths.tolist() == valid.tolist()
            for a, b in zip(got.hidden_states[1:], want, strict=True):
                torch.testing.assert_close(a[1, : valid[1]], b[1, : valid[1]], atol=1e-4, rtol=0)
    (tmp_path / "m.yaml").write_text("conv_layers: [[16, 10, 5], [16, 3, 2], [24, 2, 2]]\nhead: 4\n")
    with pytest.raises(ArmhubertError, match=r"unknown key 'head' in \S+m\.yaml"):
        load_weights(path)


def test_published_sizes_are_told_by_their_shapes(tmp_path):
    theirs = torchaudio.models.hubert_base().eval()
    torch.save(theirs.state_dict(), tmp_path / "hubert.pt")
    weights = load_weights(tmp_path / "hubert.pt")
    assert weights.inferred == (
        "norm_first=False",
        "normalize_input=False",
        "heads=12",
        "strides=[5, 2, 2, 2, 2, 2, 2]",
    )
    x = torch.randn(1, 4000)
    with torch.no_grad():
        got = SpeechEncoder.from_weights(weights)(x).hidden_states[1:]
        for a, b in zip(got, theirs.extract_features(x)[0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_torchaudio_pretraining_model_keeps_its_mask_embedding(tmp_path):
    inner = torchaudio_model("base").state_dict()
    embedding = torch.rand(48)
    state = {f"wav2vec2.{k}": v for k, v in inner.items()} | {
        "mask_generator.mask_embedding": embedding,
        "logit_generator.label_embeddings": torch.zeros(5, 8),
    }
    torch.save(state, tmp_path / "m.pt")
    (tmp_path / "m.yaml").write_text("heads: 4\nconv_layers: [[16, 10, 5], [16, 3, 2], [24, 2, 2]]\n")
    teacher = load_teacher(tmp_path / "m.pt")
    torch.testing.assert_close(teacher.mask_embedding, embedding)


# ---- released students -----------------------------------------------------


def test_starhubert_has_neither_heads_nor_mask_embedding(tmp_path):
    golden = GOLDEN / "no-reuse"
    state = torch.load(golden / "student.ckpt", weights_only=True)["state_dict"]
    state = {k: v for k, v in state.items() if "proj_head" not in k and not k.endswith("student_model.mask_emb")}
    state["student_model.final_proj.weight"] = torch.zeros(2, 2)
    torch.save({"state_dict": state, "epoch": 9}, tmp_path / "star.ckpt")
    (tmp_path / "star.yaml").write_text((golden / "student.yaml").read_text())
    model = ARMHuBERT.from_pretrained(tmp_path / "star.ckpt")
    assert model.heads is None
    assert model.mask_embedding is None
    assert "student_model.final_proj.weight" in load_weights(tmp_path / "star.ckpt").ignored
    expected = load_file(golden / "expected.safetensors")
    with torch.no_grad():
        hidden = model(expected["wave_1"]).hidden_states
    for layer in range(model.config.layers):
        torch.testing.assert_close(hidden[layer + 1], expected[f"hidden_1_{layer}"], atol=1e-4, rtol=0)


def test_reading_a_released_student_as_exact_warns_what_that_changes():
    source = GOLDEN / "reuse-2by2" / "student.ckpt"
    with pytest.warns(UserWarning, match="fine-tune") as caught:
        model = ARMHuBERT.from_pretrained(source, attention_mode="exact")
    assert len(caught) == 1
    assert model.config.attention_mode == "exact"


# ---- what pickles hold -----------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tensors_of_any_layout_come_back_equal(legacy, tmp_path):
    base = torch.randn(6, 8)
    content = {
        "transposed": base.T,
        "slice": base[1:, 2:5],
        "strided": base[:, ::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base.clone()),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "again": base,
        "nested": {"list": [torch.ones(3), (1, "a", None, 2.5, True)], "ordered": OrderedDict(a=torch.zeros(2))},
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    got = read_pickle(tmp_path / "x.pt")
    assert got.keys() == content.keys()
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value), name
    assert torch.equal(got["nested"]["list"][0], torch.ones(3))
    assert got["nested"]["list"][1] == (1, "a", None, 2.5, True)
    assert torch.equal(got["nested"]["ordered"]["a"], torch.zeros(2))


def test_objects_of_other_classes_are_stand_ins_only_where_asked_for(fairseq, tmp_path):
    content = {"d": fairseq.Dictionary(), "c": fairseq.DictConfig({"a": {"b": 3}}), "m": fairseq.Mode.layer_norm}
    torch.save(content, tmp_path / "x.pt")
    fairseq.forget()
    got = read_pickle(tmp_path / "x.pt", stand_ins=True)
    assert isinstance(got["d"], StandIn)
    assert repr(got["d"]) == "<fairseq.data.dictionary.Dictionary>"
    assert fields(got["d"])["symbols"][-1] == "T"
    assert scalar(fields(fields(got["c"])["a"])["b"]) == 3
    assert scalar(got["m"]) == "layer_norm"
    with pytest.raises(ArmhubertError, match="holds more than tensors") as caught:
        read_pickle(tmp_path / "x.pt")
    one_line(caught)


def test_a_torchscript_program_is_refused_by_name(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pt")
    with pytest.raises(ArmhubertError, match="TorchScript program") as caught:
        load_weights(tmp_path / "x.pt")
    one_line(caught)
