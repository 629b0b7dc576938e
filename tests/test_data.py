import json
import multiprocessing
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from armhubert import data
from armhubert.audio import Measured, read_audio
from armhubert.data import Crop, Scan, Skipped, Utterance, batches, discover, padding_waste, plan_epoch
from armhubert.errors import ArmhubertError


def write(path: Path, seconds: float = 0.5, rate: int = 16_000, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate))
    soundfile.write(path, wave, rate)
    return path


def scan(paths, progress=lambda *at: None, **settings) -> Scan:
    steps = data.scan(paths, **settings)
    while True:
        try:
            progress(*next(steps))
        except StopIteration as end:
            return end.value


def message(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# discover


def test_folders_are_searched_sorted_and_hidden_files_left_out(tmp_path):
    for name in ("b/2.FLAC", "b/1.opus", "a/84/121/84-121-0001.flac", "z.Mp3", "c.oga"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("b/._1.opus", "b/1.txt", "a/84/121/84-121.trans.txt", "list.tsv"):
        (tmp_path / name).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/x.wav").touch()
    found = discover([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a/84/121/84-121-0001.flac", "b/1.opus", "b/2.FLAC", "c.oga", "z.Mp3",
    ]  # fmt: skip


def test_a_file_is_found_once_whatever_leads_to_it(tmp_path, monkeypatch):
    real = tmp_path / "real"
    (real / "deep").mkdir(parents=True)
    (real / "deep/a.wav").touch()
    (real / "b.wav").touch()
    (real / "link.wav").symlink_to(real / "b.wav")
    (real / "deep/loop").symlink_to(real)
    (tmp_path / "other").symlink_to(real)
    (tmp_path / "list.tsv").write_text(f"{tmp_path / 'other'}\nb.wav\t100\ndeep/../b.wav\t100\n")
    monkeypatch.chdir(tmp_path)
    found = discover(["real", "other", real / "b.wav", "list.tsv", "other/deep"])
    assert found == [real / "b.wav", real / "deep/a.wav"]


def test_manifests(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "fairseq.tsv").write_text("clips\na.wav\t16000\n\nsub dir/b.flac\t5\n")
    (tmp_path / "common.tsv").write_bytes(
        '\ufeffid\tpath\tsentence\r\n1\tclips/c.mp3\tsay "hi\r\n2\t/abs/d.mp3\t\r\n'.encode()
    )
    (tmp_path / "one.tsv").write_text("audio\ne.wav\n")
    (tmp_path / "nemo.jsonl").write_text(
        '{"audio_filepath": "clips/f.wav", "duration": 1.5}\n\n{"path": "g.wav"}\n'
        '{"audio": "/abs/h\u2028.wav", "text": "x"}\n'
    )
    found = discover([tmp_path / name for name in ("fairseq.tsv", "common.tsv", "one.tsv", "nemo.jsonl")])
    assert [os.path.relpath(path, tmp_path) if path.is_relative_to(tmp_path) else str(path) for path in found] == [
        "clips/a.wav", "clips/sub dir/b.flac", "clips/c.mp3", "/abs/d.mp3", "e.wav",
        "clips/f.wav", "g.wav", "/abs/h\u2028.wav",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "line", "part"),
    [
        ("a.tsv", ".\na.wav\t10\nb.wav\n", 3, "a count of frames"),
        ("a.tsv", ".\na.wav\tlong\n", 2, "a count of frames"),
        ("a.tsv", "no/such/folder\na.wav\t10\n", 1, "existing folder or a header"),
        ("a.tsv", "id\ttext\n1\thello\n", 1, "existing folder or a header"),
        ("a.tsv", "\nid\tpath\n1\ta.wav\tmore\n", 3, "2 columns of the header, not 3"),
        ("a.tsv", "id\tpath\n1\t\n", 2, "not empty"),
        ("a.jsonl", '{"path": "a.wav"}\n{"path": \n', 2, "JSON object"),
        ("a.jsonl", '{"path": "\\ud800.wav"}\n', 1, "correct it"),
        ("a.jsonl", '"a.wav"\n', 1, "audio_filepath, path or audio"),
        ("a.jsonl", '{"file": "a.wav"}\n', 1, "audio_filepath, path or audio"),
        ("a.jsonl", '{"path": {"bytes": 1}}\n', 1, "must be a text"),
        ("a.jsonl", '{"path": "a\\u0000.wav"}\n', 1, "must be a text"),
    ],
)
def test_a_malformed_manifest_names_its_line(tmp_path, name, text, line, part):
    (tmp_path / name).write_text(text)
    with pytest.raises(ArmhubertError) as caught:
        discover([tmp_path / name])
    assert f"{tmp_path / name}:{line}: " in message(caught)
    assert part in message(caught)


def test_sources_that_are_no_data(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.tsv").write_bytes(b"path\n\xe9.wav\n")
    for name, part in (
        ("empty", "holds no audio"),
        ("notes.txt", "of no known kind"),
        ("nowhere", "does not exist"),
        ("empty.tsv", "lists no audio"),
        ("empty.jsonl", "lists no audio"),
        ("latin.tsv", "UTF-8"),
    ):
        with pytest.raises(ArmhubertError, match=part) as caught:
            discover([tmp_path / name])
        assert str(tmp_path / name) in message(caught)
    with pytest.raises(ArmhubertError, match="data must be given"):
        discover([])


# scan


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A data folder: three good files, and one each that is silent, short, text and empty."""
    folder = tmp_path / "data"
    write(folder / "a.wav", 0.5)
    write(folder / "b.flac", 1.0, 8_000)
    write(folder / "c.ogg", 0.25, 44_100)
    soundfile.write(folder / "silent.wav", np.zeros(8_000), 16_000)
    write(folder / "short.wav", 399 / 16_000)
    (folder / "text.wav").write_text("hello")
    (folder / "void.wav").touch()
    return folder


def listing(folder: Path) -> list[tuple]:
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in [folder, *sorted(folder.rglob("*"))]]


@pytest.mark.parametrize("threads", [1, 3])
def test_scan_counts_what_is_good_and_lists_what_is_not(mixed, tmp_path, monkeypatch, threads):
    monkeypatch.setattr(data, "SCAN_THREADS", threads)
    paths = [*discover([mixed]), mixed / "gone.wav"]
    before = listing(mixed)
    seen: list[tuple[int, int]] = []
    result = scan(paths, min_samples=400, cache=tmp_path / "out/cache.json", progress=lambda *at: seen.append(at))
    assert result.utterances == (
        Utterance(str(mixed / "a.wav"), 8_000),
        Utterance(str(mixed / "b.flac"), 16_000),
        Utterance(str(mixed / "c.ogg"), 4_000),
    )
    assert result.seconds == 1.75
    reasons = {Path(path).name: reason for path, reason in result.skipped}
    assert reasons.pop("text.wav").startswith("unreadable: ")
    assert reasons == {
        "silent.wav": "silent", "short.wav": "too short: 399 samples, at least 400",
        "void.wav": "empty", "gone.wav": "missing",
    }  # fmt: skip
    assert sorted(result.skipped_by_kind) == ["empty", "missing", "silent", "too short", "unreadable"]
    assert seen[-1] == (8, 8)
    data.write_skipped(result.skipped, tmp_path / "out/skipped.tsv")
    lines = (tmp_path / "out/skipped.tsv").read_text().splitlines()
    assert lines[0] == "path\treason"
    assert lines[1:] == [f"{path}\t{reason}" for path, reason in result.skipped]
    assert sorted(os.listdir(tmp_path / "out")) == ["cache.json", "skipped.tsv"]
    assert listing(mixed) == before


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the files that were decoded."""
    names: list[str] = []
    original = data.measure

    def counted(path: str) -> Measured:
        names.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(data, "measure", counted)
    return names


def test_the_cache_saves_decoding_and_notices_change(mixed, tmp_path, decoded):
    cache = tmp_path / "cache.json"
    paths = discover([mixed])
    first = scan(paths, min_samples=400, cache=cache)
    assert len(decoded) == 7
    decoded.clear()
    stamp = cache.stat().st_mtime_ns
    assert scan(paths, min_samples=400, cache=cache) == first
    assert decoded == ["text.wav"]  # what could not be read is tried again
    assert cache.stat().st_mtime_ns == stamp
    decoded.clear()
    assert len(scan(paths, min_samples=5_000, cache=cache).utterances) == 2  # another minimum, the same cache
    write(mixed / "a.wav", 0.75)
    os.utime(mixed / "b.flac", ns=(1, 1))
    decoded.clear()
    assert scan(paths, min_samples=400, cache=cache).utterances[0].samples == 12_000
    assert sorted(decoded) == ["a.wav", "b.flac", "text.wav"]
    decoded.clear()
    scan([write(tmp_path / "more/m.wav")], min_samples=400, cache=cache)
    scan([mixed / "a.wav", tmp_path / "more/m.wav"], min_samples=400, cache=cache)
    assert decoded == ["m.wav"]  # two data sets share a cache


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe{", b"[]", b"null", b"{}", b'{"format": "other"}', b"[" * 100_000,
        b'{"format": "armhubert scan 1", "files": []}',
        b'{"format": "armhubert scan 1", "files": {"x": [1, 2, 3]}}',
        b'{"format": "armhubert scan 1", "files": {"x": [1, 2, "3", ""]}}',
        b'{"format": "armhubert scan 1", "files": {"x": "abcd"}}',
    ],
)  # fmt: skip
def test_what_is_no_cache_of_ours_is_replaced(tmp_path, content, decoded):
    cache = tmp_path / "cache.json"
    path = write(tmp_path / "a.wav")
    cache.write_bytes(content)
    for _ in range(2):
        assert scan([path], min_samples=400, cache=cache).utterances == (Utterance(str(path), 8_000),)
    assert decoded == ["a.wav"]
    assert json.loads(cache.read_text())["files"].keys() == {str(path)}


def test_an_interrupted_scan_keeps_what_it_has(tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(data, "SCAN_THREADS", 1)
    paths = [write(tmp_path / f"{i:03}.wav", 0.05) for i in range(100)]

    steps = data.scan(paths, min_samples=400, cache=tmp_path / "cache.json")
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    saved = json.loads((tmp_path / "cache.json").read_text())["files"]
    assert len(saved) >= 16
    decoded.clear()
    scan(paths, min_samples=400, cache=tmp_path / "cache.json")
    assert len(decoded) == 100 - len(saved)


def test_a_long_scan_saves_what_it_has_as_it_goes(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{i:03}.wav", 0.05) for i in range(40)]
    monkeypatch.setattr(data, "SCAN_SAVED_EVERY", 0.0)
    monkeypatch.setattr(data, "SCAN_THREADS", 1)
    steps = data.scan(paths, min_samples=400, cache=tmp_path / "cache.json")
    reached = next(steps)
    assert len(json.loads((tmp_path / "cache.json").read_text())["files"]) == reached.done < len(paths)
    steps.close()


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArmhubertError, match=r"cannot write .*cache\.json") as caught:
        scan([write(tmp_path / "a.wav")], min_samples=400, cache=tmp_path / "file/cache.json")
    assert "choose another folder" in message(caught)


def test_file_names_that_are_not_text(tmp_path):
    name = os.fsdecode(b"\xff\tb.wav")
    write(tmp_path / "a.wav").rename(tmp_path / name)
    (tmp_path / "line\nbreak.wav").touch()
    result = scan(discover([tmp_path]), min_samples=9_000, cache=tmp_path / "cache.json")
    assert not result.utterances
    data.write_skipped(result.skipped, tmp_path / "skipped.tsv")
    assert (tmp_path / "skipped.tsv").read_bytes().count(b"\n") == 3
    assert b"\xff\\tb.wav\ttoo short" in (tmp_path / "skipped.tsv").read_bytes()
    assert scan(discover([tmp_path]), min_samples=400, cache=tmp_path / "cache.json").utterances


def test_nothing_left_is_an_error(tmp_path):
    nothing = Scan(
        (), (Skipped("a", "silent"), Skipped("b", "too short: 3 samples, at least 400"), Skipped("c", "silent"))
    )
    with pytest.raises(
        ArmhubertError, match=r"^data must .* 3 files .* \(2 silent, 1 too short, first 'a'\).*skipped\.tsv"
    ) as caught:
        nothing.require_utterances(tmp_path / "skipped.tsv")
    message(caught)
    Scan((Utterance("a", 400),), ()).require_utterances()


# plan


def utterances(size: int, seed: int = 0) -> list[Utterance]:
    lengths = np.random.default_rng(seed).integers(400, 30 * 16_000, size).tolist()
    return [Utterance(f"/d/{index}.wav", length) for index, length in enumerate(lengths)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("batch_seconds", "max_seconds"), [(40, 15), (40, None), (10, 15), (1000, 0.02), (1e-4, 7.3)])
def test_every_utterance_once_within_bounds_and_budget(batch_seconds, max_seconds, shuffle):
    known = utterances(500)
    plan = plan_epoch(known, batch_seconds=batch_seconds, max_seconds=max_seconds, seed=1, epoch=2, shuffle=shuffle)
    assert sorted(crop.utterance for batch in plan for crop in batch) == list(range(500))
    for batch in plan:
        assert len(batch) == 1 or max(crop.samples for crop in batch) * len(batch) <= batch_seconds * 16_000
        for index, start, count in batch:
            assert count == min(known[index].samples, int((max_seconds or 1e6) * 16_000))
            assert 0 <= start <= known[index].samples - count
    assert all(type(value) is int for value in plan[0][0])


def test_a_plan_is_a_function_of_its_arguments():
    known = utterances(300)

    def plan(**changes) -> list[list[Crop]]:
        return plan_epoch(known, **{"batch_seconds": 60.0, "max_seconds": 8.0, "seed": 1, "epoch": 0, **changes})

    def starts(plan: list[list[Crop]]) -> dict[int, int]:
        return {crop.utterance: crop.start for batch in plan for crop in batch}

    first = plan()
    assert plan() == first
    others = [plan(epoch=1), plan(seed=2), plan(seed=-1), plan(seed=2**80)]
    assert all(other != first for other in others)
    assert len({tuple(starts(other).values()) for other in others}) == 4
    assert starts(plan(batch_seconds=400.0)) == starts(plan(shuffle=False)) == starts(first)
    assert {frozenset(crop.utterance for crop in batch) for batch in first} != {
        frozenset(crop.utterance for crop in batch) for batch in plan(epoch=1)
    }
    assert [max(crop.samples for crop in batch) for batch in plan(shuffle=False)] == sorted(
        (max(crop.samples for crop in batch) for batch in plan(shuffle=False)), reverse=True
    )
    # Pinned: a resumed run, and another machine, must cut alike.
    assert [first[0][0], first[-1][-1]] == [Crop(12, 77_273, 128_000), Crop(271, 45_499, 128_000)]


def test_crops_are_spread_evenly():
    long = [Utterance(f"/{index}.wav", 20_001) for index in range(20_000)]
    plan = plan_epoch(long, batch_seconds=100, max_seconds=10_001 / 16_000, seed=0, epoch=0)
    starts = np.array([crop.start for batch in plan for crop in batch])
    assert starts.min() >= 0
    assert starts.max() <= 10_000
    assert np.abs(np.histogram(starts, 10, (0, 10_001))[0] - 2_000).max() < 200


def test_padding_waste():
    assert padding_waste([]) == 0
    assert padding_waste([[Crop(0, 0, 100), Crop(1, 0, 50)], [Crop(2, 0, 50)]]) == pytest.approx(50 / 250)
    plan = plan_epoch(utterances(3_000), batch_seconds=160, max_seconds=15, seed=0, epoch=0)
    assert 0 < padding_waste(plan) < 0.03


def test_planning_opens_no_file_draws_for_all_utterances_at_once_and_calls_little_for_each():
    known, calls = utterances(20_000), Counter()

    def count(frame, event, called):
        if event == "c_call":
            calls[called.__name__] += 1
        elif event == "call":
            calls[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        plan_epoch(known, batch_seconds=160, max_seconds=15, seed=0, epoch=0)
    finally:
        sys.setprofile(None)
    assert not calls.keys() & {"open", "stat", "default_rng", "read_audio", "measure"}
    assert calls["_uniform"] == 3
    assert calls.total() < 10 * len(known)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_lengths_that_are_no_lengths(value):
    with pytest.raises(ArmhubertError, match=f"batch_seconds .* not {value}"):
        plan_epoch(utterances(2), batch_seconds=value, max_seconds=None, seed=0, epoch=0)
    with pytest.raises(ArmhubertError, match=f"max_seconds .* not {value}"):
        plan_epoch(utterances(2), batch_seconds=1, max_seconds=value, seed=0, epoch=0)
    with pytest.raises(ArmhubertError, match="at least one usable utterance"):
        plan_epoch([], batch_seconds=1, max_seconds=1, seed=0, epoch=0)


def test_validation_is_held_out_by_name():
    known = utterances(400)
    training, validation = data.split_validation(known, fraction=0.1, seed=0)
    assert sorted(training + validation) == sorted(known)
    assert sum(held.samples for held in validation) == pytest.approx(0.1 * sum(u.samples for u in known), rel=0.15)
    assert [u for u in known if u in set(validation)] == validation
    moved = [Utterance(u.path.replace("/d/", "/e/").replace(".wav", ".flac"), u.samples) for u in reversed(known)]
    again = data.split_validation(moved, fraction=0.1, seed=0)[1]
    assert {Path(u.path).stem for u in again} == {Path(u.path).stem for u in validation}
    assert data.split_validation(known, fraction=0.1, seed=1)[1] != validation


def test_each_part_of_a_split_has_something():
    two = utterances(2)
    for fraction in (1e-9, 0.999):
        assert [len(part) for part in data.split_validation(two, fraction=fraction, seed=0)] == [1, 1]
    with pytest.raises(ArmhubertError, match="at least 2 usable utterances, not 1: give validation data, or turn"):
        data.split_validation(utterances(1), fraction=0.1, seed=0)
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(ArmhubertError, match="between 0 and 1"):
            data.split_validation(two, fraction=fraction, seed=0)


# batches


@pytest.fixture
def speech(tmp_path) -> list[Utterance]:
    for index in range(12):
        write(
            tmp_path / f"{index:02}.{('wav', 'flac', 'ogg')[index % 3]}",
            0.3 + 0.1 * index,
            (16_000, 44_100)[index % 2],
            index,
        )
    return list(scan(discover([tmp_path]), min_samples=400, cache=None).utterances)


def planned(known: list[Utterance]) -> list[list[Crop]]:
    return plan_epoch(known, batch_seconds=2.5, max_seconds=0.8, seed=0, epoch=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_was_planned(speech, workers):
    torch.ones(1, 8, 4_000).softmax(-1)  # a thread pool in the parent, which a fork does not inherit
    plan = planned(speech)
    assert len(plan) > 3
    got = list(batches(speech, plan, workers=workers))
    assert len(got) == len(plan)
    for batch, crops in zip(got, plan, strict=True):
        assert batch.indices.tolist() == [crop.utterance for crop in crops]
        assert batch.lengths.tolist() == [crop.samples for crop in crops]
        assert batch.indices.dtype == batch.lengths.dtype == torch.int64
        assert batch.waveforms.dtype == torch.float32
        assert batch.waveforms.shape == (len(crops), max(crop.samples for crop in crops))
        for row, (index, start, count) in zip(batch.waveforms, crops, strict=True):
            # One thread in a worker and several here may round differently.
            assert torch.allclose(row[:count], read_audio(speech[index].path, start, count), atol=1e-6)
            assert row[:count].abs().max() > 0.01
            assert not row[count:].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_and_threads_stay_as_they_are(speech, workers):
    def states() -> tuple:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.get_num_threads()  # noqa: NPY002

    before = states()
    data.split_validation(speech, fraction=0.2, seed=0)
    assert len(list(batches(speech, planned(speech), workers=workers))) > 3
    assert states() == before


def test_workers_end_with_the_iterator(speech):
    for end in ("close", "drop"):
        iterator = batches(speech, planned(speech), workers=2)
        next(iterator)
        assert len(multiprocessing.active_children()) == 2
        if end == "close":
            iterator.close()
        else:
            del iterator
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanished_or_changed_is_named(speech, workers):
    plan = planned(speech)
    victim = Path(speech[plan[2][0].utterance].path)
    rest = victim.read_bytes()
    victim.unlink()
    iterator = batches(speech, plan, workers=workers)
    next(iterator)
    next(iterator)
    with pytest.raises(ArmhubertError, match="does not exist") as caught:
        next(iterator)
    assert str(victim) in message(caught)
    assert not multiprocessing.active_children()
    victim.write_bytes(rest[: len(rest) // 4])
    with pytest.raises(ArmhubertError, match=r"has changed|cannot be read|does not exist") as caught:
        list(batches(speech, plan, workers=workers))
    assert str(victim) in message(caught)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tolerant_reader_leaves_out_what_cannot_be_read(speech, workers, monkeypatch):
    monkeypatch.setattr(data, "RETRY_AFTER", (0.01,))
    plan = [crops for crops in planned(speech) if len(crops) > 1]
    gone = plan[0][0].utterance
    Path(speech[gone].path).unlink()
    got = list(batches(speech, plan, workers=workers, tolerant=True))
    whole = plan[0][1:]
    assert got[0].indices.tolist() == [crop.utterance for crop in whole]
    assert got[0].lengths.tolist() == [crop.samples for crop in whole]
    for row, crop in zip(got[0].waveforms, whole, strict=True):
        expected = read_audio(speech[crop.utterance].path, crop.start, crop.samples)
        assert torch.equal(row[: crop.samples], expected)
    (why,) = got[0].left_out
    assert f"{speech[gone].path!r} does not exist" in why
    assert all(not batch.left_out for batch in got[1:])
    with pytest.raises(ArmhubertError, match="does not exist"):  # nothing of the batch is left
        list(batches(speech, [plan[0][:1]], workers=workers, tolerant=True))


def test_a_file_that_is_gone_is_waited_for_once(speech, monkeypatch):
    waits = []
    monkeypatch.setattr(data.time, "sleep", waits.append)
    plan = [crops for crops in planned(speech) if len(crops) > 1]
    Path(speech[plan[0][0].utterance].path).unlink()
    got = list(batches(speech, [plan[0]] * 3, workers=0, tolerant=True))
    assert [len(batch.left_out) for batch in got] == [1, 1, 1]
    assert waits == list(data.RETRY_AFTER)


def test_a_file_that_can_be_read_a_moment_later_is_read(speech, monkeypatch):
    failures = iter([ArmhubertError("a moment"), ArmhubertError("another")])

    def moody(*where):
        for failure in failures:
            raise failure
        return read_audio(*where)

    plan = planned(speech)
    expected = list(batches(speech, plan, workers=0))
    monkeypatch.setattr(data, "read_audio", moody)
    monkeypatch.setattr(data, "RETRY_AFTER", (0.01, 0.01))
    got = list(batches(speech, plan, workers=0))
    assert next(failures, None) is None
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.waveforms, other.waveforms)
        assert not one.left_out


def test_a_killed_worker_is_named_where_the_next_batch_is_asked_for(speech):
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = batches(speech, planned(speech) * 20, workers=2)
    next(iterator)
    victim = multiprocessing.active_children()[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()  # the caller is busy elsewhere when the worker dies, and is not interrupted
    assert signal.getsignal(signal.SIGCHLD) is handler
    with pytest.raises(ArmhubertError, match="a process that reads audio died") as caught:
        list(iterator)
    message(caught)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("error", "why"), [(EOFError(), "EOFError"), (OSError(12, "no memory"), "no memory")])
def test_a_worker_that_cannot_be_started_is_one_line(speech, monkeypatch, error, why):
    def refuse(loader):
        raise error

    monkeypatch.setattr(data.DataLoader, "__iter__", refuse)
    with pytest.raises(data.ReaderDied, match=rf"died \(.*{why}\)") as caught:
        list(batches(speech, planned(speech), workers=2))
    message(caught)
