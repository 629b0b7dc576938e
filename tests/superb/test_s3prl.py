"""Heads, weighted sum and SpecAugment say what s3prl's own modules say on the same features and weights.

What s3prl 0.4.18 said is stored (tests/golden/superb/make.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from armhubert.superb.heads import CTCLinear, CTCRecurrent, PooledClassifier, WeightedSum, spec_augment
from armhubert.superb.task import Batch, Head, Item

GOLDEN = Path(__file__).parent.parent / "golden" / "superb" / "s3prl.safetensors"
PHONES = ["AA", "AE", "AH", "B", "CH", "D", "EH", "F", "IY", "K", "L", "M", "N", "S", "T"]
TEXTS = ["HELLO WORLD", "A CAT", "IT'S"]
PHONE_TEXTS = ["T AH L AA", "K AE T", "S IY M AE N"]
CLASSES = ["go", "left", "no", "yes"]
LABELS = ["yes", "go", "left"]


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["said"])  # noqa: SIM118


def head_of(name: str, tensors: dict[str, Tensor]) -> Head:
    width = tensors["features"].shape[2]
    state = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    state.pop("logits", None)
    if name == "asr":
        head: Head = CTCRecurrent(width, sorted(set("".join(TEXTS))), size=len(state["proj.bias"]))
        renames = {"proj.": "project.", "linear.": "classify."}
        renames |= {f"rnns.{number}.layer.": f"recurrent.{number}." for number in range(2)}
    else:
        head = CTCLinear(width, PHONES) if name == "pr" else PooledClassifier(width, [CLASSES])
        renames = {"hidden_layers.0.": "project.", "final_proj.": "classify."}
    for theirs, ours in renames.items():
        state = {ours + key[len(theirs) :] if key.startswith(theirs) else key: value for key, value in state.items()}
    head.load_state_dict(state)
    return head.eval()


def batch_of(name: str, tensors: dict[str, Tensor]) -> Batch:
    labels: dict[str, list[tuple[str, ...]]] = {
        "pr": [tuple(text.split()) for text in PHONE_TEXTS],
        "asr": [tuple(text) for text in TEXTS],
        "ks": [(label,) for label in LABELS],
    }
    items = tuple(Item(str(number), (), label) for number, label in enumerate(labels[name]))
    return Batch(tensors["features"], tensors["lengths"], items, (0, 0, 0), 320)


def said_by(name: str, head: Head, batch: Batch) -> tuple[float, list[str]]:
    with torch.no_grad():
        joined = {"pr": " ".join, "asr": "".join, "ks": "".join}[name]
        return float(head.loss(batch)), [joined(prediction) for prediction in head.predict(batch)]


def differences(tensors: dict[str, Tensor], said: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name in ("pr", "asr", "ks"):
        loss, _ = said_by(name, head_of(name, tensors), batch_of(name, tensors))
        found[f"{name} loss {said[name]['loss']:.4f}"] = abs(loss - said[name]["loss"])
    found["weighted sum"] = float((weighted(tensors) - tensors["features"]).abs().max())
    found["SpecAugment"] = float((augmented(tensors) - tensors["augmented"]).abs().max())
    return found


def weighted(tensors: dict[str, Tensor]) -> Tensor:
    total = WeightedSum(len(tensors["hidden"]))
    total.weights.data = tensors["layer_weights"]
    with torch.no_grad():
        result: Tensor = total(tensors["hidden"])
        return result


def augmented(tensors: dict[str, Tensor]) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return spec_augment(tensors["features"], tensors["lengths"])


@pytest.mark.parametrize("name", ["pr", "asr", "ks"])
def test_loss_and_predictions(name: str, golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, said = golden
    loss, predictions = said_by(name, head_of(name, tensors), batch_of(name, tensors))
    assert loss == pytest.approx(said[name]["loss"], abs=1e-5)
    expected = [prediction.replace("<unk>", "") for prediction in said[name]["predictions"]]
    if name == "ks":
        assert predictions == expected
    else:  # s3prl decodes padded frames too: the longest utterance has none
        assert predictions[0].replace(" ", "") == expected[0].replace(" ", "")


def test_weighted_sum(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    torch.testing.assert_close(weighted(golden[0]), golden[0]["features"], rtol=1e-5, atol=1e-6)


def test_specaugment_draws_the_same(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    torch.testing.assert_close(augmented(golden[0]), golden[0]["augmented"], rtol=1e-5, atol=1e-6)
