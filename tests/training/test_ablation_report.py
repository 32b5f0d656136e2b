"""The report of `masknet ablate` for answers made by hand, and in a browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from training.ablation.report import FACTS, render, shade
from training.ablation.verdict import cautions, verdict

CHROMIUM = shutil.which("chromium")
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = """<script>alert("1")</script> & 'x' $\\frac$ ]]>"""


def estimate(mean: float, seeds: int = 3) -> dict[str, Any]:
    by_seed = {seed: mean + 1e-4 * seed for seed in range(1, seeds + 1)}
    return {"mean": mean, "low": mean - 0.003, "high": mean + 0.003, "by_seed": by_seed, "sd_seeds": 1e-4}


def difference(mean: float, verdict: str, detectable: float = 3e-4) -> dict[str, Any]:
    p = 0.4 if verdict == "not told apart" else 1e-5
    told = {"p": p, "p_holm": p, "detectable": detectable, "seeds": 2, "verdict": verdict}
    return {"mean": mean, "low": mean - 2e-4, "high": mean + 2e-4, "se": 1e-4, **told}


def block(**facts: float | None) -> dict[str, float | None]:
    known: dict[str, float | None] = {"output_variance": 0.5, "dead": 0.0, "gradient_norm": 0.01, "saturation": None}
    known |= {"gate_mean": -0.02, "gate_deviation": 0.1, "gate_negative": 0.5, "angle": 0.3, "auc_drop": 0.002}
    return {**known, **facts}


def timed(ratio: float) -> dict[str, Any]:
    ratios = {"p20": 0.9 * ratio, "p50": ratio, "p80": 1.1 * ratio}
    return {"rows": 500, "p20": 1.0, "p50": 2.5, "p80": 3.0, "ratio": ratios}


def cell(name: str, effect: float | None, word: str = "not told apart", **facts: Any) -> dict[str, Any]:
    """A finished cell with this difference of AUC, and as much less log loss; None for the baseline."""
    gain = effect or 0.0
    differences: dict[str, Any] = dict.fromkeys(("auc", "logloss", "ne", "ece"))
    if effect is not None:
        differences |= {"auc": difference(effect, word), "logloss": difference(-effect, word)}
    values = {"auc": 0.77 + gain, "logloss": 0.45 - gain, "ne": 0.8, "ece": 0.01}
    found = {
        "cell": name,
        "family": "normalization",
        "lr": 0.001,
        "tried": {"0.0003": 0.4711, "0.001": 0.4611, "0.003": None},
        "lr_at_edge": False,
        "seeds_done": [1, 2, 3],
        "trouble": None,
        "metrics": {metric: estimate(value) for metric, value in values.items()},
        "differences": differences,
        "epochs": 2.5,
        "samples_per_second": 12345.6,
        "parameters": 98765,
        "step": timed(1.25),
        "forward": timed(0.75),
        "blocks": [block(angle=None), block(auc_drop=-0.001)],
        "landscape": None,
    }
    return {**found, **facts}


def broken(name: str) -> dict[str, Any]:
    """A cell of which nothing came: every value that may be None is."""
    empty = dict.fromkeys(("auc", "logloss", "ne", "ece"))
    nothing = dict.fromkeys(("epochs", "samples_per_second", "parameters", "step", "forward", "landscape"))
    trouble = "diverged in 3 of 3 seeds: the loss is not finite"
    return cell(name, None, metrics=empty, differences=empty, seeds_done=[], blocks=[], trouble=trouble, **nothing)


def landscape() -> dict[str, Any]:
    numbers = ("largest", "trace", "largest_normalized", "trace_normalized")
    curvature = dict.fromkeys(numbers, 12.0) | {f"{name}_error": 0.5 for name in numbers}
    curvature |= {"trace": None, "trace_error": None, "rows": 4096, "parameters": 98765}
    return {
        "curvature": curvature,
        "axis": [-1.0, 0.0, 1.0],
        "loss": [[None, 2.0, 3.0], [2.0, 1.0, 2.0], [3.0, 2.0, 3.0]],
    }


def answer(*cells: dict[str, Any], **facts: Any) -> dict[str, Any]:
    data = {"schema": "criteo", "rows": {"train": 80, "test": 20_000}, "test_rows": 20_000, "test_clicks": 5000}
    data |= {"group": "user_id", "groups": 321, "auc_error": 0.004, "best_possible": None}
    found = {
        "format": 1,
        "study": "study",
        "baseline": "layer",
        "seeds": 3,
        "trials": 3,
        "metrics": ["auc", "logloss", "ne", "ece"],
        "data": data,
        "device": {"cpu": "a processor", "cores": 2, "versions": {"torch": "2.13.0"}},
        "config": {
            "model": {"kind": "parallel"},
            "train": {"epochs": 9, "early_stop": {"metric": "auc", "patience": 2}},
        },
        "cells": [cell("layer", None), *cells],
    }
    return {**found, **facts}


def texts(page: str) -> str:
    """What stands in a page outside its pictures, without tags and with single spaces."""
    bare = re.sub(r"<svg.*?</svg>|<style.*?</style>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def pictures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def full() -> dict[str, Any]:
    """Every section, every kind of trouble, long names and several families."""
    cells = [
        cell("power(group_scaling=4, alpha=0.95)", 1e-3, "better", landscape=landscape()),
        cell("none", -0.02, "worse", lr_at_edge=True, lr=0.0003, landscape=landscape()),
        cell("rms", 1e-4, seeds_done=[1, 3], trouble="failed in 1 of 3 seeds: its process died"),
        cell("dyt", -1e-4, blocks=[block(saturation=0.25), block(saturation=0.0)]),
        broken("evonorm_s0"),
        cell("power(group_scaling=4, alpha=0.95) sandwich", -2e-4, family="placement"),
        cell("no mask", -3e-4, family="without", blocks=[block(gate_mean=None), block()]),
        cell("model.blocks=7", 2e-4, family="model.blocks", blocks=[block() for _ in range(7)]),
    ]
    return answer(*cells)


@pytest.fixture(scope="module")
def page() -> str:
    return render(full())


def test_what_was_compared_and_what_came_of_it(page: str) -> None:
    text = texts(page)
    for expected in (
        "20,000 rows, 5,000 clicks (25.0 %), 321 groups by user_id",
        "a processor, 2 cores",
        "torch 2.13.0",
    ):
        assert expected in text
    assert "power(group_scaling=4, alpha=0.95) 0.7710 ±0.0030 0.4490 ±0.0030 0.8000 0.0100 +0.00100" in text
    assert "+0.00100 +0.00080 to +0.00120 <.001 -0.00100 -0.00120 to -0.00080 <.001 better" in text
    assert "none 0.4711 0.4611 – 0.0003 at an end" in text
    assert "98,765 1.25 (1.12–1.38) 2.50 0.75 (0.68–0.83) 2.5 12,346" in text
    assert "0.7701 0.7702 0.7703 0.00010" in text
    assert "at the latest after 9" in text
    assert "kind: parallel" in text
    for sentence in [*verdict(full()), *cautions(full())]:
        assert " ".join(sentence.split()) in text


@pytest.mark.parametrize(("word", "bold"), [("better", 2), ("worse", 2), ("not told apart", 0)])
def test_all_cells_alike(word: str, bold: int) -> None:
    page = render(answer(cell("rms", 1e-3, word), cell("none", 1e-3, word)))
    assert len(re.findall(rf"of 2 cells [^;]*\b2 {word}", texts(page))) == 2  # by AUC and by log loss
    assert page.count(f"<b>{word}</b>") == bold


def test_told_apart_in_one_metric() -> None:
    one = cell("rms", 1e-3, "better")
    one["differences"]["logloss"]["verdict"] = "not told apart"
    assert "AUC better, log loss not told apart" in texts(render(answer(one)))


def test_cautions_name_cells_and_reasons(page: str) -> None:
    text = texts(page)
    assert "layer itself is at an end" not in text
    assert "layer itself is at an end" in texts(render(answer(cells=[cell("layer", None, lr_at_edge=True)])))
    assert re.search(r"learning rates tried[^.]*: none\.", text)
    assert "rms: failed in 1 of 3 seeds: its process died" in text
    assert "evonorm_s0: diverged in 3 of 3 seeds: the loss is not finite" in text
    assert "rms 2 of 3 seeds" in text
    assert "evonorm_s0 0 of 3 seeds – – – – – – – – not compared" in text


@pytest.mark.parametrize(("detectable", "small"), [(1e-4, False), (6e-4, True)])
def test_small_test_sets(detectable: float, small: bool) -> None:
    one = cell("rms", 0.0)
    one["differences"]["auc"] = difference(0.0, "not told apart", detectable)
    assert ("2e-4 to 5e-4" in texts(render(answer(one)))) == small


def test_a_hostile_name_is_text() -> None:
    found = answer(cell(HOSTILE, 1e-3, "better", landscape=landscape(), trouble=HOSTILE), study=HOSTILE)
    page = render(found)
    assert "<script" not in page
    assert HOSTILE in texts(page)
    words = "".join("".join(svg.itertext()) for svg in pictures(page))
    assert "<script>" in words
    assert "$\\frac$" in words


def test_one_file_that_loads_nothing(page: str) -> None:
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(\s*['\"]?http|\ssrc=", page)
    links = re.findall(r"<(\w+)[^>]*?href=\"(?!#)([^\"]*)", page)
    assert {tag for tag, _ in links} == {"a"}
    assert all(address.startswith("https://arxiv.org/") for _, address in links)


def test_figures_are_svg_with_labels(page: str) -> None:
    figures = re.findall(r"<figure role=\"img\" aria-label=\"([^\"]{20,})\">(.*?)</figure>", page, re.S)
    assert len(figures) == page.count("<figure") == 4
    assert all(ElementTree.fromstring(body[body.index("<svg") : body.index("</svg>") + 6]) for _, body in figures)
    forest = pictures(page)[0]
    words = [text.strip() for text in forest.itertext() if text.strip()]
    families = ["Normalizations", "Placements in residual blocks", "Without a part", "Number of blocks"]
    assert set(families) <= set(words)
    assert {"rms", "dyt", "no finished seed", "-0.0200, worse"} <= set(words)
    assert words.index("rms") < words.index("dyt") < words.index("none") < words.index("evonorm_s0")
    colours = set(re.findall(r"#[0-9a-f]{6}", ElementTree.tostring(forest, encoding="unicode")))
    assert {"#0b6e99", "#b3470a", "#59636e"} <= colours


def test_the_landscape_is_optional() -> None:
    without = render(answer(cell("rms", 0.0)))
    assert without.count("<svg") == 3
    assert 'id="landscape"' not in without
    page = render(answer(cell("rms", 0.0, landscape=landscape())))
    assert page.count("<svg") == 4
    assert "rms 12 ±0.5 – 12 ±0.5 12 ±0.5 4,096" in texts(page)
    assert "scale-invariant" in page


def test_diagnostics_stand_where_a_cell_has_them(page: str) -> None:
    saturated = texts(page[page.index("<h3>Saturated tanh") : page.index("<h3>Mean gate")])
    assert "dyt 0.25 0" in saturated
    assert "rms" not in saturated
    assert "0 in every block of the 8 cells that have it" in page
    assert '<td class="minus" style="--shade: 0.25">-0.001</td>' in page
    assert 'id="blocks"' not in render(answer(cell("rms", 0.0, blocks=[]), baseline="rms", cells=[broken("rms")]))


def test_shades_go_by_size_or_magnitude() -> None:
    facts = {fact.key: fact for fact in FACTS}
    cells = [{"blocks": [block(output_variance=value, dead=value) for value in (0.01, 0.1, 1.0, 0.0)]}]
    assert [shade(value, cells, facts["output_variance"]) for value in (0.01, 0.1, 1.0, 0.0)] == [0, 0.25, 0.5, 0]
    assert [shade(value, cells, facts["dead"]) for value in (0.1, 1.0, 0.0)] == [0.05, 0.5, 0]
    alone = [{"blocks": [block(output_variance=2.0)]}]
    assert shade(2.0, alone, facts["output_variance"]) == 0.5


def test_nothing_is_known() -> None:
    """No baseline's metrics, no groups, no rates tried, keys of seeds as JSON has them: still a page."""
    found = answer(broken("rms"), trials=None)
    found["cells"][0] |= {"metrics": dict.fromkeys(("auc", "logloss", "ne", "ece")), "step": None, "forward": None}
    found["data"] |= {"group": None, "groups": None, "auc_error": None}
    for one in found["cells"]:
        one["tried"] = {}
    text = texts(render(json.loads(json.dumps(found))))
    assert "each row on its own" in text
    assert "learning rates given" in text
    assert "nan" not in text.lower().replace("not finite", "")


def test_best_possible_and_one_seed() -> None:
    found = answer(cell("rms", 0.0), seeds=1, trials=1, command="masknet ablate --seeds 1")
    found["data"]["best_possible"] = {"rows": 1000, "positives": 250, "auc": 0.8123, "auc_error": 0.0, "logloss": 0.4}
    text = texts(render(found))
    assert "AUC 0.8123, log loss 0.4000" in text
    assert "1 seed per cell; learning rates as configured" in text
    assert "With one seed, they leave out what another seed would change." in text
    assert "masknet ablate --seeds 1" in text
    assert render(json.loads(json.dumps(found))) == render(found)


MEASURE = """<!doctype html>
<iframe width="390" height="800" style="border: 0" srcdoc="{page}"></iframe><pre></pre><script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentDocument
  const boxes = (selector) => [...inside.querySelectorAll(selector)].map(element => element.getBoundingClientRect())
  document.querySelector("pre").textContent = JSON.stringify({{
    width: inside.documentElement.scrollWidth,
    figures: boxes("figure > svg").map(box => [box.width, box.height]),
    text: Math.min(...boxes("svg text").map(box => box.height).filter(height => height > 0)),
  }})
}})
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
def test_a_phone_shows_it_without_scrolling_sideways(page: str, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(MEASURE.format(page=html.escape(page)))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    ran = subprocess.run([*command, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=60)
    found = re.search(r"<pre>(.+?)</pre>", ran.stdout)
    assert found, ran.stderr
    measured = json.loads(html.unescape(found[1]))
    assert measured["width"] <= 390
    assert len(measured["figures"]) == 4
    assert all(width > 300 and height > 100 for width, height in measured["figures"])
    assert measured["text"] >= 9
    assert "CONSOLE" not in ran.stderr
