"""The report in a real browser: drawn, quiet, alone, and no wider than the screen."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from serving.bundle import Bundle
from serving.calibration import Calibration, Fitted, Platt
from serving.ensemble import write_ensemble
from tests.training.evaluations import HOSTILE, evaluation
from training.commands import run_evaluate
from training.evaluation.files import write_files

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK = 390, 1280

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; `make test-long` installs Debian's as root"),
]

DRAWN = """() => [...document.querySelectorAll("figure svg")].map(svg => {
  const box = svg.getBoundingClientRect()
  const paths = [...svg.querySelectorAll("path")].filter(path => (path.getAttribute("d") || "").trim())
  return {width: box.width, height: box.height, paths: paths.length}
})"""
SMALLEST_TEXT = """() => Math.min(...[...document.querySelectorAll("svg text")]
  .map(text => text.getBoundingClientRect().height).filter(height => height > 0))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(
    bundle: Bundle, bundle_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, int]]:
    """Reports, and how many pictures each has: of one trained model, of two, and of names that are no words."""
    home = tmp_path_factory.mktemp("reports")
    fitted = Fitted(split="valid", rows=1, sampling_rate=bundle.scorer.sampling_rate)
    curve = Calibration(curve=Platt(kind="platt", slope=1.0, shift=1.0), fitted=fitted)
    sure = write_ensemble(
        home / "sure", [bundle], name="sure", run_id=None, evaluate=lambda scorer: {}, calibrate=lambda scorer: curve
    )
    run_evaluate(str(bundle_path), data, [], "test", home / "one", 0.0, replicates=100)
    run_evaluate(str(sure.path), data, [], "test", home / "two", 0.0, against=str(bundle_path), replicates=100)
    write_files(evaluation(rival=True, field=HOSTILE, model=HOSTILE, calibrated=True), home / "hostile")
    return {"one": (home / "one", 6), "two": (home / "two", 9), "hostile": (home / "hostile", 9)}


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["one", "two", "hostile"])
def test_it_is_drawn_and_fits(
    browser: Browser, reports: dict[str, tuple[Path, int]], name: str, width: int, tmp_path: Path
) -> None:
    folder, pictures = reports[name]
    page = browser.new_page(viewport={"width": width, "height": 844})
    heard: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((folder / "report.html").as_uri())
    drawn: list[dict[str, Any]] = page.evaluate(DRAWN)
    assert len(drawn) == pictures
    assert all(one["width"] > 250 and one["height"] > 80 and one["paths"] > 3 for one in drawn), drawn
    assert page.evaluate(SMALLEST_TEXT) >= 7
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width  # what was folded up fits too
    assert page.locator("details.numbers table").first.is_visible()
    assert page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert heard == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == 1
    page.close()


@pytest.mark.parametrize("name", ["one", "two"])
def test_it_prints(browser: Browser, reports: dict[str, tuple[Path, int]], name: str) -> None:
    page = browser.new_page(viewport={"width": 700, "height": 1000})  # A4 less its margins
    page.goto((reports[name][0] / "report.html").as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 700
    assert page.locator("details.numbers").first.is_hidden()
    pdf = page.pdf(format="A4", print_background=True)
    assert pdf.startswith(b"%PDF-")
    assert 3 <= pdf.count(b"/Type /Page\n") <= 20
    page.close()


def test_no_name_is_markup(browser: Browser, reports: dict[str, tuple[Path, int]]) -> None:
    page = browser.new_page()
    page.goto((reports["hostile"][0] / "report.html").as_uri())
    assert page.title() == "clicks-ranker: evaluation"
    assert page.locator("script").count() == 0
    assert page.locator("h1").inner_text() == f"{HOSTILE} against rival"
    page.close()
