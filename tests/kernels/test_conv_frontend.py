import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import DEVICE, DTYPES, INTERPRET, assert_no_worse_than_torch, check_op
from torch import Tensor

from armhubert.kernels import Convolution, Norm, conv_frontend, window_moments
from armhubert.kernels import torch_conv_frontend as twin
from armhubert.kernels.conv_frontend import padded_counts
from armhubert.kernels.runtime import frame_counts

module = importlib.import_module("armhubert.kernels.conv_frontend")  # its function has taken its name in the package

STUDENT = ((24, 10, 5), (40, 1, 1), (40, 3, 2), (36, 3, 2), (48, 1, 1), (48, 2, 2))
TEACHER = ((40, 10, 5), (40, 3, 2), (40, 3, 2), (40, 2, 2))
# name: layers, norm, biases
STACKS = {
    "student": (STUDENT, "channel", False),
    "teacher": (TEACHER, "channel", False),
    "large teacher": (TEACHER, "layer", True),
    "one layer": (STUDENT[:1], "channel", False),
    "no norm": (((7, 4, 3), (9, 5, 2), (5, 1, 3), (6, 2, 3)), None, True),
    "1x1 with bias": (((24, 10, 5), (130, 1, 1), (20, 2, 2)), "channel", True),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(stack, dtype=torch.float64):
    """-> layers, channel norm, leaves."""
    spec, kind, biased = stack
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        leaves.append(t.to(DEVICE, dtype).requires_grad_())
        return leaves[-1]

    def norm(channels: int, seed: int) -> Norm:
        return Norm(leaf(1 + 0.2 * draw(channels, seed=seed)), leaf(0.2 * draw(channels, seed=seed + 1)))

    layers, inputs = [], 1
    for i, (channels, kernel, stride) in enumerate(spec):
        weight = leaf(draw(channels, inputs, kernel, seed=10 * i) * (2 / (inputs * kernel)) ** 0.5)
        bias = leaf(0.1 * draw(channels, seed=10 * i + 1)) if biased and not (i == 0 and kind == "channel") else None
        layers.append(Convolution(weight, stride, bias, norm(channels, 10 * i + 2) if kind == "layer" else None))
        inputs = channels
    return layers, norm(spec[0][0], 5) if kind == "channel" else None, leaves


def count(samples, layers):
    return frame_counts(samples, [x.weight.shape[2] for x in layers], [x.stride for x in layers])[-1]


def valid_rows(out: Tensor, layers, lengths: Tensor | None) -> Tensor:
    T = out.shape[1]
    frames = torch.full((len(out),), T) if lengths is None else count(lengths, layers)
    return (torch.arange(T, device=out.device) < frames.to(out.device)[:, None])[..., None]


def outputs_and_gradients(impl, dtype, stack, B=2, S=700, ragged=True, gradient_of_x=True):
    layers, channel_norm, leaves = build(stack, dtype)
    x = (0.1 * draw(B, S, seed=S) + 0.3).to(DEVICE, dtype).requires_grad_(gradient_of_x)
    shortest = next(n for n in range(1, S + 1) if all(c > 0 for c in counts(n, layers)))
    lengths = torch.tensor([max(shortest, S - 90 * b) for b in range(B)], device=DEVICE) if ragged else None
    out = conv_frontend(x, layers, channel_norm=channel_norm, lengths=lengths, impl=impl)
    shown = valid_rows(out, layers, lengths)
    g = draw(*out.shape, seed=1).to(DEVICE, dtype) * shown
    return out * shown, *torch.autograd.grad(out, [*leaves, x] if gradient_of_x else leaves, g)


def counts(samples, layers):
    return frame_counts(samples, [x.weight.shape[2] for x in layers], [x.stride for x in layers])


def compare(dtype, stack, **shape):
    got = outputs_and_gradients("triton", dtype, stack, **shape)
    low = outputs_and_gradients("torch", dtype, stack, **shape)
    high = outputs_and_gradients("torch", torch.float64, stack, **shape)
    for index, (a, b, c) in enumerate(zip(got, low, high, strict=True)):
        assert_no_worse_than_torch(f"result {index}", a, b, c)


def plain(x, layers, channel_norm):
    """The released way, one utterance's own samples only."""
    y = x[:, None]
    for i, (weight, stride, bias, norm) in enumerate(layers):
        y = F.conv1d(y, weight, bias, stride)
        if channel_norm is not None and i == 0:
            y = F.group_norm(y, y.shape[1], *channel_norm)
        if norm is not None:
            y = F.layer_norm(y.transpose(1, 2), y.shape[1:2], *norm).transpose(1, 2)
        y = F.gelu(y)
    return y.transpose(1, 2)


# ---- the twin ---------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3000, 2**23])
@pytest.mark.parametrize("name", STACKS)
def test_the_formula(name, chunk, monkeypatch):
    """An utterance alone and in a padded batch, with garbage behind it, is what its own convolutions and norms give."""
    monkeypatch.setattr(twin, "CHUNK", chunk)
    monkeypatch.setattr(twin, "ROWS", 5)
    layers, channel_norm, leaves = build(STACKS[name])
    x, lengths = 0.1 * draw(3, 620).to(DEVICE) + 0.3, [620, 515, 475]
    for row, length in zip(x, lengths, strict=True):
        row[length:] = 1e3
    out = conv_frontend(
        x, layers, channel_norm=channel_norm, lengths=torch.tensor(lengths, device=DEVICE), impl="torch"
    )
    assert torch.isfinite(out).all()
    got, want = [], []
    for b, length in enumerate(lengths):
        want.append(plain(x[b : b + 1, :length], layers, channel_norm))
        got.append(out[b : b + 1, : want[-1].shape[1]])
        torch.testing.assert_close(got[-1], want[-1])
    g = [draw(*t.shape).to(DEVICE) for t in want]
    for a, b in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, leaves, g), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["student", "large teacher", "no norm"])
def test_twin_gradients(name, monkeypatch):
    monkeypatch.setattr(twin, "CHUNK", 200)
    monkeypatch.setattr(twin, "ROWS", 2)
    spec = {"student": ((3, 10, 5), (4, 1, 1), (3, 3, 2), (4, 2, 2))}.get(name, ((2, 4, 3), (3, 3, 2), (2, 2, 2)))
    layers, channel_norm, leaves = build((spec, STACKS[name][1], STACKS[name][2]))
    lengths = torch.tensor([110, 83], device=DEVICE)

    def frontend(x, *_):
        out = conv_frontend(x, layers, channel_norm=channel_norm, lengths=lengths, impl="torch")
        return out * valid_rows(out, layers, lengths)

    assert torch.autograd.gradcheck(frontend, (draw(2, 110).to(DEVICE).requires_grad_(), *leaves))


@pytest.mark.parametrize(("amplitude", "offset", "samples"), [(1, 0, 900), (1e-4, 0, 900), (0.1, 0.5, 900), (1, 0, 10)])
def test_closed_form_of_the_norm(amplitude, offset, samples):
    """float32 against the norm of the convolution in float64: quiet speech, an offset, a single frame."""
    layers, norm, leaves = build((((8, 10, 5),), "channel", False), torch.float32)
    x = (amplitude * draw(2, samples) + offset).to(DEVICE, torch.float32)
    got = conv_frontend(x, layers, channel_norm=norm, impl="torch")
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    want = plain(x.double(), [Convolution(doubles[0], 5)], Norm(*doubles[1:]))
    assert (got - want).abs().max() < 1e-5
    g = draw(*want.shape).to(DEVICE)
    for a, b in zip(torch.autograd.grad(got, leaves, g.float()), torch.autograd.grad(want, doubles, g), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1))


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def test_moments_add_up_and_stream(impl):
    """Chunks of a recording, given the whole recording's moments, have the recording's frames."""
    layers, norm, _ = build(STACKS["student"], torch.float32)
    x = (0.1 * draw(2, 1500) + 0.2).to(DEVICE, torch.float32)
    whole = window_moments(x, 10, 5, impl=impl)
    parts = [window_moments(part, 10, 5, impl=impl) for part in (x[:, :505], x[:, 500:1300], x[:, 1295:])]
    total = parts[0].plus(parts[1]).plus(parts[2])
    for a, b in zip(whole, total, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    windows = x.double().unfold(-1, 10, 5)
    mean, covariance = whole.statistics()
    torch.testing.assert_close(mean, windows.mean(1))
    torch.testing.assert_close(covariance[1], windows[1].t().cov(correction=0))
    with torch.no_grad():
        want = conv_frontend(x, layers, channel_norm=norm, impl=impl)
        T, hop = want.shape[1], 5 * 2 * 2 * 2
        reach = next(n for n in range(1, 1500) if counts(n, layers)[-1] == 1)
        for first, last in ((0, 9), (9, 20), (20, T)):
            part = x[:, first * hop : (last - 1) * hop + reach]
            got = conv_frontend(part, layers, channel_norm=norm, moments=total, impl=impl)
            torch.testing.assert_close(got, want[:, first:last], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def test_moments_of_valid_windows(impl):
    x = draw(3, 60).to(DEVICE, torch.float32)
    lengths = torch.tensor([60, 31, 8], device=DEVICE)
    got = window_moments(x, 10, 5, lengths, impl=impl)
    alone = window_moments(x[1:2, :31], 10, 5, impl=impl)
    assert got.windows.tolist() == [11, 5, 0]
    for a, b in zip(got, alone, strict=True):
        torch.testing.assert_close(a[1:2], b)
    assert not got.outer[2].any()


def test_rows_of_the_buffers():
    for strides in ([5, 1, 2, 2, 1, 2], [5, 2, 3, 1]):
        for last in range(1, 40):
            T = [last]
            for stride in reversed(strides[1:]):
                T.append(stride * (T[-1] - 1) + 3)
            T = T[::-1]
            P = padded_counts(T, strides)
            assert all(p >= t for p, t in zip(P, T, strict=True))
            assert all(a == b * s for a, b, s in zip(P[:-1], P[1:], strides[1:], strict=True))
            assert P[-1] <= last + 3


# ---- Triton against float64 -------------------------------------------------


@pytest.mark.needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_matches(name, dtype):
    compare(dtype, STACKS[name])


@pytest.mark.needs_triton
@pytest.mark.parametrize("frames", [1, 7, 63, 129])
def test_lengths(frames):
    layers, _, _ = build(STACKS["student"])
    S = next(n for n in range(1, 10**5) if counts(n, layers)[-1] == frames)
    for extra in (0, 39):
        stack = STACKS["student"] if extra else STACKS["teacher"]
        compare(torch.float32, stack, B=1 if frames > 100 else 3, S=S + 80 + extra, gradient_of_x=False)


@pytest.mark.needs_triton
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    layers=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4),
    norm=st.sampled_from(["channel", "layer", None]),
    bias=st.booleans(),
    B=st.integers(1, 3),
    spare=st.integers(0, 60),
)
def test_any_shape(layers, norm, bias, B, spare):
    layers = [(max(c, 2), k, s) for c, k, s in layers]  # LayerNorm of one channel is its bias
    S = 1
    for _, kernel, stride in reversed(layers):
        S = (S - 1) * stride + kernel
    compare(torch.float32, (layers, norm, bias), B=B, S=S + 100 + spare, ragged=B > 1)


@pytest.mark.needs_triton
def test_strides_and_dtypes():
    """Waveforms as columns of something, in another dtype than the weights; weights as views."""
    layers, norm, _ = build(STACKS["student"], torch.float32)
    x = draw(500, 3).to(DEVICE, torch.float32)
    want = conv_frontend(x.t().contiguous(), layers, channel_norm=norm, impl="triton")
    views = [layer._replace(weight=layer.weight.transpose(0, 2).contiguous().transpose(0, 2)) for layer in layers]
    assert torch.equal(conv_frontend(x.t(), views, channel_norm=norm, impl="triton"), want)
    torch.testing.assert_close(conv_frontend(x.t().double(), layers, channel_norm=norm, impl="triton"), want)


@pytest.mark.needs_triton
def test_reruns_are_bitwise_equal():
    first, second = (outputs_and_gradients("triton", torch.float32, STACKS["student"], S=900) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- the ops in PyTorch's machinery -----------------------------------------


def op_arguments(name):
    (first, *rest), _, _ = build((STACKS[name][0][:3], *STACKS[name][1:]), torch.float32)
    B, C, K = 2, *first.weight.shape[::2]
    x = draw(B, 500).to(DEVICE, torch.float32)
    shift, b0 = draw(B, K).to(DEVICE, torch.float32), draw(B, C).to(DEVICE, torch.float32)
    groups = [x.weight.detach() for x in rest], [x.bias.detach() for x in rest if x.bias is not None]
    norms = [t.detach() for layer in (first, *rest) if layer.norm for t in layer.norm[:2]]
    strides = [first.stride, *(x.stride for x in rest)]
    return (x, shift, first.weight.detach()[:, 0].expand(B, C, K), b0, *groups, norms), strides


@pytest.mark.parametrize("name", ["student", "large teacher"])
@pytest.mark.needs_triton
def test_opcheck(name):
    stack, strides = op_arguments(name)
    for keep in (False, True):
        check_op(module._forward, (*stack, strides, 1e-5, keep))
    out, kept = module._forward(*stack, strides, 1e-5, True)
    for need_x in (False, True):
        check_op(module._backward, (out, *stack, kept, strides, 1e-5, need_x))
    check_op(module._sums, (stack[0], 10, 5, torch.tensor([90, 3], device=DEVICE)))


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
@pytest.mark.parametrize("name", ["student", "large teacher"])
def test_compiles_whole(name, impl):
    """Forward and backward in one graph with dynamic shapes: op and traceable twin alike."""
    torch._dynamo.reset()
    layers, norm, leaves = build((STACKS[name][0][:3], *STACKS[name][1:]), torch.float32)

    def frontend(x, lengths):
        return conv_frontend(x, layers, channel_norm=norm, lengths=lengths, impl=impl)

    compiled = torch.compile(frontend, fullgraph=True, dynamic=True, backend="aot_eager")
    for S in (300, 377):
        x = draw(2, S).to(DEVICE, torch.float32).requires_grad_()
        lengths = torch.tensor([S, S - 60], device=DEVICE)
        got, want = compiled(x, lengths), frontend(x, lengths)
        shown = valid_rows(want, layers, lengths)
        torch.testing.assert_close(got * shown, want * shown, rtol=1e-4, atol=1e-5)
        grads = (torch.autograd.grad((out * shown).square().sum(), [x, *leaves]) for out in (got, want))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(INTERPRET, reason="the PyTorch part alone")
def test_what_rounding_leaves_of_the_mean_survives_inductor():
    """The shift is rounded to float32, and the bias makes up for it."""
    layers, norm, _ = build(STACKS["one layer"], torch.float32)
    weight, x = layers[0].weight.detach(), 1000 + draw(2, 300).to(DEVICE)
    norm = Norm(norm.weight.detach(), norm.bias.detach())

    def fold(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return module._fold(weight, norm, window_moments(x, 10, 5, impl="torch"))

    shift, folded, bias = torch.compile(fold, fullgraph=True)(weight, x)
    assert torch.equal(shift, shift.float().double())
    for got, want in zip((shift, folded, bias), fold(weight, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_exports():
    layers, norm, leaves = build(STACKS["student"], torch.float32)
    for leaf in leaves:
        leaf.requires_grad_(False)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return conv_frontend(x, layers, channel_norm=norm, lengths=lengths, impl="torch")

    x, lengths = draw(2, 600).to(DEVICE, torch.float32), torch.tensor([600, 500], device=DEVICE)
    shapes = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "lengths": {0: torch.export.Dim.AUTO}}
    with torch.no_grad():
        exported = torch.export.export(Module(), (x, lengths), dynamic_shapes=shapes).module()
        x, lengths = draw(3, 811).to(DEVICE, torch.float32), torch.tensor([811, 700, 640], device=DEVICE)
        want = Module()(x, lengths)
        shown = valid_rows(want, layers, lengths)
        torch.testing.assert_close(exported(x, lengths) * shown, want * shown, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def test_inference_and_checkpointing(impl):
    layers, norm, leaves = build(STACKS["student"], torch.float32)
    x = draw(2, 500).to(DEVICE, torch.float32)

    def run(x):
        return conv_frontend(x, layers, channel_norm=norm, impl=impl)

    want = run(x)
    with torch.inference_mode():
        torch.testing.assert_close(run(x), want.detach())
    with torch.no_grad():
        assert run(x).grad_fn is None
    again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (want, again)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
@pytest.mark.parametrize("name", ["student", "large teacher"])
def test_autocast(name, impl):
    low = torch.float16 if impl == "triton" else torch.bfloat16
    layers, norm, leaves = build(STACKS[name], torch.float32)
    x = draw(2, 500).to(DEVICE, torch.float32)
    want = conv_frontend(x, layers, channel_norm=norm, impl=impl)
    with torch.autocast(DEVICE, dtype=low):
        got = conv_frontend(x, layers, channel_norm=norm, impl=impl)
    assert got.dtype == low
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(got.sum(), leaves))


def test_the_twin_keeps_one_map_a_layer():
    """What backward needs is z_1 .. z_{L-1}; activations and the widest map are made again."""
    saved: list[int] = []
    layers, norm, _ = build(STACKS["student"], torch.float32)
    x = draw(1, 5000).to(DEVICE, torch.float32)
    inputs = {t.untyped_storage().data_ptr() for t in (x, *(layer.weight for layer in layers))}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in inputs:
            saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        conv_frontend(x, layers, channel_norm=norm, impl="torch")
    maps = sum(T * layer.weight.shape[0] for T, layer in list(zip(counts(5000, layers), layers, strict=True))[1:])
    assert maps <= sum(saved) < 1.1 * maps


# ---- bad input --------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_second_derivatives_are_refused(name, frozen):
    """Not left out, where the waveform's gradient also comes through the norm's statistics."""
    layers, norm, leaves = build(STACKS[name], torch.float64)
    for leaf in leaves:
        leaf.requires_grad_(not frozen)
    x = draw(1, 500).to(DEVICE).requires_grad_()
    out = conv_frontend(x, layers, channel_norm=norm)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(gradient.square().sum(), x)


def test_a_constant_far_from_zero_leaves_no_negative_variance():
    layers, norm, _ = build(STACKS["student"], torch.float32)
    x = 1e6 + 0.03 * draw(4, 500).to(DEVICE, torch.float32)
    assert conv_frontend(x, layers, channel_norm=norm).isfinite().all()


def test_moments_by_triton_have_no_gradients_and_say_so(monkeypatch):
    monkeypatch.setattr(module, "resolve_impl", lambda impl, x: "triton" if impl == "triton" else "torch")
    x = draw(1, 500).to(DEVICE).requires_grad_()
    with pytest.raises(ValueError, match="impl='triton' has no gradients of waveforms' moments"):
        window_moments(x, 10, 5, impl="triton")
    assert window_moments(x, 10, 5).sum.requires_grad


def test_bad_input_is_told_before_any_launch():
    layers, norm, _ = build(STACKS["student"], torch.float32)
    large, _, _ = build(STACKS["large teacher"], torch.float32)
    first = layers[0]
    x = draw(2, 500).to(DEVICE, torch.float32)
    moments = window_moments(x, 10, 5)
    lengths = torch.tensor([500, 400], device=DEVICE)
    for match, call in {
        r"waveforms must be a tensor, got \[": lambda: conv_frontend(x.tolist(), layers),
        r"layers\[0\]: weight must be a tensor, got None": lambda: conv_frontend(x, [first._replace(weight=None)]),
        r"layers\[0\]: bias must be a tensor": lambda: conv_frontend(x, [first._replace(bias=[0.0] * 24)]),
        "channel_norm.weight must be a tensor": lambda: conv_frontend(x, [first], channel_norm=Norm(1.0, 0.0)),
        "moments must be the Moments of": lambda: conv_frontend(x, layers, channel_norm=norm, moments=tuple(moments)),
        r"waveforms must be a tensor, got \(": lambda: window_moments(tuple(x), 10, 5),
        "lengths must be a tensor or None": lambda: window_moments(x, 10, 5, [500, 400]),
        r"floating point \[B, S\]": lambda: conv_frontend(x[0], layers),
        "at least one Convolution": lambda: conv_frontend(x, []),
        r"layers\[0\] must have weight": lambda: conv_frontend(x, layers[1:]),
        "stride of 1 or more": lambda: conv_frontend(x, [first._replace(stride=0)]),
        r"bias must be \[24\]": lambda: conv_frontend(x, [first._replace(bias=x[0])]),
        "channel_norm.weight must be": lambda: conv_frontend(x, [first], channel_norm=Norm(x[0], x[0])),
        "pad them": lambda: conv_frontend(x[:, :40], layers),
        "or none may": lambda: conv_frontend(x, [large[0], layers[2]._replace(weight=large[1].weight)]),
        "exclude each other": lambda: conv_frontend(x, large[:1], channel_norm=Norm(*large[0].norm)),
        "share one eps": lambda: conv_frontend(x, [large[0], large[1]._replace(norm=large[1].norm._replace(eps=1e-3))]),
        "one floating dtype": lambda: conv_frontend(x, [first, layers[1]._replace(weight=layers[1].weight.double())]),
        "moments need a channel_norm": lambda: conv_frontend(x, layers, moments=moments),
        "got both": lambda: conv_frontend(x, layers, channel_norm=norm, lengths=lengths, moments=moments),
        "int32 or int64": lambda: conv_frontend(x, layers, channel_norm=norm, lengths=lengths.float()),
        "impl must be": lambda: conv_frontend(x, layers, impl="cuda"),
        "a window fit the waveform": lambda: window_moments(x[:, :4], 10, 5),
        r"lengths must be int32 or int64 \[2\]": lambda: window_moments(x, 10, 5, lengths[:1]),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.skipif(DEVICE == "cuda", reason="lengths on a GPU are not read")
def test_lengths_must_fit():
    layers, norm, _ = build(STACKS["one layer"], torch.float32)
    for bad in ([501, 400], [500, 9]):
        with pytest.raises(ValueError, match=r"within 10\.\.500 samples"):
            conv_frontend(draw(2, 500).float(), layers, channel_norm=norm, lengths=torch.tensor(bad))


@pytest.mark.skipif(INTERPRET or DEVICE == "cuda", reason="plain CPU only")
def test_explicit_triton_does_not_fall_back():
    layers, norm, _ = build(STACKS["one layer"], torch.float32)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        conv_frontend(draw(1, 50).float(), layers, channel_norm=norm, impl="triton")
