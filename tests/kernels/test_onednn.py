import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse_than_torch

from armhubert.kernels import linear, onednn


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was asked."""
    count: list[int] = []
    run = onednn._linear_pointwise
    monkeypatch.setattr(onednn, "_linear_pointwise", lambda *a: (count.append(1), run(*a))[1])
    return count


@pytest.mark.parametrize("shape", [(499, 480), (2, 131, 160), (1, 7, 3, 96), (1500, 1025)])
@pytest.mark.parametrize("outputs", [1, 33, 864])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_and_its_gradients_match_float64(monkeypatch, calls, shape, outputs, with_bias):
    monkeypatch.setattr(onednn, "SMALLEST", 1)
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(outputs, shape[-1]), torch.randn(outputs)][: 3 if with_bias else 2]
    upstream = torch.randn(*shape[:-1], outputs)

    def run(function, dtype):
        own = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        out = function(*own)
        return [out, *torch.autograd.grad(out, own, upstream.to(dtype))]

    ours, low, high = run(linear, torch.float32), run(F.linear, torch.float32), run(F.linear, torch.float64)
    assert len(calls) >= 3
    for name, *values in zip(("y", "dx", "dW", "db"), ours, low, high, strict=False):
        assert_no_worse_than_torch(name, *values)
    assert ours[0].shape == low[0].shape


def test_strided_rows_are_read_as_they_are(monkeypatch, calls):
    monkeypatch.setattr(onednn, "SMALLEST", 1)
    x, weight = torch.randn(5, 40, 6).transpose(1, 2)[:, ::2], torch.randn(7, 40)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    torch.testing.assert_close(linear(x, weight.t().contiguous().t()), F.linear(x, weight))
    assert calls


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(3, 8), torch.randn(4, 8)),
        (torch.randn(600, 128, dtype=torch.float64), torch.randn(256, 128, dtype=torch.float64)),
        (torch.randn(600, 128, dtype=torch.bfloat16), torch.randn(256, 128, dtype=torch.bfloat16)),
        (torch.empty(600, 128, device="meta"), torch.empty(256, 128, device="meta")),
    ],
    ids=["small", "float64", "bfloat16", "meta"],
)
def test_the_rest_is_pytorchs_own(calls, x, weight):
    assert linear(x, weight).shape == (len(x), len(weight))
    assert not calls


def test_autocast_has_its_way(calls):
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(600, 128), torch.randn(256, 128)).dtype == torch.bfloat16
    assert not calls


def test_quantised_weights_keep_their_own_product(calls):
    class Marked(torch.Tensor):
        pass

    weight = torch.nn.Parameter(torch.randn(256, 128).as_subclass(Marked))
    linear(torch.randn(600, 128), weight)
    assert not calls


def test_compilers_see_a_linear_map():
    def run(x, weight):
        return linear(x, weight) + 1

    seen = []

    def backend(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(run, backend=backend, fullgraph=True)(torch.randn(600, 128), torch.randn(256, 128))
    assert any("linear" in name for name in seen)
    assert not any("conv" in name for name in seen)
