"""What a user can get wrong, as one line each."""

import difflib
from collections.abc import Iterable


class ArmhubertError(ValueError):
    """Bad input: the message states the rule, the value and the remedy in one line.

    The command line prints it and exits with 2; anything else that escapes is a defect of ours.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or the list of them where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
