import dataclasses
import inspect
import json
import pydoc
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from armhubert import ARMHuBERT
from armhubert.config import (
    MAX_JSON,
    MAX_YAML,
    EncoderConfig,
    armhubert,
    build,
    mini,
    parse_conv_layers,
    parse_pattern,
    preset,
    read_mapping,
)
from armhubert.distill_config import DistillConfig
from armhubert.errors import ArmhubertError
from armhubert.export import ExportConfig
from armhubert.extract import ExtractConfig
from armhubert.profile import ProfileConfig
from armhubert.student import count_parameters
from armhubert.superb.config import EvaluateConfig


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 3}, r"unknown key 'widht' in file; did you mean 'width'\?"),
        ({"ff": 3}, r"did you mean 'ffn'"),
        ({"ad": 0.5}, r"did you mean 'activation_dropout'"),
        ({"width": "wide"}, "width in file must be a whole number, got 'wide'"),
        ({"width": 1.5}, "whole number"),
        ({"width": True}, "whole number"),
        ({"width": 10**400}, "whole number"),
        ({"dropout": "nan"}, "must be a number"),
        ({"dropout": float("inf")}, "must be a number"),
        ({"conv_norm": "batch"}, "'group' or 'layer'"),
        ({"conv_layers": [[1, 2]]}, "list of 3"),
        ({"conv_bias": "yes"}, "true or false"),
    ],
)
def test_a_configuration_file_is_read_strictly(change, message):
    with pytest.raises(ArmhubertError, match=message):
        build(EncoderConfig, dataclasses.asdict(mini()) | change, "file")


def test_numbers_written_as_text_are_numbers():
    assert build(EncoderConfig, dataclasses.asdict(mini()) | {"norm_eps": "1e-4"}, "file").norm_eps == 1e-4


def test_settings_given_in_python_may_be_paths_and_numpys_numbers():
    config = DistillConfig(out=Path("a") / "b", data=(Path("c"),), steps=np.int64(5), warmup=np.float32(0.25))
    assert (config.out, config.data, config.steps, config.warmup) == ("a/b", ("c",), 5, 0.25)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["steps"] == 5


@pytest.mark.parametrize(
    "settings", [EncoderConfig, DistillConfig, EvaluateConfig, ExportConfig, ExtractConfig, ProfileConfig]
)
def test_help_tells_what_every_setting_means(settings):
    text = inspect.getdoc(settings)
    for field in dataclasses.fields(settings):
        assert re.search(rf"^    {field.name}: \S", text, re.MULTILINE), field.name
    assert "Attributes:" in pydoc.plain(pydoc.render_doc(settings))


def test_one_name_stands_for_a_list_of_one():
    assert DistillConfig(data="speech").data == ("speech",)
    assert build(EvaluateConfig, {"train": "dev-clean", "data": "."}, "x").train == ("dev-clean",)


def test_missing_settings_are_named():
    with pytest.raises(ArmhubertError, match="file lacks conv_layers, ffn, heads, layers, width"):
        build(EncoderConfig, {}, "file")


@pytest.mark.parametrize("content", ["!!python/object/apply:os.system [echo]", "a: [", "- 1", "\x00"])
def test_a_configuration_file_that_is_hostile_or_no_mapping_is_one_line(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ArmhubertError) as caught:
        read_mapping(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "most"), [("c.json", MAX_JSON), ("c.yaml", MAX_YAML)])
def test_a_file_that_is_too_large_is_not_parsed(tmp_path, name, most):
    with open(tmp_path / name, "wb") as file:
        file.truncate(most + 1)
    with pytest.raises(ArmhubertError, match=f"must have at most {most} bytes, got {most + 1}"):
        read_mapping(tmp_path / name)


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(400, 9000))
def test_frames_are_what_the_convolutions_give(samples):
    x = torch.zeros(1, 1, samples)
    for _, kernel, stride in armhubert().conv_layers:
        x = F.conv1d(x, torch.zeros(1, 1, kernel), stride=stride)
    assert armhubert().frames(samples) == x.shape[-1]
    assert armhubert().frames(torch.tensor([samples])).tolist() == [x.shape[-1]]
    assert (armhubert().receptive_field, armhubert().hop) == (400, 320)
