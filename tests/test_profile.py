import csv
import dataclasses
import json
import resource
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from armhubert import candidates, cli, forecast, machine, profile, profile_report, quality, ragged
from armhubert.baselines import BASELINES, ReleasedWay, baseline, default_baselines
from armhubert.cli.profile_tables import show_profile
from armhubert.clock import Timing
from armhubert.config import preset
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.student import ARMHuBERT

TINY = dataclasses.replace(preset("mini"), layers=2, pattern="CR", attention_mode="resoftmax")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(0)
        ARMHuBERT(TINY).save_pretrained(folder)
    return str(folder)


def test_the_released_way_computes_the_student():
    for change in ({}, {"norm_first": True}, {"conv_norm": "layer"}, {"normalize_input": True}):
        model = ARMHuBERT(dataclasses.replace(TINY, **change)).eval()
        waveforms = torch.randn(2, 4000)
        with torch.no_grad():
            ours = model(waveforms).last_hidden_state
            torch.testing.assert_close(ReleasedWay(model)(waveforms), ours, rtol=1e-4, atol=1e-4)


def test_what_the_released_code_has_not_is_refused():
    wavlm = dataclasses.replace(TINY, pattern="", position_buckets=32)
    with pytest.raises(ArmhubertError, match="leave out the baseline"):
        ReleasedWay(SpeechEncoder(wavlm))
    assert "released" not in default_baselines(wavlm)
    assert "released" in default_baselines(TINY)


@pytest.mark.parametrize("name", ["armhubert", "armhubert-s", "maskhubert"])
def test_operations_are_those_that_pytorch_counts(name):
    """Without reuse, PyTorch's counter on the meta device does what the papers do; its closed-form norm is our own."""
    config = dataclasses.replace(preset(name), pattern="")
    with torch.device("meta"):
        model, counter = ARMHuBERT(config).eval(), FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 48_000))
    assert config.macs(48_000) == pytest.approx(counter.get_total_flops() / 2, rel=2e-3)


def test_operations_of_the_published_models():
    """22.3 G for 10 s with heads, of which a reusing layer skips query, key and map; 74.1 G for HuBERT Base."""
    assert preset("armhubert").macs(160_000) / 1e9 == pytest.approx(22.3, abs=0.05)
    hubert = dataclasses.replace(
        preset("armhubert"), conv_layers=((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2), width=768, ffn=3072,
        pattern="", projection_width=None, feature_projection=True,
    )  # fmt: skip
    assert hubert.macs(160_000) / 1e9 == pytest.approx(74.1, abs=0.05)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_baselines_leave_the_random_state_alone_and_give_frames(name):
    state = torch.get_rng_state()
    model = baseline(name)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert model(torch.zeros(1, 4000)).shape == (1, 12, 768)


def test_parameters_of_the_baselines_are_the_published_ones():
    millions = {name: sum(p.numel() for p in baseline(name).parameters()) / 1e6 for name in BASELINES}
    assert round(millions["hubert-base"], 2) == round(millions["hubert-base-torchaudio"], 2) == 94.37
    assert round(millions["distilhubert"], 2) == 23.49


def test_a_profile_times_everything_in_every_cell(student, tmp_path):
    config = profile.ProfileConfig(
        student, baselines=("released", f"{student}:bf16"), seconds=(0.2, 0.5), batch_sizes=(2,), batch_seconds=0.2,
        repeats=2, device="cpu", memory=False,
    )  # fmt: skip
    *reports, result = profile.profile(config)
    assert [r.name for r in reports if isinstance(r, profile.Building)] == [
        f"{student} (eager)", "released (eager)", f"{student} (bf16)",
    ]  # fmt: skip
    assert isinstance(result, profile.Profile)
    eager, released, bf16 = result.models
    assert [(c.batch, c.seconds) for c in result.cells] == [(1, 0.2), (1, 0.5), (2, 0.2)]
    assert all(cell.timings.keys() == {m.name for m in result.models} for cell in result.cells)
    assert eager.feature_error is None
    assert bf16.feature_error is not None
    assert 1e-4 < bf16.feature_error < 0.1
    assert bf16.bytes_on_disk < 0.6 * eager.bytes_on_disk
    assert eager.parameters - eager.parameters_without_heads == 2 * (TINY.width + 1) * (TINY.projection_width or 0)
    assert released.macs == eager.macs == dataclasses.replace(TINY, projection_width=None).macs(160_000)
    assert {"front end", "attention", "feed-forward", "positional convolution"} <= eager.stages.keys()
    assert result.ragged == ()
    paths = profile_report.write(result, tmp_path)
    assert [path.name for path in paths] == ["profile.json", "profile.csv", "profile.png"]
    content = json.loads(paths[0].read_text())
    assert [cell["timings"][eager.name]["median"] for cell in content["cells"]] == [
        cell.timings[eager.name].median for cell in result.cells
    ]
    assert len(list(csv.DictReader(paths[1].open()))) == 9
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_peak_memory_tells_at_which_shape(student, tmp_path, monkeypatch, capsys):
    """The largest that every candidate ran: 3 x 0.2 s here, since 11 s would take too long."""
    asked = []
    monkeypatch.setattr(profile, "peak_memory", lambda *args: asked.append(args[1:]) or 5 << 20)
    config = profile.ProfileConfig(
        student, seconds=(0.2, 11.0), batch_sizes=(3,), batch_seconds=0.2, repeats=1, device="cpu", limit_seconds=1e-6
    )
    *_, result = profile.profile(config)
    assert isinstance(result, profile.Profile)
    assert asked == [(student, "eager", 3, 0.2)]
    assert result.memory_shape == (3, 0.2)
    assert json.loads(profile_report.write(result, tmp_path)[0].read_text())["memory_shape"] == [3, 0.2]
    show_profile(result)
    assert "peak memory at 3 x 0.2 s" in capsys.readouterr().out
    *_, without = profile.profile(dataclasses.replace(config, memory=False, seconds=(0.2,)))
    assert isinstance(without, profile.Profile)
    assert without.memory_shape is None
    show_profile(without)
    assert "peak memory at" not in capsys.readouterr().out


@pytest.mark.parametrize(("serves", "seconds"), [(False, 2.0), (True, 1.0)])
def test_the_matrix_rate_is_that_of_the_faster_library(serves, seconds, monkeypatch):
    def timed(runs, **_):
        for name, run in runs.items():
            assert name == "copy" or bool((run() == 1536).all())
        return {name: Timing(*[took] * 3) for name, took in zip(runs, (4.0, 2.0, 1.0), strict=False)}

    monkeypatch.setattr(profile, "interleave", timed)
    monkeypatch.setattr(profile.onednn, "runs", lambda x: serves)
    rates = profile.machine_rates(torch.device("cpu"))
    assert rates == (1536**3 / seconds, 8 * 2**26 / 4.0)


def test_what_computes_in_fewer_bits_has_no_share_of_float32s_rate(capsys):
    def model(mode):
        return profile.Model(f"a ({mode})", "a", mode, 1, 1, 4, 10, 10, None, None, {})

    models = tuple(map(model, ("eager", "aot", "bf16", "int8", "onnx-int8")))
    cell = profile.Cell(1, 10.0, {m.name: Timing(1.0, 1.0, 1.0) for m in models}, {}, {})
    show_profile(profile.Profile({}, profile.Rates(20.0, 1.0), models, (cell,)))
    assert capsys.readouterr().out.count("50%") == 2


def test_quantised_and_onnx_modes_stay_near_the_model(student):
    pytest.importorskip("onnxruntime")
    config = profile.ProfileConfig(
        student, modes=("int8", "onnx", "onnx-int8"), seconds=(0.2,), batch_sizes=(), repeats=1, device="cpu",
        memory=False,
    )  # fmt: skip
    *_, result = profile.profile(config)
    assert isinstance(result, profile.Profile)
    int8, onnx, onnx_int8 = (model.feature_error for model in result.models)
    assert int8 is not None
    assert onnx is not None
    assert onnx_int8 is not None
    assert onnx < 1e-5
    assert 1e-4 < min(int8, onnx_int8) <= max(int8, onnx_int8) < 0.05
    sizes = [model.bytes_on_disk for model in result.models]
    assert max(sizes[0], sizes[2]) < 0.7 * sizes[1]


def test_a_trace_opens_as_json(student, tmp_path):
    config = profile.ProfileConfig(student, seconds=(0.2,), batch_sizes=(), device="cpu")
    profile.trace(config, tmp_path / "trace.json", seconds=0.2)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_ratio_is_that_of_the_medians():
    cell = profile.Cell(1, 1.0, {"a": Timing(1.0, 0.9, 2.0), "b": Timing(3.0, 2.0, 9.0)}, {}, {"c": "too long"})
    assert cell.speedup("a", "b") == 3.0
    assert cell.speedup("a", "c") is None


def test_a_batch_that_is_left_out_is_not_made(student, monkeypatch):
    noise = profile.noise

    def small(batch, seconds, device):
        assert batch * seconds < 100
        return noise(batch, seconds, device)

    monkeypatch.setattr(profile, "noise", small)
    config = profile.ProfileConfig(
        student, seconds=(0.2,), batch_sizes=(10**6,), batch_seconds=10.0, repeats=1, device="cpu", memory=False
    )
    *_, result = profile.profile(config)
    assert isinstance(result, profile.Profile)
    assert [len(cell.left_out) for cell in result.cells] == [0, 1]


def test_what_would_take_too_long_or_too_much_is_left_out_of_its_cell_alone(student, tmp_path):
    """Cells of up to 10 s always run; past them the forecast counts."""
    config = profile.ProfileConfig(
        student, baselines=("released",), seconds=(11.0, 0.2), batch_sizes=(), repeats=1, device="cpu", memory=False,
        limit_seconds=1e-6,
    )  # fmt: skip
    *_, result = profile.profile(config)
    assert isinstance(result, profile.Profile)
    short, long = result.cells
    assert (short.seconds, len(short.timings), short.left_out) == (0.2, 2, {})
    assert long.timings == {}
    assert all("s a pass, limit 1e-06" in reason for reason in long.left_out.values())
    rows = list(csv.DictReader(profile_report.write(result, tmp_path)[1].open()))
    assert [row["median_s"] == "-" for row in rows] == [False, False, True, True]


def test_a_candidate_that_runs_out_of_memory_costs_its_cell(student, monkeypatch):
    measure = forecast.Forecast.measure

    def full(self, waveforms):
        if len(waveforms) == 3:
            raise torch.OutOfMemoryError("full")
        return measure(self, waveforms)

    monkeypatch.setattr(forecast.Forecast, "measure", full)
    config = profile.ProfileConfig(
        student, seconds=(0.2,), batch_sizes=(3,), batch_seconds=0.2, repeats=1, device="cpu", memory=False
    )
    *_, result = profile.profile(config)
    assert isinstance(result, profile.Profile)
    assert [cell.left_out for cell in result.cells] == [{}, {f"{student} (eager)": "out of memory"}]


def test_cost_grows_with_length_and_its_square(monkeypatch):
    calls = []
    found = forecast.Forecast(lambda w: calls.append(len(w[0]) / 16_000), lambda: calls.append(0), torch.device("cpu"))
    assert calls == [1, 0, 1, 1, 0, 4, 4, 0, 10, 10]  # pools given back, a pass for memory, a pass for time
    found._runs.clear()
    for s in (1.0, 10.0, 60.0):
        found.add(s, forecast.Cost(0.01 + 0.02 * s + 1e-4 * s * s, round(1e6 * (5 + s * s))))
    cost = found(2, 300.0)
    assert cost.seconds == pytest.approx(2 * (0.01 + 6 + 9), rel=1e-3)
    assert cost.memory == pytest.approx(2 * 1e6 * (5 + 90_000), rel=1e-3)
    assert "s a pass, limit 10" in forecast.refusal(cost._replace(memory=None), torch.device("cpu"), 10)
    assert forecast.refusal(forecast.Cost(1.0, 1), torch.device("cpu"), 10) == ""
    monkeypatch.setattr(forecast, "free_memory", lambda device: 2**30)
    assert "0.8 GiB needed, 1.0 free" in forecast.refusal(forecast.Cost(1.0, 800 << 20), torch.device("cpu"), 10)


def test_a_pass_is_weighed():
    held = []
    cost = forecast._measure(lambda: torch.ones(1 << 24) + 1, torch.device("cpu"))
    assert cost.memory is not None
    assert cost.memory * 1.1 >= 8 << 24  # the kernel counts pages in batches
    assert cost.kept < 4 << 24
    cost = forecast._measure(lambda: held.append(torch.ones(1 << 24)), torch.device("cpu"))
    assert cost.kept >= 0.9 * (4 << 24)


def test_of_four_lengths_a_curve_is_drawn_and_unequal_batches_are_timed(student, tmp_path):
    config = profile.ProfileConfig(
        student, modes=("eager", "bf16"), seconds=(0.1, 0.2, 0.3, 0.4), batch_sizes=(), repeats=1, device="cpu",
        memory=False, ragged=True,
    )  # fmt: skip
    *_, result = profile.profile(config)
    assert isinstance(result, profile.Profile)
    assert [row.name for row in result.ragged] == [model.name for model in result.models]
    row = result.ragged[0]
    assert row.padding["equal"] == 0 < row.padding["sorted"] < row.padding["unsorted"] < 0.4
    assert row.rate("sorted") == row.audio_seconds / row.timings["sorted"].median
    paths = profile_report.write(result, tmp_path)
    assert paths[-1].name == "profile-length.png"
    assert paths[-1].read_bytes().startswith(b"\x89PNG")
    stored = json.loads(paths[0].read_text())["ragged"][0]
    assert stored["rates"]["equal"] == row.rate("equal")
    assert stored["timings"].keys() == {"equal", "sorted", "unsorted"}


def test_unequal_and_equal_batches_hold_the_same_audio():
    samples = [round(s * 16_000) for s in ragged.LIBRISPEECH]
    plans = ragged._plans(samples)
    assert plans.keys() == set(ragged.WAYS)
    for way, plan in plans.items():
        assert sum(crop.samples for batch in plan for crop in batch) == pytest.approx(sum(samples), abs=len(samples))
        assert sorted(crop.utterance for batch in plan for crop in batch) == list(range(len(samples)))
        for batch in plan:
            waveforms, lengths = ragged._batch(batch, way, torch.device("cpu"))
            assert waveforms.numel() <= 60 * 16_000
            assert (lengths is None) == (way == "equal")


def test_stages_cover_the_pass(student):
    model = ARMHuBERT.from_pretrained(student)
    parts = profile.stages(model, torch.zeros(1, 8000), repeats=3)
    assert parts.keys() == {
        "front end", "projection", "positional convolution", "attention", "feed-forward", "norms", "heads",
        "between them",
    }  # fmt: skip
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["between them"] < sum(parts.values()) / 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_stages_wait_for_the_device_that_they_run_on(monkeypatch):
    waited: list = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    second: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    profile.stages(torch.nn.Identity(), second, repeats=1)
    assert set(waited) == {torch.device("cuda:1")}


def test_the_command_shows_what_ran_and_what_is_known(student, tmp_path, monkeypatch, capfd):
    identity = sorted(quality.identities(student))[0]
    result = {
        "task": "pr", "metrics": {"per": 7.5}, "data": {"test": {"hash": "d"}},
        "model": {"source": "elsewhere", "identity": identity, "features": "hidden"},
    }  # fmt: skip
    for name, content in (("own", result), ("other", {**result, "model": {**result["model"], "identity": "x"}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(content))
    monkeypatch.setattr("logging.disable", lambda level: None)

    def call(*argv: object) -> tuple[int, str, str]:
        settings = ["--device", "cpu", "--no-memory", "--repeats", "1", "--batch-sizes"]
        monkeypatch.setattr(sys, "argv", ["armhubert", "profile", *map(str, argv), *settings, ""])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    code, out, _ = call(
        student, "--baseline", "released", "--seconds", "0.1,11", "--limit", "1e-6", "--quality", tmp_path / "own",
        "--quality", tmp_path / "other", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert f"left out of 1 x 11 s: {student} (eager), about" in out
    assert "PER 7.5% ↓" in out
    assert "not compared: released (eager), no result" in out
    assert "result of a model that was not profiled here: elsewhere, pr PER 7.5" in out
    assert not (tmp_path / "out" / "profile-quality.png").exists()  # one model is no comparison
    code, out, err = call(student, "--quality", tmp_path / "out" / "profile.json")
    assert (code, out) == (2, "")
    assert "is no result of armhubert evaluate" in err
    assert len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(student, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("armhubert.profile.profile", lambda settings: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["armhubert", "profile", str(student), "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "file"),
    [
        (["--out", "out"], "out/profile.json"),
        (["--trace", "t.json"], "t.json"),
        (["--training", "-o", "out"], "out/training.json"),
    ],
)
def test_earlier_results_are_replaced_only_by_force(student, tmp_path, monkeypatch, capsys, argv, file):
    def measure(*settings, **how):
        raise ArmhubertError("measured")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / file).write_text("mine")
    monkeypatch.setattr("armhubert.profile.profile", measure)
    monkeypatch.setattr("armhubert.training_profile.profile_training", measure)
    said = []
    for force in ([], ["--force"]):
        monkeypatch.setattr(sys, "argv", ["armhubert", "profile", "mini", *argv, *force])
        with pytest.raises(SystemExit):
            cli.main()
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert f"{file} exists: choose another name, or --force to replace it" in said[0]
    assert "measured" in said[1]
    assert (tmp_path / file).read_text() == "mine"


def test_what_was_measured_is_written_although_its_quality_cannot_be_compared(student, tmp_path, monkeypatch, capsys):
    def refuse(result, results):
        raise ArmhubertError("two results of one model")

    monkeypatch.setattr(quality, "read_results", lambda paths: ["a result"])
    monkeypatch.setattr(quality, "compare", refuse)
    options = "--baseline released --seconds 0.2 --batch-sizes= --repeats 1 --no-memory --device cpu --quality runs"
    argv = ["armhubert", "profile", str(student), *options.split(), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "two results of one model" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/profile.json").read_text())["models"]


def test_a_memory_that_cannot_be_measured_costs_no_time_that_was(student, monkeypatch):
    def refuse(function: str, arguments: dict) -> str:
        raise ArmhubertError("killed")

    monkeypatch.setattr(profile, "_in_a_process", refuse)
    config = profile.ProfileConfig(str(student), ("released",), seconds=(0.2,), batch_sizes=(), repeats=1, device="cpu")
    *reports, result = profile.profile(config)
    unknown = [report for report in reports if isinstance(report, profile.MemoryUnknown)]
    assert [report.why for report in unknown] == ["killed", "killed"]
    assert all(model.peak_memory is None for model in result.models)
    assert len(result.cells) == 1


def test_files_that_were_read_are_memory_to_be_had(tmp_path, monkeypatch):
    groups = tmp_path / "sys/fs/cgroup"
    groups.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {2**30} kB\n")
    for name, text in (
        ("max", str(16 * 2**30)),
        ("current", str(14 * 2**30)),
        ("stat", f"anon 5\ninactive_file {9 * 2**30}\n"),
    ):
        (groups / f"memory.{name}").write_text(text)
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert machine.free_memory(torch.device("cpu")) == 11 * 2**30


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--training", "--mode", "bf16", "--ragged"], "times steps, not features, got --mode, --ragged as well"),
        (["--training", "--batch-seconds", "220"], "got --batch-seconds as well"),
        (["--training", "--no-memory"], "got --memory as well"),
        (["--training", "--repeats", "0"], "--repeats must be at least 1 and --warmup at least 0, got 0 and 1"),
        (["--training", "--warmup", "-1"], "got 5 and -1"),
        (["--config", "run.yaml"], "--config belongs to --training"),
    ],
)
def test_options_that_do_not_fit_are_refused(student, monkeypatch, capsys, argv, says):
    monkeypatch.setattr(sys, "argv", ["armhubert", "profile", str(student), *argv])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_training_profile_runs_on_the_device_of_its_settings(tmp_path, monkeypatch):
    seen = []

    def measure(config, **how):
        seen.append(config.device)
        raise ArmhubertError("no such device")

    monkeypatch.setattr("armhubert.training_profile.profile_training", measure)
    (tmp_path / "run.yaml").write_text("device: cuda:7\n")
    for argv in ([], ["--device", "cpu"]):
        argv = ["profile", "mini", "--training", "--config", str(tmp_path / "run.yaml"), *argv]
        monkeypatch.setattr(sys, "argv", ["armhubert", *argv])
        with pytest.raises(SystemExit):
            cli.main()
    assert seen == ["cuda:7", "cpu"]


def test_peak_memory_is_of_this_process_and_not_of_the_one_that_started_it(monkeypatch):
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2**40))  # survives an exec
    if Path("/proc/self/status").is_file():
        assert 2**20 < machine.high_water_mark(torch.device("cpu")) == machine.resident("VmHWM") < 2**40

    def absent(kind):
        raise FileNotFoundError(kind)

    monkeypatch.setattr(machine, "resident", absent)
    assert machine.high_water_mark(torch.device("cpu")) >= 2**40


def test_a_system_that_does_not_tell_the_memory_asked_for_is_an_os_error(tmp_path, monkeypatch):
    (tmp_path / "status").write_text("VmRSS:\t  12 kB\n")
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / Path(name).name)
    assert machine.resident("VmRSS") == 12 * 1024
    with pytest.raises(OSError, match="does not tell VmHWM"):
        machine.resident("VmHWM")


def test_an_allocation_that_fails_is_one_line_on_any_device():
    def on_a_gpu():
        raise torch.OutOfMemoryError("CUDA out of memory")

    for fails in (on_a_gpu, lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)):
        with pytest.raises(ArmhubertError, match=r"^take less$"), machine.memory_errors("take less"):
            fails()
    with pytest.raises(RuntimeError, match="size"), machine.memory_errors("take less"):
        torch.ones(2) @ torch.ones(3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system forgets no peak")
def test_what_imports_took_for_a_moment_is_not_a_candidates_memory(student, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: torch.ones(1 << 26) + 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    peak = profile._peak_of_child(
        student=student, source=student, mode="eager", heads=False, file=None, device="cpu", batch=1, seconds=0.2,
        threads=1,
    )  # fmt: skip
    assert peak < 4 << 26


def test_what_runs_in_fewer_bits_is_weighed_without_the_model_that_it_was(student, monkeypatch):
    loaded, load = [], candidates._load_module
    monkeypatch.setattr(candidates, "_load_module", lambda *args: loaded.append(load(*args)) or loaded[-1])
    monkeypatch.setattr(candidates, "state_bytes", lambda module: pytest.fail("written"))
    run = candidates.load_run(student, "bf16", student=student, heads=False, device=torch.device("cpu"))
    assert run(torch.zeros(1, 4000)).dtype == torch.bfloat16
    ((module, _),) = loaded
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_memory_is_that_of_a_process_of_its_own(student, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # of which nothing is imported
    (tmp_path / "statistics.py").write_text("raise RuntimeError")
    (tmp_path / "armhubert").mkdir()
    config = profile.ProfileConfig(student, device="cpu")
    small = profile.peak_memory(config, student, "eager", 1, 1.0)
    large = profile.peak_memory(config, student, "eager", 8, 10.0)
    assert 0 < small < large
    weights = 4 * 94_371_712
    assert 0.5 * weights < profile.peak_memory(config, "hubert-base-torchaudio", "bf16", 1, 0.2) < 1.25 * weights
    if find_spec("onnxscript") is not None:  # which takes hundreds of MB to export, not counted
        assert 0 < profile.peak_memory(config, student, "onnx", 1, 1.0) < 64 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": ("fast",)}, "mode must be one of"),
        ({"baselines": ("hubert-base:eagr",)}, "mode must be one of .*, got 'eagr'; did you mean 'eager'"),
        ({"baselines": ("hubert",)}, "no model at 'hubert'.*; did you mean 'hubert-base'"),
        ({"modes": ("triton",), "baselines": ()}, "mode triton needs .* choose another mode"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"limit_seconds": 0}, "limit_seconds must be above 0"),
        ({"seconds": (-1.0,)}, "seconds must be at least 0.025, one frame, and at most 3600, got -1"),
        ({"seconds": (1.0, float("nan"))}, "seconds must be a number, got nan"),
        ({"batch_seconds": -1.0}, "batch_seconds must be at least 0.025"),
        ({"batch_seconds": float("nan"), "batch_sizes": (2,)}, "batch_seconds must be a finite number, got nan"),
        ({"seconds": (), "batch_sizes": ()}, "nothing would be timed"),
        ({"device": "tpu"}, "device must be auto"),
    ],
)
def test_bad_settings_are_one_line(student, change, message):
    with pytest.raises(ArmhubertError, match=message) as caught:
        list(profile.profile(profile.ProfileConfig(student, **{"seconds": (0.1,), "batch_sizes": (), **change})))
    assert "\n" not in str(caught.value)


def test_a_misspelt_baseline_is_told_before_anything_is_loaded(student):
    with pytest.raises(ArmhubertError, match="no baseline is called so; did you mean 'wavlm-base'"):
        next(profile.profile(profile.ProfileConfig(student, baselines=(student, "wavlm-bas:bf16"), device="cpu")))


def test_features_do_not_need_a_student():
    """A teacher is profiled like a student."""
    teacher = SpeechEncoder(dataclasses.replace(TINY, pattern="", projection_width=None))
    assert profile.stages(teacher.eval(), torch.zeros(1, 4000), 1)["attention"] > 0
