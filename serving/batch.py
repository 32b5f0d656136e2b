"""Batch scoring: raw files in, Parquet with a score column out."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import InputError
from features.files import folder_written_whole
from features.sources import RawFile, find_files, read_file
from serving.bundle import Bundle

SCORE = "score"


def score_files(bundle: Bundle, sources: list[str], out: Path) -> int:
    """Score every row of `sources` into one Parquet part per file, in the order of its rows; return the rows.

    Raises:
        InputError: a file cannot be read, or a row cannot be scored: every row gets a score or none does.
    """
    rows = 0
    with folder_written_whole(out) as folder:
        for index, path in enumerate(find_files(sources)):
            raw = read_file(path, bundle.schema)
            table = _with_scores(bundle, raw)
            pq.write_table(table, folder / f"part-{index:05d}.parquet", compression="zstd")
            rows += table.num_rows
    return rows


def _with_scores(bundle: Bundle, raw: RawFile) -> pa.Table:
    if SCORE in raw.table.column_names:
        raise InputError(f"input {raw.path} already has a column {SCORE!r}")
    if raw.bad_rows:
        bad = raw.bad_rows[0]
        raise InputError(f"input {bad.file}, line {bad.line}: {bad.reason}")
    try:
        return raw.table.append_column(SCORE, pa.array(bundle.scorer.score(raw.table)))
    except InputError as error:
        raise InputError(f"input {raw.path}: {error}") from None
