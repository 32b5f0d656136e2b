"""Failures that are nobody's wrong input.

Failure    a command cannot go on; the message is for a person, and the exit code is 1
"""


class Failure(RuntimeError):
    """What went wrong, in words that need no traceback."""
