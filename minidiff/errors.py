"""The one exception that is the reader's to fix: the command line prints it as a single line and exits with code 2."""


class UserError(ValueError):
    """Bad input. The message says what was wrong, where (the file, the line, the key), and what to do about it."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: the system asks the process to end, as a user does with Ctrl-C."""
