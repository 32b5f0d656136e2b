"""The one exception for what a person can put right.

InputError            what the user gave is wrong; the message is one line that names the thing, the place and the rule
"""

import re


class InputError(ValueError):
    """The user's input is wrong. The command line prints it as one line and exits with 2."""


def listed(names: list[str]) -> str:
    """Names as a message lists them: the first thirty, none longer than sixty characters, all on one line."""
    shown = [" ".join(name.split())[:60] for name in names[:30]]
    return ", ".join(shown) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def one_line(error: BaseException) -> str:
    """A library's message without its line breaks."""
    return " ".join(str(error).split())


def without_password(uri: str) -> str:
    """An address, alone or in a word, as it may be shown and stored; where it is unclear, too much is hidden."""
    shown = re.sub(r"(?i)([?&]\w*(?:password|passwd|pwd)=)[^&]*", r"\1***", uri)  # first: it may hold an @
    return re.sub(r"(?<=://)([^/:]*):.*@", r"\1:***@", shown)
