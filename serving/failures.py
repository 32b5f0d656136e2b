"""What the log says of an exception on the way of a request: where it was, and not what it says.

Messages of libraries quote values ("Could not convert 'ann' …"), and values of requests are nobody's to read.
"""

import logging
import sys
import traceback


def log_failure(log: logging.Logger, message: str, *args: object, values: bool = False) -> None:
    """Log the exception that is being handled, with the lines of code that it came through.

    Args:
        log: where to.
        message: what failed.
        args: of the message.
        values: its own text as well, as `log_requests` asks for.
    """
    error = sys.exc_info()[1]
    assert error is not None
    if values:
        log.exception(message, *args)
        return
    chain: list[str] = []
    while error is not None:
        told = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""  # no words of a request
        chain.append(f"{''.join(traceback.format_tb(error.__traceback__))}{type(error).__qualname__}{told}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    log.error(f"{message}\n%s", *args, "\nafter\n".join(chain))
