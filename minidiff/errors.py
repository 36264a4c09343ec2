"""The one exception that is the user's to mend: the command line prints it as one line and exits with 2."""

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what was wrong, where (the file, the line, the key), and the remedy."""


def choice(kind: str, name: object, choices: Iterable[str]) -> None:
    """Raise a UserError unless the name is one of the choices."""
    if name not in (known := list(choices)):
        raise UserError(f'no {kind} "{name}"; there is {", ".join(known)}.')
