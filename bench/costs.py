"""Fewest bytes and operations of each op, hence a floor on its time on a named GPU: predicted, not measured."""

from collections.abc import Sequence

from armhubert.kernels.costs import Cost
from armhubert.kernels.runtime import frame_counts


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


def distillation(L: int, B: int, T: int, D: int, Dt: int, itemsize: int = 2, backward: bool = False) -> Cost:
    """All layers' heads against the one view each frame needs; backward reads the kept residual."""
    frames = L * B * T
    product = 2 * frames * D * Dt
    weight = L * D * Dt * itemsize
    if backward:  # reads residual and hidden, writes d hidden
        return Cost((frames * (Dt + 2 * D)) * itemsize + 2 * weight, 2 * product)
    return Cost(frames * (D + Dt) * itemsize + weight, product)


def positional_convolution(
    B: int, T: int, C: int, groups: int, taps: int, itemsize: int = 2, backward: bool = False
) -> Cost:
    """The grouped convolution over time: x and weight in, out out; backward, two products and twice the traffic."""
    rows, weight = B * T * C, C * C // groups * taps
    cost = Cost((2 * rows + weight) * itemsize, 2 * rows * C // groups * taps)
    return Cost(2 * cost.bytes, 2 * cost.operations) if backward else cost


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
