"""How a command ends that is nobody's wrong input.

Failure    it cannot go on; the message is for a person, and the exit code is 1
PeerLost   one kind of it: another process of the same training has ended first, and knows why
Stopped    a signal has stopped it, and it can be resumed; the exit code is 75
"""


class Failure(RuntimeError):
    """What went wrong, in words that need no traceback."""


class PeerLost(Failure):
    """Another process of this training has ended or does not answer."""


class Stopped(RuntimeError):
    """Stopped by a signal after a checkpoint."""
