import dataclasses

import pytest
import torch
import yaml

from armhubert import plan
from armhubert.config import preset
from armhubert.distill_config import DistillConfig, student_config
from armhubert.distill_models import check_views
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.settings import build, read_mapping
from armhubert.student import ARMHuBERT


@pytest.fixture(scope="module")
def proposals():
    *searching, found = plan.plan("mini", plan.Budget("parameters", 1.2e6), device="cpu", repeats=1)
    assert [report.kind for report in searching] == [p.kind for p in found]
    return found


def test_proposals_keep_to_the_budget_and_nearly_use_it(proposals):
    assert len(proposals) == 4
    for p in proposals:
        with torch.device("meta"):
            count = sum(x.numel() for x in ARMHuBERT(p.student).parameters())
        assert p.parameters == count <= 1.2e6
        assert p.latency.median > 0
    assert proposals[0].student.pattern == "CRCRCR"
    assert proposals[3].student.layers == 3
    assert proposals[3].student.width > proposals[0].student.width


def test_what_is_written_is_what_distill_builds(proposals, tmp_path):
    plan.write(proposals[0], tmp_path / "plan.yaml")
    config = build(DistillConfig, yaml.safe_load((tmp_path / "plan.yaml").read_text()), "plan.yaml")
    teacher = plan.load_weights("mini").config
    assert dataclasses.replace(student_config(config, teacher), projection_width=None) == proposals[0].student
    assert config.loss == "masking"
    plan.write(proposals[0], tmp_path / "plan.json")
    assert build(DistillConfig, read_mapping(tmp_path / "plan.json"), "plan.json") == config


def test_a_teacher_without_a_masked_view_is_given_a_loss_that_needs_none(tmp_path, monkeypatch):
    whole = plan.load_weights("mini")
    state = {name: value for name, value in whole.state.items() if name != "mask_embedding"}
    bare = whole._replace(state=state).with_config(mask_embedding=False)
    monkeypatch.setattr(plan, "load_weights", lambda source: bare)
    random_state = torch.get_rng_state()
    *_, found = plan.plan("mini", plan.Budget("parameters", 1.2e6), device="cpu", repeats=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {p.settings.loss for p in found} == {"plain"}
    plan.write(found[0], tmp_path / "plan.yaml")
    config = build(DistillConfig, yaml.safe_load((tmp_path / "plan.yaml").read_text()), "plan.yaml")
    check_views(config, SpeechEncoder.from_weights(bare.without_heads()))


def test_the_published_student_is_found_at_its_own_budget():
    """22,015,552 parameters for a HuBERT Base teacher give width 480 and FFN 864."""
    base = dataclasses.replace(preset("armhubert"), width=768, ffn=3072, pattern="", feature_projection=True)
    kind, settings = plan._kinds("teacher", base, "masking")[0]
    sizes = [plan._size(settings, base, width, 1.8) for width in plan._widths(base)]
    best = plan._last_fitting(sizes, lambda size: plan._counts(size.student)[0] <= 22_015_552)
    assert best is not None
    assert (best.student.width, best.student.ffn, best.student.pattern) == (480, 864, "CR" * 6)
    assert "published" in kind


def test_a_latency_budget_is_measured(monkeypatch):
    """Bisection on times that grow with width; the fake clock says a millisecond for each channel."""
    from armhubert.clock import Timing

    def fake(students, device, repeats):
        return {name: Timing(*[config.width * 1e-3] * 3) for name, config in students.items()}

    monkeypatch.setattr(plan, "_latencies", fake)
    *_, found = plan.plan("mini", plan.Budget("latency", 0.1), device="cpu")
    assert {p.student.width for p in found} == {96}
    assert [plan.Budget("latency", limit).missed(found[0]) for limit in (0.095, 0.1)] == [True, False]
    assert not plan.Budget("parameters", 1).missed(found[0])


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("20M", "parameters", 20e6), ("1.5g", "macs", 1.5e9), ("200ms", "latency", 0.2), ("2e7", "parameters", 2e7)],
)
def test_amounts(text, kind, value):
    assert plan.parse_amount(text, kind) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "kind"), [("20ms", "macs"), ("20M", "latency"), ("20", "latency"), ("", "macs"), ("-3", "macs")]
)
def test_amounts_that_are_none(text, kind):
    with pytest.raises(ArmhubertError, match=f"^{kind} must be like"):
        plan.parse_amount(text, kind)


def test_an_amount_that_is_none_is_told_by_its_option(call):
    code, _, err = call("plan", "mini", "--params", "many")
    assert (code, err) == (2, "error: --params must be like 20M or 2e7, got 'many'\n")


@pytest.mark.parametrize(
    ("budget", "repeats", "message"),
    [
        (plan.Budget("params", 1e6), 1, "a budget must be of parameters, macs, latency, and above 0, got 'params'"),
        (plan.Budget("macs", 0), 1, "above 0, got 'macs' and 0"),
        (plan.Budget("macs", float("nan")), 1, "above 0, got 'macs' and nan"),
        (plan.Budget("macs", 1e9), 0, "repeats must be at least 1, got 0"),
    ],
)
def test_bad_input_is_told_before_any_search(budget, repeats, message):
    with pytest.raises(ArmhubertError, match=message):
        next(plan.plan("mini", budget, repeats=repeats))


def test_a_budget_below_every_student_names_the_smallest():
    with pytest.raises(ArmhubertError, match="the smallest has 39760"):
        list(plan.plan("mini", plan.Budget("parameters", 1e4), device="cpu"))
