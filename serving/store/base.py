"""Where field values are fetched by key: what every store can do, and what one is that does not answer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class StoreDown(RuntimeError):
    """The store has not answered, or not in time; what was asked for counts as missing."""


class FeatureStore(Protocol):
    """Rows of raw field values by key. Safe to use from several threads."""

    def fetch(self, keys: Sequence[str]) -> Sequence[Mapping[str, Any] | None]:
        """The row of each key, None where there is none; StoreDown where the store does not answer in time."""

    def close(self) -> None:
        """Let go of files and connections."""
