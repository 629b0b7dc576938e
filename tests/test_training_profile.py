import pytest
import torch

from armhubert import ArmhubertError, training_profile
from armhubert.distill_config import DistillConfig
from armhubert.training_profile import PARTS, Step, TrainingProfile, profile_training

SETTINGS = {"teacher": "mini", "batch_seconds": 4, "max_seconds": 2, "device": "cpu", "workers": 0}


def test_a_step_is_the_sum_of_its_parts_beside_reading():
    state = torch.get_rng_state()
    *steps, result = profile_training(DistillConfig(**SETTINGS), steps=1, warmup=1)
    assert steps == [Step(1, 2), Step(2, 2)]
    assert isinstance(result, TrainingProfile)
    assert tuple(result.parts) == PARTS == ("data", "teacher", "student forward", "loss", "backward", "optimizer")
    assert all(timing.median > 0 for timing in result.parts.values())
    assert result.step.median == pytest.approx(sum(result.parts[part].median for part in PARTS[1:]), rel=1e-9)
    assert 0 < result.batch_seconds <= 4
    assert result.peak_memory > 0
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("loss", ["plain", "star", "masking=1,star=0.5"])
def test_the_loss_that_is_asked_for_is_the_one_that_is_measured(loss, monkeypatch):
    asked, real = [], training_profile.teacher_targets

    def targets(*args, **options):
        asked.append(options)
        return real(*args, **options)

    monkeypatch.setattr(training_profile, "teacher_targets", targets)
    *_, result = profile_training(DistillConfig(**SETTINGS, loss=loss), steps=1, warmup=1)
    assert isinstance(result, TrainingProfile)
    assert result.conditions["loss"] == loss
    assert asked[0] == {"masking": "masking" in loss, "clean": True, "inputs": "star" in loss}
    assert result.parts["loss"].median > 0


def test_a_teacher_without_a_masked_view_is_one_line(monkeypatch):
    teacher = training_profile.load_teacher("mini")
    teacher.mask_embedding = None
    monkeypatch.setattr(training_profile, "load_teacher", lambda *args, **options: teacher)
    with pytest.raises(ArmhubertError, match="no mask embedding"):
        next(profile_training(DistillConfig(**SETTINGS)))
