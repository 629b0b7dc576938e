"""How much a student's representation is its teacher's, without training: CKA, cosine and attention maps by layer.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, equation 3) of centred features X [N, D] and Y [N, D']:
||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), 1 for features equal up to rotation and scale.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from armhubert import figures
from armhubert.audio import read_audio
from armhubert.config import SAMPLE_RATE
from armhubert.convert import load_weights
from armhubert.data import discover
from armhubert.encoder import SpeechEncoder
from armhubert.errors import ArmhubertError
from armhubert.files import write_atomic
from armhubert.machine import pick_device
from armhubert.settings import check_fields, documented
from armhubert.student import ARMHuBERT
from armhubert.teacher import layer_mapping

FRAMES_EACH = 100
"""At most so many frames of an utterance count, so that many utterances do."""


@documented
@dataclass(frozen=True)
class SimilarityConfig:
    """Settings of `armhubert evaluate --task similarity`.

    Raises:
        ArmhubertError: a setting breaks a rule; the message names the rule, the value and the remedy.
    """

    model: str
    """A student, or any model that `load_weights` takes."""
    against: str
    """The teacher."""
    data: tuple[str, ...]
    """Folders, files or manifests of speech."""
    out: str = "runs/similarity"
    utterances: int = 50
    """How many are compared, drawn by the seed."""
    max_seconds: float = 10.0
    """Longest part of an utterance that is compared."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.utterances < 2:
            raise ArmhubertError(f"similarity needs at least 2 utterances, got {self.utterances}")
        if self.max_seconds <= 0:
            raise ArmhubertError(f"max_seconds must be above 0, got {self.max_seconds}")


class Comparing(NamedTuple):
    """Utterances done."""

    done: int
    total: int


class Similarity(NamedTuple):
    """The comparison. Hidden state 0 is the input of the first layer."""

    cka: tuple[tuple[float, ...], ...]
    """[L + 1][L_t + 1]: student's hidden state against the teacher's."""
    cosine: tuple[float, ...]
    """[L]: mean cosine of each layer's prediction of its teacher layer, and that layer."""
    cosine_by: str
    """heads: the student's own; fit: least squares on one half of the utterances, measured on the other."""
    maps: tuple[float | None, ...]
    """[L]: overlap of the attention maps that the layers apply, averaged over heads: 1 - total variation, from 0 to 1;
    None: pruning left a layer no heads."""
    mapping: tuple[int, ...]
    """The teacher layer of each student layer."""
    frames: int
    utterances: int
    skipped: int
    """Files that could not be read, others having been drawn instead."""


class _Sample(NamedTuple):
    hidden: tuple[Tensor, ...]
    """[T, D] of each hidden state."""
    projections: tuple[Tensor, ...]
    maps: tuple[Tensor | None, ...]
    """[T, T] of each layer, mean over heads."""


@torch.no_grad()
def look(model: SpeechEncoder, waveform: Tensor) -> _Sample:
    """Hidden states, head outputs and attention maps of one utterance [S]."""
    output = model(waveform[None], attentions=True)
    return _Sample(
        tuple(state[0] for state in output.hidden_states),
        tuple(projection[0] for projection in output.projections or ()),
        tuple(None if maps is None else maps[0].mean(0) for maps in output.attentions),
    )


def compare(config: SimilarityConfig) -> Iterator[Comparing | Similarity]:
    """Compare student and teacher on speech; yields progress, the result last.

    Raises:
        ArmhubertError: models whose frames do not line up, or too little speech.
    """
    device = pick_device(config.device)
    student = ARMHuBERT.from_pretrained(config.model, device=device)
    teacher = SpeechEncoder.from_weights(load_weights(config.against).without_heads(), device=device)
    geometry = [(m.config.hop, m.config.receptive_field) for m in (student, teacher)]
    if geometry[0] != geometry[1]:
        raise ArmhubertError(
            "student and teacher must have the same frames: (samples between two, samples of one) are "
            f"{geometry[0]} in {config.model} and {geometry[1]} in {config.against}"
        )
    mapping = layer_mapping(student.config.layers, teacher.config.layers)
    draw = np.random.default_rng(config.seed)
    paths = discover(config.data)
    ours: list[list[Tensor]] = []
    theirs: list[list[Tensor]] = []
    predictions: list[list[Tensor]] = []
    overlaps: list[list[float | None]] = []
    skipped = 0
    for place in draw.permutation(len(paths)):
        try:
            waveform = read_audio(paths[place])[: int(config.max_seconds * SAMPLE_RATE)]
        except ArmhubertError:
            skipped += 1
            continue
        waveform = F.pad(waveform, (0, max(0, student.config.receptive_field - len(waveform)))).to(device)
        mine, its = look(student, waveform), look(teacher, waveform)
        kept = torch.from_numpy(np.sort(draw.permutation(len(mine.hidden[0]))[:FRAMES_EACH]))
        ours.append([h[kept].float().cpu() for h in mine.hidden])
        theirs.append([h[kept].float().cpu() for h in its.hidden])
        predictions.append([p[kept].float().cpu() for p in mine.projections])
        overlaps.append([_overlap(a, its.maps[layer - 1]) for a, layer in zip(mine.maps, mapping, strict=True)])
        yield Comparing(len(ours), min(config.utterances, len(paths) - skipped))
        if len(ours) == config.utterances:
            break
    if len(ours) < 2:
        raise ArmhubertError(
            f"similarity needs at least 2 utterances, {', '.join(config.data)} has {len(ours)} that can be read"
        )
    x = [torch.cat(layers) for layers in zip(*ours, strict=True)]
    y = [torch.cat(layers) for layers in zip(*theirs, strict=True)]
    by_heads = student.config.projection_width == teacher.config.width
    if by_heads:
        outputs = [torch.cat(layers) for layers in zip(*predictions, strict=True)]
        cosine = tuple(_cosine(p, y[layer]) for p, layer in zip(outputs, mapping, strict=True))
    else:
        half = sum(len(rows[0]) for rows in ours[: len(ours) // 2])
        cosine = tuple(_fitted_cosine(x[i + 1], y[layer], half) for i, layer in enumerate(mapping))
    yield Similarity(
        cka_table(x, y),
        cosine,
        "heads" if by_heads else "fit",
        tuple(_mean([row[i] for row in overlaps]) for i in range(len(mapping))),
        mapping,
        len(x[0]),
        len(ours),
        skipped,
    )


def cka_table(x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
    """Linear CKA of every x [N, D] with every y [N, D']; 0 where one is constant."""
    centred_x, centred_y = ([(z.double() - z.double().mean(0)) for z in group] for group in (x, y))
    self_x, self_y = ([float((z.T @ z).norm()) for z in group] for group in (centred_x, centred_y))
    return tuple(
        tuple(
            float((b.T @ a).norm() ** 2) / (own * other) if own * other > 0 else 0.0
            for b, other in zip(centred_y, self_y, strict=True)
        )
        for a, own in zip(centred_x, self_x, strict=True)
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=1).mean())


def _fitted_cosine(x: Tensor, y: Tensor, half: int) -> float:
    """The cosine on rows after `half` of y and the affine map of x that fits best on the rows before."""
    ones = torch.ones(len(x), 1)
    inputs = torch.cat([x, ones], 1).double()
    gram = inputs[:half].T @ inputs[:half]
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, inputs[:half].T @ y[:half].double())
    return _cosine(inputs[half:] @ weights, y[half:].double())


def _overlap(a: Tensor | None, b: Tensor | None) -> float | None:
    return None if a is None or b is None else float(torch.minimum(a, b).sum(1).mean())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def write(result: Similarity, config: SimilarityConfig) -> list[Path]:
    """similarity.json and similarity.png, in the run's folder."""
    out = Path(config.out)
    content = {"config": asdict(config), **result._asdict()}
    write_atomic(out / "similarity.json", json.dumps(content, indent=1) + "\n")
    write_atomic(out / "similarity.png", picture(result))
    return [out / "similarity.json", out / "similarity.png"]


def picture(result: Similarity) -> bytes:
    """CKA as a heat map; beside it, by layer, CKA with the mapped teacher layer, cosine and map overlap."""
    figure, (left, right) = figures.panels(2, width=figures.WIDTH + 3)
    left.grid(visible=False)
    image = left.imshow(np.asarray(result.cka), vmin=0, vmax=1, origin="lower", cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=left, label="linear CKA")
    left.set(xlabel="teacher's hidden state", ylabel="student's hidden state")
    layers = list(range(1, len(result.mapping) + 1))
    diagonal = [result.cka[layer][result.mapping[layer - 1]] for layer in layers]
    rows = ((diagonal, "CKA"), (result.cosine, f"cosine ({result.cosine_by})"), (result.maps, "map overlap"))
    for (values, name), color in zip(rows, figures.shades(3), strict=True):
        points = [(layer, value) for layer, value in zip(layers, values, strict=True) if value is not None]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", color=color, label=name)
    right.set(xlabel="student's layer, against its teacher layer", ylim=(0, 1.02))
    return figures.png(figure)
