"""The service's configuration reference: `python -m serving.reference` prints it."""

import sys

from features.reference import reference
from serving.settings import ServeSettings


def settings_reference() -> str:
    """A Markdown table with a row per key: default and meaning."""
    return reference(ServeSettings)


if __name__ == "__main__":
    sys.stdout.write(settings_reference() + "\n")
