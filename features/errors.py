"""The one exception for what a person can put right.

InputError            what the user gave is wrong; the message is one line that names the thing, the place and the rule
"""


class InputError(ValueError):
    """The user's input is wrong. The command line prints it as one line and exits with 2."""
