"""Options that hold several values."""

from collections.abc import Callable
from typing import TypeVar

from armhubert.errors import ArmhubertError

N = TypeVar("N", int, float)


def numbers(text: str, kind: Callable[[str], N], option: str) -> tuple[N, ...]:
    """`1,5,10` -> (1, 5, 10).

    Raises:
        ArmhubertError: anything in it that is no number.
    """
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ArmhubertError(f"{option} must be numbers with commas between them, got {text!r}") from None
