import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, INTERPRET, assert_no_worse_than_torch, check_op

from armhubert.kernels import positional_convolution as positional


@pytest.mark.parametrize(
    ("batch", "frames", "channels", "groups", "taps"),
    [(1, 1, 32, 4, 32), (2, 63, 32, 4, 33), (1, 129, 48, 16, 128), (3, 200, 48, 16, 128), (2, 1500, 16, 2, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_matches_float64(batch, frames, channels, groups, taps, dtype):
    shapes = ((batch, frames, channels), (channels, channels // groups, taps), (channels,))
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in shapes)

    def direct(x, weight, bias):
        y = F.conv1d(x.transpose(1, 2), weight, bias, padding=taps // 2, groups=groups)
        return y[..., :frames].transpose(1, 2)

    got = positional.convolve(x, positional.spectrum(weight), bias)
    assert got.dtype == dtype
    high = direct(x.double(), weight.double(), bias.double())
    assert_no_worse_than_torch("y", got, direct(x, weight, bias), high)


def test_where_it_is_used():
    x = torch.randn(2, 100, 16)
    assert positional.serves(x, 128, False)
    assert not positional.serves(x, 128, True)
    assert not positional.serves(x[:, :10], 128, False)
    assert not positional.serves(x, 8, False)
    assert not positional.serves(x.half(), 128, False)
    assert not positional.serves(x.to("meta"), 128, False)


SHAPES = [
    (1, 1, 24, 2, 32),
    (2, 63, 60, 2, 33),
    (1, 130, 60, 2, 128),
    (1, 40, 96, 2, 48),
    (1, 300, 60, 2, 32),
    (1, 33, 160, 2, 32),
]


def gelu_of_convolution(x, weight, bias):
    taps, width = weight.shape[2], weight.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=taps // 2, groups=x.shape[2] // width)
    return F.gelu(y[..., : x.shape[1]]).transpose(1, 2)


def drawn(shape, dtype, strided=False):
    batch, frames, channels, groups, taps = shape
    generator = torch.Generator().manual_seed(frames)
    x = torch.randn(batch, frames + strided, channels * (1 + strided), generator=generator)[:, strided:, :channels]
    weight = torch.randn(channels, channels // groups, taps, generator=generator) / (channels // groups * taps) ** 0.5
    return [t.to(DEVICE, dtype) for t in (x, weight, torch.randn(channels, generator=generator))]


@pytest.mark.needs_triton
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
def test_the_kernel_matches_float64(shape, dtype, strided):
    inputs = drawn(shape, dtype, strided)
    got = positional.fused(*inputs)
    assert got.dtype == dtype
    high = gelu_of_convolution(*(t.double() for t in inputs))
    assert_no_worse_than_torch("y", got, gelu_of_convolution(*inputs), high)
    assert torch.equal(got, positional.fused(*inputs))


@pytest.mark.needs_triton
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_the_op(shape):
    check_op(positional.fused, tuple(drawn(shape, torch.float16)))


def test_where_the_kernel_is_used():
    x = torch.randn(2, 100, 16, dtype=torch.float16, device=DEVICE)
    anywhere = INTERPRET or DEVICE == "cuda"
    assert positional.fuses(x, 128, False, "auto") == anywhere
    assert not positional.fuses(x, 128, False, "torch")
    assert not positional.fuses(x, 128, True, "auto")
    assert not positional.fuses(x, 8, False, "auto")
    assert not positional.fuses(x.float(), 128, False, "auto")
    if anywhere:
        with torch.autocast(DEVICE, torch.float16):
            assert positional.fuses(x.float(), 128, False, "auto")
