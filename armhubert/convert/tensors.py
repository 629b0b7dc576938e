"""Tensors from files of strangers: safetensors, or pickles read without running anything in them."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from armhubert.convert.pickles import read_pickle
from armhubert.errors import ArmhubertError, brief, shown
from armhubert.settings import read_mapping


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder in Hugging Face's layout: model.safetensors, its shards, or pytorch_model.bin.

    Raises:
        ArmhubertError: no weights, damaged weights, or an index that points outside the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
    raise ArmhubertError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, whole or sharded")


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors or .bin file."""
    if path.suffix == ".safetensors" or is_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        # its parser's errors are its own class, and torch's where a declared type does not exist
        except Exception as error:
            reason = brief(error)
            raise ArmhubertError(f"{path} is damaged or no safetensors file: {reason}") from None
    return tensors_of(read_pickle(path, stand_ins=True), path)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then JSON."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError as error:
        raise ArmhubertError(f"cannot read {path}: {error.strerror}") from None


def tensors_of(state: Any, path: Path) -> dict[str, Tensor]:
    """`state`, read from `path`, as a mapping from names to tensors of its own memory.

    Raises:
        ArmhubertError: anything else in it, or tensors that together are far larger than the file.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ArmhubertError(f"{path} must hold a mapping from names to tensors, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ArmhubertError(
                f"{path} must hold a mapping from names to tensors, got {shown(value)} under {name[:100]!r}"
            )
    total, held = sum(value.nbytes for value in state.values()), path.stat().st_size
    # Two names for one tensor are legitimate; hundreds would make a small file a large model.
    if total > 4 * held:
        raise ArmhubertError(f"{path} is damaged: its tensors take {total} bytes, and the file {held}")
    return {name: value.clone() for name, value in state.items()}


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    shards = read_mapping(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ArmhubertError(f"{index} must hold a weight_map from tensor names to files")
    state: dict[str, Tensor] = {}
    for name in sorted({str(shard) for shard in shards.values()}):
        if not re.fullmatch(r"[\w.-]{1,200}\.(safetensors|bin)", name, re.ASCII):
            raise ArmhubertError(
                f"{index} names {name!r:.100}: shards must be .safetensors or .bin files in the same folder"
            )
        if not (folder / name).is_file():
            raise ArmhubertError(f"{folder} lacks {name}, which its index names")
        state.update(read_file(folder / name))
    return state


def renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    """`name` by the first (pattern, replacement) that matches it whole; itself, to be refused by the model, if none."""
    for pattern, ours in table:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return name


@contextlib.contextmanager
def complete(source: Path) -> Iterator[None]:
    """Where a tensor is looked up by name, one that is missing is the fault of its `source`."""
    try:
        yield
    except KeyError as error:
        raise ArmhubertError(f"{source} lacks {error.args[0]}: its weights do not fit its configuration") from None


def fused_qkv(state: Mapping[str, Tensor], prefix: str, kind: str) -> Tensor:
    """Query, key and value projections of one layer as one [3D, D] weight or [3D] bias."""
    parts = [state[f"{prefix}{letter}_proj.{kind}"] for letter in "qkv"]
    if len({part.shape for part in parts}) > 1 or parts[0].ndim != (2 if kind == "weight" else 1):
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise ArmhubertError(f"{prefix}[qkv]_proj.{kind} must be three matrices or vectors of one shape, got {shapes}")
    return torch.cat(parts)
