"""A real service in `fast`, with rounded tables. Legend: N candidates."""

from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.serving.conftest import ITEMS, Make
from tests.serving.running import Service
from tests.serving.test_backends import allow_all, check, int8
from tests.serving.test_swap_service import CANDIDATES, body

pytestmark = pytest.mark.long


@int8
def test_fast_scores_are_near_and_a_candidates_own(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allow_all(monkeypatch)
    bundle = make("checked", 1, check=check)
    exact_N = bundle.scorer.score({"user": ["ann"] * ITEMS, "item": CANDIDATES})
    words = ("backend=fast", "tables=int8", "limits.drain_seconds=0")
    with Service(tmp_path, str(bundle.path), *(each for word in words for each in ("--set", word))) as service:
        engine = httpx.get(f"{service.uri}/model").json()["engine"]
        assert (engine["backend"], engine["tables"]["precision"]) == ("int8", "int8")
        assert engine["tables"]["largest_error"] > 0
        assert engine["check"]["passed"]
        found = {item["index"]: item["score"] for item in service.rank(body("ann"))["items"]}
        for index in (0, 17, ITEMS - 1):
            alone = {"context": {"user": "ann"}, "candidates": {"item": [CANDIDATES[index]]}}
            assert service.rank(alone)["items"][0]["score"] == pytest.approx(found[index], abs=1e-6)
    difference_N = np.abs(np.array([found[index] for index in range(ITEMS)]) - exact_N)
    assert 1e-5 < difference_N.max() < 0.02  # rounded, and no more than that
