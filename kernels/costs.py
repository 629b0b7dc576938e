"""Rates of GPUs, and what the ways to reuse a map cost on one: predicted, not measured. `variants.py` chooses by it."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Rates that a well-fed kernel reaches."""

    bytes_per_second: float
    operations_per_second: float
    """Rate of 16-bit matrix products, a multiply-add counted as two operations."""
    exponentials_per_second: float
    float32_operations_per_second: float
    """Rate of products in true float32, which have no matrix units."""
    processors: int
    """Number of multiprocessors: fewer programs than that leave some idle."""


GPUS = {
    "H200": Gpu(4.3e12, 790e12, 4.2e12, 50e12, 132),
    "H100": Gpu(3.0e12, 790e12, 4.2e12, 50e12, 132),
    "A100": Gpu(1.6e12, 260e12, 2.4e12, 17e12, 108),
}
LAUNCH = 2.5e-6
"""Seconds that one kernel more costs in a queue."""
NARROW = 0.5
"""Share of the matrix rate that products as narrow as a head reach: a guess from other kernels of attention."""


def named(device_name: str) -> Gpu | None:
    """Rates of a GPU by PyTorch's name of it, "NVIDIA H100 80GB HBM3", if they are known."""
    return next((gpu for known, gpu in GPUS.items() if known in device_name), None)


class Cost(NamedTuple):
    """What an op cannot avoid; bytes are the compulsory traffic, each input read once and each output written once."""

    bytes: float
    operations: float
    exponentials: float = 0.0

    def floor(self, gpu: Gpu) -> float:
        """Seconds: the largest of memory, matrix units and special-function units, as if they overlapped perfectly."""
        return max(
            self.bytes / gpu.bytes_per_second,
            self.operations / gpu.operations_per_second,
            self.exponentials / gpu.exponentials_per_second,
        )


def ways_to_reuse(B: int, T: int, H: int, d: int, D: int, gpu: Gpu, itemsize: int = 2) -> dict[str, float]:
    """Predicted seconds of the ways to reuse a map, forward; see `armhubert.kernels.variants`.

    Blocks of 128 queries each repeat a projection inside the kernel. A stored map is made from logits that are computed
    once more, as a row's sum is known only after its last key.
    """
    if itemsize > 2:
        gpu = gpu._replace(operations_per_second=gpu.float32_operations_per_second)
    blocks = -(-T // 128)
    fed = min(1.0, B * H * blocks / gpu.processors)
    rows, entries = B * T * H * d * itemsize, B * H * T * T
    projection, product = 2 * B * T * D * H * d, 2 * entries * d
    inputs = B * T * D * itemsize + D * H * d * itemsize
    before = LAUNCH + Cost(inputs + rows, projection).floor(gpu)
    narrow = gpu._replace(operations_per_second=gpu.operations_per_second * NARROW)

    def attention(moved: float, operations: float, exponentials: float = 0.0) -> float:
        return Cost(moved, operations, exponentials).floor(narrow) / fed

    return {
        "inside_s": LAUNCH + attention(3 * rows + inputs, 2 * product + blocks * projection, entries),
        "outside_s": before + LAUNCH + attention(4 * rows, 2 * product, entries),
        "stored_s": before + LAUNCH + attention(2 * rows + entries * itemsize, product),
        "storing_s": attention(entries * itemsize, product, entries),
    }
