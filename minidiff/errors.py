"""The one exception that is the user's to mend. The command line prints it and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what was wrong, where (file, line, key), and the remedy."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: the system asks the process to end, as a user does with Ctrl-C."""


def choice(kind: str, name: object, choices: Iterable[str]) -> None:
    """Raise a UserError unless the name is one of the choices; it proposes the nearest."""
    if name not in (known := list(choices)):
        nearest = difflib.get_close_matches(str(name), known, 1)
        perhaps = f"; perhaps you meant {nearest[0]}" if nearest else ""
        raise UserError(f'no {kind} "{name}"; there is {", ".join(known)}{perhaps}.')
