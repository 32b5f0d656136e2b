"""Ensembles: one bundle of several trained models, whose score is their mean."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.encoders import Managed, Vocabulary
from features.errors import InputError
from features.id_maps import IdMap
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.calibration import Calibration
from serving.ensemble import write_ensemble
from serving.members import Member
from serving.monitoring.reference import FieldReference, Reference, load_reference, score_reference
from serving.ranking.engine import RankingEngine
from serving.scorer import Scorer

Make = Callable[..., Bundle]


def together(out: Path, *bundles: Bundle, **more: Any) -> Bundle:
    """The ensemble, as it opens from disk."""
    given = {"name": "ensemble", "run_id": "parent", "evaluate": lambda scorer: {"test": {"auc": 0.5}}}
    write_ensemble(out, bundles, **given | more)
    return load_bundle(out)


def test_the_score_is_the_mean_of_the_members(make: Make, rows: dict[str, list[Any]], tmp_path: Path) -> None:
    singles = [make(str(seed), seed) for seed in (1, 2, 3)]
    ensemble = together(tmp_path / "ensemble", *singles)
    alone_MN = np.stack([single.scorer.score(rows) for single in singles])
    np.testing.assert_allclose(ensemble.scorer.score(rows), alone_MN.astype(np.float64).mean(0), rtol=0, atol=6e-8)
    assert alone_MN.std(0).mean() > 0.05
    # each member's logit is corrected by itself: the mean of uncorrected scores would be another
    encoded, raw_MN = ensemble.pipeline.encode(rows), []
    for model in ensemble.scorer.models:
        ids = torch.tensor([encoded["user"].to_pylist(), encoded["item"].to_pylist()])
        weights = [bag.weight for bag in model.embeddings.embedding_bags.values()]
        emb_NFd = torch.stack([weight[id_N] for weight, id_N in zip(weights, ids, strict=True)], 1)
        with torch.no_grad():
            raw_MN.append(model.network(emb_NFd).double() + math.log(0.2))
    expected = torch.stack(raw_MN).sigmoid().mean(0).numpy()
    np.testing.assert_allclose(ensemble.scorer.score(rows), expected, rtol=0, atol=1e-6)


def test_what_the_bundle_says_of_itself(make: Make, tmp_path: Path) -> None:
    ensemble = together(tmp_path / "ensemble", make("a", 1), make("b", 2))
    assert (ensemble.name, ensemble.manifest["run_id"]) == ("ensemble", "parent")
    assert ensemble.manifest["members"] == ["run 1", "run 2"]
    assert ensemble.manifest["metrics"] == {"test": {"auc": 0.5}}
    assert ensemble.manifest["sampling_rate"] == 0.2
    assert sorted(path.name for path in (ensemble.path / "members").iterdir()) == ["00", "01"]


def test_drift_is_told_from_the_mean(make: Make, rows: dict[str, list[Any]], tmp_path: Path) -> None:
    fields = {name: FieldReference(bins=(2,), counts=(0, 0, 9, 0)) for name in ("user", "item")}

    def reference(scorer: Scorer) -> Reference:
        return Reference(fields=fields, score=score_reference(scorer.score(rows), None, "rows"))

    singles = [make(str(seed), seed, reference=reference) for seed in (1, 2)]
    ensemble = together(tmp_path / "ensemble", *singles, reference=reference)
    mean_N = np.mean([single.scorer.score(rows) for single in singles], 0)
    found = load_reference(ensemble.path, ensemble.pipeline)
    assert found.fields == fields
    np.testing.assert_allclose(found.score.starts[9], np.sort(mean_N)[29], rtol=1e-5)  # of 60
    plain = together(tmp_path / "plain", *singles)
    with pytest.raises(InputError, match=r"has no reference\.json"):
        load_reference(plain.path, plain.pipeline)


def test_ensembles_of_ensembles_hold_all_members(make: Make, rows: dict[str, list[Any]], tmp_path: Path) -> None:
    singles = [make(str(seed), seed) for seed in (1, 2, 3)]
    pair = together(tmp_path / "pair", *singles[:2])
    everyone = together(tmp_path / "all", pair, singles[2])
    assert everyone.manifest["members"] == ["run 1", "run 2", "run 3"]
    expected = np.mean([single.scorer.score(rows).astype(np.float64) for single in singles], 0)
    np.testing.assert_allclose(everyone.scorer.score(rows), expected, rtol=0, atol=6e-8)


def test_only_the_mean_is_calibrated(make: Make, rows: dict[str, list[Any]], tmp_path: Path) -> None:
    fitted = {"split": "valid", "rows": 9, "sampling_rate": 0.2}
    own = Calibration.model_validate({"curve": {"kind": "temperature", "temperature": 3.0}, "fitted": fitted})
    last = Calibration.model_validate({"curve": {"kind": "platt", "slope": 0.8, "shift": 0.5}, "fitted": fitted})
    plain = [make(f"plain {seed}", seed) for seed in (1, 2)]
    singles = [make(f"calibrated {seed}", seed, calibrate=lambda scorer: own) for seed in (1, 2)]
    expected = np.mean([single.scorer.score(rows) for single in plain], 0)
    np.testing.assert_allclose(together(tmp_path / "a", *singles).scorer.score(rows), expected, rtol=0, atol=6e-8)
    ensemble = together(tmp_path / "b", *singles, calibrate=lambda scorer: last)
    np.testing.assert_allclose(ensemble.scorer.score(rows), last.apply(expected.astype(np.float32)), rtol=1e-6)
    ranked = RankingEngine(ensemble, "1").rank({"user": "ann"}, {"item": rows["item"]}, 60)
    assert [item.index for item in ranked] == np.argsort(-expected, kind="stable").tolist()


def test_one_bundle_is_an_ensemble_of_one_and_none_is_none(make: Make, rows: dict[str, Any], tmp_path: Path) -> None:
    single = make()
    np.testing.assert_array_equal(together(tmp_path / "e", single).scorer.score(rows), single.scorer.score(rows))
    with pytest.raises(InputError, match="needs one bundle at least"):
        together(tmp_path / "none")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sampling_rate": 0.5}, r"sampling_rate differs \(0.2 and 0.5\)"),
        (
            {"config": MaskNetConfig(embedding_dim=4, blocks=1, block_width=8, head=())},
            r"model.block_width differs \(6 and 8\)",
        ),
    ],
)
def test_what_differs_is_named(make: Make, tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    first, other = make("first"), make("other", 2, **changed)
    with pytest.raises(InputError, match=told) as error:
        together(tmp_path / "e", first, other)
    assert str(first.path) in str(error.value)
    assert str(other.path) in str(error.value)
    assert not (tmp_path / "e").exists()


def test_another_encoding_is_refused(make: Make, tmp_path: Path) -> None:
    first = make("first")
    item = first.pipeline.fields[1].encoder
    people = Vocabulary(first.pipeline.fields[0].encoder.values.slice(0, 1))  # type: ignore[union-attr]
    fewer = FeaturePipeline.build(first.schema.fields, {"user": people, "item": item})
    model = MaskNet(first.config, tables_of(fewer), fields_of(fewer))
    given = {"name": "small", "config": first.config, "schema": first.schema, "pipeline": fewer, "sampling_rate": 0.2}
    given |= {"members": [Member.of(model)], "run_id": None, "evaluate": lambda scorer: {}}
    other = write_bundle(tmp_path / "other", **given)
    with pytest.raises(InputError, match="pipeline_digest differs"):
        together(tmp_path / "e", first, other)


def test_managed_ids_must_have_the_same_rows(tmp_path: Path) -> None:
    plain = {"name": "m", "label": {"column": "click"}}
    fields = [{"name": "user", "type": "categorical", "encoder": "managed", "buckets": 8}]
    schema = Schema.model_validate(plain | {"fields": fields})
    pipeline = FeaturePipeline.build(schema.fields, {"user": Managed(8, "lfu")})
    config = MaskNetConfig(embedding_dim=4, blocks=1, block_width=6, head=())

    def bundle(name: str, rows_K: list[int], step: int) -> Bundle:
        id_map = IdMap(np.array([50, 60, 70]), np.array(rows_K, np.int32), {"counts": np.arange(3)}, step)
        member = Member.of(MaskNet(config, tables_of(pipeline), fields_of(pipeline)))
        given = {"config": config, "schema": schema, "pipeline": pipeline, "sampling_rate": 1.0, "run_id": None}
        given |= {"members": [member], "evaluate": lambda scorer: {}, "id_maps": {"user": id_map}}
        return write_bundle(tmp_path / name, name="managed", **given)

    first = bundle("first", [2, 3, 4], 10)
    ensemble = together(tmp_path / "e", first, bundle("same", [2, 3, 4], 20))
    assert ensemble.scorer.id_maps["user"].rows_K.tolist() == [2, 3, 4]
    with pytest.raises(InputError, match="the managed ids of user have other rows in each"):
        together(tmp_path / "f", first, bundle("other", [2, 4, 3], 10))


def test_a_members_damage_is_noticed(make: Make, reseal: Callable[..., None], tmp_path: Path) -> None:
    path = together(tmp_path / "e", make("a", 1), make("b", 2)).path
    (path / "members" / "01" / "network.safetensors").unlink()
    with pytest.raises(InputError, match=r"members/01/network\.safetensors is missing"):
        load_bundle(path)
    reseal(path)
    with pytest.raises(InputError, match="the weights do not fit the model"):
        load_bundle(path)
    reseal(path, members=["run 1"])  # one member alone has other scores
    with pytest.raises(InputError, match=r"golden row \d+ scores"):
        load_bundle(path)
    reseal(path, members=[])
    with pytest.raises(InputError, match=r"manifest\.json names no members"):
        load_bundle(path)
