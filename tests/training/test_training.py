"""Training in this process: what is learned, what is kept, what is recorded."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
import yaml
from rich.console import Console

from features.dataset import PreparedDataset
from features.encoders import UNKNOWN
from features.errors import InputError
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from masknet.model import Table, initial_rows, table_key
from serving.bundle import Bundle, load_bundle
from serving.models import locate
from training.baselines import baseline_scores
from training.config import Config, load_config
from training.errors import Failure
from training.evaluation.evaluate import MODEL, evaluate, rows_of_dataset, rows_of_files
from training.fit.starting import Start
from training.train import train

QUIET = Console(quiet=True)


def planted(path: Path, rows: int = 6000) -> Path:
    """Clicks that depend on a product of two fields, which no sum of their effects can express."""
    random = np.random.default_rng(0)
    a_N, b_N = random.integers(0, 8, rows), random.integers(0, 8, rows)
    sign_8 = np.array([1, -1] * 4)
    click = random.random(rows) < np.where(sign_8[a_N] * sign_8[b_N] > 0, 0.9, 0.1)
    pd.DataFrame({"a": a_N, "b": b_N, "click": click.astype(int)}).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def planted_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("planted")
    fields = [{"name": name, "type": "categorical"} for name in "ab"]
    schema = Schema.model_validate({"name": "planted", "label": {"column": "click"}, "fields": fields})
    source = {"input": [str(planted(home / "rows.parquet"))]}
    prepare(schema, source, home / "data", split=SplitRule.parse("random:0.8,0.1,0.1"))
    return home / "data"


def small(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text("experiment: planted\ntracking: {registered_model: planted}\n")
    model = ["model.embedding_dim=4", "model.block_width=16", "model.head=[8]", "model.blocks=2"]
    return load_config(path, [*model, "train.batch_size=256", "train.epochs=4", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.sparse={name: rowwise_adagrad, lr: 0.1}", "optimizer.dense.lr=0.005"],
        ["optimizer.sparse={name: adagrad, lr: 0.1}", "optimizer.dense.lr=0.005", "train.precision=bf16"],
        ["optimizer.sparse={name: sgd, lr: 1.0}", "optimizer.dense.lr=0.005", "model.kind=serial", "model.head=[]"],
    ],
    ids=["rowwise adagrad", "adagrad in bf16", "sgd, serial"],
)
def test_an_interaction_is_learned(
    config: Config, planted_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(small(tmp_path, *overrides), planted_data, tmp_path / "out", QUIET)
    assert result is not None
    # The best possible: AUC .9, log loss .325 (the entropy of .1), give or take .02 on 600 rows; chance: .5, .69.
    assert result["metrics"]["test"]["auc"] > 0.85
    assert result["metrics"]["test"]["logloss"] < 0.42
    logistic = baseline_scores(PreparedDataset.open(planted_data), "test")["logistic regression"]
    assert 0.45 < logistic.mean() < 0.55
    assert logistic.std() < 0.1


def test_tables_are_trained_and_unseen_rows_are_not(bundle: Bundle, dataset: PreparedDataset, config: Config) -> None:
    """The trap: tables that the planner places as data_parallel would silently keep their first values."""
    for index, field in enumerate(dataset.pipeline.fields):
        table = Table(name=field.name, features=(field.name,), rows=field.encoder.num_ids, pooling=field.pooling)
        before = initial_rows(table, config.model.embedding_dim, config.train.seed)
        after = dict(bundle.scorer.models[0].named_parameters())[f"embeddings.embedding_bags.{table_key(index)}.weight"]
        column = dataset.split("train")[field.name].combine_chunks()
        used = np.unique((column.values if field.spec.type == "list" else column).to_numpy())
        used = np.union1d(used, [UNKNOWN]) if field.name in dataset.pipeline.hidden else used
        moved = (after.detach() != before).any(dim=1).numpy()
        # dropout of a half over a head of 8 units blocks a row that is seen once with probability 2⁻⁸
        assert moved[used].mean() > 0.98, field.name
        assert not np.delete(moved, used).any(), field.name


def test_early_stop_keeps_the_best_epoch(
    config: Config, planted_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # so large a rate that validation gets worse after a few epochs
    settings = ["optimizer.dense.lr=0.03", "train.epochs=30", "train.early_stop={metric: logloss, patience: 2}"]
    result = train(small(tmp_path, *settings), planted_data, tmp_path / "out", QUIET)
    assert result is not None
    assert result["epochs"] == result["best_epoch"] + 2 < 30
    history = mlflow.MlflowClient().get_metric_history(result["run_id"], "valid_logloss")
    # one at the end of every epoch, and at the last step once more: the bundle's own
    losses = [metric.value for metric in sorted(history, key=lambda m: (m.step, m.timestamp))][: result["epochs"]]
    best = min(losses)
    assert losses.index(best) == result["best_epoch"] - 1
    # the bundle's own score of the split is that epoch's, to fp32 and to the order of its sums
    assert result["metrics"]["valid"]["logloss"] == pytest.approx(best, abs=1e-5)


def test_the_same_seed_gives_the_same_bundle(
    config: Config, planted_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = []
    for name in ("one", "two"):
        result = train(small(tmp_path, "train.epochs=1", "model.dropout=0.2"), planted_data, tmp_path / name, QUIET)
        assert result is not None
        state = load_bundle(Path(result["bundle"])).scorer.models[0].state_dict()
        weights.append(torch.cat([value.flatten() for value in state.values()]))
    assert torch.equal(weights[0], weights[1])


def test_a_loss_that_is_not_finite_stops_and_names_the_step(
    config: Config, planted_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Failure, match=r"the loss is (nan|inf) at step \d+"):
        train(small(tmp_path, "optimizer.dense.lr=1e30"), planted_data, tmp_path / "out", QUIET)
    assert not (tmp_path / "out" / "bundle").exists()


def test_one_run_holds_parameters_metrics_data_and_model(bundle_path: Path, config: Config, data: Path) -> None:
    result = json.loads((bundle_path.parent / "result.json").read_text())
    run = mlflow.MlflowClient().get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.block_width"] == "16"
    assert run.data.metrics["test_logloss"] == pytest.approx(result["metrics"]["test"]["logloss"])
    client = mlflow.MlflowClient()
    steps = client.get_metric_history(result["run_id"], "train_loss")
    assert [metric.step for metric in steps] == list(range(1, result["steps"] + 1))
    stored = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/data.json")
    assert stored["raw_files"][0]["sha256"]
    assert stored["files"] == json.loads((data / "manifest.json").read_text())["files"]
    saved = yaml.safe_load(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config.yaml"))
    assert saved == config.model_dump(mode="json")
    assert client.get_model_version_by_alias("movielens-ranker", "candidate").run_id == result["run_id"]


def test_field_names_that_are_no_module_names(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchRec names modules after tables; a column called "type" is common."""
    monkeypatch.chdir(tmp_path)
    names = ["type", "items", "a.b", "é è"]
    random = np.random.default_rng(0)
    columns = {name: random.integers(0, 4, 600) for name in names}
    pd.DataFrame(columns | {"y": random.integers(0, 2, 600)}).to_parquet(tmp_path / "rows.parquet")
    fields = [{"name": name, "type": "categorical"} for name in names]
    schema = Schema.model_validate({"name": "odd", "label": {"column": "y"}, "fields": fields})
    prepare(schema, {"input": ["rows.parquet"]}, tmp_path / "data", split=SplitRule.parse("random:0.8,0.1,0.1"))
    result = train(small(tmp_path, "train.epochs=1"), tmp_path / "data", tmp_path / "out", QUIET)
    assert result is not None
    assert load_bundle(Path(result["bundle"])).pipeline.names == tuple(names)


def test_what_would_fail_late_is_told_before_training(config: Config, planted_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reduction_ratio 0\.01 leaves no aggregation unit"):
        train(small(tmp_path, "model.reduction_ratio=0.01"), planted_data, tmp_path / "out", QUIET)
    assert not (tmp_path / "out" / "bundle").exists()


def test_the_training_split_is_evaluated_as_it_is_served(
    bundle: Bundle, dataset: PreparedDataset, raw_rows: Path
) -> None:
    """Ids are hidden from training as it goes, and not in the data: every row has the score of its raw row."""
    assert dataset.pipeline.hidden == {"user_id": 0.1}
    rows = rows_of_dataset(bundle, dataset, "train").table
    raw = pl.read_parquet(raw_rows)[rows["_line"].to_numpy() - 1]
    np.testing.assert_allclose(bundle.scorer.score_encoded(rows), bundle.scorer.score(raw.to_arrow()), atol=1e-6)


def test_model_names(bundle_path: Path) -> None:
    run_id = load_bundle(bundle_path).manifest["run_id"]
    for name in ("models:/movielens-ranker@candidate", "models:/movielens-ranker/1", run_id, f"runs:/{run_id}"):
        located = locate(name)
        assert load_bundle(located.path).digest == load_bundle(bundle_path).digest
        assert (located.uri, located.version) == ("models:/movielens-ranker/1", "1")
    for name in ("models:/nobody@champion", "models:/movielens-ranker@nobody", "models:/movielens-ranker/9", "0" * 32):
        with pytest.raises(InputError, match="is not in the registry"):
            locate(name)
    with pytest.raises(InputError, match="names no version"):
        locate("models:/movielens-ranker")
    with pytest.raises(InputError, match="is neither a folder nor"):
        locate("no-such-folder")


def test_the_python_function_loads_without_pickle_and_scores_alike(bundle: Bundle, raw_rows: Path) -> None:
    located = locate("models:/movielens-ranker@candidate")
    assert not [path for path in located.path.parent.parent.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt")]
    frame = pl.read_parquet(raw_rows).head(50).to_pandas()
    found = mlflow.pyfunc.load_model(located.uri).predict(frame)
    np.testing.assert_allclose(found, bundle.scorer.score(frame), rtol=0, atol=1e-6)


def test_evaluation_of_files_and_of_prepared_data_agree(
    bundle: Bundle, dataset: PreparedDataset, raw_rows: Path
) -> None:
    lines = [line - 1 for line in dataset.split("test")["_line"].to_pylist()]
    path = raw_rows.parent / "test.parquet"
    pl.read_parquet(raw_rows)[lines].write_parquet(path)
    by_data = evaluate(bundle, rows_of_dataset(bundle, dataset, "test"), {})
    by_files = evaluate(bundle, rows_of_files(bundle, [str(path)], 0.0), {})
    np.testing.assert_allclose(by_files.scores[MODEL], by_data.scores[MODEL], rtol=0, atol=1e-6)
    assert by_data.metrics[MODEL] == pytest.approx(by_files.metrics[MODEL], abs=1e-6)
    assert by_data.metrics[MODEL] == pytest.approx(bundle.manifest["metrics"]["test"])
    parts = by_data.by_familiarity
    assert parts["known user_id"]["rows"] + parts["new user_id"]["rows"] == len(by_data.label_N)


def test_data_of_another_pipeline_is_refused(bundle: Bundle, planted_data: Path) -> None:
    with pytest.raises(InputError, match=r"encoded by another pipeline .* give the raw rows with --input"):
        rows_of_dataset(bundle, PreparedDataset.open(planted_data), "test")


def test_base_rate_baseline(dataset: PreparedDataset) -> None:
    rate = dataset.split("train")["_label"].to_numpy().mean()
    scores = baseline_scores(dataset, "valid")["base rate"]
    assert len(scores) == dataset.split("valid").num_rows
    assert scores == pytest.approx(np.full(len(scores), rate))


def test_what_is_resumed_is_the_same_training_or_refused_untouched(
    config: Config, planted_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    first = train(small(tmp_path, "train.epochs=1"), planted_data, out, QUIET)
    assert first is not None
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    for key in ("train.epochs=2", "optimizer.dense.lr=0.5", "model.dropout=0.1"):
        name = key.partition("=")[0]
        with pytest.raises(InputError, match=f"{out} is of another training, with another {name}"):
            train(small(tmp_path, *dict.fromkeys(["train.epochs=1", key])), planted_data, out, QUIET, resume=True)
    start = Start(load_bundle(out / "bundle"))
    with pytest.raises(InputError, match="with another --from: choose another --out"):
        train(small(tmp_path, "train.epochs=1"), planted_data, out, QUIET, start, resume=True)
    assert {path: path.read_bytes() for path in before} == before
    again = train(small(tmp_path, "train.epochs=1", "train.keep_checkpoints=3"), planted_data, out, QUIET, resume=True)
    assert again is not None
    assert again["model_uri"] == first["model_uri"]
