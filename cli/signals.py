"""Ctrl-C and SIGTERM: a command saves what is done, then ends with the signal's exit code."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from armhubert.cli import ui

SAME_REQUEST = 1.0
"""Seconds within which Ctrl-C is the one that came before."""


class Stop:
    """Whether a signal asked this process to stop."""

    number: int | None = None
    """Number of the signal that came."""

    def asked(self) -> bool:
        """Whether one came."""
        return self.number is not None

    def leave(self) -> NoReturn:
        """End the command with the signal's exit code, so that `armhubert distill && ...` does not go on.

        SIGTERM's where the signal came to another process of the run.
        """
        raise typer.Exit(128 + (self.number or signal.SIGTERM))


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """What SIGTERM and Ctrl-C set; a second Ctrl-C ends the process as usual.

    One request may come as several signals: schedulers and torchrun pass on what the process got already.
    """
    stop, owner, asked_at = Stop(), os.getpid(), 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal asked_at
        if os.getpid() != owner:  # a reading process, which ends with this one
            return
        if stop.number is None:
            stop.number, asked_at = number, time.monotonic()
            ui.note("Stopping as soon as what is done is saved; Ctrl-C once more to end at once.")
        elif number == signal.SIGINT and time.monotonic() - asked_at > SAME_REQUEST:
            ui.note("Ending at once: what was saved last is kept.")
            raise KeyboardInterrupt  # also where a shell's background job inherits that Ctrl-C is ignored

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
