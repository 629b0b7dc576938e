import os
import subprocess
import sys

from test_distill import write_speech, write_teacher

SCRIPT = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from armhubert import data, distributed
from armhubert.distill import distill
from armhubert.distill_config import DistillConfig

folder, speech, teacher = sys.argv[1:]
rank = os.environ["RANK"]
distributed._TIMEOUT = timedelta(seconds=6)
if rank == "0":
    measure = data.measure

    def slow(path):
        time.sleep(9)
        return measure(path)

    data.measure = slow
Path(folder, rank).touch()
while len(list(Path(folder).glob("[01]"))) < 2:  # imports take each process another time
    time.sleep(0.05)
config = DistillConfig(
    out=f"{folder}/run", data=(speech,), teacher=teacher, preset="mini", width=32, layers=2, heads=2, ffn=32,
    conv_layers="[(8, 10, 5)] + [(8, 3, 2)] * 4 + [(32, 2, 2)] * 2", steps=1, hold_out=0.0, workers=0, device="cpu",
)
print([report for report in distill(config)][-1].reason, flush=True)
"""


def test_a_scan_may_outlast_the_timeout_of_the_processes(tmp_path):
    speech, teacher = write_speech(tmp_path / "speech", (0.6,)), write_teacher(tmp_path / "teacher")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "script.py"), str(tmp_path), str(speech), str(teacher)],
        capture_output=True, text=True, check=False, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done") == 2
