"""The bundle as an MLflow python_function, served by MLflow itself, and as a function over frames, as Spark has it."""

import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from features.encoders import Identity, Vocabulary
from features.errors import InputError
from features.pipeline import FeaturePipeline
from features.schema import Schema
from serving.bundle import Bundle
from serving.scoring.frames import score_batches, signature_of

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*An input example was not provided:UserWarning")
ROOT = Path(__file__).parent.parent.parent
LARGE = [2**24 + 1, 2**24, 2**24 + 1]  # which fp32 cannot tell apart
ITEMS = [3, 3, 7]


@pytest.fixture
def bundle(make: Callable[..., Bundle]) -> Bundle:
    """Two users whose ids differ by one, above 2^24."""
    schema = make("other").schema
    encoders = {"user": Vocabulary(pa.array([str(2**24), str(2**24 + 1)])), "item": Identity(60)}
    return make("bundle", 1, pipeline=FeaturePipeline.build(schema.fields, encoders))


@pytest.fixture
def saved(bundle: Bundle, tmp_path: Path) -> Path:
    """The bundle as training logs it."""
    spec = importlib.util.find_spec("serving.pyfunc")
    assert spec is not None
    assert spec.origin is not None
    mlflow.pyfunc.save_model(
        tmp_path / "model",
        python_model=spec.origin,
        artifacts={"bundle": str(bundle.path)},
        signature=signature_of(bundle.schema),
        pip_requirements=[],
    )
    return tmp_path / "model"


def expected(bundle: Bundle) -> np.ndarray:
    score_N = bundle.scorer.score({"user": [str(user) for user in LARGE], "item": ITEMS})
    assert len(set(score_N.tolist())) == 3
    return score_N


@pytest.mark.parametrize("kind", ["int64", "Int64", "object", "string", "float64"])
def test_ids_keep_all_their_digits(bundle: Bundle, saved: Path, kind: str) -> None:
    users = pd.Series(LARGE, index=[5, 6, 9]).astype("int64").astype(kind)
    frame = pd.DataFrame({"user": users, "item": pd.Series(ITEMS, index=users.index), "place": 1})
    found = mlflow.pyfunc.load_model(str(saved)).predict(frame)
    np.testing.assert_array_equal(found.to_numpy(), expected(bundle))
    assert found.index.tolist() == [5, 6, 9]


def test_ids_that_a_float_cannot_hold_are_refused_and_not_rounded(saved: Path) -> None:
    frame = pd.DataFrame({"user": [2**53 + 1, None], "item": [1, 2]})  # pandas makes floats of them
    with pytest.raises(InputError, match=r"column 'user' holds ids of 2\^53 or more as double: digits are lost"):
        mlflow.pyfunc.load_model(str(saved)).predict(frame)


def test_the_signature_names_what_is_sent(saved: Path) -> None:
    signature = mlflow.models.get_model_info(str(saved)).signature
    assert signature.inputs.input_names() == ["user", "item"]
    assert signature.outputs.to_dict() == [{"type": "float", "name": "score", "required": True}]
    with pytest.raises(mlflow.exceptions.MlflowException, match="missing inputs \\['item'\\]"):
        mlflow.pyfunc.load_model(str(saved)).predict(pd.DataFrame({"user": LARGE}))
    fields = [
        {"name": "user", "type": "categorical"},
        {"name": "place", "type": "numeric", "training_only": {"default": 1}},
        {"name": "hour", "type": "date", "from": "at", "part": "hour"},
        {"name": "day", "type": "date", "from": "at", "part": "weekday"},
        {"name": "pair", "type": "cross", "of": ["user", "hour"], "buckets": 9},
    ]
    schema = Schema.model_validate({"name": "s", "label": {"column": "click"}, "fields": fields})
    assert signature_of(schema).inputs.input_names() == ["user", "at"]


def test_frames_are_scored_one_by_one(bundle: Bundle, tmp_path: Path) -> None:
    frame = pd.DataFrame({"user": LARGE, "item": ITEMS, "other": ["a", None, "c"]}, index=[2, 4, 8])
    function = pickle.loads(pickle.dumps(partial(score_batches, model=str(bundle.path))))  # noqa: S301  (as Spark does)
    drawn: list[int] = []

    def frames() -> Iterator[pd.DataFrame]:
        for start in range(3):
            drawn.append(start)
            yield frame[start : start + 1]

    scored = function(frames())
    first = next(scored)
    assert drawn == [0]  # nothing is held back
    found = pd.concat([first, *scored])
    pd.testing.assert_frame_equal(found[["user", "item", "other"]], frame)
    assert found["score"].dtype == np.float32
    np.testing.assert_allclose(found["score"], expected(bundle), rtol=0, atol=1e-7)
    assert list(function(iter([]))) == []
    with pytest.raises(InputError, match="a frame has a column 'score' already"):
        list(function([found]))
    with pytest.raises(InputError, match="is neither a folder nor"):
        list(score_batches([frame], str(tmp_path / "nothing")))


@pytest.fixture
def address(saved: Path, tmp_path: Path) -> Iterator[str]:
    """`mlflow models serve` of the model's first version in a registry."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(store, store)
    client.create_registered_model("ranker")
    client.create_model_version("ranker", saved.as_uri())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/ranker/1", "--env-manager", "local"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": store}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ping", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.3)
        else:
            raise AssertionError((tmp_path / "log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}/invocations"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.long
def test_mlflow_serves_the_same_scores(bundle: Bundle, address: str) -> None:
    def answered(body: dict[str, Any]) -> httpx.Response:
        return httpx.post(address, json=body, timeout=60)

    rows = [list(pair) for pair in zip(LARGE, ITEMS, strict=True)]
    records = [{"user": user, "item": item} for user, item in rows]
    bodies: list[dict[str, Any]] = [
        {"dataframe_split": {"columns": ["user", "item"], "data": rows}},
        {"dataframe_split": {"columns": ["item", "user"], "data": [[item, str(user)] for user, item in rows]}},
        {"dataframe_records": records},
    ]
    for body in bodies:
        answer = answered(body)
        assert answer.status_code == 200, answer.text
        found = [row["score"] if isinstance(row, dict) else row for row in answer.json()["predictions"]]
        np.testing.assert_allclose(found, expected(bundle), rtol=0, atol=1e-6)
    wrong = answered({"dataframe_records": [{"user": 1, "item": "x"}]})
    assert wrong.status_code >= 400
    assert "is no whole number of 0 or more" in wrong.text
    assert answered({"dataframe_records": [{"user": 1}]}).status_code == 400
