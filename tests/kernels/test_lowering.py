"""Every kernel lowers to machine code for the GPUs we claim, without one in the machine.

The whole table is `python -m armhubert.bench lowering`, committed; here, that it is today's, and each kernel in its
plain form (attention at head width 40) on every target in every dtype (TF32: sm_90), and in bfloat16 on sm_90 in every
form.
"""

import ast
import dataclasses
import inspect

import pytest

pytest.importorskip("triton")

import torch
from oracle import INTERPRET

from armhubert.bench import lowering

CASES = {} if INTERPRET else {f"{c.name} {c.target} {c.dtype}": c for c in lowering.cases()}
PLAIN = [k for k, c in CASES.items() if c.name.split(":")[0].endswith(" d=40") and len(c.name.split()) == 3]
FRONT_END = ("wave_pointwise", "conv C=256 N=256", "wave N=512", "norm", "gelu_backward", "window_sums")
PLAIN += [
    k
    for k, c in CASES.items()
    if c.name.startswith("distillation mse training:")
    or (c.name.startswith("front end") and "training" not in c.name and c.name.split(": ")[1].startswith(FRONT_END))
]
PLAIN = [k for k in PLAIN if CASES[k].dtype != "tf32" or CASES[k].target == "sm_90"]
HOPPER = [k for k, c in CASES.items() if c.dtype == "bf16" and c.target == "sm_90"]


@pytest.mark.needs_compiler
@pytest.mark.parametrize("case", PLAIN)
def test_lowers(case):
    row = lowering.measure(CASES[case])
    assert row.shared <= lowering.SHARED_LIMIT[row.target]
    if row.dtype != "fp32" and CASES[case].matrix:
        assert row.matrix in lowering.MATRIX_INSTRUCTIONS[row.target]


@pytest.mark.needs_compiler
@pytest.mark.parametrize("case", HOPPER)
def test_fits_hopper(case):
    fits_hopper(CASES[case], lowering.measure(CASES[case]))


def fits_hopper(case: lowering.Case, row: lowering.Row) -> None:
    # what another Triton makes of it is in kernels/README.md: nobody can choose for all of them
    assert row.spilled == 0 or row.triton != next(iter(lowering.read().values())).triton
    assert row.shared <= lowering.SHARED_LIMIT["sm_90"]
    assert row.matrix == "wgmma.mma_async" or not case.matrix


@pytest.mark.needs_compiler
def test_the_committed_table_is_todays():
    """A row for every shipped configuration, made from today's source; none spills on sm_90."""
    rows = lowering.read()
    missing = [name for name, case in CASES.items() if case.key not in rows]
    assert not missing, "python -m armhubert.bench lowering makes the rows of a kernel that has changed"
    assert len(rows) == len(CASES)
    for case in CASES.values():
        row = rows[case.key]
        assert (row.kernel, row.target, row.dtype) == (case.name, case.target, case.dtype)
        assert row.shared <= lowering.SHARED_LIMIT[row.target]
        if row.dtype != "fp32" and case.matrix:
            assert row.matrix in lowering.MATRIX_INSTRUCTIONS[row.target]
        if row.target == "sm_90":
            assert row.spilled == 0
            if row.dtype in ("bf16", "fp16"):
                fits_hopper(case, row)


@pytest.mark.needs_compiler
def test_a_row_goes_out_of_date_with_what_it_was_made_of():
    case = next(iter(CASES.values()))
    assert case.key != dataclasses.replace(case, num_stages=case.num_stages + 1).key
    code = lowering.source(case.kernel)
    assert "def _columns" in code, "what a kernel calls is part of it"
    assert "LOG2E" in code
    assert ast.get_docstring(ast.parse(inspect.getsource(case.kernel.fn)).body[0]) not in code


@pytest.mark.needs_compiler
def test_a_launch_on_odd_arguments_lowers():
    """What a launcher takes and the interpreter never types: one head, one frame, one column, 32-bit lengths, views."""
    attention = lowering.attention
    q, v, x = (torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16) for _ in range(3))
    row, lengths = torch.zeros(1, 1, 1), torch.ones(1, dtype=torch.int32)
    with lowering.recording(lowering.TARGETS["sm_90"]) as launches:
        attention.attend_forward(q, q, v, lengths, None, 0.0, True)
        attention.reattend_fused_forward(q, q, x[0], x[0, 0], None, row, lengths, True)
        attention.reattend_stored_forward(torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), v, None, True)
        attention.attention_backward(x[0], q, q, v, x[0], row, row[:0], None, lengths.long(), 0.5, False)
        lowering.positional.forward(x[0], x[0], x[0, 0])
    assert len(launches) == 6
    for kernel, spec in launches:
        assert lowering.measure(lowering.Case.of("odd", "sm_90", "bf16", kernel, spec)).spilled == 0


@pytest.mark.needs_compiler
@pytest.mark.parametrize("kernel", ["attend", "backward_q", "backward_kv"])
def test_four_entries_share_a_draw_of_dropout(kernel):
    """A thread's share of a tile are 16 or 32 entries; a draw takes 28 instructions, which may be 7 an entry."""
    way = kernel if kernel == "attend" else "backward"
    case = CASES[f"{way} dropout d=40: {kernel} sm_90 bf16"]
    sizes = {case.kernel.arg_names[path[0]]: value for path, value in case.constants.items() if len(path) == 1}
    entries = sizes["BLOCK_M"] * sizes["BLOCK_N"] // (32 * case.num_warps)
    assert lowering.measure(case).loop < 30 * entries
