"""What a user can get wrong, as one line each."""

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Any


class ArmhubertError(ValueError):
    """Bad input: the message states the rule, the value and the remedy in one line.

    The command line prints it and exits with 2; anything else that escapes is a defect of ours.
    """


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """A value as messages show it: of what a file nests, or makes long, the first 100 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def brief(error: BaseException) -> str:
    """What another library's exception says, as a part of one line: its first 200 characters."""
    return " ".join(str(error).split())[:200]


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or the list of them where none is near.

    Initials are as near as can be: lr is learning_rate.
    """
    known = sorted(known)
    close = [name for name in known if word == "".join(part[:1] for part in re.split("[_-]", name)) != name]
    close = close or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
