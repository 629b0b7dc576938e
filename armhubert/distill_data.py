"""The speech of a distillation: found, examined and split by the lead process, and the same list in all of them.

The list is kept in the run's folder. A resumed run goes on with it, whatever has come into the data or left it.
"""

import contextlib
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple

from armhubert.data import (
    SCAN_CACHE,
    Scan,
    Scanning,
    Skipped,
    Utterance,
    discover,
    leave_out,
    scan,
    split_validation,
)
from armhubert.distill_config import DistillConfig
from armhubert.distributed import World
from armhubert.errors import ArmhubertError
from armhubert.files import write_atomic

LIST_FILE = "data.json"
_FORMAT = "armhubert data 1"
HELD_OUT_SHARE, HELD_OUT_SECONDS = 0.05, 7200.0
"""What is held out where nothing else is asked for: this share of the data, of at most so much."""


class Data(NamedTuple):
    """Utterances to train on, utterances held out, and files that are neither."""

    train: Sequence[Utterance]
    valid: Sequence[Utterance]
    skipped: Sequence[Skipped]


def prepare(
    config: DistillConfig,
    resumed: bool,
    min_samples: int,
    world: World,
    claim: Callable[[], None],
    should_stop: Callable[[], bool],
) -> Generator[Scanning, None, Data | None]:
    """The run's data, in every process; None where it was stopped.

    Args:
        config: the settings.
        resumed: whether to use the list in the run's folder, if it is of these sources.
        min_samples: what an utterance must have at least, at 16 kHz.
        world: the processes.
        claim: makes the run's folder the lead's, before anything is written there; raises where it may not.
        should_stop: asked while audio is examined.

    Raises:
        ArmhubertError: no such data, none that can be used, or a folder that cannot be written: in every process.
    """
    data: Data | ArmhubertError | None = None
    if world.leads:
        try:
            data = yield from _find(config, resumed, min_samples, claim, should_stop)
        except ArmhubertError as error:
            data = error
    data = world.from_lead(data)
    if isinstance(data, ArmhubertError):
        raise data
    return None if world.any(should_stop()) else data


def _find(
    config: DistillConfig,
    resumed: bool,
    min_samples: int,
    claim: Callable[[], None],
    should_stop: Callable[[], bool],
) -> Generator[Scanning, None, Data | None]:
    out = Path(config.out)
    listed = _read_list(out / LIST_FILE, config) if resumed else None
    sources = [discover(paths) for paths in (config.sources, config.valid) if paths] if listed is None else []
    claim()
    if listed is not None:
        return listed
    scans: list[Scan] = []
    for paths, what in zip(sources, ("data", "valid"), strict=False):
        examined = yield from _examine(paths, min_samples, out / SCAN_CACHE, should_stop)
        if examined is None:
            return None
        examined.require_utterances(what=what)
        scans.append(examined)
    found = scans[0]
    if config.valid:
        found = leave_out(found, scans[1])
        found.require_utterances()
        return Data(found.utterances, scans[1].utterances, found.skipped)
    if config.hold_out == 0:
        return Data(found.utterances, (), found.skipped)
    share = config.hold_out
    if share is None:
        share = min(HELD_OUT_SHARE, HELD_OUT_SECONDS / found.seconds)
    return Data(*split_validation(found.utterances, fraction=share, seed=config.seed), found.skipped)


def _examine(
    paths: Sequence[Path], min_samples: int, cache: Path, should_stop: Callable[[], bool]
) -> Generator[Scanning, None, Scan | None]:
    """A scan that can be stopped: None."""
    with contextlib.closing(scan(paths, min_samples=min_samples, cache=cache)) as reports:
        while not should_stop():
            try:
                yield next(reports)
            except StopIteration as end:
                examined: Scan = end.value
                return examined
    return None


def _absolute(config: DistillConfig) -> list[list[str]]:
    """Where the data lie."""
    return [[str(Path(path).absolute()) for path in paths] for paths in (config.sources, config.valid)]


def write_list(data: Data, config: DistillConfig) -> None:
    """Write the list into the run's folder, atomically."""
    content = {"format": _FORMAT, "sources": _absolute(config), **data._asdict()}
    write_atomic(Path(config.out) / LIST_FILE, json.dumps(content) + "\n")


def _read_list(path: Path, config: DistillConfig) -> Data | None:
    """The list of a run; None where it is damaged, missing or of other sources: then the data are examined anew."""
    try:
        content = json.loads(path.read_text("utf-8"))
        train, valid = ([Utterance(*row) for row in content[part]] for part in ("train", "valid"))
        skipped = [Skipped(*row) for row in content["skipped"]]
        sound = (content["format"], content["sources"]) == (_FORMAT, _absolute(config))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    files = all(type(u.path) is str and type(u.samples) is int and u.samples > 0 for u in (*train, *valid))
    texts = all(type(text) is str for file in skipped for text in file)
    return Data(train, valid, skipped) if sound and train and files and texts else None
