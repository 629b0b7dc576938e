"""The command line: the only place that knows typer and rich. One command a file; `ui` has what they share."""

import errno
import io
import os
import sys

from armhubert.cli.app import app
from armhubert.errors import ArmhubertError, shown

__all__ = ["main"]

_REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EACCES: "check its permissions and those of the folders above it",
    errno.EPERM: "check its permissions and those of the folders above it",
    errno.EROFS: "choose another folder",
    errno.ENOSPC: "make room and start again",
    errno.EDQUOT: "make room and start again",
    errno.EIO: "check the drive and start again",
}
"""What a user can do where the system refuses a file."""


def main() -> None:
    """Run a command: bad input is one line and exit code 2, Ctrl-C 130; the rest is a defect, with its traceback."""
    from armhubert.cli import ui

    if isinstance(sys.stdout, io.TextIOWrapper):  # names that are no UTF-8 are shown, not a defect
        sys.stdout.reconfigure(errors="backslashreplace")
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
        if error.errno not in _REMEDIES or error.strerror is None:
            raise
        at = f" {shown(error.filename)}:" if error.filename is not None else ""
        ui.error(f"{error.strerror.lower()}:{at} {_REMEDIES[error.errno]}")
        sys.exit(2)
