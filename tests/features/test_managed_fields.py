"""Managed fields as they are prepared: ids that are hashes, and the maps that give them rows.

Hashes are those of the package xxhash, which the program does not use.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from features.batches import EncodedRows
from features.dataset import PreparedDataset
from features.encoders import Managed
from features.engines import LocalEngine
from features.errors import InputError
from features.fitting import fit_pipeline
from features.id_maps import IdMap, with_rows
from features.pipeline import FeaturePipeline
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from features.validation import validate

FIELDS: list[dict[str, Any]] = [
    {"name": "user", "type": "categorical", "encoder": "managed", "buckets": 6, "eviction": "lru"},
    {"name": "tags", "type": "list", "separator": " ", "encoder": "managed", "buckets": 9},
    {"name": "liked", "type": "list", "separator": " ", "share_with": "user"},
    {"name": "shop", "type": "categorical", "min_count": 1},
    {"name": "user_x_tag", "type": "cross", "of": ["user", "tags"], "encoder": "managed", "buckets": 50},
]
SCHEMA = Schema.model_validate({"name": "m", "label": {"column": "click"}, "fields": FIELDS})
COLUMNS: dict[str, list[Any]] = {
    "user": ["ann", "ü", None, "7.0", ""],
    "tags": ["a b", "", "b", None, "c"],
    "liked": ["ann", None, "7 ü", "", "ann ann"],
    "shop": ["x", "x", None, "y", "x"],
    "click": [0, 1, 0, 1, 0],
}
MASK = 2**64 - 1


def hashed(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def crossed(*texts: str) -> int:
    """features/README.md's formula, in Python's integers."""
    combined = 0
    for text in texts:
        combined = (combined + xxhash.xxh3_64_intdigest(text.encode())) * 0x9E3779B97F4A7C15 & MASK
        combined ^= combined >> 29
    combined = (combined ^ (combined >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    combined = (combined ^ (combined >> 27)) * 0x94D049BB133111EB & MASK
    return (combined ^ (combined >> 31)) >> 1


@pytest.fixture(scope="module")
def pipeline() -> FeaturePipeline:
    return fit_pipeline(SCHEMA, COLUMNS)


def test_ids_are_hashes_and_missing_is_zero(pipeline: FeaturePipeline) -> None:
    encoded = pipeline.encode(COLUMNS)
    assert encoded["user"].type == pa.int64()
    assert encoded["user"].to_pylist() == [hashed("ann"), hashed("ü"), 0, hashed("7"), 0]
    assert encoded["tags"].type == pa.list_(pa.int64())
    assert encoded["tags"].to_pylist() == [[hashed("a"), hashed("b")], [0], [hashed("b")], [0], [hashed("c")]]
    assert encoded["liked"].to_pylist()[2:] == [[hashed("7"), hashed("ü")], [0], [hashed("ann")] * 2]
    assert encoded["user_x_tag"].to_pylist() == [
        [crossed("ann", "a"), crossed("ann", "b")], [0], [0], [0], [0]
    ]  # fmt: skip
    assert encoded["shop"].type == pa.int32()


def test_no_hash_is_taken_for_missing_never_seen_or_a_free_row() -> None:
    ids = Managed(5, "lfu").encode(np.array([0, 1, 2, 3, 4, 6, 2**64 - 1], np.uint64))
    assert ids.tolist() == [2, 2, 2, 2, 2, 3, 2**63 - 2]


def test_requests_batches_and_single_rows_encode_alike(pipeline: FeaturePipeline) -> None:
    rows = {"user": ["ann", "bob"], "tags": ["a", "b c"], "liked": ["x", "y"], "shop": ["x", "q"]}  # the fast way
    alone = [pipeline.encode({name: [values[i]] for name, values in rows.items()}) for i in range(2)]
    assert pipeline.encode(rows).equals(pa.concat_tables(alone))
    assert pipeline.encode(pa.table(rows)).equals(pa.concat_tables(alone))


def test_a_saved_pipeline_comes_back(pipeline: FeaturePipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "pipeline")
    loaded = FeaturePipeline.load(tmp_path / "pipeline")
    assert loaded.digest == pipeline.digest
    encoder = loaded.fields[0].encoder
    assert isinstance(encoder, Managed)
    assert (encoder.buckets, encoder.eviction, encoder.num_ids) == (6, "lru", 6)
    assert isinstance(loaded.fields[1].encoder, Managed)
    assert loaded.fields[1].encoder.eviction == "lfu"  # unless the schema says otherwise
    other = Schema.model_validate({**SCHEMA.plain(), "fields": [{**FIELDS[0], "eviction": "lfu"}, *FIELDS[1:]]})
    assert fit_pipeline(other, COLUMNS).digest != pipeline.digest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"buckets": 2}, "2 rows are too few for encoder managed"),
        ({"buckets": None}, "needs buckets"),
        ({"min_count": 3}, "min_count: it belongs to encoder vocabulary, not to managed"),
        ({"max_size": 3}, "max_size: it belongs to encoder vocabulary, not to managed"),
        ({"eviction": "random"}, "fields.0"),
        ({"encoder": "hash"}, "eviction: it belongs to encoder managed, not to hash"),
        ({"encoder": "vocabulary", "buckets": None}, "eviction: it belongs to encoder managed, not to vocabulary"),
    ],
)
def test_a_wrong_key_is_named(change: dict[str, Any], told: str) -> None:
    field = {key: value for key, value in {**FIELDS[0], **change}.items() if value is not None}
    with pytest.raises(InputError, match="schema") as error:
        validate(Schema, {**SCHEMA.plain(), "fields": [field, *FIELDS[1:]]}, "schema s.yaml")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [({"eviction": "lru", "encoder": "hash"}, "eviction: it belongs to"), ({"buckets": 1}, "1 rows are too few")],
)
def test_a_wrong_key_of_a_cross_is_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        validate(Schema, {**SCHEMA.plain(), "fields": [*FIELDS[:4], {**FIELDS[4], **change}]}, "schema s.yaml")
    assert told in str(error.value)


def test_sharing_takes_the_eviction_along() -> None:
    shared = {**FIELDS[2], "eviction": "lru"}
    with pytest.raises(InputError, match="eviction: share_with takes it from the other field"):
        validate(Schema, {**SCHEMA.plain(), "fields": [*FIELDS[:2], shared, *FIELDS[3:]]}, "schema s.yaml")


def raw(rows: int) -> pa.Table:
    random = np.random.default_rng(5)
    users = [None if draw < 0.1 else f"u{int(draw * 400)}" for draw in random.random(rows)]
    tags = [" ".join(f"t{tag}" for tag in random.integers(0, 30, random.integers(0, 4))) for _ in range(rows)]
    columns = {"user": users, "tags": tags, "liked": [user or "" for user in users], "shop": ["s"] * rows}
    return pa.table({**columns, "click": random.integers(0, 2, rows)})


def test_prepared_columns_are_the_same_whatever_the_files_and_the_threads(tmp_path: Path) -> None:
    table = raw(900)
    pq.write_table(table, tmp_path / "whole.parquet")
    (tmp_path / "parts").mkdir()
    for part in range(3):
        pq.write_table(table.slice(300 * part, 300), tmp_path / "parts" / f"{part}.parquet")
    split = SplitRule.parse("random:0.8,0.1,0.1")
    prepare(SCHEMA, {"input": [str(tmp_path / "whole.parquet")]}, tmp_path / "one", split=split)
    prepare(SCHEMA, {"input": [str(tmp_path / "parts")]}, tmp_path / "three", split=split, engine=LocalEngine(2))
    found = {}
    for out in ("one", "three"):
        dataset = PreparedDataset.open(tmp_path / out)
        whole = pa.concat_tables([dataset.split(name) for name in ("train", "valid", "test")])
        order = np.lexsort((whole["_line"].to_numpy(), whole["_file"].to_numpy()))
        found[out] = whole.take(order)
    expected = [0 if user is None else hashed(user) for user in table["user"].to_pylist()]
    for whole in found.values():
        assert whole["user"].to_pylist() == expected
        assert whole["tags"].to_pylist() == [
            [hashed(tag) for tag in tags.split()] or [0] for tags in table["tags"].to_pylist()
        ]


def test_the_profile_counts_values_and_not_rows_of_the_table(tmp_path: Path) -> None:
    table = raw(900)
    pq.write_table(table, tmp_path / "raw.parquet")
    source = {"train": [str(tmp_path / "raw.parquet")]}
    prepare(SCHEMA, source, tmp_path / "data")
    about = json.loads((tmp_path / "data" / "profile.json").read_text())["fields"]
    users = [user for user in table["user"].to_pylist() if user]
    assert about["user"]["ids"] == 6
    assert about["user"]["train"]["missing"] == table["user"].null_count
    assert about["user"]["train"]["unknown"] == 0
    assert about["user"]["train"]["distinct"] == len(set(users)) > 300
    most = min(set(users), key=lambda user: (-users.count(user), user))
    assert about["user"]["train"]["top"][0] == [most, users.count(most)]
    pairs = {(u, t) for u, tags in zip(table["user"].to_pylist(), table["tags"].to_pylist(), strict=True) if u
             for t in tags.split()}  # fmt: skip
    assert about["user_x_tag"]["train"]["distinct"] == pytest.approx(len(pairs), rel=0.03)
    assert about["user_x_tag"]["train"]["top"] is None


def test_gathered_rows_hold_whole_hashes(pipeline: FeaturePipeline) -> None:
    encoded = pipeline.encode(COLUMNS)
    rows = EncodedRows.of(encoded, pipeline.layout)
    joined = rows.take(np.array([4, 3])).followed_by(rows.take(np.array([0])))
    for found, order in ((rows, [1, 0, 3]), (joined, [0, 1, 2])):
        ids, _, _ = found.gather(np.array(order))
        expected = [[1, 0, 3], [4, 3, 0]][found is joined]
        for name in pipeline.layout.ids:
            wanted = np.concatenate([np.atleast_1d(encoded[name][i].as_py()) for i in expected])
            assert ids[name].values().tolist() == wanted.tolist(), name
    rows.hide("user", 1.0, 1, np.random.default_rng(0))
    assert rows.gather(np.arange(5))[0]["user"].values().tolist() == [1] * 5


def test_a_map_finds_rows_as_a_dictionary_does() -> None:
    random = np.random.default_rng(2)
    ids_K = np.unique(random.integers(2, 2**63 - 2, 500))
    rows_K = (2 + random.permutation(len(ids_K))).astype(np.int32)
    known = dict(zip(ids_K.tolist(), rows_K.tolist(), strict=True))
    asked = np.concatenate([[0, 1, 2, 2**63 - 2], random.choice(ids_K, 300), random.integers(2, 2**63 - 2, 300)])
    expected = [known.get(id_, min(id_, 1)) for id_ in asked.tolist()]
    found = IdMap(ids_K, rows_K).rows(asked)
    assert found.dtype == np.int32
    assert found.tolist() == expected
    assert IdMap(ids_K[:0], rows_K[:0]).rows(asked[:6]).tolist() == [0, 1, 1, 1, 1, 1]
    assert IdMap(ids_K[:1], rows_K[:1]).rows(ids_K[:2]).tolist() == [rows_K[0], 1]


def test_a_maps_rows_are_its_own_and_below_the_tables_end() -> None:
    ids, rows = np.array([5, 9, 11]), np.array([4, 2, 3], np.int32)
    IdMap(ids, rows, {"counts": ids}).require_rows_below(5, "map")
    for wrong in (
        IdMap(ids[[1, 0, 2]], rows),
        IdMap(ids - 4, rows),
        IdMap(ids, rows + 1),
        IdMap(ids, rows - 1),
        IdMap(ids, np.array([4, 4, 3], np.int32)),
        IdMap(ids, rows[:2]),
        IdMap(ids, rows, {"counts": ids[:2]}),
    ):
        with pytest.raises(InputError, match="map: its ids"):
            wrong.require_rows_below(5, "map")


def test_encoded_rows_get_rows_where_fields_are_managed(pipeline: FeaturePipeline) -> None:
    users = np.sort([hashed("ann"), hashed("7")])
    tags = np.array([hashed("b")])
    id_maps = {
        "user": IdMap(users, np.array([5, 2], np.int32)),
        "tags": IdMap(tags, np.array([3], np.int32)),
        "user_x_tag": IdMap(tags[:0], np.array([], np.int32)),
    }
    encoded = pipeline.encode(COLUMNS)
    mapped = with_rows(encoded.slice(1), pipeline, id_maps)  # a slice, whose buffers hold more
    row = dict(zip(users.tolist(), [5, 2], strict=True))
    assert mapped["user"].to_pylist() == [1, 0, row[hashed("7")], 0]
    assert mapped["tags"].to_pylist() == [[0], [3], [0], [1]]
    assert mapped["liked"].to_pylist() == [[0], [row[hashed("7")], 1], [0], [row[hashed("ann")]] * 2]
    assert mapped["shop"].equals(encoded.slice(1)["shop"])
    assert {mapped[name].type for name in ("user", "shop")} == {pa.int32()}
