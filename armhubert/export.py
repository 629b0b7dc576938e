"""A model as one file for other runtimes: ONNX, a torch.export program, or one compiled ahead of time; checked before
it gets its name.

Inputs `waveforms` [B, S] float32 at 16 kHz and `lengths` [B] int64, the valid samples of each; B and S are free, S at
least two frames (720 samples), in ONNX one (400). Outputs, in this order:

    last_hidden_state   [B, T, D]
    hidden_states       [L + 1, B, T, D]    where asked for
    projections         [L, B, T, D_t]      with heads
    frames              [B]                 valid frames; rows past them are unspecified

As in the model itself, features do not depend on padding or on the rest of the batch, and the check is against each
utterance computed alone. int8 in ONNX is the exception: its activations are quantised with one scale a batch, so that
padding moves features by about the quantisation error; int8 in torch has a scale a frame and stays independent.

`aot` compiles the torch.export program for the processor it is made on, by PyTorch's AOTInductor and a C++ compiler;
the package loads without compiling anything (`torch._inductor.aoti_load_package`) and runs without Python.

A `.pt2` file is a program: load files of strangers as `model.safetensors` instead, which cannot carry code.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations

from armhubert.clock import Timing, interleave
from armhubert.config import SAMPLE_RATE
from armhubert.convert import load_weights
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.files import check_unused, make_folder, write_atomic
from armhubert.packages import require
from armhubert.settings import check_fields, documented
from armhubert.student import ARMHuBERT
from armhubert.weights import Weights

Format = Literal["onnx", "torch", "aot"]

TOLERANCE = 1e-4
"""Largest accepted difference of a float32 export, where outputs have a root mean square of 1 or less."""

CASES = ((1, 0.0), (4, 1.0), (2, 3.3), (3, 7.77), (1, 15.0))
"""(utterances, seconds of the longest) of the check; 0: two frames."""

_SUFFIX = {"onnx": ".onnx", "torch": ".pt2", "aot": ".pt2"}
_ONNX_LIMIT = 2**31 - 2**20  # a protobuf message ends there


@documented
@dataclass(frozen=True)
class ExportConfig:
    """One export.

    Raises:
        ArmhubertError: a file that exists, or whose ending is another format's.
    """

    model: str
    """A student or a teacher: whatever `ARMHuBERT.from_pretrained` takes."""
    out: str
    """The file: `.onnx` or `.pt2`."""
    format: Format = "onnx"
    """`onnx`, `torch` for `torch.export.load`, or `aot` for `torch._inductor.aoti_load_package`."""
    int8: bool = False
    """Quantise the weights of linear layers to 8 bits."""
    heads: bool = False
    """Give the outputs of the distillation heads too."""
    hidden_states: bool = False
    """Give all hidden states too."""
    force: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        check_fields(self)
        suffix = _SUFFIX[self.format]
        if Path(self.out).suffix != suffix:
            formats = " or ".join(
                f"format={name!r}" for name, other in _SUFFIX.items() if other == Path(self.out).suffix
            )
            other = f"choose the name, or {formats}" if formats else "choose the name"
            raise ArmhubertError(f"a file of format {self.format} must end in {suffix}, got {self.out!r}: {other}")
        check_unused(Path(self.out), self.force)


class Stage(NamedTuple):
    """What is being done."""

    name: str


class Check(NamedTuple):
    """One batch of the check."""

    utterances: int
    samples: int
    """Length of the longest utterance; the others are shorter."""
    difference: float
    """Largest, over all outputs and valid frames, from each utterance computed alone by the model; relative to the
    output's root mean square where that is above 1."""


class Quantised(NamedTuple):
    """What 8 bits gave, on noise; 10 s, batch 1, interleaved with the float32 program."""

    float_bytes: int
    error: float
    """Relative L2 difference of the last hidden state from float32."""
    padding: float
    """Relative L2 difference between an utterance alone and beside a louder, longer one: 0 where features do not
    depend on the batch."""
    float_time: Timing
    time: Timing


class Exported(NamedTuple):
    """The file is in its place."""

    path: Path
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    checks: tuple[Check, ...]
    """Checks of the float32 program, which int8 is made from."""
    quantised: Quantised | None
    ignored: tuple[str, ...]
    """The source's names of tensors that are no part of an encoder, a CTC head's for instance: not in the file."""


Report = Stage | Exported

Program = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""waveforms, lengths -> outputs."""


class _Model(nn.Module):
    """The outputs that were asked for, as a tuple."""

    def __init__(self, encoder: ARMHuBERT, *, hidden_states: bool = False, heads: bool = False) -> None:
        super().__init__()
        self.encoder, self.hidden_states, self.heads = encoder, hidden_states, heads

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return (
            "last_hidden_state",
            *(("hidden_states",) if self.hidden_states else ()),
            *(("projections",) if self.heads else ()),
            "frames",
        )

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        """[B, S], [B] -> the outputs."""
        output = self.encoder(waveforms, lengths, hidden_states=self.hidden_states, projections=self.heads)
        found = [output.last_hidden_state]
        if self.hidden_states:
            found.append(torch.stack(output.hidden_states))
        if self.heads:
            found.append(torch.stack(output.projections))
        return (*found, output.lengths)


def export(config: ExportConfig) -> Iterator[Report]:
    """Trace, translate, check and write a model; reports tell the stage, the last one what the check found.

    Raises:
        ArmhubertError: packages that are missing, a model that cannot be exported, or a program that differs from the
            model by more than `TOLERANCE`; no file is written then.
    """
    if config.format == "onnx":
        require("onnx", "onnxscript", "onnxruntime", extra="onnx")
    elif config.int8:
        require("torchao", extra="int8")
    if config.format == "aot":
        _require_compiler()
    weights = load_weights(config.model)
    weights = weights if config.heads else weights.without_heads()
    encoder = ARMHuBERT.from_weights(weights, impl="torch").requires_grad_(False)
    if config.heads and encoder.heads is None:
        raise ArmhubertError(f"{config.model} has no distillation heads: leave out heads=True")
    if config.format == "onnx" and sum(p.numel() * 4 for p in encoder.parameters()) > _ONNX_LIMIT:
        raise ArmhubertError("one ONNX file holds at most 2 GiB and this model has more: use format='torch'")
    outputs = {"hidden_states": config.hidden_states, "heads": config.heads}
    model, traced = _Model(encoder, **outputs).eval(), _folded(encoder, **outputs)
    make_folder(Path(config.out).parent)
    yield Stage("trace")
    program = _trace(traced)
    yield Stage({"onnx": "translate", "torch": "serialise", "aot": "compile"}[config.format])
    metadata = _metadata(config, encoder)
    if config.format == "onnx":
        data = _to_onnx(program, model.names, metadata)
    else:
        data = _to_bytes(program, metadata, config.format)
    yield Stage("check")
    run = open_program(data, config.format)
    checks = tuple(_check(model, run, utterances, seconds) for utterances, seconds in CASES)
    worst = max(checks, key=lambda check: check.difference)
    if not worst.difference <= TOLERANCE:
        raise ArmhubertError(
            f"the exported program differs from the model by {worst.difference:.1e} at {worst.utterances} x "
            f"{worst.samples} samples, more than {TOLERANCE:g}: not written; other versions of torch or onnxruntime "
            "may do better"
        )
    quantised = None
    if config.int8:
        yield Stage("quantise")
        float_bytes = len(data)
        data = _quantise_onnx(data) if config.format == "onnx" else _quantise_torch(traced, metadata, config.format)
        yield Stage("time")
        quantised = _compare(run, open_program(data, config.format), float_bytes)
    write_atomic(Path(config.out), data)
    yield Exported(
        Path(config.out), len(data), ("waveforms", "lengths"), model.names, checks, quantised, weights.ignored
    )


class OnnxProgram:
    """A file, or its bytes, in ONNX Runtime on the CPU, in as many threads as PyTorch's."""

    def __init__(self, source: bytes | Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._shrink = onnxruntime.RunOptions()
        self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def __call__(self, waveforms: Tensor, lengths: Tensor, *, shrink: bool = False) -> tuple[Tensor, ...]:
        """With `shrink`, memory that this and earlier calls have pooled goes back to the system."""
        values = {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()}
        return tuple(torch.from_numpy(x) for x in self._session.run(None, values, self._shrink if shrink else None))


def onnx_file(encoder: ARMHuBERT, *, int8: bool = False) -> bytes:
    """A model for ONNX Runtime, as `export` makes it but unchecked: for `profile`.

    Raises:
        ArmhubertError: packages that are missing.
    """
    require("onnx", "onnxscript", "onnxruntime", extra="onnx")
    model = _folded(encoder)
    data = _to_onnx(_trace(model), model.names, {})
    return _quantise_onnx(data) if int8 else data


def aot_file(encoder: ARMHuBERT) -> bytes:
    """A model compiled ahead of time, as `export` makes it but unchecked: for `profile`.

    Raises:
        ArmhubertError: no C++ compiler.
    """
    _require_compiler()
    return _to_bytes(_trace(_folded(encoder)), {}, "aot")


def open_program(source: bytes | Path, kind: Format) -> Program:
    """What `export` made, its bytes or its file, as a user will load it."""
    if kind == "onnx":
        return OnnxProgram(source)
    from torch._inductor import aoti_load_package

    file: Any = source if isinstance(source, Path) else io.BytesIO(source)
    module: Any = torch.export.load(file).module() if kind == "torch" else aoti_load_package(file)

    def call(waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(module(waveforms, lengths))

    return call


def _folded(encoder: ARMHuBERT, *, hidden_states: bool = False, heads: bool = False) -> _Model:
    # A model of its own, which shares its tensors: folding a weight norm changes the class of every copy
    folded = ARMHuBERT.from_weights(Weights(encoder.config, encoder.state_dict(), "the model"), impl="torch")
    remove_parametrizations(folded.position.conv, "weight")
    return _Model(folded.requires_grad_(False), hidden_states=hidden_states, heads=heads).eval()


def quantise(module: nn.Module) -> None:
    """Linear layers to int8 in place by torchao: weights a scale an output channel, activations a scale a frame.

    Raises:
        ArmhubertError: torchao is missing.
    """
    require("torchao", extra="int8")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(module, Int8DynamicActivationInt8WeightConfig())


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ArmhubertError(
            "compiling ahead of time needs a C++ compiler: install g++ or clang++, or name one in CXX"
        ) from None


# ---- programs --------------------------------------------------------------


def _trace(model: _Model) -> torch.export.ExportedProgram:
    config = model.encoder.config
    shortest = config.receptive_field + config.hop  # a dimension of 1 would be taken for a constant
    batch, samples = torch.export.Dim("batch", min=1), torch.export.Dim("samples", min=shortest)
    example = torch.zeros(2, 2 * SAMPLE_RATE), torch.tensor([2 * SAMPLE_RATE, SAMPLE_RATE])
    with torch.no_grad():  # torchao's tensors cannot be traced in inference mode
        return torch.export.export(
            model,
            example,
            dynamic_shapes={"waveforms": {0: batch, 1: samples}, "lengths": {0: batch}},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _metadata(config: ExportConfig, encoder: SpeechEncoder) -> dict[str, str]:
    from armhubert import __version__

    return {
        "armhubert_version": __version__,
        "model": Path(config.model).name,
        "sample_rate": str(SAMPLE_RATE),
        "hop": str(encoder.config.hop),
        "receptive_field": str(encoder.config.receptive_field),
    }


def _to_onnx(program: torch.export.ExportedProgram, names: tuple[str, ...], metadata: dict[str, str]) -> bytes:
    import onnx

    translated = torch.onnx.export(
        program, dynamo=True, input_names=["waveforms", "lengths"], output_names=list(names), verbose=False
    )
    assert translated is not None
    proto = translated.model_proto
    inputs, outputs = proto.graph.input, proto.graph.output
    dimensions = [*inputs[0].type.tensor_type.shape.dim, outputs[0].type.tensor_type.shape.dim[1]]
    readable = dict(zip((d.dim_param for d in dimensions), ("batch", "samples", "frames"), strict=True))
    for value in (*inputs, *outputs, *proto.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in readable:
                dimension.dim_param = readable[dimension.dim_param]
    onnx.helper.set_model_props(proto, metadata)
    data: bytes = proto.SerializeToString()
    return data


def _to_bytes(program: torch.export.ExportedProgram, metadata: dict[str, str], kind: Format) -> bytes:
    """A `.pt2` file: the program itself, or compiled for this processor."""
    stream = io.BytesIO()
    named = {f"armhubert.{name}": text for name, text in metadata.items()}
    if kind == "torch":
        torch.export.save(program, stream, extra_files=named)
        return stream.getvalue()
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=stream, inductor_configs={"aot_inductor.metadata": named})
    return stream.getvalue()


def _quantise_onnx(data: bytes) -> bytes:
    """Weights of matrix products to int8, a scale an output channel; activations when they come, a scale a tensor."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx.load_from_string(data)
    weights = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    linear = [node.name for node in proto.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]
    # without this mark of its own, onnxruntime advises to preprocess, by the root logger, which it sets up for that
    proto.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            proto,
            path,
            nodes_to_quantize=linear,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        return path.read_bytes()


def _quantise_torch(model: _Model, metadata: dict[str, str], kind: Format) -> bytes:
    from torchao.utils import unwrap_tensor_subclass

    quantise(model)
    return _to_bytes(_trace(unwrap_tensor_subclass(model)), metadata, kind)


# ---- checks ----------------------------------------------------------------


def _noise(utterances: int, samples: int) -> Tensor:
    """[B, S], each louder than the one before; the same every time."""
    generator = torch.Generator().manual_seed(samples)
    loudness = torch.logspace(-2, 0, utterances)[:, None] if utterances > 1 else torch.tensor(0.1)
    return torch.randn(utterances, samples, generator=generator) * loudness


@torch.no_grad()
def _check(model: _Model, run: Program, utterances: int, seconds: float) -> Check:
    config = model.encoder.config
    shortest = config.receptive_field + config.hop
    samples = max(shortest, round(seconds * SAMPLE_RATE))
    lengths = torch.linspace(samples, max(shortest, samples // 5), utterances).long()
    waveforms = _noise(utterances, samples)
    found = run(waveforms, lengths)
    frames = config.frames(lengths)
    difference = 0.0 if torch.equal(found[-1], frames) else float("inf")
    whole = model(waveforms, lengths) if config.padding == "as_trained" else None
    for row, (length, count) in enumerate(zip(lengths.tolist(), frames.tolist(), strict=True)):
        alone = model(waveforms[row : row + 1, :length], None)
        for here, there in zip(found[:-1], (whole or alone)[:-1], strict=True):
            there = there[..., row if whole else 0, :count, :]
            scale = float(there.square().mean().sqrt().clamp(min=1))
            error = float((here[..., row, :count, :] - there).abs().max()) / scale
            difference = max(difference, error) if error == error else float("inf")
    return Check(utterances, samples, difference)


def _compare(reference: Program, run: Program, float_bytes: int) -> Quantised:
    """int8 beside float32, both as they will be loaded."""
    short, long = 10 * SAMPLE_RATE, 12 * SAMPLE_RATE
    waveforms = _noise(2, long)  # the first is quiet and short, the second loud and long
    one, lengths = waveforms[:1, :short].contiguous(), torch.tensor([short])
    exact, found = reference(one, lengths)[0][0], run(one, lengths)[0][0]
    beside = run(waveforms, torch.tensor([short, long]))[0][0, : len(found)]
    times = interleave({"float": lambda: reference(one, lengths), "int8": lambda: run(one, lengths)}, repeats=5)
    return Quantised(
        float_bytes,
        float((found - exact).norm() / exact.norm()),
        float((beside - found).norm() / found.norm()),
        times["float"],
        times["int8"],
    )
