"""What `profile` runs: a model or a baseline, in one of the ways of running it."""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from armhubert.baselines import BASELINES, HUBERT_BASE, ReleasedWay, baseline
from armhubert.config import SAMPLE_RATE
from armhubert.convert import is_source, load_weights
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError, nearest
from armhubert.export import Format, OnnxProgram, aot_file, onnx_file, open_program, quantise
from armhubert.kernels import Impl
from armhubert.kernels.runtime import resolve_impl
from armhubert.student import ARMHuBERT, count_parameters

MODES = ("eager", "compiled", "aot", "bf16", "int8", "triton", "onnx", "onnx-int8")
FEWER_BITS = ("bf16", "int8", "onnx-int8")
"""Modes that do not compute in float32."""


def split_baseline(text: str) -> tuple[str, str]:
    """`NAME[:MODE]` -> name, mode; a path may hold colons, so only a known mode is taken for one."""
    name, _, mode = text.rpartition(":")
    return (name, mode) if name and mode in MODES else (text, "eager")


def check_baseline(source: str) -> None:
    """Before anything is loaded.

    Raises:
        ArmhubertError: no baseline's name, and nothing that `load_weights` could read or fetch.
    """
    names = (*BASELINES, "released")
    if source not in names and not is_source(source):
        raise ArmhubertError(f"no model at {source!r}, and no baseline is called so{nearest(source, names)}")


class Candidate(NamedTuple):
    """Something that turns waveforms into features, and what is known of it without running it."""

    name: str
    source: str
    mode: str
    run: Callable[..., Tensor]
    """[B, S] on the device, and of models of armhubert the valid samples [B] or None -> [B, T, D]."""
    release: Callable[[], object]
    """Gives memory that earlier runs have pooled back to the system or the GPU."""
    module: nn.Module
    """In float32 and eager: for counts and stages."""
    parameters: int
    parameters_without_heads: int
    bytes_on_disk: int
    macs: Callable[[int], int]
    """Samples of one utterance -> multiply-accumulates."""


def load_candidate(source: str, mode: str, *, student: str, heads: bool, device: torch.device) -> Candidate:
    """A baseline by name, or the model at `source`, ready to run in `mode`.

    Raises:
        ArmhubertError: nothing usable at `source`, or a mode that this machine or model does not have.
    """
    module, left_out = _load_module(source, mode, student, heads)
    if mode == "triton":
        if not isinstance(module, SpeechEncoder):
            raise ArmhubertError(f"mode triton is for models of armhubert, got {source!r}: choose another mode for it")
        try:
            resolve_impl("triton", torch.empty(0, device=device))
        except ValueError as error:
            why = str(error).replace("impl='triton'", "mode triton").partition(";")[0]
            raise ArmhubertError(f"{why}: choose another mode") from None
    module.requires_grad_(False).to(device)
    encoder = module.student if isinstance(module, ReleasedWay) else module
    count = count_parameters(module)
    run, release, size = _prepare(copy.deepcopy(module) if mode in _CONVERTED else module, mode, device)
    return Candidate(
        name=f"{source} ({mode})",
        source=source,
        mode=mode,
        run=run,
        release=release,
        module=module,
        parameters=count.total + left_out,
        parameters_without_heads=count.without_heads,
        bytes_on_disk=size(),
        macs=encoder.config.macs if isinstance(encoder, SpeechEncoder) else _counter(module),
    )


def load_run(source: str, mode: str, *, student: str, heads: bool, device: torch.device) -> Callable[..., Tensor]:
    """`run` of a candidate that `load_candidate` has loaded before, with nothing else of it in memory."""
    return _prepare(_load_module(source, mode, student, heads)[0].requires_grad_(False), mode, device)[0]


def _load_module(source: str, mode: str, student: str, heads: bool) -> tuple[nn.Module, int]:
    """A candidate on the CPU, and how many parameters of heads were left out of it."""
    if source == "hubert-base" and mode in PROGRAMS:
        with torch.random.fork_rng([]):
            return ARMHuBERT(HUBERT_BASE).eval(), 0
    if source in BASELINES:
        return baseline(source), 0
    if source == "released":
        return ReleasedWay(ARMHuBERT.from_pretrained(student, heads=False)).eval(), 0
    weights = load_weights(source)
    left_out = 0 if heads else sum(t.numel() for name, t in weights.state.items() if name.startswith("heads."))
    impl: Impl = "triton" if mode == "triton" else "auto"
    return ARMHuBERT.from_weights(weights if heads else weights.without_heads(), impl=impl), left_out


Prepared = tuple[Callable[..., Tensor], Callable[[], object], Callable[[], int]]
"""`Candidate.run` and `release`, and what counts the bytes that the weights take on disk."""
_CONVERTED = ("bf16", "int8")
"""Modes that `_prepare` converts a module for, in place."""


def _prepare(module: nn.Module, mode: str, device: torch.device) -> Prepared:
    if mode in PROGRAMS:
        return _as_program(module, mode, device)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    module.to(device, dtype)
    if mode == "int8":
        if device.type != "cpu":
            raise ArmhubertError(f"mode int8 runs on a CPU, got device {device}: use bf16 there")
        quantise(module)
    call = torch.compile(module, dynamic=True) if mode == "compiled" else module
    settings = {"hidden_states": False} if isinstance(module, SpeechEncoder) else {}  # nor do the others return them

    def run(waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return last_hidden_state(call(waveforms.to(dtype), *(() if lengths is None else (lengths,)), **settings))

    # without a GPU, empty_cache does nothing
    return run, torch.cuda.empty_cache, lambda: state_bytes(module)


def export_candidate(source: str, mode: str, *, student: str, heads: bool) -> bytes:
    """The file that a candidate in one of the modes of `PROGRAMS` runs from.

    Raises:
        ArmhubertError: as `load_candidate`.
    """
    return _export(_load_module(source, mode, student, heads)[0], mode)


def _export(module: nn.Module, mode: str) -> bytes:
    """For ONNX Runtime or compiled ahead of time; HuBERT Base of transformers as our encoder that equals it."""
    if not isinstance(module, ARMHuBERT):
        raise ArmhubertError(f"mode {mode} is for models of armhubert and for hubert-base")
    return PROGRAMS[mode].export(module)


def _as_program(module: nn.Module, mode: str, device: torch.device) -> Prepared:
    if device.type != "cpu":
        raise ArmhubertError(f"mode {mode} runs on a CPU, got device {device}: use another mode there")
    data = _export(module, mode)
    program = open_program(data, PROGRAMS[mode].format)

    def run(waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        return program(waveforms, torch.full((len(waveforms),), waveforms.shape[1]) if lengths is None else lengths)[0]

    def release() -> None:
        if isinstance(program, OnnxProgram):
            program(torch.zeros(1, SAMPLE_RATE), torch.tensor([SAMPLE_RATE]), shrink=True)

    return run, release, lambda: len(data)


class _Way(NamedTuple):
    format: Format
    export: Callable[[ARMHuBERT], bytes]


PROGRAMS = {
    "aot": _Way("aot", aot_file),
    "onnx": _Way("onnx", onnx_file),
    "onnx-int8": _Way("onnx", partial(onnx_file, int8=True)),
}
"""Modes in which a file of `armhubert export` runs, and how it is made."""


def last_hidden_state(output: Any) -> Tensor:
    """The features in what a model of ours, or a baseline, returns."""
    return output if isinstance(output, Tensor) else output.last_hidden_state


def state_bytes(module: nn.Module) -> int:
    """Bytes of the module's weights as torch writes them."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()


def _counter(module: nn.Module) -> Callable[[int], int]:
    """Multiply-accumulates counted on the meta device, where PyTorch's counter knows attention."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(samples: int) -> int:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            copy.deepcopy(module).to("meta")(torch.empty(1, samples, device="meta"))
        return counter.get_total_flops() // 2

    return count
