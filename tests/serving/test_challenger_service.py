"""A real service's challenger and shadow: they follow their own aliases, and go on where a version is refused."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from pyarrow import parquet

from serving.life.shares import takes_part
from tests.serving import test_swap_service
from tests.serving.conftest import ITEMS, Make
from tests.serving.running import Service
from tests.serving.test_swap_service import CANDIDATES, FAST, Registry, body, items_of, require_same

pytestmark = pytest.mark.long
registry, store = test_swap_service.registry, test_swap_service.store

SHARE = 0.5
USERS = [f"user {number}" for number in range(12)]
CHOSEN = [user for user in USERS if takes_part({"user": user}, "user", SHARE)]
Reseal = Callable[..., None]


def settings(registry: Registry, log: Path) -> str:
    return yaml.safe_dump(
        {
            "model": registry.champion,
            "challenger": {"model": f"models:/{registry.name}@candidate", "share": SHARE, "key": "user"},
            "shadow": {"model": f"models:/{registry.name}@next"},
            "log": {"folder": str(log), "share": 1.0},
        }
    )


def test_they_follow_their_aliases_and_refuse_what_is_bad(
    registry: Registry, make: Make, reseal: Reseal, tmp_path: Path
) -> None:
    bundles = {"1": make("one", 1), "2": make("two", 2), "3": make("bad", 3), "4": make("four", 4)}
    shutil.copy(bundles["1"].path / "golden.json", bundles["3"].path / "golden.json")
    reseal(bundles["3"].path)
    for version, bundle in bundles.items():
        assert registry.add(bundle.path) == version
    for alias, version in {"champion": "1", "candidate": "2", "next": "1"}.items():
        registry.promote(version, alias)
    (tmp_path / "serve.yaml").write_text(settings(registry, tmp_path / "log"))
    asked = Counter[tuple[Any, ...]]()

    def require_split(service: Service, challenger: str) -> None:
        for user in USERS:
            role, version = ("challenger", challenger) if user in CHOSEN else ("champion", "1")
            reply = service.rank(body(user))
            assert reply["model"]["version"] == version
            require_same(reply, items_of(bundles[version], user))
            asked[role, version, user] += ITEMS

    assert 0 < len(CHOSEN) < len(USERS)
    with Service(tmp_path, "--config", "serve.yaml", *FAST, MLFLOW_TRACKING_URI=registry.store) as service:
        require_split(service, "2")
        registry.promote("3", "candidate")
        service.wait_for(lambda: service.life()["challenger"]["refused"])
        refused = service.life()["challenger"]["refused"]
        assert refused["version"] == "3"
        assert "golden row" in refused["reason"]
        require_split(service, "2")
        registry.promote("4", "candidate")
        registry.promote("2", "next")
        service.wait_for(lambda: service.life()["challenger"]["version"] == "4")
        service.wait_for(lambda: service.life()["shadow"]["version"] == "2")
        assert service.life()["challenger"]["refused"] is None
        require_split(service, "4")
        rows = {"user": [CHOSEN[0]] * ITEMS, "item": CANDIDATES}
        assert httpx.post(f"{service.uri}/predict", json={"rows": rows}).json()["model"]["version"] == "1"
        require_counts(service, "2", 2 * len(CHOSEN))
        require_counts(service, "4", len(CHOSEN))
        service.wait_for(lambda: service.metric("masknet_score_count", 'role="shadow"', 'version="2"') > 0)
    table = parquet.read_table(tmp_path / "log").to_pylist()
    ranked = [row for row in table if row["role"] != "shadow"]
    logged = Counter((row["role"], row["version"], row["user"]) for row in ranked)
    logged["champion", "1", CHOSEN[0]] -= ITEMS  # of /predict
    assert +logged == asked


def require_counts(service: Service, version: str, requests: int) -> None:
    labels = ('role="challenger"', f'version="{version}"', 'route="/rank"')
    service.wait_for(lambda: service.metric("masknet_requests_total", *labels) == requests)
