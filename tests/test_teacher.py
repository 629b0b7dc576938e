import dataclasses

import pytest
import torch

from armhubert import ArmhubertError, bundled, load_teacher
from armhubert.audio import read_audio
from armhubert.config import EncoderConfig
from armhubert.encoder import SpeechEncoder
from armhubert.kernels import torch_reuse_attention
from armhubert.teacher import fingerprint, layer_mapping, teacher_targets

CONFIG = EncoderConfig(
    conv_layers=((16, 10, 5), (24, 4, 4)), width=24, layers=4, heads=2, ffn=32, position_kernel=8, position_groups=2
)


@pytest.fixture
def teacher() -> SpeechEncoder:
    return SpeechEncoder(CONFIG).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("student", "teacher_layers", "mapping"),
    [(12, 12, tuple(range(1, 13))), (3, 12, (4, 8, 12)), (2, 24, (12, 24)), (4, 6, (2, 3, 5, 6)), (4, 2, (1, 1, 2, 2))],
)
def test_layers_are_mapped_evenly_last_to_last(student, teacher_layers, mapping):
    assert layer_mapping(student, teacher_layers) == mapping


KINDS = {
    "base": {},
    "large": {"norm_first": True, "conv_norm": "layer", "conv_bias": True, "feature_projection": True},
    "wavlm": {"position_buckets": 16, "position_max_distance": 40, "normalize_input": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_targets_are_the_clean_view_where_masked_and_the_masked_view_elsewhere(kind, ragged):
    teacher = SpeechEncoder(dataclasses.replace(CONFIG, **KINDS[kind])).eval().requires_grad_(False)
    x = torch.randn(3, 1000)
    lengths = torch.tensor([1000, 700, 333]) if ragged else None
    mask = torch.rand(3, CONFIG.frames(1000), generator=torch.Generator().manual_seed(1)) < 0.5
    targets = teacher_targets(teacher, x, lengths, mask, (2, 3, 3), clean=True, inputs=True)
    clean, masked = teacher(x, lengths).hidden_states, teacher(x, lengths, mask).hidden_states
    for place, number in enumerate((2, 3, 3)):
        want = torch.where(mask[..., None], clean[number], masked[number])
        torch.testing.assert_close(targets.masking[place], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(targets.clean[place], clean[number], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(targets.clean_inputs[place], clean[number - 1], atol=1e-5, rtol=1e-5)


def test_the_front_end_runs_once_and_no_layer_past_the_last_needed(teacher):
    calls = []
    teacher.front_end.register_forward_hook(lambda *_: calls.append("front end"))
    for i, layer in enumerate(teacher.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    mask = torch.zeros(1, CONFIG.frames(500), dtype=torch.bool)
    targets = teacher_targets(teacher, torch.randn(1, 500), None, mask, (1, 2))
    assert calls == ["front end", 0, 1]
    assert targets.clean is None
    assert targets.clean_inputs is None


def test_the_bundled_teacher_is_frozen_and_hears_speech():
    teacher = load_teacher("mini")
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert sum(p.numel() for p in teacher.parameters()) == 5_622_912
    quiet = torch.randn(1, 8000)
    scaled = teacher(0.01 * quiet).last_hidden_state
    torch.testing.assert_close(scaled, teacher(quiet).last_hidden_state, atol=2e-3, rtol=0)  # do_normalize


def test_a_fingerprint_tells_teachers_apart(teacher):
    before = fingerprint(teacher)
    assert fingerprint(teacher) == before
    teacher.norm.bias[0] += 1e-6
    assert fingerprint(teacher) != before


def test_a_model_without_mask_embedding_says_so():
    encoder = SpeechEncoder(dataclasses.replace(CONFIG, mask_embedding=False)).eval()
    x, mask = torch.randn(1, 500), torch.ones(1, CONFIG.frames(500), dtype=torch.bool)
    with pytest.raises(ArmhubertError, match="no mask embedding"):
        encoder(x, mask=mask)
    with pytest.raises(ArmhubertError, match="no mask embedding"):
        teacher_targets(encoder, x, None, mask, (1,))
    targets = teacher_targets(encoder, x, None, None, (4,), masking=False, clean=True)  # the plain loss needs no mask
    torch.testing.assert_close(targets.clean[0], encoder(x).hidden_states[4])


def test_views_that_are_not_asked_for_are_not_computed(teacher):
    batches = []
    teacher.layers[0].register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    mask = torch.zeros(2, CONFIG.frames(500), dtype=torch.bool)
    x = torch.randn(2, 500)
    plain = teacher_targets(teacher, x, None, mask, (1, 3), masking=False, inputs=True)
    assert plain.masking is None
    assert plain.clean is None
    hidden = teacher(x).hidden_states
    for got, number in zip(plain.clean_inputs, (0, 2), strict=True):
        torch.testing.assert_close(got, hidden[number])
    teacher_targets(teacher, x, None, mask, (1,))
    assert batches == [2, 2, 4]  # one view, the comparison above, both views


def test_features_of_speech_err_no_more_where_bfloat16_attention_goes_by_pieces(monkeypatch):
    wave = read_audio(sorted(bundled.TEST_SPEECH.rglob("*.opus"))[0])[None]
    teacher = load_teacher("mini")
    true = teacher(wave).last_hidden_state
    teacher = teacher.bfloat16()

    def error(by_pieces: bool) -> float:
        monkeypatch.setattr(torch_reuse_attention, "_pieces_pay", lambda q, gradients: by_pieces and not gradients)
        return float((teacher(wave).last_hidden_state.float() - true).norm() / true.norm())

    pieces, fused = error(by_pieces=True), error(by_pieces=False)
    assert pieces != fused  # or both went one way
    assert pieces < 1.05 * fused
