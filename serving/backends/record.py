"""Which fast backends a bundle may be served by: the outcome of checks on rows, and what those of bytes need.

backends.json       by kind of device and backend, fastest first, whether it passed, why not, and what it cost
backends/           the bounds of the layers that read bytes, a file per member, where int8 or mixed has passed
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from features.files import read_json, write_json
from features.validation import Frozen, validate
from serving.backends.ranges import Ranges, load_ranges, save_ranges

BACKENDS_FILE, FOLDER = "backends.json", "backends"
Fast = Literal["int8", "mixed", "bf16"]
Device = Literal["cpu", "cuda"]


class Verdict(Frozen):
    """What the check found of one backend; a number is null where the backend does not run or it is not defined."""

    passed: bool
    reason: str | None = Field(default=None, description="why it did not pass")
    auc_loss: float | None = Field(default=None, description="exact's AUC less this one's")
    auc_error: float | None = Field(default=None, description="its standard error, over the rows")
    logloss_increase: float | None = Field(default=None, description="this one's log loss less exact's, in nats")
    logloss_error: float | None = Field(default=None, description="its standard error, over the rows")
    largest_difference: float | None = Field(default=None, description="of a served score from exact's")
    batch_difference: float | None = Field(
        default=None, description="largest one, in probability, of a row's score in batches of 500, 50 and 1"
    )


class Record(Frozen):
    """The check on one kind of device."""

    split: str = Field(description="whose rows were scored")
    rows: int = Field(description="how many, for the metrics")
    range_rows: int = Field(description="others of that split, for the bounds of layers that read bytes")
    versions: Mapping[str, str] = Field(description="of the libraries, and what torch takes the device to be")
    backends: Mapping[Fast, Verdict] = Field(description="fastest first")

    @property
    def reads_bytes(self) -> bool:
        """Whether a backend has passed that has layers in int8."""
        return any(verdict.passed for name, verdict in self.backends.items() if name in ("int8", "mixed"))


class Records(Frozen):
    """backends.json."""

    devices: Mapping[Device, Record] = Field(description="those that it was checked on")

    @model_validator(mode="before")
    @classmethod
    def _once_of_a_cpu(cls, data: Any) -> Any:
        """Files from before devices were told apart are one check, on a CPU."""
        return {"devices": {"cpu": data}} if isinstance(data, dict) and "split" in data else data


@dataclass(frozen=True)
class Backends:
    """The record of each device, and the bounds of layers that read bytes by member, where `reads_bytes` says so."""

    devices: Mapping[Device, Record]
    ranges: tuple[Ranges, ...] = ()

    def joined(self, newer: "Backends") -> "Backends":
        """With the records of a newer check on other devices, or the same."""
        ranges = newer.ranges if "cpu" in newer.devices else self.ranges
        return Backends({**self.devices, **newer.devices}, ranges)

    def save(self, folder: Path) -> None:
        """Write into a bundle's folder."""
        write_json(folder / BACKENDS_FILE, Records(devices=self.devices).model_dump(mode="json"))
        if self.ranges:
            (folder / FOLDER).mkdir()
        for number, ranges in enumerate(self.ranges):
            save_ranges(_file(folder, number), ranges)

    @classmethod
    def load(cls, folder: Path, members: int) -> "Backends | None":
        """What a bundle of so many members has, None for nothing; InputError where a file is damaged or missing."""
        if not (folder / BACKENDS_FILE).exists():
            return None
        data = read_json(folder / BACKENDS_FILE, "bundle")
        devices = validate(Records, data, f"bundle {folder / BACKENDS_FILE}").devices
        if "cpu" not in devices or not devices["cpu"].reads_bytes:
            return cls(devices)
        return cls(devices, tuple(load_ranges(_file(folder, number)) for number in range(members)))


def _file(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"int8-{number:02d}.safetensors"
