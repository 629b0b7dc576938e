import json

from armhubert.bench import gpu_model, loader, report, start


def test_the_loader_is_measured_stage_by_stage(tmp_path):
    formats = loader.write_formats(tmp_path)
    assert formats.keys() == loader.FORMATS.keys()
    row = loader.measure_folder(formats["opus"][:3], workers=(0, 1), batch_seconds=30, least=1, repeats=1)
    assert row["files"] == 3
    assert list(row["rates"]) == ["decode", "read", "scan", "0", "1"]
    assert all(rate["cpu"] > 0 and rate["clock"] > 0 for rate in row["rates"].values())


def test_a_step_of_distillation_is_timed_against_a_straightforward_loop():
    job = gpu_model.Job("distillation", 2, "cpu", quick=True)
    row = gpu_model.work(job)
    assert not row["failed"]
    assert {"ours", "straightforward: two teacher passes, sdpa, eager loss"} <= row["candidates"].keys()


def test_every_machine_has_its_rows_and_its_details(tmp_path):
    def profile(processor: str, seconds: float) -> dict:
        def cell(batch: int, length: float, **times: float) -> dict:
            return {"batch": batch, "seconds": length, "timings": {k: {"median": t} for k, t in times.items()}}

        model = {"mode": "eager", "peak_memory": None, "feature_error": None}
        both = {"runs/arm (eager)": seconds, "hubert-base (eager)": 1.0}
        return {
            "conditions": {
                "device": "CPU, 2 threads", "processor": processor, "extensions": "avx2 avx512f", "torch": "2",
                "date": "today", "repeats": 5,
            },
            "rates": {"macs_per_second": 1e11},
            "models": [{"name": name, "source": name.split()[0], **model} for name in both],
            "cells": [cell(1, 10, **both), cell(1, 300, **{"runs/arm (eager)": 9.0}), cell(8, 10, **both)],
            "ragged": [{"name": "runs/arm (eager)", "rates": {"equal": 100.0, "sorted": 95.0, "unsorted": 80.0}}],
        }  # fmt: skip

    def write(path: str, content: dict) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))

    write("a/profile/profile.json", profile("Some CPU", 0.5))
    for kind in ("profile", "length", "ragged"):
        write(f"b/{kind}/profile.json", profile("Another CPU", 0.25))
    text = report.summary(tmp_path)
    titles = " | ".join(f"{machine}, {cell}" for machine in "ab" for cell in ("1 x 10 s", "8 x 10 s"))
    assert f"| model | {titles} | peak memory | feature error |" in text
    assert "| student | **2.0x** | **2.0x** | **4.0x** | **4.0x** |  |  |" in text
    assert "| HuBERT Base | 1000 ms | 1000 ms | 1000 ms | 1000 ms |  |  |" in text
    assert "a: Some CPU (avx2, avx512f), 2 threads, torch 2, today, matrix rate 100 GMAC/s; b: Another CPU" in text
    assert text.count("![profile](bench/results/") == 1
    text = report.details(tmp_path)
    assert "| model | 1 x 10 s | 1 x 300 s | 8 x 10 s |" in text
    assert "| student | 250 ms, 4.0x | 9000 ms | 250 ms, 4.0x |" in text
    assert "| HuBERT Base | 1000 ms, 1.0x | - | 1000 ms, 1.0x |" in text
    assert text.count("![profile](../bench/results/b/profile/profile.png)") == 1
    some, another = text.index("## a: Some CPU"), text.index("## b: Another CPU")
    assert some < another < text.index("eager 95% (80%)")
    assert text.count("![cost against length](../bench/results/b/length/profile-length.png)") == 1
    assert text.count("### Unequal lengths") == 1


def test_every_command_is_started():
    found = start.commands("folder")
    assert found["armhubert --help"] == ["-m", "armhubert.cli", "--help"]
    assert {"armhubert distill --help", "armhubert profile --help", "import, load"} <= found.keys()
