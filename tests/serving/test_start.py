"""`masknet serve` before the server starts: settings, models, folders and the port are checked."""

import json
import re
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest

from features.errors import InputError
from serving.life.cores import usable_cores
from serving.reference import settings_reference
from serving.settings import VARIABLE, ServeSettings
from serving.start import check_models, environment, example_call, read_settings, start
from tests.serving.conftest import Make
from tests.serving.test_life_following import broken, wider


def test_a_file_then_overrides_then_options(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\nworkers: 3\nlimits: {rows: 100, queue: 7}\n")
    settings = read_settings(file, ["limits.rows=200", "challenger={model: c, share: 0.5, key: user}"], workers=2)
    assert (settings.model, settings.workers, settings.limits.rows, settings.limits.queue) == ("m", 2, 200, 7)
    assert settings.challenger is not None
    assert settings.challenger.share == 0.5
    assert read_settings(file, [], model="other", workers=None).model == "other"
    assert read_settings(None, [], model=None, workers=None) == ServeSettings()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("limits.row=5", "settings: limits.row: unknown key"),
        ("limits.rows=0", "settings: limits.rows: Input should be greater than or equal to 1"),
        ("limits", "--set 'limits' is not of the form section.key=value"),
        ("limits.drain_seconds=.inf", "settings: limits.drain_seconds: Input should be a finite number"),
        (
            "store={kind: redis, url: u, key: k, fields: [f], timeout_ms: .inf}",
            "store.timeout_ms: Input should be a finite",
        ),
        ("tables=int8", "settings: tables: int8 rounds embeddings"),
        ("challenger.share=0.5", "challenger.model: required key is missing"),
        ("challenger={model: m, share: 2, key: user}", "challenger.share: Input should be less than or equal to 1"),
    ],
)
def test_a_mistake_in_the_settings_names_the_key(override: str, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        read_settings(None, [override])


def test_workers_get_the_settings_whole(tmp_path: Path) -> None:
    given = ServeSettings.model_validate({"model": "m", "log": {"folder": str(tmp_path)}, "cache": "/c", "threads": 2})
    assert ServeSettings.model_validate_json(environment(given)[VARIABLE]) == given


def test_each_server_has_a_home_that_nobody_else_can_write_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("BENTOML_HOME", raising=False)
    homes = {environment(ServeSettings())["BENTOML_HOME"] for _ in range(2)}
    assert {Path(home).stat().st_mode & 0o777 for home in homes} == {0o700}
    assert len(homes) == 2
    left = tmp_path / "masknet-serve-ended"  # whose process holds no lock any more
    left.mkdir()
    (left / "running").touch()
    third = environment(ServeSettings())["BENTOML_HOME"]
    assert {str(folder) for folder in tmp_path.iterdir()} == {*homes, third}
    monkeypatch.setenv("BENTOML_HOME", "/elsewhere")
    assert environment(ServeSettings())["BENTOML_HOME"] == "/elsewhere"


def test_every_key_is_in_the_reference() -> None:
    told = set(re.findall(r"^\| `([a-z_.]+)` \|", settings_reference(), re.M))
    assert {"model", "limits.rows", "follow.interval_seconds", "challenger.share", "log.folder", "store.key"} <= told
    assert "None" not in settings_reference()


def settings(model: Path, **changed: Any) -> ServeSettings:
    return ServeSettings.model_validate({"model": str(model), "threads": 1} | changed)


def test_models_are_opened_as_the_workers_will(make: Make) -> None:
    champion = make("champion", 1)
    opened = check_models(settings(champion.path))
    assert (opened.engine.version, opened.source, opened.found) == (champion.digest[:12], "folder", None)


def test_what_does_not_fit_is_told_before_the_start(make: Make, tmp_path: Path) -> None:
    good, other = make("good", 1).path, wider(make)
    challenger = {"model": str(good), "share": 0.5, "key": "user"}
    with pytest.raises(InputError, match=r"challenger.key: 'age' is no categorical field"):
        check_models(settings(good, challenger=challenger | {"key": "age"}))
    with pytest.raises(InputError, match=r"^challenger .*wider does not suit the champion's clients: it asks for"):
        check_models(settings(good, challenger=challenger | {"model": str(other)}))
    with pytest.raises(InputError, match=r"^shadow .*wider does not suit the champion's clients: it asks for shop$"):
        check_models(settings(good, shadow={"model": str(other)}))
    with pytest.raises(InputError, match="neither a folder nor"):
        check_models(settings(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is no bundle: manifest.json is missing"):
        check_models(settings(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"the SHA-256 of members/00/embeddings/000.safetensors is not the one"):
        check_models(settings(broken(good)))


def test_a_fast_backend_that_was_not_checked_is_told(make: Make) -> None:
    with pytest.raises(InputError, match="exact"):
        check_models(settings(make("unchecked", 1).path, backend="fast"))


def test_the_port_and_the_folder_of_the_log(make: Make, tmp_path: Path) -> None:
    model = make("good", 1).path
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 cannot be used: Address already in use"):
            start(settings(model), host="127.0.0.1", port=port)
    (tmp_path / "file").write_text("")
    log = {"folder": str(tmp_path / "file" / "log")}
    with pytest.raises(InputError, match=r"log.folder .*file/log cannot be made: Not a directory"):
        start(settings(model, log=log), host="127.0.0.1", port=port)


def test_the_example_is_a_request(make: Make) -> None:
    call = shlex.split(example_call(make(), "http://[::1]:3000"))
    body = json.loads(call[-1])
    assert "http://[::1]:3000/rank" in call
    assert body["top_k"] == 3
    assert len(body["candidates"]["item"]) == 5
    assert body["context"].keys() == {"user"}


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 64), ("150000 100000", 1), ("250000 100000", 2), ("50000 100000", 1), ("", 64)]
)
def test_cores_are_those_of_the_control_group(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "cpu.max").write_text(quota)
    assert usable_cores(tmp_path / "cpu.max") == cores
    assert usable_cores(tmp_path / "absent") == 64
