import dataclasses

import numpy as np
import pytest
import torch
from made import SHAPE, write_speech, write_teacher

from armhubert import ArmhubertError, distill, distill_models, distill_run, encoder, load_teacher, training_profile
from armhubert.data import Scanning, discover
from armhubert.distill_config import DistillConfig
from armhubert.training_profile import PARTS, Step, TrainingProfile, profile_training


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DistillConfig:
    folder = tmp_path_factory.mktemp("profile")
    return DistillConfig(
        data=(str(write_speech(folder / "speech")),), teacher=str(write_teacher(folder / "teacher")), **SHAPE,
        batch_seconds=2.0, max_seconds=0.8, learning_rate=1e-3, hold_out=0.0, workers=0, device="cpu", log_every=1,
    )  # fmt: skip


@pytest.fixture
def outcomes(monkeypatch):
    """Loss, norm of the gradients and seconds of audio of every step that is taken."""
    taken, step = [], distill_run.Run.step

    def noted(self, group):
        outcome = step(self, group)
        if outcome is not None:
            taken.append((float(outcome.loss), float(outcome.gradient_norm), outcome.audio_seconds))
        return outcome

    monkeypatch.setattr(distill_run.Run, "step", noted)
    return taken


def calls(monkeypatch, owner, name: str) -> list:
    """The arguments of every call, which goes on as ever."""
    seen, real = [], getattr(owner, name)

    def noted(*args, **options):
        seen.append((args, options))
        return real(*args, **options)

    monkeypatch.setattr(owner, name, noted)
    return seen


def test_the_parts_are_in_the_step_and_reading_is_beside_it(config):
    state = torch.get_rng_state()
    *reports, result = profile_training(config, steps=1, warmup=1)
    assert [report for report in reports if not isinstance(report, Scanning)] == [Step(1, 2), Step(2, 2)]
    assert isinstance(reports[0], Scanning)
    assert isinstance(result, TrainingProfile)
    assert tuple(result.parts) == PARTS == ("data", "teacher", "student forward", "loss", "backward", "optimizer")
    assert all(timing.median > 0 for timing in result.parts.values())
    assert sum(result.parts[part].median for part in PARTS[1:]) < result.step.median
    assert 0 < result.audio_seconds <= 2
    assert result.loader_rate == result.audio_seconds / result.parts["data"].median
    assert result.peak_memory > 2**20
    assert torch.equal(state, torch.get_rng_state())


def test_of_many_files_some_are_examined(config, monkeypatch):
    monkeypatch.setattr(training_profile, "FILES", 3)
    drawn = calls(monkeypatch, training_profile, "scan")
    *reports, _ = profile_training(config, steps=1, warmup=0)
    assert [report.total for report in reports if isinstance(report, Scanning)][-1] == 3
    (((paths,), _),) = drawn
    everything = discover(config.sources)
    assert set(paths) < set(everything)
    assert paths != everything[:3]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"loss": "plain"},
        {"loss": "star"},
        {"loss": "masking=1,star=0.5", "layer_weight": 0.3},
        {"distance": "l1", "mask_prob": 0.4, "mask_length": 3},
        {"precision": "bf16"},
        {"precision": "fp16", "loss": "masking=1e4"},
        {"gradient_checkpointing": True, "dropout": 0.1},
        {"accumulate": 3, "batch_seconds": 1.0},
        {"init": "teacher", "pattern": "CC", "ffn": 48, "seed": 3},
        {"clip": 0.1, "weight_decay": 0.5, "beta2": 0.9, "warmup": 0.0},
    ],
    ids=str,
)
def test_what_is_measured_is_what_is_trained(config, outcomes, tmp_path, change):
    changed = dataclasses.replace(config, **change)
    *_, result = profile_training(changed, steps=2, warmup=1)
    assert isinstance(result, TrainingProfile)
    asked = {"loss": changed.loss, "precision": changed.precision, "steps": 2}
    asked |= {"teacher": changed.teacher, "gradient checkpointing": changed.gradient_checkpointing}
    assert asked.items() <= result.conditions.items()
    measured = list(outcomes)
    assert result.audio_seconds == pytest.approx(np.mean([seconds for *_, seconds in measured]))
    outcomes.clear()
    run_length = 2 * 3 + 20  # the rates are those of as long a run
    for _ in distill.distill(dataclasses.replace(changed, out=str(tmp_path / "run"), steps=run_length)):
        if len(outcomes) == 3:
            break
    assert measured == outcomes


def test_a_measured_step_has_everything_that_a_step_of_training_has(config, monkeypatch):
    layers = calls(monkeypatch, encoder, "checkpoint")
    clipped = calls(monkeypatch, torch.nn.utils, "clip_grad_norm_")
    scaled = calls(monkeypatch, torch.amp.GradScaler, "step")
    teacher = calls(monkeypatch, distill_run, "teacher_targets")
    config = dataclasses.replace(config, gradient_checkpointing=True, precision="fp16", clip=2.0, accumulate=2)
    list(profile_training(config, steps=2, warmup=1))
    assert len(clipped) == len(scaled) == 3
    assert {norm for (_, norm), _ in clipped} == {2.0}
    assert len(teacher) == 3 * 2
    assert len(layers) == 3 * 2 * 2  # steps, batches, layers


def test_lengths_are_told_where_something_is_padded_as_in_training(config, monkeypatch):
    teacher = calls(monkeypatch, distill_run, "teacher_targets")
    list(profile_training(dataclasses.replace(config, max_seconds=0.5), steps=1, warmup=0))
    list(profile_training(dataclasses.replace(config, batch_seconds=10.0), steps=1, warmup=0))
    (_, cut, none, *_), (_, waveforms, lengths, *_) = (args for args, _ in teacher)
    assert none is None
    assert cut.shape[1] == 8000
    assert int(lengths.min()) < waveforms.shape[1]


def test_steps_that_are_not_finite_are_not_measured(config, monkeypatch):
    broken, real = [True], distill_run.teacher_targets

    def sometimes(*args, **options):
        targets = real(*args, **options)
        if broken.pop(0) if broken else False:
            return targets._replace(masking=tuple(t * float("nan") for t in targets.masking))
        return targets

    monkeypatch.setattr(distill_run, "teacher_targets", sometimes)
    *reports, _ = profile_training(config, steps=2, warmup=0)
    assert reports[-2:] == [Step(1, 2), Step(2, 2)]
    broken += [True] * 100
    with pytest.raises(ArmhubertError, match=r"22 of 22 steps .* not finite: lower the learning rate \(0.001\)"):
        list(profile_training(config, steps=1, warmup=0))


@pytest.mark.parametrize(("steps", "warmup"), [(0, 1), (1, -1)])
def test_no_steps_to_measure_are_refused(config, steps, warmup):
    with pytest.raises(ArmhubertError, match=f"^steps must be at least 1 and warmup .*, got {steps} and {warmup}$"):
        next(profile_training(config, steps=steps, warmup=warmup))


def test_a_teacher_without_a_masked_view_is_one_line(config, monkeypatch):
    teacher = load_teacher(config.teacher)
    teacher.mask_embedding = None
    monkeypatch.setattr(distill_models, "load_teacher", lambda *args, **options: teacher)
    with pytest.raises(ArmhubertError, match="no mask embedding"):
        next(profile_training(config))
