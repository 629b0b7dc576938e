"""Every kernel lowers to machine code for the GPUs we claim, without one in the machine.

The whole table is `python -m armhubert.bench lowering`; here, each kernel in its plain form (attention at
head width 40) on every target in every dtype, and in bfloat16 on sm_90 at every width and in every form.
"""

import pytest

pytest.importorskip("triton")

from armhubert.bench import lowering

CASES = {f"{case.name} {case.dtype}": case for case in lowering.cases()}
PLAIN = [k for k, case in CASES.items() if case.name.endswith(" d=40") and len(case.name.split()) == 2]
PLAIN += [k for k, case in CASES.items() if case.name == "distillation mse training"]
FRONT_END = ("wave N=512", "wave_pointwise", "conv 3x256 N=256", "norm", "gelu_backward", "window_sums")
PLAIN += [k for k, case in CASES.items() if case.name in {f"frontend {form}" for form in FRONT_END}]
HOPPER = [k for k, case in CASES.items() if case.dtype == "bf16"]


@pytest.mark.needs_compiler
@pytest.mark.parametrize("target", lowering.TARGETS)
@pytest.mark.parametrize("case", PLAIN)
def test_lowers(case, target):
    row = lowering.measure(CASES[case], target)
    assert row.shared <= lowering.SHARED_LIMIT[target]
    if row.dtype != "fp32" and CASES[case].matrix:
        assert row.matrix in lowering.MATRIX_INSTRUCTIONS[target]


@pytest.mark.needs_compiler
@pytest.mark.parametrize("case", HOPPER)
def test_fits_hopper(case):
    row = lowering.measure(CASES[case], "sm_90")
    assert row.spilled == 0
    assert row.shared <= lowering.SHARED_LIMIT["sm_90"]
    assert row.matrix == "wgmma.mma_async" or not CASES[case].matrix
