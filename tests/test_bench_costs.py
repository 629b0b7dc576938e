import pytest

from armhubert.bench import costs
from armhubert.kernels.costs import GPUS


def test_floors_of_the_default_student_on_an_h200():
    """B 16, 10 s, bfloat16: worked by hand, in microseconds."""
    gpu = GPUS["H200"]
    assert costs.reattend(16, 499, 12, 40, 480).floor(gpu) * 1e6 == pytest.approx(14, abs=0.5)
    assert costs.distillation(12, 16, 499, 480, 768).floor(gpu) * 1e6 == pytest.approx(89, abs=1)
    stack = ((128, 10, 5), (256, 1, 1), *[(256, 3, 2)] * 4, (480, 1, 1), *[(480, 2, 2)] * 2)
    front_end = costs.conv_frontend(16, 160000, stack)
    assert front_end.operations == pytest.approx(254e9, rel=0.01)
    assert front_end.floor(gpu) * 1e6 == pytest.approx(322, abs=2)
    assert costs.attend(1, 50, 12, 40).exponentials == 12 * 50 * 50
