"""The one exception a user sees."""


class UserError(Exception):
    """A mistake in what the user gave: shown as one message without a traceback, exit code 2.

    The message says what is wrong, where (file, key or rank), what was expected and what to do.
    """
