import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from armhubert.bench import (
    cases,
    compare_runs,
    gpu,
    gpu_check,
    gpu_clock,
    gpu_micro,
    gpu_model,
    gpu_report,
    isolate,
    output,
    report,
    superb,
)
from armhubert.bench.cpu import candidates, peak_extra_bytes
from armhubert.clock import interleave
from armhubert.errors import ArmhubertError
from armhubert.kernels import costs, variants

ROOT = Path(__file__).resolve().parents[1]


def test_candidates_are_timed_in_turn():
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert all(t.low <= t.median <= t.high for t in timings.values())


def test_results_carry_their_conditions(tmp_path):
    path = output.write_results("x", [{"a": 1}], torch.device("cpu"), tmp_path)
    content = json.loads(path.read_text())
    assert content["rows"] == [{"a": 1}]
    assert content["conditions"].keys() >= {"device", "torch", "date"}


def test_runs_are_compared_at_a_step_that_all_were_validated_at():
    rows = [{"validations": [{"step": step} for step in steps]} for steps in ((25, 50, 75), (50, 100))]
    assert compare_runs.last_common_step(rows) == 50
    with pytest.raises(ArmhubertError, match="validated at a common step"):
        compare_runs.last_common_step([*rows, {"validations": [{"step": 10}]}])


def test_readme_and_docs_show_what_the_result_files_hold():
    text = (ROOT / report.README).read_text("utf-8")
    shown = report.BEGIN + text.split(report.BEGIN)[1].split(report.END)[0] + report.END
    assert shown == report.summary(ROOT / report.RESULTS)
    assert (ROOT / report.DETAILS).read_text("utf-8") == report.details(ROOT / report.RESULTS)


def test_a_suite_is_collected_without_its_paths_and_drawn(tmp_path, monkeypatch):
    for model, layers in (("fbank", 1), ("student", 2)):
        result = {
            "model": {"source": "/somewhere/x", "identity": model, "layers": layers, "features": "hidden"},
            "metrics": {"per": 60.0}, "tests": {"test": {"per": 60.0}, "test:timit-sample": {"per": 70.0}},
            "dev": {"per": 59.0}, "best_step": 4, "training": {"learning_rate": 1e-2}, "config": {"seed": 0},
            "layer_weights": [1 / layers] * layers,
            "history": [{"kind": "train", "step": 2, "loss": 3.0}, {"kind": "dev", "step": 4, "per": 59.0}],
        }  # fmt: skip
        (tmp_path / model / "pr").mkdir(parents=True)
        (tmp_path / model / "pr/result.json").write_text(json.dumps(result))
    monkeypatch.setenv("OUT", str(tmp_path))
    argv = [
        "superb",
        str(tmp_path / "fbank"),
        f"teacher={tmp_path / 'student'}",
        "--note",
        "a few steps",
        "--name",
        "superb-mini",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    superb.main()
    text = (tmp_path / "superb-mini.json").read_text()
    assert "somewhere" not in text
    rows = json.loads(text)["rows"]
    assert [row["name"] for row in rows] == ["fbank", "teacher"]
    assert rows[1]["tasks"]["pr"]["dev_curve"] == [[4, 59.0]]
    assert (tmp_path / "superb-mini.png").read_bytes().startswith(b"\x89PNG")
    shown = report.summary(tmp_path)
    assert "a few steps" in shown
    assert "| teacher | 60.0 | 70.0 | " in shown
    monkeypatch.setattr(sys, "argv", ["superb", str(tmp_path)])
    with pytest.raises(ArmhubertError, match="give a model's folder of an evaluated suite"):
        superb.main()


# ---- cases ------------------------------------------------------------------


@pytest.mark.parametrize("cell", [c._replace(slow=False) for c in cases.rehearsal_cells()], ids=lambda c: c.label)
def test_candidates_of_a_cell_compute_the_same(cell):
    """Baselines are worth a comparison only if they compute what ours computes: outputs and gradients, valid rows."""
    makers = cases.build(cell, torch.device("cpu"), torch.float64, grad=True)
    made = {name: make() for name, make in makers.items()}
    if cell.op == "conv" and cell.ragged:
        made.pop("released")  # lets padding into the group norm, as the released code does
    lengths = cases.lengths_of(cell, torch.device("cpu"))
    results = {}
    for name, candidate in made.items():
        out = candidate.forward()
        outputs = (out,) if isinstance(out, torch.Tensor) else out
        if lengths is not None and cell.op != "loss":
            valid = (torch.arange(cell.T) < lengths[:, None])[..., None]
            outputs = tuple(o * valid for o in outputs)
        last = candidate.leaves[-3] if cell.op != "attend" else candidate.leaves[-1]
        results[name] = [*outputs, *torch.autograd.grad([o.square().sum() for o in outputs], [last])]
    for name, result in results.items():
        for a, b in zip(result, results["ours"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_every_cell_has_a_floor_and_a_label_of_its_own():
    cells = list(cases.gpu_cells())
    assert len({cell.label for cell in cells}) == len(cells)
    for cell in (*cells, *cases.cpu_cells()):
        forward, both = (cell.floor(costs.GPUS["H200"], backward=b) for b in (False, True))
        assert 0 < forward < both < 1


def test_memory_of_the_twins_is_below_the_released_ways():
    runs = candidates(cases.Cell("pair", 2, 150, 4, 16), backward=False)
    memory = {name: peak_extra_bytes(run) for name, run in runs.items()}
    assert 2 * 150 * 64 * 4 < memory["ours"] < memory["released"] / 2


# ---- the clock of a GPU -----------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """What is asked of a GPU, in order, by a stand-in for one whose every event is 1 ms after the one before."""
    calls: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            calls.append("event")

        def query(self) -> bool:
            return False

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: zeros(2))
    monkeypatch.setattr(torch.Tensor, "sum", lambda _: calls.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(cycles / gpu_clock.CYCLES_PER_SECOND))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return calls


def test_the_device_sleeps_while_the_host_queues(calls):
    runs = {"quick": lambda: calls.append("quick"), "slow": lambda: (time.sleep(0.01), calls.append("slow"))}
    timings = gpu_clock.interleave(runs, device=torch.device("cuda"), repeats=3, seconds=9)
    untimed, rounds = calls[:4], calls[4:]
    assert untimed == ["quick", "quick", "slow", "slow"]
    assert len(rounds) == 3 * 10
    assert rounds[:1] + rounds[2:5] == ["flush", "event", "quick", "event"]
    assert 3e-4 <= rounds[1] < 5e-3
    assert rounds[5] == "flush"
    assert 0.015 <= rounds[6] <= 0.05
    assert timings["slow"].median == 1e-3
    assert timings["slow"].host >= 0.01
    assert timings["slow"].ahead == 1


def test_a_run_as_it_is_started_has_no_head_start(calls):
    runs = {"a": lambda: calls.append("a")}
    gpu_clock.interleave(runs, device=torch.device("cuda"), repeats=3, seconds=9, ahead=False)
    assert calls[2:6] == ["flush", "event", "a", "event"]


# ---- workers ----------------------------------------------------------------


def misbehave(job: str) -> dict[str, Any]:
    """Work of a worker process: by name of the trouble it makes."""
    if job == "crash":
        os._exit(3)
    if job == "hang":
        time.sleep(60)
    if job == "raise":
        raise RuntimeError("on purpose")
    if job == "spoil":
        raise isolate.SpoiltError("on purpose")
    return {"value": job, "process": os.getpid(), "spoilt": job == "spoilt"}


def test_a_job_that_fails_crashes_or_hangs_costs_one_row():
    jobs = ["raise", "crash", "hang", "good", "also good"]
    deadline = time.monotonic() + 120
    rows = dict(isolate.run(misbehave, jobs, workers=2, job_seconds=2, deadline=deadline))
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert "RuntimeError" in rows[0]["error"]
    assert "on purpose" in rows[0]["error"]
    assert "exit code 3" in rows[1]["error"]
    assert "stopped after" in rows[2]["error"]
    assert (rows[3]["value"], rows[4]["value"]) == ("good", "also good")


def test_a_spoilt_process_is_not_used_again():
    jobs = ["first", "raise", "spoilt", "second", "spoil", "third"]
    rows = dict(isolate.run(misbehave, jobs, workers=1, job_seconds=9, deadline=time.monotonic() + 120))
    assert "SpoiltError" in rows[4]["error"]
    first, spoilt, second, third = (rows[i]["process"] for i in (0, 2, 3, 5))
    assert first == spoilt
    assert len({first, second, third}) == 3


def test_no_job_begins_with_too_little_time():
    jobs = ["good", "good"]
    options = {"workers": 1, "job_seconds": 9, "least_seconds": 1000}
    rows = dict(isolate.run(misbehave, jobs, deadline=time.monotonic() + 999, **options))
    assert all(row["unreached"] for row in rows.values())


def test_a_failed_capture_keeps_the_eager_times_and_retires_the_process(monkeypatch):
    def fail(run: Any, device: Any) -> Any:
        raise isolate.SpoiltError("no capture: on purpose")

    monkeypatch.setattr(gpu_clock, "captured", fail)
    job = gpu_micro.jobs("cpu", True)[0]
    found = gpu_micro.work(job)
    assert found["spoilt"]
    assert "on purpose" in found["failed"]["ours, as a graph"]
    assert found["candidates"]["ours"]["median"] > 0
    assert found["candidates"]["ours"]["graph"] is None
    job = gpu_model.Job("inference", 1, "cpu", True, "graph")
    found = gpu_model.work(job)
    assert found["spoilt"]
    assert found["candidates"] == {}
    assert "on purpose" in found["failed"]["ours, as a graph"]


def test_a_capture_that_fails_says_that_its_process_is_spoilt(monkeypatch):
    @contextlib.contextmanager
    def capture(graph: Any, stream: Any) -> Iterator[None]:
        assert not gc.isenabled()
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    failed: dict[str, str] = {}
    assert gpu_clock.as_graphs({"a": int, "b": int}, torch.device("cuda"), failed) == ({}, True)
    assert failed.keys() == {"a, as a graph"}
    assert "not permitted" in failed["a, as a graph"]
    assert gc.isenabled()


@pytest.mark.parametrize("kind", ["inference", "distillation"])
def test_what_the_profiler_saw_spoils_its_process(kind):
    found = gpu_model.work(gpu_model.Job(kind, 1, "cpu", True, "kernels"))
    kernels = found["kernels"]
    assert found["spoilt"]
    assert 5 < len(kernels) <= 25
    seconds = [kernel["seconds"] for kernel in kernels]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(kernel["share"] for kernel in kernels) <= 1 + 1e-9
    assert not torch.backends.cudnn.benchmark


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time, pathlib\n"
        "from armhubert.bench import isolate\n"
        "def work(job):\n"
        "    pathlib.Path(job).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "    return {}\n"
        "if __name__ == '__main__':\n"
        "    list(isolate.run(work, [sys.argv[1]], workers=1, job_seconds=60, deadline=time.monotonic() + 60))\n"
    )
    told = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, script, told])
    wait_for(lambda: told.is_file() and told.read_text())
    worker = Path("/proc") / told.read_text()
    parent.kill()
    parent.wait()
    wait_for(lambda: not worker.exists() or "\nState:\tZ" in (worker / "status").read_text())


def wait_for(condition: Callable[[], Any]) -> None:
    stop = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.1)


def test_jobs_past_the_deadline_are_rows_too():
    rows = dict(isolate.run(misbehave, ["good"], workers=1, job_seconds=5, deadline=time.monotonic() - 1))
    assert rows[0]["unreached"]


# ---- checks and report ------------------------------------------------------


def test_the_rule_of_the_checks():
    high = torch.tensor([1.0, 2.0], dtype=torch.float64)
    low = (high + 1e-3).float()
    assert gpu_check.judge(["x"], [(high + 1.9e-3).float()], [low], [high])["ok"]
    assert not gpu_check.judge(["x"], [(high + 2.1e-3).float()], [low], [high])["ok"]
    assert not gpu_check.judge(["x"], [torch.full((2,), torch.nan)], [low], [high])["ok"]


def test_a_sum_that_is_truly_0_is_judged_by_what_it_adds():
    """One frame: any gradient of q is rounding, PyTorch's too, so only the addends tell how much is allowed."""
    for dtype, kind in gpu_check.DTYPES.items():
        inputs = gpu_check.pair("cpu", dtype, 2, 1, 2, 64, 20, True)
        low, high = inputs.run("torch", "resoftmax"), inputs.to(torch.float64).run("torch", "resoftmax")
        assert high[2].abs().max() < 1e-12
        scale = inputs.scales()["d_q"]
        assert 5 < scale < 500
        for error, ok in ((1.0, True), (1e3, False)):
            got = [t.clone() for t in low]
            got[2] += error * torch.finfo(kind).eps * scale
            row = gpu_check.judge(gpu_check.PAIR, got, low, high, inputs.scales())
            assert row["ok"] == ok, row
    assert gpu_check.pair("cpu", "fp32", 2, 3, 2, 64, 20, True).scales() == {}


def test_no_residual_of_l1_is_within_rounding_of_its_jump():
    inputs = gpu_check.loss_inputs("cpu", "bf16", 2, 2, 9, 16, 12).apart()
    values = torch.einsum("lbtd,led->lbte", torch.stack(inputs.hidden).double(), inputs.weight.double())
    values += inputs.bias.double()[:, None, None]
    for view in (inputs.clean, inputs.masked):
        gaps = (view.double() - values).abs()
        assert gaps[gaps.isfinite()].min() > 0.05
        assert 0 < gaps.isnan().sum() < gaps.numel()


def test_checks_find_memory_that_was_never_written(monkeypatch):
    def forgetful(device: str) -> dict[str, Any]:
        return gpu_check.verdict(bool(torch.empty(3, device=device).isfinite().all()), "written")

    monkeypatch.setattr(gpu_check, "CHECKS", dict.fromkeys(("attention", "graph"), forgetful))
    assert not gpu_check.work(gpu_check.Job("attention", "cpu", {}))["ok"]
    monkeypatch.setattr(torch, "empty", torch.ones)
    assert gpu_check.work(gpu_check.Job("graph", "cpu", {}))["ok"]


@pytest.mark.parametrize("job", [j for j in gpu_check.jobs("cpu", True) if j.check in ("padding", "rerun", "dropout")])
def test_checks_run(job):
    assert gpu_check.work(job)["ok"]


def row(label: str, ours: float, released: float, floor: float) -> dict[str, Any]:
    timings = {
        name: {"median": s, "low": s, "high": s, "graph": None, "peak_extra_bytes": 2**20}
        for name, s in (("ours", ours), ("released", released))
    }
    cell = {**cases.Cell("reattend", 1, 2)._asdict(), "label": label}
    return {
        "job": label, "cell": cell, "pass": "forward", "bytes": 1e6, "operations": 1e9, "floor_s": floor,
        "candidates": timings, "failed": {},
    }  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    """Files as the stages write them; the figures are made up for the test."""
    cpu = torch.device("cpu")
    gpu_report.write_stage(
        "check", [{"job": "a", "ok": True, "ratio": 0.5, "at": "x"}, {"job": "b", "error": "E"}], cpu, tmp_path
    )
    gpu_report.write_stage("micro", [row("fast", 1e-5, 3e-5, 5e-6), row("slow", 2e-5, 1e-5, 5e-6)], cpu, tmp_path)
    grid = [
        {"job": f"1 {T}", "B": 1, "T": T, "inside_s": inside, "outside_s": 2.0, "stored_s": 1.2, "storing_s": 0.6}
        for T, inside in ((50, 1.0), (100, 1.5), (200, 3.0))
    ]
    gpu_report.write_stage("variants", grid, cpu, tmp_path)
    whole = {"median": 0.01, "low": 0.01, "high": 0.01, "hours_of_audio_per_second": 4.4, "peak_extra_bytes": None}
    gpu_report.write_stage(
        "model",
        [
            {
                "job": "inference",
                "kind": "inference",
                "batch": 16,
                "seconds_each": 10.0,
                "candidates": {"ours": whole, "released way": {**whole, "median": 0.025}},
            }
        ],
        cpu,
        tmp_path,
    )
    return tmp_path


def test_stages_become_one_report(measured, capsys):
    path = gpu_report.report(measured)
    shown = capsys.readouterr().out
    assert "1 passed, 1 FAILED" in shown
    assert "nothing here is a GPU figure" in shown
    assert "ours behind the best baseline in 1" in shown
    content = json.loads(path.read_text())
    assert content["choices"] == {"inside": [[1, 100]], "stored": [[1, 50, 0], [1, 100, 3], [1, 200, 1]]}
    assert not content["conditions"]["real"]
    assert {p.name for p in measured.iterdir()} == {
        f"{path.stem}{end}" for end in (".json", "-roofline.png", "-bars.png")
    }
    assert "###" not in report.summary(measured)
    assert "Ops on" not in report.details(measured)
    with pytest.raises(ArmhubertError, match="rehearsal"):
        gpu_report.adopt(path)


def test_the_readme_keeps_runs_and_faster_apart(measured, monkeypatch):
    path = gpu_report.report(measured)
    content = json.loads(path.read_text())
    content["conditions"] |= {"real": True, "device": "Some GPU", "capability": "sm_90"}
    path.write_text(json.dumps(content))
    text = report.summary(measured)
    assert "**Runs** on Some GPU: 1 of 2 checks against float64 on the device pass" in text
    assert "Not passed: b." in text
    assert "behind the best baseline in 1 of 2 rows" in text
    assert "| inference | 16 x 10 s | released way | 25.00 ms | 2.50x |" in text
    text = report.details(measured)
    assert "| fast | forward | 10.0 us | 2.00 | released, 30.0 us | 3.00x | 3.00x | 1.0 MB |" in text
    monkeypatch.setattr(variants, "FILE", measured / "variants.json")
    assert json.loads(gpu_report.adopt(path).read_text()) == {"sm_90": content["choices"]}
    content["variants"].append({"job": "64 512", "error": "not reached", "unreached": True})
    path.write_text(json.dumps(content))
    with pytest.raises(ArmhubertError, match="lacks variants 64 512"):
        gpu_report.adopt(path)


def test_what_was_not_tried_has_not_passed_and_a_failure_ends_the_run_so(measured, capsys, monkeypatch):
    rows = [{"job": "a", "ok": True, "ratio": 0.5, "at": "x"}, {"job": "c", **gpu_check.untried("no GPU")}]
    monkeypatch.setattr(sys, "argv", ["gpu", "report", "--out", str(measured)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    gpu_report.write_stage("check", rows, torch.device("cpu"), measured)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 0
    assert "1 passed, 0 FAILED, 1 not tried" in capsys.readouterr().out
    gpu_report.write_stage("check", [*rows, {"job": "d", "unreached": True}], torch.device("cpu"), measured)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 3, "what was not reached has not passed"


def test_graphs_are_compared_where_every_candidate_has_one():
    timed = row("x", 2e-5, 3e-5, 1e-6)
    candidates = timed["candidates"]
    candidates["ours"]["graph"] = {"median": 1e-5}
    assert gpu_report.best(candidates) == 2e-5
    candidates["released"]["graph"] = {"median": 2.5e-5}
    assert gpu_report.best(candidates) == 1e-5
    (merged,) = gpu_report.measured({"micro": [timed], "compiled": []})
    assert gpu_report.best_baseline(merged) == ("released", 2.5e-5, 2.5, 2**20)


def test_times_that_may_be_the_hosts_are_named():
    timed = row("x", 2e-5, 3e-5, 1e-6)
    timed["candidates"]["ours"]["ahead"], timed["candidates"]["released"]["ahead"] = 1.0, 0.2
    content = {"micro": [timed], "compiled": []}
    assert gpu_report.host_bound(*gpu_report.measured(content)) == ["released"]
    for candidate in timed["candidates"].values():
        candidate["graph"] = {"median": 1e-5}
    assert gpu_report.host_bound(*gpu_report.measured(content)) == []


def test_a_later_run_adds_to_a_report(measured, tmp_path_factory):
    """A stage that runs again replaces its rows, the others stay; a report of another folder is taken in alike."""
    path = gpu_report.report(measured)
    before = json.loads(path.read_text())
    gpu_report.write_stage("check", [{"job": "a", "ok": True, "ratio": 0.1, "at": "x"}], torch.device("cpu"), measured)
    after = json.loads(gpu_report.report(measured).read_text())
    assert len(after["check"]) == 1
    assert after["micro"] == before["micro"]
    unreached = {"error": "not reached", "unreached": True}
    rows = [{**after["micro"][0], "pass": "again"}, {"job": "slow", **unreached}, {"job": "new", **unreached}]
    gpu_report.write_stage("micro", rows, torch.device("cpu"), measured)
    after = json.loads(gpu_report.report(measured).read_text())
    assert after["micro"] == [rows[0], before["micro"][1], rows[2]], "what was not reached keeps its earlier row"
    elsewhere = tmp_path_factory.mktemp("other")
    with pytest.raises(ArmhubertError, match="found none"):
        gpu_report.report(elsewhere)
    assert json.loads(gpu_report.report(elsewhere, path).read_text()) == after
    after["conditions"]["device"] = "Some GPU"
    path.write_text(json.dumps(after))
    gpu_report.write_stage("check", [], torch.device("cpu"), elsewhere)
    with pytest.raises(ArmhubertError, match=r"one device, got CPU .* and Some GPU"):
        gpu_report.report(elsewhere, path)


def test_a_stage_that_is_killed_leaves_its_rows(tmp_path, monkeypatch):
    """Jobs that crash, hang or raise cost a row each, with the whole trace; the file is there from the start."""
    stage = gpu.Stage(lambda device, quick: ["raise", "crash", "good", "hang"], misbehave, False, 2)
    monkeypatch.setitem(gpu.STAGES, "check", stage)
    monkeypatch.setattr(gpu, "_label", str)
    seen = []
    write = gpu_report.write_stage
    monkeypatch.setattr(gpu_report, "write_stage", lambda *a: (seen.append([dict(r) for r in a[1]]), write(*a)))
    gpu.run_stage("check", torch.device("cpu"), quick=True, budget=100, out=tmp_path)
    assert all(row.get("unreached") for row in seen[0])
    rows = {row["job"]: row for row in json.loads((tmp_path / "check.json").read_text())["rows"]}
    assert "on purpose" in rows["raise"]["traceback"]
    assert "in misbehave" in rows["raise"]["traceback"]
    assert "exit code 3" in rows["crash"]["error"]
    assert rows["good"]["value"] == "good"
    assert "stopped after" in rows["hang"]["error"]


def test_a_ratio_comes_from_the_run_that_timed_both():
    first, later, failed = row("x", 1.0, 2.0, 0.5), row("x", 1.5, 1.8, 0.5), {"job": "x", "error": "E"}
    later["candidates"]["flex"] = later["candidates"].pop("released")
    (merged,) = gpu_report.measured({"micro": [failed, first], "compiled": [later, failed]})
    assert merged["candidates"] == first["candidates"]
    others = gpu_report.baselines(merged)
    assert {name: round(other.ratio, 3) for name, other in others.items()} == {"released": 2.0, "flex": 1.2}
    assert gpu_report.best_baseline(merged).name == "flex"
    (merged,) = gpu_report.measured({"micro": [failed], "compiled": [later]})
    assert gpu_report.best(merged["candidates"]) == 1.5


def test_compiled_baselines_have_jobs_of_their_own_with_ours(monkeypatch):
    jobs = gpu_micro.compiled_jobs("cuda", False)
    assert [gpu_micro.SLOW.index(job.baseline) for job in jobs] == sorted(
        gpu_micro.SLOW.index(job.baseline) for job in jobs
    )
    assert len({gpu._label(job) for job in jobs}) == len(jobs)
    assert all(job.baseline in job.cell.slow_baselines for job in jobs)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    cell = cases.Cell("loss", 2, 9, H=2, d=16, L=2, Dt=24, slow=True)
    for name in cell.slow_baselines:
        found = gpu_micro.work(gpu_micro.Job(cell, "cpu", True, 2, name))
        assert found["candidates"].keys() == {"ours", name}


def test_a_gpu_has_a_baseline_a_backend_of_sdpa(monkeypatch):
    monkeypatch.setitem(cases._SDPA, "cpu", cases._SDPA["cuda"])
    found = gpu_micro.work(gpu_micro.jobs("cpu", True)[0])
    assert "sdpa flash" in found["candidates"]  # which a CPU has too
    assert {"sdpa cudnn", "sdpa efficient"} <= found["failed"].keys()


def test_jobs_of_a_gpu_are_many_and_picklable():
    import pickle

    for jobs in (gpu_check.jobs("cuda", False), gpu_micro.jobs("cuda", False), gpu_micro.variant_jobs("cuda", False)):
        assert len(jobs) > 25
        assert pickle.loads(pickle.dumps(jobs)) == jobs
    assert {job.arguments.get("dtype") for job in gpu_check.jobs("cuda", False)} >= {"fp32", "fp16", "bf16"}


@pytest.fixture
def script(tmp_path):
    """Run bench/gpu.sh with a stand-in of Python that writes down its calls -> exit status, errors, calls of stages."""
    if sys.platform == "win32":
        pytest.skip("a shell script")
    (tmp_path / "python").write_text(
        f"""#!/bin/sh
echo "$TORCHINDUCTOR_COMPILE_THREADS $*" >>{tmp_path}/calls
case "$1 $*" in -c*) echo "$CUDA" ;; *report*) exit "${{REPORT:-0}}" ;; esac
exit "${{STATUS:-0}}"
"""
    )
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "GPU 0: one that PyTorch cannot use"\n')
    for name in ("python", "nvidia-smi"):
        (tmp_path / name).chmod(0o755)

    def run(*stages: str, **settings: str) -> tuple[int, str, list[list[str]]]:
        environment = {
            "PATH": os.environ["PATH"], "PYTHON": "./python", "OUT": "out", "LIMIT": "480", "CUDA": "True", **settings
        }  # fmt: skip
        done = subprocess.run(
            ["bash", ROOT / "bench/gpu.sh", *stages], env=environment, cwd=tmp_path, timeout=60, text=True,
            stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
        calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
        (tmp_path / "calls").unlink()
        return (
            done.returncode,
            done.stderr,
            [call[call.index("gpu") + 1 :] + call[:1] for call in calls if "gpu" in call],
        )

    return run


def test_the_script_shares_its_time_among_the_stages(script, tmp_path):
    stages = ("check", "micro", "model", "variants")
    status, _, calls = script(*stages, "report")
    assert status == 0
    assert [call[0] for call in calls] == [*stages, "report"]
    assert all(call[call.index("--out") + 1] == str(tmp_path / "out") for call in calls)
    assert all(call[call.index("--device") + 1] == "cuda" for call in calls[:4])
    assert [call[-1] for call in calls[:4]] == ["1", "12", "12", "12"]
    budgets = [int(call[call.index("--budget") + 1]) for call in calls[:4]]
    assert 100 < budgets[0] < 200
    assert budgets == sorted(budgets)
    assert 440 <= budgets[-1] <= 450
    assert [call[0] for call in script()[2]] == [*stages, "compiled", "report"]
    assert script("no-such")[::2] == (2, [])


def test_the_script_rehearses_only_where_there_is_no_gpu(script, tmp_path):
    _, _, calls = script("check", CUDA="False", CUDA_VISIBLE_DEVICES="")
    assert calls[0][1:4] == ["--device", "cpu", "--quick"]
    status, errors, calls = script("check", CUDA="False", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (status, calls) == (1, [])
    assert "a GPU that PyTorch cannot use" in errors
    status, errors, calls = script("check", STATUS="1")
    assert (status, calls) == (1, [])
    assert "must import" in errors


def test_the_script_tells_what_was_not_reached_from_what_failed(script):
    assert script("check", "report", REPORT="3")[0] == 3
    assert script("check", "report", REPORT="1")[0] == 1


def test_gpu_stages_need_no_audio_library():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('soundfile', 'tensorboard', 'matplotlib', 'pytest')));"
        "import armhubert.bench.gpu"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
