"""Lower every kernel to machine code for the GPUs we claim, without one in the machine, and read what came out.

`python -m armhubert.bench lowering` prints a row per kernel, shape, target and dtype, and writes results/lowering.json.
What lowers has not thereby been run.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from armhubert.kernels import triton_conv_frontend as frontend
from armhubert.kernels import triton_masked_distillation as distillation
from armhubert.kernels import triton_reuse_attention as attention

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# looked for in order, the strongest first
MATRIX_INSTRUCTIONS = {
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}
HEAD_WIDTHS = (36, 40, 64, 128)
LAYERS = 12


@dataclass(frozen=True)
class Case:
    """One kernel in one shipped configuration: argument types and constants by name."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    dtype: str
    matrix: bool = True  # whether a matrix product is in it


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case: registers a thread, spills, bytes of shared memory."""

    kernel: str
    target: str
    dtype: str
    registers: int
    spilled: int  # bytes of stack on NVIDIA, registers on AMD
    shared: int
    matrix: str


def _attention_cases(dtype: str) -> Iterator[Case]:
    low = f"*{dtype}"
    for d in HEAD_WIDTHS:
        for settings in ("exact", "resoftmax", "dropout"):
            head = {"scale": "fp32", **attention._tiles(d), "ALIGN": 8 if d % 16 else 16, "PRECISION": "ieee"}
            if dtype == "fp32" and d % 16:
                head["ALIGN"] = 4
            rows = {"T": "i32", "H": "i32"}
            strides = {f"{x}_{y}": "i32:16" for x in "qkv" for y in "bt"}
            strides |= {f"{x}_h": "i32:16" if d % 16 == 0 else "i32" for x in "qkv"}
            seed = "*i64" if settings == "dropout" else None
            dropout = {"threshold": "i32", "inverse_keep": "fp32"}
            inputs = {"q_ptr": low, "k_ptr": low, "v_ptr": low}
            tables = {"lengths_ptr": "*i64", "lse_ptr": "*fp32", "norm_ptr": "*fp32"}
            resoftmax = {"RESOFTMAX": settings == "resoftmax"}
            gradients = {"g_ptr": low, "seed_ptr": seed, "delta_ptr": "*fp32", "shift_ptr": "*fp32", **dropout}
            common = inputs | tables | strides | rows | head
            forms: list[tuple[str, dict[str, Any]]] = [
                ("backward_q", common | gradients | resoftmax | {"out_ptr": low, "dq_ptr": low}),
                ("backward_kv", common | gradients | resoftmax | {"dk_ptr": low, "dv_ptr": low}),
            ]
            if settings != "resoftmax":
                forms.append(("attend", common | dropout | {"seed_ptr": seed, "out_ptr": low}))
            if settings != "dropout":
                forms.append(("reattend", common | resoftmax | {"out_ptr": low}))
                fused = {"x_ptr": low, "weight_ptr": low, "bias_ptr": low, "x_b": "i32:16", "x_t": "i32:16"}
                forms.append(
                    ("reattend_fused", common | resoftmax | fused | {"out_ptr": low, "C": 12 * d, "BLOCK_C": 32})
                )
            for name, arguments in forms:
                shipped = attention.config(name, d, DTYPES[dtype], settings != "exact")
                arguments = arguments | {"BLOCK_M": shipped.BLOCK_M, "BLOCK_N": shipped.BLOCK_N}
                kernel = getattr(attention, f"{name}_kernel")
                label = f"{name} {settings} d={d}" if settings != "exact" else f"{name} d={d}"
                yield Case(label, kernel, arguments, shipped.num_warps, shipped.num_stages, dtype)


def _distillation_cases(dtype: str) -> Iterator[Case]:
    low = f"*{dtype}"
    shipped = distillation.config(DTYPES[dtype])
    for l1, keep in ((False, False), (False, True), (True, True)):
        arguments: dict[str, Any] = {
            **dict.fromkeys(("hidden", "clean", "masked"), (low,) * LAYERS),
            **dict.fromkeys(("weight_ptr", "bias_ptr", "residual_ptr"), low),
            **{"mask_ptr": "*i1", "lengths_ptr": "*i64", "partial_ptr": "*fp32", "N": "i32", "T": "i32"},
            **dict.fromkeys(("h_n", "clean_n", "masked_n"), "i32:16"),
            **{"L": LAYERS, "C": 480, "E": 768, "L1": l1, "KEEP": keep, "PRECISION": "ieee"},
            **{name: getattr(shipped, name) for name in ("BLOCK_N", "BLOCK_E", "BLOCK_C")},
        }
        label = f"distillation {'l1' if l1 else 'mse'}{' training' if keep else ''}"
        yield Case(label, distillation.forward_kernel, arguments, shipped.num_warps, shipped.num_stages, dtype)


def _frontend_cases(dtype: str) -> Iterator[Case]:
    """The default student's wide layers and HuBERT's; gradients are plain matrix products but for GELU's."""
    low = f"*{dtype}"
    counts = dict.fromkeys(("T", "P", "out_P", "rows", "rows_in", "g_P", "x_b", "w_b", "numbers"), "i32")
    wave: dict[str, Any] = {
        **dict.fromkeys(("x_ptr", "w_ptr", "w0_ptr", "out_ptr"), low),
        **dict.fromkeys(("shift_ptr", "bias0_ptr"), "*fp32"),
        **{"K": 10, "TAPS": 16, "STRIDE": 5, "PRECISION": "ieee"},
    }
    forms: list[tuple[str, str, dict[str, Any]]] = [
        ("wave", f"wave N={N}", {**wave, "bias_ptr": "*fp32", "N": N, "ACTIVATE": True}) for N in (128, 512)
    ]
    for z in (None, low):
        label = "wave_pointwise" if z is None else "wave_pointwise training"
        forms.append(("wave_pointwise", label, {**wave, "bias_ptr": None, "z_ptr": z, "C": 128, "N": 256}))
    for C, N, taps, stride in ((256, 256, 3, 2), (256, 480, 1, 1), (480, 480, 2, 2), (512, 512, 3, 2)):
        shape = {"C": C, "N": N, "TAPS": taps, "STRIDE": stride, "PRECISION": "ieee"}
        maps = {"x_ptr": low, "w_ptr": low, "bias_ptr": None, "out_ptr": low, "z_ptr": None}
        label = f"conv {taps}x{C} N={N}"
        forms.append(("conv", label, shape | maps))
        if C == 256:
            forms.append(("conv", f"{label} training", shape | maps | {"z_ptr": low}))
        if C == 512:
            forms.append(
                ("conv", f"{label} before norm", shape | maps | {"bias_ptr": low, "out_ptr": None, "z_ptr": low})
            )
    for name, label, arguments in forms:
        shipped = frontend.config(name, DTYPES[dtype])
        arguments |= {key: getattr(shipped, key) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
        kernel = getattr(frontend, f"{name}_kernel")
        yield Case(f"frontend {label}", kernel, counts | arguments, shipped.num_warps, shipped.num_stages, dtype)
    norm = {"z_ptr": low, "weight_ptr": low, "bias_ptr": low, "out_ptr": low, "eps": "fp32", "N": 512, "WIDTH": 512}
    norm["BLOCK_M"] = frontend.NORM_BLOCK
    yield Case("frontend norm", frontend.norm_kernel, counts | norm, frontend.NORM_WARPS, 1, dtype, False)
    for a in (low, None):
        gelu = {"g_ptr": low, "z_ptr": low, "gz_ptr": low, "a_ptr": a, "N": 256, "BLOCK": frontend.GELU_BLOCK}
        label = "frontend gelu_backward" + ("" if a is None else " with activation")
        yield Case(label, frontend.gelu_backward_kernel, counts | gelu, frontend.GELU_WARPS, 1, dtype, False)
    sums = {"x_ptr": low, "frames_ptr": "*i64", "out_ptr": "*fp64", "K": 10, "STRIDE": 5, "TAPS": 16}
    sums["BLOCK_M"] = frontend.SUMS_BLOCK
    yield Case("frontend window_sums", frontend.window_sums_kernel, counts | sums, frontend.SUMS_WARPS, 1, dtype, False)


def cases() -> Iterator[Case]:
    """Every kernel in every shipped configuration, in three dtypes."""
    for dtype in DTYPES:
        yield from _attention_cases(dtype)
        yield from _distillation_cases(dtype)
        yield from _frontend_cases(dtype)


def compile_case(case: Case, target: str) -> Any:
    """Triton's compiled kernel: machine code and the stages before it in `.asm`."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(case.kernel.arg_names):
        value = case.arguments[name]
        if isinstance(value, tuple):
            signature[name] = value
            attributes |= {(index, part): [["tt.divisibility", 16]] for part in range(len(value))}
        elif isinstance(value, str) and name != "PRECISION":
            kind, _, divisor = value.partition(":")
            signature[name] = kind
            # what a launch would find out for itself: allocations start at multiples of 16 bytes
            if divisor or kind.startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(index,)] = value
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=TARGETS[target], options=options)


def measure(case: Case, target: str) -> Row:
    """Compile a case and read its resources."""
    binary = compile_case(case, target)
    if "cubin" in binary.asm:
        text = binary.asm["ptx"]
        usage = _resource_usage(binary.asm["cubin"])
        # Triton's kernels have no use for a stack but spills
        registers, spilled = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    else:
        text = binary.asm["amdgcn"]
        registers, spilled = (_number(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count"))
    matrix = next((name for name in MATRIX_INSTRUCTIONS[target] if name in text), "none")
    return Row(case.name, target, case.dtype, registers, spilled, binary.metadata.shared, matrix)


def _number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[0])


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def table() -> Iterator[Row]:
    """Every case on every target: some 600 compilations, minutes on a laptop; Triton caches them."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        count = len(list(cases()))
        yield from pool.map(_row, [(index, target) for index in range(count) for target in TARGETS])


def _row(job: tuple[int, str]) -> Row:
    index, target = job  # an index, since a jit function does not pickle
    return measure(_all_cases()[index], target)


@cache
def _all_cases() -> tuple[Case, ...]:
    return tuple(cases())


def main() -> None:
    """Print the table and write results/lowering.json beside it."""
    shown = Table("kernel", "target", "dtype", "registers", "spilled", "shared", "matrix", title="lowers; not run")
    rows = []
    for row in track(table(), total=len(_all_cases()) * len(TARGETS), description="compiling", transient=True):
        rows.append(row)
        shown.add_row(*(str(value) for value in asdict(row).values()))
    Console(width=110).print(shown)
    path = Path(__file__).parent / "results" / "lowering.json"
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    print(f"{len(rows)} rows -> {path}")
