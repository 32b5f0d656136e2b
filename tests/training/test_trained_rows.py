"""What drift is told from, of a training over days: all days' rows, and the last one's values and scores."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from features.dataset import LABEL, PreparedDataset
from features.pipeline import FeaturePipeline
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.bundle import fields_of, tables_of
from serving.scorer import Scorer
from training.trained_rows import reference_of

RATE = 0.5
LEVELS = np.arange(1, 20) / 20
SCHEMA = Schema.model_validate(
    {
        "name": "days",
        "label": {"column": "click"},
        "negative_sampling": {"rate": RATE},
        "fields": [
            {"name": "city", "type": "categorical"},
            {"name": "tags", "type": "list", "separator": " "},
            {"name": "spent", "type": "numeric", "encoder": "standard"},
        ],
    }
)


def rows(day: int) -> pd.DataFrame:
    """Cities come and go, and what is spent grows from day to day."""
    random, count = np.random.default_rng(day), 600
    tag_N2 = random.integers(0, 4, (count, 2))
    spent_N = random.normal(10.0 * day, 2.0, count).round(1)
    spent_N[::13] = np.nan
    return pd.DataFrame(
        {
            "city": [
                None if n % 17 == 0 else f"c{city}" for n, city in enumerate(random.integers(day, day + 30, count))
            ],
            "tags": [" ".join(f"t{tag}" for tag in tag_2[: n % 3]) for n, tag_2 in enumerate(tag_N2)],
            "spent": spent_N,
            "click": (random.random(count) < 0.3).astype(int),
        }
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first data set, and three days in its encoding; the last one twice, with a test split and without."""
    home = tmp_path_factory.mktemp("days")
    for day in range(5):
        rows(day).to_parquet(home / f"{day}.parquet")
    source = {"input": [str(home / "0.parquet")]}
    prepare(SCHEMA, source, home / "first", split=SplitRule.parse("random:0.8,0.1,0.1"))
    pipeline = PreparedDataset.open(home / "first").pipeline
    for day in (1, 2, 3):
        prepare(SCHEMA, {"train": [str(home / f"{day}.parquet")]}, home / f"day-{day}", pipeline=pipeline)
    splits = {"train": [str(home / "3.parquet")], "test": [str(home / "4.parquet")]}
    prepare(SCHEMA, splits, home / "day-3-tested", pipeline=pipeline)
    return home


@pytest.fixture(scope="module")
def scorer(home: Path) -> Scorer:
    pipeline: FeaturePipeline = PreparedDataset.open(home / "first").pipeline
    torch.manual_seed(3)
    config = MaskNetConfig(embedding_dim=4, blocks=1, block_width=8, head=())
    model = MaskNet(config, tables_of(pipeline), fields_of(pipeline))
    for bag in model.embeddings.embedding_bags.values():
        torch.nn.init.normal_(bag.weight)  # scores that differ
    return Scorer(pipeline, [model], RATE)


def days(home: Path, *names: str) -> list[PreparedDataset]:
    return [PreparedDataset.open(home / f"day-{name}") for name in names]


def stands_for(frame: pd.DataFrame) -> np.ndarray:
    return np.where(frame[LABEL] > 0, 1.0, 1 / RATE)


def by_hand(frame: pd.DataFrame, name: str, ids: pd.Series, bins: int) -> tuple[list[int], list[int]]:
    """The twenty most frequent bins that are values, and the counts: missing, never seen, of those, of all others."""
    weight_I = pd.Series(stands_for(frame), frame.index).loc[ids.index]
    count_K = weight_I.groupby(ids.astype(int).to_numpy()).sum().reindex(range(bins), fill_value=0.0)
    top = count_K.iloc[2:].sort_values(ascending=False, kind="stable").index[:20].tolist()
    told = count_K.loc[[0, 1, *top]].tolist()
    return top, [*told, count_K.sum() - sum(told)]


def test_fields_are_counted_over_all_days_and_values_cut_by_the_last(home: Path, scorer: Scorer) -> None:
    data = days(home, "1", "2", "3")
    found = reference_of(scorer, data).fields
    frames = [day.split("train").to_pandas() for day in data]
    frame = pd.concat(frames, ignore_index=True)
    assert len(frame) < 1800, "negatives were dropped, and are made up for"
    assert {int(label) for label in frame[LABEL]} == {0, 1}
    num_ids = {f.name: f.encoder.num_ids for f in scorer.pipeline.fields if f.name != "spent"}  # type: ignore[union-attr]
    for name in ("city", "tags"):
        ids = frame[name].explode() if name == "tags" else frame[name]
        top, counts = by_hand(frame, name, ids.dropna(), num_ids[name])
        assert (list(found[name].bins), list(found[name].counts)) == (top, counts), name
        assert found[name].edges == ()
    last = frames[-1]["spent"].dropna().to_numpy(np.float64)
    edges = np.unique(np.quantile(last, LEVELS, method="lower"))
    assert found["spent"].edges == pytest.approx(edges.tolist(), abs=0)
    values = frame["spent"]
    bins = pd.Series(np.where(values.isna(), 0, 2 + np.digitize(values, edges)), frame.index)
    top, counts = by_hand(frame, "spent", bins, 2 + len(edges) + 1)
    assert (list(found["spent"].bins), list(found["spent"].counts)) == (top, counts)
    assert found["spent"].counts[2] > sum(found["spent"].counts) / 2, "most of the first two days lie below the last"
    alone = reference_of(scorer, data[-1:]).fields
    assert sum(alone["city"].counts) == stands_for(frames[-1]).sum() < sum(found["city"].counts)


def test_scores_are_those_of_the_last_days_rows(home: Path, scorer: Scorer) -> None:
    """Its test split, which has lost no negatives; without one its training rows, where each dropped one counts."""
    for names, split in ((("1", "2", "3"), "train"), (("1", "2", "3-tested"), "test")):
        data = days(home, *names)
        found = reference_of(scorer, data).score
        table = data[-1].split(split)
        score_N, frame = scorer.score_encoded(table).astype(np.float64), table.to_pandas()
        weight_N = stands_for(frame) if split == "train" else np.ones(len(frame))
        order_N = np.argsort(score_N, kind="stable")
        share_N = np.cumsum(weight_N[order_N]) / weight_N.sum()
        starts = np.unique(score_N[order_N][[int(np.argmax(share_N >= level - 1e-12)) for level in LEVELS]])
        assert found.rows_of == f"{split} split"
        assert found.starts == pytest.approx(starts.tolist(), abs=1e-7)
        bin_N = np.digitize(score_N, np.array(found.starts))
        expected = np.bincount(bin_N, weight_N, len(starts) + 1)
        assert list(found.counts) == expected.tolist()
        assert sum(found.counts) == weight_N.sum()
        assert len(starts) > 10
