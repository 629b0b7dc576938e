"""Where a training loop runs: the processes under torchrun, the state of random generators."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from armhubert.errors import ArmhubertError

T = TypeVar("T")


class World(NamedTuple):
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """The same processes, with a timeout for work that the lead does alone; None for one process."""

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def failure(self, error: ArmhubertError | None) -> ArmhubertError | None:
        """What made any process fail: this one's error, or that there is one in another; None: nothing did."""
        if self.any(error is not None) and error is None:
            return ArmhubertError("another process of the run could not go on: its own message tells why")
        return error

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def from_lead(self, value: T) -> T:
        """What the lead has, in every process. It may come hours later: a first scan decodes all of the data."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]


@contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Seed PyTorch's default generators, of the CPU and of `device` (from `machine.pick_device`), by `key`; the
    caller's state comes back at the end."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


_TIMEOUT = timedelta(minutes=30)
"""A step, a validation or an export takes less; whoever is away for longer has died or hangs."""


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the other processes that torchrun started (gloo on CPUs, NCCL on GPUs); alone where it started none."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    joined = dist.is_initialized()
    if size == 1 and not joined:
        yield World(0, 1, device)
        return
    if not joined:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT, device_id=device if device.type == "cuda" else None)
    # Of gloo on GPUs too: a barrier of NCCL's would keep them busy, and its watchdog impatient. A lead that dies is
    # noticed at once by its closed connections, so days of patience cost nothing.
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    assert isinstance(patient, dist.ProcessGroup)  # every process is in it
    alone = False
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, patient)
    except Exception:
        alone = device.type == "cuda"
        raise
    finally:
        if not alone:  # NCCL's end waits for the others, who may wait for this process: its own end tells them
            dist.destroy_process_group(patient if joined else None)
