"""torch checkpoints of strangers, read without importing, calling or building anything that they name.

A pickle is a program for a small machine. This machine knows plain containers and how torch describes a tensor; every
other class or function it meets becomes a `StandIn` that remembers its name, arguments and state: fairseq's Dictionary,
argparse's Namespace, omegaconf's DictConfig, and os.system alike. torch's own restricted reader refuses unknown
classes unless they are registered for the whole process, and allocates whatever size a tensor declares; here tensors
are views of the mapped file, so that nothing is allocated that the file does not hold.

Formats: torch.save's zip archives (stored, never compressed) and its older stream of pickles.
"""

import math
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from armhubert.errors import ArmhubertError, brief

MAX_PICKLE = 2**22
"""Bytes of pickled structure (not of tensors) in a file; real checkpoints have some hundred thousand."""
MAX_DIRECTORY = 2**22
"""Bytes of a zip archive's directory; one entry takes about a hundred."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {f"{dtype}".removeprefix("torch."): dtype for dtype in _STORAGES.values()}
_SCALARS = (str, int, float, bool, bytes, type(None))


class Name(NamedTuple):
    """A class or function that a pickle names; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:100]


class StandIn:
    """An object that the file wanted built: what it is called, and what it was to be built from."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: Any, args: Any) -> None:
        self.name, self.args = name, args
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"<{self.name if isinstance(self.name, Name) else 'object'}>"


def read_pickle(path: Path, *, stand_ins: bool = False) -> Any:
    """What a torch checkpoint holds: plain containers, numbers, text, and tensors that are views of the mapped file.

    Args:
        path: the file.
        stand_ins: leave objects of other classes as inert `StandIn`s; otherwise a file that holds any is refused.

    Raises:
        ArmhubertError: unreadable, damaged, no torch checkpoint, or holding what is refused.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise ArmhubertError(f"{path} is damaged or no torch checkpoint: it is empty") from None
    except OSError as error:
        raise ArmhubertError(f"cannot read {path}: {error.strerror}; check its name and permissions") from None
    try:
        machine = _read_zip(data) if data[:4] == b"PK\x03\x04" else _read_legacy(data)
    # Whatever a damaged or hostile file provokes in the parsers is that file's fault, and one line.
    except Exception as error:
        told = isinstance(error, (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError))
        reason = (brief(error) if told else "") or "its contents make no sense"
        raise ArmhubertError(f"{path} is damaged or no torch checkpoint: {reason}") from None
    if machine.foreign and not stand_ins:
        raise ArmhubertError(
            f"{path} holds more than tensors and plain containers, so it is not read: {machine.foreign[0]}"
        )
    return machine.content


def fields(value: Any) -> Mapping[Any, Any]:
    """One level of a configuration object as a mapping: a dict, argparse's Namespace, a dataclass, a DictConfig."""
    if isinstance(value := scalar(value), StandIn):
        value = _state(value).get("_content", _state(value))
    return value if isinstance(value, Mapping) else {}


def scalar(value: Any) -> Any:
    """A configuration value without its wrapper: omegaconf's nodes, members of an Enum."""
    for _ in range(4):
        if not isinstance(value, StandIn):
            break
        if "_val" in _state(value):
            value = _state(value)["_val"]
        elif value.state is None and isinstance(value.args, tuple) and len(value.args) == 1:
            value = value.args[0]
        else:
            break
    return value


def _state(made: StandIn) -> Mapping[Any, Any]:
    state = made.state[0] if isinstance(made.state, tuple) and made.state else made.state  # (__dict__, __slots__)
    return state if isinstance(state, Mapping) else {}


# ---- the machine -----------------------------------------------------------


class _Bytes:
    """A mapped file as pickle and zipfile read it, with a limit on how much they may take out of it."""

    def __init__(self, data: mmap.mmap, start: int, stop: int, limit: int) -> None:
        self.data, self.position, self.start, self.stop, self.left = data, start, start, stop, limit

    def read(self, size: int | None = -1) -> bytes:
        stop = self.stop if size is None or size < 0 else min(self.stop, self.position + size)
        return self._take(max(stop, self.position))

    def readline(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.stop)
        return self._take(self.stop if end < 0 else end + 1)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position - self.start

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: self.start, 1: self.position, 2: self.stop}[whence]
        if base + offset < self.start:
            raise OSError("a position before the file's beginning")
        self.position = base + offset
        return self.tell()

    def _take(self, stop: int) -> bytes:
        self.left -= stop - self.position
        if self.left < 0:
            raise pickle.UnpicklingError("its structure is larger than any checkpoint's")
        start, self.position = self.position, stop
        return self.data[start:stop]


class _Storage(NamedTuple):
    """Where the numbers of some tensors lie in the file."""

    dtype: torch.dtype
    start: int
    size: int
    """Elements."""


class _OrderedDict(dict[Any, Any]):
    """A plain dict under another name, so that BUILD (state dicts carry `_metadata`) can be told apart and dropped."""


class _Machine(pickle._Unpickler):
    """Python's own pickle machine, with every instruction that calls, builds or hashes replaced by a harmless one."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: _Bytes, data: mmap.mmap, storages: Mapping[str, tuple[int, int]] | None) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.data, self.storages = data, storages
        self.copied = 0
        self.foreign: list[str] = []
        self.declared: dict[str, tuple[torch.dtype, int]] = {}
        self.content: Any = None

    def run(self) -> Any:
        self.content = self.load()
        return self.content

    def find_class(self, module: str, name: str) -> Any:
        found = Name(module, name)
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if found not in _REBUILD and not (module in ("torch", "torch.storage") and name in _STORAGES):
            self.foreign.append(str(found))
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Where a storage lies; in a legacy file's first reading, when that is not known yet, what it is."""
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":
            return pid[1]  # a legacy file's copy of a class's source
        kind, name, key, _, size = pid[:5]
        if kind != "storage" or not isinstance(name, Name) or name.name not in _STORAGES:
            raise pickle.UnpicklingError("a tensor of a kind that is not read")
        if type(key) is not str or type(size) is not int or size < 0:
            raise pickle.UnpicklingError("a tensor without a place or size")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a view of another storage, from a torch before 0.4")
        dtype = _STORAGES[name.name]
        self.declared[key] = dtype, size
        if self.storages is None:
            return None
        start, held = self.storages[key]
        if size * dtype.itemsize > held:
            raise pickle.UnpicklingError(f"a tensor declares {size * dtype.itemsize} bytes where the file has {held}")
        return _Storage(dtype, start, size)

    def _construct(self, name: Any, args: Any) -> Any:
        if isinstance(name, Name) and isinstance(args, tuple) and name in _REBUILD:
            kind = _REBUILD[name]
            if kind == "dict" and not args:
                return _OrderedDict()
            if kind == "dict" and len(args) == 1 and isinstance(args[0], list):  # pickled by protocol 0
                pairs = [pair for pair in args[0] if isinstance(pair, (list, tuple)) and len(pair) == 2]
                return _OrderedDict((self._key(key), value) for key, value in pairs)
            if kind == "size" and len(args) == 1:
                return args[0]
            if kind == "first" and args:  # a parameter: the tensor, and what training wants to know
                return args[0]
            if kind == "type" and len(args) == 4:  # a tensor with attributes: (function, type, arguments, attributes)
                return self._construct(args[0], args[2])
            if kind == "tensor" and len(args) >= 4:
                return None if self.storages is None else self._tensor(*args[:4])
        return StandIn(name, args)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise pickle.UnpicklingError("a tensor without storage, size or stride")
        if len(size) != len(stride) or len(size) > 32:
            raise pickle.UnpicklingError("a tensor whose size and stride differ in length")
        if not all(type(n) is int and 0 <= n < 2**40 for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor of impossible size")
        count = math.prod(size)
        if count == 0:
            return torch.empty(size, dtype=storage.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= storage.size or count > storage.size:
            raise pickle.UnpicklingError(f"a tensor of {count} numbers where the file has {storage.size}")
        itemsize = storage.dtype.itemsize
        start, stop = storage.start + offset * itemsize, storage.start + (last + 1) * itemsize
        view = torch.frombuffer(self.data, dtype=torch.uint8, offset=start, count=stop - start)
        if start % itemsize:  # a legacy file aligns nothing
            self.copied += stop - start
            if self.copied > 4 * len(self.data):
                raise pickle.UnpicklingError("tensors that share memory out of step")
            view = view.clone()
        return view.view(storage.dtype).as_strided(size, stride)

    @staticmethod
    def _key(key: Any) -> Any:
        # Hashing a deeply nested tuple overflows the interpreter's stack.
        plain = key if isinstance(key, tuple) and not isinstance(key, Name) else (key,)
        if not all(isinstance(part, (*_SCALARS, Name, StandIn, torch.dtype)) for part in plain):
            raise pickle.UnpicklingError(f"a mapping with a {type(key).__name__} as key")
        return key

    # Instructions. `stack` and `pop_mark` are the base class's.

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._construct(self.stack[-1], args)

    def _new(self) -> None:
        args = self.stack.pop()
        self.stack.append(self._construct(self.stack.pop(), args))

    def _new_with_names(self) -> None:
        names, args = self.stack.pop(), self.stack.pop()
        made = StandIn(self.stack.pop(), args)
        made.items.append(names)
        self.stack.append(made)

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.stack.append(self._construct(klass, tuple(args)))

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, StandIn):
            made.state = state
        elif made is not None and not isinstance(made, _OrderedDict):
            raise pickle.UnpicklingError(f"a {type(made).__name__} with further state")

    def _put(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if len(pairs) % 2:
            raise pickle.UnpicklingError("a key without value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(target, dict):
                target[self._key(key)] = value
            elif isinstance(target, StandIn):
                target.items.append((key, value))
            else:
                raise pickle.UnpicklingError(f"a {type(target).__name__} with keys")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _set_items(self) -> None:
        pairs = self.pop_mark()
        self._put(pairs)

    def _dict(self) -> None:
        pairs = self.pop_mark()
        self.stack.append({})
        self._put(pairs)

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target = target.items
        if not isinstance(target, list):
            raise pickle.UnpicklingError(f"a {type(target).__name__} with items")
        target.extend(values)

    def _append_one(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _append_many(self) -> None:
        values = self.pop_mark()
        self._extend(values)

    def _add_items(self) -> None:
        values, target = self.pop_mark(), self.stack[-1]
        if isinstance(target, set):
            target.update(self._key(value) for value in values)
        else:
            self._extend(values)

    def _frozenset(self) -> None:
        values = self.pop_mark()
        self.stack.append(frozenset(self._key(value) for value in values))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("an instruction that no checkpoint uses")


_INSTRUCTIONS = (
    (pickle.REDUCE, _Machine._reduce),
    (pickle.NEWOBJ, _Machine._new),
    (pickle.NEWOBJ_EX, _Machine._new_with_names),
    (pickle.BUILD, _Machine._build),
    (pickle.SETITEM, _Machine._set_item),
    (pickle.SETITEMS, _Machine._set_items),
    (pickle.DICT, _Machine._dict),
    (pickle.APPEND, _Machine._append_one),
    (pickle.APPENDS, _Machine._append_many),
    (pickle.ADDITEMS, _Machine._add_items),
    (pickle.FROZENSET, _Machine._frozenset),
    *((code, _Machine._refuse) for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.LONG4)),
    *((code, _Machine._refuse) for code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)),
)
for _code, _method in _INSTRUCTIONS:
    _Machine.dispatch[_code[0]] = _method

_REBUILD = {
    Name("collections", "OrderedDict"): "dict",
    Name("torch", "Size"): "size",
    Name("torch._utils", "_rebuild_tensor"): "tensor",
    Name("torch._utils", "_rebuild_tensor_v2"): "tensor",
    Name("torch._utils", "_rebuild_parameter"): "first",
    Name("torch._utils", "_rebuild_parameter_with_state"): "first",
    Name("torch._tensor", "_rebuild_from_type_v2"): "type",
    Name("torch._tensor", "Tensor"): "name",
    Name("torch", "Tensor"): "name",
    Name("torch.nn.parameter", "Parameter"): "name",
}


# ---- the two containers ----------------------------------------------------


def _read_zip(data: mmap.mmap) -> _Machine:
    archive = zipfile.ZipFile(_Bytes(data, 0, len(data), MAX_DIRECTORY))
    entries = {info.filename: info for info in archive.infolist()}
    main = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(main) != 1:
        raise pickle.UnpicklingError("its archive has no data.pkl")
    top = main[0].removesuffix("data.pkl")
    if f"{top}constants.pkl" in entries:
        raise pickle.UnpicklingError("a TorchScript program; save its state_dict() instead")

    def place(name: str) -> tuple[int, int]:
        info = entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise pickle.UnpicklingError(f"{name} is compressed or encrypted, which torch.save never does")
        header = data[info.header_offset : info.header_offset + 30]
        if header[:4] != b"PK\x03\x04":
            raise pickle.UnpicklingError(f"{name} is not where its directory says")
        names, extra = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + names + extra
        if start + info.file_size > len(data):
            raise pickle.UnpicklingError(f"{name} is cut short")
        return start, info.file_size

    if f"{top}byteorder" in entries:
        start, size = place(f"{top}byteorder")
        if data[start : start + min(size, 16)] != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian")
    prefix = f"{top}data/"
    storages = {name.removeprefix(prefix): place(name) for name in entries if name.startswith(prefix)}
    start, size = place(main[0])
    machine = _Machine(_Bytes(data, start, start + size, MAX_PICKLE), data, storages)
    machine.run()
    return machine


def _read_legacy(data: mmap.mmap) -> _Machine:
    """Magic number, version, machine, content, names of the storages, then each storage: its length and its numbers."""
    file = _Bytes(data, 0, len(data), MAX_PICKLE)

    def run(storages: Mapping[str, tuple[int, int]] | None = None) -> _Machine:
        machine = _Machine(file, data, storages)
        machine.run()
        return machine

    if run().content != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("it does not begin as torch.save's files do")
    run()
    machine_kind = run().content
    if not isinstance(machine_kind, dict) or machine_kind.get("little_endian") is not True:
        raise pickle.UnpicklingError("its numbers are big-endian")
    beginning = file.position
    declared = run().declared
    keys = run().content
    position, storages = file.position, {}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise pickle.UnpicklingError("it does not name its storages")
    for key in keys:
        dtype, size = declared[key]
        (held,) = struct.unpack("<q", data[position : position + 8])
        if held != size or position + 8 + size * dtype.itemsize > len(data):
            raise pickle.UnpicklingError("a tensor is cut short")
        storages[key] = position + 8, size * dtype.itemsize
        position += 8 + size * dtype.itemsize
    # The numbers come last, so their places are known only now: read the content again.
    file.position, file.left = beginning, MAX_PICKLE
    return run(storages)
