import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchaudio
from huggingface_hub.errors import HTTPError
from made import GOLDEN, LARGE, SMALL, one_line, torchaudio_model, transformers_model
from safetensors.torch import load_file

from armhubert import ARMHuBERT, ArmhubertError, SpeechEncoder, load_teacher
from armhubert.convert import load_weights, released
from armhubert.convert import torchaudio as from_torchaudio
from armhubert.frontend import normalize_waveform
from armhubert.losses import Objective

LARGE_GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden" / "reuse-3by2-headdim36"
needs_large_golden = pytest.mark.skipif(not LARGE_GOLDEN.is_dir(), reason="9 MB that are not in the repository")


@pytest.fixture(scope="module")
def hubert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hubert")
    transformers_model("Hubert").save_pretrained(folder)
    return folder


def copy(folder: Path, to: Path, **changes) -> Path:
    to.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return to


# Hugging Face


@pytest.mark.parametrize("settings", [{}, LARGE, {"layer_norm_eps": 1e-2}], ids=["base", "large", "epsilon"])
@pytest.mark.parametrize("kind", ["Hubert", "Wav2Vec2", "WavLM"])
def test_every_hidden_state_is_that_of_transformers(kind, settings, tmp_path):
    theirs = transformers_model(kind, **settings)
    theirs.save_pretrained(tmp_path)
    ours = SpeechEncoder.from_weights(load_weights(tmp_path).with_config(normalize_input=False))
    x = torch.randn(2, 4000)
    mask = torch.zeros(2, ours.config.frames(4000), dtype=torch.bool)
    mask[0, 10:40] = True
    with torch.no_grad():
        for frames in (None, mask):
            want = theirs(x, mask_time_indices=frames, output_hidden_states=True)
            got = ours(x, mask=frames)
            assert len(want.hidden_states) == len(got.hidden_states) == 4
            for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
            torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{}, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("kind", ["Hubert", "Wav2Vec2", "WavLM"])
def test_attention_maps_are_those_of_transformers(kind, settings, tmp_path):
    theirs = transformers_model(kind, **settings)
    theirs.save_pretrained(tmp_path)
    theirs.set_attn_implementation("eager")
    ours = SpeechEncoder.from_weights(load_weights(tmp_path).with_config(normalize_input=False))
    x = torch.randn(2, 4000)
    with torch.no_grad():
        got, want = ours(x, attentions=True).attentions, theirs(x, output_attentions=True).attentions
    for a, b in zip(got, want, strict=True):
        assert a is not None
        if kind == "WavLM":  # transformers gives the mean of the heads for each of them
            a = a.mean(1, keepdim=True).expand_as(b)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("kind", ["Hubert", "Wav2Vec2", "WavLM"])
def test_what_trains_on_drops_as_much_in_the_same_places(kind, settings, tmp_path, monkeypatch):
    dropouts = {"hidden_dropout": 0.1, "activation_dropout": 0.2, "feat_proj_dropout": 0.3, "attention_dropout": 0.4}
    theirs = transformers_model(kind, **settings, **dropouts, layerdrop=0.0, apply_spec_augment=False)
    theirs.save_pretrained(tmp_path)
    ours = SpeechEncoder.from_weights(load_weights(tmp_path))

    def places(model: torch.nn.Module) -> list[tuple]:
        seen = []

        def dropout(x: torch.Tensor, p: float, training: bool = True, inplace: bool = False) -> torch.Tensor:
            seen.append((p, x.shape) if training else None)
            return x

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "dropout", dropout)
            model.train()(torch.zeros(1, 2000))
        return [place for place in seen if place[0] != 0.4]  # attention's is inside PyTorch's products

    assert ours.config.attention_dropout == 0.4
    assert places(ours) == places(theirs)


@pytest.fixture
def hub(hubert, tmp_path, monkeypatch):
    """A folder that serves as the hub's, and the names fetched from it."""
    (hub, cache), fetched = (tmp_path / "hub", tmp_path / "cache"), []
    hub.mkdir()
    cache.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(hubert / name, hub)
    for name in ("pytorch_model.msgpack", "tf_model.h5", "adapter.deu.safetensors"):
        (hub / name).touch()
    torch.save(load_file(hubert / "model.safetensors"), hub / "pytorch_model.bin")

    def snapshot_download(hub_id, *, allow_patterns):
        for path in hub.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns) and not (cache / path.name).exists():
                fetched.append(path.name)
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return hub, fetched


@pytest.mark.parametrize("offered", ["model.safetensors", "pytorch_model.bin"])
def test_pickles_are_fetched_where_the_hub_has_nothing_else(hubert, hub, offered):
    folder, fetched = hub
    if offered == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    weights = load_weights("someone/hubert")
    assert fetched == ["config.json", offered]
    assert torch.equal(weights.state["mask_embedding"], load_weights(hubert).state["mask_embedding"])


@pytest.mark.parametrize("changes", [{"model_type": "bert"}, {"hidden_act": "relu"}, None])
def test_of_a_model_that_is_not_supported_no_weights_are_fetched(hub, changes):
    folder, fetched = hub
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes)) if changes else path.unlink()
    with pytest.raises(ArmhubertError) as caught:
        load_weights("someone/other")
    one_line(caught)
    assert fetched == (["config.json"] if changes else [])


@pytest.mark.parametrize(
    ("error", "rule"),
    [
        (HTTPError("Proxy\nrefused"), r"\(Proxy\): check the path, or the id and the network"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free space, or set HF_HOME"),
    ],
)
def test_a_download_that_fails_is_one_line_with_the_remedy(monkeypatch, error, rule):
    def snapshot_download(hub_id, *, allow_patterns):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ArmhubertError, match=rule) as caught:
        load_weights("someone/hubert")
    assert "'someone/hubert'" in one_line(caught)


def test_a_model_with_a_ctc_head_and_old_weight_norm_names_and_a_pickle(hubert, tmp_path):
    state = load_file(hubert / "model.safetensors")
    position = "encoder.pos_conv_embed.conv."
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for name, value in state.items()
    }
    assert position + "weight_g" in old
    old = {f"hubert.{name}": value for name, value in old.items()} | {"lm_head.weight": torch.zeros(2, 2)}
    (tmp_path / "config.json").write_text((hubert / "config.json").read_text())
    torch.save(old, tmp_path / "pytorch_model.bin")
    weights, plain = load_weights(tmp_path), load_weights(hubert)
    assert weights.ignored == ("lm_head.weight",)
    assert weights.state.keys() == plain.state.keys()
    assert all(torch.equal(weights.state[name], plain.state[name]) for name in plain.state)


def test_shards_are_put_together(hubert, tmp_path):
    state = load_file(hubert / "model.safetensors")
    names = sorted(state)
    parts = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, part in parts.items():
        safetensors.torch.save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((hubert / "config.json").read_text())
    got, want = load_weights(tmp_path).state, load_weights(hubert).state
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    index["weight_map"][names[0]] = "../model-1.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArmhubertError, match="in the same folder") as caught:
        load_weights(tmp_path)
    one_line(caught)


@pytest.mark.parametrize(
    ("kind", "extra"), [("HubertForCTC", {"lm_head"}), ("Wav2Vec2ForPreTraining", {"quantizer", "project_q"})]
)
def test_the_encoder_is_found_inside_a_larger_model_in_shards(kind, extra, tmp_path):
    import transformers

    whole = getattr(transformers, kind)(getattr(transformers, f"{kind.split('For')[0]}Config")(**SMALL)).eval()
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    weights = load_weights(tmp_path)
    assert extra <= {name.split(".")[0] for name in weights.ignored}
    ours, x = SpeechEncoder.from_weights(weights), torch.randn(1, 2000)
    inner = getattr(whole, whole.base_model_prefix)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).last_hidden_state, inner(x).last_hidden_state, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(), (3,), (48, 2), (0,), (1, 2, 3, 4)])
def test_a_tensor_of_any_wrong_shape_is_one_line(hubert, tmp_path, shape):
    folder = copy(hubert, tmp_path / "x")
    state = load_file(folder / "model.safetensors")
    for name in [n for n in state if "layers.1." in n or not n.startswith("encoder.layers.")]:
        safetensors.torch.save_file({**state, name: torch.zeros(shape)}, folder / "model.safetensors")
        with pytest.raises(ArmhubertError) as caught:
            load_teacher(folder)
        one_line(caught)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_weights_cut_short_anywhere_are_one_line(hubert, tmp_path, name, kept):
    folder = copy(hubert, tmp_path / "x")
    if name == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ArmhubertError, match=name) as caught:
        load_teacher(folder)
    one_line(caught)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**18},
        {"num_hidden_layers": 10**18},
        {"conv_dim": [10**12] * 3},
        {"conv_dim": 5},
        {"conv_kernel": [1]},
        {"num_attention_heads": 0},
        {"layer_norm_eps": -1},
        {"hidden_act": "relu"},
        {"conv_pos_batch_norm": True},
        {"feat_extract_norm": "batch"},
    ],
)
def test_impossible_settings_of_a_model_are_one_line(hubert, tmp_path, changes):
    with pytest.raises(ArmhubertError) as caught:
        load_teacher(copy(hubert, tmp_path / "x", **changes))
    one_line(caught)


def test_input_normalisation_follows_the_preprocessor_and_else_the_kind_of_norm(hubert, tmp_path):
    assert not load_weights(hubert).config.normalize_input
    folder = copy(hubert, tmp_path / "a")
    for text, normalize in (('{"do_normalize": false}', False), ("{}", True), ('{"do_normalize": true}', True)):
        (folder / "preprocessor_config.json").write_text(text)
        assert load_weights(folder).config.normalize_input == normalize
    large = tmp_path / "large"
    transformers_model("Hubert", **LARGE).save_pretrained(large)
    assert load_weights(large).config.normalize_input


def test_input_normalisation_is_read_from_a_processor(hubert, tmp_path):
    import transformers

    folder = copy(hubert, tmp_path / "a")
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "<unk>": 1, "|": 2}')
    tokenizer = transformers.Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
    for normalize in (True, False):
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
        transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
        assert not (folder / "preprocessor_config.json").exists()
        assert load_weights(folder).config.normalize_input == normalize
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true}')
    (folder / "processor_config.json").write_text('{"processor_class": "Wav2Vec2Processor"}')
    assert load_weights(folder).config.normalize_input


@pytest.mark.parametrize("scale", [1.0, 3e-4])
def test_input_is_normalised_as_by_the_feature_extractor(scale):
    import transformers

    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    padded = scale * torch.randn(2, 3000) + 0.3 * scale
    for lengths in (None, torch.tensor([2000, 3000])):
        sizes = [3000, 3000] if lengths is None else lengths.tolist()
        waves = [row[:size].numpy() for row, size in zip(padded, sizes, strict=True)]
        expected = extractor(waves, sampling_rate=16000, padding=True, return_tensors="pt")["input_values"]
        torch.testing.assert_close(normalize_waveform(padded, lengths), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["data2vec-audio", "wav2vec2-conformer", "bert", None])
def test_other_architectures_are_refused_by_name(hubert, tmp_path, kind):
    with pytest.raises(ArmhubertError, match="supported: hubert, wav2vec2, wavlm") as caught:
        load_teacher(copy(hubert, tmp_path / "x", model_type=kind))
    assert repr(kind) in one_line(caught)


def test_damaged_folders_are_one_line_each(hubert, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArmhubertError, match=r"has no config\.json"):
        load_teacher(empty)
    (empty / "config.json").write_text((hubert / "config.json").read_text())
    with pytest.raises(ArmhubertError, match="has no weights"):
        load_teacher(empty)
    with pytest.raises(
        ArmhubertError, match=r"is a file of a model's folder, which has the config\.json: give .*hubert"
    ):
        load_teacher(hubert / "model.safetensors")
    with pytest.raises(ArmhubertError, match="is a file of a model's folder"):
        load_teacher(hubert / "config.json")
    torn = copy(hubert, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((hubert / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ArmhubertError, match="damaged") as caught:
        load_teacher(torn)
    one_line(caught)
    with pytest.raises(ArmhubertError, match="must have shape") as caught:
        load_teacher(copy(hubert, tmp_path / "shape", intermediate_size=72))
    one_line(caught)
    with pytest.raises(ArmhubertError, match=r"lacks encoder\.layers\.3"):
        load_teacher(copy(hubert, tmp_path / "deep", num_hidden_layers=5))
    with pytest.raises(ArmhubertError, match="too many"):
        load_teacher(copy(hubert, tmp_path / "flat", num_hidden_layers=2))


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(hubert, tmp_path):
    (tmp_path / "config.json").write_text((hubert / "config.json").read_text())
    torch.save({"a": Hostile(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArmhubertError, match=r"got <posix\.mkdir> under") as caught:
        load_teacher(tmp_path)
    one_line(caught)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("source", ["nothing-here", "org/not-cached-anywhere", "HUBERT_NONE"])
def test_what_is_not_there_is_one_line(source):
    with pytest.raises(ArmhubertError) as caught:
        load_teacher(source)
    assert source in one_line(caught)


# torchaudio


@pytest.mark.parametrize("kind", ["base", "large", "wavlm"])
def test_every_layer_is_that_of_torchaudio(kind):
    theirs = torchaudio_model(kind)
    ours = SpeechEncoder.from_weights(from_torchaudio.from_model(theirs, "x", normalize=False))
    x = torch.randn(2, 4000)
    with torch.no_grad():
        want, _ = theirs.extract_features(x)
        got = ours(x).hidden_states[1:]
    assert len(want) == len(got) == 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_pipeline_is_loaded_by_its_name(monkeypatch):
    class Bundle:
        _normalize_waveform = True

        def get_model(self):
            return torchaudio_model("base")

    monkeypatch.setattr(torchaudio.pipelines, "HUBERT_BASE", Bundle())
    teacher = load_teacher("HUBERT_BASE")
    assert teacher.config.normalize_input
    assert teacher.mask_embedding is None


@pytest.mark.parametrize("error", [OSError("no\nroute"), RuntimeError("hash\nmismatch")])
def test_a_pipeline_that_cannot_be_fetched_is_one_line(monkeypatch, error):
    class Bundle:
        _normalize_waveform = False

        def get_model(self):
            raise error

    monkeypatch.setattr(torchaudio.pipelines, "WAVLM_BASE", Bundle())
    with pytest.raises(ArmhubertError, match="cannot fetch WAVLM_BASE") as caught:
        load_teacher("WAVLM_BASE")
    one_line(caught)


# released students


@pytest.mark.parametrize(
    "folder",
    [GOLDEN / "no-reuse", GOLDEN / "reuse-2by2", pytest.param(LARGE_GOLDEN, marks=needs_large_golden)],
    ids=lambda folder: folder.name,
)
def test_released_students_give_their_outputs_hidden_states_and_gradients(folder):
    model = ARMHuBERT.from_pretrained(folder / "student.ckpt")
    expected = load_file(folder / "expected.safetensors")
    layers = range(model.config.layers)
    assert model.config.attention_mode == ("exact" if folder.name == "no-reuse" else "resoftmax")

    def close(got: torch.Tensor, name: str) -> None:
        torch.testing.assert_close(got, expected[name], atol=1e-4, rtol=0)

    for i in range(3):
        output = model(expected[f"wave_{i}"])
        for layer in layers:
            close(output.hidden_states[layer + 1], f"hidden_{i}_{layer}")
            close(output.projections[layer], f"projection_{i}_{layer}")
    masked = model(expected["wave_2"], mask=expected["mask"].bool()).projections
    for layer in layers:
        close(masked[layer], f"masked_projection_{layer}")

    (hidden,), _ = Objective(model, {"plain": 1.0}, "mse", "auto").views(expected["wave_1"], None, None)
    heads = model.heads(model.head_inputs(hidden))
    loss = sum((1.0 if layer == layers[-1] else 0.1) * heads[layer].square().mean() for layer in layers)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["grad_loss"])
    gradients = {name.removeprefix("grad."): g for name, g in expected.items() if name.startswith("grad.")}
    ours = {name: p.grad for name, p in model.named_parameters()}
    for name, want in released.rename(gradients, model.config).items():
        scale = float(want.abs().max())
        torch.testing.assert_close(ours[name], want, atol=1e-4 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_released_student_pads_as_it_was_trained_when_asked():
    weights = load_weights(GOLDEN / "no-reuse" / "student.ckpt").with_config(padding="as_trained")
    model = ARMHuBERT.from_weights(weights)
    expected = load_file(GOLDEN / "no-reuse" / "expected.safetensors")
    lengths = (expected["padded_mask"] == 0).sum(1)  # fairseq marks padding
    assert lengths.tolist() == [12000, 9000]
    output = model(expected["padded_wave"], lengths)
    assert output.lengths.tolist() == [37, 27]
    last = model.config.layers - 1
    for layer in range(last + 1):  # all frames of both, padded ones included
        torch.testing.assert_close(output.projections[layer], expected[f"padded_projection_{layer}"], atol=1e-4, rtol=0)
    independent = ARMHuBERT.from_weights(weights.with_config(padding="independent"))
    other = independent(expected["padded_wave"], lengths).projections[last]
    torch.testing.assert_close(other[0], output.projections[last][0], atol=1e-4, rtol=0)
    assert (other[1, :27] - output.projections[last][1, :27]).abs().max() > 1e-2


def test_released_students_need_their_settings_and_nothing_in_them_is_executed(tmp_path):
    (tmp_path / "s.ckpt").write_bytes((GOLDEN / "reuse-2by2/student.ckpt").read_bytes())
    with pytest.raises(ArmhubertError, match=r"needs its run configuration s\.yaml"):
        ARMHuBERT.from_pretrained(tmp_path / "s.ckpt")
    settings = (GOLDEN / "reuse-2by2/student.yaml").read_text()
    good = "'[True, False, True, False]'"
    assert good in settings
    evil = settings.replace(good, '\'__import__("os").mkdir("x")\'')
    (tmp_path / "s.yaml").write_text(evil)
    with pytest.raises(ArmhubertError, match="reuse_pattern must read like"):
        ARMHuBERT.from_pretrained(tmp_path / "s.ckpt")
    (tmp_path / "s.yaml").write_text(settings.replace(good, "'[True, False] * 2'"))
    assert ARMHuBERT.from_pretrained(tmp_path / "s.ckpt").config.pattern == "CRCR"


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_released_tensor_of_any_wrong_shape_is_one_line(tmp_path, shape):
    content = torch.load(GOLDEN / "reuse-2by2/student.ckpt", weights_only=True)
    (tmp_path / "s.yaml").write_text((GOLDEN / "reuse-2by2/student.yaml").read_text())
    for part in ("layers.0.self_attn.k_proj.weight", "proj_head.0.lin_proj.weight", "proj_head.1.lin_proj.bias"):
        (name,) = [n for n in content["state_dict"] if n.startswith("student_model.") and n.endswith(part)]
        torch.save({"state_dict": content["state_dict"] | {name: torch.zeros(shape)}}, tmp_path / "s.ckpt")
        with pytest.raises(ArmhubertError) as caught:
            ARMHuBERT.from_pretrained(tmp_path / "s.ckpt")
        one_line(caught)


def test_a_checkpoint_that_wants_to_run_code_or_is_no_student_is_refused(tmp_path):
    torch.save({"state_dict": {"student_model.x": Hostile(tmp_path / "executed")}}, tmp_path / "s.ckpt")
    with pytest.raises(ArmhubertError, match=r"got <posix\.mkdir> under") as caught:
        ARMHuBERT.from_pretrained(tmp_path / "s.ckpt")
    one_line(caught)
    assert not (tmp_path / "executed").exists()
    for content in ({"model": {}}, {"state_dict": {"x": torch.ones(1)}}, [], torch.ones(1)):
        torch.save(content, tmp_path / "s.ckpt")
        with pytest.raises(ArmhubertError, match="no model that is known"):
            ARMHuBERT.from_pretrained(tmp_path / "s.ckpt")
