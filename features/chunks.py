"""What readers yield: a chunk of raw rows, and the rows of it that could not be read."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@dataclass(frozen=True)
class BadRow:
    """A raw row that is set aside: where it stands, and which rule its value breaks."""

    file: str
    line: int
    column: str
    value: str
    rule: str

    @property
    def reason(self) -> str:
        """The value and the rule, as a person reads them."""
        return f"{self.value!r} {self.rule}" if self.value else self.rule


@dataclass(frozen=True)
class RawChunk:
    """Some rows of a file, as they were read.

    `line_N` is each row's line in a text file, or its number from 1 in a Parquet file; `end_line` is the last line that
    this chunk has looked at, bad rows and blank lines included.
    """

    path: str
    table: pa.Table
    line_N: npt.NDArray[np.int64]
    bad_rows: list[BadRow]
    end_line: int
