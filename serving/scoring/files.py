"""Batch scoring: raw files in, Parquet with a score column out, a chunk at a time."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.chunks import RawChunk
from features.errors import InputError
from features.files import folder_written_whole
from features.sources import find_sources
from features.units import read_source
from serving.bundle import Bundle

SCORE = "score"


def score_files(bundle: Bundle, sources: list[str], out: Path) -> int:
    """Score every row of `sources` into one Parquet part per file, in the order of its rows; return the rows.

    Raises:
        InputError: a file cannot be read, or a row cannot be scored: every row gets a score or none does.
    """
    rows = 0
    with folder_written_whole(out) as folder:
        for index, source in enumerate(find_sources(sources)):
            writer: pq.ParquetWriter | None = None
            try:
                for chunk in read_source(source, bundle.schema.csv):
                    table = _with_scores(bundle, chunk)
                    if writer is None:
                        part = folder / f"part-{index:05d}.parquet"
                        writer = pq.ParquetWriter(part, table.schema, compression="zstd")
                    writer.write_table(table)
                    rows += table.num_rows
            finally:
                if writer is not None:
                    writer.close()
    return rows


def _with_scores(bundle: Bundle, raw: RawChunk) -> pa.Table:
    if SCORE in raw.table.column_names:
        raise InputError(f"input {raw.path} already has a column {SCORE!r}")
    if raw.bad_rows:
        bad = raw.bad_rows[0]
        raise InputError(f"input {bad.file}, line {bad.line}: {bad.reason}")
    try:
        return raw.table.append_column(SCORE, pa.array(bundle.scorer.score(raw.table)))
    except InputError as error:
        raise InputError(f"input {raw.path}: {error}") from None
