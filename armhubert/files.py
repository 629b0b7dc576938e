"""Writing files whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path

from armhubert.errors import ArmhubertError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename: a reader sees the old file or the new one.

    Raises:
        ArmhubertError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    content = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise ArmhubertError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from None


def _umask() -> int:
    # The umask can only be read by setting it; /proc tells it without touching the process.
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):
        return 0o022
