"""Versions that cannot be had now, as on a full disk: tried again, more and more rarely."""

from dataclasses import dataclass
from typing import Any

from serving.models import Registered

FIRST_PAUSE, LONGEST_PAUSE = 15.0, 600.0  # seconds


@dataclass(frozen=True)
class Postponed:
    """A version, why it could not be had, how often that was so, and when last, by a clock in seconds."""

    found: Registered
    reason: str
    tries: int
    since: float

    @classmethod
    def after(cls, last: "Postponed | None", found: Registered, reason: str, now: float) -> "Postponed":
        """The next try has failed; the first of another version begins anew."""
        before = last.tries if last is not None and last.found == found else 0
        return cls(found, reason, before + 1, now)

    @property
    def pause(self) -> float:
        """Seconds until it is tried again: twice those of the last time."""
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.tries - 1, 10))

    def about(self) -> dict[str, Any]:
        """For people."""
        return {"version": self.found.version, "reason": self.reason, "tries": self.tries}
