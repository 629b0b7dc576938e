import contextlib
import errno
import json
import multiprocessing
import time

import pytest
import torch

from armhubert.errors import ArmhubertError
from armhubert.files import held
from armhubert.superb import cache as cache_module
from armhubert.superb.cache import FeatureCache
from armhubert.superb.upstream import load_upstream


@pytest.fixture(scope="module")
def upstream():
    return load_upstream("mfcc")


def rows(count, frames=7):
    generator = torch.Generator().manual_seed(0)
    return {f"item{n}": torch.randn(1, frames + n, 39, generator=generator) for n in range(count)}


def fill(cache, items):
    with cache.writer() as writer:
        for digest, states in items.items():
            writer.add(digest, states)


def test_reads_what_was_written_over_several_shards(tmp_path, upstream, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 2000)
    items = rows(6)
    fill(FeatureCache(tmp_path, upstream), items)
    cache = FeatureCache(tmp_path, upstream)
    assert len(list(cache.folder.glob("*.fp16"))) > 1
    for digest, states in items.items():
        assert digest in cache
        assert torch.equal(cache.read(digest), states.half())
        assert cache.read(digest).dtype == torch.float16
    assert cache.plan(list(items), [7] * 6).items == 0


def test_a_torn_write_is_overwritten(tmp_path, upstream):
    items = rows(4)
    cache = FeatureCache(tmp_path, upstream)
    fill(cache, dict(list(items.items())[:2]))
    index, shard = cache.folder / "index.jsonl", cache.folder / "00000.fp16"
    with open(index, "a") as file:
        file.write('["item2", 0, ')
    with open(shard, "ab") as file:
        file.write(b"\x01" * 333)
    again = FeatureCache(tmp_path, upstream)
    assert "item2" not in again
    fill(again, dict(list(items.items())[2:]))
    for digest, states in items.items():
        assert torch.equal(FeatureCache(tmp_path, upstream).read(digest), states.half())


def test_a_shard_cut_short_loses_only_what_is_gone(tmp_path, upstream):
    items = rows(3)
    cache = FeatureCache(tmp_path, upstream)
    fill(cache, items)
    shard = cache.folder / "00000.fp16"
    shard.write_bytes(shard.read_bytes()[:-10])
    again = FeatureCache(tmp_path, upstream)
    assert "item1" in again
    assert "item2" not in again


def test_features_of_another_model_are_refused(tmp_path, upstream):
    cache = FeatureCache(tmp_path, upstream)
    meta = json.loads((cache.folder / "upstream.json").read_text())
    (cache.folder / "upstream.json").write_text(json.dumps({**meta, "identity": "other", "source": "hubert"}))
    with pytest.raises(ArmhubertError, match=r"features of another model \(hubert\)"):
        FeatureCache(tmp_path, upstream)


def test_one_writer_at_a_time(tmp_path, upstream):
    cache = FeatureCache(tmp_path, upstream)
    with cache.writer(), pytest.raises(ArmhubertError, match="another process is at work"), cache.writer():
        pass


def test_features_beyond_fp16_are_refused(tmp_path, upstream):
    cache = FeatureCache(tmp_path, upstream)
    with cache.writer() as writer, pytest.raises(ArmhubertError, match="beyond the 65504 of fp16"):
        writer.add("big", torch.full((1, 3, 39), 1e6))


def test_a_folder_is_not_held_by_forks_that_outlive_its_holder(tmp_path):
    pytest.importorskip("fcntl")
    forking = multiprocessing.get_context("fork")
    begun = forking.Event()
    with held(tmp_path):
        fork = forking.Process(target=lambda: (begun.set(), time.sleep(60)))
        fork.start()
        assert begun.wait(60)
        with pytest.raises(ArmhubertError, match="another process is at work"), held(tmp_path):
            pass
    try:
        with held(tmp_path):
            assert fork.is_alive()
    finally:
        fork.kill()
        fork.join()


@pytest.mark.parametrize("strict", [True, False])
def test_a_drive_without_locks(strict, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refused(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    expected = pytest.raises(ArmhubertError, match="cannot be locked") if strict else contextlib.nullcontext()
    with expected, held(tmp_path, strict=strict):
        assert not strict
