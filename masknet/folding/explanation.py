"""What folding did with each part of a network, for people."""

from dataclasses import dataclass, field

FOLDED, KEPT = "folded", "kept"


@dataclass(frozen=True)
class Note:
    """One thing that was folded or kept."""

    place: str
    outcome: str
    text: str


@dataclass
class Explanation:
    """Notes in the order in which a row passes the places."""

    notes: list[Note] = field(default_factory=list)

    def folded(self, place: str, text: str) -> None:
        """Say what is gone, and where to."""
        self.notes.append(Note(place, FOLDED, text))

    def kept(self, place: str, text: str) -> None:
        """Say what is still computed, and why."""
        self.notes.append(Note(place, KEPT, text))

    def __str__(self) -> str:
        lines, place = [], ""
        for note in self.notes:
            if note.place != place:
                lines.append(place := note.place)
            lines.append(f"  {note.outcome:<7}{note.text}")
        return "\n".join(lines)
