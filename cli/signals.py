"""Ctrl-C and SIGTERM: a command saves what is done, then ends with the signal's exit code."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from armhubert.cli import ui


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
    """What SIGTERM and Ctrl-C set; a second one ends the process as usual."""
    stop, owner = Stop(), os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a reading process, which ends with this one
            return
        stop.number = number
        signal.signal(number, previous[signal.Signals(number)])
        ui.note("Stopping as soon as what is done is saved; once more to end at once.")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
