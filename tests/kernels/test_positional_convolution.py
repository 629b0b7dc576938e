import pytest
import torch
import torch.nn.functional as F
from oracle import assert_no_worse_than_torch

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
