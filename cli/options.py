"""Options: lists of numbers, and settings in messages as the options that they are."""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import typer

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


def as_typed(message: str, argv: Sequence[str]) -> str:
    """A message with settings as options of the command: force=True as --force, format='torch' as --format torch.

    cache=... is any value: --cache. A bare name may be one of a file, and is an option only where that was typed.
    """
    from armhubert.cli.app import app  # whose commands' modules import this one

    commands = getattr(typer.main.get_command(app), "commands", {})
    for setting in commands[argv[0]].params if argv and argv[0] in commands else ():
        if not setting.opts[0].startswith("-"):
            continue
        typed = next((o for o in setting.opts if any(a == o or a.startswith(f"{o}=") for a in argv[1:])), None)
        option = typed or setting.opts[0]
        on = f"{option} {setting.metavar}" if setting.metavar else option
        forms = [(r"\.\.\.", option), ("True", on), *(("False", off) for off in setting.secondary_opts)]
        for value, form in (*forms, (r"'?([\w.]*\w)'?", rf"{option} \1")):
            message = re.sub(rf"(?<!\S){setting.name}={value}", form, message)
        if typed is not None:
            message = re.sub(rf"^{setting.name}( in the options| in the settings)?(?= must )", typed, message)
            if "_" in setting.name:
                message = re.sub(rf"(?<![\w'/.-]){setting.name}(?![\w'/-])", typed, message)
    return message
