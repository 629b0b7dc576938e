"""Fewest bytes and operations of each op, hence a floor on its time on a named GPU: predicted, not measured."""

from collections.abc import Sequence
from typing import NamedTuple

from armhubert.kernels.runtime import frame_counts


class Gpu(NamedTuple):
    """Rates that a well-fed kernel reaches."""

    bytes_per_second: float
    operations_per_second: float
    """Of 16-bit matrix products, a multiply-add counted as two."""
    exponentials_per_second: float
    float32_operations_per_second: float
    """Of products in true float32, which have no matrix units."""
    processors: int
    """Fewer programs than that leave some idle."""


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


def attend(B: int, T: int, H: int, d: int, itemsize: int = 2, backward: bool = False) -> Cost:
    """Computing attention: q, k, v in, out and log-sum-exp out; 2 products forward, 5 backward."""
    rows, products = B * T * H * d, 2 * B * H * T * T * d
    if backward:
        return Cost(8 * rows * itemsize + 4 * B * H * T, 5 * products, B * H * T * T)
    return Cost(4 * rows * itemsize + 4 * B * H * T, 2 * products, B * H * T * T)


def reattend(B: int, T: int, H: int, d: int, D: int, itemsize: int = 2, backward: bool = False) -> Cost:
    """A kept map, recomputed, times projected values: q, k, x, weight in, out out."""
    projection, products = 2 * B * T * D * H * d, 2 * B * H * T * T * d
    rows = B * T * H * d
    weight = D * H * d * itemsize
    if backward:  # reads g, q, k, x, out and weight; writes dq, dk, dx and d weight; v is projected again
        moved = (6 * rows + 2 * B * T * D) * itemsize + 2 * weight + 4 * B * H * T
        return Cost(moved, 3 * projection + 5 * products, B * H * T * T)
    return Cost((3 * rows + B * T * D) * itemsize + weight + 4 * B * H * T, projection + 2 * products, B * H * T * T)


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


def distillation(L: int, B: int, T: int, D: int, Dt: int, itemsize: int = 2, backward: bool = False) -> Cost:
    """All layers' heads against the one view each frame needs; backward reads the kept residual."""
    frames = L * B * T
    product = 2 * frames * D * Dt
    weight = L * D * Dt * itemsize
    if backward:  # reads residual and hidden, writes d hidden
        return Cost((frames * (Dt + 2 * D)) * itemsize + 2 * weight, 2 * product)
    return Cost(frames * (D + Dt) * itemsize + weight, product)


def conv_frontend(
    B: int, samples: int, layers: Sequence[tuple[int, int, int]], itemsize: int = 2, backward: bool = False
) -> Cost:
    """The waveform stack, (channels, kernel, stride) a layer: each map written once and read once.

    The first layer's map is not stored where a 1x1 convolution follows, as it can be made inside that layer. Backward
    reads what forward kept of each map, and reads and writes its gradient; two products for each of forward's, except
    for the waveform.
    """
    counts = frame_counts(samples, [kernel for _, kernel, _ in layers], [stride for _, _, stride in layers])
    inputs = 1
    products, maps, weights = [], [], 0
    for (channels, kernel, _), frames in zip(layers, counts, strict=True):
        products.append(2 * B * frames * channels * inputs * kernel)
        maps.append(B * frames * channels)
        weights += channels * inputs * kernel
        inputs = channels
    inner, out = sum(maps[:-1]), maps[-1]
    if len(layers) > 1 and layers[1][1:] == (1, 1):
        inner -= maps[0]
    waveform = B * counts[0] * layers[0][2]
    if backward:
        moved = (3 * inner + 2 * out + waveform + 2 * weights) * itemsize
        return Cost(moved, 2 * sum(products) - products[0])
    return Cost((2 * inner + out + waveform + weights) * itemsize, sum(products))
