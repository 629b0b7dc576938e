"""Prints how far our asv, sd, sf and qbe are from s3prl 0.4.18's own modules on the same random inputs; writes nothing.

    pip install --no-deps s3prl==0.4.18 && pip install editdistance scikit-learn dtw-python
    python tests/golden/superb/verify.py

The losses and the cost of warping that tests/superb/test_tasks_{asv,sd,qbe}.py hold were made so, from the weights and
features of tests/superb/conftest.py.
"""

import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from armhubert.superb import metrics
from armhubert.superb.dtw import match_document, prepare_queries
from armhubert.superb.metrics import Turn
from armhubert.superb.task import Batch, Item
from armhubert.superb.tasks.asv import XVector
from armhubert.superb.tasks.sd import FrameActivity
from armhubert.superb.tasks.sf import decode, encode, parse_slots

LENGTHS, WIDTH = (60, 33, 17, 48), 24


def _features() -> tuple[torch.Tensor, torch.Tensor]:
    features, lengths = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH), torch.tensor(LENGTHS)
    return features * (torch.arange(max(LENGTHS)) < lengths[:, None])[..., None], lengths


def _batch(features: torch.Tensor, lengths: torch.Tensor, labels: list[object]) -> Batch:
    items = tuple(Item(str(number), (), label) for number, label in enumerate(labels))
    return Batch(features, lengths, items, (0,) * len(items), 320)


def detection(common: ModuleType) -> dict[str, float]:
    """EER and minDCF of random trials, half of them with many equal scores."""
    draw, worst = np.random.default_rng(0), {"EER": 0.0, "minDCF": 0.0}
    for number in range(60):
        targets = draw.random(20 * 10 ** (number % 3)) < 0.4
        targets[:2] = True, False
        scores = draw.normal(size=len(targets)) + targets * draw.uniform(0, 3)
        scores = scores.round(1) if number % 2 else scores
        curve = metrics.detection_curve(targets, scores)
        theirs = common.compute_eer(targets.astype(int), scores)[0], common.compute_minDCF(targets, scores)[0]
        worst["EER"] = max(worst["EER"], abs(metrics.equal_error_rate(curve) / 100 - theirs[0]))
        worst["minDCF"] = max(worst["minDCF"], abs(metrics.min_dcf(curve) - theirs[1]))
    return worst


def slots(slot_filling: ModuleType) -> dict[str, float]:
    """Slot F1 and CER of sentences with random damage."""
    draw = random.Random(0)
    truths, guesses = [], []
    for _ in range(400):
        tags = [tag for _ in range(draw.randint(1, 5)) for tag in [draw.choice(["O", "artist", "city"])] * 2]
        tokens = list(encode(["".join(draw.choices("ABC", k=3)) for _ in tags], tags))
        truths.append(decode(tokens))
        for _ in range(draw.randint(0, 4)):
            tokens[draw.randrange(len(tokens))] = draw.choice(["A", " ", "B-artist", "E-artist", "B-city", "E-city"])
        guesses.append(decode(tokens))
    pairs = [parse_slots(text) for text in guesses], [parse_slots(text) for text in truths]
    return {
        "slot F1": abs(metrics.slot_type_f1(*pairs) / 100 - slot_filling.slot_type_f1(guesses, truths)),
        "slot CER": abs(metrics.slot_value_cer(*pairs) / 100 - slot_filling.slot_value_cer(guesses, truths)),
    }


def verification(model: ModuleType, loss: ModuleType) -> dict[str, float]:
    """Loss, gradient and embeddings of the x-vector with AM-softmax over 7 speakers."""
    features, lengths = _features()
    theirs, softmax = model.SuperbXvector(WIDTH), loss.amsoftmax(512, 7, margin=0.4, scale=30)
    mine = XVector(WIDTH, [str(n) for n in range(7)])
    with torch.no_grad():
        mine.project.load_state_dict(theirs.projector.state_dict())
        for conv, layer in zip(mine.frames, theirs.tdnns.module, strict=True):
            weight = layer.kernel.weight.view(layer.output_size, layer.context_size, layer.input_size)
            conv.weight.copy_(weight.transpose(1, 2))
            conv.bias.copy_(layer.kernel.bias)
        mine.embed.load_state_dict(theirs.affine.linear1.state_dict())
        mine.discard.load_state_dict(theirs.affine.linear2.state_dict())
        mine.speakers.copy_(softmax.W)
    labels = torch.tensor([0, 3, 6, 2])
    batch = _batch(features, lengths, [(str(n),) for n in labels.tolist()])
    losses = softmax(theirs.train()(features, lengths), labels)[0], mine.train().loss(batch)
    gradients = [torch.autograd.grad(x, p)[0] for x, p in zip(losses, (softmax.W, mine.speakers), strict=True)]
    embeddings = theirs.eval()(features, lengths), torch.stack(mine.eval().predict(batch))
    return {
        "asv loss": float((losses[0] - losses[1]).detach().abs()),
        "asv gradient": float((gradients[0] - gradients[1]).abs().max()),
        "asv embedding": float((embeddings[0] - embeddings[1]).abs().max()),
    }


def diarization(rnn: ModuleType, pit: ModuleType) -> dict[str, float]:
    """Permutation-free loss, half of the recordings labelled in the other order."""
    features, lengths = _features()
    theirs, mine = rnn.SuperbDiarizationModel(WIDTH, 2, 1, 512), FrameActivity(WIDTH, 2)
    mine.recurrent.load_state_dict(theirs.rnn.state_dict())
    mine.classify.load_state_dict(theirs.linear.state_dict())
    frames = torch.zeros(len(LENGTHS), max(LENGTHS), 2)
    turns = [((0, 10), (6, 15)), ((3, 9), (9, 30)), ((0, 4), (2, 17)), ((5, 40), (0, 48))]
    for row, pair in zip(frames, turns, strict=True):
        for speaker, (start, end) in enumerate(pair):
            row[start:end, speaker] = 1
    frames[::2] = frames[::2].flip(2)
    labels = [tuple(Turn(a * 0.02, b * 0.02, who) for who, (a, b) in zip("pq", pair, strict=True)) for pair in turns]
    loss = pit.pit_loss(theirs(features, lengths)[0], frames, lengths)[0]
    return {"sd loss": float((loss - mine.loss(_batch(features, lengths, labels))).detach().abs())}


def warping() -> dict[str, float]:
    """Costs against dtw-python, called as s3prl's quesst14_dtw does."""
    import dtw
    from scipy.spatial import distance

    queries, documents = ([torch.randn(n, WIDTH) for n in sizes] for sizes in ((5, 12, 30, 7, 40), (50, 9, 4, 120)))
    prepared, worst = prepare_queries(queries), 0.0
    for document in documents:
        found = match_document(prepared, document)
        for query, score in zip(queries, found.tolist(), strict=True):
            cost = np.exp(distance.cdist(query.double(), document.double(), "cosine")) - 1
            low, high = cost.min(1)[:, None], cost.max(1)[:, None]
            path = dtw.dtw((cost - low) / (high - low), step_pattern="asymmetric", open_begin=True, open_end=True)
            worst = max(worst, abs(score + path.normalizedDistance))
    return {"qbe score": worst}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from make import import_s3prl

    torch.manual_seed(0)
    common, slot_filling, rnn, pit, model, loss = import_s3prl(
        "metric.common", "metric.slot_filling", "nn.rnn", "nn.pit", "nn.speaker_model", "nn.speaker_loss"
    )
    found = detection(common) | slots(slot_filling) | verification(model, loss) | diarization(rnn, pit) | warping()
    for name, value in found.items():
        print(f"{name:14s} {value:.2e}")
