import pytest
import torch
from armhubert.kernels import distillation_loss


@pytest.mark.parametrize("distance", ["mse", "l1"])
def test_twin_gradients(distance):
    generator = torch.Generator().manual_seed(0)
    L, B, T, D, Dt = 2, 2, 5, 4, 3
    *hidden, weight, bias, clean, masked = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((B, T, D), (B, T, D), (L, Dt, D), (L, Dt), (L, B, T, Dt), (L, B, T, Dt))
    )
    mask = torch.rand(B, T, generator=generator) < 0.5

    def loss(weight, bias, *hidden):
        return distillation_loss(
            hidden, weight, bias, clean, masked, mask, torch.tensor([5, 2]), distance=distance, impl="torch"
        )

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (weight, bias, *hidden)])
