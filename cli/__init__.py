"""The command line: the only place that knows typer and rich. One command a file; `ui` renders."""

import errno
import os
import reprlib
import sys

from armhubert.cli.app import app
from armhubert.errors import ArmhubertError

__all__ = ["main"]


def main() -> None:
    """Run a command: bad input is one line and exit code 2, Ctrl-C 130; the rest is a defect, with its traceback."""
    from armhubert.cli import ui

    try:
        app()
    except ArmhubertError as error:
        ui.error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`armhubert ... | head`); its end is ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        ui.error(f"file name too long: {reprlib.repr(error.filename)}: give a shorter one")
        sys.exit(2)
