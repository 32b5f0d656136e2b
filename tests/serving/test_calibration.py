"""Calibration: what a curve makes of scores, which curves are refused, and that every served score has gone through."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.special import logit as scipy_logit
from starlette.testclient import TestClient

from features.errors import InputError
from serving.api.routes import Routes
from serving.bundle import Bundle, load_bundle
from serving.calibration import UNCALIBRATED, Calibration, logit, sigmoid
from serving.ranking.engine import RankingEngine
from serving.scorer import Scorer
from serving.scoring.files import score_files
from tests.serving.parts import parts_of

FITTED = {"split": "valid", "rows": 100, "sampling_rate": 0.2}
KNOTS = {"kind": "isotonic", "scores": [0.1, 0.2, 0.4, 0.9], "values": [0.05, 0.3, 0.3, 0.7]}
CURVES: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "temperature", "temperature": 1.7},
    {"kind": "platt", "slope": 1.4, "shift": -0.6},
    KNOTS,
]


def calibration(curve: dict[str, Any], **fitted: Any) -> Calibration:
    return Calibration.model_validate({"curve": curve, "fitted": FITTED | fitted})


def levels(scorer: Scorer, rows: dict[str, list[Any]]) -> Calibration:
    """A curve with a wide level part, over where a scorer's scores are."""
    low, high = np.quantile(scorer.uncalibrated(scorer.pipeline.encode(rows)), [0.2, 0.8]).tolist()
    return calibration({"kind": "isotonic", "scores": [0.0, low, high, 1.0], "values": [0.1, 0.3, 0.3, 0.8]})


def test_lines_over_the_logit() -> None:
    score_N = np.array([1e-7, 1e-6, 0.03, 0.5, 0.97, 1 - 2**-24], np.float32)
    for curve, slope, shift in [(CURVES[1], 1 / 1.7, 0.0), (CURVES[2], 1.4, -0.6)]:
        found = calibration(curve).apply(score_N)
        expected = expit(slope * scipy_logit(score_N.astype(np.float64)) + shift)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=0)


def test_isotonic_is_straight_between_knots_and_level_beyond() -> None:
    score_N = np.array([0.0, 0.1, 0.15, 0.2, 0.3, 0.4, 0.65, 0.9, 1.0], np.float32)
    expected = [0.05, 0.05, 0.175, 0.3, 0.3, 0.3, 0.5, 0.7, 0.7]
    np.testing.assert_allclose(calibration(KNOTS).apply(score_N), expected, rtol=1e-6)
    one = calibration({"kind": "isotonic", "scores": [0.5], "values": [0.2]})
    assert set(one.apply(score_N).tolist()) == {float(np.float32(0.2))}


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30), st.sampled_from(CURVES))
def test_a_curve_never_turns_an_order_round_and_is_finite(scores: list[float], curve: dict[str, Any]) -> None:
    score_N = np.sort(np.array([0.0, *scores, 1.0], np.float32))
    found = calibration(curve).apply(score_N)
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()
    assert 0 <= found[0] <= found[-1] <= 1


def test_logit_and_sigmoid_at_the_ends() -> None:
    near_1 = float(np.nextafter(np.float32(1), np.float32(0)))
    np.testing.assert_allclose(logit(np.array([0.0, near_1, 1.0])), scipy_logit([1 - near_1, near_1, near_1]))
    np.testing.assert_array_equal(sigmoid(np.array([-1e9, 0.0, 1e9])), [0.0, 0.5, 1.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.1])
@pytest.mark.parametrize("curve", CURVES)
def test_what_is_no_probability_is_refused(curve: dict[str, Any], bad: float) -> None:
    told = "row 2: its values are too large to be scored" if np.isnan(bad) else "of row 2 is no probability"
    with pytest.raises(ValueError, match=told):
        calibration(curve).apply(np.array([0.1, 0.2, bad, bad], np.float32))


@pytest.mark.parametrize(
    ("curve", "told"),
    [
        ({"kind": "beta"}, "curve: Input tag 'beta'"),
        ({}, "curve"),
        ({"kind": "none", "slope": 1.0}, "slope: unknown key"),
        ({"kind": "temperature", "temperature": 0.0}, "temperature: Input should be greater than 0"),
        ({"kind": "temperature", "temperature": "1.5"}, "temperature: Input should be a valid number"),
        ({"kind": "temperature", "temperature": float("nan")}, "temperature: Input should be"),
        ({"kind": "platt", "slope": -1.0, "shift": 0.0}, "slope: Input should be greater than 0"),
        ({"kind": "platt", "slope": 1.0, "shift": float("inf")}, "shift: Input should be a finite number"),
        ({"kind": "platt", "slope": 1.0}, "shift: required key is missing"),
        ({**KNOTS, "scores": [0.1, 0.2, 0.2, 0.9]}, "scores do not ascend"),
        ({**KNOTS, "values": [0.1, 0.3, 0.2, 0.9]}, "values fall"),
        ({**KNOTS, "values": [0.1, 0.3]}, "4 scores and 2 values"),
        ({**KNOTS, "values": [0.1, 0.3, 0.4, 1.5]}, "values.3: Input should be less than or equal to 1"),
        ({**KNOTS, "scores": [], "values": []}, "scores: Tuple should have at least 1 item"),
    ],
)
def test_a_curve_that_is_none_is_one_line(curve: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        Calibration.from_plain({"curve": curve, "fitted": FITTED}, 0.2, "b")
    assert str(error.value).startswith("bundle b: calibration.json: ")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("curve", CURVES)
def test_json_and_back(curve: dict[str, Any]) -> None:
    given = calibration(curve)
    assert Calibration.from_plain(json.loads(json.dumps(given.plain())), 0.2, "b") == given
    assert given.plain() == {"curve": curve, "fitted": FITTED}
    assert UNCALIBRATED.plain() == {"curve": {"kind": "none"}}


@pytest.mark.parametrize("curve", CURVES)
def test_every_way_to_a_score_is_calibrated_once(
    make: Callable[..., Bundle], rows: dict[str, list[Any]], tmp_path: Path, curve: dict[str, Any]
) -> None:
    plain = make("plain").scorer.score(rows)
    bundle = make("calibrated", calibrate=lambda scorer: calibration(curve))
    expected = calibration(curve).apply(plain)
    assert curve["kind"] == "none" or np.abs(expected - plain).max() > 0.02
    encoded = bundle.pipeline.encode(rows)
    np.testing.assert_array_equal(bundle.scorer.uncalibrated(encoded), plain)
    np.testing.assert_array_equal(bundle.scorer.score_encoded(encoded), expected)
    np.testing.assert_array_equal(bundle.scorer.score(rows), expected)
    app = Routes(parts_of(RankingEngine(bundle, "1"))).app
    client = TestClient(app)
    np.testing.assert_allclose(client.post("/predict", json={"rows": rows}).json()["scores"], expected, rtol=1e-7)
    asked = {"context": {"user": "ann"}, "candidates": {"item": rows["item"]}, "top_k": len(plain)}
    items = client.post("/rank", json=asked).json()["items"]
    ranked = expected[[item["index"] for item in items]]
    np.testing.assert_allclose([item["score"] for item in items], ranked, atol=1e-6)
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    assert score_files(bundle, [str(tmp_path / "rows.parquet")], tmp_path / "scored").rows == len(plain)
    np.testing.assert_array_equal(pq.read_table(tmp_path / "scored")["score"].to_numpy(), expected)
    assert client.get("/model").json()["calibration"] == curve["kind"]
    assert client.get("/model").json()["members"] == 1


def test_rankings_keep_the_order_where_a_curve_is_level(make: Callable[..., Bundle], rows: dict[str, Any]) -> None:
    plain, bundle = make("plain"), make("level", calibrate=lambda scorer: levels(scorer, rows))
    candidates = {"item": rows["item"][::-1]}
    for top_k in (5, 30, len(rows["item"])):
        before = RankingEngine(plain, "1").rank({"user": "ann"}, candidates, top_k)
        after = RankingEngine(bundle, "1").rank({"user": "ann"}, candidates, top_k)
        assert [item.index for item in after] == [item.index for item in before]
    scores = [item.score for item in after]
    assert scores == sorted(scores, reverse=True)
    assert scores.count(float(np.float32(0.3))) > 20  # which an order by them would have put as they came


def test_the_model_describes_what_it_answers(make: Callable[..., Bundle]) -> None:
    app = Routes(parts_of(RankingEngine(make(), "1"))).app
    client = TestClient(app)
    operation = client.get("/docs.json").json()["paths"]["/model"]["get"]
    described = operation["responses"]["200"]["content"]["application/json"]["schema"]
    answer = client.get("/model").json()
    assert answer.keys() == described["properties"].keys() == set(described["required"])
    assert answer["calibration"] in described["properties"]["calibration"]["enum"]


def test_a_curve_over_scores_of_another_sampling_rate_is_refused(
    make: Callable[..., Bundle], reseal: Callable[..., None], tmp_path: Path
) -> None:
    told = r"calibration.json was fitted on scores of sampling rate 1.0, and the bundle's is 0.2"
    with pytest.raises(InputError, match=told):
        make("other", calibrate=lambda scorer: calibration(CURVES[2], sampling_rate=1.0))
    assert not (tmp_path / "other").exists()
    path = make("bundle", calibrate=lambda scorer: calibration(CURVES[2])).path
    (path / "calibration.json").write_text(json.dumps(calibration(CURVES[2], sampling_rate=1.0).plain()))
    reseal(path)
    with pytest.raises(InputError, match=told):
        load_bundle(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "calibration.json is missing"),
        ("{", "calibration.json is damaged"),
        ("[]", "calibration.json: Input should be a valid dictionary"),
        ("{}", "calibration.json: curve: required key is missing"),
        (json.dumps({"curve": CURVES[2]}), "does not say what it was fitted on"),
        (json.dumps({"curve": {**CURVES[2], "shift": -0.7}, "fitted": FITTED}), r"golden row \d+ is calibrated"),
        (json.dumps({"curve": {"kind": "none"}}), r"golden row \d+ is calibrated"),
    ],
)
def test_a_damaged_calibration_is_refused(
    make: Callable[..., Bundle], reseal: Callable[..., None], text: str | None, told: str
) -> None:
    path = make(calibrate=lambda scorer: calibration(CURVES[2])).path
    if text is None:
        (path / "calibration.json").unlink()
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["files"]["calibration.json"]
        reseal(path, files=manifest["files"])
    else:
        (path / "calibration.json").write_text(text)
        reseal(path)
    with pytest.raises(InputError, match=told):
        load_bundle(path)


def test_rounding_before_a_steep_step_does_not_fail_golden_rows(
    make: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(scorer: Scorer) -> Calibration:
        every = [(user, item) for user in (None, "golden never seen", "ann", "bob") for item in (None, *range(61))]
        rows = dict(zip(("user", "item"), map(list, zip(*every, strict=True)), strict=True))
        score_N = scorer.uncalibrated(scorer.pipeline.encode(rows))
        knots = np.unique(np.concatenate([score_N, np.nextafter(score_N, np.float32(1))])).tolist()
        return calibration({"kind": "isotonic", "scores": knots, "values": np.linspace(0, 1, len(knots)).tolist()})

    steep = make("steep", calibrate=steps)
    sigmoid_of, one_up = torch.Tensor.sigmoid, torch.tensor(1.0)
    monkeypatch.setattr(torch.Tensor, "sigmoid", lambda x: torch.nextafter(sigmoid_of(x), one_up))
    load_bundle(steep.path)  # as on a CPU that sums in another order


def test_a_bundle_of_format_2_reads_as_it_was(
    make: Callable[..., Bundle], reseal: Callable[..., None], rows: dict[str, list[Any]]
) -> None:
    new = make("old")
    expected, path = new.scorer.score(rows), new.path
    golden = json.loads((path / "golden.json").read_text())
    assert golden.pop("uncalibrated") == golden["scores"]
    (path / "golden.json").write_text(json.dumps(golden))
    (path / "calibration.json").unlink()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["members"], manifest["files"]["calibration.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    reseal(path, format=2)
    assert {p.name for p in path.iterdir()} == {
        *("manifest.json", "manifest.sha256", "schema.yaml", "pipeline", "members", "golden.json")
    }
    old = load_bundle(path)
    assert (old.manifest["format"], old.manifest["members"], old.scorer.calibration) == (2, ["run"], UNCALIBRATED)
    np.testing.assert_array_equal(old.scorer.score(rows), expected)
