import dataclasses
import inspect
import json
import pydoc
import re
from pathlib import Path

import numpy as np
import pytest

from armhubert.config import EncoderConfig, mini
from armhubert.distill_config import DistillConfig
from armhubert.errors import ArmhubertError
from armhubert.export import ExportConfig
from armhubert.extract import ExtractConfig
from armhubert.profile import ProfileConfig
from armhubert.settings import MAX_JSON, MAX_YAML, build, read_mapping
from armhubert.superb.config import EvaluateConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 3}, r"unknown key 'widht' in file; did you mean 'width'\?"),
        ({"ff": 3}, r"did you mean 'ffn'"),
        ({"ad": 0.5}, r"did you mean 'activation_dropout'"),
        ({"width": "wide"}, "width in file must be a whole number, got 'wide'"),
        ({"width": 1.5}, "whole number"),
        ({"width": True}, "whole number"),
        ({"width": 10**400}, r"width in file must be below 2\*\*63, got 1000"),
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


@pytest.mark.parametrize("seed", [2**53 + 1, 5249979066121302517, 2**63 - 1])
def test_whole_numbers_that_no_float_holds_are_kept(seed):
    for value in (seed, str(seed), np.int64(seed)):
        assert DistillConfig(seed=value).seed == seed


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
