"""Damaged and hostile model files against the loaders: each is refused in one line or loads; nothing else happens.

Mutants are read in a watched process: an audit hook sees anything executed, imported, spawned, sent or written, an
alarm ends hangs, the address space is limited, and the growth of peak memory is held against the file's size. They come
from a seed, so a run can be repeated.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from armhubert.bench import output
from armhubert.config import EncoderConfig
from armhubert.errors import ArmhubertError
from armhubert.machine import high_water_mark
from armhubert.student import ARMHuBERT
from armhubert.teacher import load_teacher

SECONDS = 10
"""A loader that takes longer hangs."""
MEMORY = 2**31
"""Bytes of address space beyond what the process has when it starts."""
PLAUSIBLE = 2**26
"""Bytes by which peak memory may grow, besides 64 times the file."""

CONV = ((4, 10, 5), (8, 3, 2))

# ---- valid files -----------------------------------------------------------


def transformers_state() -> dict[str, torch.Tensor]:
    """A HuBERT of 2 layers and width 16, by transformers' names."""
    shapes: dict[str, tuple[int, ...]] = {
        "masked_spec_embed": (16,),
        "feature_extractor.conv_layers.0.conv.weight": (4, 1, 10),
        "feature_extractor.conv_layers.0.layer_norm.weight": (4,),
        "feature_extractor.conv_layers.0.layer_norm.bias": (4,),
        "feature_extractor.conv_layers.1.conv.weight": (8, 4, 3),
        "feature_projection.layer_norm.weight": (8,),
        "feature_projection.layer_norm.bias": (8,),
        "feature_projection.projection.weight": (16, 8),
        "feature_projection.projection.bias": (16,),
        "encoder.pos_conv_embed.conv.bias": (16,),
        "encoder.pos_conv_embed.conv.weight_g": (1, 1, 4),
        "encoder.pos_conv_embed.conv.weight_v": (16, 8, 4),
        "encoder.layer_norm.weight": (16,),
        "encoder.layer_norm.bias": (16,),
    }
    for layer in range(2):
        parts: dict[str, tuple[int, ...]] = {f"attention.{x}_proj": (16, 16) for x in ("q", "k", "v", "out")}
        parts |= {"layer_norm": (16,), "final_layer_norm": (16,)}
        parts |= {"feed_forward.intermediate_dense": (24, 16), "feed_forward.output_dense": (16, 24)}
        for part, shape in parts.items():
            shapes[f"encoder.layers.{layer}.{part}.weight"] = shape
            shapes[f"encoder.layers.{layer}.{part}.bias"] = shape[:1]
    return {name: torch.full(shape, 0.01) for name, shape in shapes.items()}


def fairseq_state() -> dict[str, torch.Tensor]:
    """The same by fairseq's names."""
    pairs = (
        ("masked_spec_embed", "mask_emb"),
        ("conv_layers.0.layer_norm.", "conv_layers.0.2."),
        (".conv.", ".0."),
        ("feature_projection.projection", "post_extract_proj"),
        ("feature_projection.layer_norm", "layer_norm"),
        ("pos_conv_embed.0.", "pos_conv.0."),
        ("feed_forward.intermediate_dense", "fc1"),
        ("feed_forward.output_dense", "fc2"),
        (".attention.", ".self_attn."),
    )
    state = {}
    for name, value in transformers_state().items():
        for theirs, fairseq in pairs:
            name = name.replace(theirs, fairseq)
        for layer in range(2):
            name = name.replace(f"layers.{layer}.layer_norm.", f"layers.{layer}.self_attn_layer_norm.")
        state[name] = value
    return state


def torchaudio_state() -> dict[str, torch.Tensor]:
    """The same by torchaudio's names."""
    state = {}
    for name, value in transformers_state().items():
        if name != "masked_spec_embed":
            name = name.replace("encoder.", "encoder.transformer.")
            state[name.replace("feature_projection.", "encoder.feature_projection.")] = value
    return state


_CONFIG = {
    "model_type": "hubert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [4, 8],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_FAIRSEQ = {
    "encoder_layers": 2,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "conv_feature_layers": "[(4, 10, 5)] + [(8, 3, 2)]",
    "conv_pos": 4,
    "conv_pos_groups": 2,
}
_BESIDE = "heads: 2\nconv_layers: [[4, 10, 5], [8, 3, 2]]\n"
_DISTILLER = "distiller:\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in _FAIRSEQ.items())


class Seed(NamedTuple):
    """One valid source, of which one file is to be damaged."""

    kind: str
    """The format of that file, as the results name it."""
    source: Path
    """What the loader is given."""
    file: Path


def write_seeds(folder: Path) -> list[Seed]:
    """One valid source a format, each in a folder of its own."""

    def place(kind: str, file: str, source: str = ".", **files: Any) -> Seed:
        home = folder / kind.replace(" ", "-")
        home.mkdir(parents=True)
        for name, content in files.items():
            path = home / name.replace("__", ".")
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return Seed(kind, home / source, home / file)

    state = transformers_state()
    config, weights = json.dumps(_CONFIG), safetensors.torch.save(state)
    shards = {"a": dict(list(state.items())[:9]), "b": dict(list(state.items())[9:])}
    index = json.dumps({"weight_map": {name: f"{part}.safetensors" for part in shards for name in shards[part]}})
    sharded: dict[str, Any] = {
        f"{part}__safetensors": safetensors.torch.save(tensors) for part, tensors in shards.items()
    }
    fairseq = {
        "args": argparse.Namespace(arch="hubert_base", normalize=False, **_FAIRSEQ),
        "task_state": {"dictionaries": [argparse.Namespace(symbols=["a", "b"])]},
        "model": OrderedDict(fairseq_state()),
    }
    released = {"state_dict": {f"student_model.{name}": value for name, value in fairseq_state().items()}}
    ours = EncoderConfig(CONV, 16, 2, 2, 24, "CR", feature_projection=True, position_kernel=4, position_groups=2)
    ARMHuBERT(ours).save_pretrained(folder / "our-config.json")
    return [
        Seed("our config.json", folder / "our-config.json", folder / "our-config.json" / "config.json"),
        place("safetensors", "model.safetensors", config__json=config, model__safetensors=weights),
        place("bin", "pytorch_model.bin", config__json=config, pytorch_model__bin=saved(state)),
        place("fairseq pt", "m.pt", "m.pt", m__pt=saved(fairseq)),
        place("legacy pt", "m.pt", "m.pt", m__pt=saved(torchaudio_state(), legacy=True), m__yaml=_BESIDE),
        place("ckpt", "m.ckpt", "m.ckpt", m__ckpt=saved(released), m__yaml=_DISTILLER),
        place("config.json", "config.json", config__json=config, model__safetensors=weights),
        place("yaml", "m.yaml", "m.ckpt", m__ckpt=saved(released), m__yaml=_DISTILLER),
        place(
            "index.json",
            "model.safetensors.index.json",
            config__json=config,
            model__safetensors__index__json=index,
            **sharded,
        ),
    ]


def saved(content: Any, *, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


# ---- mutations -------------------------------------------------------------

_EDGES = (b"\xff" * 4, b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f", struct.pack("<q", 10**12))


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bits turned."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 32))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    """Cut short anywhere."""
    return data[: rng.randrange(len(data))]


def edges(data: bytes, rng: random.Random) -> bytes:
    """Numbers at the edge of their type written over something."""
    at, number = rng.randrange(len(data)), rng.choice(_EDGES)
    return data[:at] + number + data[at + len(number) :]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A stretch removed, doubled or moved."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    at = rng.randrange(len(data) + 1)
    return rng.choice((data[:a] + data[b:], data[:b] + data[a:], data[:at] + data[a:b] + data[at:]))


def noise(data: bytes, rng: random.Random) -> bytes:
    """Random bytes over or after it."""
    random_bytes = rng.randbytes(rng.choice((1, 16, 500)))
    at = rng.randrange(len(data) + 1)
    return data[:at] + random_bytes + data[at + rng.choice((0, len(random_bytes))) :]


def header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors header that declares huge, overlapping, misplaced or strangely typed tensors, or nests deeply."""
    (size,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in content if key != "__metadata__"])
    entry, choice = content[name], rng.randrange(7)
    if choice == 0:
        entry["shape"] = [rng.choice((2**31, 2**62, 10**30, -1, 0))] * rng.randrange(4)
    elif choice == 1:
        entry["data_offsets"] = [rng.choice((0, 4, 2**62, -1)), rng.choice((0, 64, 2**63))]
    elif choice == 2:
        entry["dtype"] = rng.choice(("F64", "I8", "BOOL", "F8_E4M3", "C64", "F4", "U64", "X", 3))
    elif choice == 3:
        content[name] = rng.choice((None, [], {}, "x", 10**400))
    elif choice == 4:
        content["../../" + "x" * rng.randrange(2000)] = content.pop(name)
    text = json.dumps(content)
    if choice == 5:
        text = '{"a":' * 20000
    elif choice == 6:
        return struct.pack("<Q", rng.choice((0, 2**63, 2**40, 100_000_001, size + 1))) + data[8:]
    return struct.pack("<Q", len(text)) + text.encode() + data[8 + size :]


def text(data: bytes, rng: random.Random) -> bytes:
    """A value of a JSON or YAML file replaced by a huge, deep, wrong or path-like one, or a bomb of aliases."""
    lines = data.decode().replace(", ", ",\n").split("\n")
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    values = (
        "9" * rng.choice((20, 400, 5000)),
        "1" + ":1" * rng.choice((10, 20000)),
        "1e999",
        "-1",
        "0",
        "null",
        "[]",
        "{}",
        "true",
        "NaN",
        '"' + "x" * rng.choice((10, 100_000)) + '"',
        "[" * rng.choice((50, 5000, 100_000)),
        "[" * 200 + "]" * 200,
        '"../../../../etc/passwd"',
        '"/dev/zero"',
        '"..\\u0000.safetensors"',
        '"' + "x" * 5000 + '.safetensors"',
        '"../config.json.safetensors"',
        "!!python/object/apply:os.system ['touch executed']",
        "\"__import__('os').system('touch executed')\"",
        '"[(1, 1, 1)] * 99999999"',
        '"' + "[(1, 1, 1)] * 100 + " * 90 + '[(1,1,1)]"',
        '"' + "[True, False] * 99 + " * 2000 + '[True]"',
        str(2**20),
        "1000",
        "*a",
    )
    if rng.random() < 0.1:  # billion laughs, through lists and through merge keys
        rows = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}]}}" for i in range(1, 30))]
        return "\n".join(rows).encode()
    ending = "," if lines[at].endswith(",") else ""
    lines[at] = f"{key}{colon or ':'} {rng.choice(values)}{ending}"
    return "\n".join(lines).encode()


def repack(data: bytes, rng: random.Random) -> bytes:
    """A torch archive with its pickle damaged, an entry doubled, renamed, lost, compressed, or a bomb."""
    if not data.startswith(b"PK"):
        return _hostile_legacy(rng)
    out, choice = io.BytesIO(), rng.randrange(9)
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        infos = old.infolist()
        victim = rng.randrange(len(infos))
        for i, info in enumerate(infos):
            content, name, method = old.read(info), info.filename, zipfile.ZIP_STORED
            if name.endswith("data.pkl") and choice < 4:
                content = rng.choice((flip, edges, splice, truncate))(content, rng)
            elif name.endswith("data.pkl") and choice == 4:
                content = hostile_pickle(rng)
            elif i == victim and choice == 5:
                name = rng.choice(("../../x", "/etc/x", name + "x", "archive/data.pkl", name.upper()))
            elif i == victim and choice == 6:
                continue
            elif i == victim and choice == 7:
                content, method = b"\0" * rng.choice((2**20, 2**24)), zipfile.ZIP_DEFLATED
            elif choice == 8 and rng.random() < 0.3:
                content = content[: len(content) // 2]
            new.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


def _hostile_legacy(rng: random.Random) -> bytes:
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(parts) + hostile_pickle(rng) + pickle.dumps(rng.choice((["0"], [], [1], None)), 2) + b"\1" * 64


def hostile_pickle(rng: random.Random) -> bytes:
    """A program of the pickle machine that would run a command, build what hurts, or declare what is not there."""

    def name(path: str) -> bytes:
        module, _, attribute = path.rpartition(".")
        return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"

    def string(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def call(path: str, *arguments: bytes) -> bytes:
        return name(path) + b"(" + b"".join(arguments) + b"tR"

    command = string("touch executed")
    size = b"\x8a\x08" + struct.pack("<q", rng.choice((10**12, 2**62, -5, 10**7)))
    key = string(rng.choice("0123"))
    storage = b"(" + string("storage") + name("torch.FloatStorage") + key + string("cpu") + size + b"tQ"
    programs = (
        call("os.system", command),
        call("builtins.eval", string("__import__('os').system('touch executed')")),
        call("builtins.exec", string("open('executed', 'w')")),
        call("subprocess.Popen", command),
        call("torch.load", string("/dev/zero")),
        call("torch.hub.load", string("x/y")),
        call("builtins.getattr", name("os.path"), string("join")),
        call("runpy.run_path", string("m.yaml")),
        call("builtins.bytearray", size),
        call("builtins.range", size) + b"0" + call("builtins.list", size),
        call("torch._utils._rebuild_tensor_v2", storage, b"K\0", b"(" + size * 2 + b"t", b"(K\1K\1t", b"\x89", b"}"),
        call("torch._utils._rebuild_tensor_v2", storage, size, b"(K\4t", b"(K\0t", b"\x89", b"}"),
        call("torch._utils._rebuild_sparse_tensor", name("torch.sparse_coo"), b"(" + size + b"t"),
        call("torch.storage._load_from_bytes", b"C\4abcd"),
        call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), b"(" + size + b"t", b"C\1b"),
        call("collections.OrderedDict") + b"}" + string("items") + name("os.system") + b"sb",
        name("argparse.Namespace") + b")\x81}" + string("__class__") + name("os.system") + b"sb",
        name("torch.nn.modules.module.Module") + b")\x81}" + string("__reduce__") + call("os.system", command) + b"sb",
        b"(" + command + b"ios\nsystem\n",
        b"(" + name("os.system") + command + b"o",
        name("os.system") + b"(" + command + b"t}\x92",
        b"}" + b")\x85" * 1 + b"\x85" * rng.choice((10, 100_000)) + b"K\1s",  # a deep tuple as key
        b"]" * rng.choice((10, 100_000)) + b"a" * rng.choice((9, 99_999)),
        b"]q\0" + b"(h\0h\0h\0h\0e" * 1000,  # a list that holds itself
        b"r\xff\xff\xff\x7f",
        b"Nr\xff\xff\xff\x7f",
        b"\x96" + struct.pack("<Q", 10**11) + b"x",
        b"\x8e" + struct.pack("<Q", 2**62) + b"x",
        b"\x8b\xff\xff\xff\x7f1",
        b"I" + b"9" * rng.choice((10, 100_000)) + b"\n",
        b"L" + b"9" * rng.choice((10, 100_000)) + b"L\n",
        b"\x95" + struct.pack("<Q", 2**62),
        b"\x82\x01",
        b"P../../etc/passwd\n",
        b"\x8f(" + b"]\x90",
        name("a" * 70_000 + "." + "b" * 70_000) + b")R",
        bytes(rng.randrange(256) for _ in range(rng.randrange(1, 60))),
    )
    body = b"".join(rng.choice(programs) for _ in range(rng.choice((1, 1, 2, 4))))
    if rng.random() < 0.5:  # as a value among tensors' names
        body = b"}" + string("model") + body + b"s"
    return b"\x80\x02" + body + b"."


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "truncate": truncate,
    "edges": edges,
    "splice": splice,
    "noise": noise,
    "header": header,
    "text": text,
    "repack": repack,
}
_COMMON = ("flip", "truncate", "edges", "splice", "noise")
_SPECIAL = {
    "safetensors": "header",
    "config.json": "text",
    "our config.json": "text",
    "yaml": "text",
    "index.json": "text",
}


def mutants(seeds: list[Seed], count: int, seed: int) -> Iterator[tuple[Seed, str, bytes]]:
    """`count` damaged files in turn over the formats; half of each by the mutation made for it."""
    rng = random.Random(seed)
    contents = [one.file.read_bytes() for one in seeds]
    for i in range(count):
        which = i % len(seeds)
        special = _SPECIAL.get(seeds[which].kind, "repack")
        name = special if rng.random() < 0.5 else rng.choice(_COMMON)
        yield seeds[which], name, MUTATIONS[name](contents[which], rng)


# ---- the watched process ---------------------------------------------------

_CPU = torch.device("cpu")
_FORBIDDEN: tuple[str, ...] = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "exec",
    "compile",
)
_FORBIDDEN += ("import", "socket.connect", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree")


class Outcome(NamedTuple):
    """One mutant's."""

    kind: str
    mutation: str
    outcome: str
    """`refused` or `loaded`; a defect otherwise: `executed`, `hung`, `memory`, `several lines`, or an exception."""
    detail: str


class _Hung(BaseException):
    pass


def attempt(source: Path, events: list[str]) -> tuple[str, str]:
    """Load once: the outcome and what it says."""
    del events[:]
    before = high_water_mark(_CPU)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        load_teacher(source)
        outcome, detail = "loaded", ""
    except ArmhubertError as error:
        outcome, detail = ("several lines" if "\n" in str(error) else "refused"), str(error)
    except _Hung:
        outcome, detail = "hung", f"over {SECONDS} s"
    except BaseException as error:
        outcome, detail = type(error).__name__, str(error)[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    size = sum(file.stat().st_size for file in (source.parent if source.is_file() else source).iterdir())
    if events:
        return "executed", ", ".join(events)[:200]
    if (grown := high_water_mark(_CPU) - before) > PLAUSIBLE + 64 * size:
        return "memory", f"{grown} bytes for a file of {size}"
    return outcome, detail


def run(count: int, seed: int = 0) -> Iterator[Outcome]:
    """Read `count` mutants, in this process, which is changed for good: call it in one of its own.

    An audit hook stays, the address space is limited, SIGALRM and the working folder are taken.
    """
    watching, events = False, list[str]()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[1] is not None and set(str(arguments[1])) & set("wax+")
        if watching and (writes or event in _FORBIDDEN):
            events.append(f"{event} {arguments[0]!r}"[:100])

    def hung(number: int, frame: object) -> None:
        raise _Hung

    torch.set_num_threads(1)
    b"x".decode("cp437")  # zipfile's codec for old names, imported at its first use
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # where a canary would land
        for one in write_seeds(Path("warm")):
            load_teacher(one.source)  # they are valid, and everything that is imported late is there now
            one.file.write_bytes(one.file.read_bytes()[:-9])
            with contextlib.suppress(ArmhubertError):
                load_teacher(one.source)
        seeds = write_seeds(Path("mutants"))
        sys.addaudithook(hook)
        signal.signal(signal.SIGALRM, hung)
        _limit_memory()
        originals = {one.file: one.file.read_bytes() for one in seeds}
        for one, mutation, data in mutants(seeds, count, seed):
            one.file.write_bytes(data)
            watching = True
            outcome, detail = attempt(one.source, events)
            watching = False
            for canary in Path().rglob("executed"):
                outcome, detail = "executed", "the canary"
                canary.unlink()
            one.file.write_bytes(originals[one.file])
            yield Outcome(one.kind, mutation, outcome, detail)


def _limit_memory() -> None:
    with open("/proc/self/statm") as status:
        used = int(status.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))


def in_own_process(count: int, seed: int = 0) -> list[Outcome]:
    """`run` in a fresh process.

    Raises:
        RuntimeError: the process died, which is the worst defect.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes"
        process = context.Process(target=_collect, args=(count, seed, out))
        process.start()
        process.join()
        lines = out.read_text().splitlines() if out.is_file() else []
        outcomes = [Outcome(*json.loads(line)) for line in lines]
        if process.exitcode or len(outcomes) != count:
            last = outcomes[-1] if outcomes else None
            raise RuntimeError(f"the process died with {process.exitcode} after {len(outcomes)} files, the last {last}")
        return outcomes


def _collect(count: int, seed: int, out: Path) -> None:
    with open(out, "w") as file:
        for outcome in run(count, seed):
            file.write(json.dumps(outcome) + "\n")
            file.flush()


def main() -> None:
    """Run it, print the counts, write them down; any defect is an exit code of 1."""
    parser = output.parser("fuzz", "Damaged and hostile model files against the loaders.")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes = in_own_process(options.files, options.seed)
    counts = Counter((one.kind, one.mutation, one.outcome) for one in outcomes)
    rows = [
        {"format": kind, "mutation": mutation, "outcome": outcome, "files": files, "seed": options.seed}
        for (kind, mutation, outcome), files in sorted(counts.items())
    ]
    print(output.write_results("fuzz", rows, torch.device("cpu"), options.out))
    print(dict(Counter(one.outcome for one in outcomes)))
    defects = [one for one in outcomes if one.outcome not in ("refused", "loaded")]
    for one in defects[:20]:
        print(*one)
    sys.exit(bool(defects))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
