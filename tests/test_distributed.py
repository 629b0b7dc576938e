import json
import os
import subprocess
import sys

from made import SHAPE, write_speech, write_teacher

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
measure, barrier, all_reduce, calls = data.measure, dist.barrier, dist.all_reduce, []

def patience(group=None):
    backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
    return backend.options._timeout // timedelta(minutes=1)

def measured(path):
    calls.append("measure")
    return measure(path)

def waited(group=None):
    calls.append(patience(group))
    return barrier(group)

def reduced(values):
    calls.append(patience())
    return all_reduce(values)

data.measure, dist.barrier, dist.all_reduce = measured, waited, reduced
*_, finished = distill(DistillConfig(**json.loads(settings)))
assert finished.reason == "done"
Path(folder, os.environ["RANK"]).write_text(json.dumps(calls))
"""


def test_the_lead_may_take_days_to_scan_and_nothing_else_may(tmp_path):
    settings = {
        "out": str(tmp_path / "run"), "data": [str(write_speech(tmp_path / "speech", (0.6,)))],
        "teacher": str(write_teacher(tmp_path / "teacher")), **SHAPE, "steps": 1, "hold_out": 0.0, "workers": 0,
        "device": "cpu",
    }  # fmt: skip
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "script.py"), str(tmp_path), json.dumps(settings)],
        capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lead, other = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert lead.pop(0) == "measure"
    assert lead == other  # from here on the two go together
    assert lead[0] == 7 * 24 * 60  # minutes: what the other waited in meanwhile
    assert set(lead[1:]) == {30}
