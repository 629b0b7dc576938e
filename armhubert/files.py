"""Writing files whole or not at all."""

import contextlib
import errno
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from armhubert.errors import ArmhubertError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()
"""Descriptors of the folders that this process holds."""


def _let_go() -> None:
    """Close what a fork inherits: a process that reads audio outlives a killed parent by seconds."""
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename: a reader sees the old file or the new one.

    Raises:
        ArmhubertError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    with open_atomic(path) as file:
        file.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """As `write_atomic`, for what is written in parts: renamed where the block ends, removed where it raises.

    A process that is killed leaves its temporary file: see `remove_temporaries`.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            remedy = "free space or choose another folder"
            if error.errno == errno.ENAMETOOLONG:
                remedy = "choose a shorter name"
            raise ArmhubertError(f"cannot write {path}: {error.strerror}; {remedy}") from None
        raise


def _prefix(path: Path) -> str:
    """What a temporary name begins with: where `path`'s own name fits, so does the whole, in any script."""
    return f".{path.name[:32]}."


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove what processes that were killed while they wrote these files left behind; for who holds their folders."""
    prefixes: defaultdict[Path, set[str]] = defaultdict(set)
    for path in paths:
        prefixes[path.parent].add(_prefix(path))
    for folder, ours in prefixes.items():
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                if re.fullmatch(r"[a-z0-9_]{8}", name[-8:]) and name[:-8] in ours:
                    (folder / name).unlink()


def make_folder(path: Path) -> None:
    """The folder that results will go to, made before the work.

    Raises:
        ArmhubertError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ArmhubertError(f"cannot write to {path}: {error.strerror}; choose another folder") from None


def check_unused(path: Path, force: bool) -> None:
    """Nothing is lost: a file that exists is replaced where that was asked for, a folder never.

    Raises:
        ArmhubertError: a folder there, or a file without `force`.
    """
    if path.is_dir():
        raise ArmhubertError(f"{path} is a folder: choose another name")
    if path.exists() and not force:
        raise ArmhubertError(f"{path} exists: choose another name, or force=True to replace it")


def claim(files: Sequence[Path], force: bool) -> None:
    """What results will be written to, asked for before the work: files that may be written, in folders that are made.

    Raises:
        ArmhubertError: as `check_unused` of any file, then as `make_folder` of any folder.
    """
    for file in files:
        check_unused(file, force)
    for folder in dict.fromkeys(file.parent for file in files):
        make_folder(folder)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What is written piece by piece in `folder`: a full disk, or one that is gone, is an ArmhubertError."""
    try:
        yield
    except OSError as error:
        raise ArmhubertError(
            f"cannot write in {folder}: {error.strerror}; free space or choose another folder"
        ) from None


def append_lines(path: Path) -> BinaryIO:
    """Open a file of lines to add to; a last line that an interruption tore is ended first, lest it swallow the next.

    Raises:
        OSError: the file cannot be opened.
    """
    file = open(path, "a+b")  # noqa: SIM115 - the caller's
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")
    return file


@contextlib.contextmanager
def held(folder: Path, *, strict: bool = True) -> Iterator[None]:
    """Hold a folder, for this process and none that it forks, against others that ask the same; on Windows, nothing is
    held.

    Raises:
        ArmhubertError: another process holds it; its drive has no locks (`strict`: else nothing is held there).
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArmhubertError(
                f"another process is at work in {folder}: wait for its end, or choose another folder"
            ) from None
        except OSError as error:
            if strict:
                raise ArmhubertError(
                    f"{folder} cannot be locked ({error.strerror}): choose a folder on another drive"
                ) from None
        yield
    finally:
        if descriptor in _held:  # not in a fork of this process
            _held.remove(descriptor)
            os.close(descriptor)


def umask() -> int:
    """The permissions that this process takes from new files and folders."""
    # The umask can only be read by setting it; /proc tells it without touching the process.
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):
        return 0o022
