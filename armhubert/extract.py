"""Features of folders of audio, one file a recording: what a user of a student does all day.

    discover, scan -> batches by length -> model -> one .npy or .safetensors a recording

The folder of the features also holds

    features.json    the model's fingerprint and everything else that the numbers depend on
    index.jsonl      a line a finished file: audio_filepath, features, samples, audio_size, audio_mtime_ns, frames;
                     itself a manifest of the audio
    skipped.tsv      files that could not be used, and why
    scan.json        what the scan found, so that the next run need not decode everything again

A file appears whole or not at all, and a second run computes what is missing. Features do not depend on the batch that
a recording happens to be in, nor on whether a run was resumed: padding changes none (`armhubert.encoder`), and where
it would, in a model with `padding="as_trained"`, every recording is a batch of its own.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from armhubert.config import SAMPLE_RATE, EncoderConfig
from armhubert.data import (
    MAX_WORKERS,
    Crop,
    Scanning,
    Utterance,
    batches,
    discover,
    padding_waste,
    plan_by_length,
    scan,
    write_skipped,
)
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.files import append_lines, disk_errors, held, make_folder, open_atomic, remove_temporaries, write_atomic
from armhubert.long_recordings import check_windows, open_recording, windows
from armhubert.machine import device_name, memory_errors, pick_device
from armhubert.settings import check_fields, documented, read_mapping
from armhubert.student import ARMHuBERT
from armhubert.teacher import fingerprint

Format = Literal["npy", "safetensors"]
Precision = Literal["fp32", "fp16", "bf16"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WRITERS = 4
_STEPS_AHEAD = 2
_SETTINGS = "features.json"
_INDEX = "index.jsonl"
_SCAN = "scan.json"
_SKIPPED = "skipped.tsv"


@documented
@dataclass(frozen=True)
class ExtractConfig:
    """One extraction.

    Raises:
        ArmhubertError: a setting breaks a rule; the message names the rule, the value and the remedy.
    """

    model: str
    """A student or a teacher: whatever `ARMHuBERT.from_pretrained` takes."""
    data: tuple[str, ...]
    """Folders (searched recursively), audio files, TSV or JSONL manifests."""
    out: str
    """Folder of the features; it mirrors the folders of the data."""
    layers: str = "last"
    """`last`; `all`; numbers such as `3,6` (0: the input of layer 0); `weighted`: the mean of all;
    `weighted:0.1,0.2,...`: their sum with these weights, one a tensor of `all`."""
    heads: bool = False
    """Outputs of the distillation heads instead of hidden states; layers count from 1."""
    format: Format = "npy"
    """`npy`: one array [T, D], or [N, T, D] for several layers; `safetensors`: one tensor [T, D] a layer."""
    dtype: Precision = "fp32"
    """Dtype of the files; bf16 for safetensors only."""
    precision: Precision = "fp32"
    """Dtype that the model computes in."""
    batch_seconds: float = 60.0
    """Padded audio of a batch; on a GPU, more is faster until its memory is full. A model with `padding="as_trained"`
    takes one recording at a time."""
    chunk_seconds: float = 60.0
    """Longer recordings pass the Transformer in windows of this length: see `armhubert.long_recordings`."""
    context_seconds: float = 5.0
    """Audio at a window's ends that is computed and dropped."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int | None = None
    """Processes that read audio ahead; 0: read in between; none: 2 for a GPU, 0 for a CPU, which the model needs."""
    force: bool = False
    """Compute everything anew, whatever `out` holds."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.data:
            raise ArmhubertError("data must be given: name a folder, audio files or a manifest")
        if self.dtype == "bf16" and self.format == "npy":
            raise ArmhubertError("npy has no bf16: write format='safetensors', or dtype='fp16' or dtype='fp32'")
        if self.batch_seconds <= 0:
            raise ArmhubertError(f"batch_seconds must be above 0, got {self.batch_seconds}")
        if self.workers is not None and not 0 <= self.workers <= MAX_WORKERS:
            raise ArmhubertError(f"workers must be within 0 and {MAX_WORKERS}, got {self.workers}")
        check_windows(self.chunk_seconds, self.context_seconds)


# ---- reports ---------------------------------------------------------------


class Started(NamedTuple):
    """What is to be done."""

    config: ExtractConfig
    parameters: int
    features: tuple[str, ...]
    """Names of the tensors: `last_hidden_state`, `hidden_states.3`, ..."""
    width: int
    device: str
    recordings: int
    """To compute now."""
    seconds: float
    """Audio of these recordings."""
    finished: int
    """Finished by an earlier run."""
    long: int
    """Recordings that pass in windows."""
    padding_waste: float
    skipped: Mapping[str, int]
    """Skipped files by kind."""
    skipped_report: Path


class Progress(NamedTuple):
    """Recordings written so far."""

    done: int
    recordings: int
    audio_seconds: float
    seconds: float
    """Since `Started`."""

    @property
    def rate(self) -> float:
        """Hours of audio an hour."""
        return self.audio_seconds / self.seconds


class Finished(NamedTuple):
    """The end."""

    out: Path
    recordings: int
    finished_before: int
    skipped: int
    audio_seconds: float
    seconds: float
    bytes: int
    """Written by this run."""


Report = Scanning | Started | Progress | Finished


# ---- which features --------------------------------------------------------


class Selection(NamedTuple):
    """Which hidden states become features, and under which names."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    """Hidden states to compute, 0 to L, ascending for a weighted sum."""
    weights: tuple[float, ...] | None
    """Weights of a sum of the states; None: the states themselves."""
    heads: bool
    stacked: bool
    """Several layers: an npy file holds [N, T, D]."""


def select(spec: str, config: EncoderConfig, *, heads: bool = False) -> Selection:
    """Read `ExtractConfig.layers` for a model.

    Raises:
        ArmhubertError: not a specification, a layer that the model does not have, weights of another number than
            there are layers, heads that the model does not have.
    """
    if heads and config.projection_width is None:
        raise ArmhubertError("this model has no distillation heads: leave out heads=True")
    available = tuple(range(1 if heads else 0, config.layers + 1))
    rule = f"layers must be last, all, numbers within {available[0]}..{available[-1]} such as 3,6, or weighted"
    kind, colon, rest = spec.strip().partition(":")
    prefix = "projections" if heads else "hidden_states"
    if kind == "weighted":
        weights = (1 / len(available),) * len(available)
        if colon:
            try:
                weights = tuple(float(word) for word in rest.split(","))
            except ValueError:
                raise ArmhubertError(f"weights must be numbers, as in weighted:0.1,0.2, got {spec!r}") from None
            if len(weights) != len(available) or not all(np.isfinite(weights)):
                raise ArmhubertError(
                    f"weighted: needs {len(available)} finite weights, one for each of layers "
                    f"{available[0]}..{available[-1]}, got {rest}"
                )
        return Selection(("weighted",), available, weights, heads, False)
    if spec.strip() == "last":
        name = f"{prefix}.{config.layers}" if heads else "last_hidden_state"
        return Selection((name,), available[-1:], None, heads, False)
    if spec.strip() == "all":
        numbers = available
    else:
        words = spec.replace(" ", "").split(",")
        if not all(word.isdecimal() and len(word) < 6 for word in words):
            raise ArmhubertError(f"{rule}, got {spec!r}")
        numbers = tuple(sorted({int(word) for word in words}))
        if not set(numbers) <= set(available):
            raise ArmhubertError(f"{rule}, got {spec!r}")
    return Selection(tuple(f"{prefix}.{n}" for n in numbers), numbers, None, heads, len(numbers) > 1)


@torch.inference_mode()
def layer_features(model: SpeechEncoder, inputs: Tensor, frames: Tensor | None, selection: Selection) -> Tensor:
    """The selected features of a batch; no layer past the last one needed runs.

    Args:
        model: in eval mode; an `ARMHuBERT` with heads where the selection asks for them.
        inputs: input of layer 0, [B, T, D].
        frames: valid frames [B]; None: all.
        selection: from `select`.

    Returns:
        [N, B, T, D], or D_t of the heads; N is 1 for a weighted sum.
    """
    wanted = dict(zip(selection.numbers, selection.weights or (None,) * len(selection.numbers), strict=True))
    picked: list[Tensor] = []
    for number, hidden in enumerate(itertools.chain((inputs,), model.layer_outputs(inputs, frames))):
        if number in wanted:
            weight = wanted[number]
            if selection.heads:
                assert isinstance(model, ARMHuBERT)
                assert model.heads is not None, "checked by select"
                hidden = F.linear(hidden, model.heads.weight[number - 1], model.heads.bias[number - 1])
            elif selection.names == ("last_hidden_state",) and model.config.norm_first:
                hidden = model.norm(hidden)
            if weight is None:
                picked.append(hidden)
            elif picked:
                picked[0] = picked[0].add_(hidden.float(), alpha=weight)
            else:
                picked = [hidden.float() * weight]
        if number == selection.numbers[-1]:
            break
    return torch.stack(picked)


# ---- the run ---------------------------------------------------------------


def extract(config: ExtractConfig) -> Iterator[Report]:
    """Compute what is missing of a folder of features; reports, one a batch or window, tell how far it is.

    Ended at any point, the folder holds whole files, and the same call goes on from there. What a killed process was
    writing stays under a hidden name until then.

    Raises:
        ArmhubertError: bad settings, no usable audio, a folder that holds features of another model or other settings,
            memory or a disk that is full.
    """
    device = pick_device(config.device)
    workers = (2 if device.type == "cuda" else 0) if config.workers is None else config.workers
    config = dataclasses.replace(config, workers=workers)
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ArmhubertError(f"{out} is a file: choose a folder for the features")
    paths = discover(config.data)
    names = output_names(config.data, paths, "." + config.format)
    model = ARMHuBERT.from_pretrained(
        config.model, heads=config.heads, dtype=_DTYPES[config.precision], device=device
    ).requires_grad_(False)
    check_windows(config.chunk_seconds, config.context_seconds, model.config.hop)
    selection = select(config.layers, model.config, heads=config.heads)
    make_folder(out)
    with held(out, strict=False):
        remove_temporaries(out / name for name in (*names.values(), _SETTINGS, _INDEX, _SCAN, _SKIPPED))
        yield from _extract(config, model, device, selection, paths, names)


def _extract(
    config: ExtractConfig,
    model: ARMHuBERT,
    device: torch.device,
    selection: Selection,
    paths: Sequence[Path],
    names: Mapping[str, str],
) -> Iterator[Report]:
    """What `extract` does in a folder that no other process works in."""
    out = Path(config.out)
    width = model.config.projection_width if config.heads and model.config.projection_width else model.config.width
    settings = _settings(config, model, selection, width)
    known = {} if config.force else _earlier(out, settings)
    if not known:  # before the settings are this run's, lest another run's features be taken for it
        (out / _INDEX).unlink(missing_ok=True)
    write_atomic(out / _SETTINGS, json.dumps(settings, indent=2) + "\n")

    shortest = model.config.receptive_field
    scanned = yield from scan(paths, min_samples=shortest, cache=out / _SCAN)
    skipped_report = out / _SKIPPED
    write_skipped(scanned.skipped, skipped_report)
    scanned.require_utterances(skipped_report)
    lines = {u.path: _line(u, names[u.path]) for u in scanned.utterances}
    missing = [u for u in scanned.utterances if not _is_finished(out, known.get(names[u.path]), lines[u.path])]
    long = [u for u in missing if u.samples > config.chunk_seconds * SAMPLE_RATE]
    short = [u for u in missing if u.samples <= config.chunk_seconds * SAMPLE_RATE]
    plan = plan_by_length(short, config.batch_seconds)
    if model.config.padding == "as_trained":
        plan = [[crop] for batch in plan for crop in batch]
    finished = len(scanned.utterances) - len(missing)
    yield Started(
        config=config,
        parameters=sum(p.numel() for p in model.parameters()),
        features=selection.names,
        width=width,
        device=device_name(device),
        recordings=len(missing),
        seconds=sum(u.samples for u in missing) / SAMPLE_RATE,
        finished=finished,
        long=len(long),
        padding_waste=padding_waste(plan),
        skipped=scanned.skipped_by_kind,
        skipped_report=skipped_report,
    )

    started = time.perf_counter()
    done, samples, size = 0, 0, 0
    unusable = {file.path for file in scanned.skipped}  # now; what is there of them is of another recording
    index = {
        name: row for name, row in known.items() if (out / name).is_file() and row.get("audio_filepath") not in unusable
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            memory_errors(
                f"memory must hold a batch of {config.batch_seconds:g} s, or a recording or window of up to "
                f"{config.chunk_seconds:g} s: lower batch_seconds=..., or chunk_seconds=... for another folder; what "
                "is finished is kept"
            )
        )
        with disk_errors(out):
            log = stack.enter_context(append_lines(out / _INDEX))
        run = _Run(config, model, device, selection, width, out, lines, log)
        writers = stack.enter_context(ThreadPoolExecutor(_WRITERS, thread_name_prefix="features"))
        steps = stack.enter_context(contextlib.closing(run.steps(short, plan, long, writers)))  # type: ignore[type-var]
        for rows in _ahead(steps):
            for row, count in rows:
                index[row["features"]] = row
                done, samples, size = done + 1, samples + row["samples"], size + count
            yield Progress(done, len(missing), samples / SAMPLE_RATE, time.perf_counter() - started)
    write_atomic(out / _INDEX, "".join(json.dumps(index[name]) + "\n" for name in sorted(index)))
    yield Finished(
        out, done, finished, len(scanned.skipped), samples / SAMPLE_RATE, time.perf_counter() - started, size
    )


_Row = tuple[dict[str, Any], int]
"""A line of the index, and the bytes of its file."""


class _Run:
    """The model and where its features go."""

    def __init__(
        self,
        config: ExtractConfig,
        model: ARMHuBERT,
        device: torch.device,
        selection: Selection,
        width: int,
        out: Path,
        lines: Mapping[str, Mapping[str, Any]],
        log: BinaryIO,
    ) -> None:
        self.config, self.model, self.device = config, model, device
        self.selection, self.width, self.out, self.lines, self.log = selection, width, out, lines, log
        self.dtype = _DTYPES[config.dtype]

    def steps(
        self,
        short: Sequence[Utterance],
        plan: Sequence[Sequence[Crop]],
        long: Sequence[Utterance],
        writers: ThreadPoolExecutor,
    ) -> Iterator[list[Future[_Row]]]:
        """Everything, in the order that shows soonest whether memory suffices: the longest batch first."""
        yield from self._batched(short, plan, writers)
        yield from self._windowed(long)

    def _batched(
        self, utterances: Sequence[Utterance], plan: Sequence[Sequence[Crop]], writers: ThreadPoolExecutor
    ) -> Iterator[list[Future[_Row]]]:
        """Batches in the order of the plan; audio is read ahead, and files are written behind."""
        if not plan:
            return
        audio = batches(utterances, plan, workers=self.config.workers or 0, pin_memory=self.device.type == "cuda")
        with contextlib.closing(audio):  # type: ignore[type-var]
            for batch in audio:
                features, frames = self._compute(batch.waveforms, batch.lengths)
                yield [
                    writers.submit(self._write, utterances[index], features[:, row, :count])
                    for row, (index, count) in enumerate(zip(batch.indices.tolist(), frames.tolist(), strict=True))
                ]

    def _windowed(self, utterances: Sequence[Utterance]) -> Iterator[list[Future[_Row]]]:
        """Recordings that are too long for one pass, one after the other, written window by window; each is a step."""
        for utterance in utterances:
            written: Future[_Row] = Future()
            written.set_result((yield from self._write_long(utterance)))
            yield [written]

    def _compute(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """-> features [N, B, T, D] in host memory, valid frames [B]."""
        frames = self.model.config.frames(lengths)
        features = self._forward(waveforms.to(self.device, non_blocking=True), lengths.to(self.device))
        return features.to(self.dtype).cpu(), frames

    @torch.inference_mode()
    def _forward(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        x, frames = self.model.embed(waveforms, lengths)
        return layer_features(self.model, self.model.layer_inputs(x, frames, None), frames, self.selection)

    def _write(self, utterance: Utterance, features: Tensor) -> _Row:
        """Features [N, T, D] -> a file."""
        header, _ = self._header(features.shape[1])
        data = header + self._bytes(features, utterance)
        line = self.lines[utterance.path]
        write_atomic(self.out / line["features"], data)
        return self._finished(line, features.shape[1]), len(data)

    def _write_long(self, utterance: Utterance) -> Generator[list[Future[_Row]], None, _Row]:
        frames = self.model.config.frames(utterance.samples)
        header, offsets = self._header(frames)
        row_bytes = self.width * self.dtype.itemsize
        read = open_recording(utterance.path, utterance.samples)
        line = self.lines[utterance.path]
        with open_atomic(self.out / line["features"]) as file:
            file.write(header)
            for window in windows(
                self.model,
                read,
                utterance.samples,
                chunk_seconds=self.config.chunk_seconds,
                context_seconds=self.config.context_seconds,
            ):
                features = layer_features(self.model, window.inputs, None, self.selection)[:, 0, window.keep]
                for offset, layer in zip(offsets, features.to(self.dtype).cpu(), strict=True):
                    file.seek(offset + window.start * row_bytes)
                    file.write(self._bytes(layer, utterance))
                yield []
        return self._finished(line, frames), len(header) + len(offsets) * frames * row_bytes

    def _finished(self, line: Mapping[str, Any], frames: int) -> dict[str, Any]:
        """A row of the index, there as soon as its file is whole."""
        row = {**line, "frames": frames}
        with disk_errors(self.out):
            self.log.write(json.dumps(row).encode() + b"\n")
            self.log.flush()
        return row

    def _bytes(self, features: Tensor, utterance: Utterance) -> bytes:
        if not features.isfinite().all():
            wider = "" if self.config.dtype == "fp32" else ", or write dtype='fp32'"
            raise ArmhubertError(
                f"features of {utterance.path} are not finite in {self.config.dtype}: use a model whose training did "
                f"not diverge{wider}; what is finished is kept"
            )
        return features.contiguous().view(torch.uint8).numpy().tobytes()

    def _header(self, frames: int) -> tuple[bytes, list[int]]:
        """What precedes the numbers in a file, and where each layer's [T, D] begins."""
        size = frames * self.width * self.dtype.itemsize
        count = len(self.selection.names)
        if self.config.format == "npy":
            stream = io.BytesIO()
            shape = (count, frames, self.width) if self.selection.stacked else (frames, self.width)
            descr = {torch.float32: "<f4", torch.float16: "<f2"}[self.dtype]
            np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
            header = stream.getvalue()
        else:
            # safetensors has no writer for tensors that come in parts; the format is a length, JSON and the data
            kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[self.dtype]
            table: dict[str, Any] = {"__metadata__": {"format": "pt", "hop": str(self.model.config.hop)}}
            for i, name in enumerate(self.selection.names):
                table[name] = {
                    "dtype": kind,
                    "shape": [frames, self.width],
                    "data_offsets": [i * size, (i + 1) * size],
                }
            text = json.dumps(table).encode()
            text += b" " * (-len(text) % 8)
            header = len(text).to_bytes(8, "little") + text
        return header, [len(header) + i * size for i in range(count)]


def _ahead(steps: Iterator[list[Future[_Row]]]) -> Iterator[list[_Row]]:
    """After each step, the results of those of which _STEPS_AHEAD more are under way, or which are done: disks do not
    hold up the model."""
    waiting: list[list[Future[_Row]]] = []
    for futures in steps:
        waiting.append(futures)
        ready: list[_Row] = []
        while waiting and (len(waiting) > _STEPS_AHEAD or all(future.done() for future in waiting[0])):
            ready += [future.result() for future in waiting.pop(0)]
        yield ready
    for futures in waiting:
        yield [future.result() for future in futures]


# ---- names, and what an earlier run left -----------------------------------


def output_names(sources: Sequence[str], paths: Sequence[Path], suffix: str) -> dict[str, str]:
    """Where the features of each recording go, relative to the output folder.

    One folder of data is mirrored from its inside; several, or files and manifests, from the folder that holds all of
    them. Recordings whose names would be the same keep their endings: `a.wav.npy`, `a.flac.npy`.
    """
    folders = [os.path.normpath(os.path.abspath(source)) for source in sources if os.path.isdir(source)]
    files = {str(path): os.path.normpath(path) for path in paths}
    alone = [os.path.dirname(file) for file in files.values() if not any(file.startswith(f + os.sep) for f in folders)]
    root = os.path.commonpath([*folders, *alone])
    stems = {path: os.path.splitext(file)[0] for path, file in files.items()}
    kept: set[str] = set()
    while True:  # an ending that is kept may be another's stem: x.wav, x.flac, x.wav.flac
        chosen = {path: file if path in kept else stems[path] for path, file in files.items()}
        count = Counter(chosen.values())
        clash = {path for path, name in chosen.items() if count[name] > 1} - kept
        if not clash:
            return {path: Path(os.path.relpath(name, root) + suffix).as_posix() for path, name in chosen.items()}
        kept |= clash


def _settings(config: ExtractConfig, model: SpeechEncoder, selection: Selection, width: int) -> dict[str, Any]:
    from armhubert import __version__

    return {
        "armhubert_version": __version__,
        "model": config.model,
        "fingerprint": fingerprint(model),
        "encoder": json.loads(json.dumps(dataclasses.asdict(model.config))),
        "precision": config.precision,
        "features": list(selection.names),
        "weights": None if selection.weights is None else list(selection.weights),
        "width": width,
        "hop": model.config.hop,
        "sample_rate": SAMPLE_RATE,
        "format": config.format,
        "dtype": config.dtype,
        "chunk_seconds": config.chunk_seconds,
        "context_seconds": config.context_seconds,
    }


def _earlier(out: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Lines of the index of an earlier run, by the features' names; none where the folder is new.

    Raises:
        ArmhubertError: the folder holds something else, or features that these settings would not give.
    """
    path = out / _SETTINGS
    if not path.is_file():
        if any(out.iterdir()):
            raise ArmhubertError(
                f"{out} is not empty and holds no features of an earlier run: choose another folder, or add force=True"
            )
        return {}
    found = read_mapping(path)
    for key, value in settings.items():
        if key in ("armhubert_version", "model") or found.get(key) == value:
            continue
        if key in ("fingerprint", "encoder"):
            difference = f"of another model or other weights ({found.get('model')!r} then, {settings['model']!r} now)"
        else:
            difference = f"made with other {key} ({_short(found.get(key))} then, {_short(value)} now)"
        raise ArmhubertError(
            f"{out} holds features {difference}: choose another folder, or force=True to compute all anew"
        )
    rows = {}
    with contextlib.suppress(OSError):
        for line in (out / _INDEX).read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # torn by a kill, or damaged
                row = json.loads(line)
                rows[str(row["features"])] = row
    return rows


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _line(utterance: Utterance, name: str) -> dict[str, Any]:
    """A recording's line of the index without its frames; size and time of change before it is read tell whether it is
    the same later, and are -1 where it has gone."""
    try:
        status = os.stat(utterance.path)
        size, mtime_ns = status.st_size, status.st_mtime_ns
    except OSError:
        size, mtime_ns = -1, -1
    return {
        "audio_filepath": utterance.path,
        "features": name,
        "samples": utterance.samples,
        "audio_size": size,
        "audio_mtime_ns": mtime_ns,
    }


def _is_finished(out: Path, row: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Whether the features of a recording are there, and are of the recording as it is now.

    Raises:
        ArmhubertError: the features under this name are another recording's.
    """
    features = out / now["features"]
    if row is None or not features.is_file():
        return False
    if row.get("audio_filepath") != now["audio_filepath"]:
        raise ArmhubertError(
            f"{features} holds the features of {row.get('audio_filepath')!r}, not of {now['audio_filepath']!r}: "
            "choose another folder for other data"
        )
    return all(row.get(key) == value for key, value in now.items())
