import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

from armhubert import ARMHuBERT, ArmhubertError, load_teacher
from armhubert.bundled import TEACHER, TEST_SPEECH, TRAINING_SPEECH
from armhubert.config import preset

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    HubertConfig,
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
)
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402

from armhubert.huggingface import (  # noqa: E402
    ARMHuBERTConfig,
    ARMHuBERTForCTC,
    ARMHuBERTForSequenceClassification,
    ARMHuBERTModel,
    ARMHuBERTPreTrainedModel,
)

README = Path(__file__).parents[1] / "README.md"
LETTERS = ["<pad>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]


def small(**settings) -> ARMHuBERT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ARMHuBERT(dataclasses.replace(preset("mini"), layers=4, pattern="CRCR", **settings)).eval()


@pytest.fixture(scope="module")
def student() -> ARMHuBERT:
    return small()


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("student")
    student.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Waveforms [2, 8000] and their mask; the second has 5,000 samples."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 8000, dtype=torch.long)
    mask[1, 5000:] = 0
    return torch.randn(2, 8000, generator=generator) * mask, mask


def valid(x: torch.Tensor) -> torch.Tensor:
    """Frames of `batch` without the padding, whose values are nobody's."""
    return torch.cat([x[0, :24], x[1, :15]])


class Classifier(ARMHuBERTPreTrainedModel):
    """A user's head on a student."""

    def __init__(self, config):
        super().__init__(config)
        self.projector, self.normed = nn.Linear(config.hidden_size, 16), nn.LayerNorm(16)
        self.post_init()


def test_a_users_head_starts_as_transformers_starts_it(folder):
    head = Classifier.from_pretrained(folder)
    assert 0.01 < head.projector.weight.std().item() < 0.03
    assert not head.projector.bias.any()
    assert (head.normed.weight == 1).all()
    assert not head.normed.bias.any()
    same_state(head.armhubert, ARMHuBERT.from_pretrained(folder))


@pytest.mark.parametrize("place", ["armhubert", "encoder"])
def test_a_second_encoder_is_refused(folder, place):
    class Two(ARMHuBERTPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            setattr(self, place, AutoModel.from_config(config))
            self.post_init()

    with pytest.raises(ArmhubertError, match=rf"Two has an encoder at {place}\.armhubert beside the one"):
        Two.from_pretrained(folder)


def test_a_users_own_configuration_takes_a_students(folder):
    class Mine(ARMHuBERTConfig):
        model_type = "my-asr"

        def __init__(self, **settings):
            super().__init__(**settings)

    class Model(Classifier):
        config_class = Mine

    same_state(Model.from_pretrained(folder).armhubert, ARMHuBERT.from_pretrained(folder))


def test_a_hubert_is_told_from_a_student():
    with pytest.raises(ArmhubertError, match="a hubert is no armhubert: load it with transformers' own class"):
        ARMHuBERTModel.from_pretrained(TEACHER)


def same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# loading and saving


def test_our_folder_is_an_auto_model_with_the_same_outputs(student, folder, batch):
    model = AutoModel.from_pretrained(folder)
    assert type(model) is ARMHuBERTModel
    assert not model.training
    same_state(model.armhubert, student)
    waves, mask = batch
    with torch.no_grad():
        want = student(waves, mask.sum(-1))
        got = model(input_values=waves, attention_mask=mask, output_hidden_states=True)
    assert isinstance(got, BaseModelOutput)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert len(got.hidden_states) == len(want.hidden_states) == 5
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, want.hidden_states, strict=True))
    plain = model(waves, mask, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 1


@pytest.mark.parametrize("size", ["10GB", "300KB"], ids=["whole", "sharded"])
def test_round_trips_both_ways_lose_nothing(student, folder, tmp_path, size):
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (size == "300KB")
    same_state(AutoModel.from_pretrained(tmp_path / "theirs"), model)
    ours = ARMHuBERT.from_pretrained(tmp_path / "theirs")
    assert ours.config == student.config
    same_state(ours, student)
    ours.save_pretrained(tmp_path / "ours")
    same_state(AutoModel.from_pretrained(tmp_path / "ours"), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_at_loading_and_on_disk(folder, batch, tmp_path, dtype):
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        got = model(*batch).last_hidden_state
        want = AutoModel.from_pretrained(folder)(*batch).last_hidden_state
    assert got.dtype == dtype
    assert float((got - want).norm() / want.norm()) < 0.05
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.dtype == dtype
    same_state(again, model)
    half = ARMHuBERT.from_pretrained(tmp_path, dtype=dtype)
    same_state(half, model.armhubert)


@pytest.mark.parametrize("placement", ["cpu", "auto"])
def test_device_map(student, folder, batch, placement):
    pytest.importorskip("accelerate")
    if placement == "auto" and torch.cuda.is_available():
        pytest.skip("auto would take the GPU")
    model = AutoModel.from_pretrained(folder, device_map=placement)
    same_state(model.armhubert, student)
    with torch.no_grad():
        assert torch.equal(model(*batch).last_hidden_state, student(batch[0], batch[1].sum(-1)).last_hidden_state)


def test_a_model_from_a_configuration_draws_the_students_own_weights(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ARMHuBERTConfig
    assert config.encoder == ARMHuBERT.from_pretrained(folder).config
    assert (config.hidden_size, config.num_hidden_layers, config.inputs_to_logits_ratio) == (160, 4, 320)
    torch.manual_seed(3)
    model = AutoModel.from_config(config)
    torch.manual_seed(3)
    same_state(model.armhubert, ARMHuBERT(config.encoder))
    assert AutoModel.from_config(config, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_configurations_names_and_defaults():
    assert ARMHuBERTConfig().encoder == preset("armhubert")
    config = ARMHuBERTConfig(hidden_size=432, intermediate_size=816, hidden_dropout=0.2)
    assert (config.width, config.ffn, config.dropout) == (432, 816, 0.2)
    assert (config.conv_kernel[0], config.conv_stride[0]) == (10, 5)
    with pytest.raises(ArmhubertError, match="channels and width is 432"):
        ARMHuBERTModel(config)
    with pytest.raises(ArmhubertError, match=r"layerdrop must be 0, got 0\.1"):
        ARMHuBERTModel(ARMHuBERTConfig(layerdrop=0.1))


def test_settings_at_loading_reach_the_encoder(folder):
    model = AutoModel.from_pretrained(folder, hidden_dropout=0.3, projection_width=None, attn_implementation="eager")
    assert model.armhubert.config.dropout == 0.3
    assert model.armhubert.heads is None
    assert {layer.attention.impl for layer in model.armhubert.layers} == {"torch"}
    default = AutoModel.from_pretrained(folder)
    assert {layer.attention.impl for layer in default.armhubert.layers} == {"auto"}
    assert default.config._attn_implementation == "sdpa"


def test_an_encoder_that_lacks_tensors_is_an_error(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["layers.1.up.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ArmhubertError, match=r"lacks 1 tensors of its encoder, such as armhubert\.layers\.1\.up"):
        AutoModel.from_pretrained(tmp_path)


def test_unknown_keys_stay_errors_in_our_own_folders(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"widht": 3}))
    with pytest.raises(ArmhubertError, match="did you mean 'width'"):
        ARMHuBERT.from_pretrained(tmp_path)


def test_the_feature_extractor_leaves_normalising_to_the_model(folder):
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert type(extractor) is Wav2Vec2FeatureExtractor
    waves = [torch.randn(3000).numpy() * 5 + 2, torch.randn(2000).numpy()]
    inputs = extractor(waves, sampling_rate=16_000, padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_values"][0], torch.from_numpy(waves[0]))
    assert inputs["attention_mask"].sum(-1).tolist() == [3000, 2000]


# running


def test_padding_changes_no_features(folder, batch):
    model = AutoModel.from_pretrained(folder)
    waves, mask = batch
    with torch.no_grad():
        alone = model(waves[1:, :5000]).last_hidden_state
        padded = model(waves, mask).last_hidden_state[1:, : alone.shape[1]]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
    assert model._get_feat_extract_output_lengths(mask.sum(-1)).tolist() == [24, 15]


def test_padding_moves_the_features_of_others_as_far_as_the_readme_tells():
    """2 s of speech padded to 4 and to 30 s, the last layer of the bundled teacher in transformers and in ours."""
    theirs = HubertModel.from_pretrained(TEACHER, dtype=torch.float32).eval()
    ours = load_teacher("mini")
    moved = {4: [], 30: []}
    for path in sorted(TEST_SPEECH.rglob("*.opus"))[::20]:
        speech = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[8000:40000]
        waves = ((speech - speech.mean()) / speech.var().sqrt())[None]
        with torch.inference_mode():
            alone = theirs(waves).last_hidden_state
            for seconds, found in moved.items():
                room = 16_000 * seconds - waves.shape[1]
                padded, mask = F.pad(waves, (0, room)), F.pad(torch.ones_like(waves).long(), (0, room))
                features = theirs(padded, attention_mask=mask).last_hidden_state[:, : alone.shape[1]]
                found.append(float((features - alone).norm() / alone.norm()))
                same = ours(padded, torch.tensor([waves.shape[1]])).last_hidden_state[:, : alone.shape[1]]
                torch.testing.assert_close(same, ours(waves).last_hidden_state, atol=1e-4, rtol=0)
    told = re.search(
        r"move by (\d+) % padded to 4 s, and by (\d+) % padded to 30 s", " ".join(README.read_text().split())
    )
    assert told is not None
    assert [100 * sum(found) / len(found) for found in moved.values()] == pytest.approx(
        [*map(int, told.groups())], abs=1
    )


def test_frames_for_pooling_are_those_of_hubert(folder, batch):
    hubert = HubertForCTC(HubertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8))
    want = hubert._get_feature_vector_attention_mask(24, batch[1])
    assert torch.equal(AutoModel.from_pretrained(folder)._get_feature_vector_attention_mask(24, batch[1]), want)


def test_every_parameter_that_is_to_learn_gets_a_gradient(batch, tmp_path):
    small(projection_width=12).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path).train()
    model(*batch).last_hidden_state.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_the_attention_implementation_can_be_changed(folder, batch):
    model = AutoModel.from_pretrained(folder)
    for name, impl in (("eager", "torch"), ("sdpa", "auto")):
        model.set_attn_implementation(name)
        assert {m.impl for m in model.armhubert.modules() if hasattr(m, "impl")} == {impl}
        model(*batch)


def test_given_mask_indices_are_the_students_mask(student, folder, batch):
    model = AutoModel.from_pretrained(folder)
    indices = torch.zeros(2, 24, dtype=torch.bool)
    indices[:, 3:9] = True
    with torch.no_grad():
        got = model(batch[0], mask_time_indices=indices).last_hidden_state
        assert torch.equal(got, student(batch[0], mask=indices).last_hidden_state)
    with pytest.raises(ArmhubertError, match=r"mask_time_indices must be \[2, 24\]"):
        model(batch[0], mask_time_indices=indices[:, 1:])


def test_spec_augment_acts_in_training_only_and_as_configured(folder, batch):
    waves = batch[0][:1]  # one utterance: in eval a CPU works through a batch in groups, in training at once

    def difference(**settings) -> float:
        model = AutoModel.from_pretrained(folder, **settings)
        with torch.no_grad():
            quiet = model(waves).last_hidden_state
            return float((model.train()(waves).last_hidden_state - quiet).abs().max())

    assert difference(mask_time_prob=0.0) == 0  # the student has no dropout
    assert difference(apply_spec_augment=False, mask_time_prob=0.5, mask_feature_prob=0.5) == 0
    assert difference(mask_time_prob=0.3) > 0.01
    assert difference(mask_time_prob=0.0, mask_feature_prob=0.3) > 0.01


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_class", [AutoModel, AutoModelForCTC, AutoModelForAudioClassification])
def test_attention_maps_are_the_students(folder, batch, model_class, training):
    model = model_class.from_pretrained(folder, apply_spec_augment=False).train(training)
    waves, mask = batch
    with torch.no_grad():
        got = model(waves, mask, output_attentions=True)
        want = ARMHuBERT.from_pretrained(folder)(waves, mask.sum(1), attentions=True).attentions
        assert "attentions" not in model(waves, mask)
        model.set_attn_implementation("eager")  # transformers' condition for the configuration to ask for maps
        model.config.output_attentions = True
        assert len(model(waves, mask).attentions) == len(want) > 0
    for a, b in zip(got.attentions, want, strict=True):
        for row, n in enumerate((24, 15)):
            torch.testing.assert_close(a[row, :, :n], b[row, :, :n])


def test_the_convolutions_may_have_huberts_names():
    layers = ((8, 10, 5), (16, 3, 2))
    names = dict(zip(("conv_dim", "conv_kernel", "conv_stride"), map(list, zip(*layers, strict=True)), strict=True))
    config = ARMHuBERTConfig(**names, feature_projection=True)
    assert config.encoder.conv_layers == layers
    assert ARMHuBERTConfig(**json.loads(config.to_json_string(use_diff=False))).encoder == config.encoder
    for wrong in ({"conv_dim": [8, 16]}, {**names, "conv_kernel": [10]}):
        with pytest.raises(ArmhubertError, match="conv_dim, conv_kernel and conv_stride must come together"):
            ARMHuBERTConfig(**wrong)


def test_what_does_not_fit_is_one_line(folder, batch):
    model = AutoModel.from_pretrained(folder)
    waves, mask = batch
    for call, message in (
        (lambda: model(waves, mask[:, 1:]), "attention_mask must have the shape of input_values"),
        (lambda: model(waves, mask.flip(1)), "pad right"),
        (lambda: model(waves[:, :100]), "at least 400 samples"),
    ):
        with pytest.raises(ArmhubertError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_class", [AutoModel, AutoModelForCTC])
def test_checkpointed_gradients_are_equal(folder, batch, model_class):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = model_class.from_pretrained(folder, hidden_dropout=0.1, mask_time_prob=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
            assert model.armhubert.gradient_checkpointing
        torch.manual_seed(1)
        model(*batch)[0].square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) > 40
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(folder, batch, backend):
    model = AutoModel.from_pretrained(folder)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        want = model(*batch, output_hidden_states=True)
        got = compiled(*batch, output_hidden_states=True)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(valid(a), valid(b), atol=1e-5, rtol=0)


def test_transformers_is_imported_only_when_asked_for():
    code = "import sys, armhubert, armhubert.cli; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# CTC


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_the_ctc_loss_is_that_of_hubert_on_the_same_logits(folder, batch, reduction, zero_infinity, monkeypatch):
    settings = {"vocab_size": 10, "ctc_loss_reduction": reduction, "ctc_zero_infinity": zero_infinity}
    model = AutoModelForCTC.from_pretrained(folder, **settings)
    assert type(model) is ARMHuBERTForCTC
    waves, mask = batch
    labels = torch.tensor([[3, 4, 4, 9, 0], [5, 6, -100, -100, -100]])
    theirs = HubertForCTC(
        HubertConfig(
            **settings, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            num_conv_pos_embedding_groups=2, conv_dim=(8,) * 7,
        )
    )  # fmt: skip
    features = BaseModelOutput(last_hidden_state=model(waves, mask).logits.detach())
    monkeypatch.setattr(theirs.hubert, "forward", lambda *_, **__: features)
    theirs.lm_head, theirs.dropout = nn.Identity(), nn.Identity()
    for attention_mask in (mask, None):
        got = model(waves, attention_mask, labels=labels)
        features.last_hidden_state = got.logits.detach()
        want = theirs(waves, attention_mask=attention_mask, labels=labels).loss
        torch.testing.assert_close(got.loss.detach(), want)
    too_many = torch.arange(1, 10).repeat(1, 3)[:, :27].expand(2, -1)  # more labels than frames
    loss = model(waves, mask, labels=too_many).loss
    assert bool(loss.isfinite()) == zero_infinity
    with pytest.raises(ArmhubertError, match="labels must be below vocab_size 10, got 10"):
        model(waves, mask, labels=labels + 1)


def test_freezing_and_the_folder_of_a_ctc_model(student, folder, batch, tmp_path):
    model = AutoModelForCTC.from_pretrained(folder, vocab_size=10)
    assert model.armhubert.heads is None
    model.freeze_feature_encoder()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"armhubert.front_end.{name}" for name, _ in student.front_end.named_parameters()}
    model.freeze_base_model()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"lm_head.weight", "lm_head.bias"}
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCTC.from_pretrained(tmp_path)
    same_state(again, model)
    with torch.no_grad():
        assert torch.equal(again.eval()(*batch).logits, model(*batch).logits)
    bare = ARMHuBERT.from_pretrained(tmp_path)
    assert bare.heads is None
    same_state(bare, ARMHuBERT.from_pretrained(folder, heads=False))
    same_state(AutoModel.from_pretrained(tmp_path).armhubert, bare)


@pytest.mark.parametrize("weighted", [False, True])
def test_classification_is_that_of_hubert(folder, batch, tmp_path, monkeypatch, weighted):
    settings = {"use_weighted_layer_sum": weighted, "classifier_proj_size": 24, "num_labels": 3}
    model = AutoModelForAudioClassification.from_pretrained(folder, **settings)
    assert type(model) is ARMHuBERTForSequenceClassification
    assert model.armhubert.heads is None
    config = HubertConfig(
        **settings, hidden_size=160, num_hidden_layers=4, num_attention_heads=4, intermediate_size=16,
        conv_dim=(8,) * 7,
    )  # fmt: skip
    theirs = HubertForSequenceClassification(config)
    head = {name: p for name, p in model.named_parameters() if not name.startswith("armhubert.")}
    if weighted:
        assert not model.layer_weights.any()
        torch.nn.init.normal_(model.layer_weights)
    theirs.load_state_dict(head, strict=False)
    waves, mask = batch
    with torch.no_grad():
        features = AutoModel.from_pretrained(folder)(waves, mask, output_hidden_states=True)
    labels = torch.tensor([2, 0])
    for attention_mask in (mask, None):
        if attention_mask is None:
            with torch.no_grad():
                features = AutoModel.from_pretrained(folder)(waves, output_hidden_states=True)
        monkeypatch.setattr(theirs.hubert, "forward", lambda *_, output=features, **__: output)
        want = theirs(waves, attention_mask=attention_mask, labels=labels)
        got = model(waves, attention_mask, labels=labels)
        torch.testing.assert_close(got.logits, want.logits)
        torch.testing.assert_close(got.loss, want.loss)
        assert got.hidden_states is None
    model.freeze_base_model()
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == head.keys()
    model.save_pretrained(tmp_path)
    same_state(AutoModelForAudioClassification.from_pretrained(tmp_path), model)
    same_state(ARMHuBERT.from_pretrained(tmp_path), model.armhubert)
    same_state(AutoModelForCTC.from_pretrained(tmp_path).armhubert, model.armhubert)


def test_padding_changes_no_class(folder, batch):
    model = AutoModelForAudioClassification.from_pretrained(folder)
    waves, mask = batch
    with torch.no_grad():
        torch.testing.assert_close(model(waves, mask).logits[1:], model(waves[1:, :5000]).logits)


def test_the_pipeline_classifies(folder, tmp_path):
    names = {0: "no", 1: "yes", 2: "perhaps"}
    AutoModelForAudioClassification.from_pretrained(
        folder, id2label=names, label2id={name: i for i, name in names.items()}
    ).save_pretrained(tmp_path)
    AutoFeatureExtractor.from_pretrained(folder).save_pretrained(tmp_path)
    classify = transformers.pipeline("audio-classification", model=str(tmp_path), device="cpu")
    found = classify(utterances(1)[0][0].numpy())
    assert {row["label"] for row in found} == set(names.values())
    assert sum(row["score"] for row in found) == pytest.approx(1)


def utterances(seconds: float) -> list[tuple[torch.Tensor, str]]:
    found: list[tuple[torch.Tensor, str]] = []
    for transcript in sorted(TRAINING_SPEECH.rglob("*.trans.txt")):
        for line in transcript.read_text().splitlines():
            name, text = line.split(" ", 1)
            wave, rate = soundfile.read(transcript.parent / f"{name}.opus", dtype="float32")
            assert rate == 16_000
            found.append((torch.from_numpy(wave), text))
            if sum(len(w) for w, _ in found) > seconds * 16_000:
                return found
    return found


def test_trainer_fine_tunes_and_the_pipeline_transcribes(folder, tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    tokenizer = Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", unk_token="<pad>", pad_token="<pad>")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    processor = transformers.Wav2Vec2Processor(extractor, tokenizer)
    model = AutoModelForCTC.from_pretrained(
        folder,
        vocab_size=len(LETTERS),
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        mask_time_prob=0.05,
        layerdrop=0.0,
    )
    model.freeze_feature_encoder()

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        inputs = extractor(
            [r["wave"] for r in rows],
            sampling_rate=16_000,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        text = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
        labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels}

    rows = [{"wave": wave.numpy(), "text": text} for wave, text in utterances(60)]
    assert sum(len(row["wave"]) for row in rows) >= 60 * 16_000
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            logging_steps=1,
            save_steps=8,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            gradient_checkpointing=True,
        ),
        train_dataset=rows,
        data_collator=collate,
        processing_class=processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    saved = tmp_path / "run/checkpoint-8"
    assert type(AutoModelForCTC.from_pretrained(saved)) is ARMHuBERTForCTC
    transcribe = transformers.pipeline("automatic-speech-recognition", model=str(saved), device="cpu")
    wave = rows[0]["wave"]
    assert isinstance(transcribe(wave)["text"], str)
    chunked = transcribe(wave, chunk_length_s=4, stride_length_s=1, return_timestamps="char")
    assert set(chunked) == {"text", "chunks"}
