"""A proxy on the bundled speech: small enough for minutes, too small for numbers that mean anything elsewhere.

28 utterances of 14 speakers, 4 minutes. It ranks upstreams that differ much; it is not SUPERB.
No proxy of sid: with one session a speaker, plain filter banks without normalisation tell the sessions apart.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from torch import Tensor

from armhubert.superb.heads import CTCLinear, frame_mask
from armhubert.superb.librispeech import read_subset
from armhubert.superb.task import (
    Batch,
    Corpus,
    Defaults,
    Item,
    Metric,
    Options,
    Part,
    Scores,
    Split,
    Task,
)
from armhubert.superb.tasks.pr import find_lexicon, phoneme_scores, read_lexicon


def bundled_speech() -> Path:
    """The folder of the bundled speech."""
    return Path(str(resources.files("armhubert"))) / "assets" / "speech"


class MiniPhonemes(Task):
    """pr on the bundled speech and its lexicon, in two folds: of each speaker's two utterances one trains."""

    name = "mini-pr"
    title = "Phonemes (proxy of pr)"
    data = "the bundled speech"
    metrics = (Metric("per", "PER", False),)
    defaults = Defaults(learning_rate=1e-3, batch=4, accumulate=1, steps=300, validate_every=25)
    folds = 2

    def read(self, root: Path, options: Options) -> Corpus:
        """Of the utterances that do not train, every third is dev and the others test."""
        lexicon = read_lexicon(find_lexicon(root, options))
        speakers: dict[str, list[Item]] = {}
        for utterance in read_subset(root)[0]:
            phones = tuple(phone for word in utterance.words for phone in lexicon[word])
            item = Item(utterance.key, (Part(str(utterance.path)),), phones)
            speakers.setdefault(utterance.speaker, []).append(item)
        train, held = ([items[(place + options.fold) % 2] for items in speakers.values()] for place in (0, 1))
        tokens = tuple(sorted({phone for item in train + held for phone in item.label}))
        test = [item for number, item in enumerate(held) if number % 3]
        splits = {"train": Split(tuple(train)), "dev": Split(tuple(held[::3])), "test": Split(tuple(test))}
        return Corpus(splits, (tokens,))

    def head(self, width: int, corpus: Corpus, settings: Defaults) -> "NormalizedCTC":
        """As pr's, over features that are normalised."""
        return NormalizedCTC(width, corpus.labels[0])

    def score(self, predictions: Sequence[Sequence[str]], split: Split, corpus: Corpus) -> Scores:
        """PER, and the errors by phone."""
        return phoneme_scores(predictions, split)


class NormalizedCTC(CTCLinear):
    """pr's head over features of mean 0 and deviation 1 within the utterance, as FBANK's are already.

    Without, the few steps of a proxy go into the scale of the features: of a student after its first minutes, whose
    features are a constant and small deviations from it, the head learns nothing at all.
    """

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, C]."""
        x, count = batch.features, batch.lengths[:, None, None]
        valid = frame_mask(batch.lengths, x.shape[1])[..., None]
        centered = (x - x.sum(1, keepdim=True) / count) * valid
        deviation = (centered.square().sum(1, keepdim=True) / count).sqrt()
        return super().logits(batch._replace(features=centered / (deviation + 1e-5)))
