"""The training state of a run in one file: everything needed to go on as if nothing had happened."""

import dataclasses
import io
import typing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from armhubert.convert.pickles import read_pickle
from armhubert.errors import ArmhubertError, shown
from armhubert.files import write_atomic

FORMAT = 1


class Cursor(NamedTuple):
    """Place in the endless stream of batches: the next batch to be used."""

    epoch: int
    batch: int


@dataclasses.dataclass
class TrainingState:
    """What changes while a run goes on, apart from tensors. All chance is drawn from (seed, epoch, utterance) and
    (seed, step, batch), so `step` and `cursor` are the whole state of sampler and generators."""

    step: int = 0
    cursor: Cursor = dataclasses.field(default_factory=lambda: Cursor(0, 0))
    audio_seconds: float = 0.0
    """Audio of the steps made, as planned, without padding."""
    skipped_steps: int = 0
    """Steps left out because loss or gradients were not finite."""
    skipped_in_a_row: int = 0
    best_loss: float = float("inf")
    """Lowest validation loss."""
    validations_without_gain: int = 0
    validation_due: bool = False
    """A signal ended the validation of this step, which a resumed run begins with."""
    train_seconds: float = 0.0
    """Wall time spent in training so far."""
    window: list[tuple[float, list[float], float, float, float]] = dataclasses.field(default_factory=list)
    """Loss, layers, gradient norm, masked share and audio seconds of each step since the last report."""


class Checkpoint(NamedTuple):
    """What the file holds."""

    state: TrainingState
    student: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, float]
    identity: dict[str, Any]
    """What a resumed run must agree on: teacher, data, student's configuration, batches in a step."""


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically, after reading the bytes back once and comparing.

    Raises:
        ArmhubertError: the file cannot be written; the previous one is intact.
    """
    content = {
        "format": FORMAT,
        "state": {**dataclasses.asdict(checkpoint.state), "cursor": tuple(checkpoint.state.cursor)},
        **{name: getattr(checkpoint, name) for name in ("student", "optimizer", "scaler", "identity")},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    again = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not all(torch.equal(value.cpu(), again["student"][name]) for name, value in checkpoint.student.items()):
        raise RuntimeError("a checkpoint did not read back as it was written: memory or torch is at fault")
    write_atomic(path, data)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of ours; nothing in it is executed.

    Raises:
        ArmhubertError: no checkpoint there, damaged, or of another format.
    """
    if not path.is_file():
        raise ArmhubertError(f"{path.parent} has no {path.name}: nothing to resume; {ANEW}")
    try:
        content = read_pickle(path)
    except ArmhubertError as error:
        raise ArmhubertError(f"{error}; {ANEW}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArmhubertError(f"{path} is no checkpoint of this version (format {FORMAT}); {ANEW}")
    try:
        state = TrainingState(**content["state"])
        state.cursor = Cursor(*state.cursor)
        found = Checkpoint(state, content["student"], content["optimizer"], content["scaler"], content["identity"])
        for part in (state, found):
            for name, hint in typing.get_type_hints(type(part)).items():
                if not _fits(value := getattr(part, name), hint):
                    raise TypeError(f"its {name} is {shown(value)}")
    except (KeyError, TypeError) as error:
        raise ArmhubertError(f"{path} is no complete checkpoint: {error}; {ANEW}") from None
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says. Whole numbers count something: none is negative."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Any:
        return True
    kinds: Any = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
        return False
    if kind is dict:
        return all(_fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items())
    if kind is list:
        return all(_fits(item, parts[0]) for item in value)
    if kind is Cursor:
        parts = int, int
    if parts:
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return kind is not int or value >= 0


ANEW = "start the run anew with force=True"
