import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from armhubert import ARMHuBERT
from armhubert.config import EncoderConfig, armhubert, mini, parse_conv_layers, parse_pattern, preset
from armhubert.errors import ArmhubertError
from armhubert.settings import build
from armhubert.student import count_parameters


@pytest.mark.parametrize(
    ("name", "total", "without_heads"),
    [
        ("armhubert", 26_448_448, 22_015_552),
        ("armhubert-s", 22_394_080, 18_403_552),
        ("armwavlm-s", 22_394_080, 18_403_552),
        ("maskhubert", 26_635_840, 22_202_944),
    ],
)
def test_presets_have_the_published_parameter_counts(name, total, without_heads):
    with torch.device("meta"):
        model = ARMHuBERT(preset(name))
    assert count_parameters(model) == (total, without_heads)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ArmhubertError, match=r"unknown preset 'armhubrt'; did you mean 'armhubert'\?"):
        preset("armhubrt")


@pytest.mark.parametrize("text", ["CRCR", "crcr", "compute,reuse,compute,reuse", "C, R, C, R", "2by2"])
def test_patterns_have_several_spellings(text):
    assert parse_pattern(text, 4) == "CRCR"


def test_patterns_may_reuse_one_map_many_times_and_default_to_computing_all():
    assert parse_pattern("3by2", 6) == "CRRCRR"
    assert parse_pattern("", 3) == "CCC"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("RCCC", "must compute"),
        ("CR", "one letter a layer"),
        ("CXCX", "made of C"),
        ("0by4", "at least 1"),
        ("2by9", "4 layers"),
        ("2by99999999", "4 layers"),  # refused before it is written out
        ("2by" + "9" * 5000, "made of C"),
        (",", "one letter a layer"),
    ],
)
def test_a_bad_pattern_is_refused_with_its_rule(text, rule):
    with pytest.raises(ArmhubertError, match=rule):
        parse_pattern(text, 4)


def test_conv_stacks_are_read_as_fairseq_writes_them():
    expected = ((128, 10, 5), (256, 1, 1), *((256, 3, 2),) * 4, (480, 1, 1), *((480, 2, 2),) * 2)
    text = "[(128, 10, 5)] + [(256, 1, 1)] + [(256, 3, 2)] * 4 + [(480, 1, 1)] + [(480, 2, 2)] * 2"
    assert parse_conv_layers(text) == expected == armhubert().conv_layers
    assert parse_conv_layers("[(8,10,5),(8,3,2)]") == ((8, 10, 5), (8, 3, 2))


@pytest.mark.parametrize(
    "text", ["__import__('os').system('x')", "[(1,2,3)]*1000000", "[(1,2)]", "", "[(1,2,3)] * 4 * 4", "(" * 3000, "[]"]
)
def test_anything_else_in_a_conv_stack_is_refused(text):
    with pytest.raises(ArmhubertError, match="conv_layers must read like"):
        parse_conv_layers(text)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"width": 162}, "divisible by heads"),
        ({"heads": 0}, "at least 1"),
        ({"conv_norm": "batch"}, "conv_norm must be 'group' or 'layer', got 'batch'"),
        ({"attention_mode": "typo"}, "attention_mode must be 'exact' or 'resoftmax'"),
        ({"position_groups": 7}, "divisible by position_groups"),
        ({"conv_layers": ()}, "at least one"),
        ({"conv_layers": ((0, 1, 1),)}, "1 or more"),
        ({"width": 192}, "feature_projection"),
        ({"position_buckets": 320}, "no relative position bias"),
        ({"dropout": 1.0}, "below 1"),
        ({"projection_width": 0}, "projection_width"),
        ({"projection_width": 2**21}, "projection_width"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"layers": 10**18}, "at most 1000"),
        ({"width": 10**18}, "at most 1048576"),
        ({"conv_layers": ((8, 10**12, 1),)}, "at most 1048576"),
        ({"conv_layers": ((8, 10),)}, "conv_layers must be a list of 3, got"),
        ({"conv_layers": "[(8, 10, 5)]"}, "conv_layers must be a list, got"),
        ({"layers": 6.5}, "layers must be a whole number, got 6.5"),
        ({"dropout": "much"}, "dropout must be a number, got 'much'"),
        ({"mask_embedding": 1}, "mask_embedding must be true or false, got 1"),
        ({"pattern": "RCRCRC"}, "must compute"),
        ({"pattern": "", "position_buckets": -1}, "position_buckets must be 0 or at least 4"),
        ({"pattern": "", "position_buckets": 2}, "position_buckets must be 0 or at least 4"),
        ({"pattern": "", "position_buckets": 320, "position_max_distance": 80}, "above a quarter"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"norm_eps": float("nan")}, "norm_eps must be a finite number"),
        ({"attention_dropout": float("nan")}, "finite"),
    ],
)
def test_settings_that_make_no_model_are_refused(changes, rule):
    with pytest.raises(ArmhubertError, match=rule) as caught:
        dataclasses.replace(mini(), **changes)
    assert "\n" not in str(caught.value)


def test_a_configuration_survives_json():
    data = json.loads(json.dumps(dataclasses.asdict(mini())))
    assert build(EncoderConfig, data, "x") == mini()


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(400, 9000))
def test_frames_are_what_the_convolutions_give(samples):
    x = torch.zeros(1, 1, samples)
    for _, kernel, stride in armhubert().conv_layers:
        x = F.conv1d(x, torch.zeros(1, 1, kernel), stride=stride)
    assert armhubert().frames(samples) == x.shape[-1]
    assert armhubert().frames(torch.tensor([samples])).tolist() == [x.shape[-1]]
    assert (armhubert().receptive_field, armhubert().hop) == (400, 320)
