"""Slot filling: Audio SNIPS, or JSON labels with slots; the transcript is recognised with slot tokens around values."""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from armhubert.data import discover
from armhubert.errors import ArmhubertError
from armhubert.superb import metrics
from armhubert.superb.heads import CTCRecurrent
from armhubert.superb.metrics import Slots
from armhubert.superb.slots import Labelled, read_json_slots, split_utterances
from armhubert.superb.task import (
    SPLITS,
    Corpus,
    Item,
    Metric,
    Options,
    Scores,
    Split,
    SplitName,
    Task,
    TrainingSettings,
    read_lines,
    unseen_tokens,
)

SNIPS_LIST = "all.iob.snips.txt"
SNIPS_SPEAKERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "dev": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
"""Synthetic voices by split, in SUPERB."""

_FOLDED = str.maketrans({"Æ": "A", "Ð": "D", "Ø": "O", '"': " ", "–": "-", "…": " "})


class SlotFilling(Task):
    """Items' labels are characters with `B-slot` and `E-slot` around values: `P L A Y _ B-artist B O B E-artist`."""

    name = "sf"
    title = "Slot filling"
    data = f"Audio SNIPS ({SNIPS_LIST}; train, valid, test), or label/label.json as for ic, with text for transcripts"
    folders = ("SNIPS", "audio_snips", "intents")
    whole = True
    metrics = (
        Metric("slot_f1", "Slot F1", True),
        Metric("slot_cer", "Slot CER", False),
        Metric("wer", "WER", False),
    )
    defaults = TrainingSettings(learning_rate=1e-4, batch=32, steps=200_000, validate_every=2_000, head_size=1024)

    def read(self, root: Path, options: Options) -> Corpus:
        """JSON labels without transcripts: the text to recognise is the slot values, in the order of the file."""
        splits, notes = _read_snips(root) if (root / SNIPS_LIST).is_file() else _read_json(root, options)
        for split in SPLITS:
            if not splits[split]:
                raise ArmhubertError(f"the {split} split has no utterances: check the data root and its lists")
            if not any(_opens(token) for item in splits[split] for token in item.label):
                raise ArmhubertError(f"no utterance of the {split} split fills a slot: check the labels")
        tokens = {split: {token for item in splits[split] for token in item.label} for split in SPLITS}
        for split in ("dev", "test"):
            if unseen := sorted(token[2:] for token in tokens[split] - tokens["train"] if _opens(token)):
                raise ArmhubertError(
                    f"{len(unseen)} slots of the {split} split are not in the training split "
                    f"({', '.join(unseen[:5])}): no head can learn them; correct the lists"
                )
        notes += unseen_tokens(splits, "characters")
        return Corpus(
            {split: Split(tuple(splits[split])) for split in SPLITS}, (tuple(sorted(tokens["train"])),), tuple(notes)
        )

    def head(self, width: int, corpus: Corpus, settings: TrainingSettings) -> CTCRecurrent:
        """As asr's, over characters and slot tokens."""
        return CTCRecurrent(width, corpus.labels[0], size=settings.head_size)

    def score(self, predictions: Sequence[Sequence[str]], split: Split, corpus: Corpus) -> Scores:
        """F1 of slot types, CER of slot values, WER of the text without slot tokens."""
        guesses = [decode(prediction) for prediction in predictions]
        truths = [decode(item.label) for item in split.items]
        slots = [[parse_slots(text) for text in texts] for texts in (guesses, truths)]
        wrong = [(item.key, t, g) for item, t, g in zip(split.items, truths, guesses, strict=True) if t != g]
        return Scores(
            {
                "slot_f1": metrics.slot_type_f1(*slots),
                "slot_cer": metrics.slot_value_cer(*slots),
                "wer": metrics.wer([plain(text) for text in guesses], [plain(text) for text in truths]),
            },
            examples=tuple(wrong[:20]),
        )


# ---- slot tokens -----------------------------------------------------------


def _opens(token: str) -> bool:
    return len(token) > 1 and token.startswith("B-")


def encode(words: Sequence[str], slots: Sequence[str]) -> tuple[str, ...]:
    """Words and the slot of each ("O": none) as tokens; neighbours of the same slot are one value."""
    tokens: list[str] = []
    for place, (word, slot) in enumerate(zip(words, slots, strict=True)):
        if place:
            tokens.append(" ")
        if slot != "O" and (place == 0 or slots[place - 1] != slot):
            tokens.append(f"B-{slot}")
        tokens += word
        if slot != "O" and (place == len(words) - 1 or slots[place + 1] != slot):
            tokens.append(f"E-{slot}")
    return tuple(tokens)


def decode(tokens: Sequence[str]) -> str:
    """Tokens as text, `PLAY B-artist BOB E-artist`."""
    text = "".join(
        f"{token} " if _opens(token) else f" {token}" if len(token) > 1 and token.startswith("E-") else token
        for token in tokens
    )
    return " ".join(text.split())


_VALUE = re.compile(r"B-(\S+) (.+?) E-\1")
_OPEN, _CLOSE = re.compile(r"B-\S+ "), re.compile(r" E-\S+")


def parse_slots(text: str) -> Slots:
    """Values of each slot in a decoded text; what is never closed is none, and tokens inside a value are dropped.

    As s3prl's `get_slot_dict`: a value also ends at the end of a slot whose name merely begins with this slot's.
    """
    found: dict[str, list[str]] = {}
    for slot, value in _VALUE.findall(text):
        found.setdefault(slot, []).append(plain(value))
    return found


def plain(text: str) -> str:
    """A decoded text without slot tokens."""
    return _CLOSE.sub("", _OPEN.sub("", text))


def normalize(word: str) -> str:
    """Upper case, without accents and the punctuation that nobody speaks; may be empty."""
    folded = unicodedata.normalize("NFKD", word.upper().translate(_FOLDED).replace("&", "AND"))
    kept = "".join(character for character in folded if not unicodedata.combining(character))
    return "" if kept.strip() in set("?!.,;-") else "".join(kept.split())


# ---- readers ---------------------------------------------------------------


def _read_snips(root: Path) -> tuple[dict[SplitName, list[Item]], list[str]]:
    labels = dict(_snips_labels(root / SNIPS_LIST))
    base = root.absolute()
    splits: dict[SplitName, list[Item]] = {split: [] for split in SPLITS}
    unlabelled = 0
    for split, speakers in SNIPS_SPEAKERS.items():
        folder = next(
            (base / name for name in (split, "valid" if split == "dev" else split) if (base / name).is_dir()), None
        )
        if folder is None:
            raise ArmhubertError(f"{root} has no folder {'valid' if split == 'dev' else split}: complete Audio SNIPS")
        for path in discover([folder]):
            if path.stem.split("-")[0] not in speakers:
                continue
            if path.stem in labels:
                splits[split].append(Item.of_file(path, base, labels[path.stem]))
            else:
                unlabelled += 1
    notes = [f"{unlabelled} recordings are not in {SNIPS_LIST} and are left out"] if unlabelled else []
    return splits, notes


def _snips_labels(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Read lines `Ivy-snips-train-0 BOS PLAY BOB EOS<tab>O O artist PlayMusic` into utterance and tokens."""
    for line in read_lines(path, "labels of Audio SNIPS"):
        spoken, _, tagged = line.partition("\t")
        name, *words = spoken.split()
        tags = tagged.split()
        if len(words) < 2 or len(words) != len(tags):
            raise ArmhubertError(
                f"{path}: every line must be `name BOS words EOS`, a tab and as many tags, the last the intent, "
                f"got {line[:60]!r}"
            )
        pairs = [
            (word, re.sub(r"^[BI]-", "", tag))
            for spelled, tag in zip(words[1:-1], tags[1:-1], strict=True)
            if (word := normalize(spelled))
        ]
        yield name, encode([word for word, _ in pairs], [tag for _, tag in pairs])


def _read_json(root: Path, options: Options) -> tuple[dict[SplitName, list[Item]], list[str]]:
    labelled, notes = read_json_slots(root, SNIPS_LIST)
    spoken = sum(utterance.text is not None for utterance in labelled)
    if 0 < spoken < len(labelled):
        raise ArmhubertError(
            f"{len(labelled) - spoken} of {len(labelled)} labels have no text: give the transcript of all, or of none"
        )
    if not spoken:
        notes.append(
            "no transcripts: the text to recognise is the slot values alone, in the order of the labels; figures "
            "compare upstreams with each other, not with published ones"
        )
    kept, lost = [], 0
    for utterance in labelled:
        tokens = _with_text(utterance) if spoken else _values_only(utterance)
        if tokens is None:
            lost += 1
        else:
            kept.append((utterance, tokens))
    if lost:
        notes.append(f"{lost} utterances left out: their transcript does not contain a slot value, or there is no slot")
    items = [Item.of_file(utterance.path, root.absolute(), tokens) for utterance, tokens in kept]
    slots = [{(0, token) for token in item.label if _opens(token)} for item in items]
    places, more = split_utterances([utterance for utterance, _ in kept], slots, options.seed)
    return {split: [items[place] for place in places[split]] for split in SPLITS}, notes + more


def _words(text: str) -> list[str]:
    return [word for part in text.split() if (word := normalize(part))]


def _unpunctuated(text: str) -> list[str]:
    return [word.rstrip("?!.,;") for word in _words(text)]


def _tag(slot: str) -> str:
    """A slot's name as a part of a token, which decoded text tells by its spaces."""
    return "_".join(slot.split())


def _values_only(utterance: Labelled) -> tuple[str, ...] | None:
    words: list[str] = []
    tags: list[str] = []
    for slot, value in utterance.slots.items():
        spelled = _words(value)
        words += spelled
        tags += [_tag(slot)] * len(spelled)
    return encode(words, tags) if words else None


def _with_text(utterance: Labelled) -> tuple[str, ...] | None:
    """The longest values are placed first, each at the first place in the transcript that is still free."""
    words = _unpunctuated(utterance.text or "")
    tags = ["O"] * len(words)
    for slot, value in sorted(utterance.slots.items(), key=lambda entry: -len(_words(entry[1]))):
        spelled = _unpunctuated(value)
        places = range(len(words) - len(spelled) + 1)
        fits = (
            p for p in places if words[p : p + len(spelled)] == spelled and set(tags[p : p + len(spelled)]) == {"O"}
        )
        first = next(fits, None)
        if not spelled or first is None:
            return None
        tags[first : first + len(spelled)] = [_tag(slot)] * len(spelled)
    return encode(words, tags) if words else None
