"""Speech recognition: LibriSpeech, characters by CTC; greedy, or beam search with a language model on request."""

import gzip
from collections.abc import Sequence
from pathlib import Path

from armhubert.errors import ArmhubertError
from armhubert.superb import metrics
from armhubert.superb.heads import Beam, CTCRecurrent, beam_decoder
from armhubert.superb.librispeech import choose_subsets, hold_out_utterances, read_splits
from armhubert.superb.task import (
    Corpus,
    Item,
    Metric,
    Options,
    Part,
    Scores,
    Split,
    Task,
    TrainingSettings,
    unseen_tokens,
)

EXAMPLES = 10


class SpeechRecognition(Task):
    """Characters of the transcripts; the space is a character like the others."""

    name = "asr"
    title = "Speech recognition"
    data = "LibriSpeech"
    folders = ("LibriSpeech",)
    reads = ("train", "dev", "test", "language_model")
    whole = True
    metrics = (Metric("wer", "WER", False), Metric("cer", "CER", False))
    defaults = TrainingSettings(learning_rate=1e-4, batch=32, steps=200_000, validate_every=2_000, head_size=1024)

    def read(self, root: Path, options: Options) -> Corpus:
        """LibriSpeech's subsets."""
        folders, notes = choose_subsets(root, options)
        read, left_out = read_splits(folders)
        read, held = hold_out_utterances(read)
        items = {
            split: tuple(Item(u.key, (Part(str(u.path)),), tuple(" ".join(u.words).upper())) for u in utterances)
            for split, utterances in read.items()
        }
        tokens = tuple(sorted({character for item in items["train"] for character in item.label}))
        decoder = None
        if options.language_model is not None:
            decoder = beam_decoder(Beam(options.language_model, arpa_words(Path(options.language_model))), tokens)
        notes += left_out + held + unseen_tokens(items, "characters")
        return Corpus({split: Split(found) for split, found in items.items()}, (tokens,), tuple(notes), decoder)

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> CTCRecurrent:
        """Linear to 1024, two bidirectional LSTMs of 1024, linear to the characters; SpecAugment while training."""
        return CTCRecurrent(width, corpus.labels[0], size=settings.head_size, decoder=corpus.extra)

    def score(self, predictions: Sequence[Sequence[str]], split: Split, corpus: Corpus) -> Scores:
        """WER and CER."""
        hypotheses = ["".join(prediction).strip() for prediction in predictions]
        references = ["".join(item.label) for item in split.items]
        return Scores(
            {"wer": metrics.wer(hypotheses, references), "cer": metrics.cer(hypotheses, references)},
            examples=tuple(
                (item.key, reference, hypothesis)
                for item, reference, hypothesis in zip(split.items[:EXAMPLES], references, hypotheses, strict=False)
            ),
        )


def arpa_words(path: Path) -> tuple[str, ...]:
    """The words of an ARPA language model (plain or gzipped): its unigrams, as it writes them.

    Raises:
        ArmhubertError: no such file, or not an ARPA file; a binary model does not tell its words.
    """
    words = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            inside = False
            for line in file:
                if line.startswith("\\"):
                    if inside:
                        break
                    inside = line.strip() == "\\1-grams:"
                elif inside and line.strip():
                    words.append(line.split()[1])
    except (OSError, UnicodeDecodeError, IndexError, EOFError) as error:
        raise ArmhubertError(
            f"language model {path} cannot be read ({error}): give an ARPA file, plain or .gz, as of openslr.org/11"
        ) from None
    if not words:
        raise ArmhubertError(f"language model {path} must be an ARPA file with unigrams, plain or .gz")
    return tuple(sorted({word for word in words if not word.startswith("<")}))
