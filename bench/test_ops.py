"""pytest-benchmark's statistics of each case; `make bench` runs it after the ratios of bench/cpu.py."""

from typing import Any

import pytest
import torch

from armhubert.bench.cases import Cell, cpu_cells
from armhubert.bench.cpu import candidates

CASES = [
    pytest.param(cell, backward, name, id=f"{cell.label} {'f+b' if backward else 'f'} {name}")
    for cell in cpu_cells()
    for backward in (False, True)
    for name in ("ours", "released")
]


@pytest.mark.parametrize(("cell", "backward", "name"), CASES)
def test_op(benchmark: Any, cell: Cell, backward: bool, name: str) -> None:
    """One candidate of one cell."""
    benchmark.group = f"{cell.label} {'forward+backward' if backward else 'forward'}"
    run = candidates(cell, backward=backward)[name]
    with torch.enable_grad() if backward else torch.no_grad():
        benchmark.pedantic(run, rounds=5, warmup_rounds=1)
