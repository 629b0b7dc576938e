import pytest
import torch
import torch.nn.functional as F
from armhubert.kernels import AttentionMap, attend, reattend


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("setting", ["exact", "resoftmax"])
def test_twin_gradients(setting):
    B, T, H, d, D = 3, 6, 2, 4, 5
    lengths = torch.tensor([6, 4, 1])
    valid = (torch.arange(T) < lengths[:, None])[..., None]
    inputs = [draw(B, T, H, d), draw(B, T, H, d, seed=1), draw(B, T, D), draw(H * d, D), draw(H * d)]

    def reuse(q, k, x, weight, bias):
        return reattend(AttentionMap(q, k, None, lengths), x, weight, bias, setting=setting, impl="torch") * valid

    assert torch.autograd.gradcheck(reuse, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_twin_computing_gradients(dropout):
    lengths = torch.tensor([6, 3])
    valid = (torch.arange(6) < lengths[:, None])[..., None]
    inputs = [draw(2, 6, 2, 4, seed=s).requires_grad_() for s in range(3)]
    assert torch.autograd.gradcheck(
        lambda *qkv: attend(*qkv, lengths, dropout=dropout, seed=1, impl="torch")[0] * valid, inputs
    )


def test_twin_is_the_formula():
    q, k, x, weight = draw(2, 7, 3, 4), draw(2, 7, 3, 4, seed=1), draw(2, 7, 12, seed=2), draw(12, 12, seed=3)
    out, kept = attend(q, k, x.view(2, 7, 3, 4), impl="torch")
    A = torch.einsum("bihd,bjhd->bhij", q, k).div(2).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", A, x.view(2, 7, 3, 4)).flatten(2))
    v = F.linear(x, weight).view(2, 7, 3, 4)
    for setting, M in (("exact", A), ("resoftmax", A.softmax(-1))):
        want = torch.einsum("bhij,bjhd->bihd", M, v).flatten(2)
        torch.testing.assert_close(reattend(kept, x, weight, setting=setting, impl="torch"), want)
