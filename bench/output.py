"""What the benchmarks' commands share: their options, and the files that they write."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from armhubert.files import write_atomic
from armhubert.machine import conditions


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of `python -m armhubert.bench NAME`, with --out: a folder, by default $OUT or bench/results."""
    made = argparse.ArgumentParser(
        prog=f"python -m armhubert.bench {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")))
    return made


def write_results(name: str, rows: list[dict[str, Any]], device: torch.device, folder: Path) -> Path:
    """`folder`/`name`.json with the rows and their conditions."""
    path = folder / f"{name}.json"
    write_atomic(path, json.dumps({"conditions": conditions(device), "rows": rows}, indent=1) + "\n")
    return path
