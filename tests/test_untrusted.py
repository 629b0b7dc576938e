"""Files of strangers: whatever they hold, they load or are one line; nothing runs, hangs, or takes memory."""

import argparse
import io
import json
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from armhubert import ArmhubertError, load_teacher
from armhubert.bench import fuzz
from armhubert.convert import load_weights
from armhubert.convert.pickles import StandIn, read_pickle
from armhubert.settings import read_mapping


@pytest.fixture
def seeds(tmp_path) -> dict[str, fuzz.Seed]:
    return {seed.kind: seed for seed in fuzz.write_seeds(tmp_path / "seeds")}


def refused(source: Path, rule: str | None = None) -> str:
    with pytest.raises(ArmhubertError, match=rule) as caught:
        load_teacher(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def archive(main: bytes, method: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr("archive/data.pkl", main)
        for name, content in entries.items():
            file.writestr(f"archive/{name.replace('_', '/')}", content)
    return buffer.getvalue()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory limit is set by what /proc tells")
def test_hundreds_of_mutants_of_every_format_do_nothing_but_load_or_be_refused():
    outcomes = fuzz.in_own_process(315, seed=1)
    assert [one for one in outcomes if one.outcome not in ("refused", "loaded")] == []
    kinds = Counter((one.kind, one.outcome) for one in outcomes)
    binary, text = {"safetensors", "bin", "fairseq pt", "legacy pt", "ckpt"}, {"config.json", "yaml", "index.json"}
    assert {kind for kind, _ in kinds} == binary | text | {"our config.json"}
    assert all(kinds[kind, "refused"] > 5 for kind, _ in kinds)
    assert sum(n for (_, outcome), n in kinds.items() if outcome == "loaded") > 10


def test_the_valid_files_load(seeds):
    for seed in seeds.values():
        assert load_teacher(seed.source).config.width == 16


class Runs:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class Restores:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return argparse.Namespace, (), {"touched": Runs(os.mkdir, self.path)}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_does_not_run_even_where_the_model_loads(legacy, tmp_path):
    canary = tmp_path / "executed"
    content = {
        "args": argparse.Namespace(normalize=False, **fuzz._FAIRSEQ),
        "model": fuzz.fairseq_state(),
        "a": Runs(os.system, f"touch {canary}"),
        "b": Runs(eval, f"__import__('os').mkdir({str(canary)!r})"),
        "c": Runs(exec, f"open({str(canary)!r}, 'w')"),
        "d": Runs(subprocess.Popen, ["touch", str(canary)]),
        "e": Runs(torch.load, "/dev/zero"),
        "f": Restores(canary),
        "g": Runs(getattr, Runs(__import__, "os"), "system"),
    }
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    assert load_teacher(tmp_path / "m.pt").config.width == 16
    got = read_pickle(tmp_path / "m.pt", stand_ins=True)
    assert all(isinstance(got[name], StandIn) for name in "abcdefg")
    assert not canary.exists()
    torch.save({**content, "model": Runs(os.mkdir, str(canary))}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "no model that is known")
    torch.save({**content, "model": {"x": Runs(os.mkdir, str(canary))}}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", r"got <posix\.mkdir> under 'x'")
    assert not canary.exists()


def test_every_hostile_program_of_the_fuzzer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for _ in range(50):
        program = fuzz.hostile_pickle(rng)
        for data in (archive(program), fuzz._hostile_legacy(rng)):
            Path("m.pt").write_bytes(data)
            refused(Path("m.pt"))
    assert os.listdir() == ["m.pt"]


def test_a_compressed_archive_is_refused_unread(tmp_path):
    (tmp_path / "m.pt").write_bytes(archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED, data_0=b"\0" * 2**24))
    assert (tmp_path / "m.pt").stat().st_size < 2**16
    refused(tmp_path / "m.pt", "compressed or encrypted")


def tensor_file(
    path: Path, *, numel: int, size: tuple, stride: tuple, offset: int = 0, held: int = 64, names: str = "x"
) -> Path:
    """A pickle that declares a tensor over `held` bytes under each of these letters."""

    class Declares(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if obj == "the storage" else None

    class Tensor:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, ("the storage", offset, size, stride, False, None)

    buffer = io.BytesIO()
    Declares(buffer, 2).dump({name: Tensor() for name in names})
    path.write_bytes(archive(buffer.getvalue(), data_0=b"\0" * held))
    return path


@pytest.mark.parametrize(
    "declared",
    [
        {"numel": 10**12, "size": (10**12,), "stride": (1,)},
        {"numel": 16, "size": (10**6, 10**6), "stride": (10**6, 1)},
        {"numel": 16, "size": (10**12,), "stride": (0,)},
        {"numel": 16, "size": (4, 5), "stride": (5, 1)},
        {"numel": 16, "size": (4,), "stride": (1,), "offset": 13},
        {"numel": 16, "size": (4,), "stride": (-1,), "offset": 8},
        {"numel": 16, "size": (2**62, 4), "stride": (1, 1)},
        {"numel": 16, "size": (1,) * 100, "stride": (1,) * 100},
        {"numel": 17, "size": (1,), "stride": (1,)},
        {"numel": -1, "size": (1,), "stride": (1,)},
        {"numel": 16, "size": (True,), "stride": (1,)},
    ],
)
def test_a_tensor_larger_than_its_place_in_the_file_is_refused(declared, tmp_path):
    with pytest.raises(ArmhubertError, match="damaged"):
        read_pickle(tensor_file(tmp_path / "m.pt", **declared))


def test_a_tensor_within_its_place_is_read(tmp_path):
    got = read_pickle(tensor_file(tmp_path / "m.pt", numel=16, size=(3, 4), stride=(4, 1), offset=4))
    assert torch.equal(got["x"], torch.zeros(3, 4))


def test_a_thousand_names_for_one_storage_are_refused(tmp_path):
    shared = torch.zeros(1000)
    state = fuzz.fairseq_state() | {f"encoder.x{i}": shared for i in range(1000)}
    torch.save({"cfg": {"model": fuzz._FAIRSEQ}, "model": state}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "its tensors take")
    shared = torch.zeros(100_000)
    torch.save({f"encoder.x{i}": shared[i:] for i in range(100)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(fuzz._CONFIG))
    refused(tmp_path, "its tensors take")


def test_copies_of_what_is_not_aligned_are_counted(tmp_path):
    refusals = []
    for names in ("abcdefgh", "abcdefghi", "abcdefghij", "abcdefghijk"):  # which moves what follows
        path = tensor_file(tmp_path / "m.pt", numel=10**5, size=(10**5,), stride=(1,), held=4 * 10**5, names=names)
        try:
            read_pickle(path)
        except ArmhubertError as refusal:
            refusals.append(str(refusal))
    assert len(refusals) == 3
    assert all("share memory out of step" in one for one in refusals)


def test_a_width_that_only_the_settings_claim_takes_no_memory(seeds):
    seed = seeds["config.json"]
    seed.file.write_text(json.dumps({**fuzz._CONFIG, "hidden_size": 2**20}))
    refused(seed.source, r"must have shape \[1048576")


def wide() -> list:
    """Ten times itself, forty times over: a few hundred bytes that no memory can write out."""
    value: list = []
    for _ in range(40):
        value = [value] * 10
    return value


def test_what_is_refused_is_shown_in_short(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fuzz._CONFIG))
    torch.save({"x": wide()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "under 'x'")
    deep = b"}X\1\0\0\0x" + b"]" * 3000 + b"a" * 2999 + b"s"
    (tmp_path / "pytorch_model.bin").write_bytes(archive(b"\x80\x04" + deep + b"."))
    refused(tmp_path, "under 'x'")
    torch.save({"x": 10**5000}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "an instruction that no checkpoint uses")


@pytest.mark.parametrize("name", ["conv_feature_layers", "extractor_mode", "layer_type", "conv_pos", "pos_conv_depth"])
@pytest.mark.parametrize("value", [wide(), torch.ones(3)], ids=["wide", "tensor"])
def test_settings_that_no_checkpoint_has_are_one_line(name, value, tmp_path):
    torch.save({"cfg": {"model": {**fuzz._FAIRSEQ, name: value}}, "model": fuzz.fairseq_state()}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", " must be ")


@pytest.mark.parametrize(
    "program",
    [
        b"}" + b")\x85" + b"\x85" * 100_000 + b"K\1s",  # hashing it would overflow the interpreter's stack
        b"]" * 100_000 + b"a" * 99_999,
        b"\x96" + struct.pack("<Q", 2**40) + b"x",
        b"Nr\xff\xff\xff\x7f",
        b"\x8e" + struct.pack("<Q", 2**62),
        b"}" * 4_500_000,
    ],
    ids=["deep key", "deep list", "bytearray", "memo", "bytes", "long"],
)
def test_programs_that_hurt_other_machines(program, tmp_path):
    (tmp_path / "m.pt").write_bytes(archive(b"\x80\x04" + program + b"."))
    refused(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/dev/zero", "/etc/passwd.bin", "a\0.safetensors", "..", "", "x" * 300 + ".bin", "a/../b.bin"],
)
def test_a_shard_outside_its_folder_is_refused(seeds, name):
    seed = seeds["index.json"]
    index = json.loads(seed.file.read_text())
    index["weight_map"]["masked_spec_embed"] = name
    seed.file.write_text(json.dumps(index))
    refused(seed.source, "in the same folder")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(60)), "aliases"),
        ("a: &a [x]\nb: *a\n", "aliases"),
        ("a: 1" + ":59" * 50_000, "100 digits"),
        ("a: " + "9" * 5000, "100 digits"),
        ("a: " + "[" * 100_000, "valid YAML"),
        ("a: !!python/object/apply:os.system ['touch executed']", "valid YAML"),
        ("a: " + "x" * 2**18, "at most 262144 bytes"),
        ("a: !!bool maybe", "valid YAML"),
        ("a: !!int ''", "valid YAML"),
        ("a: !!timestamp x", "valid YAML"),
        ("- a\n", "must hold a mapping"),
    ],
)  # fmt: skip
def test_yaml_that_is_larger_inside_than_outside_is_one_line(text, rule, tmp_path):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ArmhubertError, match=rule) as caught:
        read_mapping(tmp_path / "m.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 300 + "/y", "/dev/zero", "/dev/null"])
def test_names_that_no_file_has_are_one_line(name):
    with pytest.raises(ArmhubertError) as caught:
        load_weights(name)
    assert "\n" not in str(caught.value)
