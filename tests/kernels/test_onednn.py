import pytest
import torch
import torch.nn.functional as F
from oracle import NEEDS_ONEDNN, assert_no_worse_than_torch

from armhubert.kernels import linear, onednn


@pytest.fixture
def calls(monkeypatch, neglected_by_mkl):
    """How often oneDNN was asked."""
    monkeypatch.setattr(onednn, "SMALLEST", 1 << 23)
    monkeypatch.setattr(onednn, "LONGEST", 384)
    count: list[int] = []
    run = onednn._linear_pointwise
    monkeypatch.setattr(onednn, "_linear_pointwise", lambda *a: (count.append(1), run(*a))[1])
    return count


@pytest.mark.parametrize("shape", [(499, 480), (2, 131, 160), (1, 7, 3, 96), (1500, 1025)])
@pytest.mark.parametrize("outputs", [1, 33, 864])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_and_its_gradients_match_float64(monkeypatch, calls, shape, outputs, with_bias):
    monkeypatch.setattr(onednn, "SMALLEST", 1)
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


@pytest.mark.parametrize("dtype", onednn.DTYPES)
@pytest.mark.parametrize("longest", [384, pytest.param(1024, marks=NEEDS_ONEDNN)])
@pytest.mark.parametrize("width", [160, 480, 864])
def test_gelu_of_a_linear_map_matches_float64(monkeypatch, calls, dtype, longest, width):
    monkeypatch.setattr(onednn, "SMALLEST", 1)
    monkeypatch.setattr(onednn, "LONGEST", longest)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((2, 131, width), (96, width), (96,)))
    high = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    assert_no_worse_than_torch("y", linear(x, weight, bias, gelu=True), F.gelu(F.linear(x, weight, bias)), high)
    assert calls
    monkeypatch.setattr(onednn, "SMALLEST", 1 << 40)
    torch.testing.assert_close(linear(x, weight, bias, gelu=True), F.gelu(F.linear(x, weight, bias)))


@pytest.mark.parametrize(
    ("weight", "bias"), [((600, 500), None), ((600, 480), (1,)), ((600, 480), (1, 600)), ((480,), None), ((), None)]
)
def test_what_does_not_fit_is_left_to_pytorch(monkeypatch, calls, weight, bias):
    monkeypatch.setattr(onednn, "SMALLEST", 1)
    inputs = [torch.randn(512, 480), torch.randn(weight), None if bias is None else torch.randn(bias)]

    def outcome(function):
        try:
            return function(*inputs)
        except RuntimeError as error:
            return str(error)

    got, want = outcome(linear), outcome(F.linear)
    assert got == want if isinstance(want, str) else torch.equal(got, want)
    assert not calls


def test_forward_mode_is_refused_or_right(calls):
    """Never zero: dual tensors do not require gradients, and oneDNN's ops drop what they carry."""
    x, weight, v = torch.randn(600, 128), torch.randn(256, 128), torch.randn(600, 128)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: linear(x, weight), (x,), (v,))
    assert not calls


def test_where_mkl_is_at_its_best_only_inference_goes_to_onednn(monkeypatch, calls):
    monkeypatch.setattr(onednn, "MKL_AT_ITS_BEST", True)
    x, weight = torch.randn(600, 128), torch.nn.Parameter(torch.randn(256, 128))
    linear(x, weight).sum().backward()
    assert not calls
    with torch.no_grad():
        linear(x, weight)
    assert calls
    assert not onednn.serves(x)


def test_without_avx512_nothing_goes_to_onednn(monkeypatch, calls):
    monkeypatch.setattr(onednn, "AVX512", False)
    x, weight = torch.randn(600, 128), torch.randn(256, 128)
    assert linear(x, weight, gelu=True).equal(F.gelu(F.linear(x, weight)))
    assert not calls
    assert not onednn.serves(x)


def test_where_avx512_runs_in_halves_only_bfloat16_goes_to_onednn(monkeypatch, calls):
    monkeypatch.setattr(onednn, "IN_HALVES", True)
    x, weight = torch.randn(600, 128), torch.randn(256, 128)
    assert linear(x, weight, gelu=True).equal(F.gelu(F.linear(x, weight)))
    assert not calls
    assert not onednn.serves(x)
    monkeypatch.setattr(onednn, "DTYPES", (torch.float32, torch.bfloat16))
    linear(x.bfloat16(), weight.bfloat16())
    assert calls


@pytest.mark.parametrize(
    ("processor", "halves"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", False),
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n", False),
        ("CPU implementer\t: 0x41\n", False),
        ("", False),
    ],
)
def test_processors_that_run_avx512_in_halves_are_told_by_vendor_and_family(processor, halves):
    assert onednn._in_halves(processor) is halves


def test_gelu_of_a_convolution_matches_float64():
    image = torch.randn(1, 24, 1, 301).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(40, 24, 1, 3), torch.randn(40)
    low = F.gelu(F.conv2d(image, weight, bias, (2, 2)))
    high = F.gelu(F.conv2d(image.double(), weight.double(), bias.double(), (2, 2)))
    assert_no_worse_than_torch("y", onednn.convolve_gelu(image, weight, bias, (2, 2)), low, high)
    half = onednn.convolve_gelu(image.half(), weight.half(), bias.half(), (2, 2))
    torch.testing.assert_close(half.float(), low, rtol=1e-2, atol=5e-2)


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
        (torch.randn(600, 128, dtype=torch.float16), torch.randn(256, 128, dtype=torch.float16)),
        (torch.empty(600, 128, device="meta"), torch.empty(256, 128, device="meta")),
    ],
    ids=["small", "float64", "float16", "meta"],
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
