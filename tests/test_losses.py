import pytest
import torch
from made import write_teacher

from armhubert import ARMHuBERT, ArmhubertError, SpeechEncoder, load_teacher
from armhubert.config import EncoderConfig
from armhubert.losses import Objective, layer_weights, parse_loss, star_loss, temporal_gram
from armhubert.teacher import layer_mapping, teacher_targets

STACK = ((8, 10, 5), *((8, 3, 2),) * 4, *((16, 2, 2),) * 2)
LENGTHS = torch.tensor([8000, 5000, 6400])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> SpeechEncoder:
    return load_teacher(write_teacher(tmp_path_factory.mktemp("models") / "teacher", layers=4))


def new_student(projection_width: int | None = 32, **changes) -> ARMHuBERT:
    settings = {"conv_layers": STACK, "width": 16, "layers": 2, "heads": 2, "ffn": 24, "pattern": "CR"}
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return ARMHuBERT(EncoderConfig(**settings, projection_width=projection_width, **changes))


@pytest.fixture(scope="module")
def waveforms() -> torch.Tensor:
    wave = 0.1 * torch.randn(3, 8000, generator=torch.Generator().manual_seed(0))
    for row, length in zip(wave, LENGTHS.tolist(), strict=True):
        row[length:] = 0
    return wave


@pytest.fixture(scope="module")
def mask(teacher) -> torch.Tensor:
    frames = teacher.config.frames(LENGTHS)
    mask = torch.rand(3, int(frames.max()), generator=torch.Generator().manual_seed(1)) < 0.6
    return mask & (torch.arange(mask.shape[1]) < frames[:, None])


def sums(student, teacher, terms, waveforms, lengths, mask, distance="mse"):
    layers = layer_mapping(student.config.layers, teacher.config.layers)
    targets = teacher_targets(
        teacher, waveforms, lengths, mask, layers,
        masking="masking" in terms, clean=bool({"plain", "star"} & set(terms)), inputs="star" in terms,
    )  # fmt: skip
    return Objective(student, dict.fromkeys(terms, 1.0), distance, "torch")(waveforms, lengths, mask, targets)


def by_frame(student_frames, target_frames, distance):
    difference = student_frames - target_frames
    return (difference.square() if distance == "mse" else difference.abs()).mean(-1)


@pytest.mark.parametrize("distance", ["mse", "l1"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_masking_loss_is_the_papers_formula_over_valid_frames(teacher, waveforms, mask, distance, scaled):
    student = new_student(scale_layer_gradients=scaled)
    got = sums(student, teacher, ["masking"], waveforms, LENGTHS, mask, distance)
    clean = teacher(waveforms, LENGTHS).hidden_states
    masked = teacher(waveforms, LENGTHS, mask).hidden_states
    hidden = student(waveforms, LENGTHS, mask).hidden_states
    expected = torch.zeros(2)
    for layer, teacher_layer in enumerate((2, 4)):
        for utterance, frames in enumerate(teacher.config.frames(LENGTHS).tolist()):
            for t in range(frames):
                head = student.heads.weight[layer] @ hidden[layer + 1][utterance, t] + student.heads.bias[layer]
                view = clean if mask[utterance, t] else masked
                expected[layer] += by_frame(head, view[teacher_layer][utterance, t], distance)
    assert got.shape == (1, 2)
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("distance", ["mse", "l1"])
def test_the_plain_loss_compares_clean_with_clean(teacher, waveforms, mask, distance):
    student = new_student()
    got = sums(student, teacher, ["plain"], waveforms, LENGTHS, mask, distance)
    theirs, ours = teacher(waveforms, LENGTHS).hidden_states, student(waveforms, LENGTHS).projections
    valid = torch.arange(ours[0].shape[1]) < teacher.config.frames(LENGTHS)[:, None]
    expected = [by_frame(ours[i], theirs[n], distance)[valid].sum() for i, n in enumerate((2, 4))]
    torch.testing.assert_close(got[0], torch.stack(expected), rtol=1e-4, atol=0)


def test_a_masking_loss_without_mask_is_the_plain_one(teacher, waveforms, mask):
    student = new_student()
    nothing = torch.zeros_like(mask)
    masking = sums(student, teacher, ["masking"], waveforms, LENGTHS, nothing)
    torch.testing.assert_close(masking, sums(new_student(), teacher, ["plain"], waveforms, LENGTHS, nothing))


@pytest.mark.parametrize("padded", [False, True])
def test_star_is_the_naive_double_loop(padded):
    generator = torch.Generator().manual_seed(2)
    frames = torch.tensor([5, 3]) if padded else None
    counts = [5, 3] if padded else [5, 5]
    student, s_in = ([torch.randn(2, 5, 4, generator=generator) for _ in range(2)] for _ in range(2))
    teacher, t_in = ([torch.randn(2, 5, 7, generator=generator) for _ in range(2)] for _ in range(2))
    expected = torch.zeros(2)
    for layer in range(2):
        for b, count in enumerate(counts):
            for i in range(count):
                for j in range(count):
                    across = (
                        student[layer][b, i] @ student[layer][b, j] / 4
                        - teacher[layer][b, i] @ teacher[layer][b, j] / 7
                    )
                    within = s_in[layer][b, i] @ student[layer][b, j] / 4 - t_in[layer][b, i] @ teacher[layer][b, j] / 7
                    expected[layer] += (across**2 + within**2) / count
    torch.testing.assert_close(star_loss(student, s_in, teacher, t_in, frames), expected, rtol=1e-5, atol=0)


def test_star_of_the_teacher_itself_is_zero_and_padding_counts_for_nothing():
    x, y = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    frames = torch.tensor([6, 4])
    assert star_loss([x], [y], [x], [y], frames) == torch.zeros(1)
    garbage = x.clone()
    garbage[1, 4:] = 1e3
    assert star_loss([garbage], [y], [x], [y], frames) == torch.zeros(1)


def test_star_keeps_small_relations_under_autocast():
    x = torch.randn(1, 30, 64)
    y = x + 1e-4 * torch.randn(1, 30, 64)
    exact = star_loss([y], [x], [x], [x], None)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(star_loss([y], [x], [x], [x], None), exact)
    assert temporal_gram(x.bfloat16(), x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("terms", [["masking"], ["plain"], ["star"], ["masking", "star"], ["plain", "masking", "star"]])
def test_a_batchs_sum_is_the_sum_of_its_utterances_alone(teacher, waveforms, mask, terms):
    student = new_student()
    together = sums(student, teacher, terms, waveforms, LENGTHS, mask)
    alone = torch.zeros_like(together)
    for row, length in enumerate(LENGTHS.tolist()):
        frames = teacher.config.frames(length)
        alone += sums(student, teacher, terms, waveforms[row : row + 1, :length], None, mask[row : row + 1, :frames])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.shape == (len(terms), 2)


def test_terms_come_in_their_order_and_share_one_pass(teacher, waveforms, mask):
    student = new_student()
    both = sums(student, teacher, ["star", "masking"], waveforms, LENGTHS, mask)
    for row, term in zip(both, ["star", "masking"], strict=True):
        torch.testing.assert_close(row, sums(student, teacher, [term], waveforms, LENGTHS, mask)[0], rtol=1e-5, atol=0)


def test_star_needs_no_heads(teacher, waveforms):
    student = new_student(projection_width=None)
    assert sums(student, teacher, ["star"], waveforms, LENGTHS, None).isfinite().all()


@pytest.mark.parametrize("terms", [["masking"], ["plain"], ["star"], ["masking", "star"]])
def test_every_trained_parameter_gets_a_gradient(teacher, waveforms, mask, terms):
    student = new_student(projection_width=None if terms == ["star"] else 32)
    sums(student, teacher, terms, waveforms, LENGTHS, mask).sum().backward()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert ("mask_embedding" in trained) == ("masking" in terms)
    assert [name for name, p in trained.items() if p.grad is None] == []


def test_the_last_layer_weighs_one_and_the_others_what_is_asked():
    assert layer_weights(4, 0.25).tolist() == [0.25, 0.25, 0.25, 1.0]
    assert layer_weights(1, 0.25).tolist() == [1.0]


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("masking", {"masking": 1.0}),
        ("masking=1,star=0.5", {"masking": 1.0, "star": 0.5}),
        (" plain = 2 , star ", {"plain": 2.0, "star": 1.0}),
        ("star=1e-3", {"star": 1e-3}),
    ],
)
def test_losses_are_read(text, weights):
    assert parse_loss(text) == weights


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("maskin", "unknown loss term 'maskin' in 'maskin'; did you mean 'masking'"),
        ("", "unknown loss term ''"),
        ("masking,", "unknown loss term ''"),
        ("masking=1=2", "positive weights"),
        ("masking star", "unknown loss term"),
        ("masking,masking", "a term once"),
        ("masking=0", "positive weights"),
        ("masking=-1", "positive weights"),
        ("masking=inf", "positive weights"),
        ("masking=nan", "positive weights"),
        ("masking=x", "positive weights"),
        ("masking=", "unknown loss term|positive weights"),
    ],
)
def test_losses_that_cannot_be_read(text, says):
    with pytest.raises(ArmhubertError, match=says) as caught:
        parse_loss(text)
    assert "\n" not in str(caught.value)
