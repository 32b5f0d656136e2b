"""What is written about an evaluation, of findings made by hand."""

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from tests.training.evaluations import HOSTILE, ROWS, around, evaluation
from training.evaluation.curves import Curves, curves_of
from training.evaluation.files import write_files
from training.evaluation.findings import MODEL, Evaluation
from training.evaluation.report import render, size
from training.evaluation.results import Difference, Estimate
from training.evaluation.wording import verdict, with_interval
from training.numbers import digits_of, number, p_value, signed
from training.tables import metrics_table


def page_of(found: Evaluation) -> str:
    assert found.findings is not None
    return render(found, found.findings, curves_of(found))


def texts(page: str) -> str:
    """What stands in a page outside its pictures, without tags and with single spaces."""
    bare = re.sub(r"<svg.*?</svg>|<style.*?</style>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def pictures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


@pytest.fixture(scope="module")
def two() -> Evaluation:
    return evaluation(rival=True, calibrated=True)


@pytest.fixture(scope="module")
def page(two: Evaluation) -> str:
    return page_of(two)


@pytest.fixture(scope="module")
def alone() -> str:
    return page_of(evaluation())


def test_what_a_decision_needs_comes_first(two: Evaluation, page: str) -> None:
    text = texts(page)
    sentence = f"{MODEL} is worse than rival in AUC and not told apart in log loss."
    worse = "1 of 4 slices tested got significantly worse: device = phone."
    ids = ["worse", "metrics", "slices", "scores", "looks", "drift", "cost", "method", "model"]
    order = [sentence, worse, 'class="tiles"', *(f'id="{one}"' for one in ids)]
    assert re.findall(r'<h2 id="(\w+)"', page) == ids
    assert sorted(order, key=page.index) == order
    assert 'class="verdict bad"' in page
    auc = two.metrics[MODEL]["auc"]
    assert auc == pytest.approx(roc_auc_score(two.label_N, two.scores[MODEL]))
    assert (
        f"AUC {auc:.4f} 95 % {auc - 0.004:.4f} to {auc + 0.004:.4f} Δ −0.0061 ▼ worse 95 % −0.0086 to −0.0026" in text
    )
    assert f"{100 * auc:.1f} % are in the right order" in text


def test_a_good_model_is_not_marked_as_bad(alone: str) -> None:
    assert 'class="verdict"' in alone
    assert "got worse" not in texts(alone)
    assert f"{MODEL} is worse than logistic regression" in texts(alone)  # in words: a baseline is no rival


def test_tables_have_every_number(two: Evaluation, page: str) -> None:
    text = texts(page)
    rival = two.metrics["rival"]["logloss"]
    assert rival is not None
    assert f"{rival:.4f} {rival - 0.004:.4f} to {rival + 0.004:.4f}" in text
    assert "+0.0043 +0.0018 to +0.0077 ○ not told apart, p .400" in text
    assert "DeLong: p <.001" in text
    assert "device = phone +0.0123 +0.0098 to +0.0158 ▼ worse p .012 500 25.0 % 0.7125 – 0.5125 0.5002" in text
    assert "a field whose name goes on and on, over more than a line +0.0000 ± 0.0125" not in text
    assert "user_id +0.0312 ± 0.0125 +0.0375 ± 0.0025" in text
    assert "user_id −0.250 ± 0.062 0.000 ± 0.062" in text
    assert "user_id 2.5000 hour 0.1500 device 0.0125" in text
    assert f"{MODEL} 100 1.25 1.50 2.25 123,456 7,890,123 3.0 MiB" in text
    assert "1,000 bootstrap draws of whole user_id groups" in text


def test_before_and_after_calibration(two: Evaluation, page: str, alone: str) -> None:
    before, after = two.metrics_before[MODEL], two.metrics[MODEL]
    row = [f"{MODEL}: platt"]
    row += [f"{values[key]:.4f}" for key in ("logloss", "ece", "calibration") for values in (before, after)]
    assert f"{' '.join(row)} Rankings go by" in texts(page)
    assert "Before and after" not in alone
    words = ["".join(picture.itertext()) for picture in pictures(page)]
    assert any(f"{MODEL}, before calibration" in text for text in words)


def test_every_picture_has_words_and_numbers(page: str) -> None:
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.S)
    assert len(figures) == page.count("<svg") == 9
    for figure in figures:
        assert re.search(r'<div role="img" aria-label="[^"]{20,}"><svg', figure)
        numbers = re.search(r"<details class=\"numbers\">.*<td>.*</details>", figure, re.S)
        assert numbers
        assert re.search(r"\d", texts(numbers[0]))


def test_a_hostile_name_is_text() -> None:
    page = page_of(evaluation(rival=True, field=HOSTILE, model=HOSTILE))
    assert "<script" not in page
    assert "<b>alert" not in page
    assert f"{HOSTILE} = phone" in texts(page)
    assert f"{HOSTILE} against rival" in texts(page)
    words = " ".join("".join(picture.itertext()) for picture in pictures(page))
    assert "$\\frac$" in words  # no formula
    assert "<b>" in words


def test_one_file_that_loads_nothing(page: str) -> None:
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(\s*['\"]?http|\ssrc=", page)
    assert not re.findall(r"\shref=\"(?!#)", page)


def test_the_files_agree(two: Evaluation, tmp_path: Path) -> None:
    files = write_files(two, tmp_path)
    assert [file.name for file in files] == ["report.html", "metrics.json", "slices.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "report.html", "slices.csv"]
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["metrics"] == two.metrics
    low, high = found["intervals"]["rival"]["auc"]
    assert (low + high) / 2 == pytest.approx(two.metrics["rival"]["auc"])
    assert found["comparisons"][0]["differences"]["auc"]["verdict"] == "worse"
    assert sum(found["histogram"][MODEL]["clicks"]) == found["clicks"] == int(two.label_N.sum())
    assert sum(found["reliability"]["rival"]["rows"]) == found["rows"] == ROWS
    assert found["masks"][MODEL]["mean_BF"][0] == [0.5, -0.25, 0.125]
    assert found["drift"]["fields"]["cross"] is None
    table = pl.read_csv(tmp_path / "slices.csv")
    assert table["name"].to_list() == [one["name"] for one in found["slices"]]
    assert table["difference_value"].to_list() == [0.0123, -0.0045, 0.0001, 0.0002]
    assert table["verdict"].to_list() == ["worse", "better", "not told apart", "not told apart"]
    assert table["against_logloss"][0] == pytest.approx(0.5125 - 0.0123)


def test_without_the_page_only_the_data_is_written(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("of another evaluation")
    found = evaluation()
    assert found.findings is not None
    files = write_files(replace(found, findings=replace(found.findings, slices=[])), tmp_path, html=False)
    assert [file.name for file in files] == ["metrics.json", "slices.csv"]
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "slices.csv").read_text().strip() == "field,kind,name,rows,clicks,auc,logloss,calibration"


def test_nothing_is_known() -> None:
    """One class, no groups, no baselines, and no finding but estimates without intervals: still a page."""
    found = evaluation(baselines=False)
    assert found.findings is not None
    metrics = dict.fromkeys(found.metrics[MODEL], None) | {"logloss": 0.5}
    estimates = {MODEL: {key: Estimate(value) for key, value in metrics.items()}}
    bare = replace(
        found,
        label_N=np.ones(ROWS),
        group_N=None,
        metrics={MODEL: metrics},
        by_familiarity={},
        findings=replace(
            found.findings, estimates=estimates, slices=[], importance={}, masks={}, drift=None, cost={},
            resampled=replace(found.findings.resampled, replicates=0),
        ),
    )  # fmt: skip
    text = texts(page_of(bare))
    assert "With one class only among the rows, there is no AUC." in text
    assert "Intervals and tests are missing" in text
    assert not re.search(r"\bnan\b|\bNone\b", text)


def test_the_error_of_binned_areas_is_told(alone: str, tmp_path: Path) -> None:
    found = replace(evaluation(), bounds={MODEL: {"auc": 2e-8, "pr_auc": 3e-7}})
    write_files(found, tmp_path)
    assert f"How far the exact values can be: {MODEL} 2.0e-08 and 3.0e-07." in texts(
        (tmp_path / "report.html").read_text()
    )
    assert json.loads((tmp_path / "metrics.json").read_text())["bounds"] == found.bounds
    assert "binned" not in texts(alone)


@pytest.mark.parametrize(
    ("value", "width", "expected"),
    [
        (1.0, 0.02, "predicts as many clicks as there are"),
        (1.05, 0.02, "predicts 5.0 % more clicks than there are"),
        (0.9, 0.02, "predicts 10.0 % fewer clicks than there are"),
    ],
)
def test_the_verdict_on_calibration(value: float, width: float, expected: str) -> None:
    assert expected in verdict(with_estimate(evaluation(), "calibration", around(value, width)))[-1]


def test_calibration_without_an_interval_is_not_judged() -> None:
    found = with_estimate(evaluation(), "calibration", Estimate(1.2346))
    assert verdict(found)[-1] == (
        f"{MODEL} predicts 1.23 times the clicks that there are; of so few groups, or rows, it is not tested "
        "whether by chance."
    )


def test_rows_without_all_negatives_say_nothing_of_calibration(tmp_path: Path) -> None:
    whole = with_estimate(evaluation(), "calibration", around(0.5))
    found = replace(whole, sampled=True)
    assert f"{MODEL} predicts 50.0 % fewer clicks than there are." in verdict(whole)
    write_files(found, tmp_path)
    text = texts((tmp_path / "report.html").read_text())
    sentence = "the scores are for all rows, so calibration and ECE are not judged"
    assert sentence in verdict(found)[-1]
    assert sentence in text
    assert "fewer clicks" not in text
    assert "that of always saying the click rate" not in text
    assert "predicted clicks over observed ones; 1 is right" not in text  # the tile
    assert "predicted clicks over observed ones; 1 is right" in texts(page_of(whole))
    assert json.loads((tmp_path / "metrics.json").read_text())["sampled"] is True


def test_slices_without_a_test_are_not_counted(two: Evaluation) -> None:
    assert two.findings is not None
    first, *others = two.findings.slices
    few = replace(others[-1], logloss=Difference(0.5, None, None, None, "t", "not told apart"), verdict=None,
                  p_corrected=None)  # fmt: skip
    for slices, told, in_page in (
        ([first, *others[:2], few], "1 of 3 slices tested got significantly worse: device = phone; 1 more", "3 slices"),
        ([*others[:2], few], "None of 2 slices tested got significantly worse; 1 more", "None of 2 slices tested is"),
        ([few], "No part of the rows is large enough to be tested", "No slice is large enough to be tested."),
    ):
        found = replace(two, findings=replace(two.findings, slices=slices))
        assert verdict(found)[1].startswith(told)
        text = texts(bare_page_of(found))
        assert in_page in text
        assert text.count("2026-01-01 +0.5000 ○ not tested") == 1


def bare_page_of(found: Evaluation) -> str:
    """Without what takes long to draw."""
    assert found.findings is not None
    findings = replace(found.findings, importance={}, masks={}, drift=None)
    return render(found, findings, Curves({}, {}, {}))


@pytest.mark.parametrize(
    ("metric", "bad"), [("logloss", True), ("auc", True), ("brier", False), ("calibration", False)]
)
def test_the_verdict_is_coloured_by_log_loss_auc_and_slices(two: Evaluation, metric: str, bad: bool) -> None:
    assert two.findings is not None
    even, worse = (Difference(0.1, 0.05, 0.15, 0.5, "bootstrap", told) for told in ("not told apart", "worse"))
    differences = dict.fromkeys(("logloss", "auc", "brier", "calibration"), even) | {metric: worse}
    comparisons = [replace(two.findings.comparisons[0], differences=differences), *two.findings.comparisons[1:]]
    findings = replace(two.findings, comparisons=comparisons, slices=two.findings.slices[1:])
    assert ('class="verdict bad"' in bare_page_of(replace(two, findings=findings))) == bad


def test_what_is_to_be_known_is_in_the_method(tmp_path: Path) -> None:
    found = replace(evaluation(), notes=("Fitted on <some> rows.",))
    write_files(found, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Fitted on <some> rows." in texts(page[page.index('id="method"') : page.index('id="model"')])
    assert json.loads((tmp_path / "metrics.json").read_text())["notes"] == ["Fitted on <some> rows."]


def with_estimate(found: Evaluation, metric: str, value: Estimate) -> Evaluation:
    assert found.findings is not None
    estimates = {**found.findings.estimates, MODEL: {**found.findings.estimates[MODEL], metric: value}}
    return replace(found, findings=replace(found.findings, estimates=estimates))


def test_the_curves_are_those_of_the_scores() -> None:
    found = evaluation(rival=True)
    curves = curves_of(found)
    assert set(curves.roc) == set(curves.reliability) == {MODEL, "rival", "logistic regression"}  # one score has none
    for name, (false, true) in curves.roc.items():
        assert len(false) <= 302
        assert np.trapezoid(true, false) == pytest.approx(found.metrics[name]["auc"], abs=2e-3)
    assert curves.histogram[MODEL].clicks.sum() + curves.histogram[MODEL].others.sum() == ROWS


def test_the_terminal_shows_intervals_or_differences(two: Evaluation) -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(metrics_table(evaluation()), metrics_table(two))
    text = captured.get()
    auc = two.metrics[MODEL]["auc"]
    assert f"{auc:.4f} ({auc - 0.004:.4f}–{auc + 0.004:.4f})" in text
    assert re.search(r"│ AUC .*−0.0061 \(−0.0086 to −0.0026\) │ worse", text)
    assert re.search(r"│ Log loss .*\+0.0043 \(\+0.0018 to \+0.0077\) │ – ", text)


def test_numbers_as_people_read_them() -> None:
    assert [signed(value) for value in (-0.00414, 0.00414, -0.00001, 0.0, None)] == [
        "−0.0041", "+0.0041", "0.0000", "0.0000", "–",
    ]  # fmt: skip
    assert [digits_of(*ends) for ends in ((0.1, 0.2), (0.1, 0.10002), (0.0, 1e-9), (None, 1.0), (1.0, 1.0))] == [
        4, 6, 7, 4, 4,
    ]  # fmt: skip
    assert [p_value(p) for p in (None, 0.0, 0.0432, 0.9999, 1.0)] == ["–", "<.001", ".043", "1", "1"]
    assert number(1 / 3, 6) == "0.333333"
    assert with_interval(Estimate(0.5)) == "0.5000"
    assert [size(count) for count in (0, 1023, 1536, 3 << 20, 5 << 40)] == [
        "0 B", "1,023 B", "1.5 KiB", "3.0 MiB", "5,120.0 GiB",
    ]  # fmt: skip
    assert math.isclose(float(number(2 / 3)), 0.6667)
