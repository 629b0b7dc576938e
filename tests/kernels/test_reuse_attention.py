import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import DEVICE, DTYPES, INTERPRET, NEEDS_ONEDNN, assert_no_worse_than_torch, check_op
from torch import Tensor

from armhubert.kernels import AttentionMap, attend, attention_probabilities, onednn, reattend
from armhubert.kernels import reuse_attention as module
from armhubert.kernels import torch_reuse_attention as twin

MODES = ["exact", "resoftmax"]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def valid_frames(lengths: Tensor, T: int) -> Tensor:
    return (torch.arange(T, device=lengths.device) < lengths[:, None])[..., None]


def ragged(B: int, T: int) -> Tensor:
    return torch.tensor([max(1, T - 5 * b) for b in range(B)], device=DEVICE)


def layer_pair(impl, dtype, mode, *, B, T, H, d, D, lengths, packed=True):
    """A computing and a reusing layer: outputs on valid frames and the gradients of every input."""
    qkv = draw(B, T, 3, H, d, dtype=dtype, seed=T + d).requires_grad_()
    x = draw(B, T, D, dtype=dtype, seed=1).requires_grad_()
    weight = (draw(H * d, D, seed=2) / D**0.5).to(dtype).requires_grad_()
    bias = draw(H * d, dtype=dtype, seed=3).requires_grad_()
    g = draw(2, B, T, H * d, dtype=dtype, seed=4) * (1 if lengths is None else valid_frames(lengths, T))
    q, k, v = qkv.unbind(2) if packed else (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv.unbind(2))
    computed, kept = attend(q, k, v, lengths, impl=impl)
    reused = reattend(kept, x, weight, bias, mode=mode, impl=impl)
    grads = torch.autograd.grad([computed, reused], [qkv, x, weight, bias], [g[0], g[1]])
    shown = 1 if lengths is None else valid_frames(lengths, T)
    names = ("computed", "reused", "d_qkv", "d_x", "d_weight", "d_bias")
    return dict(zip(names, (computed * shown, reused * shown, *grads), strict=True))


def compare(dtype, mode, **shape):
    got = layer_pair("triton", dtype, mode, **shape)
    low = layer_pair("torch", dtype, mode, **shape)
    high = layer_pair("torch", torch.float64, mode, **shape)
    for name in got:
        assert_no_worse_than_torch(name, got[name], low[name], high[name])


# ---- the map as a tensor ----------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_map_is_what_values_are_multiplied_with(impl, mode, autocast):
    B, T, H, d = 2, 63, 3, 36
    q, k, v = (draw(B, T, H, d, dtype=torch.float32, seed=s) for s in range(3))
    lengths = torch.tensor([T, 20], device=DEVICE)
    kept = attend(q, k, v, lengths, impl=impl)[1]
    valid = valid_frames(lengths, T)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        p = attention_probabilities(kept, mode=mode)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), valid.mT.expand(B, H, T).float())
    assert not p[1, :, :, 20:].any()
    want = reattend(kept, v.flatten(2), mode=mode, impl=impl) * valid
    torch.testing.assert_close((p @ v.transpose(1, 2)).transpose(1, 2).flatten(2), want, atol=1e-5, rtol=1e-5)


def test_the_map_has_gradients():
    lengths = torch.tensor([5, 3], device=DEVICE)
    inputs = [draw(2, 5, 2, 4, seed=s).requires_grad_() for s in range(2)]
    for mode in MODES:
        assert torch.autograd.gradcheck(
            lambda q, k, mode=mode: attention_probabilities(AttentionMap(q, k, None, lengths), mode=mode), inputs
        )


# ---- the twins --------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_twin_gradients(mode):
    B, T, H, d, D = 3, 6, 2, 4, 5
    lengths = torch.tensor([6, 4, 1], device=DEVICE)
    inputs = [draw(B, T, H, d), draw(B, T, H, d, seed=1), draw(B, T, D), draw(H * d, D), draw(H * d)]

    def reuse(q, k, x, weight, bias):
        kept = AttentionMap(q, k, None, lengths)
        return reattend(kept, x, weight, bias, mode=mode, impl="torch") * valid_frames(lengths, T)

    assert torch.autograd.gradcheck(reuse, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize(("dropout", "piece"), [(0.0, twin.PIECE), (0.3, twin.PIECE), (0.3, 12)])
def test_twin_computing_gradients(dropout, piece, monkeypatch):
    monkeypatch.setattr(twin, "PIECE", piece)  # 12: two rows of 6, a head of 3 x 3
    lengths = torch.tensor([6, 3], device=DEVICE)
    inputs = [draw(2, 6, 2, 4, seed=s).requires_grad_() for s in range(3)]

    def compute(q, k, v):
        return attend(q, k, v, lengths, dropout=dropout, seed=1, impl="torch")[0] * valid_frames(lengths, 6)

    assert torch.autograd.gradcheck(compute, inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [1, 63, 500])
@pytest.mark.parametrize("fit", [True, False])
def test_twin_keeps_maps_in_inference_where_onednn_is_faster(mode, T, fit, monkeypatch, neglected_by_mkl):
    monkeypatch.setattr(twin, "BY_HEADS", 1)
    monkeypatch.setattr(twin, "KEPT", 4 * T * T * 3 * (2 if fit else 1))  # else one of the two utterances' alone
    q, k, v = draw(2, T, 3, 3, 40, dtype=torch.float32).cpu().unbind(2)
    x, weight, lengths = torch.randn(2, T, 20), torch.randn(120, 20), torch.tensor([T, max(1, T // 2)])

    def run(dtype):
        computed, kept = attend(q.to(dtype), k.to(dtype), v.to(dtype), lengths, impl="torch")
        reused = reattend(kept, x.to(dtype), weight.to(dtype), mode=mode, impl="torch")
        return torch.stack([computed, reused]) * valid_frames(lengths, T), kept.probabilities

    with torch.no_grad():
        got, maps = run(torch.float32)
        assert maps is None if not fit else [len(p) for p in maps] == lengths.repeat_interleave(3).tolist()
        monkeypatch.setattr(onednn, "MKL_AT_ITS_BEST", True)
        low, maps = run(torch.float32)
        assert maps is None
        for name, *outputs in zip(("computed", "reused"), got, low, run(torch.float64)[0], strict=True):
            assert_no_worse_than_torch(name, *outputs)


def by_pieces(monkeypatch: pytest.MonkeyPatch, pay: bool) -> None:
    monkeypatch.setattr(twin, "_pieces_pay", lambda q, gradients: pay and not gradients and q.dtype == torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1, 9, 60])
@pytest.mark.parametrize(("T", "piece"), [(1, 1), (63, 63 * 20), (63, 63 * 63 * 2), (500, twin.LOW_PIECE)])
@pytest.mark.parametrize("fit", [True, False])
def test_twin_goes_by_pieces_in_bfloat16_inference(mode, scale, T, piece, fit, monkeypatch):
    monkeypatch.setattr(twin, "LOW_PIECE", piece)
    monkeypatch.setattr(twin, "KEPT", 2 * T * T * 3 * (2 if fit else 1))
    lengths = torch.tensor([T, max(1, T // 2)])
    shapes = ((2, T, 3, 40),) * 3, ((2, T, 20), (120, 20))
    (q, k, v), xw = ([draw(*s, dtype=torch.bfloat16, seed=i).cpu() for i, s in enumerate(group)] for group in shapes)
    qkv = q * scale, k, v  # logits of 5, 40 or 270

    def run(dtype, pay):
        by_pieces(monkeypatch, pay)
        computed, kept = attend(*(t.to(dtype) for t in qkv), lengths, impl="torch")
        assert (kept.probabilities is not None) is (pay and fit)
        reused = reattend(kept, *(t.to(dtype) for t in xw), mode=mode, impl="torch")
        return torch.stack([computed, reused]) * valid_frames(lengths, T)

    with torch.no_grad():
        outputs = run(torch.bfloat16, True), run(torch.bfloat16, False), run(torch.float64, False)
    for name, got, low, high in zip(("computed", "reused"), *outputs, strict=True):
        assert_no_worse_than_torch(name, got, low, high)


def test_a_map_kept_in_pieces_serves_layers_that_learn(monkeypatch):
    inputs = [draw(2, 33, 2, 12, dtype=torch.bfloat16, seed=s).cpu() for s in range(3)]
    x, weight = (draw(*shape, dtype=torch.bfloat16).cpu() for shape in ((2, 33, 24), (24, 24)))
    by_pieces(monkeypatch, True)

    def run(dtype, keep):
        kept = attend(*(t.to(dtype) for t in inputs), reusing_layers=keep, impl="torch")[1]
        assert (kept.probabilities is not None) is keep
        learns = weight.to(dtype).requires_grad_()
        out = reattend(kept, x.to(dtype), learns, impl="torch")
        return out, *torch.autograd.grad(out.square().sum(), learns)

    outputs = run(torch.bfloat16, True), run(torch.bfloat16, False), run(torch.float64, False)
    for name, *each in zip(("out", "d_weight"), *outputs, strict=True):
        assert_no_worse_than_torch(name, *each)


def test_pieces_pay_for_long_bfloat16_where_the_processor_has_it_and_mkl_is_not_at_its_best(monkeypatch):
    q = torch.zeros(1, 200, 2, 40, dtype=torch.bfloat16)
    for name, value in {"DTYPES": (torch.float32, torch.bfloat16), "AVX512": True, "MKL_AT_ITS_BEST": False}.items():
        monkeypatch.setattr(onednn, name, value)
    assert twin._pieces_pay(q, gradients=False)
    assert not twin._pieces_pay(q, gradients=True)
    assert not twin._pieces_pay(q[:, :50], gradients=False)
    assert not twin._pieces_pay(q.float(), gradients=False)
    for name, value in {"DTYPES": (torch.float32,), "AVX512": False, "MKL_AT_ITS_BEST": True}.items():
        with monkeypatch.context() as patch:
            patch.setattr(onednn, name, value)
            assert not twin._pieces_pay(q, gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_of_an_empty_batch_are_none(dtype, monkeypatch, neglected_by_mkl):
    monkeypatch.setattr(twin, "BY_HEADS", 1)
    by_pieces(monkeypatch, True)
    q = torch.zeros(0, 9, 2, 4, dtype=dtype)
    out, kept = attend(q, q, q, impl="torch")
    assert kept.probabilities is None
    assert reattend(kept, out.requires_grad_(), impl="torch").shape == (0, 9, 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [1, 63, pytest.param(500, marks=NEEDS_ONEDNN)])
def test_gradients_through_the_maps_that_the_twin_keeps(mode, T, monkeypatch, neglected_by_mkl):
    monkeypatch.setattr(twin, "BY_HEADS", 1)
    shape = {"B": 2, "T": T, "H": 3, "d": 40, "D": 20, "lengths": torch.tensor([T, max(1, T // 2)])}
    applied = Mock(wraps=twin._apply_maps)
    monkeypatch.setattr(twin, "_apply_maps", applied)
    got = layer_pair("torch", torch.float32, mode, **shape)
    assert applied.called
    monkeypatch.setattr(onednn, "MKL_AT_ITS_BEST", True)
    low = layer_pair("torch", torch.float32, mode, **shape)
    high = layer_pair("torch", torch.float64, mode, **shape)
    for name in got:
        assert_no_worse_than_torch(name, got[name], low[name], high[name])


def test_maps_kept_for_backward_take_gradients_from_any_layer(monkeypatch, neglected_by_mkl):
    monkeypatch.setattr(twin, "BY_HEADS", 1)
    inputs = [draw(2, 33, 2, 12, seed=s, dtype=torch.float32).cpu().requires_grad_() for s in range(3)]
    x, weight = (draw(*shape, dtype=torch.float32).cpu() for shape in ((2, 33, 24), (24, 24)))

    def run(uses):
        computed, kept = attend(*inputs, impl="torch")
        reused = [reattend(kept, x, weight * scale, impl="torch") for scale in (1, -0.3)]
        outputs = [[computed, *reused][i] for i in uses]
        return torch.autograd.grad([o.square().sum() for o in outputs], inputs, allow_unused=True)

    for uses in ([0], [2], [1, 2], [0, 1, 2]):
        got = run(uses)
        with monkeypatch.context() as patch:
            patch.setattr(twin, "KEPT_FOR_BACKWARD", 0)
            want = run(uses)
        assert 0 not in uses or got[2].any()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_map_made_without_gradients_serves_layers_that_learn(frozen, monkeypatch, neglected_by_mkl):
    monkeypatch.setattr(twin, "BY_HEADS", 1)
    inputs = [draw(2, 33, 2, 12, seed=s, dtype=torch.float32).cpu().requires_grad_(not frozen) for s in range(3)]
    x, weight = (draw(*shape, dtype=torch.float32).cpu() for shape in ((2, 33, 24), (24, 24)))
    with torch.no_grad():
        kept = attend(*inputs, impl="torch")[1]
    assert kept.probabilities is not None
    leaves = [weight.requires_grad_(), *([] if frozen else inputs[:2])]
    got = torch.autograd.grad(reattend(kept, x, weight, impl="torch").square().sum(), leaves)
    monkeypatch.setattr(onednn, "MKL_AT_ITS_BEST", True)
    want = torch.autograd.grad(reattend(kept, x, weight, impl="torch").square().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_twin_is_the_formula():
    q, k, x, weight = draw(2, 7, 3, 4), draw(2, 7, 3, 4, seed=1), draw(2, 7, 12, seed=2), draw(12, 12, seed=3)
    out, kept = attend(q, k, x.view(2, 7, 3, 4), impl="torch")
    A = torch.einsum("bihd,bjhd->bhij", q, k).div(2).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", A, x.view(2, 7, 3, 4)).flatten(2))
    v = F.linear(x, weight).view(2, 7, 3, 4)
    for mode, M in (("exact", A), ("resoftmax", A.softmax(-1))):
        want = torch.einsum("bhij,bjhd->bihd", M, v).flatten(2)
        torch.testing.assert_close(reattend(kept, x, weight, mode=mode, impl="torch"), want)


@pytest.mark.parametrize("mode", MODES)
def test_twin_traces(mode):
    """The traceable form that compilers and exporters see equals the one that works an utterance at a time."""
    lengths = torch.tensor([7, 3], device=DEVICE)
    q, k, v = (draw(2, 7, 3, 4, seed=s) for s in range(3))
    x, weight = draw(2, 7, 12), draw(12, 12)

    def both(q, k, v, x):
        out, kept = attend(q, k, v, lengths, impl="torch")
        return out + reattend(kept, x, weight, mode=mode, impl="torch")

    got = torch.compile(both, fullgraph=True, backend="eager")(q, k, v, x)
    shown = valid_frames(lengths, 7)
    torch.testing.assert_close(got * shown, both(q, k, v, x) * shown)


# ---- Triton against float64 -------------------------------------------------


@pytest.mark.needs_triton
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "d"), [(1, 64), (7, 36), (63, 40), (129, 40)])
def test_matches(T, d, dtype, mode):
    B = 1 if T > 100 else 2
    compare(dtype, mode, B=B, T=T, H=2 if T < 100 else 1, d=d, D=20, lengths=ragged(B, T) - int(T > 100))


@pytest.mark.needs_triton
@pytest.mark.parametrize("d", [12, 24, 80, 128])
def test_head_widths(d):
    compare(torch.float32, "exact", B=1, T=18, H=2, d=d, D=33, lengths=None)


@pytest.mark.needs_triton
def test_ten_seconds():
    compare(torch.float16, "exact", B=1, T=500, H=1, d=40, D=40, lengths=torch.tensor([499], device=DEVICE))


@pytest.mark.needs_triton
def test_strides():
    """Heads first in memory, and a model width that no block divides."""
    compare(torch.float32, "resoftmax", B=2, T=9, H=3, d=20, D=7, lengths=ragged(2, 9).int(), packed=False)


@pytest.mark.needs_triton
def test_strides_of_the_small_inputs(monkeypatch):
    """Lengths and biases may be views: one number for all, or every second one."""
    q = draw(3, 9, 2, 16, dtype=torch.float32)
    x, weight, numbers = (draw(*s, dtype=torch.float32) for s in ((3, 9, 8), (32, 8), (64,)))
    lengths = torch.tensor([5], device=DEVICE).expand(3)
    for inside in (True, False):
        monkeypatch.setattr(module, "project_inside", lambda q, inside=inside: inside)
        results = []
        for n, bias in ((lengths, numbers[::2]), (lengths.clone(), numbers[::2].clone())):
            leaf = q.clone().requires_grad_()
            out, kept = attend(leaf, leaf, leaf, n, impl="triton")
            reused = reattend(kept, x, weight, bias, impl="triton")
            results.append([out, reused, *torch.autograd.grad((out.square() + reused.square()).sum(), leaf)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.needs_triton
def test_small_gradients_in_float16():
    """A second softmax over many keys has small weights: what is divided by their sum must stay in float16's range."""
    B, T, H, d = 1, 130, 1, 16
    g = 2e-4 * draw(B, T, d, dtype=torch.float16, seed=9)

    def gradients(impl, kind):
        leaves = [draw(B, T, H, d, seed=s).to(torch.float16).to(kind).requires_grad_() for s in range(2)]
        x = draw(B, T, 8, seed=3).to(torch.float16).to(kind)
        weight = (draw(d, 8) / 3).to(torch.float16).to(kind)
        kept = attend(*leaves, leaves[1], impl=impl)[1]
        out = reattend(kept, x, weight.requires_grad_(), mode="resoftmax", impl=impl)
        return torch.autograd.grad(out, [*leaves, weight], g.to(kind))

    got, low, high = (
        gradients(*way) for way in (("triton", torch.float16), ("torch", torch.float16), ("torch", torch.float64))
    )
    for name, a, b, c in zip(("d_q", "d_k", "d_weight"), got, low, high, strict=True):
        assert_no_worse_than_torch(name, a, b, c)


@pytest.mark.needs_triton
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    H=st.integers(1, 3),
    d=st.integers(3, 70),
    D=st.integers(1, 70),
    mode=st.sampled_from(MODES),
)
def test_any_shape(B, T, H, d, D, mode):
    compare(torch.float32, mode, B=B, T=T, H=H, d=d, D=D, lengths=ragged(B, T))


@pytest.mark.needs_triton
@pytest.mark.parametrize("mode", MODES)
def test_projection_inside_equals_two_stages(mode, monkeypatch):
    shape = {"B": 2, "T": 40, "H": 2, "d": 40, "D": 48, "lengths": ragged(2, 40)}
    inside = layer_pair("triton", torch.float32, mode, **shape)
    monkeypatch.setattr(module, "project_inside", lambda q: False)
    outside = layer_pair("triton", torch.float32, mode, **shape)
    for name in inside:
        torch.testing.assert_close(inside[name], outside[name], rtol=1e-5, atol=1e-5)


@pytest.mark.needs_triton
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "d"), [(1, 40), (7, 36), (63, 64), (129, 40)])
def test_stored_map(T, d, dtype, mode, monkeypatch):
    """Stored by the computing layer, applied by the reusing one: as exact as recomputed, 0 where none attends."""
    monkeypatch.setattr(module, "store_map", lambda q, layers: True)
    B, H = (1, 1) if T > 100 else (3, 2)
    q, k, v = draw(B, T, 3, H, d, dtype=dtype, seed=T).unbind(2)
    x, weight, bias = draw(B, T, 20, dtype=dtype), draw(H * d, 20, dtype=dtype, seed=2) / 4, draw(H * d, dtype=dtype)
    lengths = ragged(B, T) - int(T > 100)
    shown = valid_frames(lengths, T)

    def pair(impl, *inputs):
        q, k, v, x, weight, bias = inputs
        out, kept = attend(q, k, v, lengths, impl=impl)
        return out * shown, reattend(kept, x, weight, bias, mode=mode, impl=impl) * shown, kept

    inputs = (q, k, v, x, weight, bias)
    *got, kept = pair("triton", *inputs)
    (p,) = kept.probabilities
    assert p.shape == (B, H, T, module.pitched(T))
    valid = shown[:, None] & shown[:, None, :, 0, None].transpose(2, 3)  # [B, 1, T, T]
    assert not p[..., T:].any()
    assert not p[..., :T].masked_select(~valid).any()
    assert bool((p[..., :T].sum(-1).masked_select(shown[:, None, :, 0]) - 1).abs().max() < 2e-2)
    low, high = pair("torch", *inputs), pair("torch", *(t.double() for t in inputs))
    for name, a, b, c in zip(("computed", "reused"), got, low, high, strict=False):
        assert_no_worse_than_torch(name, a, b, c)


@pytest.mark.needs_triton
def test_stored_map_is_for_inference(monkeypatch):
    """With gradients there is none; a map stored without them still lets gradients through, by way of q and k."""
    monkeypatch.setattr(module, "store_map", lambda q, layers: bool(layers))
    q, x, weight = (draw(*s, dtype=torch.float32) for s in ((2, 9, 2, 16), (2, 9, 8), (32, 8)))
    kept = attend(q, q, q, impl="triton")[1]
    assert kept.probabilities is not None
    assert attend(q, q, q, reusing_layers=0, impl="triton")[1].probabilities is None
    x.requires_grad_()
    reused = reattend(kept, x, weight, impl="triton")
    torch.testing.assert_close(reused, reattend(kept, x.detach(), weight, impl="triton"))
    assert torch.autograd.grad(reused.sum(), x)[0].any()
    q.requires_grad_()
    assert attend(q, q, q, impl="triton")[1].probabilities is None


@pytest.mark.needs_triton
def test_large_logits():
    """Logits near 1000: one rounding step of the log-sum-exp is then 6e-5 of a probability."""
    q = 10 * draw(1, 33, 1, 40, dtype=torch.float32)
    out, kept = attend(q, q, q, impl="triton")
    again = reattend(kept, q.flatten(2), torch.eye(40, device=DEVICE), impl="triton")
    torch.testing.assert_close(again, out, rtol=1e-3, atol=1e-3)


@pytest.mark.needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_where_all_logits_are_low(dtype):
    """exp(0 - lse), of the keys that are loaded as 0, is then more than any number: it must reach no gradient."""
    T, valid = 24, 17
    q = 25 + draw(1, T, 1, 40, dtype=dtype)
    inputs = [q, -q, draw(1, T, 1, 40, dtype=dtype, seed=1)]

    def gradients(frames, lengths):
        leaves = [t[:, :frames].clone().requires_grad_() for t in inputs]
        out = attend(*leaves, lengths, impl="triton")[0]
        g = torch.ones_like(out) if lengths is None else torch.ones_like(out) * valid_frames(lengths, T)
        return [out, *torch.autograd.grad(out, leaves, g)]

    alone, padded = gradients(valid, None), gradients(T, torch.tensor([valid], device=DEVICE))
    for a, b in zip(alone, padded, strict=True):
        assert torch.equal(a, b[:, :valid])
        assert not b[:, valid:].any()


@pytest.mark.needs_triton
def test_dropout_draws_each_entry_for_itself():
    """Entries 8 apart take words of one draw, heads and utterances draws of their own: all as if by chance."""
    B, T, H, dropout = 2, 64, 2, 0.3
    q = draw(B, T, H, T, dtype=torch.float32) * 0
    eye = torch.eye(T, device=DEVICE)[None, :, None].expand(B, T, H, T)
    out, _ = attend(q, q, eye, dropout=dropout, seed=11, impl="triton")
    keep = (out.view(B, T, H, T).transpose(1, 2) > 0).double()  # [B, H, T, T]
    spread = (dropout * (1 - dropout)) ** 0.5
    assert abs(keep.mean() - (1 - dropout)) < 4 * spread / keep.numel() ** 0.5
    keep -= keep.mean()
    shifted = [keep.roll(shift, axis) for shift in (1, 8, 16) for axis in (-1, -2)]
    for other in (*shifted, keep.roll((8, 8), (-2, -1)), keep.flip(0), keep.flip(1), keep.transpose(-1, -2).triu(1)):
        assert abs((keep * other).mean()) < 4 * spread**2 / keep.numel() ** 0.5


@pytest.mark.needs_triton
def test_dropout_is_one_mask_forward_and_backward():
    """v = identity shows which entries of the map were dropped; with that mask float64 autograd gives the gradients."""
    B, T, H, d, dropout = 2, 24, 2, 24, 0.4
    lengths = torch.tensor([24, 17], device=DEVICE)
    q, k, v = (draw(B, T, H, d, dtype=torch.float32, seed=s) for s in range(3))
    eye = torch.eye(T, device=DEVICE)[None, :, None].expand(B, T, H, d)
    seed = torch.tensor([2**40 + 5], device=DEVICE)
    dropped, _ = attend(q, k, eye, lengths, dropout=dropout, seed=seed, impl="triton")
    keep = (dropped.view(B, T, H, T).transpose(1, 2) > 0).double() / (1 - dropout)  # [B, H, T, T]
    share = (keep[0] > 0).double().mean()
    assert abs(share - (1 - dropout)) < 0.06
    assert not torch.equal(keep[0, 0], keep[0, 1])
    shown = valid_frames(lengths, T)

    def reference(q, k, v):
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5
        A = logits.masked_fill(~shown[:, None, None, :, 0], -torch.inf).softmax(-1) * keep
        return torch.einsum("bhij,bjhd->bihd", A, v).flatten(2)

    def ours(q, k, v):
        return attend(q, k, v, lengths, dropout=dropout, seed=2**40 + 5, impl="triton")[0]

    inputs = [x.requires_grad_() for x in (q, k, v)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    g = draw(B, T, H * d, dtype=torch.float32, seed=9) * shown
    got, want = ours(*inputs), reference(*doubles)
    torch.testing.assert_close(got * shown, (want * shown).float(), rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, doubles, g.double()), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="off the CPU an utterance is one piece")
def test_dropout_of_the_twin_is_drawn_piece_by_piece(monkeypatch):
    """In no more memory than a piece takes, and the same numbers as if they were drawn for the whole map."""
    drawn = Mock(wraps=torch.rand)
    monkeypatch.setattr(torch, "rand", drawn)
    q = draw(2, 40, 3, 16, dtype=torch.float64).requires_grad_()  # pieces add up in another order
    results = []
    for piece in (twin.PIECE, 400):
        drawn.reset_mock()
        monkeypatch.setattr(twin, "PIECE", piece)
        out = attend(q, q, q, torch.tensor([40, 17]), dropout=0.4, seed=3, impl="torch")[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), q)])
        shapes = [call.args[0] for call in drawn.call_args_list]
        assert max(heads * rows * n for heads, rows, n in shapes) <= piece
        assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def test_dropout_follows_the_seed(impl):
    q = draw(2, 9, 2, 16, dtype=torch.float32)
    first, second = (attend(q, q, q, dropout=0.5, seed=7, impl=impl)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, attend(q, q, q, dropout=0.5, seed=8, impl=impl)[0])
    torch.manual_seed(0)
    first = attend(q, q, q, dropout=0.5, impl=impl)[0]
    torch.manual_seed(0)
    assert torch.equal(first, attend(q, q, q, dropout=0.5, impl=impl)[0])


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
@pytest.mark.parametrize("mode", MODES)
def test_padding_does_not_leak(impl, mode):
    """An utterance in a padded batch, with garbage behind it, equals itself alone."""
    q, k, v = (draw(2, 21, 2, 40, dtype=torch.float32, seed=s) for s in range(3))
    x, weight = draw(2, 21, 16, dtype=torch.float32), draw(80, 16, dtype=torch.float32)
    for t in (q, k, v, x):
        t[1, 13:] = 1e4
    lengths = torch.tensor([21, 13], device=DEVICE)
    out, kept = attend(q, k, v, lengths, impl=impl)
    alone, kept_alone = attend(q[1:, :13], k[1:, :13], v[1:, :13], impl=impl)
    torch.testing.assert_close(out[1:, :13], alone)
    reused = reattend(kept, x, weight, mode=mode, impl=impl)
    reused_alone = reattend(kept_alone, x[1:, :13], weight, mode=mode, impl=impl)
    torch.testing.assert_close(reused[1:, :13], reused_alone, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(out).all()
    assert torch.isfinite(reused).all()


@pytest.mark.needs_triton
def test_reruns_are_bitwise_equal():
    shape = {"B": 2, "T": 40, "H": 1, "d": 40, "D": 16, "lengths": ragged(2, 40)}
    first, second = (layer_pair("triton", torch.float32, "exact", **shape) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the ops in PyTorch's machinery -----------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.needs_triton
def test_opcheck(mode):
    q, k, v = (draw(2, 7, 2, 16, dtype=torch.float32, seed=s) for s in range(3))
    x, weight, bias = (draw(*s, dtype=torch.float32) for s in ((2, 7, 12), (32, 12), (32,)))
    lengths, resoftmax = ragged(2, 7), mode == "resoftmax"
    seed = torch.tensor([3], device=DEVICE)
    out, lse, kept = module._attend_fwd(q, k, v, lengths, None, 0.0, True)
    _, norm = module._reattend_fwd(q, k, v, lse, lengths, resoftmax)
    for keep in (False, True):
        check_op(module._attend_fwd, (q, k, v, lengths, seed, 0.2, keep))
    check_op(module._reattend_stored_fwd, (kept, v, lengths, resoftmax))
    check_op(module._reattend_fwd, (q, k, v, lse, lengths, resoftmax))
    check_op(module._reattend_fused_fwd, (q, k, x, weight, bias, lse, None, resoftmax))
    check_op(module._attention_bwd, (out, q, k, v, out, lse, norm, lengths, None, 0.0, resoftmax))


@pytest.mark.needs_triton
@pytest.mark.parametrize("mode", MODES)
def test_stored_map_compiles_whole(mode, monkeypatch):
    monkeypatch.setattr(module, "store_map", lambda q, layers: True)
    torch._dynamo.reset()

    def pair(q, k, v, x, weight, lengths):
        out, kept = attend(q, k, v, lengths)
        return out + reattend(kept, x, weight, mode=mode)

    compiled = torch.compile(pair, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (7, 13):
        q, k, v = (draw(2, T, 2, 16, dtype=torch.float32, seed=s) for s in range(3))
        x, weight = draw(2, T, 8, dtype=torch.float32), draw(32, 8, dtype=torch.float32)
        lengths = torch.tensor([T, T - 2], device=DEVICE)
        shown = valid_frames(lengths, T)
        got, want = (f(q, k, v, x, weight, lengths) for f in (compiled, pair))
        torch.testing.assert_close(got * shown, want * shown)


@pytest.mark.needs_triton
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside", [True, False])
def test_op_compiles_whole(inside, mode, monkeypatch):
    """Forward and backward in one graph with dynamic shapes."""
    monkeypatch.setattr(module, "project_inside", lambda q: inside)
    torch._dynamo.reset()

    def pair(q, k, v, x, weight, lengths):
        out, kept = attend(q, k, v, lengths)
        return (out + reattend(kept, x, weight, mode=mode)).sum()

    compiled = torch.compile(pair, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (7, 13):
        inputs = [draw(2, T, 2, 16, dtype=torch.float32, seed=s).requires_grad_() for s in range(3)]
        inputs += [
            draw(2, T, 8, dtype=torch.float32).requires_grad_(),
            draw(32, 8, dtype=torch.float32).requires_grad_(),
        ]
        lengths = torch.full((2,), T, device=DEVICE)
        got, want = compiled(*inputs, lengths), pair(*inputs, lengths)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def test_inference_and_checkpointing(impl):
    q, x, weight = (draw(*s, dtype=torch.float32) for s in ((1, 9, 2, 16), (1, 9, 8), (32, 8)))

    def pair(q, x):
        out, kept = attend(q, q, q, dropout=0.3, impl=impl)
        return out + reattend(kept, x, weight, impl=impl)

    with torch.inference_mode():
        assert torch.isfinite(pair(q, x)).all()
    q.requires_grad_()
    grads = []
    for run in (pair, lambda *a: torch.utils.checkpoint.checkpoint(pair, *a, use_reentrant=False)):
        torch.manual_seed(5)
        grads += torch.autograd.grad(run(q, x).sum(), q)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_are_refused(mode):
    q, x = draw(1, 9, 2, 4, dtype=torch.float32).requires_grad_(), draw(1, 9, 8, dtype=torch.float32).requires_grad_()
    kept = attend(q, q, q, dropout=0.1, seed=0)[1]
    out = reattend(kept, x, draw(8, 8, dtype=torch.float32), mode=mode)
    for inputs, computed in (((q, x), out), ((q,), attend(q, q, q, dropout=0.1, seed=0)[0])):
        gradients = torch.autograd.grad(computed.square().sum(), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match=r"no second derivatives|is not implemented"):
            torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)


def test_neighbouring_seeds_share_no_dropout_factors():
    q = draw(1, 31, 2, 8, dtype=torch.float32).expand(4, -1, -1, -1)
    outs = [attend(q, q, q, dropout=0.5, seed=seed)[0] for seed in range(4)]
    rows = torch.cat(outs).flatten(1)
    assert (torch.cdist(rows, rows) + torch.eye(16, device=DEVICE) > 1e-3).all()


def test_the_precision_of_products_follows_pytorch():
    """By the old and by the new name of the setting, of which PyTorch lets nobody read the old once the new is set."""
    script = (
        "import torch; from armhubert.kernels import runtime; m = torch.backends.cuda.matmul\n"
        "p = lambda: runtime.product_precision(torch.float32) + '-' + runtime.product_precision(torch.bfloat16)\n"
        "seen = [p()]; m.allow_tf32 = True; seen += [p()]; m.allow_tf32 = False; seen += [p()]\n"
        "m.fp32_precision = 'tf32'; seen += [p()]; m.fp32_precision = 'ieee'; seen += [p()]; print(*seen)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["ieee-ieee", "tf32-ieee", "ieee-ieee", "tf32-ieee", "ieee-ieee"]


def test_autocast_of_the_twin():
    q, x, weight = (draw(*s, dtype=torch.float32) for s in ((1, 9, 2, 16), (1, 9, 8), (32, 8)))
    weight.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, kept = attend(q, q, q, impl="torch")
        for mode in MODES:
            reused = reattend(kept, x, weight, mode=mode, impl="torch")
            assert out.dtype == reused.dtype == kept.queries.dtype == torch.bfloat16
            (d_weight,) = torch.autograd.grad(reused.sum(), weight, retain_graph=True)
            assert d_weight.dtype == torch.float32


@pytest.mark.needs_triton
def test_autocast():
    q, x, weight = (draw(*s, dtype=torch.float32) for s in ((1, 9, 2, 16), (1, 9, 8), (32, 8)))
    with torch.autocast(DEVICE, dtype=torch.float16):
        out, kept = attend(q, q, q, impl="triton")
        reused = reattend(kept, x, weight, impl="triton")
    assert out.dtype == reused.dtype == torch.float16
    torch.testing.assert_close(
        reused.float(), reattend(attend(q, q, q)[1], x, weight, impl="triton"), rtol=0.02, atol=0.02
    )


# ---- bad input --------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gradients", [False, True])
def test_values_can_be_given_instead_of_a_projection(impl, mode, gradients):
    q, values = draw(2, 20, 2, 8, dtype=torch.float32), draw(2, 20, 16, dtype=torch.float32, seed=1)
    q, values = q.requires_grad_(gradients), values.requires_grad_(gradients)
    one = torch.eye(16, device=DEVICE)
    kept = attend(q, q, q, ragged(2, 20), reusing_layers=9, impl=impl)[1]
    results = [reattend(kept, values, *weight, mode=mode, impl=impl) for weight in ((), (one,))]
    if gradients:
        results = [torch.autograd.grad(r.square().sum(), [q, values], retain_graph=True) for r in results]
    torch.testing.assert_close(*results)


def test_bad_input_is_told_before_any_launch():
    q = draw(2, 5, 2, 8, dtype=torch.float32)
    x, weight = draw(2, 5, 6, dtype=torch.float32), draw(16, 6, dtype=torch.float32)
    kept = attend(q, q, q)[1]
    for match, call in {
        r"q must be a tensor, got \[\[": lambda: attend(q.tolist(), q, q),
        "v must be a tensor, got None": lambda: attend(q, q, None),
        "share one shape": lambda: attend(q, q[:, :4], q),
        "one floating dtype": lambda: attend(q, q.double(), q),
        r"dropout must be in \[0, 1\)": lambda: attend(q, q, q, dropout=1.0),
        "lengths must be int32 or int64": lambda: attend(q, q, q, torch.tensor([torch.nan, 1.0], device=DEVICE)),
        "int64": lambda: attend(q, q, q, torch.tensor([5], device=DEVICE)),
        r"lengths must be a tensor or None, got \[5, 3\]": lambda: attend(q, q, q, [5, 3]),
        "impl must be": lambda: attend(q, q, q, impl="cuda"),
        "seed must be": lambda: attend(q, q, q, dropout=0.5, seed=torch.zeros(2, device=DEVICE), impl="torch"),
        r"seed must be an int or one int64 on .*, got 0\.5": lambda: attend(q, q, q, dropout=0.5, seed=0.5),
        "attention_map must be the AttentionMap of attend, got a tuple": lambda: reattend(attend(q, q, q), x, weight),
        "x must be a tensor": lambda: reattend(kept, x.tolist(), weight),
        "weight must be a tensor or None": lambda: reattend(kept, x, weight.tolist()),
        "bias must be a tensor or None": lambda: reattend(kept, x, weight, 0.0),
        "x must be": lambda: reattend(kept, x[:1], weight),
        "weight must be": lambda: reattend(kept, x, weight[:8]),
        "without weight, x must be": lambda: reattend(kept, x),
        "and bias None": lambda: reattend(kept, q.flatten(2), bias=weight[:, 0]),
        "bias must be": lambda: reattend(kept, x, weight, x[0, 0]),
        "map's dtype": lambda: reattend(kept, x.double(), weight),
        "mode must be": lambda: reattend(kept, x, weight, mode="softmax"),
        "log_sum_exp": lambda: reattend(AttentionMap(q, q, None, None), x, weight, impl="triton"),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.skipif(DEVICE == "cuda", reason="lengths on a GPU are not read")
def test_lengths_must_fit():
    q = draw(2, 5, 2, 8)
    for bad in ([6, 1], [0, 5]):
        with pytest.raises(ValueError, match=r"within 1\.\.5"):
            attend(q, q, q, torch.tensor(bad))


@pytest.mark.needs_triton
def test_what_triton_does_not_take():
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        attend(*[draw(1, 3, 1, 8)] * 3, impl="triton")
    with pytest.raises(ValueError, match="head width"):
        attend(*[draw(1, 3, 1, 130, dtype=torch.float32)] * 3, impl="triton")
    assert attend(*[draw(1, 3, 1, 130, dtype=torch.float32)] * 3)[1].log_sum_exp is None


@pytest.mark.skipif(INTERPRET or DEVICE == "cuda", reason="plain CPU only")
def test_explicit_triton_does_not_fall_back():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        attend(*[draw(1, 3, 1, 8, dtype=torch.float32)] * 3, impl="triton")
