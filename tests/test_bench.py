import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from armhubert.bench import cases, gpu_check, gpu_micro, gpu_report, isolate, report
from armhubert.bench.cpu import candidates, peak_extra_bytes
from armhubert.clock import interleave, write_results
from armhubert.errors import ArmhubertError
from armhubert.kernels import costs, reuse_attention

ROOT = Path(__file__).resolve().parents[1]


def test_candidates_are_timed_in_turn():
    calls: list[str] = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert all(t.low <= t.median <= t.high for t in timings.values())


def test_results_carry_their_conditions(tmp_path):
    path = write_results("x", [{"a": 1}], torch.device("cpu"), tmp_path)
    content = json.loads(path.read_text())
    assert content["rows"] == [{"a": 1}]
    assert content["conditions"].keys() >= {"device", "torch", "date"}


def test_the_readme_shows_what_the_result_files_hold():
    text = (ROOT / "README.md").read_text("utf-8")
    shown = report.BEGIN + text.split(report.BEGIN)[1].split(report.END)[0] + report.END
    assert shown == report.render(ROOT / "bench" / "results")


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


# ---- workers ----------------------------------------------------------------


def misbehave(job: str) -> dict[str, Any]:
    """Work of a worker process: by name of the trouble it makes."""
    if job == "crash":
        os._exit(3)
    if job == "hang":
        time.sleep(60)
    if job == "raise":
        raise RuntimeError("on purpose")
    return {"value": job}


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
    write_results(
        "check", [{"job": "a", "ok": True, "ratio": 0.5, "at": "x"}, {"job": "b", "error": "E"}], cpu, tmp_path
    )
    write_results("micro", [row("fast", 1e-5, 3e-5, 5e-6), row("slow", 2e-5, 1e-5, 5e-6)], cpu, tmp_path)
    variants = [
        {"B": 1, "T": T, "inside_s": inside, "outside_s": 2.0} for T, inside in ((50, 1.0), (100, 1.5), (200, 3.0))
    ]
    write_results("variants", variants, cpu, tmp_path)
    whole = {"median": 0.01, "low": 0.01, "high": 0.01, "hours_of_audio_per_second": 4.4, "peak_extra_bytes": None}
    write_results(
        "model",
        [{"kind": "inference", "batch": 16, "seconds_each": 10.0, "candidates": {"ours": whole}}],
        cpu,
        tmp_path,
    )
    return tmp_path


def test_stages_become_one_report(measured, capsys):
    path = gpu_report.report(torch.device("cpu"), measured)
    shown = capsys.readouterr().out
    assert "1 passed, 1 FAILED" in shown
    assert "nothing here is a GPU figure" in shown
    assert "ours behind the best baseline in 1" in shown
    content = json.loads(path.read_text())
    assert content["project_inside"] == [[1, 100]]
    assert not content["conditions"]["real"]
    assert {p.name for p in measured.iterdir()} == {
        f"{path.stem}{end}" for end in (".json", "-roofline.png", "-bars.png")
    }
    assert "###" not in report.render(measured)
    with pytest.raises(ArmhubertError, match="rehearsal"):
        gpu_report.adopt(path)


def test_the_readme_keeps_runs_and_faster_apart(measured, capsys, monkeypatch):
    path = gpu_report.report(torch.device("cpu"), measured)
    content = json.loads(path.read_text())
    content["conditions"] |= {"real": True, "device": "Some GPU", "capability": "sm_90"}
    path.write_text(json.dumps(content))
    text = report.render(measured)
    assert "**Runs** on Some GPU: 1 of 2 checks against float64 on the device pass" in text
    assert "Not passed: b." in text
    assert "behind the best baseline in 1 of 2 rows" in text
    assert "| fast | forward | 10.0 us | 2.00 | released, 30.0 us | 3.00x | 3.00x | 1.0 MB |" in text
    monkeypatch.setattr(reuse_attention, "__file__", str(measured / "reuse_attention.py"))
    assert json.loads(gpu_report.adopt(path).read_text()) == {"sm_90": [[1, 100]]}


def test_of_a_cell_measured_twice_the_one_with_more_baselines_counts():
    few, many = row("x", 1.0, 2.0, 0.5), row("x", 1.5, 2.0, 0.5)
    many["candidates"]["sdpa"] = many["candidates"]["released"]
    assert gpu_report.measured({"micro": [few, many]}) == [many]
    assert gpu_report.measured({"micro": [many, few]}) == [many]
    assert gpu_report.measured({"micro": [{"job": "x", "error": "E"}, few]}) == [few]


def test_jobs_of_a_gpu_are_many_and_picklable():
    import pickle

    for jobs in (gpu_check.jobs("cuda", False), gpu_micro.jobs("cuda", False), gpu_micro.variant_jobs("cuda", False)):
        assert len(jobs) > 25
        assert pickle.loads(pickle.dumps(jobs)) == jobs
    assert {job.arguments.get("dtype") for job in gpu_check.jobs("cuda", False)} >= {"fp32", "fp16", "bf16"}


def test_gpu_stages_need_no_audio_library():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('soundfile', 'tensorboard', 'matplotlib', 'pytest')));"
        "import armhubert.bench.gpu"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
