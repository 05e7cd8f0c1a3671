"""The two ways in which a run stops, and their exit codes."""


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do. Exit code 2, no traceback."""


class InvariantError(RuntimeError):
    """A run-time invariant broke (a non-finite number, a first-step ratio that is not 1, ...). Exit code 3.

    The message names the invariant, the values that broke it and the likely causes.
    """
