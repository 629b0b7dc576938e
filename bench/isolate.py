"""Run jobs in processes of their own, so that one that crashes, hangs or poisons its CUDA context costs one row.

After an illegal memory access every later call of the same process fails, and after a failed capture of a CUDA graph
some do: a worker that reports either is replaced.
"""

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

START_SECONDS = 90
"""Most that a process may take to start and import; a machine may be busy."""

STOP_SECONDS = 3
"""Most that idle workers may take to end, all together."""

Work = Callable[[Any], dict[str, Any]]
"""A row may hold "spoilt": true, where its process should not be used again."""


class SpoiltError(RuntimeError):
    """What a job raises where its process should not be used again."""


def _die_with_parent() -> None:
    """A worker that outlives a killed parent would go on in the background of whatever is timed next."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(work: Work, pipe: Connection) -> None:
    """A worker: job in, row out, until the pipe closes or the device no longer answers."""
    import torch

    threading.Thread(target=_die_with_parent, daemon=True).start()
    pipe.send((True, None))  # imports are done: from here on a job's time counts
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        alive = True
        try:
            row = work(job)
            alive = not row.get("spoilt")
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:
            alive = not isinstance(error, SpoiltError)
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:600]
            full = "".join(traceback.format_exception(error))
            row = {"error": f"{type(error).__name__} at {place.name}:{place.lineno}: {text}", "traceback": full[-8000:]}
        if torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                alive = False
        pipe.send((alive, row))
        if not alive:
            return


class _Worker:
    def __init__(self, work: Work) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs))
        self.process.start()
        theirs.close()
        self.job: int | None = None
        self.ready = False
        self.started = 0.0

    def give(self, index: int, job: Any) -> None:
        self.job, self.started = index, time.monotonic()
        self.pipe.send(job)


def _stop(crew: Sequence[_Worker]) -> None:
    """End them side by side: idle ones by themselves, the others killed."""
    for worker in crew:
        if worker.job is not None:
            worker.process.kill()
        with contextlib.suppress(OSError):
            worker.pipe.close()
    deadline = time.monotonic() + STOP_SECONDS
    for worker in crew:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
    for worker in crew:
        worker.process.join(10)


def run(
    work: Work, jobs: Sequence[Any], *, workers: int, job_seconds: float, deadline: float, least_seconds: float = 0.0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, row) of each job as it finishes, in any order; a row with "error" where there is no result.

    Args:
        work: importable function of one job.
        jobs: picklable.
        workers: processes at once.
        job_seconds: after which a job is stopped; a process's start does not count.
        deadline: `time.monotonic()` at which everything is.
        least_seconds: no job begins with less time than this before the deadline.
    """
    waiting = list(range(len(jobs)))[::-1]
    crew: list[_Worker] = []
    try:
        while waiting or any(w.job is not None for w in crew):
            now = time.monotonic()
            open_for_more = now + least_seconds < deadline
            if now > deadline or (not open_for_more and all(w.job is None for w in crew)):
                break
            while waiting and open_for_more and len(crew) < workers:
                crew.append(_Worker(work))
                first = waiting.pop()
                crew[-1].give(first, jobs[first])
            ready = wait([w.pipe for w in crew if w.job is not None], timeout=0.5)
            for worker in list(crew):
                if worker.job is None:
                    continue
                index, seconds = worker.job, time.monotonic() - worker.started
                alive = True
                row: dict[str, Any] | None = None
                if worker.pipe in ready:
                    try:
                        alive, row = worker.pipe.recv()
                        if row is None:
                            worker.ready, worker.started = True, time.monotonic()
                    except (EOFError, OSError):
                        worker.process.join(5)
                        alive, row = False, {"error": f"the process died, exit code {worker.process.exitcode}"}
                elif seconds > (job_seconds if worker.ready else START_SECONDS):
                    worker.process.kill()
                    alive, row = False, {"error": f"stopped after {seconds:.0f} s"}
                if row is None:
                    continue
                worker.job = None
                if not alive:
                    crew.remove(worker)
                    _stop([worker])
                elif waiting and time.monotonic() + least_seconds < deadline:
                    following = waiting.pop()
                    worker.give(following, jobs[following])
                yield index, {**row, "wall_s": round(seconds, 2)}
        running = {w.job for w in crew if w.job is not None}
        for index in sorted(running | set(waiting)):
            yield index, {"error": "not finished: the stage's time was over", "unreached": True}
    finally:
        _stop(crew)
