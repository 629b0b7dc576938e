"""Features on disk: computed once, mapped into memory by every later epoch, run and task.

    <folder>/<identity of the upstream>/upstream.json       whose features these are
                                        index.jsonl         one line an item: its digest, shard, offset, frames
                                        00000.fp16, ...     [L, T, D] of each item, one after the other

Data come before their line in the index, so an interrupted run leaves only bytes that nothing points to.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armhubert.errors import ArmhubertError
from armhubert.files import append_lines, held, write_atomic
from armhubert.superb.upstream import Upstream

FORMAT = 1
SHARD_BYTES = 1 << 30
_META, _INDEX = "upstream.json", "index.jsonl"


class _Place(NamedTuple):
    shard: int
    offset: int
    """Bytes."""
    frames: int


class Plan(NamedTuple):
    """What filling the cache would write."""

    items: int
    """Not yet there."""
    bytes: int
    free: int
    """Bytes on the disk."""
    folder: Path


class FeatureCache:
    """The features of one upstream.

    Args:
        folder: of all caches; this upstream's lie in a folder of it, called by its identity.
        upstream: whose features they are.

    Raises:
        ArmhubertError: the folder holds another upstream's features, or another process writes into it.
    """

    def __init__(self, folder: Path, upstream: Upstream) -> None:
        if not upstream.identity:
            raise ArmhubertError(
                f"features of {upstream.source} cannot be cached: give its object an attribute `identity` that changes "
                "with its features, or leave out cache=..."
            )
        self.folder = folder / upstream.identity
        self.count, self.width = upstream.count, upstream.width
        self._check(upstream)
        self._maps: dict[int, NDArray[np.float16]] = {}
        self._index = self._read_index()

    def _check(self, upstream: Upstream) -> None:
        mine: dict[str, Any] = {
            "format": FORMAT, "identity": upstream.identity, "features": upstream.features,
            "layers": upstream.count, "width": upstream.width, "hop": upstream.hop,
        }  # fmt: skip
        path = self.folder / _META
        if path.is_file():
            try:
                found = json.loads(path.read_text("utf-8"))
            except (OSError, ValueError):
                found = {}
            if not isinstance(found, dict) or {name: found.get(name) for name in mine} != mine:
                raise ArmhubertError(
                    f"{self.folder} holds features of another model ({found.get('source') if found else 'damaged'}): "
                    "remove it, or name another folder with cache=..."
                )
            return
        write_atomic(path, json.dumps({**mine, "source": upstream.source}, indent=2) + "\n")

    def __contains__(self, digest: str) -> bool:
        return digest in self._index

    def plan(self, digests: Sequence[str], frames: Sequence[int]) -> Plan:
        """What it takes to hold all these items."""
        missing = {digest: count for digest, count in zip(digests, frames, strict=True) if digest not in self._index}
        size = sum(missing.values()) * self.count * self.width * 2
        return Plan(len(missing), size, shutil.disk_usage(self.folder).free, self.folder)

    def read(self, digest: str) -> Tensor:
        """[L, T, D] of an item that is in the cache, in fp16 as it is stored."""
        place = self._index[digest]
        if place.shard not in self._maps:
            self._maps[place.shard] = np.memmap(self._shard(place.shard), np.float16, mode="r")
        start = place.offset // 2
        size = self.count * place.frames * self.width
        flat = np.array(self._maps[place.shard][start : start + size])
        return torch.from_numpy(flat).view(self.count, place.frames, self.width)

    @contextlib.contextmanager
    def writer(self) -> Iterator["_Writer"]:
        """Adds items; one process at a time."""
        with held(self.folder):
            self._index = self._read_index()  # another process may have added to it
            writer = _Writer(self)
            try:
                yield writer
            finally:
                writer.close()
                self._maps.clear()
                self._index = self._read_index()

    def _shard(self, number: int) -> Path:
        return self.folder / f"{number:05d}.fp16"

    def _read_index(self) -> dict[str, _Place]:
        index: dict[str, _Place] = {}
        sizes: dict[int, int] = {}
        path = self.folder / _INDEX
        if not path.is_file():
            return index
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                digest, *numbers = json.loads(line)
                place = _Place(*map(int, numbers))
                if not isinstance(digest, str) or min(place) < 0:
                    continue
            except (ValueError, TypeError):
                continue  # torn by an interruption
            if place.shard not in sizes:
                shard = self._shard(place.shard)
                sizes[place.shard] = shard.stat().st_size if shard.is_file() else 0
            if place.offset + 2 * self.count * place.frames * self.width <= sizes[place.shard]:
                index[digest] = place
        return index


class _Writer:
    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        ends = [(p.shard, p.offset + 2 * cache.count * p.frames * cache.width) for p in cache._index.values()]
        self.number, self.position = max(ends, default=(0, 0))
        self.index = _open(cache.folder / _INDEX, append_lines)
        self.shard = self._open_shard()

    def _open_shard(self) -> Any:
        path = self.cache._shard(self.number)
        file = _open(path, partial(open, mode="r+b" if path.is_file() else "w+b"))
        file.truncate(self.position)
        file.seek(self.position)
        return file

    def add(self, digest: str, states: Tensor) -> None:
        """One item, [L, T, D].

        Raises:
            ArmhubertError: the disk is full, or a feature is beyond what fp16 holds.
        """
        half = states.to("cpu", torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ArmhubertError(
                f"features reach {float(states.abs().max()):.3g}, beyond the 65504 of fp16: run without cache=..."
            )
        try:
            if self.position >= SHARD_BYTES:
                self._flush()
                self.shard.close()
                self.number, self.position = self.number + 1, 0
                self.shard = self._open_shard()
            data = half.contiguous().numpy().tobytes()
            self.shard.write(data)
            self.shard.flush()
            place = _Place(self.number, self.position, states.shape[1])
            self.index.write(json.dumps([digest, *place]).encode() + b"\n")
            self.position += len(data)
        except OSError as error:
            raise ArmhubertError(
                f"cannot write features in {self.cache.folder}: {error.strerror}; what was written stays usable"
            ) from None

    def _flush(self) -> None:
        self.shard.flush()
        os.fsync(self.shard.fileno())
        self.index.flush()

    def close(self) -> None:
        """Flush; a full disk has been told by `add`."""
        with contextlib.suppress(OSError):
            self._flush()
        for file in (self.shard, self.index):
            with contextlib.suppress(OSError):
                file.close()


def _open(path: Path, way: Callable[[Path], Any]) -> Any:
    try:
        return way(path)
    except OSError as error:
        raise ArmhubertError(f"cannot write {path}: {error.strerror}; choose another folder with cache=...") from None
