"""`masknet serve`: check everything that can be checked, then become BentoML's server."""

import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import orjson

from features.errors import InputError
from features.validation import load_yaml, override, validate
from serving.api.auth import Tokens
from serving.bundle import Bundle
from serving.golden import GOLDEN_FILE
from serving.home import make_home
from serving.life.asks import asks_of, require_alike
from serving.life.opening import Opened, Opener
from serving.life.shares import require_key
from serving.monitoring.spans import tracing_of
from serving.settings import VARIABLE, ServeSettings
from serving.store.fill import Filler

SERVICE = "serving.service:MaskNetService"


def read_settings(config: Path | None, overrides: list[str], **given: Any) -> ServeSettings:
    """The service's settings: a YAML file's, then overrides `key.path=value`, then what is given and not None.

    Raises:
        InputError: the file, a key or a value is wrong; the message names it.
    """
    data = load_yaml(config, "config") if config else {}
    override(data, overrides)
    data |= {key: value for key, value in given.items() if value is not None}
    return validate(ServeSettings, data, f"config {config}" if config else "settings")


def start(settings: ServeSettings, *, host: str, port: int) -> NoReturn:
    """Check models, folders and the port, print an example call, and replace this process by the server.

    Raises:
        InputError: a model is not there, damaged or not what the settings need, the port is taken, or a package is
            missing.
    """
    _require_free(host, port)
    _require_device(settings.device)
    tracing_of(settings.tracing)
    champion = check_models(settings)
    _require_folders(settings)
    Tokens.of(os.environ)
    engine = champion.engine
    if settings.store:
        Filler.of(settings.store, engine.schema).close()
    uri = champion.found.uri if champion.found else settings.model
    cached = ", from the cache" if champion.source == "cache" else ""
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    sys.stdout.write(f"serving {uri}{cached} on {address}; once /readyz answers 200, try:\n")
    sys.stdout.write(f"{example_call(engine.bundle, address)}\n")
    sys.stdout.flush()
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", host, "--port", str(port)]
    os.execve(sys.executable, command, environment(settings))


def check_models(settings: ServeSettings) -> Opened:
    """Open every model of the settings as the workers will, so that they find what they need; the champion.

    Raises:
        InputError: one is not there or damaged, or the settings' fields are not its.
    """
    opener = Opener(settings)
    champion = opener.open_by_registry(settings.model, _tell)
    schema = champion.engine.schema
    if settings.challenger:
        require_key(schema, settings.challenger.key)
    beside = {"challenger": settings.challenger, "shadow": settings.shadow}
    for role, section in beside.items():
        if section:
            other = opener.open_by_registry(section.model, _tell).engine
            require_alike(role, section.model, asks_of(schema), asks_of(other.schema))
    return champion


def environment(settings: ServeSettings) -> dict[str, str]:
    """What the server's processes find in their environment."""
    home = os.environ.get("BENTOML_HOME") or str(make_home())
    mine = {VARIABLE: settings.model_dump_json(), "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": home}
    return {**os.environ, **mine}


def example_call(bundle: Bundle, address: str) -> str:
    """A curl command for /rank, from the bundle's golden rows."""
    rows = orjson.loads((bundle.path / GOLDEN_FILE).read_bytes())["rows"]
    context = bundle.schema.context if bundle.schema.candidate_fields else ()  # candidates have some field
    body = {
        "context": {name: rows[name][2] for name in context},
        "candidates": {
            field.name: rows[field.name][2:7] for field in bundle.schema.served_fields if field.name not in context
        },
        "top_k": 3,
    }
    data = shlex.quote(orjson.dumps(body).decode())
    return f"curl -s {address}/rank -H 'content-type: application/json' -d {data}"


def _tell(message: str) -> None:
    sys.stderr.write(f"masknet: {message}\n")


def _require_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("device: cuda needs a GPU that torch can use, and there is none")


def _require_folders(settings: ServeSettings) -> None:
    if settings.log:
        folder = settings.log.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"log.folder {folder} cannot be made: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"log.folder {folder} cannot be written to")


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"port {port} on {host} cannot be used: {error.strerror}") from None
