"""Train/serve parity on 100,000 real rows: equal encodings, and scores within 1e-6 of the reference scorer's.

Legend: N rows.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from features.fields import ListField
from features.online import Encoded, OnlineEncoder
from serving.bundle import Bundle
from serving.ranking.engine import RankingEngine

ROWS, REQUEST = 100_000, 500
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def shown(raw_rows: Path, bundle: Bundle) -> pl.DataFrame:
    """Real impressions, each again and again with other users and times, with gaps and values never seen among them."""
    random, real = np.random.default_rng(0), pl.read_parquet(raw_rows)
    names = [name for name in bundle.schema.raw_columns if name in real.columns]
    context, columns = [*bundle.schema.context, *bundle.schema.date_columns], {}
    user_N = np.repeat(random.integers(len(real), size=ROWS // REQUEST), REQUEST)  # a context for each request
    item_N = random.integers(len(real), size=ROWS)
    for name in names:
        columns[name] = real[name].gather(user_N if name in context else item_N)
    rows = pl.DataFrame(columns)
    odd = [field.name for field in bundle.schema.served_fields if field.name not in context][:2]
    gap = pl.Series(random.random(ROWS) < 0.01)
    strange = pl.when(gap).then(None).otherwise(pl.col(odd[0])).alias(odd[0])
    unseen = pl.when(gap.shift(1, fill_value=False)).then(pl.lit("never seen")).otherwise(pl.col(odd[1])).alias(odd[1])
    return rows.with_columns(strange, unseen, pl.col("year").cast(pl.Float64))


def require_equal(found: Encoded | None, expected: pa.Table) -> None:
    assert found is not None
    for name in expected.column_names:
        column = expected[name].combine_chunks()
        if name in found.values:
            np.testing.assert_array_equal(np.broadcast_to(found.values[name], len(column)), column.to_numpy(False))
            continue
        ids_K, lengths_N = found.ids[name]
        if lengths_N is None:
            np.testing.assert_array_equal(np.broadcast_to(ids_K, len(column)), column.to_numpy(False))
        else:
            times = len(column) // len(lengths_N)
            np.testing.assert_array_equal(np.tile(lengths_N, times), column.value_lengths().to_numpy(False))
            np.testing.assert_array_equal(np.tile(ids_K, times), column.flatten().to_numpy(False))


def test_encodings_are_equal_and_scores_within_1e_6(shown: pl.DataFrame, bundle: Bundle) -> None:
    engine, encoder = RankingEngine(bundle, "1"), OnlineEncoder(bundle.pipeline)
    table = shown.to_arrow()
    encoded = bundle.pipeline.encode(table)
    expected_N = bundle.scorer.score_encoded(encoded)
    assert len(np.unique(expected_N)) > ROWS / 100
    served = bundle.pipeline.as_served(encoded)
    require_equal(encoder.encode({name: table[name] for name in table.column_names}), served)
    np.testing.assert_allclose(engine.predict(table), expected_N, rtol=0, atol=1e-6)
    worst = 0.0
    for start in range(0, ROWS, REQUEST):
        part = shown.slice(start, REQUEST)
        context, candidates, time = request_of(bundle, part)
        once = {name: [value] for name, value in context.items()} | {n: [time] for n in only_times(bundle)}
        require_equal(encoder.encode(candidates | once), served.slice(start, REQUEST))
        ranked = engine.rank(context, candidates, REQUEST, time)
        found_N = np.empty(REQUEST, np.float32)
        found_N[[item.index for item in ranked]] = [item.score for item in ranked]
        worst = max(worst, float(np.abs(found_N - expected_N[start : start + REQUEST]).max()))
    assert worst <= 1e-6


def only_times(bundle: Bundle) -> list[str]:
    sent = {field.name for field in bundle.schema.served_fields}
    return [name for name in bundle.schema.date_columns if name not in sent]


def request_of(bundle: Bundle, part: pl.DataFrame) -> tuple[dict[str, Any], dict[str, list[Any]], datetime | None]:
    """Impressions of one user at one time as a client sends them."""
    context = {name: part[name][0] for name in bundle.schema.context}
    lists = [field.name for field in bundle.schema.served_fields if isinstance(field, ListField)]
    part = part.with_columns(pl.col(lists).str.split(" "))
    candidates = {name: part[name].to_list() for name in bundle.schema.candidate_fields}
    times = [datetime.fromtimestamp(part[name][0], UTC) for name in only_times(bundle)]
    return context, candidates, times[0] if times else None
