import torch

from armhubert.distill_config import DistillConfig
from armhubert.training_profile import PARTS, Step, TrainingProfile, profile_training


def test_the_parts_of_a_step_add_up():
    config = DistillConfig(teacher="mini", batch_seconds=4, max_seconds=2, device="cpu", workers=0)
    state = torch.get_rng_state()
    *steps, result = profile_training(config, steps=2, warmup=1)
    assert steps == [Step(1, 3), Step(2, 3), Step(3, 3)]
    assert isinstance(result, TrainingProfile)
    assert tuple(result.parts) == PARTS
    assert all(timing.low > 0 for timing in result.parts.values())
    together = sum(result.parts[part].high for part in PARTS[1:])
    assert result.step.high <= together * (1 + 1e-9)
    assert 0 < result.batch_seconds <= 4
    assert result.peak_memory > 0
    assert torch.equal(state, torch.get_rng_state())
