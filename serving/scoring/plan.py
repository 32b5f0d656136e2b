"""What a scoring is of: the model, the files, their units and the columns kept. Parts of equal plans are the same."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from features.errors import InputError, one_line
from features.files import canonical_json, file_written_whole, read_json, write_json
from features.sources import Source, find_sources
from features.units import Unit, plan_units
from serving.bundle import Bundle

FORMAT = 1
_ENDS = 65_536  # bytes of a file's beginning and end that tell it from another


@dataclass(frozen=True)
class Plan:
    """The units of all files in the order of their rows, and the facts that decide what is written for them."""

    sources: tuple[Source, ...]
    units: tuple[Unit, ...]
    facts: dict[str, Any]

    @classmethod
    def of(cls, bundle: Bundle, version: str, sources: list[str], columns: tuple[str, ...] | None) -> "Plan":
        """Plan a scoring; InputError where a file cannot be found or read."""
        found = find_sources(sources)
        units = plan_units(found)
        facts = {
            "format": FORMAT,
            "model": {"name": bundle.name, "version": version, "digest": bundle.digest},
            "columns": None if columns is None else list(columns),
            "inputs": [identity(source) for source in found],
            "units": [[unit.source, unit.start, unit.end] for unit in units],
        }
        return cls(tuple(found), tuple(units), facts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the facts."""
        return hashlib.sha256(canonical_json(self.facts)).hexdigest()

    def write(self, path: Path) -> None:
        """Put the facts down."""
        with file_written_whole(path) as aside:
            write_json(aside, self.facts)

    def require_same(self, path: Path) -> None:
        """InputError unless the facts put down there are these; names the first that differs."""
        known = read_json(path, "unfinished scoring")
        for before, now in zip(known["inputs"], self.facts["inputs"], strict=False):
            if before["path"] == now["path"] and before != now:
                raise InputError(f"input {now['path']} has changed since the scoring began: score it anew")
        for name, value in self.facts.items():
            if known.get(name) != value:
                raise InputError(f"{path.parent} is of another scoring, with another {name}: choose another --out")

    def require_unchanged(self) -> None:
        """InputError where a file is not what it was when the plan was made."""
        for source, before in zip(self.sources, self.facts["inputs"], strict=True):
            if identity(source) != before:
                raise InputError(f"input {source.path} was changed while it was scored: score it anew")


def identity(source: Source) -> dict[str, Any]:
    """What tells a file from another without reading all of it: place, size, time of its last change, and both ends."""
    filesystem, path = source.filesystem()
    try:
        info = filesystem.get_file_info(path)
        with filesystem.open_input_file(path) as file:
            ends = hashlib.sha256(file.read(_ENDS))
            file.seek(max(0, info.size - _ENDS))
            ends.update(file.read(_ENDS))
    except (OSError, ValueError) as error:
        raise InputError(f"input {source.path} cannot be read: {one_line(error)}") from None
    place = source.path if "://" in source.path else str(Path(source.path).resolve())
    return {"path": place, "bytes": info.size, "modified_ns": info.mtime_ns, "ends_sha256": ends.hexdigest()}
