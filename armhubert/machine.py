"""What this machine is and has: its device, its processor, its load, its memory."""

import contextlib
import ctypes
import datetime
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from armhubert import __version__
from armhubert.errors import ArmhubertError


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> a device that exists here.

    Raises:
        ArmhubertError: a GPU that is not there, or another kind of device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ArmhubertError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ArmhubertError(
            f"device {name!r} was asked for and PyTorch sees no GPU here: use device='cpu' or device='auto'"
        )
    index = int(number) if number else int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise ArmhubertError(f"device 'cuda:{index}' was asked for and there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """Readable name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def processor_name() -> str:
    """What the system calls its processor; Linux tells it in a file, others to `platform`."""
    names = (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name"))
    return " ".join((next(names, "") or platform.processor() or platform.machine()).split())


def _cpuinfo() -> list[str]:
    """What Linux tells of its processors; nothing elsewhere."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    return []


_EXTENSIONS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "sve", "i8mm", "bf16", "asimd")


def _extensions() -> list[str]:
    """The processor's matrix and vector extensions that decide how fast a model is, where Linux tells them."""
    told = (line.partition(":")[2].split() for line in _cpuinfo() if line.startswith(("flags", "Features")))
    flags = {flag for line in told for flag in line}
    return [extension for extension in _EXTENSIONS if extension in flags]


def conditions(device: torch.device) -> dict[str, str]:
    """What a figure depends on besides the code: device, processor, versions, day."""
    return {
        "device": device_name(device),
        "processor": processor_name(),
        "extensions": " ".join(_extensions()) or "unknown",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "armhubert": __version__,
        "date": datetime.date.today().isoformat(),
    }


def load() -> float | None:
    """Processes that were at work in the last minute, on average; None: the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # Windows; a container without /proc
        return None


# ---- memory ----------------------------------------------------------------


def forget_peak() -> None:
    """Let VmHWM count from what this process holds now.

    Raises:
        OSError: no /proc here, or one that does not let a process do so.
    """
    return_free_pages()
    Path("/proc/self/clear_refs").write_text("5")


def return_free_pages() -> None:
    """To the system, where the C library does that on request: what it keeps would hide what a pass adds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def resident(kind: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM); getrusage would count the parent's before the exec.

    Raises:
        OSError: no /proc here, or one that does not tell.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not tell {kind}")


def high_water_mark(device: torch.device) -> int:
    """Bytes that this process held at most so far, libraries included: on the GPU where one is used, else in memory; 0
    where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return resident("VmHWM")
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had: on the GPU, or in this machine and this container; None: the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        most, used, more = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current", "stat"))
    except OSError:
        return free
    # files that were read count as used, and are given up when memory is asked for
    cached = next((int(line.split()[1]) for line in more.splitlines() if line.startswith("inactive_file ")), 0)
    return free if most == "max" else min(free, int(most) - int(used) + cached)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


@contextlib.contextmanager
def memory_errors(message: str) -> Iterator[None]:
    """An allocation that fails in the block, on a GPU or not, is an ArmhubertError of this message."""
    try:
        yield
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        raise ArmhubertError(message) from error
