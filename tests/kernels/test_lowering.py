"""Every kernel lowers to machine code for the GPUs we claim, without one in the machine.

The whole table is `python -m armhubert.bench lowering`; here, each kernel in its plain form at head width 40
on every target in every dtype, and in bfloat16 on sm_90 at every width and in every form.
"""

import pytest

pytest.importorskip("triton")

from armhubert.bench import lowering

CASES = {f"{case.name} {case.dtype}": case for case in lowering.cases()}
PLAIN = [k for k, case in CASES.items() if case.name.endswith(" d=40") and len(case.name.split()) == 2]
PLAIN += [k for k, case in CASES.items() if case.name == "distillation mse training"]
HOPPER = [k for k, case in CASES.items() if case.dtype == "bf16"]


@pytest.mark.needs_compiler
@pytest.mark.parametrize("target", lowering.TARGETS)
@pytest.mark.parametrize("case", PLAIN)
def test_lowers(case, target):
    row = lowering.measure(CASES[case], target)
    assert row.shared <= lowering.SHARED_LIMIT[target]
    if row.dtype != "fp32":
        assert row.matrix in lowering.MATRIX_INSTRUCTIONS[target]


@pytest.mark.needs_compiler
@pytest.mark.parametrize("case", HOPPER)
def test_fits_hopper(case):
    row = lowering.measure(CASES[case], "sm_90")
    assert row.spilled == 0
    assert row.shared <= lowering.SHARED_LIMIT["sm_90"]
    assert row.matrix == "wgmma.mma_async"
