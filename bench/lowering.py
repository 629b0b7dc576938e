"""Lower every kernel to machine code for the GPUs we claim, without one in the machine, and read what came out.

`python -m armhubert.bench lowering` compiles what results/lowering.json lacks, or has of another Triton, and prints the
table. What is compiled is what a launch asks for: the launchers run on CPU tensors under a driver that only writes down
types, alignments and constants. What lowers has not thereby been run.
"""

import argparse
import ast
import contextlib
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction, driver

from armhubert.files import write_atomic
from armhubert.kernels import triton_conv_frontend as frontend
from armhubert.kernels import triton_masked_distillation as distillation
from armhubert.kernels import triton_positional_convolution as positional
from armhubert.kernels import triton_reuse_attention as attention
from armhubert.kernels.runtime import FP_FUSION, frame_counts

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
"""tf32: float32 where the caller allows products in TensorFloat-32."""
# of a program; sm_80 itself has 163 KiB, but what is lowered for it is what sm_86 and sm_89 are given as well
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# looked for in order, the strongest first
MATRIX_INSTRUCTIONS = {
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}
HEAD_WIDTHS = (36, 40, 64, 128)
HEADS, LAYERS, TEACHER = 12, 12, 768
NO_PRODUCT = ("norm_kernel", "gelu_backward_kernel", "window_sums_kernel")
RESULTS = Path(__file__).parent / "results" / "lowering.json"

# ---- what launches ask for --------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One kernel as a launch specialises it: types, constants and alignments by argument."""

    name: str
    target: str
    dtype: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None

    @classmethod
    def of(cls, name: str, target: str, dtype: str, kernel: Any, spec: dict[str, Any]) -> "Case":
        """From what the compiler would be given for a launch."""
        aligned = {path: value for path, value in spec["configs"][0].items() if value}
        limit = json.loads(spec["specialization_data"])["options"].get("maxnreg")
        scheduled = spec["num_warps"], spec["num_stages"], limit
        return cls(name, target, dtype, kernel, spec["signature"], spec["constants"], aligned, *scheduled)

    @property
    def matrix(self) -> bool:
        """Whether a matrix product is in it."""
        return self.kernel.__name__ not in NO_PRODUCT

    @property
    def key(self) -> str:
        """Digest of the kernel's source and of all that it is compiled with: a row of another key is out of date."""
        scheduled = (self.num_warps, self.num_stages, self.maxnreg)
        parts = (self.target, self.signature, self.constants, self.attributes, *scheduled)
        return hashlib.sha256(f"{source(self.kernel)}{parts}".encode()).hexdigest()[:16]


@cache
def source(kernel: JITFunction) -> str:
    """A kernel's code, and our functions and constants that it uses, however they are laid out."""
    found: dict[str, str] = {}

    def visit(function: Any) -> None:
        if function.__name__ in found:
            return
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        tree.body = tree.body[ast.get_docstring(tree) is not None :]
        found[function.__name__] = ast.unparse(tree)
        for node in ast.walk(tree):
            value = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(value, triton.language.constexpr):
                found[node.id] = repr(value.value)  # type: ignore[attr-defined]
            inner = getattr(value, "fn", value)
            if inspect.isfunction(inner) and inner.__module__.startswith("armhubert.kernels"):
                visit(inner)

    visit(kernel.fn)
    return str(sorted(found.items()))


class _Scribe:
    """A driver of a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # the key of Triton's per-device caches

    def get_current_stream(self, _: Any) -> int:
        return 0


@contextlib.contextmanager
def recording(target: GPUTarget) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Within, launches are written down and not made: the kernel, and what its compiler would be given."""
    launches: list[tuple[Any, dict[str, Any]]] = []

    def write_down(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launches.append((fn.jit_function, compile))
        return True

    hook, active = knobs.runtime.jit_cache_hook, driver._active
    knobs.runtime.jit_cache_hook = write_down
    driver.set_active(_Scribe(target))
    try:
        yield launches
    finally:
        driver.set_active(active)  # not reset_active, which wants a GPU
        knobs.runtime.jit_cache_hook = hook


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
    """Within, float32 is multiplied in that precision, "ieee" or "tf32"."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, precision
    try:
        yield
    finally:
        settings.fp32_precision = before


Launch = tuple[str, Callable[[], Any]]


def _attention_launches(dtype: torch.dtype) -> Iterator[Launch]:
    B, T, H = 2, 50, HEADS
    lengths, seed = torch.tensor([50, 41]), torch.tensor([3])
    for d in HEAD_WIDTHS:
        q, k, v = torch.zeros(B, T, 3, H, d, dtype=dtype).unbind(2)
        x, weight, bias = (torch.zeros(s, dtype=dtype) for s in ((B, T, H * d), (H * d, H * d), (H * d,)))
        out, row = torch.zeros(B, T, H * d, dtype=dtype), torch.zeros(B, H, T)
        kept = torch.zeros(B, H, T, attention.pitched(T), dtype=dtype)
        for name in ("exact", "resoftmax", "dropout"):
            again, dropout = name == "resoftmax", 0.1 if name == "dropout" else 0.0
            key = seed if dropout else None
            norm = row if again else row[:0]
            ways: dict[str, Callable[..., Any]] = {
                "backward": partial(
                    attention.attention_backward, out, q, k, v, out, row, norm, lengths, key, dropout, again
                )
            }
            if not again:
                ways["attend"] = partial(attention.attend_forward, q, k, v, lengths, key, dropout, False)
            if name == "exact":
                ways["attend storing"] = partial(attention.attend_forward, q, k, v, lengths, None, 0.0, True)
            if name != "dropout":
                ways["reattend"] = partial(attention.reattend_forward, q, k, v, row, lengths, again)
                ways["reattend stored"] = partial(attention.reattend_stored_forward, kept, v, lengths, again)
                ways["reattend fused"] = partial(
                    attention.reattend_fused_forward, q, k, x, weight, bias, row, lengths, again
                )
            for way, launch in ways.items():
                yield f"{way}{'' if name == 'exact' else ' ' + name} d={d}", launch


def _distillation_launches(dtype: torch.dtype) -> Iterator[Launch]:
    B, T, C, E = 2, 50, 480, TEACHER
    hidden, views = ([torch.zeros(B, T, width, dtype=dtype) for _ in range(LAYERS)] for width in (C, E))
    weight, bias = torch.zeros(LAYERS, E, C, dtype=dtype), torch.zeros(LAYERS, E, dtype=dtype)
    mask, lengths = torch.zeros(B, T, dtype=torch.bool), torch.tensor([50, 41])
    for l1, keep in ((False, False), (False, True), (True, True)):
        label = f"distillation {'l1' if l1 else 'mse'}{' training' if keep else ''}"
        yield label, partial(distillation.forward, hidden, weight, bias, views, views, mask, lengths, l1, keep)
    one_view = hidden, weight, bias, views, None, None, lengths, False, True
    yield "distillation mse training, one view", partial(distillation.forward, *one_view)


def _frontend_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """The default student's stack, HuBERT's, and that of the large teachers, which have norms and biases."""
    student = ((128, 10, 5), (256, 1, 1), (256, 3, 2), (480, 1, 1), (480, 2, 2))
    teacher = ((512, 10, 5), (512, 3, 2), (512, 2, 2))
    x = torch.zeros(2, 3000, dtype=dtype)
    yield "front end", partial(frontend.window_sums, x, 10, 5, torch.tensor([500, 400]))
    for name, stack in (("student", student), ("teacher", teacher), ("large", teacher)):
        large = name == "large"
        (C, K, stride), *rest = stack
        w0 = torch.zeros(C, K, dtype=dtype)
        w0 = w0.expand(2, C, K) if large else w0.repeat(2, 1, 1)
        weights, inputs = [], C
        for channels, kernel, _ in rest:
            weights.append(torch.zeros(channels, inputs, kernel, dtype=dtype))
            inputs = channels
        biases = [torch.zeros(w.shape[0], dtype=dtype) for w in weights] if large else []
        norms = [torch.zeros(c, dtype=dtype) for c, _, _ in stack for _ in range(2)] if large else []
        common = x, torch.zeros(2, K), w0, torch.zeros(2, C), weights, biases, norms
        strides = [stride, *(s for _, _, s in rest)]
        for keep in (False, True):
            label = f"front end {name}{' training' if keep else ''}"
            yield label, partial(frontend.forward, *common, strides, 1e-5, keep)
        counts = frame_counts(3000, [k for _, k, _ in stack], strides)
        rows = frontend.padded_counts(counts, strides)
        kept: list[Tensor] = [torch.zeros(2, r, c, dtype=dtype) for r, (c, _, _) in zip(rows, stack, strict=True)]
        g = torch.zeros(2, counts[-1], inputs, dtype=dtype)
        yield f"front end {name} backward", partial(frontend.backward, g, *common, kept[1:], strides, 1e-5, False)


def _positional_launches(dtype: torch.dtype) -> Iterator[Launch]:
    """The default student's convolution and HuBERT's, which are made in 16 bits only."""
    for C in (480, 768) if dtype != torch.float32 else ():
        for T in (50, 600):
            x, weight, bias = (torch.zeros(s, dtype=dtype) for s in ((2, T, C), (C, C // 16, 128), (C,)))
            yield f"positional convolution {C} T={T}", partial(positional.forward, x, weight, bias)


@cache
def cases() -> tuple[Case, ...]:
    """Every kernel in every shipped configuration, by dtype and target; what is the same in another is left out."""
    found: dict[str, Case] = {}
    for dtype, kind in DTYPES.items():
        for target, gpu in TARGETS.items():
            for makers in (_attention_launches, _distillation_launches, _frontend_launches, _positional_launches):
                for name, launch in makers(kind):
                    with recording(gpu) as launches, _products_in("tf32" if dtype == "tf32" else "ieee"):
                        launch()
                    for kernel, spec in launches:
                        case = Case.of(f"{name}: {_label(kernel, spec)}", target, dtype, kernel, spec)
                        found.setdefault(case.key, case)
    return tuple(found.values())


def _label(kernel: Any, spec: dict[str, Any]) -> str:
    """The kernel and the sizes that tell one of its launches from another."""
    values = {kernel.arg_names[path[0]]: value for path, value in spec["constants"].items() if len(path) == 1}
    sizes = [f"{key}={values[key]}" for key in ("C", "N", "TAPS") if key in values and "HEAD" not in values]
    parts = ["with activation"] if "a_ptr" in kernel.arg_names and "a_ptr" not in values else []
    return " ".join([kernel.__name__.removesuffix("_kernel"), *sizes, *parts])


# ---- what the compiler made of it -------------------------------------------


@dataclass(frozen=True)
class Row:
    """What the compiler made of a case: registers a thread, spills, bytes of shared memory, instructions of a loop."""

    kernel: str
    target: str
    dtype: str
    registers: int
    spilled: int  # bytes of stack on NVIDIA, registers on AMD
    shared: int
    # of the longest innermost loop, with what only its last round does; 0: all are unrolled; None: AMD's
    loop: int | None
    matrix: str
    triton: str
    key: str


def compile_case(case: Case) -> Any:
    """Triton's compiled kernel: machine code and the stages before it in `.asm`."""
    spec = ASTSource(case.kernel, case.signature, case.constants, case.attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **FP_FUSION}
    if case.maxnreg:
        options["maxnreg"] = case.maxnreg
    return triton.compile(spec, target=TARGETS[case.target], options=options)


def measure(case: Case) -> Row:
    """Compile a case and read its resources."""
    binary = compile_case(case)
    if "cubin" in binary.asm:
        text = binary.asm["ptx"]
        usage = _tool(binary.asm["cubin"], "cuobjdump", "-res-usage")
        # Triton's kernels have no use for a stack but spills
        registers, spilled = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
        loop: int | None = _longest_loop(_tool(binary.asm["cubin"], "nvdisasm", "-c"))
    else:
        text = binary.asm["amdgcn"]
        registers, spilled = (_number(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "vgpr_spill_count"))
        loop = None
    matrix = next((name for name in MATRIX_INSTRUCTIONS[case.target] if name in text), "none")
    return Row(
        case.name, case.target, case.dtype, registers, spilled, binary.metadata.shared, loop, matrix,
        triton.__version__, case.key,
    )  # fmt: skip


def _number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[0])


def _tool(cubin: bytes, name: str, option: str) -> str:
    """What one of the tools that Triton brings says of machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _longest_loop(assembly: str) -> int:
    """Instructions of the longest loop that has no other inside: from a label to the branch back to it."""
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}  # first and last instruction
    count = 0
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s", line):
            branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if branch and labels.get(branch[1], count) < count:
                loops[labels[branch[1]]] = count
            count += 1
    inner = [(a, b) for a, b in loops.items() if not any(a < c and d <= b for c, d in loops.items())]
    return max((last + 1 - first for first, last in inner), default=0)


# ---- the table --------------------------------------------------------------


def read(path: Path = RESULTS) -> dict[str, Row]:
    """Rows by their key."""
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    return {row["key"]: Row(**row) for row in rows if "loop" in row}


def write(rows: dict[str, Row], path: Path = RESULTS) -> None:
    """The rows of today's cases, in their order."""
    found = [replace(rows[case.key], kernel=case.name) for case in cases() if case.key in rows]
    lines = ",\n".join(json.dumps(asdict(row)) for row in found)
    write_atomic(path, f'{{"rows": [\n{lines}\n]}}\n')


def _work(index: int) -> Row | str:
    case = cases()[index]  # an index, since a jit function does not pickle
    try:
        return measure(case)
    except Exception as error:
        return f"{case.name} {case.target} {case.dtype}: {type(error).__name__}: {error}"


def main() -> None:
    """Compile what is missing or out of date, keeping what is done every so often; print the table."""
    parser = argparse.ArgumentParser(prog="python -m armhubert.bench lowering", description=__doc__)
    parser.add_argument("--workers", type=int, help="processes; a core each by default")
    options = parser.parse_args()
    rows = {key: row for key, row in read().items() if row.triton == triton.__version__}
    missing = [index for index, case in enumerate(cases()) if case.key not in rows]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        done = track(pool.map(_work, missing), total=len(missing), description="compiling", transient=True)
        failed = []
        for number, row in enumerate(done):
            if isinstance(row, str):
                failed.append(row)
            else:
                rows[row.key] = row
            if number % 20 == 19:
                write(rows)
    write(rows)
    shown = Table(
        "kernel", "target", "dtype", "registers", "spilled", "shared", "loop", "matrix", title="lowers; not run"
    )
    for row in (rows[case.key] for case in cases() if case.key in rows):
        shown.add_row(*(str(value) for value in list(asdict(row).values())[:8]))
    Console(width=130).print(shown)
    print(f"{len(cases()) - len(failed)} rows, {len(missing) - len(failed)} of them new -> {RESULTS}")
    if failed:
        sys.exit("\n".join(["do not lower:", *failed]))
