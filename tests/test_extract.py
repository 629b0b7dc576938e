import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from made import write_speech, write_teacher

from armhubert import ARMHuBERT, ArmhubertError
from armhubert import extract as module
from armhubert.audio import read_audio
from armhubert.config import preset
from armhubert.extract import ExtractConfig, Finished, Progress, Started, extract, output_names, select
from armhubert.long_recordings import open_recording, windows

TINY = dataclasses.replace(
    preset("mini"),
    conv_layers=((8, 10, 5), *((8, 3, 2),) * 4, (32, 2, 2), (32, 2, 2)),
    width=32,
    layers=2,
    heads=2,
    ffn=32,
    pattern="CR",
    projection_width=16,
)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ARMHuBERT(TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def speech(tmp_path) -> Path:
    folder = write_speech(tmp_path / "speech", (0.8, 0.3, 1.1, 0.5))
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "0.wav").rename(folder / "deep" / "er" / "0.wav")
    return folder


def run(model: Path, data: Path, out: Path, **settings) -> list:
    return list(extract(ExtractConfig(str(model), (str(data),), str(out), **{"workers": 0, **settings})))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("batch_seconds", "padding"), [(0.1, "independent"), (60, "independent"), (60, "as_trained")])
def test_each_recording_gets_the_features_that_it_has_alone(speech, tmp_path, batch_seconds, padding):
    ARMHuBERT(dataclasses.replace(TINY, padding=padding)).save_pretrained(tmp_path / "student")
    student = tmp_path / "student"
    reports = run(student, speech, tmp_path / "out", batch_seconds=batch_seconds)
    started = next(r for r in reports if isinstance(r, Started))
    assert (started.recordings, started.features, started.width) == (4, ("last_hidden_state",), 32)
    assert isinstance(reports[-1], Finished)
    assert reports[-1].recordings == 4
    assert [r.done for r in reports if isinstance(r, Progress)][-1] == 4
    model = ARMHuBERT.from_pretrained(student)
    for name in ("deep/er/0", "1", "2", "3"):
        with torch.no_grad():
            expected = model(read_audio(speech / f"{name}.wav")[None]).last_hidden_state[0]
        found = np.load(tmp_path / "out" / f"{name}.npy", allow_pickle=False)
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers": "all"}, lambda o: torch.stack(o.hidden_states)),
        ({"layers": "2,0"}, lambda o: torch.stack([o.hidden_states[0], o.hidden_states[2]])),
        ({"layers": "1"}, lambda o: o.hidden_states[1]),
        ({"layers": "weighted"}, lambda o: torch.stack(o.hidden_states).mean(0)),
        ({"layers": "weighted:0.5,-1,2"}, lambda o: 0.5 * o.hidden_states[0] - o.hidden_states[1] + 2 * o[0]),
        ({"heads": True}, lambda o: o.projections[1]),
        ({"heads": True, "layers": "all"}, lambda o: torch.stack(o.projections)),
    ],
)
def test_layers(student, speech, tmp_path, settings, expected):
    run(student, speech / "1.wav", tmp_path / "out", **settings)
    with torch.no_grad():
        output = ARMHuBERT.from_pretrained(student)(read_audio(speech / "1.wav")[None])
    np.testing.assert_allclose(np.load(tmp_path / "out/1.npy"), expected(output).squeeze(-3), atol=2e-5)


def test_a_pre_norm_models_last_features_are_those_after_its_norm(tmp_path, speech):
    model = ARMHuBERT(dataclasses.replace(TINY, norm_first=True)).eval()
    model.save_pretrained(tmp_path / "m")
    run(tmp_path / "m", speech / "1.wav", tmp_path / "out")
    with torch.no_grad():
        expected = model(read_audio(speech / "1.wav")[None]).last_hidden_state[0]
    np.testing.assert_allclose(np.load(tmp_path / "out/1.npy"), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_safetensors_name_their_layers(student, speech, tmp_path, dtype):
    run(student, speech, tmp_path / "out", layers="all", format="safetensors", dtype=dtype)
    found = safetensors.torch.load_file(tmp_path / "out/deep/er/0.safetensors")
    assert sorted(found) == ["hidden_states.0", "hidden_states.1", "hidden_states.2"]
    with torch.no_grad():
        expected = ARMHuBERT.from_pretrained(student)(read_audio(speech / "deep/er/0.wav")[None]).hidden_states
    for n in range(3):
        tensor = found[f"hidden_states.{n}"]
        assert tensor.dtype == {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        tolerance = {"fp32": 2e-5, "fp16": 4e-3, "bf16": 3e-2}[dtype]
        torch.testing.assert_close(tensor.float(), expected[n][0], rtol=0, atol=tolerance)


def test_a_teacher_works_too_and_a_model_in_bf16(speech, tmp_path):
    teacher = write_teacher(tmp_path / "teacher")
    run(teacher, speech / "2.wav", tmp_path / "a")
    run(teacher, speech / "2.wav", tmp_path / "b", precision="bf16")
    exact, rough = np.load(tmp_path / "a/2.npy"), np.load(tmp_path / "b/2.npy")
    assert 0 < np.linalg.norm(exact - rough) / np.linalg.norm(exact) < 0.1


# ---- resuming --------------------------------------------------------------


def test_a_second_run_computes_what_is_missing_and_nothing_else(student, speech, tmp_path):
    out = tmp_path / "out"
    run(student, speech, out)
    first = files(out)
    os.unlink(out / "1.npy")
    kept = (out / "2.npy").stat().st_mtime_ns
    started = next(r for r in run(student, speech, out, batch_seconds=1) if isinstance(r, Started))
    assert (started.recordings, started.finished) == (1, 3)
    assert (out / "2.npy").stat().st_mtime_ns == kept
    again = files(out)
    assert first.keys() == again.keys()
    before = np.load(io.BytesIO(first["1.npy"]))
    np.testing.assert_allclose(np.load(out / "1.npy"), before, atol=2e-5)  # in a batch of its own now
    rows = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert sorted(row["features"] for row in rows) == ["1.npy", "2.npy", "3.npy", "deep/er/0.npy"]
    assert all(len(np.load(out / row["features"])) == row["frames"] for row in rows)


def test_an_interrupted_run_leaves_whole_files_and_goes_on(student, speech, tmp_path):
    config = ExtractConfig(str(student), (str(speech),), str(tmp_path / "out"), batch_seconds=0.1, workers=0)
    reports = extract(config)
    for report in reports:
        if isinstance(report, Progress):
            break
    reports.close()
    with open(tmp_path / "out/index.jsonl", "a") as index:
        index.write('{"features": "1.n')  # a process that was killed
    assert not [p for p in (tmp_path / "out").rglob(".*") if p.is_file()]
    started = next(r for r in extract(config) if isinstance(r, Started))
    assert 0 < started.finished < 4
    assert list(extract(config))[-1].finished_before >= started.finished
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "how", [["--batch-seconds", "0.1"], ["--chunk-seconds", "0.4", "--context-seconds", "0.1"]], ids=["batch", "window"]
)
def test_a_run_that_is_stopped_keeps_what_is_done(call, student, speech, tmp_path, monkeypatch, number, code, how):
    passes, compute = [], module.layer_features

    def interrupted(*of):
        passes.append(of)
        if len(passes) == 2:
            signal.raise_signal(number)
        return compute(*of)

    argv = ("extract", student, speech, "--out", tmp_path / "out", "--workers", "0", *how)
    with monkeypatch.context() as patch:
        patch.setattr(module, "layer_features", interrupted)
        ended, out, err = call(*argv)
    assert (ended, len(passes)) == (code, 2)
    assert out.splitlines()[-1] == "Stopped; the same command goes on."
    assert "Stopping as soon as" in err
    rows = [json.loads(line) for line in (tmp_path / "out/index.jsonl").read_text().splitlines()]
    assert {row["features"] for row in rows} == {name for name in files(tmp_path / "out") if name.endswith("npy")}
    assert not list((tmp_path / "out").rglob(".*"))
    finished = re.search(r"recordings=(\d) finished_before=(\d)", call(*argv)[1].splitlines()[-1])
    assert (int(finished[1]), int(finished[2])) == (4 - len(rows), len(rows))


def test_what_a_killed_process_was_writing_is_removed(student, speech, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.features.json.12345678").touch()  # the first file of all
    run(student, speech, tmp_path / "out")
    (tmp_path / "out/deep/er/.0.npy.t_472r5e").touch()
    assert run(student, speech, tmp_path / "out")[-1].recordings == 0
    assert not list((tmp_path / "out").rglob(".*"))


def test_long_recordings_are_in_the_index_as_soon_as_they_are_written(student, speech, tmp_path):
    (speech / "1.wav").unlink()  # the one that passes at once
    config = ExtractConfig(str(student), (str(speech),), str(tmp_path / "out"), chunk_seconds=0.4, context_seconds=0.1)
    reports = extract(config)
    assert next(report for report in reports if isinstance(report, Started)).long == 3
    for done in (1, 2):
        assert next(report.done for report in reports if report.done >= done) == done
        rows = (tmp_path / "out/index.jsonl").read_text().splitlines()
        assert len(rows) == len(list((tmp_path / "out").rglob("*.npy"))) == done
    reports.close()


def test_a_torn_line_of_the_index_swallows_no_other(student, speech, tmp_path):
    index = tmp_path / "out/index.jsonl"
    run(student, speech, tmp_path / "out")
    lines = index.read_text().splitlines()
    index.write_text(f"{lines[0]}\n{lines[1][:20]}")  # killed while it wrote the second
    reports = extract(ExtractConfig(str(student), (str(speech),), str(tmp_path / "out"), batch_seconds=0.1, workers=0))
    for report in reports:
        if isinstance(report, Progress):
            break
    reports.close()  # killed again, after one more
    first, torn, *more = index.read_text().splitlines()
    assert (first, torn) == (lines[0], lines[1][:20])
    assert len(more) >= 1
    assert all(json.loads(line)["features"] in {"1.npy", "2.npy", "3.npy"} for line in more)


def test_a_damaged_line_of_the_index_costs_its_recording(student, speech, tmp_path):
    index = tmp_path / "out/index.jsonl"
    run(student, speech, tmp_path / "out")
    first, second, *more = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join((first.replace(b"speech", b"spe\xffch"), second, b"\x00\xfe\n", *more)))
    assert run(student, speech, tmp_path / "out")[-1].recordings == 1
    assert len(index.read_text().splitlines()) == 4


def test_a_changed_recording_is_computed_again(student, speech, tmp_path):
    run(student, speech, tmp_path / "out")
    soundfile.write(speech / "1.wav", np.random.default_rng(1).standard_normal(9000) * 0.1, 16_000)
    assert run(student, speech, tmp_path / "out")[-1].recordings == 1
    assert len(np.load(tmp_path / "out/1.npy")) == TINY.frames(9000)


@pytest.mark.parametrize("days", [-400, 400])
def test_a_recording_is_as_old_as_its_file_says(student, speech, tmp_path, days):
    """Copies keep dates: of another recording, an older one; a clock that was wrong, one to come."""
    run(student, speech, tmp_path / "out")
    before = np.load(tmp_path / "out/1.npy")
    samples = soundfile.info(speech / "1.wav").frames
    soundfile.write(speech / "1.wav", np.random.default_rng(1).standard_normal(samples) * 0.1, 16_000)
    date = (tmp_path / "out/1.npy").stat().st_mtime + days * 86_400
    os.utime(speech / "1.wav", (date, date))
    assert run(student, speech, tmp_path / "out")[-1].recordings == 1
    assert not np.array_equal(np.load(tmp_path / "out/1.npy"), before)
    assert run(student, speech, tmp_path / "out")[-1].recordings == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": "1"}, r"made with other features \(last_hidden_state then, hidden_states.1 now\)"),
        ({"dtype": "fp16"}, r"made with other dtype \(fp32 then, fp16 now\)"),
        ({"chunk_seconds": 20.0}, r"made with other chunk_seconds \(60.0 then, 20.0 now\)"),
    ],
)
def test_other_settings_never_mix_with_what_is_there(student, speech, tmp_path, settings, says):
    run(student, speech, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ArmhubertError, match=says):
        run(student, speech, tmp_path / "out", **settings)
    assert files(tmp_path / "out") == before
    assert run(student, speech, tmp_path / "out", force=True, **settings)[-1].recordings == 4


def test_another_model_never_mixes_with_what_is_there(student, speech, tmp_path):
    run(student, speech, tmp_path / "out")
    model = ARMHuBERT.from_pretrained(student)
    with torch.no_grad():
        model.norm.bias += 1e-3
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ArmhubertError, match=r"features of another model or other weights .*student.*other.*force=True"
    ):
        run(tmp_path / "other", speech, tmp_path / "out")
    interrupted = extract(
        ExtractConfig(str(tmp_path / "other"), (str(speech),), str(tmp_path / "out"), workers=0, force=True)
    )
    next(interrupted)
    interrupted.close()
    assert run(tmp_path / "other", speech, tmp_path / "out")[-1].recordings == 4


def test_other_recordings_never_take_a_files_name(student, speech, tmp_path):
    run(student, speech, tmp_path / "out")
    other = write_speech(tmp_path / "more", (0.4, 0.4))
    with pytest.raises(ArmhubertError, match=r"1.npy holds the features of .*speech/1.wav"):
        run(student, other, tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(student, speech, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArmhubertError, match="is not empty"):
        run(student, speech, tmp_path)
    for force in (False, True):
        with pytest.raises(ArmhubertError, match="is a file"):
            run(student, speech, tmp_path / "notes.txt", force=force)


# ---- names, and what is refused --------------------------------------------


@pytest.mark.parametrize("chunk_seconds", [60.0, 0.4])
def test_features_that_are_no_numbers_are_never_written(student, speech, tmp_path, chunk_seconds):
    model = ARMHuBERT.from_pretrained(student)
    torch.nn.init.constant_(model.layers[1].down.bias, float("nan"))
    model.save_pretrained(tmp_path / "diverged")
    with pytest.raises(ArmhubertError, match=r"features of .*wav are not finite in fp32: use a model"):
        run(tmp_path / "diverged", speech, tmp_path / "out", chunk_seconds=chunk_seconds, context_seconds=0.1)
    assert not list((tmp_path / "out").rglob("*.npy"))


def test_names_mirror_the_data(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    paths = [a / "x/1.wav", a / "x/1.flac", a / "2.wav"]
    for path in (*paths, b / "3.wav"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert list(output_names([str(a)], paths, ".npy").values()) == ["x/1.wav.npy", "x/1.flac.npy", "2.npy"]
    both = output_names([str(a), str(b)], [*paths, b / "3.wav"], ".npy")
    assert list(both.values()) == ["a/x/1.wav.npy", "a/x/1.flac.npy", "a/2.npy", "b/3.npy"]
    assert list(output_names([str(b / "3.wav")], [b / "3.wav"], ".npy").values()) == ["3.npy"]
    outside = output_names([str(a / "list.tsv")], [a / "../b/3.wav", a / "2.wav"], ".npy")
    assert list(outside.values()) == ["b/3.npy", "a/2.npy"]


def test_an_ending_that_is_kept_is_no_other_recordings_name(tmp_path):
    paths = [tmp_path / name for name in ("x.wav", "x.flac", "x.wav.flac", "y.wav.flac", "y.wav")]
    expected = ["x.wav.npy", "x.flac.npy", "x.wav.flac.npy", "y.wav.npy", "y.npy"]
    assert list(output_names([str(tmp_path)], paths, ".npy").values()) == expected


def test_a_recording_whose_name_is_as_long_as_names_may_be(student, speech, tmp_path):
    (speech / "1.wav").rename(speech / f"{'n' * 251}.wav")
    assert run(student, speech, tmp_path / "out")[-1].recordings == 4
    assert (tmp_path / "out" / f"{'n' * 251}.npy").is_file()


def test_files_that_cannot_be_used_are_listed(student, speech, tmp_path):
    (speech / "broken.wav").write_bytes(b"RIFF nothing")
    soundfile.write(speech / "short.wav", np.ones(100) * 0.1, 16_000)
    finished = run(student, speech, tmp_path / "out")[-1]
    assert (finished.recordings, finished.skipped) == (4, 2)
    listed = (tmp_path / "out/skipped.tsv").read_text()
    assert "broken.wav\tunreadable" in listed
    assert "short.wav\ttoo short" in listed


def test_what_can_no_longer_be_read_leaves_the_index(student, speech, tmp_path):
    run(student, speech, tmp_path / "out")
    (speech / "1.wav").write_bytes(b"RIFF nothing")
    finished = run(student, speech, tmp_path / "out")[-1]
    assert (finished.recordings, finished.finished_before, finished.skipped) == (0, 3, 1)
    listed = [json.loads(line)["audio_filepath"] for line in (tmp_path / "out/index.jsonl").read_text().splitlines()]
    assert len(listed) == 3
    assert str(speech / "1.wav") not in listed


@pytest.mark.parametrize("spec", ["", "3", "-1", "1,,2", "first", "weighted:1,2", "weighted:a,b,c", "weighted:1,2,nan"])
def test_layers_that_are_none(spec):
    with pytest.raises(ArmhubertError, match=r"layers must be|weight"):
        select(spec, TINY)


def test_heads_that_are_none():
    with pytest.raises(ArmhubertError, match="no distillation heads"):
        select("last", dataclasses.replace(TINY, projection_width=None), heads=True)
    with pytest.raises(ArmhubertError, match=r"within 1\.\.2"):
        select("0", TINY, heads=True)


def test_the_command(call, student, speech, tmp_path):
    code, out, err = call("extract", student, speech, "--out", tmp_path / "f", "--layers", "0,2", "--workers", "0")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.match(
        r"start model=\S+ parameters=\d+ features=hidden_states.0,hidden_states.2 width=32 .* long=0", lines[0]
    )
    assert re.match(r"finished recordings=4 finished_before=0 skipped=0 ", lines[-1])
    for argv, says in (
        (("--format", "hdf5"), "--format must be 'npy' or 'safetensors', got 'hdf5'"),
        (("--dtype", "bf16"), "npy has no bf16"),
        (("--layers", "9"), r"within 0\.\.2"),
        (("--chunk-seconds", "5", "--context-seconds", "3"), "--chunk-seconds must exceed twice --context-seconds"),
        (("--batch-seconds", "0"), "--batch-seconds must be above 0"),
    ):
        code, out, err = call("extract", student, speech, "--out", tmp_path / "f", *argv)
        assert (code, out) == (2, ""), argv
        assert len(err.splitlines()) == 1
        assert re.search(says, err), err


@pytest.mark.parametrize("chunk_seconds", [60, 0.4])
def test_memory_that_runs_out_is_one_line(call, student, speech, tmp_path, monkeypatch, chunk_seconds):
    monkeypatch.setattr(module, "layer_features", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    code, _, err = call(
        "extract", student, speech, "-o", tmp_path / "f", "--chunk-seconds", chunk_seconds, "--context-seconds", "0.1"
    )
    assert code == 2
    rule = f"memory must hold a batch of 60 s, or a recording or window of up to {chunk_seconds} s"
    remedy = "lower --batch-seconds, or --chunk-seconds for another folder; what is finished is kept"
    assert err == f"error: {rule}: {remedy}\n"


# ---- long recordings -------------------------------------------------------


def of(wave):
    return lambda start, count: wave[start : start + count]


@torch.inference_mode()
def by_windows(model, read, samples, chunk_seconds, context_seconds):
    """First frames of the kept parts, and hidden states [L + 1, T, D] of their parts together."""
    found = list(windows(model, read, samples, chunk_seconds=chunk_seconds, context_seconds=context_seconds))
    states = [(w.inputs, *model.layer_outputs(w.inputs, None)) for w in found]
    joined = [torch.cat([x[n][0, w.keep] for x, w in zip(states, found, strict=True)]) for n in range(len(states[0]))]
    return [w.start for w in found], torch.stack(joined)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize_input": True, "padding": "as_trained"},
        {"conv_norm": "layer", "normalize_input": True, "norm_first": True},
        {"conv_norm": "layer"},
    ],
)
def test_windows_equal_one_pass_up_to_the_transformer(changes):
    model = ARMHuBERT(dataclasses.replace(TINY, **changes)).eval()
    wave = torch.randn(16_000 * 13 + 123) * torch.linspace(0.1, 1, 16_000 * 13 + 123) + 0.5
    with torch.no_grad():
        whole = model(wave[None]).hidden_states
    starts, parts = by_windows(model, of(wave), len(wave), 4, 0.5)
    assert starts == [0, 175, 325, 475]
    for number, tolerance in ((0, 2e-5), (2, 0.1)):
        torch.testing.assert_close(parts[number], whole[number][0], rtol=0, atol=tolerance)
    starts, alone = by_windows(model, of(wave), len(wave), 20, 5)
    assert starts == [0]
    torch.testing.assert_close(alone[2], whole[2][0], rtol=0, atol=2e-5)


def test_a_long_file_is_written_window_by_window(student, tmp_path):
    speech = write_speech(tmp_path / "speech", (6.3, 0.5))
    settings = {"chunk_seconds": 2.0, "context_seconds": 0.4, "layers": "all"}
    reports = run(student, speech, tmp_path / "a", **settings)
    assert next(r for r in reports if isinstance(r, Started)).long == 1
    run(student, speech, tmp_path / "b", format="safetensors", dtype="fp16", **settings)
    model = ARMHuBERT.from_pretrained(student)
    samples = round(6.3 * 16_000)
    _, expected = by_windows(model, open_recording(speech / "0.wav", samples), samples, 2.0, 0.4)
    found = np.load(tmp_path / "a/0.npy")
    np.testing.assert_array_equal(found, expected)
    halves = safetensors.torch.load_file(tmp_path / "b/0.safetensors")
    for n in range(3):
        assert torch.equal(halves[f"hidden_states.{n}"], expected[n].half())


def test_two_extractions_do_not_share_a_folder(student, speech, tmp_path):
    config = ExtractConfig(str(student), (str(speech),), str(tmp_path / "out"), workers=0)
    first = extract(config)
    next(first)
    with pytest.raises(ArmhubertError, match="another process is at work"):
        list(extract(config))
    first.close()
    assert list(extract(config))[-1].out == tmp_path / "out"


def test_what_no_window_can_be_made_of(speech, tmp_path):
    with pytest.raises(ArmhubertError, match="at least 400 samples"):
        by_windows(ARMHuBERT(TINY).eval(), of(torch.zeros(300)), 300, 60, 5)
    with pytest.raises(ArmhubertError, match="chunk_seconds must exceed twice context_seconds"):
        by_windows(ARMHuBERT(TINY).eval(), of(torch.zeros(900)), 900, 1, 0.5)
    coarse = ARMHuBERT(dataclasses.replace(TINY, conv_layers=((32, 10, 5), (32, 256, 256)))).eval()
    rule = r"by 0\.16 or more, got 2\.58 and 1\.24"  # rounded to frames, windows of 32 with a context of 16
    with pytest.raises(ArmhubertError, match=rule):
        next(windows(coarse, of(torch.zeros(64_000)), 64_000, chunk_seconds=2.58, context_seconds=1.24))
    coarse.save_pretrained(tmp_path / "coarse")
    with pytest.raises(ArmhubertError, match=rule):
        run(tmp_path / "coarse", speech, tmp_path / "out", chunk_seconds=2.58, context_seconds=1.24)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_length(student, tmp_path):
    """One minute and twenty-one, in processes of their own: without windows the second takes gigabytes more."""
    rng = np.random.default_rng(0)
    peaks = []
    for minutes in (1, 21):
        folder = tmp_path / str(minutes)
        folder.mkdir()
        with soundfile.SoundFile(folder / "long.wav", "w", 16_000, 1) as file:
            for _ in range(minutes * 4):
                file.write(rng.standard_normal(15 * 16_000) * 0.1)
        code = f"""
import re, torch
torch.set_num_threads(1)
from armhubert.extract import ExtractConfig, extract
list(extract(ExtractConfig({str(student)!r}, ({str(folder)!r},), {str(folder / "out")!r}, layers="all", workers=0,
                           chunk_seconds=15.0, context_seconds=2.0)))
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert len(np.load(tmp_path / "21/out/long.npy", mmap_mode="r")[0]) == TINY.frames(21 * 60 * 16_000)
    assert peaks[1] - peaks[0] < 60, peaks  # MiB; the waveform alone is 81 MB, its features 25 MB


def test_the_library_says_what_it_computes_in_reports_only(student, speech, tmp_path, capfd):
    run(student, speech, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert set(module.Report.__args__) >= {Started, Progress, Finished}
