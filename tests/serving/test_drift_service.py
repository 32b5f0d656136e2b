"""A served model's metrics, prediction log and drift, by real processes; the drift report in a real browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import sync_playwright

from features.dataset import PreparedDataset
from serving.bundle import Bundle
from tests.serving.running import ROOT, Service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DASHBOARD = ROOT / "serving" / "monitoring" / "grafana.json"
REQUESTS, CANDIDATES = 150, 20
RARE = {"masknet_swaps_total", "masknet_dropped_total", "masknet_store_missed_total", "masknet_store_timeouts_total"}

pytestmark = pytest.mark.long


def bodies(bundle: Bundle, rows: pl.DataFrame, prefix: str = "") -> list[dict[str, Any]]:
    """Requests of users and films drawn from the rows; `prefix` makes films new."""
    random, made = np.random.default_rng(3), []
    for _ in range(REQUESTS):
        user = rows.row(int(random.integers(rows.height)), named=True)
        films = rows[random.integers(0, rows.height, CANDIDATES)]
        candidates = {
            "item_id": [f"{prefix}{item}" for item in films["item_id"]],
            "title": films["title"].to_list(),
            "year": [float(year) for year in films["year"]],
            "genres": [text.split(" ") for text in films["genres"]],
        }
        context = {name: user[name] for name in bundle.schema.context}
        made.append({"context": context, "candidates": candidates, "top_k": CANDIDATES})
    return made


def served(home: Path, bundle: Path, asked: list[dict[str, Any]]) -> tuple[Path, dict[str, list[float]], str]:
    """The log's folder, the answered scores by request id, and what /metrics told, of two workers that have ended."""
    log = home / "log"
    words = (str(bundle), "--set", f"log.folder={log}", "--set", "log.share=1.0", "--workers", "2")
    answers: dict[str, list[float]] = {}
    with Service(home, *words) as service, httpx.Client(timeout=30) as client:
        for body in asked:
            answer = client.post(f"{service.uri}/rank", json=body)
            assert answer.status_code == 200, answer.text
            items = sorted(answer.json()["items"], key=lambda item: item["index"])
            answers[answer.headers["x-request-id"]] = [item["score"] for item in items]
        assert httpx.post(f"{service.uri}/rank", json={"candidates": []}).status_code == 422
        service.wait_for(lambda: service.metric("masknet_requests_total", 'route="/rank"') == len(asked) + 1)
        told = httpx.get(f"{service.uri}/metrics").text
    return log, answers, told


def drift(*words: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "training", "drift", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, 3), done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, answer


def test_metrics_log_and_drift_of_a_service(
    bundle: Bundle, bundle_path: Path, raw_rows: Path, dataset: PreparedDataset, tmp_path: Path
) -> None:
    rows = pl.read_parquet(raw_rows).sort("timestamp", maintain_order=True).head(dataset.files("train").num_rows)
    log, answers, told = served(tmp_path, bundle_path, bodies(bundle, rows))
    logged = pq.read_table(log)
    assert logged.num_rows == REQUESTS * CANDIDATES
    by_request = pl.DataFrame(pl.from_arrow(logged)).sort("request_id", "index").group_by("request_id")
    found = {str(name): part["score"].to_list() for (name,), part in by_request}
    assert found.keys() == answers.keys()
    assert all(found[name] == pytest.approx(answers[name], abs=1e-7) for name in answers)
    assert len(list(log.glob("predictions-*"))) >= 1
    assert not list(log.glob(".*"))

    values = float(REQUESTS * CANDIDATES)
    counts = {
        name: float(v)
        for name, v in re.findall(r'^(masknet_(?:values|missing)_total{field="\w+").*} (\S+)$', told, re.M)
    }
    assert counts['masknet_values_total{field="title"'] == values
    assert counts['masknet_values_total{field="age"'] == REQUESTS
    board = json.loads(DASHBOARD.read_text())
    asked = {n for p in board["panels"] for t in p["targets"] for n in re.findall(r"masknet_[a-z_]+", t["expr"])}
    exposed = set(re.findall(r"^(masknet_[a-z_]+)[{ ]", told, re.M))
    assert asked - RARE <= exposed
    assert 'masknet_model_info{name="movielens-ranker",role="champion"' in told
    assert re.search(r'masknet_model_info\{.*role="champion".*\} 2\.0', told)

    model = ("--against", str(bundle_path), "--out")
    code, same = drift(str(log), *model, str(tmp_path / "same"))
    assert (code == 3) == bool(same["drifted"])
    assert same["rows"] == logged.num_rows
    assert same["versions"] == {bundle.digest[:12]: logged.num_rows}
    assert same["score"]["scores"] == "as served"
    assert {one["verdict"] for one in same["fields"].values()} == {"stable"}
    assert drift(str(log), *model, str(tmp_path / "calm"), "--threshold", "9")[0] == 0


def test_the_report_is_drawn_and_fits(bundle: Bundle, bundle_path: Path, raw_rows: Path, tmp_path: Path) -> None:
    rows = pl.read_parquet(raw_rows).with_columns(item_id="new " + pl.col("item_id").cast(pl.String))
    rows.write_parquet(tmp_path / "rows.parquet")
    code, found = drift(str(tmp_path / "rows.parquet"), "--against", str(bundle_path), "--out", str(tmp_path / "out"))
    assert code == 3
    assert "item_id" in found["drifted"]
    assert found["fields"]["item_id"]["unknown"][1] == 1.0
    assert json.loads((tmp_path / "out" / "drift.json").read_text())["drifted"] == found["drifted"]
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH; `make test-long` installs Debian's as root")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        heard: list[str] = []
        for width in (390, 1280):
            page = browser.new_page(viewport={"width": width, "height": 844})
            page.on("console", lambda message: heard.append(message.text))
            page.on("request", lambda request: heard.append(request.url))
            page.goto(Path(found["report"]).as_uri())
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            sizes = page.evaluate(
                "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
            )
            assert len(sizes) >= 3
            assert min(sizes) > 80
            assert "item_id" in page.locator(".verdict").inner_text()
        assert heard == [Path(found["report"]).as_uri()] * 2  # quiet, and nothing else is asked for
        browser.close()


def test_wrong_input_is_one_line(bundle_path: Path, tmp_path: Path) -> None:
    for words, told in (
        (("nowhere.parquet", "--against", str(bundle_path)), "input nowhere.parquet names no file"),
        ((str(tmp_path), "--against", str(tmp_path)), "is no bundle: manifest.json is missing"),
        (("x.parquet", "--against", str(bundle_path), "--out", "/proc/x"), "--out /proc/x cannot be written: No such"),
    ):
        command = [sys.executable, "-m", "training", "drift", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr
