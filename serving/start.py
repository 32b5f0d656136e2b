"""`masknet serve`: check everything that can be checked, then become BentoML's server."""

import os
import shlex
import socket
import sys
from typing import NoReturn

import orjson

from features.errors import InputError
from serving.bundle import Bundle, load_bundle
from serving.golden import GOLDEN_FILE
from serving.models import locate

# How the server's workers learn what to load.
BUNDLE_VARIABLE, VERSION_VARIABLE, WORKERS_VARIABLE = "MASKNET_BUNDLE", "MASKNET_VERSION", "MASKNET_WORKERS"
SERVICE = "serving.service:MaskNetService"


def start(model: str, *, host: str, port: int, workers: int) -> NoReturn:
    """Verify the model and the port, print an example call, and replace this process by the server.

    Raises:
        InputError: the model is not there or damaged, or the port is taken.
    """
    located = locate(model)
    bundle = load_bundle(located.path)
    _require_free(host, port)
    sys.stdout.write(f"serving {located.uri} on http://{host}:{port}; once /readyz answers 200, try:\n")
    sys.stdout.write(f"{example_call(bundle, host, port)}\n")
    sys.stdout.flush()
    environment = {
        **os.environ,
        BUNDLE_VARIABLE: str(located.path.resolve()),
        VERSION_VARIABLE: located.version or bundle.digest[:12],
        WORKERS_VARIABLE: str(workers),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", host, "--port", str(port)]
    os.execve(sys.executable, command, environment)


def example_call(bundle: Bundle, host: str, port: int) -> str:
    """A curl command for /rank, from the bundle's golden rows."""
    rows = orjson.loads((bundle.path / GOLDEN_FILE).read_bytes())["rows"]
    body = {
        "context": {name: rows[name][2] for name in bundle.schema.context},
        "candidates": {name: rows[name][2:7] for name in bundle.schema.candidate_fields},
        "top_k": 3,
    }
    data = shlex.quote(orjson.dumps(body).decode())
    return f"curl -s http://{host}:{port}/rank -H 'content-type: application/json' -d {data}"


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"port {port} on {host} cannot be used: {error.strerror}") from None
