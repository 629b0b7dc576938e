"""What the screens of several commands share: lines, tables, progress bars, durations."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from armhubert.cli.options import as_typed
from armhubert.errors import ArmhubertError


def console(**settings: Any) -> Console:
    """Shows text as it is: names of files and models may look like rich's markup."""
    return Console(highlight=False, emoji=False, markup=False, **settings)


out, _err = console(soft_wrap=True), console(soft_wrap=True, stderr=True)
"""Standard output, for results, and standard error, for remarks."""


def error(message: str) -> None:
    """One line on standard error."""
    _err.print(Text.assemble(("error:", "red"), f" {one_line(as_typed(message, sys.argv[1:]))}"))


def note(message: str) -> None:
    """A remark on standard error."""
    _err.print(one_line(as_typed(message, sys.argv[1:])))


def say(message: str) -> None:
    """A result on standard output, as it is."""
    out.print(message)


def draw(table: Table) -> None:
    """A table on standard output; without a terminal as wide as its content."""
    (out if out.is_terminal else console(width=400)).print(table)


@contextmanager
def progress() -> Iterator[Callable[[str, float, float | None], None]]:
    """`show(what, done, total)`: a bar on a terminal (total None: one that only moves), elsewhere a line per `what` on
    standard error."""
    if not _err.is_terminal:
        last = ""

        def line(what: str, done: float, total: float | None) -> None:
            nonlocal last
            if what != last:
                last = what
                print(what if total is None else f"{what} ({done:g} of {total:g} done)", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=one_line(what), completed=done, total=total)


def bars(**settings: Any) -> Progress:
    """A bar a task on standard output, each with its field `detail`."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=out, **settings)


def one_line(text: str) -> str:
    """A message without its line breaks."""
    return " ".join(text.split())


def grouped(names: Iterable[str]) -> str:
    """Names of tensors by their first two parts, with the number of each."""
    groups = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{group} ({count})" if count > 1 else group for group, count in groups.items())


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def set_threads(count: int | None) -> None:
    """PyTorch's CPU threads of this command; None: as they are.

    Raises:
        ArmhubertError: fewer than one.
    """
    if count is None:
        return
    if count < 1:
        raise ArmhubertError(f"--threads must be at least 1, got {count}")
    import torch

    torch.set_num_threads(count)


def silence_libraries() -> None:
    """No warnings or log lines from exporters and quantisers about their own internals: this process is ours."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
