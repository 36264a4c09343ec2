"""UserError: a mistake in the input; the command line prints its one line and exits with code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what was wrong, where (file, line, key), and the remedy."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: the system asks the process to end; handled like Ctrl-C."""


def choice(kind: str, name: object, choices: Iterable[str]) -> None:
    """Raise a UserError unless the name is one of the choices; it proposes the nearest."""
    if name not in (names := list(choices)):
        nearest = difflib.get_close_matches(str(name), names, 1)
        perhaps = f"; perhaps you meant {nearest[0]}" if nearest else ""
        raise UserError(f'no {kind} "{name}"; there is {", ".join(names)}{perhaps}.')


def printable(text: str) -> str:
    """Escape what is no character, or would move the cursor: names and captions are strangers'."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
