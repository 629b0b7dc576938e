"""From what a user calls data to batches: find the files, scan them once, plan an epoch, read it in order.

    discover(sources)              -> paths
    scan(paths)                    -> Scan(utterances, skipped)      every file decoded once, cached
    plan_epoch(utterances)         -> [[Crop, ...], ...]             pure: every process computes the same plan
    batches(utterances, plan)      -> AudioBatch, AudioBatch, ...    read ahead by worker processes

Nothing here touches a global random state, and nothing is written but the two files a caller names.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from armhubert.audio import AUDIO_SUFFIXES, measure, read_audio
from armhubert.config import SAMPLE_RATE
from armhubert.errors import ArmhubertError, brief
from armhubert.files import write_atomic

SCAN_CACHE = ".armhubert-scan.json"
"""What runs call the cache of their scan, in their folder."""

SCAN_THREADS = min(32, 4 * (os.cpu_count() or 1))
"""Files examined at a time: more than there are processors, since a network drive lets each wait."""
SCAN_SAVED_EVERY = 300.0
"""Seconds after which a scan that goes on saves what it has."""
RETRY_AFTER = (0.5, 2.0)
"""Seconds after which a file that could not be read is tried again: network drives have moments."""

_PATH_COLUMNS = ("audio_filepath", "path", "audio")
_SOURCES = f"a folder, a .tsv or .jsonl manifest, or an audio file ({', '.join(sorted(AUDIO_SUFFIXES))})"


# ---------------------------------------------------------------------------------------------------------- discover


def discover(sources: Sequence[str | Path]) -> list[Path]:
    """Audio files of folders (recursive, sorted), manifests and single files, as absolute paths, each file once.

    A manifest is a .jsonl with `audio_filepath`, `path` or `audio` in every line, a .tsv with such a column, or a .tsv
    whose first line is a folder and whose other lines are `relative path<TAB>frames`. Its paths are relative to the
    manifest (or to that folder), and are not looked up here: `scan` lists those that are missing. Hidden files and
    folders are left out. Raises ArmhubertError for a source that is missing, holds no audio, or has a malformed line.
    """
    if not sources:
        raise ArmhubertError(f"data must be given: name {_SOURCES}")
    paths = [path for source in map(Path, sources) for path in _discover_one(source.absolute())]
    found: dict[str, Path] = {}
    for real, path in zip(_resolved(map(str, paths)), paths, strict=True):
        found.setdefault(real, path)
    return list(found.values())


def _resolved(paths: Iterable[str]) -> Iterator[str]:
    """The real names of files. Each folder is resolved once: it costs a system call for each of its parts."""
    folders: dict[str, str] = {}
    for path in paths:
        parent, name = os.path.split(path)
        real = folders.get(parent) or folders.setdefault(parent, os.path.realpath(parent))
        yield os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)


def _discover_one(source: Path) -> list[Path]:
    suffix = source.suffix.lower()
    if source.is_dir():
        paths = _walk(source)
        if not paths:
            raise ArmhubertError(
                f"folder {str(source)!r} holds no audio: it needs files ending in {', '.join(sorted(AUDIO_SUFFIXES))}"
            )
        return paths
    if not source.exists():
        raise ArmhubertError(f"data source {str(source)!r} does not exist: name {_SOURCES}")
    if suffix in AUDIO_SUFFIXES:
        return [source]
    if suffix not in (".tsv", ".jsonl"):
        raise ArmhubertError(f"data source {str(source)!r} is of no known kind: name {_SOURCES}")
    paths = list(_read_tsv(source) if suffix == ".tsv" else _read_jsonl(source))
    if not paths:
        raise ArmhubertError(f"manifest {str(source)!r} lists no audio: it needs at least one entry")
    return paths


def _walk(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise ArmhubertError(
            f"folder {error.filename!r} cannot be listed ({error.strerror}): make it readable, or name other folders"
        )

    found: list[str] = []
    entered: set[str] = set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in entered:  # a link to a folder above would never end
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(root, name)
            for name in files
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith(".")
        ]
    return [Path(path) for path in sorted(found)]


def _lines(manifest: Path) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ArmhubertError(
            f"manifest {str(manifest)!r} cannot be read ({error}): it must be a UTF-8 text file"
        ) from None
    # Not splitlines(): it also breaks at characters that file names and transcripts may contain.
    return [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _entry(manifest: Path, number: int, folder: Path, value: object) -> Path:
    try:
        sound = isinstance(value, str) and bool(value.strip()) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half a character, as JSON can write it
        sound = False
    if not sound:
        raise ArmhubertError(
            f"{manifest}:{number}: the path must be a text that is not empty, not {value!r}: correct it"
        )
    return folder / str(value)


def _read_jsonl(manifest: Path) -> Iterator[Path]:
    for number, line in _lines(manifest):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ArmhubertError(
                f"{manifest}:{number}: every line must be a JSON object ({error}): correct it"
            ) from None
        key = next((key for key in _PATH_COLUMNS if isinstance(row, dict) and key in row), None)
        if key is None:
            raise ArmhubertError(
                f"{manifest}:{number}: every line must be a JSON object with {', '.join(_PATH_COLUMNS[:-1])} or "
                f"{_PATH_COLUMNS[-1]}, not {line[:60]!r}: correct it"
            )
        yield _entry(manifest, number, manifest.parent, row[key])


def _read_tsv(manifest: Path) -> Iterator[Path]:
    lines = _lines(manifest)
    if not lines:
        return
    (first, head), rows = lines[0], lines[1:]
    columns = [name.strip() for name in head.split("\t")]
    key = next((name for name in _PATH_COLUMNS if name in columns), None)
    if key is not None:
        for number, line in rows:
            values = line.split("\t")
            if len(values) != len(columns):
                raise ArmhubertError(
                    f"{manifest}:{number}: every line must have the {len(columns)} columns of the header, "
                    f"not {len(values)}: separate them by one tab"
                )
            yield _entry(manifest, number, manifest.parent, values[columns.index(key)].strip())
        return
    folder = manifest.parent / head.strip()
    if len(columns) > 1 or not folder.is_dir():
        raise ArmhubertError(
            f"{manifest}:{first}: the first line must be an existing folder or a header with a column named "
            f"{', '.join(_PATH_COLUMNS[:-1])} or {_PATH_COLUMNS[-1]}, not {head[:60]!r}: correct it"
        )
    for number, line in rows:
        name, tab, frames = line.rstrip().rpartition("\t")
        if not tab or not frames.isdecimal():
            raise ArmhubertError(
                f"{manifest}:{number}: every line must be a relative path, a tab and a count of frames, "
                f"not {line[:60]!r}: correct it"
            )
        yield _entry(manifest, number, folder, name)


# -------------------------------------------------------------------------------------------------------------- scan


class Utterance(NamedTuple):
    """One readable file."""

    path: str
    """Absolute."""
    samples: int
    """Exact length at 16 kHz, as decoded and resampled."""


class Skipped(NamedTuple):
    """One file that is left out of training."""

    path: str
    reason: str
    """"missing", "empty", "silent", "not finite", "unreadable: <why>", "too short: N samples, at least M" or, where
    it is in the held-out speech as well, "held out"."""


@dataclass(frozen=True)
class Scan:
    """What a data set consists of."""

    utterances: tuple[Utterance, ...]
    """What can be used, in the order of the paths."""
    skipped: tuple[Skipped, ...]
    """What cannot, in the order of the paths; what is held out of it, last."""

    @property
    def seconds(self) -> float:
        """Amount of usable audio."""
        return sum(utterance.samples for utterance in self.utterances) / SAMPLE_RATE

    @property
    def skipped_by_kind(self) -> dict[str, int]:
        """Skipped files counted by kind ("silent", "too short", ...), the most frequent first."""
        return count_by_kind(self.skipped)

    def require_utterances(self, report: Path | None = None, *, what: str = "data") -> None:
        """Raise ArmhubertError where every file of `what` was skipped; `write_skipped` has listed them in `report`."""
        if not self.utterances:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.skipped_by_kind.items()) or "there were none"
            first = f", first {str(self.skipped[0].path)!r}" if self.skipped else ""
            where = f"; see {str(report)!r}" if report else ""
            raise ArmhubertError(
                f"{what} must hold usable audio, got {len(self.skipped)} files of which none can be used "
                f"({kinds}{first}): name others{where}"
            )


def count_by_kind(skipped: Sequence[Skipped]) -> dict[str, int]:
    """Skipped files counted by kind ("silent", "too short", ...), the most frequent first."""
    return dict(Counter(file.reason.partition(":")[0] for file in skipped).most_common())


class Scanning(NamedTuple):
    """Files examined so far."""

    done: int
    total: int


class _Record(NamedTuple):
    """What the cache knows about a file, valid while its size and time of change stay the same."""

    size: int
    mtime_ns: int
    samples: int
    defect: str


_CACHE_FORMAT = "armhubert scan 1"  # raise the number when decoding or measuring changes
_CHUNK = 16  # files a task: enough to hide what a task costs, few enough for a lively progress bar


def scan(
    paths: Sequence[str | Path],
    *,
    min_samples: int,
    cache: Path | None,
) -> Generator[Scanning, None, Scan]:
    """Decode every file once, so that broken, silent and short files are found before training and not in its midst.

    `min_samples` counts at 16 kHz. Threads share the work (decoding releases the interpreter lock; processes were
    measured to be no faster). `cache` is a JSON file to read and to update; what is not a cache of ours is replaced; a
    scan saves what it has every few minutes, and where it is interrupted. Yields its progress and returns the result.
    Raises ArmhubertError where the cache cannot be written. A result without utterances is the caller's to report
    (`Scan.require_utterances`).
    """
    names = [str(Path(path).absolute()) for path in paths]
    known = _load_cache(cache)
    records: dict[str, _Record] = {}
    fresh = 0
    executor = ThreadPoolExecutor(SCAN_THREADS, thread_name_prefix="scan")
    saved = time.monotonic()
    try:
        tasks = [
            executor.submit(_examine, names[start : start + _CHUNK], known) for start in range(0, len(names), _CHUNK)
        ]
        done = 0
        for task in as_completed(tasks):
            for name, record in task.result():
                records[name] = record
                fresh += record is not known.get(name) and not _transient(record)
                done += 1
            if time.monotonic() - saved > SCAN_SAVED_EVERY:
                _save_cache(cache, known, records, fresh)
                saved = time.monotonic()
            yield Scanning(done, len(names))
    except BaseException:
        executor.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(ArmhubertError):
            _save_cache(cache, known, records, fresh)
        raise
    executor.shutdown()
    _save_cache(cache, known, records, fresh)

    utterances, skipped = [], []
    for name in names:
        record = records[name]
        if record.defect:
            skipped.append(Skipped(name, record.defect))
        elif record.samples < min_samples:
            skipped.append(Skipped(name, f"too short: {record.samples} samples, at least {min_samples}"))
        else:
            utterances.append(Utterance(name, record.samples))
    return Scan(tuple(utterances), tuple(skipped))


def leave_out(found: Scan, held: Scan) -> Scan:
    """`found` without the utterances that `held` has too; these, and `held`'s skipped files, are listed as skipped."""
    files = set(_resolved(utterance.path for utterance in held.utterances))
    kept, skipped = [], [*found.skipped, *held.skipped]
    resolved = _resolved(utterance.path for utterance in found.utterances)
    for utterance, real in zip(found.utterances, resolved, strict=True):
        if real in files:
            skipped.append(Skipped(utterance.path, "held out"))
        else:
            kept.append(utterance)
    return Scan(tuple(kept), tuple(dict.fromkeys(skipped)))


def write_skipped(skipped: Sequence[Skipped], path: Path) -> None:
    """Write `path<TAB>reason` under a header, one line a skipped file, atomically; without any, the header alone."""
    escape = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
    rows = ["path\treason", *(f"{row.path.translate(escape)}\t{row.reason.translate(escape)}" for row in skipped)]
    write_atomic(path, "\n".join(rows) + "\n")


def _examine(names: Sequence[str], known: Mapping[str, _Record]) -> list[tuple[str, _Record]]:
    records = []
    for name in names:
        try:
            status = os.stat(name)
            size, mtime_ns = status.st_size, status.st_mtime_ns
        except OSError:
            size, mtime_ns = -1, -1  # measure() says what is wrong
        record = known.get(name)
        if record is None or (record.size, record.mtime_ns) != (size, mtime_ns):
            record = _Record(size, mtime_ns, *measure(name))
        records.append((name, record))
    return records


def _transient(record: _Record) -> bool:
    """Whether the defect may go while size and time stay: permissions, a network drive, a new decoder."""
    return record.defect.startswith(("missing", "unreadable"))


def _load_cache(cache: Path | None) -> dict[str, _Record]:
    if cache is None:
        return {}
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        if content["format"] != _CACHE_FORMAT:
            return {}
        records = {name: _Record(*row) for name, row in content["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    sound = all(
        type(value) is kind
        for record in records.values()
        for value, kind in zip(record, (int, int, int, str), strict=True)
    )
    return records if sound else {}


def _save_cache(cache: Path | None, known: Mapping[str, _Record], records: Mapping[str, _Record], fresh: int) -> None:
    if cache is None or not fresh:
        return
    # Files of other scans stay: training and validation data may share a cache.
    files = {**known, **{name: record for name, record in records.items() if not _transient(record)}}
    write_atomic(cache, json.dumps({"format": _CACHE_FORMAT, "files": files}))


# -------------------------------------------------------------------------------------------------------------- plan


class Crop(NamedTuple):
    """A part of an utterance, in samples at 16 kHz."""

    utterance: int
    """Index into the utterances that were planned."""
    start: int
    samples: int


_LENGTH_NOISE = 0.025  # lengths are sorted after a change of up to this share: other neighbours in every epoch


def plan_epoch(
    utterances: Sequence[Utterance],
    *,
    batch_seconds: float,
    max_seconds: float | None,
    seed: int,
    epoch: int,
    shuffle: bool = True,
) -> list[list[Crop]]:
    """One epoch: every utterance once, cut to `max_seconds` (None: whole), in batches of similar length.

    A batch, padded to its longest, holds at most `batch_seconds` of audio, or one utterance alone that is longer. The
    plan is a function of the arguments, the same on every process and machine; where an utterance is cut depends on
    (seed, epoch, its index) and not on its batch. With `shuffle`, neighbours and the order of batches change with seed
    and epoch; without, batches go from the longest to the shortest. Raises ArmhubertError without utterances and for
    lengths that are not positive.
    """
    if not utterances:
        raise ArmhubertError("a data set must have at least one usable utterance: name other data")
    limit = None if max_seconds is None else _to_samples("max_seconds", max_seconds)
    budget = _to_samples("batch_seconds", batch_seconds)
    samples = np.fromiter((utterance.samples for utterance in utterances), np.int64, len(utterances))
    counts = samples if limit is None else np.minimum(samples, limit)
    starts = (_uniform(seed, epoch, "start", len(samples)) * (samples - counts + 1)).astype(np.int64)
    keys = counts.astype(np.float64)
    if shuffle:
        keys *= 1 + _LENGTH_NOISE * (2 * _uniform(seed, epoch, "neighbours", len(samples)) - 1)
    order = np.argsort(-keys, kind="stable")

    rows = zip(order.tolist(), starts[order].tolist(), counts[order].tolist(), strict=True)
    plan = pack(map(Crop._make, rows), budget)
    if shuffle:
        plan = [plan[place] for place in np.argsort(_uniform(seed, epoch, "order", len(plan)), kind="stable").tolist()]
    return plan


def pack(crops: Iterable[Crop], budget: int) -> list[list[Crop]]:
    """Batches of crops in their order: padded, of at most `budget` samples, or of one crop alone that is longer."""
    plan: list[list[Crop]] = []
    longest = 0
    for crop in crops:
        longest = max(longest, crop.samples)
        if not plan or longest * (len(plan[-1]) + 1) > budget:
            plan.append([])
            longest = crop.samples
        plan[-1].append(crop)
    return plan


def plan_by_length(utterances: Sequence[Utterance], batch_seconds: float) -> list[list[Crop]]:
    """Every utterance once, whole, in batches of similar length from the longest to the shortest; none of none."""
    if not utterances:
        return []
    return plan_epoch(utterances, batch_seconds=batch_seconds, max_seconds=None, seed=0, epoch=0, shuffle=False)


def padding_waste(plan: Sequence[Sequence[Crop]]) -> float:
    """Share of a plan's samples that are padding, from 0 to 1."""
    padded = sum(len(batch) * max(crop.samples for crop in batch) for batch in plan)
    return 1 - sum(crop.samples for batch in plan for crop in batch) / padded if padded else 0.0


def split_validation(
    utterances: Sequence[Utterance], *, fraction: float, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """(training, validation): hold out utterances until they last `fraction` of all; at least one each.

    Which ones depends on the seed and the names of the files without folder and suffix, so neither their order nor a
    move changes it. The order is kept in both parts. Raises ArmhubertError where there are fewer than two utterances,
    and for a fraction that is not between 0 and 1.
    """
    if len(utterances) < 2:
        raise ArmhubertError(
            f"holding out validation data needs at least 2 usable utterances, not {len(utterances)}: "
            "give validation data, or turn validation off"
        )
    if not 0 < fraction < 1:
        raise ArmhubertError(f"the validation fraction must be between 0 and 1, not {fraction}: 0.01 is common")
    target = fraction * sum(utterance.samples for utterance in utterances)

    def rank(index: int) -> tuple[bytes, str]:
        path = utterances[index].path
        name = f"{seed}:{os.path.splitext(os.path.basename(path))[0]}".encode(errors="surrogateescape")
        return hashlib.blake2b(name, digest_size=16).digest(), path

    held: set[int] = set()
    total = 0
    for index in sorted(range(len(utterances)), key=rank)[:-1]:
        if total >= target:
            break
        held.add(index)
        total += utterances[index].samples
    training = [utterance for index, utterance in enumerate(utterances) if index not in held]
    return training, [utterances[index] for index in sorted(held)]


def _to_samples(name: str, seconds: float) -> int:
    samples = min(seconds * SAMPLE_RATE, 2.0**53)
    if not samples >= 1:  # also NaN
        raise ArmhubertError(f"{name} must be at least {1 / SAMPLE_RATE}, not {seconds}: give a positive number")
    return int(samples)


def _uniform(seed: int, epoch: int, purpose: str, size: int) -> NDArray[np.float64]:
    """[size] numbers in [0, 1), the i-th a function of (seed, epoch, purpose, i) alone: SplitMix64, its key hashed."""
    digest = hashlib.blake2b(f"{seed}:{epoch}:{purpose}".encode(), digest_size=8).digest()
    state = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(int.from_bytes(digest, "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    numbers: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


# ----------------------------------------------------------------------------------------------------------- batches


class AudioBatch(NamedTuple):
    """Utterances, or parts of them, padded to one length."""

    waveforms: Tensor
    """float32 [B, S] at 16 kHz, zero beyond each length."""
    lengths: Tensor
    """int64 [B], in samples."""
    indices: Tensor
    """int64 [B], into the utterances that were planned."""
    left_out: Sequence[str] = ()
    """What is wrong with utterances that were planned and could not be read."""


MAX_WORKERS = 256
"""Reading processes, each of hundreds of megabytes: a slip of the keyboard would take the machine down."""


class ReaderDied(ArmhubertError):
    """A process that reads audio is gone."""


_MAIN_GUARD = 'if __name__ == "__main__"'


def _died(why: str) -> ReaderDied:
    unguarded = "" if multiprocessing.get_start_method() == "fork" else f", or the script may lack {_MAIN_GUARD}"
    return ReaderDied(
        f"a process that reads audio died ({why}): memory or /dev/shm may be full{unguarded}; use fewer workers, or 0"
    )


def check_main_guard() -> None:
    """Refuse to work in a new process that still runs its parent's script, as all do that are not forked.

    Raises:
        ArmhubertError: the script does its work whenever it is run.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing's own check
        raise ArmhubertError(f"a new process runs this script again: put the script's work under {_MAIN_GUARD}")


def batches(
    utterances: Sequence[Utterance],
    plan: Sequence[Sequence[Crop]],
    *,
    workers: int,
    pin_memory: bool = False,
    tolerant: bool = False,
) -> Iterator[AudioBatch]:
    """The batches of a plan, in its order, read ahead by `workers` processes (0: read here, when asked for).

    The workers end with the iterator, also where it is closed or dropped early. `pin_memory` counts where there is a
    CUDA device. A file that cannot be read is tried again, for seconds; a `tolerant` reader then leaves it out of its
    batch, as long as another file of the batch can be read.

    Raises:
        ArmhubertError: a file has vanished or changed since the scan.
        ReaderDied: a worker died.
    """
    loader = DataLoader(
        _Planned([utterance.path for utterance in utterances], plan, tolerant),
        batch_size=None,  # an item is a batch already
        collate_fn=_as_it_is,  # the default would look into every value
        num_workers=workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        generator=torch.Generator(),  # else the workers' seed is drawn from the global state
    )
    with ThreadPoolExecutor(1, thread_name_prefix="start-readers") as starter:
        # Started from the main thread, torch's loader takes over SIGCHLD for good, and a worker's death would raise
        # at whatever line the caller happens to be. Started elsewhere, only `next` reports it, within seconds.
        try:
            iterator = starter.submit(iter, loader).result()
        except (EOFError, OSError) as error:  # no memory for a process, or a server of processes that ended
            raise _died(brief(error) or type(error).__name__) from None
    try:
        while True:
            died = ""
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if not any(words in str(error) for words in ("exited unexpectedly", "is killed by signal")):
                    raise
                died = brief(error)
            if died:  # raised out here, where no traceback keeps the iterator and its other workers alive
                raise _died(died)
            if isinstance(batch, ArmhubertError):
                raise batch
            yield batch
    finally:
        del iterator  # its end is what stops the workers


class _Planned(Dataset[AudioBatch | ArmhubertError]):
    """Item i is batch i, or what is wrong with it: an exception would come back as a worker's traceback in a text."""

    def __init__(self, paths: list[str], plan: Sequence[Sequence[Crop]], tolerant: bool) -> None:
        self.paths = paths
        self.plan = plan
        self.tolerant = tolerant
        self.gone: set[int] = set()
        """Utterances that were tried again in vain: once is enough."""

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, place: int) -> AudioBatch | ArmhubertError:
        crops = self.plan[place]
        shape = len(crops), max(crop.samples for crop in crops)
        try:
            waveforms = torch.zeros(shape)
        except RuntimeError:
            return ArmhubertError(f"a batch of {shape} samples does not fit the memory: lower batch_seconds=...")
        unread = self._read(waveforms, dict(enumerate(crops)))
        for pause in RETRY_AFTER:
            if again := {row: crops[row] for row in unread if crops[row].utterance not in self.gone}:
                time.sleep(pause)
                unread = {row: unread[row] for row in unread if row not in again} | self._read(waveforms, again)
        self.gone.update(crops[row].utterance for row in unread)
        if unread and not (self.tolerant and len(unread) < len(crops)):
            return next(iter(unread.values()))
        if unread:
            rows = [row for row in range(len(crops)) if row not in unread]
            waveforms, crops = waveforms[rows], [crops[row] for row in rows]
        return AudioBatch(
            waveforms,
            torch.tensor([crop.samples for crop in crops], dtype=torch.int64),
            torch.tensor([crop.utterance for crop in crops], dtype=torch.int64),
            [str(error) for error in unread.values()],
        )

    def _read(self, waveforms: Tensor, crops: Mapping[int, Crop]) -> dict[int, ArmhubertError]:
        """Read crops into their rows; returns what is wrong with those that cannot be read."""
        unread = {}
        for row, crop in crops.items():
            try:
                waveforms[row, : crop.samples] = read_audio(self.paths[crop.utterance], crop.start, crop.samples)
            except ArmhubertError as error:
                unread[row] = error
        return unread


def _as_it_is(batch: Any) -> Any:
    return batch
