"""Model life with real server processes, a real registry and HTTP under load.

Legend: N candidates.
"""

import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import psutil
import pyarrow.parquet
import pytest

from serving.bundle import Bundle
from serving.calibration import Calibration
from serving.client_bodies import Call, Ranking, Scores, predict_call, rank_call
from tests.mlflow_server import Server
from tests.serving import test_managed_bundle
from tests.serving.conftest import ITEMS, Make
from tests.serving.running import ROOT, Service
from tests.serving.test_life_following import broken, wider

pytestmark = pytest.mark.long

CANDIDATES = [str(item) for item in range(ITEMS)]
FAST = ("--set", "follow.interval_seconds=0.2", "--set", "limits.drain_seconds=0")


class Registry:
    """A registered model in an SQLite store."""

    def __init__(self, home: Path, store: str, name: str) -> None:
        self.home, self.store, self.name = home, store, name
        self.client = mlflow.MlflowClient(store, store)
        self.client.create_registered_model(name)
        self.champion = f"models:/{name}@champion"

    def add(self, bundle: Path) -> str:
        """Register a copy of a bundle."""
        model = self.home / f"{self.name}-{bundle.name}"
        shutil.copytree(bundle, model / "artifacts" / "bundle")
        return str(self.client.create_model_version(self.name, model.as_uri()).version)

    def promote(self, version: str, alias: str = "champion") -> None:
        self.client.set_registered_model_alias(self.name, alias, version)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def registry(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> Registry:
    return Registry(tmp_path, store, request.node.name.removeprefix("test_")[:40])


def body(user: str) -> dict[str, Any]:
    return {"context": {"user": user}, "candidates": {"item": CANDIDATES}, "top_k": ITEMS}


def items_of(bundle: Bundle, user: str) -> list[tuple[int, float]]:
    """The whole ranking by the reference scorer."""
    rows = {"user": [user] * ITEMS, "item": CANDIDATES}
    score_N = bundle.scorer.score(rows)
    order_N = np.argsort(-bundle.scorer.uncalibrated(bundle.pipeline.encode(rows)), kind="stable")
    return [(int(index), float(score_N[index])) for index in order_N]


def require_same(reply: dict[str, Any], expected: list[tuple[int, float]]) -> None:
    found = {item["index"]: item["score"] for item in reply["items"]}
    wanted = dict(expected)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([found[i] for i in wanted], list(wanted.values()), rtol=0, atol=2e-6)
    scores = [item["score"] for item in reply["items"]]
    assert scores == sorted(scores, reverse=True)


def in_json(user: str) -> Call:
    return rank_call("json", {"user": user}, {"item": CANDIDATES}, ITEMS, None, None)


def in_arrow(user: str) -> Call:
    return rank_call("arrow", {"user": user}, {"item": CANDIDATES}, ITEMS, None, None)


def as_rows(user: str) -> Call:
    return predict_call("json", {"user": [user] * ITEMS, "item": CANDIDATES}, None)


def reply_of(answer: httpx.Response) -> dict[str, Any]:
    """A ranking, however it was asked for; scores of rows put in order."""
    if answer.request.url.path == "/predict":
        scores = Scores.of(answer)
        pairs = sorted(enumerate(scores.scores), key=lambda pair: -pair[1])
        return {"model": vars(scores.model), "items": [{"index": index, "score": score} for index, score in pairs]}
    ranking = Ranking.of(answer)
    return {"model": vars(ranking.model), "items": [vars(item) for item in ranking.items]}


class Load:
    """Clients that ask as fast as they can."""

    def __init__(self, service: Service, clients: int) -> None:
        self._uri, self._stop = service.uri, threading.Event()
        self.answers = list[tuple[str, httpx.Response]]()
        self.errors = list[Exception]()
        asked = [(user, call) for call in (in_json, in_arrow, as_rows) for user in ("ann", "bob")]
        self._threads = [threading.Thread(target=self._ask, args=asked[n % len(asked)]) for n in range(clients)]

    def _ask(self, user: str, call: Callable[[str], Call]) -> None:
        asked = call(user)
        while not self._stop.is_set():
            try:
                # a connection each time reaches every worker
                with httpx.Client(base_url=self._uri, timeout=30) as client:
                    for _ in range(5):
                        answer = client.post(asked.path, content=asked.body, headers=asked.headers)
                        self.answers.append((user, answer))
            except httpx.HTTPError as error:
                self.errors.append(error)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, service: Service, version: str) -> None:
        """Until the last 100 answers were this version's."""

        def settled() -> bool:
            last = self.answers[-100:]
            return len(last) == 100 and all(
                answer.status_code == 200 and reply_of(answer)["model"]["version"] == version for _, answer in last
            )

        service.wait_for(settled)


def test_under_load_no_request_fails_and_none_gets_a_mix(registry: Registry, make: Make) -> None:
    bundles = {"1": make("one", 1), "2": make("two", 2, 3)}
    for version, bundle in bundles.items():
        assert registry.add(bundle.path) == version
    registry.promote("1")
    words = (registry.champion, "--workers", "2", *FAST, "--set", "limits.deadline_ms=30000")
    words += ("--set", f"log.folder={registry.home}/log", "--set", "log.share=1.0")
    with Service(registry.home, *words, MLFLOW_TRACKING_URI=registry.store) as service:
        with Load(service, 6) as load:
            for version in ("1", "2", "1", "2"):
                registry.promote(version)
                load.wait_for(service, version)
        assert service.metric("masknet_swaps_total", 'outcome="done"') == 6  # three changes in two workers
        assert service.life()["source"] == "registry"
    assert load.errors == []
    assert {answer.status_code for _, answer in load.answers} == {200}
    expected = {(v, user): items_of(bundle, user) for v, bundle in bundles.items() for user in ("ann", "bob")}
    counts = dict.fromkeys(bundles, 0)
    for user, answer in load.answers:
        reply = reply_of(answer)
        counts[reply["model"]["version"]] += 1
        require_same(reply, expected[reply["model"]["version"], user])
    assert min(counts.values()) >= 100
    asked = Counter(answer.request.url.path for _, answer in load.answers)
    assert min(asked["/rank"], asked["/predict"]) >= 100
    logged = pyarrow.parquet.read_table(registry.home / "log", columns=["request_id", "version"])
    seen = {answer.headers["x-request-id"]: reply_of(answer)["model"]["version"] for _, answer in load.answers}
    told = dict(zip(logged["request_id"].to_pylist(), logged["version"].to_pylist(), strict=True))
    assert len(told) >= 100
    assert told == {request_id: seen[request_id] for request_id in told}


def kill_worker(service: Service) -> None:
    """BentoML starts another, which must not begin with what the service has refused."""
    (worker,) = (
        child
        for child in psutil.Process(service.process.pid).children(recursive=True)
        if "_bentoml_impl.worker.service" in child.cmdline()
    )
    worker.kill()
    worker.wait(30)


def test_bad_versions_are_refused_and_good_ones_taken(registry: Registry, make: Make) -> None:
    one, four = make("one", 1), make("four", 4)
    registry.promote(registry.add(one.path))
    registry.add(broken(make("two", 2).path))
    registry.add(wider(make))
    registry.add(four.path)
    with Service(registry.home, registry.champion, *FAST, MLFLOW_TRACKING_URI=registry.store) as service:
        registry.promote("2")
        service.wait_for(lambda: service.life()["refused"])
        life = service.life()
        assert (life["version"], life["refused"]["version"]) == ("1", "2")
        assert "SHA-256 of members/00/embeddings/000.safetensors" in life["refused"]["reason"]
        assert str(registry.home) not in str(life)
        require_same(service.rank(body("ann")), items_of(one, "ann"))
        registry.promote("3")
        service.wait_for(lambda: service.life()["refused"]["version"] == "3")
        assert service.life()["refused"]["reason"].endswith("would have to change: it asks for shop")
        service.wait_for(lambda: service.metric("masknet_swaps_total", 'outcome="refused"') == 2)
        require_same(service.rank(body("ann")), items_of(one, "ann"))
        kill_worker(service)
        service.wait_for(lambda: httpx.get(f"{service.uri}/readyz").status_code == 200)
        require_same(service.rank(body("ann")), items_of(one, "ann"))
        service.wait_for(lambda: (service.life()["refused"] or {}).get("version") == "3")
        registry.promote("4")
        service.wait_for(lambda: service.life()["version"] == "4")
        assert service.life()["refused"] is None
        require_same(service.rank(body("bob")), items_of(four, "bob"))
    assert "models:/" + registry.name + "/2 is refused, version 1 goes on" in service.told()
    assert "Traceback" not in service.told()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def upload(client: mlflow.MlflowClient, bundle: Bundle) -> str:
    run = client.create_run("0").info.run_id
    client.log_artifacts(run, str(bundle.path), "model/artifacts/bundle")
    return str(client.create_model_version("small", f"runs:/{run}/model", run).version)


def test_mlflow_may_be_away(server: Server, make: Make, tmp_path: Path) -> None:
    """A running service goes on, a new one starts from the cache and says so, and both follow when it is back."""
    client, (one, two) = mlflow.MlflowClient(server.uri, server.uri), (make("one", 1), make("two", 2))
    client.create_registered_model("small")
    client.set_registered_model_alias("small", "champion", upload(client, one))
    upload(client, two)
    words, champion = FAST, "models:/small@champion"
    with Service(tmp_path, champion, *words, MLFLOW_TRACKING_URI=server.uri) as service:
        service.wait_for(lambda: service.life()["source"] == "registry")
        server.kill()
        service.wait_for(lambda: service.life()["source"] == "cache")
        require_same(service.rank(body("ann")), items_of(one, "ann"))
        assert httpx.get(f"{service.uri}/readyz").status_code == 200
    with Service(tmp_path, champion, *words, MLFLOW_TRACKING_URI=server.uri) as service:
        assert service.life() == {"version": "1", "source": "cache", "refused": None, "postponed": None}
        assert f"{champion} is served from the cache, as models:/small/1" in service.told()
        require_same(service.rank(body("ann")), items_of(one, "ann"))
        server.start()
        client.set_registered_model_alias("small", "champion", "2")
        service.wait_for(lambda: service.life()["version"] == "2")
        assert service.life()["source"] == "registry"
        require_same(service.rank(body("ann")), items_of(two, "ann"))
    server.kill()
    command = [sys.executable, "-m", "training", "serve", champion, "--set", f"cache={tmp_path}/none"]
    environment = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": server.uri, "PATH": "/usr/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "does not answer" in line
    assert "there is no earlier copy" in line


def test_every_kind_of_bundle_is_served(make: Make, tmp_path: Path) -> None:
    """A calibrated ensemble with sampled negatives; a challenger that answers its users, a shadow that answers none."""
    curve = {"kind": "platt", "slope": 0.7, "shift": -0.3}
    fitted = {"split": "valid", "rows": 100, "sampling_rate": 0.2}
    calibration = Calibration.model_validate({"curve": curve, "fitted": fitted})
    champion = make("champion", 1, 2, 3, calibrate=lambda scorer: calibration)
    challenger, shadow = make("challenger", 4, sampling_rate=0.5), make("shadow", 5)
    (tmp_path / "serve.yaml").write_text(f"""
model: {champion.path}
challenger: {{model: {challenger.path}, share: 0.5, key: user}}
shadow: {{model: {shadow.path}}}
threads: 1
""")
    answered = {champion.digest[:12]: champion, challenger.digest[:12]: challenger}
    seen = set()
    with Service(tmp_path, "--config", "serve.yaml", *FAST) as service:
        for user in ("ann", "bob", "gus", "hal", "ida", "joe"):
            reply = service.rank(body(user))
            version = reply["model"]["version"]
            seen.add(version)
            require_same(reply, items_of(answered[version], user))
            assert service.rank(body(user)) == reply
        rows = {"user": ["ann"] * ITEMS, "item": CANDIDATES}
        predicted = httpx.post(f"{service.uri}/predict", json={"rows": rows}).json()
        assert predicted["model"]["version"] == champion.digest[:12]
        np.testing.assert_allclose(predicted["scores"], champion.scorer.score(rows), rtol=0, atol=2e-6)
        service.wait_for(lambda: service.metric("masknet_score_count", 'role="shadow"') > 0)
        life = service.life()
        assert life["challenger"]["version"] == challenger.digest[:12]
        assert life["shadow"]["version"] == shadow.digest[:12]
    assert seen == set(answered)


managed_bundle = test_managed_bundle.bundle


def test_managed_ids_are_served(tmp_path: Path, managed_bundle: Bundle) -> None:
    rows = test_managed_bundle.ROWS
    with Service(tmp_path, str(managed_bundle.path), *FAST) as service:
        scores = httpx.post(f"{service.uri}/predict", json={"rows": rows}).json()["scores"]
        np.testing.assert_allclose(scores, managed_bundle.scorer.score(rows), rtol=0, atol=2e-6)
        candidates = {name: values for name, values in rows.items() if name != "user"}
        for user in test_managed_bundle.USERS:  # known ones, a never-seen one, and none
            ranked = service.rank({"context": {"user": user}, "candidates": candidates})
            expected_N = managed_bundle.scorer.score({**rows, "user": [user] * len(rows["user"])})
            require_same(ranked, list(enumerate(expected_N.tolist())))
