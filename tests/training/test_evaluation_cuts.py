"""How rows are cut by fields of every kind, and by what training has seen of an id."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from features.dataset import PreparedDataset
from features.encoders import (
    AnyEncoder,
    Cross,
    DatePart,
    Hash,
    Identity,
    LogBucket,
    Managed,
    Quantile,
    Scale,
    Vocabulary,
)
from features.errors import InputError
from features.id_maps import IdMap
from features.pipeline import FeaturePipeline
from features.prepare import prepare
from features.schema import Schema
from tests.training.untrained import untrained
from training.evaluation.activity import activity_bands, by_activity
from training.evaluation.cuts import by_value

SCHEMA = Schema.model_validate(
    {
        "name": "every kind",
        "label": {"column": "click"},
        "fields": [
            {"name": "user", "type": "categorical"},
            {"name": "slot", "type": "categorical", "encoder": "identity", "buckets": 8},
            {"name": "item", "type": "categorical", "encoder": "hash", "buckets": 5000},
            {"name": "shop", "type": "categorical", "encoder": "managed", "buckets": 9},
            {"name": "genres", "type": "list", "separator": "|"},
            {"name": "age", "type": "numeric", "encoder": "quantile"},
            {"name": "views", "type": "numeric", "encoder": "log_bucket", "buckets": 60},
            {"name": "price", "type": "numeric", "encoder": "standard"},
            {"name": "income", "type": "numeric", "encoder": "log1p"},
            {"name": "weekday", "type": "date", "from": "seen", "part": "weekday"},
            {"name": "day", "type": "date", "from": "seen", "part": "day"},
            {"name": "hour", "type": "date", "from": "seen", "part": "hour"},
            {"name": "both", "type": "cross", "of": ["user", "slot"], "buckets": 50},
        ],
    }
)
ENCODERS: dict[str, AnyEncoder] = {
    "user": Vocabulary(pa.array(["ann", "bob", "cat"])),
    "slot": Identity(8),
    "item": Hash(5000),
    "shop": Managed(9, "lfu"),
    "genres": Vocabulary(pa.array(["drama", "war"])),
    "age": Quantile(np.array([20.0, 40.5])),
    "views": LogBucket(60),
    "price": Scale("standard", 10.0, 4.0),
    "income": Scale("log1p"),
    "weekday": DatePart(7, "weekday", "UTC"),
    "day": DatePart(31, "day", "UTC"),
    "hour": DatePart(24, "hour", "UTC"),
    "both": Cross(50),
}
PIPELINE = FeaturePipeline.build(SCHEMA.fields, ENCODERS)
KNOWN = {"item": ["x", "y", "never"], "shop": ["open", "shut", "gone"]}
DAY = 86_400
ROWS: dict[str, list[Any]] = {
    "user": ["bob", "ann", "bob", None, "zoe", "bob"],
    "slot": ["3", "7", "3", None, "99", "3"],
    "item": ["x", "y", "z", "x", None, "x"],
    "shop": ["open", "shut", "new", None, "open", "gone"],
    "genres": ["war|drama|war", "war", "opera", None, "drama|opera", ""],
    "age": [19.0, 20.0, 40.0, 40.5, 99.0, None],
    "views": [0.0, 2.0, 2.5, 3.0, 5.0, None],
    "price": [2.0, 12.0, 12.0, 14.0, 2.0, None],
    "income": [0.0, 100.0, -100.0, 100.0, -200.0, None],
    "seen": [0.0, 3600.0, 4 * DAY, 31 * DAY, None, 4 * DAY],  # 1970 began on a Thursday
}


def id_map() -> dict[str, IdMap]:
    """Rows for all shops but the new one and the one that is gone."""
    ids = np.array(sorted(xxhash.xxh3_64_intdigest(text.encode()) >> 1 for text in ("open", "shut")), np.int64)
    return {"shop": IdMap(ids, np.array([2, 3], np.int32))}


@pytest.mark.parametrize(
    ("name", "top", "expected"),
    [
        ("user", 2, {"user = bob": [0, 2, 5], "user = ann": [1], "user: missing": [3],
                     "user: unknown (not in the vocabulary)": [4]}),
        ("user", 1, {"user = bob": [0, 2, 5], "user: missing": [3], "user: unknown (not in the vocabulary)": [4]}),
        ("slot", 9, {"slot = 3": [0, 2, 5], "slot = 7": [1], "slot: missing": [3],
                     "slot: unknown (not below 8)": [4]}),
        ("item", 9, {"item = x": [0, 3, 5], "item = y": [1], "item: missing": [4]}),
        ("shop", 9, {"shop = open": [0, 4], "shop = shut": [1], "shop: missing": [3],
                     "shop: unknown (not among the ids that the model keeps)": [2, 5]}),
        ("genres", 9, {"genres = war": [0, 1], "genres = drama": [0, 4], "genres: missing": [3, 5],
                       "genres: unknown (not in the vocabulary)": [2, 4]}),
        ("age", 9, {"age < 20": [0], "20 ≤ age < 40.5": [1, 2], "age ≥ 40.5": [3, 4], "age: missing": [5]}),
        ("age", 2, {"age < 20": [0], "age ≥ 20": [1, 2, 3, 4], "age: missing": [5]}),
        ("views", 9, {"views < 2": [0], "2 ≤ views < 2.718": [1, 2], "2.718 ≤ views < 4.113": [3],
                      "views ≥ 4.113": [4], "views: missing": [5]}),
        ("price", 9, {"price < 12": [0, 4], "12 ≤ price < 14": [1, 2], "price ≥ 14": [3], "price: missing": [5]}),
        ("income", 9, {"income < -100": [4], "-100 ≤ income < 0": [2], "0 ≤ income < 100": [0], "income ≥ 100": [1, 3],
                       "income: missing": [5]}),
        ("weekday", 9, {"weekday = Monday": [2, 5], "weekday = Thursday": [0, 1], "weekday = Sunday": [3],
                        "weekday: missing": [4]}),
        ("day", 9, {"day = 1": [0, 1, 3], "day = 5": [2, 5], "day: missing": [4]}),
        ("hour", 9, {"hour = 0": [0, 2, 3, 5], "hour = 1": [1], "hour: missing": [4]}),
        ("both", 9, {"both: missing": [3]}),
    ],
)  # fmt: skip
def test_rows_are_cut_by_the_values_of_a_field(name: str, top: int, expected: dict[str, list[int]]) -> None:
    table = PIPELINE.encode(ROWS)
    (field,) = (field for field in PIPELINE.fields if field.name == name)
    found = {name: rows.tolist() for _, name, rows in by_value(field, table, id_map(), KNOWN, top).parts()}
    assert {name: rows for name, rows in found.items() if rows} == expected


def test_values_that_share_a_bucket_are_named_together() -> None:
    spec = {"name": "item", "type": "categorical", "encoder": "hash", "buckets": 1}
    schema = Schema.model_validate({"name": "s", "label": {"column": "click"}, "fields": [spec]})
    pipeline = FeaturePipeline.build(schema.fields, {"item": Hash(1)})
    table = pipeline.encode({"item": ["x", "z", None]})
    cut = by_value(pipeline.fields[0], table, {}, {"item": ["x", "y"]}, 9)
    assert {name: rows.tolist() for _, name, rows in cut.parts() if len(rows)} == {
        "item = x or y": [0, 1],
        "item: missing": [2],
    }


USERS, ROUNDS = 60, 3


@pytest.fixture(scope="module")
def banded(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Training rows of users 0 to 59, user n having 1 + n % 3; the group is no field."""
    path = tmp_path_factory.mktemp("banded")
    users = [user for user in range(USERS) for _ in range(1 + user % ROUNDS)]
    train = {"click": [row % 2 for row in range(len(users))], "user": [f"u{user}" for user in users]}
    train |= {"item": [f"i{user}" for user in users], "visit": [f"v{user % 4}" for user in users]}
    test = {"click": [0, 1, 1, 0, 1], "user": ["u2", "u1", "u0", "new", None], "item": ["i2", "i1", "i3", "i2", "new"]}
    test |= {"visit": ["v0", "v0", "v1", "v3", "v9"]}
    pq.write_table(pa.table(train), path / "train.parquet")
    pq.write_table(pa.table(test), path / "test.parquet")
    fields = [{"name": "user", "type": "categorical"}, {"name": "few", "type": "categorical"}]
    fields[1] = {"name": "item", "type": "categorical", "encoder": "hash", "buckets": 100_000}
    schema = Schema.model_validate({"name": "s", "label": {"column": "click"}, "group": "visit", "fields": fields})
    splits = {"train": [str(path / "train.parquet")], "test": [str(path / "test.parquet")]}
    prepare(schema, splits, path / "data")
    return PreparedDataset.open(path / "data")


def test_bands_follow_the_training_split(banded: PreparedDataset, tmp_path: Path) -> None:
    bundle = untrained(tmp_path / "bundle", banded.schema, banded.pipeline)
    table, train = banded.split("test"), banded.files("train")

    def bands(name: str) -> list[str]:
        masks = activity_bands(bundle, table, train, name)
        assert list(masks) == ["cold", "warm", "head"]
        return ["".join(band[0] for band, mask_N in masks.items() if mask_N[row]) for row in range(5)]

    # 20 users each of 1, 2 and 3 rows: 100 rows with known ids, of which the 17 most frequent users have the first half
    assert bands("user") == ["h", "w", "c", "c", ""]  # seen three times, twice, once (below min_count), never, missing
    # of 120 rows the 20 items with three rows have exactly half
    assert bands("item") == ["h", "w", "w", "h", "c"]
    # visits v0 to v3 have 30 rows each: the first two are the head
    assert bands("visit") == ["h", "h", "h", "w", "c"]
    cuts = {cut.field: cut for cut in by_activity(bundle, table, train)}
    assert list(cuts) == ["item", "visit"]  # forty users are not many
    assert cuts["item"].names == [
        "item: cold (not in training)",
        "item: warm (the other 40 ids)",
        "item: head (the 20 ids that make half of training)",
    ]
    assert [rows.tolist() for _, _, rows in cuts["item"].parts()] == [[4], [1, 2], [0, 3]]
    with pytest.raises(InputError, match="'nobody' is neither a field nor the group of model untrained"):
        activity_bands(bundle, table, train, "nobody")


def test_bands_of_a_number_are_refused(tmp_path: Path, banded: PreparedDataset) -> None:
    bundle = untrained(tmp_path / "bundle", SCHEMA, PIPELINE, id_maps=id_map())
    with pytest.raises(InputError, match="field 'age' is no categorical field"):
        activity_bands(bundle, banded.split("test"), banded.files("train"), "age")


def test_a_managed_id_without_a_row_is_cold(tmp_path: Path) -> None:
    spec = {"name": "shop", "type": "categorical", "encoder": "managed", "buckets": 9}
    schema = Schema.model_validate({"name": "s", "label": {"column": "click"}, "fields": [spec]})
    train = {"click": [0, 1] * 4, "shop": ["open"] * 5 + ["shut"] * 2 + ["gone"]}
    test = {"click": [0, 1, 1, 0, 1], "shop": ["open", "shut", "gone", "new", None]}
    for name, rows in (("train", train), ("test", test)):
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    prepare(schema, {name: [str(tmp_path / f"{name}.parquet")] for name in ("train", "test")}, tmp_path / "data")
    dataset = PreparedDataset.open(tmp_path / "data")
    bundle = untrained(tmp_path / "bundle", schema, dataset.pipeline, id_maps=id_map())
    found = activity_bands(bundle, dataset.split("test"), dataset.files("train"), "shop")
    assert {band: mask_N.tolist() for band, mask_N in found.items()} == {
        "cold": [False, False, True, True, False],
        "warm": [False, True, False, False, False],
        "head": [True, False, False, False, False],
    }
