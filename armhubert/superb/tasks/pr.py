"""Phoneme recognition: LibriSpeech with a pronunciation lexicon; TIMIT's hand labels as a further test set."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from armhubert.errors import ArmhubertError
from armhubert.superb import metrics
from armhubert.superb.g2p import pronounce
from armhubert.superb.heads import CTCLinear
from armhubert.superb.librispeech import Transcribed, choose_subsets, hold_out_utterances, read_splits
from armhubert.superb.task import (
    SPLITS,
    Corpus,
    Item,
    Metric,
    Options,
    Part,
    Scores,
    Split,
    SplitName,
    Task,
    TrainingSettings,
    read_lines,
    unseen_tokens,
)
from armhubert.superb.timit import fold, is_timit, read_timit

LEXICONS = ("lexicon.txt", "librispeech-lexicon.txt", "librispeech-lexicon-200k-g2p.txt")
EXAMPLES = 10
LISTED = 50
"""Words outside the lexicon that are named."""


class PhonemeRecognition(Task):
    """Phones of the lexicon's first pronunciation of every word, with stress where the lexicon marks it, by CTC."""

    name = "pr"
    title = "Phoneme recognition"
    data = "LibriSpeech with lexicon.txt (WORD, tab or space, phones) beside it"
    folders = ("LibriSpeech",)
    reads = ("lexicon", "g2p", "train", "dev", "test")
    whole = True
    metrics = (Metric("per", "PER", False),)
    defaults = TrainingSettings(learning_rate=1e-2, batch=16, accumulate=2, steps=100_000, validate_every=1_000)

    def read(self, root: Path, options: Options) -> Corpus:
        """LibriSpeech's subsets; a test subset with `.phn` files is read as TIMIT."""
        folders, notes = choose_subsets(root, options)
        timit = {
            split: paths[0] for split, paths in folders.items() if split[:4] == "test" and any(map(is_timit, paths))
        }
        lexicon = read_lexicon(find_lexicon(root, options))
        speech, left_out = read_splits({split: paths for split, paths in folders.items() if split not in timit})
        speech, held = hold_out_utterances(speech, [split for split in ("dev", "test") if split not in timit])
        notes += left_out + held
        if options.g2p:
            notes += _add_machine_pronunciations(lexicon, speech)
        items: dict[SplitName, list[Item]] = {split: [] for split in folders}
        missing: Counter[str] = Counter()
        for split, utterances in speech.items():
            for utterance in utterances:
                unknown = [word for word in utterance.words if word.upper() not in lexicon]
                missing.update(unknown)
                if not unknown:
                    phones = tuple(phone for word in utterance.words for phone in lexicon[word.upper()])
                    items[split].append(Item(utterance.key, (Part(str(utterance.path)),), phones))
        for split, path in timit.items():
            items[split] = [Item.of_file(audio, path, phones) for audio, phones in read_timit(path)]
            notes.append(
                f"{split} is TIMIT's hand labels; they and what is recognised there are folded to 39 phones without "
                "stress, closures and pauses"
            )
        _check_lexicon(missing, items, notes, options)
        notes += unseen_tokens({split: found for split, found in items.items() if split not in timit}, "phones")
        folded = [item._replace(label=fold(item.label)) for item in items["train"]]
        notes += unseen_tokens({"train": folded, **{split: items[split] for split in timit}}, "phones")
        tokens = tuple(sorted({phone for item in items["train"] for phone in item.label}))
        splits = {split: Split(tuple(found)) for split, found in items.items()}
        return Corpus(splits, (tokens,), tuple(notes), extra=frozenset(timit))

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> CTCLinear:
        """Linear to 256, linear to the phones."""
        return CTCLinear(width, corpus.labels[0])

    def score(self, predictions: Sequence[Sequence[str]], split: Split, corpus: Corpus) -> Scores:
        """PER, the errors by phone, and some transcripts; against TIMIT's hand labels, of folded predictions."""
        if any(split is corpus.splits[name] for name in corpus.extra or ()):
            predictions = [fold(prediction) for prediction in predictions]
        references = [item.label for item in split.items]
        return Scores(
            {"per": metrics.error_rate(predictions, references)},
            by_label=metrics.errors_by_token(predictions, references),
            examples=tuple(
                (item.key, " ".join(item.label), " ".join(prediction))
                for item, prediction in zip(split.items[:EXAMPLES], predictions, strict=False)
            ),
        )


def find_lexicon(root: Path, options: Options) -> Path:
    """The lexicon that was named, or the one beside the data."""
    if options.lexicon is not None:
        return Path(options.lexicon)
    for folder in (root, root.parent):
        for name in LEXICONS:
            if (folder / name).is_file():
                return folder / name
    raise ArmhubertError(
        f"no lexicon beside {root}: put lexicon.txt there (WORD, tab, phones), such as openslr.org/11's "
        "librispeech-lexicon.txt, or name one with lexicon=..."
    )


def read_lexicon(path: Path) -> dict[str, tuple[str, ...]]:
    """Upper-case word -> phones of its first pronunciation, with the stress marks of vowels (AH0) that it may have.

    CMUdict's comments (lines of `;;;`, and what follows ` # `) are none, nor are the probabilities (0.99) that Kaldi's
    lexiconp.txt and MFA's dictionaries have between word and phones.
    """
    lexicon: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(read_lines(path, "lexicon"), start=1):
        if line.startswith(";;;"):
            continue
        word, *phones = line.partition(" # ")[0].split()
        phones = [phone for phone in phones if not re.fullmatch(r"\d+\.\d+", phone)]
        if not phones:
            raise ArmhubertError(f"{path}:{number}: a word must be followed by its phones, got {line[:60]!r}")
        word = re.sub(r"\(\d+\)$", "", word).upper()  # CMUdict numbers further pronunciations
        lexicon.setdefault(word, tuple(phone.upper() for phone in phones))
    if not lexicon:
        raise ArmhubertError(f"lexicon {path} is empty: it needs lines of a word and its phones")
    return lexicon


def _add_machine_pronunciations(
    lexicon: dict[str, tuple[str, ...]], speech: Mapping[SplitName, Sequence[Transcribed]]
) -> list[str]:
    """Put into the lexicon what G2P makes of the words that it lacks; notes."""
    words = {word.upper() for utterances in speech.values() for utterance in utterances for word in utterance.words}
    unknown = sorted(words - lexicon.keys())
    if not unknown:
        return []
    known = {phone for phones in lexicon.values() for phone in phones}
    made, source = pronounce(unknown, stress=any(phone[-1].isdigit() for phone in known))
    plain = {phone.rstrip("012") for phone in known}
    made = {word: phones for word, phones in made.items() if plain.issuperset(phone.rstrip("012") for phone in phones)}
    lexicon |= made
    some = "; ".join(f"{word} {' '.join(phones)}" for word, phones in list(made.items())[:LISTED])
    return [f"{len(made)} words outside the lexicon have machine pronunciations by {source} ({some})"] if made else []


def _check_lexicon(
    missing: Counter[str], items: dict[SplitName, list[Item]], notes: list[str], options: Options
) -> None:
    if not missing:
        return
    some = ", ".join(word for word, _ in missing.most_common(LISTED)) + (", ..." if len(missing) > LISTED else "")
    remedy = (
        "which g2p=True cannot read in the lexicon's phones" if options.g2p else "or let g2p=True make pronunciations"
    )
    for split in SPLITS:
        if split in items and not items[split]:
            raise ArmhubertError(
                f"every {split} utterance has words outside the lexicon ({len(missing)} words: {some}): "
                f"give a lexicon of this data with lexicon=..., {remedy}"
            )
    notes.append(
        f"{len(missing)} words are outside the lexicon ({some}): their utterances are left out; "
        f"add pronunciations to the lexicon, {remedy}"
    )
