"""The gate on trained models in a real registry: who passes, who is refused, and by which rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from sklearn.metrics import log_loss, roc_auc_score

from features.dataset import PreparedDataset
from features.errors import InputError
from features.pipeline import FeaturePipeline
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.calibration import Calibration, Fitted, Isotonic
from serving.members import Member
from serving.scorer import Scorer
from training import demo
from training.config import Config, load_config
from training.errors import Failure
from training.promotion.config import SliceRule
from training.promotion.parts import rows_of_rule
from training.promotion.promote import Promoted, PromoteOptions, Refused, promote
from training.promotion.registry import AliasRecord
from training.promotion.trial import Given
from training.train import train

pytestmark = pytest.mark.long
NAME, ROWS = "gate", 12_000
FIELDS = [
    {"name": "user", "type": "categorical"},
    {"name": "a", "type": "categorical"},
    {"name": "age", "type": "numeric", "encoder": "quantile", "buckets": 4},
    {"name": "height", "type": "numeric", "encoder": "standard"},
    {"name": "tags", "type": "list", "separator": " "},
]
SCHEMA = Schema.model_validate({"name": "gate", "label": {"column": "click"}, "group": "user", "fields": FIELDS})
Register = Callable[[Path, str], str]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks whose rate is .1 or .9 by `a`; 300 users, some of whom training hardly knows; some rows lack a value."""
    random = np.random.default_rng(0)
    a_N = random.integers(0, 8, ROWS)
    user_N = (300 * random.random(ROWS) ** 3).astype(int)
    age_N = np.where(random.random(ROWS) < 0.1, None, random.integers(20, 60, ROWS).astype(str))
    height_N = np.where(random.random(ROWS) < 0.1, None, random.normal(size=ROWS)).tolist()
    tags_N = np.array(["x", "y", "x y", "x x", None], object)[random.integers(0, 5, ROWS)]
    columns = {"user": user_N, "a": a_N, "age": age_N.tolist(), "height": height_N, "tags": tags_N}
    click_N = (random.random(ROWS) < np.where(a_N % 2, 0.9, 0.1)).astype(int)
    path = tmp_path_factory.mktemp("raw") / "clicks.parquet"
    pl.DataFrame({**columns, "click": click_N}).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def dataset(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(SCHEMA, {"input": [str(raw)]}, out, split=SplitRule.parse("random:0.8,0.1,0.1"))
    return PreparedDataset.open(out)


@pytest.fixture(scope="module")
def own(config: Config, dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model that has learned them; `config` gives the tests' store."""
    home = tmp_path_factory.mktemp("trained")
    path = home / "config.yaml"
    path.write_text("experiment: gate\ntracking: {registered_model: trained}\n")
    shape = ["model.embedding_dim=4", "model.block_width=16", "model.head=[8]", "model.blocks=1"]
    settings = ["model.dropout=0", "train.batch_size=256", "train.epochs=12", "optimizer.dense.lr=0.01"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = train(load_config(path, [*shape, *settings]), dataset.path, home / "out", Console(quiet=True))
    assert result is not None
    return load_bundle(Path(result["bundle"]))


def damaged(bundle: Bundle, home: Path, noise: float = 0.0, sampling_rate: float = 1.0) -> Path:
    """The bundle with noise on the network's weights, or corrected for a sampling that never was."""
    random = torch.Generator().manual_seed(0)
    member = Member.of(bundle.scorer.models[0])
    network = {
        name: weight + noise * torch.randn(weight.shape, generator=random) for name, weight in member.network.items()
    }
    return written(home, bundle.config, SCHEMA, bundle.pipeline, replace(member, network=network), sampling_rate)


def written(
    home: Path,
    config: MaskNetConfig,
    schema: Schema,
    pipeline: FeaturePipeline,
    member: Member,
    sampling_rate: float = 1.0,
    calibrate: Callable[[Scorer], Calibration] | None = None,
) -> Path:
    out = home / "bundle"
    write_bundle(
        out,
        name=NAME,
        config=config,
        schema=schema,
        pipeline=pipeline,
        members=[member],
        sampling_rate=sampling_rate,
        run_id=None,
        evaluate=lambda scorer: {},
        calibrate=calibrate,
    )
    return out


@dataclass(frozen=True)
class Versions:
    """What the registry holds under `gate`, by what was done to the model."""

    good: str
    again: str  # the same model once more
    trembling: str  # hardly different
    broken: str
    loud: str  # the same order of rows, and far too high scores


def uri(version: str) -> str:
    return f"models:/{NAME}/{version}"


@pytest.fixture(scope="module")
def versions(register: Register, own: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    home = tmp_path_factory.mktemp("variants")
    return Versions(
        good=register(own.path, NAME),
        again=register(own.path, NAME),
        trembling=register(damaged(own, home / "trembling", noise=0.003), NAME),
        broken=register(damaged(own, home / "broken", noise=1.0), NAME),
        loud=register(damaged(own, home / "loud", sampling_rate=4.0), NAME),
    )


@pytest.fixture
def alias(request: pytest.FixtureRequest) -> str:
    """One of the test's own."""
    return request.node.name.partition("[")[0]


def asked(version: str, alias: str, data: Path | None = None, **more: Any) -> PromoteOptions:
    given = None if data is None else Given(data)
    return PromoteOptions(model=uri(version), alias=alias, given=given, **more)


def tags(version: str, alias: str) -> dict[str, str]:
    found = mlflow.MlflowClient().get_model_version(NAME, version).tags
    return {key.removeprefix(f"masknet.{alias}."): value for key, value in found.items() if f".{alias}." in key}


def holder(alias: str) -> str | None:
    return AliasRecord(NAME, alias).holder()


def failures(refused: pytest.ExceptionInfo[Refused]) -> list[str]:
    return [check.name for check in refused.value.evidence.checks if not check.passed]


def record_of(version: str) -> dict[str, Any]:
    client = mlflow.MlflowClient()
    run = client.get_run(client.get_model_version(NAME, version).run_id)
    return mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/promotion.json")


def test_the_first_one_needs_no_champion_and_the_same_again_passes(
    versions: Versions, dataset: PreparedDataset, own: Bundle, alias: str
) -> None:
    first = promote(asked(versions.good, alias, dataset.path))
    assert (first.model_uri, first.replaced, holder(alias)) == (uri(versions.good), None, versions.good)
    assert [check.name for check in first.checks] == ["rows", "calibration", "ece"]
    second = promote(asked(versions.again, alias, dataset.path))
    assert second.replaced == uri(versions.good)
    assert second.reason == f"not worse than {uri(versions.good)} on test split of {dataset.path}"
    found = {check.name: check.value for check in second.checks}
    assert (found["logloss"], found["auc"], found["rows"]) == (0.0, 0.0, 1200)
    new, old = tags(versions.again, alias), tags(versions.good, alias)
    assert (new["replaced"], new["reason"]) == (versions.good, second.reason)
    assert (old["replaced_by"], old["ended"], old["until"]) == (versions.again, second.reason, new["since"])
    test = dataset.split("test")
    label_N, score_N = test["_label"].to_numpy(), own.scorer.score_encoded(test)
    area, loss = roc_auc_score(label_N, score_N), log_loss(label_N, score_N)
    assert new["metrics"].startswith(f"auc {area:.4f} (0.0000), logloss {loss:.4f} (0.0000), calibration ")
    record = record_of(versions.again)
    assert (record["reason"], record["forced"], record["config"]["level"]) == (second.reason, False, 0.05)
    assert [check["name"] for check in record["checks"]] == ["rows", "calibration", "ece", "logloss", "auc"]
    assert record["evidence"]["metrics"][second.model_uri]["auc"]["value"] == pytest.approx(area, abs=1e-9)


def test_a_damaged_model_is_refused_and_the_better_one_replaces_it(
    versions: Versions, dataset: PreparedDataset, alias: str
) -> None:
    data = dataset.path
    promote(asked(versions.good, alias, data))
    before = tags(versions.good, alias)
    with pytest.raises(
        Refused, match=r"does not become .*: .*logloss \+.*, allowed: not worse with p < 0\.05"
    ) as refused:
        promote(asked(versions.broken, alias, data))
    assert {"logloss", "auc"} <= set(failures(refused))
    assert isinstance(refused.value, Failure)  # exit code 1
    assert (holder(alias), tags(versions.good, alias), tags(versions.broken, alias)) == (versions.good, before, {})

    forced = promote(asked(versions.broken, alias, data, force="a trial of the pager"))
    assert (holder(alias), forced.reason) == (versions.broken, "forced: a trial of the pager")
    assert {"logloss", "auc"} <= set(tags(versions.broken, alias)["failed"].split(", "))
    assert record_of(versions.broken)["forced"] is True

    back = promote(asked(versions.good, alias, data))
    found = {check.name: check.value for check in back.checks}
    assert found["logloss"] < 0 < found["auc"]
    assert back.replaced == uri(versions.broken)
    assert not {"until", "replaced_by", "ended", "failed"} & tags(versions.good, alias).keys()


def test_a_badly_calibrated_model_is_refused_even_alone(
    versions: Versions, dataset: PreparedDataset, alias: str
) -> None:
    with pytest.raises(Refused) as refused:
        promote(asked(versions.loud, alias, dataset.path))
    assert failures(refused) == ["calibration", "ece"]
    assert holder(alias) is None
    promote(asked(versions.good, alias, dataset.path))
    with pytest.raises(Refused) as refused:
        promote(asked(versions.loud, alias, dataset.path))
    (area,) = [check.value for check in refused.value.evidence.checks if check.name == "auc"]
    assert area == pytest.approx(0, abs=1e-4)  # it ranks alike, but for rounding
    assert failures(refused) == ["calibration", "ece", "logloss"]


def test_a_calibration_does_not_change_how_a_model_ranks(
    versions: Versions, dataset: PreparedDataset, register: Register, own: Bundle, tmp_path: Path, alias: str
) -> None:
    """Two steps tie the rows of each: the AUC of calibrated scores would be another."""
    steps = Isotonic(kind="isotonic", scores=(0.499, 0.501), values=(0.1, 0.9))
    tied = Calibration(curve=steps, fitted=Fitted(split="valid", rows=1200, sampling_rate=1.0))
    member = Member.of(own.scorer.models[0])
    path = written(tmp_path, own.config, SCHEMA, own.pipeline, member, calibrate=lambda _: tied)
    test = dataset.split("test")
    calibrated, plain = (load_bundle(bundle).scorer.score_encoded(test) for bundle in (path, own.path))
    label_N = test["_label"].to_numpy()
    assert abs(roc_auc_score(label_N, calibrated) - roc_auc_score(label_N, plain)) > 1e-3
    promote(asked(versions.good, alias, dataset.path))
    version = register(path, NAME)
    done = promote(asked(version, alias, dataset.path, force="whatever it is"))
    found = {check.name: check.value for check in done.checks}
    assert found["auc"] == 0
    assert found["logloss"] == pytest.approx(log_loss(label_N, calibrated) - log_loss(label_N, plain), abs=1e-6)


def test_rows_that_lack_negatives_judge_no_calibration(
    versions: Versions, register: Register, own: Bundle, raw: Path, tmp_path: Path, alias: str
) -> None:
    """Half of the negatives: every calibrated model gives half as many clicks as there are."""
    member, rate = Member.of(own.scorer.models[0]), {"rate": 0.5}
    arrived, dropped = (
        Schema.model_validate({**SCHEMA.plain(), key: rate}) for key in ("already_sampled", "negative_sampling")
    )
    version = register(written(tmp_path, own.config, arrived, own.pipeline, member, 0.5), NAME)
    first = promote(replace(asked(version, alias), given=Given(None, (str(raw),))))
    assert first.reason == f"there was no {alias}, and no calibration to judge on {raw}"
    prepare(dropped, {"train": [str(raw)]}, tmp_path / "data", pipeline=own.pipeline)
    second = promote(replace(asked(versions.good, alias), given=Given(tmp_path / "data", split="train")))
    for checks, told in ((first.checks, "already_sampled"), (second.checks, "negative_sampling")):
        shown = [(check.passed, check.shown) for check in checks if check.name in ("calibration", "ece")]
        assert [passed for passed, _ in shown] == [True, True]
        assert all(text.startswith("not judged: ") and f"({told})" in text for _, text in shown)


def test_a_slice_decides_by_its_threshold(
    versions: Versions, dataset: PreparedDataset, own: Bundle, raw: Path, alias: str, tmp_path: Path
) -> None:
    promote(asked(versions.good, alias, dataset.path))
    other = load_bundle(damaged(own, tmp_path, noise=0.003))  # as the trembling one
    rows = pl.read_parquet(raw)[dataset.split("test")["_line"].to_numpy() - 1]
    rise = {}
    for value in range(8):
        part = rows.filter(pl.col("a") == value)
        new_n, old_n = (bundle.scorer.score(part.to_arrow()) for bundle in (other, own))
        rise[value] = log_loss(part["click"], new_n, labels=[0, 1]) - log_loss(part["click"], old_n, labels=[0, 1])
    value = max(rise, key=lambda name: rise[name])
    assert rise[value] > 1e-4
    rule = "slices: [{{field: a, value: {}, max_logloss_increase: {}}}]"
    path = tmp_path / "gate.yaml"
    path.write_text(rule.format(value, rise[value] / 2))
    with pytest.raises(Refused) as refused:
        promote(asked(versions.trembling, alias, dataset.path, config=path))
    assert failures(refused) == [f"a = {value}"]
    (found,) = [check.value for check in refused.value.evidence.checks if not check.passed]
    assert found == pytest.approx(rise[value], abs=1e-6)
    path.write_text(rule.format(value, rise[value] * 2))
    assert promote(asked(versions.trembling, alias, dataset.path, config=path)).replaced == uri(versions.good)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"field": "a", "value": 3}, pl.col("a") == 3),
        ({"field": "tags", "value": "x"}, pl.col("tags").str.contains("x")),
        ({"field": "tags", "is": "missing"}, pl.col("tags").is_null()),
        ({"field": "age", "is": "missing"}, pl.col("age").is_null()),
        ({"field": "height", "is": "missing"}, pl.col("height").is_null()),
    ],
)
def test_a_slice_is_the_rows_that_it_names(
    own: Bundle, dataset: PreparedDataset, raw: Path, rule: dict[str, Any], expected: pl.Expr
) -> None:
    rows = pl.read_parquet(raw)[dataset.split("test")["_line"].to_numpy() - 1]
    found = rows_of_rule(SliceRule.model_validate(rule), own, dataset.split("test"), None)
    np.testing.assert_array_equal(found, np.flatnonzero(rows.select(expected).to_series().to_numpy()))


def test_a_number_stands_for_its_bucket(own: Bundle, dataset: PreparedDataset, raw: Path) -> None:
    rows = pl.read_parquet(raw)[dataset.split("test")["_line"].to_numpy() - 1]
    found = rows_of_rule(SliceRule(field="age", value=20), own, dataset.split("test"), None)
    ages = rows[found]["age"].cast(pl.Float64)
    youngest = rows["age"].cast(pl.Float64).is_between(20, ages.max())  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, np.flatnonzero(youngest.fill_null(False)))
    assert 0.15 < len(found) / rows.height < 0.3  # a quarter of nine tenths


def test_unknown_and_cold_users_are_those_that_training_lacks(own: Bundle, dataset: PreparedDataset, raw: Path) -> None:
    rows, test = pl.read_parquet(raw), dataset.split("test")
    user_N = rows["user"].to_numpy()[test["_line"].to_numpy() - 1]
    trained = rows[dataset.split("train")["_line"].to_numpy() - 1]["user"].value_counts().filter(pl.col("count") >= 2)
    new_N = ~np.isin(user_N, trained["user"].to_numpy())
    for kind in ("unknown", "cold"):
        rule = SliceRule.model_validate({"field": "user", "is": kind})
        found = rows_of_rule(rule, own, test, dataset.files("train"))
        np.testing.assert_array_equal(found, np.flatnonzero(new_N))
    head = rows_of_rule(SliceRule.model_validate({"field": "user", "is": "head"}), own, test, dataset.files("train"))
    assert len(head) / len(user_N) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"field": "b", "value": 1}, "no such field; it has user, a, age"),
        ({"field": "a", "value": "eight"}, "the model knows no such value"),
        ({"field": "height", "value": 0.5}, "is a number without buckets"),
        ({"field": "age", "is": "unknown"}, "no value of age is unknown: every one has a bucket"),
        ({"field": "height", "is": "unknown"}, "is a number without buckets"),
        ({"field": "user", "is": "cold"}, "needs the training split, which --data has"),
        ({"field": "tags", "is": "cold"}, "needs the training split"),
    ],
)
def test_a_slice_that_is_not_there_is_told(
    own: Bundle, dataset: PreparedDataset, rule: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        rows_of_rule(SliceRule.model_validate(rule), own, dataset.split("test"), None)


@pytest.fixture(scope="module")
def stranger(register: Register, own: Bundle, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A version with another pipeline, which has no age, and has learned nothing."""
    home = tmp_path_factory.mktemp("stranger")
    plain = {**SCHEMA.plain(), "fields": [field for field in FIELDS if field["name"] != "age"]}
    schema = Schema.model_validate(plain)
    prepare(schema, {"input": [str(raw)]}, home / "data", split=SplitRule.parse("random:0.8,0.1,0.1"))
    pipeline = PreparedDataset.open(home / "data").pipeline
    member = Member.of(MaskNet(own.config, tables_of(pipeline), fields_of(pipeline)))
    return register(written(home, own.config, schema, pipeline, member), NAME)


def test_a_wrong_slice_is_told_before_anything_is_scored(
    own: Bundle,
    versions: Versions,
    dataset: PreparedDataset,
    alias: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("slices: [{field: b, value: 1}]")
    options = asked(versions.good, alias, dataset.path, config=path)
    monkeypatch.setattr("training.promotion.promote.load_bundle", lambda _: own)  # which scores the golden rows
    monkeypatch.setattr("serving.scorer.Scorer.uncalibrated", lambda *_: pytest.fail("rows are scored"))
    with pytest.raises(InputError, match="slice 'b = 1': the model has no such field"):
        promote(options)


def test_models_of_two_pipelines_are_judged_by_raw_rows(
    versions: Versions, stranger: str, dataset: PreparedDataset, raw: Path, tmp_path: Path, alias: str
) -> None:
    rows = pl.read_parquet(raw)[dataset.split("test")["_line"].to_numpy() - 1]
    unread = pl.Series(["young", *rows["age"][1:]])
    rows.with_columns(age=unread).write_parquet(tmp_path / "raw.parquet")
    given = Given(None, (str(tmp_path / "raw.parquet"),), max_bad_rows=0.01)

    promote(asked(stranger, alias, force="to begin with"))
    with pytest.raises(InputError, match=rf"than the one of {uri(stranger)} .*--input instead"):
        promote(asked(versions.good, alias, dataset.path))
    better = promote(replace(asked(versions.good, alias), given=given))
    found = {check.name: check.value for check in better.checks}
    assert found["logloss"] < 0 < found["auc"]
    assert found["rows"] == 1199  # without the one that only the other can read
    with pytest.raises(Refused) as refused:
        promote(replace(asked(stranger, alias), given=given))
    assert {"logloss", "auc"} <= set(failures(refused))


def test_a_champion_that_changes_meanwhile_is_not_overrun(
    versions: Versions, dataset: PreparedDataset, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(asked(versions.good, alias, dataset.path))
    found = iter([versions.good, versions.broken])
    monkeypatch.setattr(AliasRecord, "holder", lambda _: next(found))
    with pytest.raises(Failure, match="was given to another version meanwhile"):
        promote(asked(versions.again, alias, dataset.path))


def test_a_champion_that_cannot_be_opened_is_told(
    register: Register, own: Bundle, versions: Versions, dataset: PreparedDataset, alias: str
) -> None:
    gone = register(own.path, NAME)
    promote(asked(gone, alias, force="a history"))
    client = mlflow.MlflowClient()
    folder = Path(mlflow.artifacts.download_artifacts(client.get_model_version_download_uri(NAME, gone)))
    (folder / "artifacts" / "bundle" / "manifest.sha256").unlink()
    with pytest.raises(InputError, match=rf"{alias} {uri(gone)} cannot be compared with: .*--force REASON alone"):
        promote(asked(versions.good, alias, dataset.path))
    assert promote(asked(versions.good, alias, force="the old one is broken")).replaced == uri(gone)


def test_the_demo_gets_along_with_any_earlier_champion(
    register: Register,
    own: Bundle,
    versions: Versions,
    stranger: str,
    dataset: PreparedDataset,
    raw: Path,
    tmp_path: Path,
) -> None:
    def found(version: str) -> Promoted | Refused:
        return demo._promote(uri(version), raw, dataset.path, tmp_path)

    first = found(versions.good)
    assert isinstance(first, Promoted)
    assert (first.replaced, first.alias) == (None, "champion")
    refused = found(versions.broken)
    assert isinstance(refused, Refused)
    assert holder("champion") == versions.good
    promote(asked(stranger, "champion", force="an earlier demo"))
    better = found(versions.good)
    assert isinstance(better, Promoted)
    assert better.reason == f"not worse than {uri(stranger)} on {tmp_path / 'test.parquet'}"
    assert [check.shown for check in better.checks if check.name == "rows"] == ["1,200"]
    gone = register(own.path, NAME)
    promote(asked(gone, "champion", force="an earlier version's demo"))
    client = mlflow.MlflowClient()
    folder = Path(mlflow.artifacts.download_artifacts(client.get_model_version_download_uri(NAME, gone)))
    (folder / "artifacts" / "bundle" / "manifest.sha256").unlink()
    forced = found(versions.again)
    assert isinstance(forced, Promoted)
    assert forced.reason.startswith(
        f"forced: the earlier champion cannot judge: champion {uri(gone)} cannot be compared"
    )
