"""The configuration reference: `python -m training.reference` prints it."""

import sys

from features.reference import reference
from training.config import Config


def config_reference() -> str:
    """A Markdown table with a row per key: default and meaning."""
    return reference(Config)


if __name__ == "__main__":
    sys.stdout.write(config_reference() + "\n")
