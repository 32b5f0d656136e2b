"""What a model looks at: models that read one field alone, and masks by a forward pass by hand.

Legend: N rows, D width of the embedding, z masked width, F fields.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.special import logit
from sklearn.metrics import log_loss, roc_auc_score

from features.encoders import AnyEncoder, Identity, Scale, Vocabulary
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.model import MaskNet
from serving.bundle import Bundle, fields_of, tables_of
from serving.scorer import Scorer
from tests.training.untrained import untrained
from training.evaluation.looks import importance, sampled
from training.evaluation.masks import mask_statistics

FIELDS: list[dict[str, Any]] = [
    {"name": "user", "type": "categorical"},
    {"name": "genres", "type": "list"},
    {"name": "price", "type": "numeric", "encoder": "standard", "normalize": True},
    {
        "name": "position",
        "type": "categorical",
        "encoder": "identity",
        "buckets": 5,
        "training_only": {"default": 1},
    },
]
SCHEMA = Schema.model_validate({"name": "s", "label": {"column": "click"}, "fields": FIELDS})
USERS = [f"u{number}" for number in range(50)]
GENRES = [f"g{number}" for number in range(9)]
ENCODERS: dict[str, AnyEncoder] = {
    "user": Vocabulary(pa.array(USERS)),
    "genres": Vocabulary(pa.array(GENRES)),
    "price": Scale("standard"),
    "position": Identity(5),
}
PIPELINE = FeaturePipeline.build(SCHEMA.fields, ENCODERS)
ROWS = 4000


@pytest.fixture(scope="module")
def table() -> pa.Table:
    random = np.random.default_rng(5)
    return PIPELINE.encode(
        {
            "user": random.choice(USERS, ROWS).tolist(),
            "genres": [random.choice(GENRES, size).tolist() for size in random.integers(0, 4, ROWS)],
            "price": random.normal(0, 1, ROWS).tolist(),
            "position": [str(place) for place in random.integers(0, 5, ROWS)],
        }
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return untrained(tmp_path_factory.mktemp("looks") / "bundle", SCHEMA, PIPELINE)


def that_reads(bundle: Bundle, table: pa.Table, name: str) -> Bundle:
    """The model with an embedding in every other field that is the same for all values, its logits spread wide."""
    (model,) = bundle.scorer.models
    alone = MaskNet(bundle.config, tables_of(PIPELINE), fields_of(PIPELINE))
    alone.load_state_dict(model.state_dict())
    for owner, bag in zip(alone.table_names, alone.embeddings.embedding_bags.values(), strict=True):
        if owner != name:
            bag.weight.data[:] = 0.1
    if name != "price":
        assert alone.values is not None
        for weight in alone.values.parameters():
            weight.data.zero_()
    logit_N = torch.from_numpy(logit(Scorer(PIPELINE, [alone], 1.0).score_encoded(table)))
    factor = 1.5 / float(logit_N.std())  # labels drawn by the scores are to be told apart by them
    alone.network.logit.weight.data *= factor
    alone.network.logit.bias.data.copy_(factor * (alone.network.logit.bias.data - logit_N.mean()))
    return Bundle(bundle.path, bundle.manifest, bundle.schema, Scorer(PIPELINE, [alone], 1.0))


@pytest.mark.parametrize("name", ["user", "genres", "price"])
def test_a_model_that_reads_one_field_loses_all_without_it_and_nothing_else(
    bundle: Bundle, table: pa.Table, name: str
) -> None:
    alone = that_reads(bundle, table, name)
    score_N = alone.scorer.score_encoded(table).astype(np.float64)
    label_N = (np.random.default_rng(6).random(ROWS) < score_N).astype(np.float32)
    found = {one.field: one for one in importance(alone, table, label_N, repeats=4)}
    assert list(found) == list(PIPELINE.names)
    for field, one in found.items():
        if field != name:
            assert (one.auc_drop, one.auc_drop_sd) == (pytest.approx(0.0, abs=1e-6), pytest.approx(0.0, abs=1e-6))
            assert (one.logloss_rise, one.logloss_rise_sd) == pytest.approx((0.0, 0.0), abs=1e-6)
    # over all ways to shuffle, a label meets every score equally often
    rate = label_N.mean()
    shuffled = -(rate * np.log(score_N).mean() + (1 - rate) * np.log1p(-score_N).mean())
    told = roc_auc_score(label_N, score_N) - 0.5
    assert told > 0.1
    one = found[name]
    assert one.auc_drop == pytest.approx(told, abs=0.015)  # of four shuffles with a deviation of .009
    assert one.logloss_rise == pytest.approx(shuffled - log_loss(label_N, score_N), rel=0.06)
    assert one.auc_drop_sd is not None
    assert 0 < one.auc_drop_sd < 0.03
    assert 0 < one.logloss_rise_sd < 0.03


def test_without_both_classes_there_is_no_auc_to_lose_and_one_shuffle_has_no_spread(
    bundle: Bundle, table: pa.Table
) -> None:
    found = importance(bundle, table, np.ones(ROWS), rows=300, repeats=1)
    assert {(one.auc_drop, one.auc_drop_sd, one.logloss_rise_sd) for one in found} == {(None, None, 0.0)}
    assert found == importance(bundle, table, np.ones(ROWS), rows=300, repeats=1)


def test_the_spread_is_that_of_the_shuffles(bundle: Bundle, table: pa.Table) -> None:
    label_N = np.arange(ROWS) % 2
    once, twice = (importance(bundle, table, label_N, rows=500, repeats=repeats)[0] for repeats in (1, 2))
    other = 2 * twice.logloss_rise - once.logloss_rise  # the second shuffle's, the first being the same
    assert twice.logloss_rise_sd == pytest.approx(abs(other - once.logloss_rise) / np.sqrt(2), rel=1e-6)
    assert twice.logloss_rise_sd > 0


def test_a_sample_is_of_the_rows_in_their_order(table: pa.Table) -> None:
    sample, row_S = sampled(table, 100, 7)
    assert len(np.unique(row_S)) == sample.num_rows == 100
    assert (np.diff(row_S) > 0).all()
    assert sample["price"].to_pylist() == [table["price"][int(row)].as_py() for row in row_S]
    assert sampled(table, ROWS, 7)[1].tolist() == list(range(ROWS))


def gates_by_hand(model: MaskNet, block: int, raw_ND: np.ndarray) -> np.ndarray:
    """m = W2 · relu(W1 · V + b1) + b2 in fp64."""
    mask = model.network.blocks[block].get_submodule("mask")
    weights = {name: weight.detach().double().numpy() for name, weight in mask.named_parameters()}
    hidden = np.maximum(raw_ND @ weights["aggregate.weight"].T + weights["aggregate.bias"], 0)
    return hidden @ weights["project.weight"].T + weights["project.bias"]


@pytest.mark.parametrize(
    ("shape", "masked"),
    [
        ({"kind": "parallel", "head": [5], "blocks": 3}, [0, 1, 2]),
        ({"kind": "serial", "blocks": 3}, [0]),
        ({"kind": "residual_serial", "blocks": 3, "placement": "pre"}, [0]),
        ({"kind": "serial", "blocks": 2, "feed_forward": False, "hidden_norm": "none"}, [0, 1]),
    ],
)
def test_mask_statistics_are_those_of_a_forward_pass_by_hand(
    tmp_path: Path, table: pa.Table, shape: dict[str, Any], masked: list[int]
) -> None:
    bundle = untrained(tmp_path / "bundle", SCHEMA, PIPELINE, members=2, **shape)
    found = mask_statistics(bundle, table)
    assert found is not None
    assert found.fields == list(PIPELINE.names)
    mean, deviation, hidden = [], [], []
    for model in bundle.scorer.models:
        raw_ND = raw_embedding(model, table)
        gates = [gates_by_hand(model, block, raw_ND) for block in range(shape["blocks"])]
        mean.append([gates[block].mean(0).reshape(4, -1).mean(1) for block in masked])
        deviation.append([gates[block].std(0).reshape(4, -1).mean(1) for block in masked])
        hidden.append([(g.mean(), g.std(0).mean()) for block, g in enumerate(gates) if block not in masked])
    np.testing.assert_allclose(found.mean_BF, np.mean(mean, 0), atol=2e-5)
    np.testing.assert_allclose(found.deviation_BF, np.mean(deviation, 0), atol=2e-5)
    assert found.deviation_BF.max() > 0.1
    assert [block for block, *_ in found.hidden] == [b for b in range(shape["blocks"]) if b not in masked]
    if found.hidden:
        np.testing.assert_allclose([rest for _, *rest in found.hidden], np.mean(hidden, 0), atol=2e-5)
    for model in bundle.scorer.models:  # nothing stays behind
        assert not any(module._forward_hooks for module in model.network.modules())


def raw_embedding(model: MaskNet, table: pa.Table) -> np.ndarray:
    """V [N, D] in fp64, from the tables; the position is that of serving, which is the second."""
    weights = [bag.weight.detach().double().numpy() for bag in model.embeddings.embedding_bags.values()]
    user, genres, position = weights
    assert model.values is not None
    value = {name: weight.detach().double().numpy() for name, weight in model.values.named_parameters()}
    columns = [
        user[table["user"].to_numpy()],
        np.stack([genres[ids].mean(0) for ids in table["genres"].to_pylist()]),
        table["price"].to_numpy()[:, None].astype(np.float64) * value["scale"][0] + value["bias"][0],
        np.repeat(position[[2 + 1]], table.num_rows, axis=0),
    ]
    return np.concatenate(columns, axis=1)


def test_a_model_without_masks_has_no_statistics(tmp_path: Path, table: pa.Table, bundle: Bundle) -> None:
    assert mask_statistics(untrained(tmp_path / "bundle", SCHEMA, PIPELINE, mask=False), table) is None
    assert mask_statistics(bundle, table.slice(0, 0)) is None


def test_statistics_are_of_a_sample_of_many_rows(bundle: Bundle, table: pa.Table) -> None:
    found = mask_statistics(bundle, table, rows=64, seed=9)
    _, row_S = sampled(table, 64, 9)
    whole = mask_statistics(bundle, table.take(pa.array(row_S)))
    assert found is not None
    assert whole is not None
    np.testing.assert_array_equal(found.mean_BF, whole.mean_BF)
