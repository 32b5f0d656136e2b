"""`masknet evaluate` on a trained bundle: what it answers, writes, records and refuses."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import polars as pl
import pytest
from rich.console import Console
from sklearn.metrics import log_loss, roc_auc_score

from features.dataset import LABEL, PreparedDataset
from features.errors import InputError
from features.metrics import areas
from features.prepare import prepare
from features.schema import Schema
from masknet.model import MaskNet
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.calibration import Calibration, Fitted, Platt
from serving.ensemble import write_ensemble
from serving.members import Member
from serving.models import Located
from training.calibration import calibrate
from training.commands import run_evaluate
from training.evaluation.curves import curves_of
from training.evaluation.evaluate import MODEL, Evaluation, evaluate, rows_of_dataset
from training.evaluation.examine import Seen, examine
from training.evaluation.findings import Findings, Resampled
from training.evaluation.looks import importance
from training.evaluation.scored import metrics_of
from training.evaluation.slices import slices
from training.progress import stages

REPLICATES = 200
Ran = tuple[dict[str, Any], Evaluation, Path]


@pytest.fixture(scope="module")
def too_sure(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle with all odds multiplied by e: the same order, other probabilities."""
    fitted = Fitted(split="valid", rows=1, sampling_rate=bundle.scorer.sampling_rate)
    curve = Calibration(curve=Platt(kind="platt", slope=1.0, shift=1.0), fitted=fitted)
    out = tmp_path_factory.mktemp("too-sure") / "bundle"
    return write_ensemble(
        out, [bundle], name=bundle.name, run_id=None, evaluate=lambda scorer: {}, calibrate=lambda scorer: curve
    )


@pytest.fixture(scope="module")
def alone(bundle_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    out = tmp_path_factory.mktemp("alone") / "report"
    return *run_evaluate(str(bundle_path), data, [], "test", out, 0.0, replicates=REPLICATES), out


@pytest.fixture(scope="module")
def worse(too_sure: Bundle, bundle_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The bundle that is too sure, against the one that it was made of."""
    out = tmp_path_factory.mktemp("worse") / "report"
    model, against = str(too_sure.path), str(bundle_path)
    return *run_evaluate(model, data, [], "test", out, 0.0, against=against, replicates=REPLICATES), out


@pytest.mark.long
def test_one_model(alone: Ran, bundle: Bundle, dataset: PreparedDataset) -> None:
    result, evaluation, out = alone
    test = dataset.split("test")
    label_N, score_N = test[LABEL].to_numpy(), bundle.scorer.score_encoded(test).astype(np.float64)
    assert result["metrics"]["auc"] == pytest.approx(roc_auc_score(label_N, score_N), abs=1e-9)
    assert result["metrics"]["logloss"] == pytest.approx(log_loss(label_N, score_N), abs=1e-7)
    assert result["metrics"] == pytest.approx(bundle.manifest["metrics"]["test"], abs=1e-9)
    assert set(result["baselines"]) == {"base rate", "logistic regression"}
    for metric in ("auc", "logloss", "calibration", "ndcg@10"):
        low, high = result["intervals"][metric]
        assert low < result["metrics"][metric] < high
    assert "against" not in result
    assert result["report"] == str(out / "report.html")
    findings = evaluation.findings
    assert findings is not None
    assert [found.second for found in findings.comparisons] == ["base rate", "logistic regression"]
    assert {one.field for one in findings.importance[MODEL]} == set(bundle.pipeline.names)
    assert findings.masks[MODEL].mean_BF.shape == (bundle.config.blocks, len(bundle.pipeline.names))
    assert findings.drift is not None
    assert findings.drift.of == "train → test"
    assert [one.candidates for one in findings.cost[MODEL]] == [100, 500]


@pytest.mark.long
def test_the_run_has_the_files(alone: Ran, bundle: Bundle) -> None:
    _, _, out = alone
    (out / "private.txt").write_text("of the user")
    names = [file.path for file in mlflow.MlflowClient().list_artifacts(bundle.manifest["run_id"], "report/test")]
    assert names == ["report/test/metrics.json", "report/test/report.html", "report/test/slices.csv"]


@pytest.mark.long
def test_a_model_that_is_worse(worse: Ran, bundle: Bundle, dataset: PreparedDataset) -> None:
    result, evaluation, out = worse
    first, second = evaluation.subjects
    test = dataset.split("test")
    label_N, odds_N = test[LABEL].to_numpy(), bundle.scorer.score_encoded(test).astype(np.float64)
    sure_N = 1 / (1 + (1 - odds_N) / odds_N / np.e)
    assert result["metrics"]["logloss"] == pytest.approx(log_loss(label_N, sure_N), abs=1e-6)
    assert result["against"]["logloss"] == pytest.approx(log_loss(label_N, odds_N), abs=1e-7)
    assert result["comparison"]["verdicts"]["logloss"] == "worse"
    assert result["comparison"]["verdicts"]["auc"] == "not told apart"
    assert first.name in result["comparison"]["sentence"]
    assert evaluation.metrics_before[first.name]["logloss"] == pytest.approx(result["against"]["logloss"], abs=1e-7)
    assert second.name not in evaluation.metrics_before  # it has no calibration
    found = json.loads((out / "metrics.json").read_text())
    assert found["comparisons"][0]["differences"]["logloss"]["value"] == pytest.approx(
        log_loss(label_N, sure_N) - log_loss(label_N, odds_N), abs=1e-6
    )
    table = pl.read_csv(out / "slices.csv", infer_schema_length=None)
    named = table.filter(verdict="worse").sort("difference_value", descending=True)["name"].to_list()
    assert named
    assert result["comparison"]["worse_slices"] == named
    user = table.filter(field="gender", name="gender = F")
    part_N = pl.Series(test["gender"].to_numpy()) == _id_of(bundle, "gender", "F")
    assert user["rows"].to_list() == [part_N.sum()]
    expected = log_loss(label_N[part_N], sure_N[part_N]) - log_loss(label_N[part_N], odds_N[part_N])
    assert user["difference_value"][0] == pytest.approx(expected, abs=1e-6)


def _id_of(bundle: Bundle, field: str, value: str) -> int:
    row: dict[str, list[Any]] = {one.name: [None] for one in bundle.pipeline.inputs}
    return int(bundle.pipeline.encode({**row, field: [value]})[field][0].as_py())


@pytest.mark.long
def test_models_with_pipelines_of_their_own_are_compared_on_raw_rows(
    bundle: Bundle, raw_rows: Path, tmp_path: Path
) -> None:
    other = _narrower(bundle, raw_rows, tmp_path)
    newest = pl.read_parquet(raw_rows).tail(600)
    newest.with_columns(age=pl.when(pl.arange(pl.len()) < 3).then(pl.lit("old")).otherwise("age")).write_csv(
        tmp_path / "newest.csv"
    )
    result, evaluation = run_evaluate(
        str(bundle.path), None, [str(tmp_path / "newest.csv")], "test", tmp_path / "out", 0.01,
        against=str(other.path), replicates=REPLICATES, html=False,
    )  # fmt: skip
    assert result["report"] == str(tmp_path / "out" / "metrics.json")
    assert not (tmp_path / "out" / "report.html").exists()
    assert evaluation.rows == 597  # the age of the others is none
    assert "without 3 rows that one of the models cannot read" in evaluation.source
    kept = newest.tail(597)
    label_N = (kept["rating"].cast(pl.Int64) >= 4).to_numpy()
    for told, one in ((result["metrics"], bundle), (result["against"], other)):
        expected = roc_auc_score(label_N, one.scorer.score(kept.to_arrow()))
        assert told["auc"] == pytest.approx(expected, abs=1e-6)
    assert evaluation.findings is not None
    assert evaluation.findings.drift is None  # nothing is known of training


def _narrower(bundle: Bundle, raw_rows: Path, folder: Path) -> Bundle:
    """An untrained model that does not read the age."""
    plain = bundle.schema.plain()
    keep = [field for field in plain["fields"] if field["name"] != "age"]
    context = [name for name in plain["context"] if name != "age"]
    schema = Schema.model_validate({**plain, "fields": keep, "context": context})
    prepare(schema, {"train": [str(raw_rows)]}, folder / "data")
    pipeline = PreparedDataset.open(folder / "data").pipeline
    model = MaskNet(bundle.config, tables_of(pipeline), fields_of(pipeline))
    return write_bundle(
        folder / "narrower", name="narrower", config=bundle.config, schema=schema, pipeline=pipeline,
        members=[Member.of(model)], sampling_rate=1.0, run_id=None, evaluate=lambda scorer: {},
    )  # fmt: skip


@pytest.mark.long
def test_calibration_is_shown_before_and_after(bundle: Bundle, dataset: PreparedDataset, tmp_path: Path) -> None:
    model = write_ensemble(
        tmp_path / "bundle", [bundle], name="calibrated", run_id=None, evaluate=lambda scorer: {},
        calibrate=lambda scorer: calibrate("isotonic", scorer, dataset),
    )  # fmt: skip
    _, evaluation = run_evaluate(str(model.path), dataset.path, [], "valid", tmp_path / "out", 0.0, replicates=100)
    ece = {when: found[MODEL]["ece"] for when, found in
           (("before", evaluation.metrics_before), ("after", evaluation.metrics))}  # fmt: skip
    assert ece["before"] is not None
    assert ece["after"] is not None
    assert ece["after"] < ece["before"]  # on the rows that it was fitted on
    np.testing.assert_array_equal(evaluation.uncalibrated[MODEL], bundle.scorer.score_encoded(dataset.split("valid")))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "before calibration" in text


def test_the_error_of_binned_areas_is_told(
    bundle: Bundle, dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_dataset(bundle, dataset, "test")
    assert evaluate(bundle, rows, {}).bounds == {}
    monkeypatch.setattr("training.evaluation.evaluate.EXACT_ROWS", 100)
    found = evaluate(bundle, rows, {"coarse": np.round(bundle.scorer.score_encoded(rows.table), 1)})
    for name, score_N in found.scores.items():
        roc, precision = areas(found.label_N, score_N, 100)
        assert found.bounds[name] == {"auc": roc.bound, "pr_auc": precision.bound}
    assert found.bounds["coarse"]["auc"] > 0.01  # a bin does not tell equal scores from close ones


@pytest.fixture(scope="module")
def stepped(bundle: Bundle, dataset: PreparedDataset) -> Bundle:
    """The bundle with an isotonic calibration, which ties scores."""
    curve = calibrate("isotonic", bundle.scorer, dataset)
    return replace(bundle, scorer=bundle.scorer.with_calibration(curve))


def test_order_is_that_of_the_scores_before_calibration(
    stepped: Bundle, bundle: Bundle, dataset: PreparedDataset
) -> None:
    rows = rows_of_dataset(stepped, dataset, "test")
    label_N, before_N = rows.table[LABEL].to_numpy(), bundle.scorer.score_encoded(rows.table)
    after_N = stepped.scorer.score_encoded(rows.table).astype(np.float64)
    expected_auc, expected_loss = roc_auc_score(label_N, before_N), log_loss(label_N, after_N)
    assert abs(roc_auc_score(label_N, after_N) - expected_auc) > 1e-4  # or this would show nothing
    evaluation = evaluate(stepped, rows, {})
    for found in (evaluation.metrics[MODEL], metrics_of(stepped.scorer, rows.table)):
        assert found["auc"] == pytest.approx(expected_auc, abs=1e-9)
        assert found["logloss"] == pytest.approx(expected_loss, abs=1e-6)
        assert found["gauc"] == evaluation.metrics_before[MODEL]["gauc"]
        assert found["calibration"] == pytest.approx(after_N.sum() / label_N.sum())
    uncalibrated = evaluate(bundle, rows, {})
    assert evaluation.by_familiarity == uncalibrated.by_familiarity
    np.testing.assert_array_equal(curves_of(evaluation).roc[MODEL], curves_of(uncalibrated).roc[MODEL])
    sample, label_S = rows.table.select(bundle.pipeline.names), label_N
    for one, other in zip(
        importance(stepped, sample, label_S, repeats=1), importance(bundle, sample, label_S, repeats=1), strict=True
    ):
        assert one.auc_drop == other.auc_drop


def test_what_lies_behind_goes_by_the_same_order(
    stepped: Bundle, dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("importance", "mask_statistics", "drift", "cost"):
        monkeypatch.setattr(f"training.evaluation.examine.{name}", lambda *_: None)
    table = dataset.split("test")
    evaluation = evaluate(stepped, rows_of_dataset(stepped, dataset, "test"), {"half": np.full(table.num_rows, 0.5)})
    for sampled in (False, True):
        told = replace(evaluation, sampled=sampled)
        findings = examine(told, Seen(None, "test", {}), replicates=100).findings
        assert findings is not None
        for metric, one in findings.estimates[MODEL].items():
            assert one.value == evaluation.metrics[MODEL][metric]
        (comparison,) = findings.comparisons
        left_out = {"coverage", "calibration", "ece"} if sampled else {"coverage"}
        assert comparison.differences.keys() == evaluation.metrics[MODEL].keys() - left_out
        before = slices(stepped, table, evaluation.label_N, evaluation.uncalibrated)
        assert [one.metrics[MODEL]["auc"] for one in findings.slices] == [one.metrics[MODEL]["auc"] for one in before]


def test_versions_have_folders_of_their_own(
    bundle_path: Path, bundle: Bundle, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(evaluation: Evaluation, out: Path, html: bool) -> list[Path]:
        written.append(out)
        return [out]

    monkeypatch.setattr("training.commands.write_files", write)
    monkeypatch.setattr("training.commands.attach_report", lambda *_: None)
    monkeypatch.setattr("training.commands.baseline_scores", lambda *_: {})
    monkeypatch.setattr("training.commands.sample_notes", lambda train: ("of a sample",))
    none = Findings(Resampled(0, None), {MODEL: {}}, [])
    monkeypatch.setattr("training.commands.examine", lambda found, *_, **__: replace(found, findings=none))
    located = iter((None, "3"))
    monkeypatch.setattr("training.commands.locate", lambda model: Located(bundle_path, model, next(located)))
    for _ in range(2):
        _, evaluation = run_evaluate("models:/m@candidate", data, [], "test", None, 0.0)
    folder = Path("runs") / "evaluations"
    assert written == [folder / f"{bundle.name}-{bundle.digest[:12]}-test", folder / f"{bundle.name}-3-test"]
    assert evaluation.notes == ("of a sample",)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals(terminal: bool) -> None:
    heard = io.StringIO()
    with stages(Console(file=heard, force_terminal=terminal, width=80)) as progress:
        progress("intervals", 0, 40)
        progress("intervals", 30, 40)
        progress("drift", 1, 1)
    assert ("intervals" in heard.getvalue() and "30/40" in heard.getvalue()) == terminal
    assert (heard.getvalue() == "") != terminal


def test_what_is_refused(bundle_path: Path, data: Path, other_path: Path, tmp_path: Path) -> None:
    model, out = str(bundle_path), tmp_path / "out"
    for arguments, against, told in (
        ((model, data, ["x.csv"], "test"), None, "give either --data or --input"),
        ((model, None, [], "test"), None, "give either --data or --input"),
        ((model, data, [], "tset"), None, "split 'tset' is none of train, valid, test"),
        ((model, data, [], "test"), "nobody", "model 'nobody' is neither"),
        ((model, data, [], "test"), model, "this is the model .* itself"),
        ((model, data, [], "test"), str(other_path), r"encoded by another pipeline .* --against .* --input"),
        ((model, None, ["nothing.csv"], "test"), None, r"input nothing\.csv names no file"),
    ):
        with pytest.raises(InputError, match=told):
            run_evaluate(*arguments, out, 0.0, against=against)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out .*file is no folder"):
        run_evaluate(model, data, [], "test", tmp_path / "file", 0.0, replicates=100)


@pytest.fixture(scope="module")
def other_path(bundle_path: Path, raw_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _narrower(load_bundle(bundle_path), raw_rows, tmp_path_factory.mktemp("narrower")).path
