"""The loader of distillation alone: how many times real time it delivers, by format and number of processes.

    decode     soundfile reads every file: what the codec costs
    read       armhubert.audio.read_audio: mixed down and resampled as well
    scan       armhubert.audio.measure: what the first run adds, once a file
    N          armhubert.data.batches with N processes: collated, and handed over where N is above 0

Two figures each: by the clock, and by the CPU time of all processes, which a busy machine changes little and which
says what one core delivers. Without DATA the bundled speech is written in every format.
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from rich.console import Console
from rich.table import Table

from armhubert.audio import AUDIO_SUFFIXES, measure, read_audio
from armhubert.bench import output
from armhubert.bundled import TEST_SPEECH
from armhubert.config import SAMPLE_RATE
from armhubert.data import Utterance, batches, discover, plan_epoch

FORMATS: dict[str, dict[str, Any]] = {
    "wav": {"subtype": "PCM_16"},
    "flac": {},
    "mp3": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "flac, 48 kHz, stereo": {},
}


class Rate(NamedTuple):
    """Times real time."""

    clock: float
    cpu: float
    """Seconds of audio a second of CPU time, all processes together."""


def rates(
    runs: dict[str, Callable[[], Any]], audio_seconds: dict[str, float], repeats: int, warmup: int = 1
) -> dict[str, Rate]:
    """Medians over runs in turn."""
    found: dict[str, list[Rate]] = {name: [] for name in runs}
    for number in range(warmup + repeats):
        for name, run in runs.items():
            clock, cpu = time.perf_counter(), _cpu_seconds()
            run()
            if number >= warmup:
                elapsed = time.perf_counter() - clock, _cpu_seconds() - cpu
                found[name].append(Rate(*(audio_seconds[name] / seconds for seconds in elapsed)))
    return {name: Rate(*map(statistics.median, zip(*values, strict=True))) for name, values in found.items()}


def _cpu_seconds() -> float:
    """Processor time of this process and of those children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure_folder(
    paths: Sequence[Path], *, workers: Sequence[int], batch_seconds: float, least: float, repeats: int
) -> dict[str, Any]:
    """One row: a set of files through every stage."""
    utterances = [Utterance(str(path), found.samples) for path in paths if not (found := measure(path)).defect]
    seconds = sum(u.samples for u in utterances) / SAMPLE_RATE
    plan = plan_epoch(utterances, batch_seconds=batch_seconds, max_seconds=None, seed=0, epoch=0)
    times = max(1, round(least / seconds))  # so long that starting processes does not count

    def deliver(count: int) -> None:
        for _ in batches(utterances, plan * times, workers=count):
            pass

    runs: dict[str, Callable[[], Any]] = {
        "decode": lambda: [soundfile.read(u.path, dtype="float32") for u in utterances],
        "read": lambda: [read_audio(u.path) for u in utterances],
        "scan": lambda: [measure(u.path) for u in utterances],
    }
    runs |= {str(count): lambda count=count: deliver(count) for count in workers}  # type: ignore[misc]
    audio = {name: seconds * (times if name.isdecimal() else 1) for name in runs}
    return {
        "files": len(utterances),
        "audio_seconds": seconds,
        "batch_seconds": batch_seconds,
        "rates": {name: rate._asdict() for name, rate in rates(runs, audio, repeats).items()},
    }


def write_formats(folder: Path) -> dict[str, list[Path]]:
    """The bundled test speech in every format."""
    from torchaudio.functional import resample

    found: dict[str, list[Path]] = {}
    for name, settings in FORMATS.items():
        for source in discover([TEST_SPEECH]):
            wave, rate = read_audio(source), SAMPLE_RATE
            data = wave.numpy()
            if "stereo" in name:
                rate = 48_000
                data = np.repeat(resample(wave, SAMPLE_RATE, rate).numpy()[:, None], 2, axis=1)
            path = folder / name / f"{source.stem}.{name.partition(',')[0]}"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, data, rate, **settings)
            found.setdefault(name, []).append(path)
    return found


def main() -> None:
    """Measure, print, and write loader.json."""
    parser = output.parser("loader", __doc__)
    parser.add_argument("data", nargs="*", help="folders, files, manifests; a row for each kind of file")
    parser.add_argument("--workers", default="0,1,2", help="numbers of processes")
    parser.add_argument("--batch-seconds", type=float, default=120.0)
    parser.add_argument("--least", type=float, default=3600.0, help="seconds of audio a run, at least about")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in the processes that read: resampling is theirs
    workers = [int(count) for count in options.workers.split(",")]
    console, rows = Console(width=120), []
    with tempfile.TemporaryDirectory() as folder:
        if options.data:
            paths = discover(options.data)
            kinds = {end: [p for p in paths if p.suffix.lower() == end] for end in sorted(AUDIO_SUFFIXES)}
            sets = {end[1:]: found for end, found in kinds.items() if found}
        else:
            sets = write_formats(Path(folder))
        for name, found in sets.items():
            row = measure_folder(
                found, workers=workers, batch_seconds=options.batch_seconds, least=options.least,
                repeats=options.repeats,
            )  # fmt: skip
            rows.append({"format": name, **row})
    table = Table("format", *rows[0]["rates"], title="times real time by CPU time (by the clock)", title_justify="left")
    for row in rows:
        table.add_row(row["format"], *(f"{r['cpu']:,.0f} ({r['clock']:,.0f})" for r in row["rates"].values()))
    console.print(table)
    print(output.write_results("loader", rows, torch.device("cpu"), options.out))
