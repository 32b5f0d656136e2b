"""The data sets of the quality benchmark, prepared once into a folder.

MovieLens-100k comes with the project's setup; KuaiRec's small matrix (Gao et al., CIKM 2022) is given as a file with
the columns user_id, video_id, watch_ratio. The others are planted; of the one in Criteo's shape the best possible log
loss on the test rows is known.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from features import movielens, synthetic
from features.prepare import prepare
from features.schema import Schema, load_schema
from features.splits import SplitRule

SCHEMAS = movielens.SCHEMA.parent
SHARES = (0.8, 0.9, 1.0)  # where train, valid and test end
RANDOM, TIME = "random:0.8,0.1,0.1", "time:0.8,0.1,0.1"
IntN, FloatN = npt.NDArray[np.int64], npt.NDArray[np.float64]


def movielens_data(split: str) -> Callable[[Path], None]:
    """Clicks are ratings of 4 or more."""

    def make(out: Path) -> None:
        raw = out.parent / "movielens.parquet"
        if not raw.exists():
            movielens.write_flat(raw)
        prepare(load_schema(movielens.SCHEMA), {"input": [str(raw)]}, out, split=SplitRule.parse(split))

    return make


def kuairec_data(file: Path) -> Callable[[Path], None]:
    """Clicks are videos watched through at least once; users and videos by their ids alone."""

    def make(out: Path) -> None:
        schema = load_schema(SCHEMAS / "kuairec.yaml")
        prepare(schema, {"input": [str(file)]}, out, split=SplitRule.parse(RANDOM))

    return make


def criteo_data(rows: int, largest: int) -> Callable[[Path], None]:
    """Criteo's shape, 39 fields, from `features.synthetic`."""

    def make(out: Path) -> None:
        drawn = list(synthetic.blocks(rows, 1, synthetic.cardinalities(largest)))
        table = pa.concat_tables([block for block, _ in drawn])
        _prepared(load_schema(SCHEMAS / "criteo.yaml"), table, np.concatenate([logit_B for _, logit_B in drawn]), out)

    return make


def returning_users(out: Path) -> None:
    """10 fields, 5,000 ids, 200,000 rows: users come back to their own few items, beside items drawn at random.

    What decides is which pairs of user and item occur, to be remembered from few rows each, as in Frappe.
    """
    random = np.random.default_rng(0)
    users, items, rows = 957, 4082, 200_000
    popularity_I = 1 / np.arange(1, items + 1)
    popularity_I /= popularity_I.sum()
    taste_U4, nature_I4 = random.normal(size=(users, 4)), random.normal(size=(items, 4))
    activity_U = random.pareto(1.2, users) + 0.2
    own = []
    for taste_4 in taste_U4:
        share_I = popularity_I * np.exp(1.2 * nature_I4 @ taste_4)
        own.append(random.choice(items, int(random.integers(5, 60)), replace=False, p=share_I / share_I.sum()))
    user_N = random.choice(users, rows, p=activity_U / activity_U.sum())
    click_N = random.random(rows) < 1 / 3
    place_N = random.exponential(6, rows).astype(np.int64)
    liked_N = np.array([own[user][min(place, len(own[user]) - 1)] for user, place in zip(user_N, place_N, strict=True)])
    other_N = random.choice(items, rows, p=0.5 * popularity_I + 0.5 / items)
    item_N = np.where(click_N, liked_N, other_N)
    columns = {"user": user_N, "item": item_N}
    for number, size in enumerate((7, 7, 2, 3, 2, 9, 80, 233)):
        kinds = (random.integers(0, size, items)[item_N], random.integers(0, size, users)[user_N])
        which_N = random.choice(3, rows, p=[0.25, 0.25, 0.5])
        columns[f"context{number}"] = np.choose(which_N, [*kinds, random.integers(0, size, rows)])
    _prepared_ids(columns, click_N, out)


def best_logloss(data: Path) -> float | None:
    """Log loss on the test rows of the probabilities that their labels were drawn from; None where nobody knows."""
    file = data.parent / f"{data.name}.best.json"
    return float(json.loads(file.read_text())["logloss"]) if file.exists() else None


def _prepared_ids(columns: dict[str, IntN], click_N: npt.NDArray[np.bool_], out: Path) -> None:
    frame = pl.DataFrame({name: id_N.astype(str) for name, id_N in columns.items()})
    fields = [{"name": name, "type": "categorical"} for name in columns]
    schema = Schema.model_validate({"name": out.name, "label": {"column": "click"}, "fields": fields})
    _prepared(schema, frame.with_columns(click=pl.Series(click_N.astype(np.int64))).to_arrow(), None, out)


def _prepared(schema: Schema, table: pa.Table, logit_N: FloatN | None, out: Path) -> None:
    """Rows are independent and alike, so that their order splits them."""
    ends = [round(share * table.num_rows) for share in SHARES]
    sources = {}
    for name, start, end in zip(("train", "valid", "test"), [0, *ends], ends, strict=False):
        sources[name] = [str(out.parent / f"{out.name}-{name}.parquet")]
        pq.write_table(table.slice(start, end - start), sources[name][0])
    if logit_N is not None:
        label_N = table[schema.label.column].to_numpy()[ends[1] :]
        loss_N = np.logaddexp(0.0, np.where(label_N > 0, -1.0, 1.0) * logit_N[ends[1] :])
        (out.parent / f"{out.name}.best.json").write_text(json.dumps({"logloss": float(loss_N.mean())}))
    prepare(schema, sources, out)
