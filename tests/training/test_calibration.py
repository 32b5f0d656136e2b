"""Fitting calibrations: against other solvers and known curves, and at the end of `masknet train`."""

import json
from io import StringIO
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy.optimize import minimize
from scipy.special import expit
from scipy.special import logit as scipy_logit
from sklearn.isotonic import IsotonicRegression

from features.dataset import LABEL, PreparedDataset
from features.errors import InputError
from features.metrics import expected_calibration_error, logloss
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from serving.bundle import Bundle, load_bundle
from serving.calibration import UNCALIBRATED, Isotonic, Kind, Platt, Temperature
from serving.ensemble import write_ensemble
from serving.models import locate
from training.calibration import CELL, calibrate, fit_calibration
from training.config import Config, load_config
from training.fit.starting import Start
from training.train import train

QUIET = Console(quiet=True)
RATE = 0.1
LINES: list[Kind] = ["temperature", "platt"]
CURVES: list[Kind] = [*LINES, "isotonic"]


def drawn(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores whose logit is 2 z + .7 where clicks have z, those clicks, and the true probability."""
    random = np.random.default_rng(seed)
    z_N = random.normal(-2, 1.5, rows)
    return expit(2 * z_N + 0.7).astype(np.float32), (random.random(rows) < expit(z_N)).astype(float), expit(z_N)


def platt_loss(line: np.ndarray, score_N: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray) -> float:
    """Platt's (1999) own, in fp64: cross-entropy to smoothed labels; of a slope alone, or with a shift."""
    clicks, others = weight_N[label_N == 1].sum(), weight_N[label_N == 0].sum()
    target_N = np.where(label_N == 1, (clicks + 1) / (clicks + 2), 1 / (others + 2))
    logit_N = line[0] * scipy_logit(score_N.astype(np.float64)) + (line[1] if len(line) > 1 else 0.0)
    loss_N = np.logaddexp(0, logit_N) - target_N * logit_N
    return float((weight_N * loss_N).sum() / weight_N.sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [40, 3000])
def test_lines_are_the_most_likely_ones(rows: int, weighted: bool) -> None:
    score_N, label_N, _ = drawn(rows)
    weight_N = np.random.default_rng(1).uniform(0, 3, rows) if weighted else np.ones(rows)
    given = (score_N, label_N, weight_N)
    exact = {"method": "Nelder-Mead", "options": {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000}}
    slope, shift = minimize(platt_loss, [1.0, 0.0], args=given, **exact).x
    platt = fit_calibration("platt", score_N, label_N, weight_N if weighted else None).curve
    assert isinstance(platt, Platt)
    assert (platt.slope, platt.shift) == pytest.approx((slope, shift), abs=1e-5)
    temperature = fit_calibration("temperature", score_N, label_N, weight_N if weighted else None).curve
    assert isinstance(temperature, Temperature)
    assert 1 / temperature.temperature == pytest.approx(minimize(platt_loss, [1.0], args=given, **exact).x[0], abs=1e-5)


def test_isotonic_is_scikit_learns_on_scores_at_its_knots() -> None:
    random = np.random.default_rng(2)
    cell_N = random.integers(-60, 30, 4000)
    score_N = expit(cell_N * CELL)
    label_N = (random.random(4000) < expit(cell_N * CELL / 2 - 0.3)).astype(float)
    weight_N = random.integers(1, 4, 4000).astype(float)
    reference = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(score_N, label_N, weight_N)
    expected = reference.predict(score_N)
    assert 0 < expected.min() < expected.max() < 1
    curve = fit_calibration("isotonic", score_N, label_N, weight_N).curve
    np.testing.assert_allclose(curve.of(score_N), expected, rtol=0, atol=1e-9)


def test_isotonic_is_near_scikit_learns_on_any_scores() -> None:
    score_N, label_N, _ = drawn(50_000)
    expected = IsotonicRegression(out_of_bounds="clip").fit(score_N, label_N).predict(score_N)
    found = fit_calibration("isotonic", score_N, label_N).apply(score_N)
    assert np.abs(found - expected).mean() < 0.003
    assert found.mean() == pytest.approx(label_N.mean(), rel=1e-3)


def test_isotonic_says_neither_never_nor_always() -> None:
    score_N = expit(np.arange(8) * CELL)
    label_N = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    curve = fit_calibration("isotonic", score_N, label_N).curve
    assert isinstance(curve, Isotonic)
    # 3 rows without a click, a pair with one, 3 rows of clicks: 1 / (3 + 2) at the ends
    np.testing.assert_allclose(curve.of(score_N), [0.2, 0.2, 0.2, 0.5, 0.5, 0.8, 0.8, 0.8], atol=1e-12)
    rare_N = np.array([0, *[0] * 9, 1, *[0] * 10, 1, 1])  # the next value, .09, is nearer than 1 / (1 + 2)
    score_N = expit(np.array([0, *[1] * 10, *[1] * 10, 2, 2]) * CELL)
    value_N = fit_calibration("isotonic", score_N, rare_N).curve.of(score_N)
    np.testing.assert_allclose(value_N, [0.05] * 21 + [0.75] * 2, atol=1e-12)


@pytest.mark.parametrize("method", CURVES)
def test_what_is_known_of_the_scores_is_found(method: Kind) -> None:
    score_N, label_N, _ = drawn(200_000)
    found = fit_calibration(method, score_N, label_N)
    fresh_N, clicks_N, true_fresh_N = drawn(50_000, seed=1)
    after = found.apply(fresh_N)
    assert logloss(clicks_N, after) < logloss(clicks_N, fresh_N) - (0.02 if method == "temperature" else 0.03)
    if method == "platt":
        assert isinstance(found.curve, Platt)
        assert (found.curve.slope, found.curve.shift) == pytest.approx((0.5, -0.35), abs=0.01)
    if method != "temperature":  # which has no shift
        assert np.abs(after - true_fresh_N).mean() < 0.01 < 0.05 < np.abs(fresh_N - true_fresh_N).mean()
        assert expected_calibration_error(clicks_N, after) < 0.01


@pytest.mark.parametrize("method", CURVES)
def test_a_weight_is_as_many_rows(method: Kind) -> None:
    score_N, label_N, _ = drawn(300)
    times_N = np.random.default_rng(3).integers(0, 4, 300)
    repeated = fit_calibration(method, score_N.repeat(times_N), label_N.repeat(times_N))
    weighted = fit_calibration(method, score_N, label_N, times_N.astype(float))
    probe_N = np.linspace(0.001, 0.999, 500, dtype=np.float32)
    np.testing.assert_allclose(weighted.apply(probe_N), repeated.apply(probe_N), rtol=1e-5)
    assert weighted.fitted is not None
    assert weighted.fitted.rows == (times_N > 0).sum()


@pytest.mark.parametrize("method", CURVES)
@pytest.mark.parametrize("label_N", [np.zeros(5), np.ones(5), np.zeros(0)])
def test_one_class_is_refused(method: Kind, label_N: np.ndarray) -> None:
    with pytest.raises(InputError, match=f"calibration.method {method} needs both classes in the valid split"):
        fit_calibration(method, np.full(len(label_N), 0.3, np.float32), label_N)


@pytest.mark.parametrize("method", LINES)
def test_a_line_that_would_not_rise_is_none(method: Kind) -> None:
    score_N, label_N, _ = drawn(1000)
    assert fit_calibration(method, 1 - score_N, label_N) == UNCALIBRATED
    centred = expit(np.linspace(-3, 3, 100))
    assert fit_calibration(method, centred[::-1], (centred > 0.5).astype(float)) == UNCALIBRATED
    assert fit_calibration(method, np.full(10, 0.3, np.float32), np.array([0, 1] * 5)) == UNCALIBRATED
    assert fit_calibration("none", score_N, label_N) == UNCALIBRATED


@pytest.mark.parametrize("method", CURVES)
def test_a_score_that_parts_the_classes_has_a_finite_curve(method: Kind) -> None:
    score_N = np.array([0.02, 0.1, 0.2, 0.8, 0.9, 0.98], np.float32)
    found = fit_calibration(method, score_N, np.array([0, 0, 0, 1, 1, 1])).apply(score_N)
    assert found[0] > 0.1  # smoothed labels are .2 and .8
    assert found[-1] < 0.9
    assert (found[:3] < 0.5).all()
    assert (found[3:] > 0.5).all()
    ends = fit_calibration(method, np.array([0, 1], np.float32), np.array([0, 1])).apply(np.array([0, 1], np.float32))
    assert 0 < ends[0] < ends[1] < 1


def planted(rows: int) -> pd.DataFrame:
    """Rare clicks, a fifteenth of the rows, that two fields decide on."""
    random = np.random.default_rng(5)
    a_N, b_N = random.integers(0, 12, rows), random.integers(0, 12, rows)
    return pd.DataFrame({"a": a_N, "b": b_N, "click": (random.random(rows) < expit(a_N / 3 - b_N / 6 - 4)).astype(int)})


def prepared(home: Path, name: str, frame: pd.DataFrame, **more: object) -> Path:
    frame.to_parquet(home / f"{name}.parquet")
    fields = [{"name": name, "type": "categorical"} for name in "ab"]
    schema = Schema.model_validate({"name": "planted", "label": {"column": "click"}, "fields": fields, **more})
    prepare(
        schema, {"input": [str(home / f"{name}.parquet")]}, home / name, split=SplitRule.parse("random:0.5,0.3,0.2")
    )
    return home / name


def small(folder: Path, method: Kind) -> Config:
    path = folder / "config.yaml"
    path.write_text("experiment: planted\ntracking: {registered_model: planted}\n")
    shape = ["model.embedding_dim=4", "model.block_width=8", "model.head=[8]", "model.blocks=1", "train.epochs=2"]
    rates = ["optimizer.sparse.lr=0.1", "optimizer.dense.lr=0.01", "train.batch_size=256"]
    return load_config(path, [*shape, *rates, f"calibration.method={method}"])


def trained(home: Path, data: Path, method: Kind) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # MLflow puts its artifacts below the working directory
        result = train(small(home, method), data, home / f"out {data.name} {method}", QUIET)
    assert result is not None
    bundle = load_bundle(Path(result["bundle"]))
    assert result["metrics"] == bundle.manifest["metrics"]
    return bundle


@pytest.fixture(scope="module")
def home(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose training split keeps a tenth of the negatives."""
    home = tmp_path_factory.mktemp("calibration")
    prepared(home, "sampled", planted(40_000), negative_sampling={"rate": RATE})
    return home


@pytest.fixture(scope="module")
def sampled(home: Path) -> Bundle:
    return trained(home, home / "sampled", "isotonic")


def test_training_calibrates_on_validation(home: Path, sampled: Bundle) -> None:
    data = PreparedDataset.open(home / "sampled")
    valid, test = data.split("valid"), data.split("test")
    written = json.loads((sampled.path / "calibration.json").read_text())
    assert written["fitted"] == {"split": "valid", "rows": valid.num_rows, "sampling_rate": RATE}
    before_N, label_N = sampled.scorer.uncalibrated(valid), valid[LABEL].to_numpy()
    # which the correction has brought near, and the curve brings to the clicks themselves: it is applied once
    assert before_N.mean() == pytest.approx(label_N.mean(), rel=0.3)
    after_N = sampled.scorer.score_encoded(valid)
    assert after_N.mean() == pytest.approx(label_N.mean(), rel=0.01)
    best_N = IsotonicRegression().fit(before_N, label_N).predict(before_N)  # of all rising curves on these rows
    assert logloss(label_N, best_N) < logloss(label_N, after_N) < logloss(label_N, before_N) - 0.002
    # what is recorded is of the served scores
    score_N, clicks_N = sampled.scorer.score_encoded(test), test[LABEL].to_numpy()
    assert sampled.manifest["metrics"]["test"]["logloss"] == pytest.approx(logloss(clicks_N, score_N), rel=1e-9)
    assert sampled.manifest["metrics"]["test"]["calibration"] == pytest.approx(1, abs=0.15)
    assert logloss(clicks_N, score_N) != logloss(clicks_N, sampled.scorer.uncalibrated(test))


def test_a_rows_score_does_not_depend_on_its_batch(home: Path, sampled: Bundle) -> None:
    rows = PreparedDataset.open(home / "sampled").split("test").slice(0, 144)
    alone = [sampled.scorer.score_encoded(rows.slice(row, 1))[0] for row in range(144)]
    np.testing.assert_allclose(alone, sampled.scorer.score_encoded(rows), rtol=0, atol=1e-6)


def test_the_registered_model_serves_calibrated_scores(home: Path, sampled: Bundle) -> None:
    located = locate(sampled.manifest["run_id"])
    frame = planted(200)[["a", "b"]]
    found = mlflow.pyfunc.load_model(located.uri).predict(frame)
    np.testing.assert_array_equal(found.to_numpy(), sampled.scorer.score(frame))
    encoded = sampled.pipeline.encode(frame)
    np.testing.assert_array_equal(
        found.to_numpy(), sampled.scorer.calibration.apply(sampled.scorer.uncalibrated(encoded))
    )


@pytest.mark.long
def test_clicks_that_do_not_rise_with_the_scores_leave_them_alone(home: Path, tmp_path: Path) -> None:
    frame = planted(6000)
    for split in ("train", "valid", "test"):
        frame.to_parquet(tmp_path / f"{split}.parquet")
        frame = frame.assign(a=11 - frame["a"], b=11 - frame["b"])  # turned round, and round again
    schema, pipeline = PreparedDataset.open(home / "sampled").schema, PreparedDataset.open(home / "sampled").pipeline
    splits = {split: [str(tmp_path / f"{split}.parquet")] for split in ("train", "valid", "test")}
    prepare(schema, splits, tmp_path / "turned", pipeline=pipeline)
    console = Console(file=StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = train(small(tmp_path, "platt"), tmp_path / "turned", tmp_path / "out", console)
    assert result is not None
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "not calibrated: clicks of the validation split do not rise with the scores (platt)" in told
    assert load_bundle(tmp_path / "out" / "bundle").scorer.calibration == UNCALIBRATED


@pytest.mark.long
def test_rows_that_arrived_as_a_share_stand_for_all(home: Path) -> None:
    frame = planted(40_000)
    kept = frame["click"].eq(1) | (np.random.default_rng(1).random(len(frame)) < 0.2)
    data = prepared(home, "arrived", frame[kept].reset_index(drop=True), already_sampled={"rate": 0.2})
    bundle = trained(home, data, "platt")
    assert bundle.scorer.calibration.kind == "platt"
    predicted = bundle.scorer.score(frame[["a", "b"]]).mean()
    assert predicted == pytest.approx(
        frame["click"].mean(), rel=0.08
    )  # 3,000 clicks; sampled, there are 3.5 times more


def test_an_ensemble_is_calibrated_as_one(home: Path, sampled: Bundle, tmp_path: Path) -> None:
    data = PreparedDataset.open(home / "sampled")
    given = {"name": "two", "run_id": None, "evaluate": lambda scorer: {}}
    ensemble = write_ensemble(
        tmp_path / "two", [sampled, sampled], **given, calibrate=lambda scorer: calibrate("platt", scorer, data)
    )
    valid = data.split("valid")
    alone = fit_calibration("platt", sampled.scorer.uncalibrated(valid), valid[LABEL].to_numpy(), sampling_rate=RATE)
    assert ensemble.scorer.calibration == alone
    with pytest.raises(InputError, match="model two is an ensemble of 2: training goes on from one model"):
        train(small(tmp_path, "none"), home / "sampled", tmp_path / "out", QUIET, Start(load_bundle(tmp_path / "two")))


def test_what_cannot_be_calibrated_is_refused_before_training(home: Path, tmp_path: Path) -> None:
    frame = planted(400)
    frame.loc[:, "click"] = [1, *[0] * 399]
    frame.to_parquet(tmp_path / "rows.parquet")
    pipeline = PreparedDataset.open(home / "sampled").pipeline
    schema, rows = PreparedDataset.open(home / "sampled").schema, str(tmp_path / "rows.parquet")
    prepare(schema, {"train": [rows]}, tmp_path / "day", pipeline=pipeline)
    with pytest.raises(InputError, match=r"calibration\.method platt needs a data set with a validation split"):
        train(small(tmp_path, "platt"), tmp_path / "day", tmp_path / "out", QUIET)
    frame.iloc[1:].to_parquet(tmp_path / "valid.parquet")
    frame.to_parquet(tmp_path / "test.parquet")
    splits = {"train": [rows], **{n: [str(tmp_path / f"{n}.parquet")] for n in ("valid", "test")}}
    prepare(schema, splits, tmp_path / "one", pipeline=pipeline)
    with pytest.raises(InputError, match=r"calibration\.method platt needs both classes in the valid split"):
        train(small(tmp_path, "platt"), tmp_path / "one", tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()
