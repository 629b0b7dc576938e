"""The training state of a run in one file: everything needed to go on as if nothing had happened."""

import dataclasses
import io
from pathlib import Path
from typing import Any, NamedTuple

import torch

from armhubert.convert.pickles import read_pickle
from armhubert.errors import ArmhubertError
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
    scaler: dict[str, Any]
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
        raise ArmhubertError(f"{path.parent} has no {path.name}: nothing to resume; {_ANEW}")
    try:
        content = read_pickle(path)
    except ArmhubertError as error:
        raise ArmhubertError(f"{error}; {_ANEW}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArmhubertError(f"{path} is no checkpoint of this version (format {FORMAT}); {_ANEW}")
    try:
        state = TrainingState(**content["state"])
        state.cursor = Cursor(*state.cursor)
        return Checkpoint(state, content["student"], content["optimizer"], content["scaler"], content["identity"])
    except (KeyError, TypeError) as error:
        raise ArmhubertError(f"{path} is no complete checkpoint: {error}; {_ANEW}") from None


_ANEW = "start the run anew with force=True"
