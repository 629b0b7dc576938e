"""SUPERB's heads, as s3prl builds them. Shapes: B utterances, T frames, D features, C classes or tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from armhubert.errors import ArmhubertError
from armhubert.kernels.runtime import frame_mask
from armhubert.packages import import_torchaudio
from armhubert.superb.task import Batch, Head

PROJECTION = 256


class WeightedSum(nn.Module):
    """Softmax-weighted sum of an upstream's layers, its weights learned with the head: s3prl's Featurizer.

    Args:
        count: L.
        normalize: normalise every frame of every layer first; not in SUPERB.
    """

    def __init__(self, count: int, normalize: bool = False) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(count))
        self.normalize = normalize

    def forward(self, layers: Tensor) -> Tensor:
        """[L, B, T, D] -> [B, T, D]."""
        if self.normalize:
            layers = F.layer_norm(layers, layers.shape[-1:])
        if len(layers) == 1:
            return layers[0]
        return torch.einsum("l,lbtd->btd", self.weights.softmax(0), layers)


class PooledClassifier(Head):
    """ks, sid, er, ic: linear to 256, mean over time, one linear map to all groups of classes; no non-linearity.

    Args:
        width: D.
        groups: names of the classes of each group; an item's label is a tuple with one of each.
    """

    def __init__(self, width: int, groups: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.groups = tuple(map(tuple, groups))
        self.place = [{label: number for number, label in enumerate(group)} for group in self.groups]
        self.project = nn.Linear(width, PROJECTION)
        self.classify = nn.Linear(PROJECTION, sum(map(len, self.groups)))

    def logits(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits of each group of classes, [B, C]."""
        x = self.project(batch.features)
        mask = frame_mask(batch.lengths, x.shape[1])[..., None]
        pooled = (x * mask).sum(1) / batch.lengths[:, None]
        return self.classify(pooled).split([len(group) for group in self.groups], dim=1)

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the groups' cross entropies."""
        losses = [
            F.cross_entropy(
                logits, torch.tensor([place[item.label[group]] for item in batch.items], device=logits.device)
            )
            for group, (logits, place) in enumerate(zip(self.logits(batch), self.place, strict=True))
        ]
        return torch.stack(losses).sum()

    def predict(self, batch: Batch) -> list[tuple[str, ...]]:
        """The most likely class of each group."""
        best = [logits.argmax(1).tolist() for logits in self.logits(batch)]
        return [tuple(group[i] for group, i in zip(self.groups, row, strict=True)) for row in zip(*best, strict=True)]


# ---- connectionist temporal classification ---------------------------------

SPECIAL = ("<blank>", "<end>", "<unknown>")
BLANK, END, UNKNOWN = 0, 1, 2
"""s3prl's tokenizers put these before the tokens, and end every target with END."""


class Beam(NamedTuple):
    """Beam search with a word language model, as s3prl's BeamDecoder sets it."""

    language_model: str
    """ARPA file."""
    words: tuple[str, ...]
    """The lexicon: every word as the model writes it, spelled by its characters in upper case."""
    size: int = 5
    threshold: float = 25.0
    weight: float = 2.0
    word_score: float = -1.0


class CTCHead(Head):
    """Loss and greedy decoding over tokens; a subclass gives `logits`. Labels are tuples of tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        super().__init__()
        self.tokens = (*SPECIAL, *tokens)
        self.place = {token: number for number, token in enumerate(self.tokens)}

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, C]."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """Loss of each utterance by its tokens, averaged; targets longer than the frames count 0 (s3prl)."""
        logits = self.logits(batch)
        targets = [torch.tensor([*(self.place.get(t, UNKNOWN) for t in item.label), END]) for item in batch.items]
        return F.ctc_loss(
            logits.log_softmax(2).transpose(0, 1),  # [T, B, C]
            pad_sequence(targets, batch_first=True).to(logits.device),
            batch.lengths,
            torch.tensor([len(target) for target in targets], device=logits.device),
            blank=BLANK,
            zero_infinity=True,
        )

    def predict(self, batch: Batch) -> list[Any]:
        """The tokens of the best path of each utterance."""
        best = self.logits(batch).argmax(2).cpu()
        return [self.collapse(row[:length]) for row, length in zip(best, batch.lengths.tolist(), strict=True)]

    def collapse(self, path: Tensor) -> list[str]:
        """Frames' best tokens [T] -> tokens: repeats and blanks go."""
        return [self.tokens[i] for i in path.unique_consecutive().tolist() if i > UNKNOWN]


class CTCLinear(CTCHead):
    """pr: linear to 256, linear to the tokens, for every frame; no non-linearity."""

    def __init__(self, width: int, tokens: Sequence[str]) -> None:
        super().__init__(tokens)
        self.project = nn.Linear(width, PROJECTION)
        self.classify = nn.Linear(PROJECTION, len(self.tokens))

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, C]."""
        return self.classify(self.project(batch.features))


class CTCRecurrent(CTCHead):
    """asr, sf: SpecAugment while training, linear to 1024, two bidirectional LSTMs, linear to the tokens.

    Args:
        width: D.
        tokens: characters, and slot tokens for sf.
        size: of the projection and of each LSTM's direction; SUPERB's is 1024.
        decoder: of `beam_decoder` over the same tokens, to search with a language model; None: the best path.
    """

    def __init__(self, width: int, tokens: Sequence[str], *, size: int, decoder: Any = None) -> None:
        super().__init__(tokens)
        self.project = nn.Linear(width, size)
        self.recurrent = nn.ModuleList(
            nn.LSTM(inputs, size, batch_first=True, bidirectional=True) for inputs in (size, 2 * size)
        )
        self.classify = nn.Linear(2 * size, len(self.tokens))
        self.decoder = decoder

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, C]."""
        x = batch.features
        if self.training:
            x = spec_augment(x, batch.lengths)
        x = self.project(x)
        for layer in self.recurrent:
            assert isinstance(layer, nn.LSTM)
            x = F.dropout(both_ways(layer, x, batch.lengths), 0.2, self.training)
        return self.classify(x)

    def predict(self, batch: Batch) -> list[Any]:
        """The characters of each utterance, greedily or by beam search."""
        if self.decoder is None:
            return super().predict(batch)
        hypotheses = self.decoder(self.logits(batch).log_softmax(2).float().cpu().contiguous(), batch.lengths.cpu())
        return [list(" ".join(best[0].words).upper()) if best else [] for best in hypotheses]


def both_ways(layer: nn.LSTM, x: Tensor, lengths: Tensor) -> Tensor:
    """A bidirectional LSTM over each utterance alone: [B, T, D], [B] -> [B, T, 2 x size], zero beyond the lengths.

    A GPU gets packed sequences. On a CPU their gradients take time that grows with the square of T; there the second
    direction reads utterances that were turned around within their lengths.
    """
    if x.device.type != "cpu":
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[1])[0]
    frames = torch.arange(x.shape[1])
    turned = torch.where(frames < lengths[:, None], lengths[:, None] - 1 - frames, frames)[..., None]  # its own inverse
    state = x.new_zeros(1, len(x), layer.hidden_size)
    ahead, back = (
        torch.lstm(inputs, (state, state), tuple(weights), True, 1, 0.0, layer.training, False, True)[0]
        for inputs, weights in zip((x, x.take_along_dim(turned, 1)), layer.all_weights, strict=True)
    )
    return torch.cat([ahead, back.take_along_dim(turned, 1)], 2) * frame_mask(lengths, x.shape[1])[..., None]


def beam_decoder(beam: Beam, tokens: Sequence[str]) -> Any:
    """torchaudio's CTC decoder (flashlight-text) over a head's characters, words spelled by `beam.words`.

    Raises:
        ArmhubertError: flashlight-text is not installed, cannot read the language model, or no word can be spelled.
    """
    import_torchaudio()
    try:
        from torchaudio.models.decoder import CTCDecoderLM, ctc_decoder  # noqa: F401 - the first fails without flashlight
    except (ImportError, RuntimeError):
        raise ArmhubertError(
            "beam search with a language model needs flashlight-text: pip install flashlight-text kenlm, "
            "or leave out language_model=..."
        ) from None
    import tempfile

    known = set(tokens)
    spelled = [f"{word} {' '.join(word.upper())} |" for word in beam.words if set(word.upper()) <= known]
    if not spelled:
        raise ArmhubertError(
            f"none of the {len(beam.words)} words of language model {beam.language_model} can be spelled with the "
            "characters of the training transcripts: give one of the data's language"
        )
    with tempfile.NamedTemporaryFile("w", suffix=".lexicon", encoding="utf-8") as lexicon:
        lexicon.write("\n".join(spelled) + "\n")
        lexicon.flush()
        try:
            return ctc_decoder(
                lexicon=lexicon.name,
                tokens=[*SPECIAL, *("|" if token == " " else token for token in tokens)],
                lm=beam.language_model,
                beam_size=beam.size,
                beam_threshold=beam.threshold,
                lm_weight=beam.weight,
                word_score=beam.word_score,
                blank_token=SPECIAL[BLANK],
                sil_token="|",
                unk_word=SPECIAL[UNKNOWN],
            )
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().rpartition("\n")[2]  # KenLM names its function first, in a long line
            raise ArmhubertError(f"language model {beam.language_model} cannot be used: {reason}") from None


# ---- SpecAugment -----------------------------------------------------------

WARP, FEATURE_MASKS, FEATURE_MASK_WIDTH, TIME_MASKS, TIME_MASK_WIDTH = 5, 4, 50, 2, 40


def spec_augment(x: Tensor, lengths: Tensor) -> Tensor:
    """SpecAugment (arXiv 1904.08779) with SUPERB's settings: each utterance is warped in time within 5 frames, then
    4 bands of up to 50 features and 2 spans of up to 40 frames are zeroed.

    Draws from torch's default generator, in s3prl's order. [B, T, D], [B] -> [B, T, D], zero beyond the lengths.
    """
    warped = torch.zeros_like(x)
    for row, length in enumerate(lengths.tolist()):  # by index: autograd refuses writes to rows of an iteration
        warped[row, :length] = _time_warp(x[row, :length])
    for dim, count, width in ((2, FEATURE_MASKS, FEATURE_MASK_WIDTH), (1, TIME_MASKS, TIME_MASK_WIDTH)):
        warped = warped.masked_fill(_spans(len(x), x.shape[dim], count, width, x.device).unsqueeze(3 - dim), 0.0)
    return warped * frame_mask(lengths, x.shape[1])[..., None]


def _time_warp(x: Tensor) -> Tensor:
    """[T, D]: the frames before a random centre are stretched or squeezed to end up to 5 frames away from it."""
    frames = len(x)
    if frames <= 2 * WARP:
        return x
    center = int(torch.randint(WARP, frames - WARP, (1,)))
    moved = int(torch.randint(center - WARP, center + WARP, (1,))) + 1
    parts = ((x[:center], moved), (x[center:], frames - moved))
    return torch.cat([F.interpolate(p[None, None], (n, x.shape[1]), mode="bicubic")[0, 0] for p, n in parts])


def _spans(batch: int, size: int, count: int, width: int, device: torch.device) -> Tensor:
    """[B, size] bool, true in `count` random spans of up to `width` in each row."""
    length = torch.randint(0, width + 1, (batch, count), device=device).unsqueeze(2)
    start = torch.randint(0, max(1, size - int(length.max())), (batch, count), device=device).unsqueeze(2)
    place = torch.arange(size, device=device)
    return ((start <= place) & (place < start + length)).any(1)
