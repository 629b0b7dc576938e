"""A proxy on the bundled speech: small enough for minutes, too small for numbers that mean anything elsewhere.

No proxy of sid: with one session a speaker, plain filter banks without normalisation tell the sessions apart.
"""

from torch import Tensor

from armhubert.kernels.runtime import frame_mask
from armhubert.superb.heads import CTCLinear
from armhubert.superb.task import Batch, Corpus, TrainingSettings
from armhubert.superb.tasks.pr import PhonemeRecognition

RESOLUTION = 2.5
"""Points of PER: twice the deviation of a difference of two runs, 0.8 a run from the seed (a student and its teacher,
three seeds each) and 0.6 from the choice of test utterances (bootstrap). Filter banks depend more on the seed."""


class MiniPhonemes(PhonemeRecognition):
    """pr on the bundled speech, in settings for minutes."""

    name = "mini-pr"
    title = "Phonemes (proxy of pr)"
    data = "the bundled speech"
    defaults = TrainingSettings(learning_rate=3e-3, batch=4, accumulate=1, steps=800, validate_every=50)

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> "NormalizedCTC":
        """As pr's, over features that are normalised."""
        return NormalizedCTC(width, corpus.labels[0])


class NormalizedCTC(CTCLinear):
    """pr's head over features of mean 0 and deviation 1 within the utterance, as FBANK's are already.

    Of a student after its first minutes, whose features are a constant and small deviations from it, pr's own head
    learns nothing in so few steps: PER 100.
    """

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, C]."""
        x, count = batch.features, batch.lengths[:, None, None]
        valid = frame_mask(batch.lengths, x.shape[1])[..., None]
        centered = (x - x.sum(1, keepdim=True) / count) * valid
        deviation = (centered.square().sum(1, keepdim=True) / count).sqrt()
        return super().logits(batch._replace(features=centered / (deviation + 1e-5)))
