import json
import subprocess
from pathlib import Path
from typing import Any

from made import SHAPE, two_processes, write_speech, write_teacher

from armhubert import checkpoint
from armhubert.distill import DistillConfig, distill

SCRIPT = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from armhubert import data
from armhubert.distill import distill
from armhubert.distill_config import DistillConfig

folder, settings = sys.argv[1:]
measure, broadcast, all_reduce, calls = data.measure, dist.broadcast_object_list, dist.all_reduce, []

def patience(group=None):
    backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
    return backend.options._timeout // timedelta(minutes=1)

def measured(path):
    calls.append("measure")
    return measure(path)

def waited(box, group=None, **how):
    calls.append(patience(group))
    return broadcast(box, group=group, **how)

def reduced(values):
    calls.append(patience())
    return all_reduce(values)

data.measure, dist.broadcast_object_list, dist.all_reduce = measured, waited, reduced
*_, finished = distill(DistillConfig(**json.loads(settings)))
assert finished.reason == "done"
Path(folder, os.environ["RANK"]).write_text(json.dumps(calls))
"""


LOSES = """
import sys, os, json
from armhubert import data
from armhubert.distill import DistillConfig, Progress, distill

def gone(path, *crop):
    raise data.ArmhubertError(f"audio file {path!r} does not exist: check the path")

data.RETRY_AFTER = ()
for report in distill(DistillConfig(**json.loads(sys.argv[2]))):
    if isinstance(report, Progress) and report.step == 2 and os.environ["RANK"] == "1":
        data.read_audio = gone
"""


RESUMES = """
import json, os, sys
from armhubert import checkpoint
from armhubert.distill import DistillConfig, distill

def late(path, load=checkpoint.load):
    found = load(path)
    found.state.step -= os.environ["RANK"] == "1"
    return found

checkpoint.load = late
list(distill(DistillConfig(**json.loads(sys.argv[2])), resume=True))
"""


def launch(script: str, folder: Path, settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    return two_processes(str(folder / "script.py"), str(folder), json.dumps(settings))


def run_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "out": str(folder / "run"), "teacher": str(write_teacher(folder / "teacher")), **SHAPE, "hold_out": 0.0,
        "workers": 0, "device": "cpu", "log_every": 1, **changes,
    }  # fmt: skip


def test_the_lead_may_take_days_to_scan_and_nothing_else_may(tmp_path):
    settings = run_of(tmp_path, data=[str(write_speech(tmp_path / "speech", (0.6,)))], steps=1)
    done = launch(SCRIPT, tmp_path, settings)
    assert done.returncode == 0, done.stderr[-3000:]
    lead, other = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert lead.pop(0) == "measure"
    assert lead == other  # from here on the two go together
    assert lead[0] == 7 * 24 * 60  # minutes: what the other waited in meanwhile
    assert set(lead[1:]) == {30}


def test_what_one_process_cannot_read_costs_none_what_was_learned(tmp_path):
    settings = run_of(tmp_path, data=[str(write_speech(tmp_path / "speech"))], steps=100, batch_seconds=2.0)
    done = launch(LOSES, tmp_path, settings)
    assert done.returncode != 0
    assert "wav' does not exist: check the path" in done.stderr
    assert "ArmhubertError: another process of the run could not go on: its own message tells why" in done.stderr
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt").state.step >= 2


def test_data_that_the_lead_refuses_is_refused_by_all_processes(tmp_path):
    done = launch(SCRIPT, tmp_path, run_of(tmp_path, data=[str(tmp_path / "nowhere")], steps=1))
    assert done.returncode != 0
    assert done.stderr.count("ArmhubertError: data source") == 2


def test_processes_that_find_different_checkpoints_do_not_go_on(tmp_path):
    settings = run_of(tmp_path, data=[str(write_speech(tmp_path / "speech", (0.6,)))], steps=2)
    list(distill(DistillConfig(**settings, accumulate=2)))
    done = launch(RESUMES, tmp_path, settings)
    assert done.returncode != 0
    assert "all processes must find the same" in done.stderr
    assert "found step 1: wait" in done.stderr
