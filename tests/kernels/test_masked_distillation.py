import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import DEVICE, DTYPES, INTERPRET, assert_no_worse_than_torch, check_op

from armhubert.kernels import distillation_loss
from armhubert.kernels import masked_distillation as module

DISTANCES = ["mse", "l1"]


def inputs(L, B, T, D, Dt, dtype=torch.float64):
    generator = torch.Generator().manual_seed(L + B * T)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    hidden = [draw(B, T, D).requires_grad_() for _ in range(L)]
    weight, bias = (draw(L, Dt, D) / D**0.5).requires_grad_(), draw(L, Dt).requires_grad_()
    mask = (torch.rand(B, T, generator=generator) < 0.5).to(DEVICE)
    lengths = torch.tensor([max(1, T - 4 * b) for b in range(B)], device=DEVICE)
    return hidden, weight, bias, draw(L, B, T, Dt), draw(L, B, T, Dt), mask, lengths


def loss_and_gradients(impl, dtype, distance, *shape, views=2):
    hidden, weight, bias, clean, masked, mask, lengths = inputs(*shape, dtype=dtype)
    loss = distillation_loss(
        hidden, weight, bias, clean, masked if views == 2 else None, mask, lengths, distance=distance, impl=impl
    )
    per_layer = torch.linspace(0.1, 1, shape[0], device=DEVICE) / lengths.sum()
    return loss, *torch.autograd.grad((loss * per_layer).sum(), [weight, bias, *hidden])


def compare(dtype, distance, *shape, views=2):
    got, low, high = (
        loss_and_gradients(impl, kind, distance, *shape, views=views)
        for impl, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.float64))
    )
    for index, (a, b, c) in enumerate(zip(got, low, high, strict=True)):
        assert_no_worse_than_torch(f"result {index}", a, b, c)


def test_the_formula():
    hidden, weight, bias, clean, masked, mask, lengths = inputs(2, 2, 7, 5, 3)
    want = []
    for layer in range(2):
        total = 0.0
        for b in range(2):
            for t in range(int(lengths[b])):
                target = (clean if mask[b, t] else masked)[layer, b, t]
                total += (weight[layer] @ hidden[layer][b, t] + bias[layer] - target).square().mean()
        want.append(total)
    got = distillation_loss(hidden, weight, bias, clean, masked, mask, lengths, impl="torch")
    torch.testing.assert_close(got, torch.stack(want))
    stacked = distillation_loss(torch.stack(hidden), weight, bias, clean.unbind(), masked, mask, lengths, impl="torch")
    torch.testing.assert_close(stacked, got)


@pytest.mark.parametrize("distance", DISTANCES)
def test_twin_gradients(distance):
    hidden, weight, bias, clean, masked, mask, lengths = inputs(2, 2, 5, 4, 3)

    def loss(weight, bias, *hidden):
        return distillation_loss(hidden, weight, bias, clean, masked, mask, lengths, distance=distance, impl="torch")

    assert torch.autograd.gradcheck(loss, (weight, bias, *hidden))


@pytest.mark.needs_triton
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 8, 3), (3, 2, 63, 40, 72), (12, 2, 7, 36, 24), (1, 1, 129, 48, 130)], ids=str
)
def test_matches(shape, dtype, distance):
    compare(dtype, distance, *shape)


@pytest.mark.needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_prediction_of_a_large_target(dtype):
    """The kept residual, which gradients are made of, loses no digits of the prediction beside the target."""
    from armhubert.kernels import triton_masked_distillation as kernels

    def draw(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)

    hidden, target = draw(1, 1, 64, 480, seed=0), 5 * draw(1, 1, 64, 64, seed=1)
    weight, bias = draw(1, 64, 480, seed=2) * 0.02 / 480**0.5, draw(1, 64, seed=3) * 0.01
    _, got = kernels.forward([*hidden], weight, bias, [*target], None, None, None, False, True)
    linear = torch.nn.functional.linear
    low = linear(hidden[0], weight[0], bias[0]).float() - target[0].float()
    high = linear(hidden[0].double(), weight[0].double(), bias[0].double()) - target[0].double()
    assert_no_worse_than_torch("residual", got[0], low.to(dtype), high)


@pytest.mark.needs_triton
def test_clean_everywhere():
    compare(torch.float32, "mse", 2, 2, 9, 16, 12, views=1)


@pytest.mark.needs_triton
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 70), st.integers(1, 90), st.integers(1, 140))
def test_any_shape(L, B, T, D, Dt):
    compare(torch.float32, "mse", L, B, T, D, Dt)


@pytest.mark.needs_triton
def test_strides_and_dtypes_of_targets():
    hidden, weight, bias, clean, masked, mask, lengths = inputs(2, 2, 9, 16, 12, dtype=torch.float16)
    plain = distillation_loss(hidden, weight, bias, clean, masked, mask, lengths, impl="triton")
    strided = [h.transpose(0, 1).contiguous().transpose(0, 1) for h in hidden]
    wide = torch.cat([clean, clean], -1)[..., :12]
    other = distillation_loss(strided, weight, bias, wide.float(), masked.float(), mask, lengths, impl="triton")
    assert torch.equal(plain, other)


@pytest.mark.needs_triton
def test_strides_of_the_small_inputs():
    hidden, weight, bias, clean, masked, mask, _ = inputs(2, 3, 9, 16, 12, dtype=torch.float32)
    lengths, row = torch.tensor([5], device=DEVICE), bias[:1, :1]
    views = [lengths.expand(3), mask.t().contiguous().t(), row.expand(2, 12)]
    got, want = (
        distillation_loss(hidden, weight, b, clean, masked, m, n, impl="triton")
        for n, m, b in (views, [v.contiguous() for v in views])
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def test_only_the_needed_view_and_valid_frames_count(impl):
    hidden, weight, bias, clean, masked, mask, lengths = inputs(2, 2, 9, 16, 12, dtype=torch.float32)
    want = distillation_loss(hidden, weight, bias, clean, masked, mask, lengths, impl=impl)
    clean[:, ~mask], masked[:, mask] = torch.nan, torch.nan
    with torch.no_grad():
        hidden[0][1, int(lengths[1]) :] = 1e4
    assert torch.equal(distillation_loss(hidden, weight, bias, clean, masked, mask, lengths, impl=impl), want)


@pytest.mark.needs_triton
def test_reruns_are_bitwise_equal():
    first, second = (loss_and_gradients("triton", torch.float32, "mse", 2, 2, 40, 24, 36) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.needs_triton
def test_opcheck(distance):
    hidden, weight, bias, clean, masked, mask, lengths = inputs(2, 2, 7, 16, 12, dtype=torch.float32)
    h, w, b = [x.detach() for x in hidden], weight.detach(), bias.detach()
    l1 = distance == "l1"
    for keep in (False, True):
        views = (list(clean), list(masked), mask) if keep else (list(clean), None, None)
        check_op(module._forward, (h, w, b, *views, lengths, l1, keep))
    _, residuals = module._forward(h, w, b, list(clean), list(masked), mask, lengths, l1, True)
    check_op(module._backward, (torch.ones(2, device=DEVICE), residuals, h, w, l1))


@pytest.mark.needs_triton
def test_op_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(distillation_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (7, 13):
        hidden, weight, bias, *views = inputs(2, 2, T, 16, 12, dtype=torch.float32)
        got, want = (f(hidden, weight, bias, *views) for f in (compiled, distillation_loss))
        torch.testing.assert_close(got, want)
        leaves = [weight, bias, *hidden]
        grads = (torch.autograd.grad(loss.sum(), leaves) for loss in (got, want))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_in_16_bits_are_not_off_by_a_factor():
    """Rounding errors cancel over many numbers; a rounded factor of all of them would not."""
    hidden, weight, bias, *views = inputs(3, 2, 50, 64, 96, dtype=torch.float32)
    upstream = torch.tensor([0.3, 0.77, 1.9], device=DEVICE)

    def gradient(dtype):
        own = [h.detach().to(torch.bfloat16).to(dtype).requires_grad_() for h in hidden]
        rest = [t.detach().to(torch.bfloat16).to(dtype) for t in (weight, bias, *views[:2])]
        loss = distillation_loss(own, *rest, *views[2:], impl="torch")
        return torch.stack(torch.autograd.grad(loss @ upstream.to(loss.dtype), own)).double().flatten(1)

    got, want = gradient(torch.bfloat16), gradient(torch.float64)
    scale = (got * want).sum(1) / want.square().sum(1)
    assert (scale - 1).abs().max() < 3e-4  # a factor rounded to bfloat16 is off by up to 4e-3


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def test_autocast(impl):
    low = torch.float16 if impl == "triton" else torch.bfloat16
    hidden, weight, bias, *views = inputs(2, 2, 7, 16, 12, dtype=torch.float32)
    want = distillation_loss(hidden, weight, bias, *views, impl=impl)
    with torch.autocast(DEVICE, dtype=low):
        got = distillation_loss(hidden, weight, bias, *views, impl=impl)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.1)
    assert torch.autograd.grad(got.sum(), weight)[0].dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(distillation_loss(hidden, weight, bias, *views, impl=impl), want.detach())


@pytest.mark.parametrize(
    "run", [module.distillation_forward, pytest.param(module._forward, marks=pytest.mark.needs_triton)]
)
def test_forward_only_keeps_nothing(run):
    hidden, weight, bias, *views = inputs(2, 2, 7, 16, 12, dtype=torch.float32)
    with torch.no_grad():
        assert distillation_loss(hidden, weight, bias, *views).grad_fn is None
    _, residuals = run(
        [h.detach() for h in hidden], weight.detach(), bias.detach(), list(views[0]), None, None, None, False, False
    )
    assert residuals.numel() == 0


def test_bad_input_is_told_before_any_launch():
    hidden, weight, bias, clean, masked, mask, lengths = inputs(2, 2, 5, 6, 4, dtype=torch.float32)
    for match, arguments in {
        "weight must be a tensor": (hidden, weight.tolist(), bias, clean),
        r"hidden\[1\] must be a tensor, got None": ([hidden[0], None], weight, bias, clean),
        r"clean\[0\] must be a tensor": (hidden, weight, bias, clean.tolist()),
        "mask must be a tensor or None": (hidden, weight, bias, clean, masked, mask.tolist()),
        "lengths must be a tensor or None": (hidden, weight, bias, clean, masked, mask, lengths.tolist()),
        "no gradient": (hidden, weight, bias, clean.clone().requires_grad_(), masked, mask),
        "one \\[B, T, D\\] for each": (hidden[:1], weight, bias, clean),
        "clean and masked must share one dtype": (hidden, weight, bias, clean, masked.double(), mask),
        "clean must have 2 layers": (hidden, weight, bias, clean[:1]),
        "clean must have 2 layers, got 0": (hidden, weight, bias, [], masked, mask),
        "masked must have 2 layers, got 0": (hidden, weight, bias, clean, [], mask),
        "bias must be on": (hidden, weight, bias.detach().to("meta"), clean),
        r"clean\[0\] must be \[2, 5, 4\]": (hidden, weight, bias, clean[..., :3]),
        "masked needs mask": (hidden, weight, bias, clean, masked),
        "mask must be bool": (hidden, weight, bias, clean, masked, mask.float()),
        "lengths must be int": (hidden, weight, bias, clean, masked, mask, lengths.float()),
        "share one dtype": (hidden, weight.double(), bias, clean),
        "weight must be": (hidden, weight[0], bias, clean),
    }.items():
        with pytest.raises(ValueError, match=match):
            distillation_loss(*arguments)
    with pytest.raises(ValueError, match="distance must be"):
        distillation_loss(hidden, weight, bias, clean, distance="huber")


@pytest.mark.skipif(INTERPRET or DEVICE == "cuda", reason="plain CPU only")
def test_explicit_triton_does_not_fall_back():
    hidden, weight, bias, clean, *_ = inputs(1, 1, 3, 4, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        distillation_loss(hidden, weight, bias, clean, impl="triton")
