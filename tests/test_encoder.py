import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import remove_parametrizations

from armhubert import ARMHuBERT, ArmhubertError, SpeechEncoder
from armhubert.config import EncoderConfig
from armhubert.encoder import scale_gradient, similar_lengths

BASE = EncoderConfig(
    conv_layers=((16, 10, 5), (16, 3, 2), (24, 2, 2)),
    width=24,
    layers=4,
    heads=2,
    ffn=32,
    position_kernel=16,
    position_groups=4,
)
ARCHITECTURES = {
    "post-norm": {},
    "normalised input": {"normalize_input": True},
    "pre-norm, layer norm": {"norm_first": True, "conv_norm": "layer", "conv_bias": True, "feature_projection": True},
    "wavlm": {"position_buckets": 16, "position_max_distance": 40},
    "wavlm pre-norm": {"position_buckets": 16, "position_max_distance": 40, "norm_first": True, "conv_norm": "layer"},
    "reuse": {"pattern": "CRRC", "scale_layer_gradients": True},
    "resoftmax": {"pattern": "CRCR", "attention_mode": "resoftmax"},
    "odd kernel": {"position_kernel": 15, "conv_bias": True},
}


def model(name: str = "post-norm", cls: type[SpeechEncoder] = SpeechEncoder, **changes) -> SpeechEncoder:
    torch.manual_seed(0)
    built = cls(dataclasses.replace(BASE, **{**ARCHITECTURES[name], **changes})).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # away from the symmetric start, and peaky maps
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("padding", [0.0, 1e3])
@pytest.mark.parametrize("at_once", [False, True])
def test_features_do_not_depend_on_the_batch(name, padding, at_once):
    encoder = model(name)
    lengths = [3000, 1500, 40, 2111]
    waves = [torch.randn(n) for n in lengths]
    batch = torch.full((4, 3000), padding)
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = wave
    with torch.set_grad_enabled(at_once):  # without gradients a CPU works in groups
        together = encoder(batch, torch.tensor(lengths))
        for i, wave in enumerate(waves):
            alone = encoder(wave[None])
            assert together.lengths[i] == alone.lengths[0]
            n = int(alone.lengths[0])
            for a, b in zip(
                (*alone.hidden_states, alone.last_hidden_state),
                (*together.hidden_states, together.last_hidden_state),
                strict=True,
            ):
                torch.testing.assert_close(b[i, :n], a[0], atol=1e-4, rtol=0)


def test_groups_are_the_batch_at_once(monkeypatch):
    monkeypatch.setattr("armhubert.encoder.FRAMES_A_THREAD", 1000)
    encoder = model("reuse", cls=ARMHuBERT, projection_width=8)
    waves, lengths = torch.randn(5, 3000), torch.tensor([3000, 400, 2950, 390, 40])
    mask = torch.rand(5, encoder.config.frames(3000)) < 0.3
    shapes = []
    at_once = encoder._at_once
    monkeypatch.setattr(encoder, "_at_once", lambda w, *rest: (shapes.append(tuple(w.shape)), at_once(w, *rest))[1])
    with torch.inference_mode():
        grouped = encoder(waves, lengths, mask)
    assert shapes == [(2, 3000), (2, 400), (1, 40)]
    whole = encoder(waves, lengths, mask)
    assert shapes[3:] == [(5, 3000)]
    assert torch.equal(grouped.lengths, whole.lengths)
    for a, b in zip(
        (grouped.last_hidden_state, *grouped.hidden_states, *grouped.projections),
        (whole.last_hidden_state, *whole.hidden_states, *whole.projections),
        strict=True,
    ):
        assert a.shape == b.shape
        for row, n in enumerate(whole.lengths):
            torch.testing.assert_close(a[row, :n], b[row, :n].detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["post-norm", "pre-norm, layer norm"])
@pytest.mark.parametrize("lengths", [None, [3000, 2000, 40]])
@pytest.mark.parametrize("training", [False, True])
def test_every_module_is_called_with_the_whole_batch_where_hooks_wait(name, lengths, training):
    encoder = model(name)
    waves = torch.randn(3, 3000)
    valid = None if lengths is None else torch.tensor(lengths)
    seen: dict[str, list[int]] = {}

    def note(part):
        return lambda module, given, output: seen.setdefault(part, []).append(
            len(output[0] if isinstance(output, tuple) else output)
        )

    with torch.set_grad_enabled(training):
        expected = encoder(waves, valid)
        hooks = [module.register_forward_hook(note(part)) for part, module in encoder.named_modules() if part]
        hooked = encoder(waves, valid)
        for hook in hooks:
            hook.remove()
    uncalled = {part for part, _ in encoder.named_modules() if part} - seen.keys()
    assert {part for part in uncalled if "parametrizations" not in part} <= {
        "layers",
        "front_end.rest",
        "front_end.first.norm",
    }
    assert "front_end.first.norm" not in uncalled or lengths is not None  # its statistics leave padding out
    assert {size for part, sizes in seen.items() if "parametrizations" not in part for size in sizes} == {3}
    for row, frames in enumerate(expected.lengths.tolist()):
        torch.testing.assert_close(
            hooked.last_hidden_state[row, :frames], expected.last_hidden_state[row, :frames], atol=1e-4, rtol=1e-4
        )


def test_hooks_for_any_module_find_all_of_them():
    encoder, seen = model(), set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, output: seen.add(module))
    with torch.no_grad():
        encoder(torch.randn(2, 2000))
    hook.remove()
    missed = {part for part, module in encoder.named_modules() if module not in seen and "parametri" not in part}
    assert missed == {"layers", "front_end.rest"}


def test_pruned_and_replaced_convolutions_are_computed_as_they_are_now():
    encoder = model()
    waves = torch.randn(2, 2000)
    conv = encoder.front_end.rest[0].conv
    prune.l1_unstructured(conv, "weight", 0.3)
    for _ in range(2):  # the mask is applied anew in each pass
        encoder(waves).last_hidden_state.square().sum().backward()
    assert conv.weight_orig.grad[conv.weight_mask == 0].abs().max() == 0
    with torch.no_grad():
        before = encoder(waves).last_hidden_state
        conv.weight_orig.mul_(3)
        assert not torch.allclose(encoder(waves).last_hidden_state, before, atol=1e-3)
        prune.remove(conv, "weight")
        expected = encoder(waves).last_hidden_state

        class Twice(nn.Module):
            """Another's layer, without a convolution's attributes."""

            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return 2 * self.inner(x)

        encoder.front_end.rest[0].conv = Twice(conv)
        twice = encoder(waves).last_hidden_state
        conv.weight.mul_(2)
        encoder.front_end.rest[0].conv = conv
        torch.testing.assert_close(twice, encoder(waves).last_hidden_state, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(twice, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["post-norm", "pre-norm, layer norm", "normalised input"])
def test_what_padding_holds_reaches_no_gradient(name):
    encoder = model(name)
    waves, lengths = torch.randn(2, 2000), torch.tensor([2000, 900])
    gradients = []
    for padding in (0.0, float("nan")):
        waves[1, 900:] = padding
        output = encoder(waves, lengths)
        rows = [output.last_hidden_state[row, :n] for row, n in enumerate(output.lengths.tolist())]
        gradients.append(torch.autograd.grad(torch.cat(rows).square().sum(), [*encoder.front_end.parameters()]))
    for clean, other in zip(*gradients, strict=True):
        assert torch.equal(clean, other)


def test_a_replaced_convolution_is_called_for_batches_of_unequal_lengths_too():
    class Same(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    encoder = model()
    waves, lengths = torch.randn(3, 2000), torch.tensor([2000, 1500, 40])
    for training in (False, True):
        for place in ("front_end.first", "front_end.rest.1", "position"):
            with torch.set_grad_enabled(training):
                expected = encoder(waves, lengths)
                parent = encoder.get_submodule(place)
                original = parent.conv
                parent.conv = Same(original)
                got = encoder(waves, lengths)
                parent.conv = original
            for row, n in enumerate(expected.lengths.tolist()):
                torch.testing.assert_close(
                    got.last_hidden_state[row, :n], expected.last_hidden_state[row, :n], atol=1e-4, rtol=1e-4
                )


def test_convolutions_and_norms_of_another_kind_are_not_taken_for_ours():
    encoder, waves = model(), torch.randn(2, 2000)
    expected = encoder(waves).last_hidden_state
    encoder.front_end.first.norm = nn.GroupNorm(2, 16)
    assert not torch.allclose(encoder(waves).last_hidden_state, expected, atol=1e-3)
    with pytest.raises(ArmhubertError, match="a recording in chunks is computed from the weights"):
        encoder.front_end(waves, None, encoder.front_end.moments(waves))
    encoder = model()
    encoder.front_end.rest[0].conv.padding = (1,)
    assert encoder.front_end(waves, None).shape[1] != BASE.frames(2000)

    class Nothing(nn.Module):
        def forward(self, x, lengths):
            return torch.zeros_like(x)

    encoder.front_end.rest[1] = Nothing()
    assert not encoder.front_end(waves, None).any()


@pytest.mark.parametrize("padding", ["independent", "as_trained"])
def test_features_are_the_same_with_gradients_and_without_whatever_padding_holds(padding):
    encoder = model(padding=padding)
    waves, lengths = torch.randn(2, 2000), torch.tensor([2000, 900])
    with torch.no_grad():
        without = encoder(waves, lengths)
    output = encoder(waves, lengths)
    for row, n in enumerate(output.lengths.tolist()):
        torch.testing.assert_close(
            output.last_hidden_state[row, :n], without.last_hidden_state[row, :n], atol=1e-4, rtol=1e-4
        )


def test_a_model_cut_short_gives_the_layers_that_it_has():
    encoder = model("pre-norm, layer norm")
    encoder.layers = encoder.layers[:2]
    waves = torch.randn(2, 2000)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            assert len(encoder(waves).hidden_states) == 3


@pytest.mark.parametrize(
    ("frames", "most", "groups"),
    [
        ([10, 10, 10], 20, [[0, 1], [2]]),
        ([10, 30, 28, 9], 60, [[1, 2], [0, 3]]),
        ([500], 20, [[0]]),
        ([7, 500, 7], 20, [[1], [0, 2]]),
    ],
)
def test_groups_hold_similar_lengths(frames, most, groups):
    assert similar_lengths(frames, most) == groups


def change_in_place(position):
    with torch.no_grad():
        position.conv.parametrizations.weight.original1[0, 0, 0] += 1


def change_behind_data(position):
    position.conv.parametrizations.weight.original1.data.mul_(1.5)


def change_dtype(position):
    position.bfloat16().float()


def load_others(position):
    position.load_state_dict({k: v + 0.25 for k, v in position.state_dict().items()}, assign=True)


def fold(position):
    remove_parametrizations(position.conv, "weight")
    position.conv.weight.data.mul_(1.5)


@pytest.mark.parametrize("change", [change_in_place, change_behind_data, change_dtype, load_others, fold])
def test_the_transformed_positional_kernel_follows_its_weights(change):
    encoder = model(position_kernel=32)
    x = torch.randn(1, 60, 24)
    with torch.no_grad():
        before = encoder.position(x)
        assert encoder.position._spectrum is not None
        change(encoder.position)
        after = encoder.position(x)
    direct = encoder.position(x)  # gradients: the plain convolution
    torch.testing.assert_close(after, direct.detach(), atol=1e-5, rtol=1e-5)
    assert not torch.equal(before, after)
    assert copy.deepcopy(encoder).position._spectrum is None


def test_padding_as_trained_lets_padding_into_the_group_norm_as_the_peers_do():
    encoder = model(padding="as_trained")
    x = F.pad(torch.randn(1, 1000), (0, 2000))
    front_end = encoder.front_end
    with torch.no_grad():
        first = front_end.first
        want = F.group_norm(F.conv1d(x[:, None], first.conv.weight, stride=5), 16, first.norm.weight, first.norm.bias)
        for layer in front_end.rest:
            want = layer.conv(F.gelu(want))
        got = front_end(x, torch.tensor([1000]))
        torch.testing.assert_close(got, F.gelu(want).transpose(1, 2), atol=1e-5, rtol=1e-5)
        padded = encoder(x, torch.tensor([1000])).last_hidden_state[:, :48]
        alone = encoder(x[:, :1000]).last_hidden_state[:, :48]
    assert (padded - alone).abs().max() > 1e-2


def test_scaled_gradients():
    x = torch.randn(3, requires_grad=True)
    scale_gradient(x, 0.25).sum().backward()
    assert x.grad.tolist() == [0.25] * 3


def test_reusing_layers_send_gradients_into_the_map_they_reuse():
    encoder = model("reuse")
    x = encoder.layer_inputs(*encoder.embed(torch.randn(1, 1000), None), None)
    outputs = list(encoder.layer_outputs(x, None))
    qkv = encoder.layers[0].attention.qkv.weight
    through_first = torch.autograd.grad(outputs[0].square().sum(), qkv, retain_graph=True)[0]
    through_third = torch.autograd.grad(outputs[2].square().sum(), qkv)[0]
    assert not torch.allclose(through_first, through_third)
    for mode in ("exact", "resoftmax"):  # with the residual stream cut, the map is the only way back
        encoder = model("reuse", attention_mode=mode)
        computing, reusing = encoder.layers[0].attention, encoder.layers[1].attention
        x = torch.randn(2, 30, 24)
        _, kept = computing(x, None)
        reusing(torch.randn(2, 30, 24), kept).square().sum().backward()
        query, key, value = computing.qkv.weight.grad.chunk(3)
        assert query.abs().max() > 1e-6
        assert key.abs().max() > 1e-6
        assert not value.any()


@pytest.mark.parametrize("mode", ["exact", "resoftmax"])
@pytest.mark.parametrize("training", [False, True])
def test_a_reusing_layer_applies_the_map_before_dropout_to_its_own_values(mode, training):
    encoder = model("reuse", attention_mode=mode, attention_dropout=0.5).train(training)
    computing, reusing = encoder.layers[0].attention, encoder.layers[1].attention
    x, y, lengths = torch.randn(2, 20, 24), torch.randn(2, 20, 24), torch.tensor([20, 13])
    with torch.no_grad():
        got = reusing(y, computing(x, lengths)[1])
        q, k, _ = (part.unflatten(-1, (2, 12)).transpose(1, 2) for part in computing.qkv(x).chunk(3, -1))
        padded = torch.arange(20) >= lengths[:, None, None, None]
        probabilities = (q @ k.transpose(-1, -2) / 12**0.5).masked_fill(padded, float("-inf")).softmax(-1)
        if mode == "resoftmax":
            probabilities = probabilities.masked_fill(padded, float("-inf")).softmax(-1)
        values = reusing.value(y).unflatten(-1, (2, 12)).transpose(1, 2)
        want = reusing.output((probabilities @ values).transpose(1, 2).flatten(2))
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[i, :n], want[i, :n], atol=1e-5, rtol=1e-4)


class Adapter(nn.Module):
    """What LoRA puts in a linear layer's place."""

    def __init__(self, base):
        super().__init__()
        self.base, self.change = base, nn.Parameter(0.1 * torch.randn_like(base.weight))

    def forward(self, x):
        return self.base(x) + x @ self.change.T


@pytest.mark.parametrize("layer", ["up", "down", "attention.value", "attention.output"])
@pytest.mark.parametrize("mode", ["exact", "resoftmax"])
def test_an_adapter_in_a_layers_place_is_called_and_learns(layer, mode):
    adapted, merged = (model("reuse", attention_mode=mode).requires_grad_(False) for _ in range(2))
    base = adapted.layers[1].get_submodule(layer)
    adapter = Adapter(base)
    adapted.layers[1].set_submodule(layer, adapter)
    merged.layers[1].get_submodule(layer).weight += adapter.change.detach()
    waves, lengths = torch.randn(2, 3000), torch.tensor([3000, 1500])
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            got, want = (m(waves, lengths) for m in (adapted, merged))
        for row, n in enumerate(want.lengths):
            torch.testing.assert_close(
                got.last_hidden_state[row, :n].detach(), want.last_hidden_state[row, :n], atol=1e-4, rtol=0
            )
    got.last_hidden_state.square().sum().backward()
    assert adapter.change.grad.abs().max() > 1e-6


@pytest.mark.parametrize("layer", ["up", "attention.value"])
def test_hooks_see_what_a_linear_layer_gives(layer):
    encoder, seen = model("reuse").requires_grad_(False), []
    found = encoder.layers[1].get_submodule(layer)
    found.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    encoder(torch.randn(1, 900))
    ((x, y),) = seen
    torch.testing.assert_close(y, F.linear(x, found.weight, found.bias))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["reuse", "pre-norm, layer norm"])
def test_hidden_states_can_be_left_out(name, gradients):
    encoder = model(name, ARMHuBERT, projection_width=8)
    waves, lengths = torch.randn(2, 3000), torch.tensor([3000, 1500])
    with torch.set_grad_enabled(gradients):
        whole, less = encoder(waves, lengths), encoder(waves, lengths, hidden_states=False)
        least = encoder(waves, lengths, hidden_states=False, projections=False)
    assert (less.hidden_states, least.hidden_states, least.projections) == ((), (), None)
    for output in (less, least):
        assert torch.equal(output.last_hidden_state, whole.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(less.projections, whole.projections, strict=True))


@pytest.mark.parametrize("name", ["reuse", "resoftmax", "wavlm", "wavlm pre-norm"])
@pytest.mark.parametrize("gradients", [False, True])
def test_attention_maps_are_what_the_layers_apply_to_their_values(name, gradients):
    encoder, heads, values, applied = model(name), BASE.heads, [], []
    for layer in encoder.layers:
        attention = layer.attention
        project = attention.qkv if hasattr(attention, "qkv") else attention.value
        project.register_forward_hook(lambda module, inputs, y: values.append(y[..., -BASE.width :]))
        attention.output.register_forward_pre_hook(lambda module, inputs: applied.append(inputs[0]))
    waves, lengths = torch.randn(2, 3000), torch.tensor([3000, 1500])
    with torch.set_grad_enabled(gradients):
        output = encoder(waves, lengths, attentions=True)
    assert len(output.attentions) == len(applied) == BASE.layers
    if name.startswith("wavlm"):  # queries and keys are made once more for the map
        values = values[::2]
    for probabilities, v, out in zip(output.attentions, values, applied, strict=True):
        assert probabilities.shape == (2, heads, v.shape[1], v.shape[1])
        mixed = (probabilities @ v.unflatten(2, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        for row, n in enumerate(output.lengths):
            torch.testing.assert_close(mixed[row, :n], out[row, :n], atol=1e-5, rtol=1e-5)
            assert not probabilities[row, ..., n:].any()
    if gradients:
        output.attentions[1].square().sum().backward()
        assert encoder.layers[0].attention.qkv.weight.grad.abs().max() > 1e-6
    assert encoder(waves, lengths).attentions == ()


@pytest.mark.parametrize("name", ["reuse", "wavlm pre-norm"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_model_takes_other_lengths(name, padded):
    def inputs(*samples):
        waves = torch.randn(len(samples), max(samples))
        return (waves, torch.tensor(samples)) if padded else (waves,)

    encoder = model(name).requires_grad_(False)
    traced = torch.jit.trace(
        lambda *a: (lambda output: (output.last_hidden_state, output.lengths))(encoder(*a)), inputs(900, 700)
    )
    given = inputs(1300, 1100, 40)
    got, want = traced(*given), encoder(*given)
    assert torch.equal(got[1], want.lengths)
    for row, n in enumerate(want.lengths):
        torch.testing.assert_close(got[0][row, :n], want.last_hidden_state[row, :n], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("gradients", [False, True])
def test_lengths_of_any_integer_type(dtype, gradients):
    encoder = model("reuse")
    with torch.set_grad_enabled(gradients):
        frames = encoder(torch.randn(2, 3000), torch.tensor([3000, 1500], dtype=dtype)).lengths
        none = encoder(torch.zeros(0, 3000), torch.zeros(0, dtype=dtype))
    assert (frames.tolist(), frames.dtype) == ([149, 74], torch.int64)
    assert none.last_hidden_state.shape == (0, 149, 24)


def test_a_model_on_a_cpu_makes_nothing_elsewhere():
    encoder = model("reuse")
    waves, lengths = torch.randn(2, 3000), torch.tensor([3000, 1500])
    with torch.device("meta"), torch.no_grad():
        assert encoder(waves, lengths).last_hidden_state.device.type == "cpu"
    with torch.device("meta"):
        encoder(waves, lengths).last_hidden_state.sum().backward()


@pytest.mark.parametrize("name", ["post-norm", "pre-norm, layer norm", "wavlm", "reuse", "resoftmax"])
def test_gradients_do_not_depend_on_the_padding(name):
    encoder, wave = model(name), torch.randn(1, 700)
    encoder(wave).last_hidden_state.square().sum().backward()
    alone = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    padded = torch.cat([wave, torch.full((1, 900), 1e4)], 1)
    output = encoder(padded, torch.tensor([700]))
    output.last_hidden_state[:, : int(output.lengths[0])].square().sum().backward()
    together = [p.grad for p in encoder.parameters() if p.grad is not None]
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4 * float(a.abs().max() + 1), rtol=1e-3)


def test_gradient_checkpointing_changes_memory_and_not_gradients():
    encoder, x = model("reuse", dropout=0.1, attention_dropout=0.1).train(), torch.randn(2, 900)
    gradients = []
    for keep_nothing in (False, True):
        encoder.gradient_checkpointing = keep_nothing
        encoder.zero_grad()
        torch.manual_seed(5)
        encoder(x).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_masked_frames_carry_the_mask_embedding_and_nothing_of_their_sound():
    encoder = model()
    mask = torch.zeros(1, encoder.config.frames(1000), dtype=torch.bool)
    mask[:, 5:9] = True
    x, _ = encoder.embed(torch.randn(1, 1000), None)
    changed = torch.where(mask[..., None], torch.randn_like(x), x)
    torch.testing.assert_close(encoder.layer_inputs(x, None, mask), encoder.layer_inputs(changed, None, mask))
    assert not torch.allclose(encoder.layer_inputs(x, None, mask), encoder.layer_inputs(x, None, None))


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((torch.zeros(3000),), "waveforms must be floating point"),
        ((torch.zeros(1, 3000, dtype=torch.int16),), "waveforms must be floating point"),
        ((torch.zeros(1, 20),), "at least 30 samples"),
        ((torch.zeros(2, 300), torch.tensor([300])), r"lengths must be integers \[2\]"),
        ((torch.zeros(2, 300), torch.tensor([300.0, 200.0])), "lengths must be integers"),
        ((torch.zeros(2, 300), torch.tensor([300, 400])), r"lengths must lie in 30\.\.300"),
        ((torch.zeros(2, 300), torch.tensor([300, 3])), r"lengths must lie in 30\.\.300"),
        ((torch.zeros(1, 300), None, torch.zeros(1, 3, dtype=torch.bool)), r"mask must be bool \[1, 14\]"),
    ],
)
def test_input_that_does_not_fit_is_refused(arguments, rule):
    with pytest.raises(ArmhubertError, match=rule):
        model()(*arguments)


@pytest.mark.parametrize("channels", [6, 12, 24])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_positional_convolution_is_right_in_bfloat16(channels, autocast):
    position = model(position_groups=24 // channels).position
    x = torch.randn(2, 43, 24).bfloat16().float()
    want = position(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = position(x) if autocast else position.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.03, rtol=0.03)


def test_half_precision_runs():
    x, lengths = torch.randn(2, 900), torch.tensor([900, 500])
    want = model("reuse")(x, lengths)
    out = model("reuse").bfloat16()(x.bfloat16(), lengths).last_hidden_state
    assert out.dtype == torch.bfloat16
    for i, n in enumerate(want.lengths.tolist()):
        difference = (out[i, :n].float() - want.last_hidden_state[i, :n]).square().mean().sqrt()
        assert difference < 0.1  # of values of about 1


@pytest.mark.parametrize("name", ["reuse", "resoftmax"])
def test_compiles_whole(name):
    torch._dynamo.reset()
    encoder = model(name, ARMHuBERT, projection_width=8, layers=2, pattern="CR")
    compiled = torch.compile(lambda *a: encoder(*a)[:3], fullgraph=True, backend="aot_eager")
    for samples in (900, 1300):
        x, lengths = torch.randn(2, samples), torch.tensor([samples, 500])
        want = encoder(x, lengths)
        got = compiled(x, lengths)[0]
        for i, frames in enumerate(want.lengths.tolist()):  # padded frames are unspecified
            torch.testing.assert_close(got[i, :frames], want.last_hidden_state[i, :frames], atol=1e-4, rtol=1e-4)


def test_a_forward_pass_leaves_the_process_as_it_was():
    before = torch.get_num_threads(), torch.get_default_dtype()
    encoder = model("reuse")  # draws its start, and changes nothing else
    assert before == (torch.get_num_threads(), torch.get_default_dtype())
    before = (torch.get_rng_state(), *before)
    encoder(torch.randn(1, 900, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_num_threads(), torch.get_default_dtype())
