"""What is deployed: the manifests name what the code has; a bento is built, and answers."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from typer.main import get_command

from serving.api.auth import FILE_VARIABLE, Tokens
from serving.bundle import Bundle
from serving.monitoring.families import families
from serving.settings import VARIABLE, ServeSettings
from tests.serving.conftest import ITEMS, Make
from training.bench.serve_servers import free_port
from training.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serving" / "deploy"
OBJECTS = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
MONITORING = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "monitoring.yaml").read_text())}
BENTOFILE = yaml.safe_load((DEPLOY / "bentofile.yaml").read_text())
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
LOCK = ROOT / "requirements" / "serve.txt"
CONFIG = "/etc/masknet/serve.yaml"
SETTINGS = yaml.safe_load(OBJECTS["ConfigMap"]["data"]["serve.yaml"])
TOKEN = "right"


def mounted(path: str) -> dict[str, Any]:
    """The volume below whose mount a path lies."""
    name = next(each["name"] for each in CONTAINER["volumeMounts"] if Path(path).is_relative_to(each["mountPath"]))
    return next(volume for volume in POD["volumes"] if volume["name"] == name)


def environment() -> dict[str, str]:
    """The container's variables that have values."""
    return {each["name"]: each["value"] for each in CONTAINER["env"] if "value" in each}


def pinned(lock: str) -> list[str]:
    return re.findall(r"^[a-z0-9][\w.-]*==[^ \\\n]+", lock, re.M | re.I)


def test_the_container_runs_a_command_that_there_is(tmp_path: Path) -> None:
    python, *words = CONTAINER["args"]
    assert (python, words[:3]) == ("python", ["-m", "training", "serve"])
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    given = [str(config) if word == CONFIG else word for word in words[3:]]
    serve: Any = vars(get_command(app))["commands"]["serve"]
    context = serve.make_context("serve", given)
    assert context.params["config"] == config
    assert context.params["port"] == CONTAINER["ports"][0]["containerPort"]
    assert context.params["host"] == "0.0.0.0"
    assert list(OBJECTS["ConfigMap"]["data"]) == [Path(CONFIG).name]
    assert mounted(CONFIG)["configMap"]["name"] == OBJECTS["ConfigMap"]["metadata"]["name"]


def test_its_settings_are_settings_and_fit_the_pod() -> None:
    settings = ServeSettings.model_validate(SETTINGS)
    assert settings.cache is not None
    assert "emptyDir" in mounted(str(settings.cache))
    assert settings.threads == int(CONTAINER["resources"]["requests"]["cpu"])
    for name in ("BENTOML_HOME", "HOME"):
        assert "emptyDir" in mounted(environment()[name])
    assert mounted(environment()[FILE_VARIABLE])["secret"]["secretName"] == "masknet"
    assert set(environment()) <= {
        "MLFLOW_TRACKING_URI",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION",
        "HOME",
        "BENTOML_HOME",
    } | {FILE_VARIABLE}
    assert environment()["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


PICKLE = "MLFLOW_ALLOW_PICKLE_DESERIALIZATION"


@pytest.mark.long
@pytest.mark.parametrize(
    "start",
    [
        "import serving.service",  # as `bentoml serve` does
        "import serving.pyfunc",  # as MLflow's servers do
        "from training.quiet import quiet_libraries; quiet_libraries()",  # as every command does
    ],
)
def test_pickle_is_off_whatever_the_environment_says(start: str) -> None:
    script = f"{start}; from mlflow.environment_variables import {PICKLE} as setting; print(setting.get())"
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
        env=os.environ | {PICKLE: "true"},
    )
    assert found.stdout.split() == ["False"]


@pytest.mark.long
def test_there_is_time_for_the_drain() -> None:
    limits = ServeSettings.model_validate(SETTINGS).limits
    script = "from serving.service import MaskNetService; print(MaskNetService.config['traffic']['timeout'])"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, check=True)
    longest = float(found.stdout)  # with the default limits, which the manifest keeps
    default = ServeSettings().limits
    assert (limits.deadline_ms, limits.body_seconds) == (default.deadline_ms, default.body_seconds)
    waits = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert waits + limits.drain_seconds + longest <= POD["terminationGracePeriodSeconds"]
    readiness = CONTAINER["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] <= waits + limits.drain_seconds


def test_probes_need_no_token() -> None:
    tokens = Tokens.of({"MASKNET_TOKENS": TOKEN})
    paths = {name: CONTAINER[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    for path in [*paths.values(), MONITORING["ServiceMonitor"]["spec"]["endpoints"][0]["path"]]:
        assert tokens.admit(path, b"")
    assert not tokens.admit("/rank", b"")


def test_objects_find_one_another() -> None:
    name, labels = OBJECTS["Deployment"]["metadata"]["name"], {"app": "masknet"}
    assert OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"] == labels
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert OBJECTS[kind]["spec"]["selector"]["matchLabels"] == labels
    assert MONITORING["ServiceMonitor"]["spec"]["selector"]["matchLabels"] == OBJECTS["Service"]["metadata"]["labels"]
    (port,), (named,) = OBJECTS["Service"]["spec"]["ports"], CONTAINER["ports"]
    assert port["targetPort"] == named["name"]
    assert MONITORING["ServiceMonitor"]["spec"]["endpoints"][0]["port"] == port["name"]
    for objects in (OBJECTS, MONITORING):
        scaler = objects["HorizontalPodAutoscaler"]
        assert scaler["metadata"]["name"] == name
        assert (scaler["spec"]["scaleTargetRef"]["kind"], scaler["spec"]["scaleTargetRef"]["name"]) == (
            "Deployment",
            name,
        )
    assert "replicas" not in OBJECTS["Deployment"]["spec"]  # each apply would undo what the autoscaler did
    (queue,) = (each["pods"]["metric"]["name"] for each in scaler["spec"]["metrics"] if each["type"] == "Pods")
    assert queue in {each.name for each in families().queue.collect()}


def test_the_container_may_do_little() -> None:
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["securityContext"]["runAsUser"] != 0
    own = CONTAINER["securityContext"]
    assert own["readOnlyRootFilesystem"]
    assert not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert POD["automountServiceAccountToken"] is False


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bento's folder."""
    home = tmp_path_factory.mktemp("bentoml")
    command = [sys.executable, "-m", "bentoml", "build", "-f", str(DEPLOY / "bentofile.yaml"), "-o", "tag", str(ROOT)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "BENTOML_HOME": str(home)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tag = re.search(r"__tag__:(\w+):(\w+)", done.stdout)
    assert tag
    return home / "bentos" / tag[1] / tag[2]


@pytest.mark.long
def test_a_bento_has_the_code_and_the_lock(bento: Path) -> None:
    for room in ("features", "masknet", "serving", "training"):
        own = {path.relative_to(ROOT): path.read_bytes() for path in (ROOT / room).rglob("*.py")}
        theirs = {path.relative_to(bento / "src"): path.read_bytes() for path in (bento / "src" / room).rglob("*.py")}
        assert own == theirs
    assert not (bento / "src" / "tests").exists()
    assert (bento / "src" / "features" / "schemas" / "movielens.yaml").is_file()
    found = (bento / "env" / "python" / "requirements.txt").read_text()
    wanted = pinned(LOCK.read_text())
    assert len(wanted) > 100
    assert pinned(found) == [
        *wanted,
        next(line for line in wanted if line.startswith("bentoml==")),
    ]  # BentoML adds itself
    assert found.count("--hash=sha256:") == LOCK.read_text().count("--hash=sha256:")
    assert "PIP_ARGS=(--no-deps)" in (bento / "env" / "python" / "install.sh").read_text()
    dockerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert "ENV PYTHONPATH=/home/bentoml/bento/src" in dockerfile
    assert f"ARG BENTO_USER_UID={POD['securityContext']['runAsUser']}\n" in dockerfile
    assert 'ENTRYPOINT [ "/home/bentoml/bento/env/docker/entrypoint.sh" ]' in dockerfile
    makefile = (ROOT / "Makefile").read_text()
    torch = re.search(r"torch==[\d.]+", makefile)
    assert torch
    assert torch[0] in (bento / "env" / "docker" / "setup_script").read_text()


def as_in_the_image(bento: Path, **variables: str) -> dict[str, str]:
    """This environment with the bento's code before the tree's."""
    own = {key: value for key, value in os.environ.items() if key not in (VARIABLE, FILE_VARIABLE)}
    return own | {"PYTHONPATH": str(bento / "src"), **variables}


@pytest.mark.long
def test_a_bentos_code_is_its_own(bento: Path) -> None:
    script = "import features, masknet, serving.service, training; print(serving.service.__file__, training.__file__)"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=bento, env=as_in_the_image(bento), capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(bento / "src" / each) for each in ("serving/service.py", "training/__init__.py")]


@contextmanager
def server(
    command: list[str], bento: Path, port: int, log: Path, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs the bento's code as its image would; ready. It is stopped."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=bento, env=as_in_the_image(bento, **variables), stdout=out, stderr=out, start_new_session=True
        )
        try:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                try:
                    if (
                        httpx.get(f"http://127.0.0.1:{port}{CONTAINER['startupProbe']['httpGet']['path']}").status_code
                        == 200
                    ):
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            else:
                pytest.fail(f"not ready after a minute: {log.read_text()}")
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def ask(port: int, **headers: str) -> httpx.Response:
    """Every item, for a user."""
    body = {"context": {"user": "bob"}, "candidates": {"item": list(range(ITEMS))}, "top_k": ITEMS}
    return httpx.post(f"http://127.0.0.1:{port}/rank", json=body, headers=headers, timeout=30)


def check_scores(answer: httpx.Response, bundle: Bundle) -> None:
    assert answer.status_code == 200, answer.text
    found = {item["index"]: item["score"] for item in answer.json()["items"]}
    expected_N = bundle.scorer.score({"user": ["bob"] * ITEMS, "item": list(range(ITEMS))})
    np.testing.assert_allclose([found[i] for i in range(ITEMS)], expected_N, atol=1e-6)


@pytest.mark.long
def test_the_containers_command_serves_from_a_bento(bento: Path, make: Make, tmp_path: Path) -> None:
    bundle, port, secret = make(), free_port(), tmp_path / "tokens"
    secret.write_text(f"{TOKEN}\n")
    config = tmp_path / "serve.yaml"
    changed = {"model": str(bundle.path), "cache": str(tmp_path / "cache"), "threads": 1}
    config.write_text(yaml.safe_dump({**SETTINGS, **changed}))
    words = {"python": sys.executable, CONFIG: str(config), "3000": str(port), "0.0.0.0": "127.0.0.1"}
    command = [words.get(word, word) for word in CONTAINER["args"]]
    places = {"HOME": str(tmp_path), "BENTOML_HOME": str(tmp_path / "bentoml"), FILE_VARIABLE: str(secret)}
    with server(command, bento, port, tmp_path / "log", **places) as process:
        check_scores(ask(port, authorization=f"Bearer {TOKEN}"), bundle)
        assert ask(port).status_code == 401
        started = time.monotonic()
        process.terminate()
        assert process.wait(POD["terminationGracePeriodSeconds"]) == 0
        assert time.monotonic() - started >= SETTINGS["limits"]["drain_seconds"]


@pytest.mark.long
def test_bentoml_serves_a_bento_with_settings_from_the_environment(bento: Path, make: Make, tmp_path: Path) -> None:
    bundle, port = make(), free_port()
    command = [sys.executable, "-m", "bentoml", "serve", str(bento), "--host", "127.0.0.1", "--port", str(port)]
    settings = ServeSettings(model=str(bundle.path), cache=tmp_path / "cache", limits={"drain_seconds": 0})  # type: ignore[arg-type]
    places = {"BENTOML_HOME": str(tmp_path / "bentoml"), VARIABLE: settings.model_dump_json()}
    with server(command, bento, port, tmp_path / "log", **places):
        check_scores(ask(port), bundle)
