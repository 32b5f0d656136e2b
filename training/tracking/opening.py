"""Tracking: a training's run in MLflow, opened, gone on with, or begun without MLflow. Rank 0 only.

Nothing here slows or stops training. While MLflow is away, slow or full, the records wait in OUT/tracking/. They are
sent when it is back, or by the same command with --resume.
"""

import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow.exceptions import MlflowException
from rich.console import Console

from features.errors import InputError, without_password
from features.files import read_json
from training.config import Config
from training.progress import teller
from training.tracking.environment import environment, run_name, run_tags
from training.tracking.mlflow_run import OFFLINE, MlflowRun, run_with_local_id
from training.tracking.outages import RequestLimits, is_mistake, reason, require_database
from training.tracking.run import RUN_FILE, Run
from training.tracking.sender import Sender

__all__ = ["Run", "attach_report", "flat", "open_run"]

START_PATIENCE = 20.0  # seconds that training waits for MLflow before it starts without


def open_run(
    config: Config, data: dict[str, Any], out: Path | None, resume: bool, console: Console | None = None
) -> Run:
    """Open a run, a context manager, and record what is known at the start.

    Where MLflow cannot be reached the run begins under a local id, and MLflow gets it when it is back.

    Args:
        config: what is trained.
        data: the prepared data set's manifest, and its "path".
        out: the training's folder; by default runs/<experiment>/<run id>.
        resume: go on with the run that `out` tells of, if it does.
        console: where a person reads along; by default standard error.

    Raises:
        InputError: MLflow's address, or a name, is wrong; or `out` holds a run and `resume` is not asked for.
    """
    tell = teller(console or Console(stderr=True))
    if config.tracking.uri:
        mlflow.set_tracking_uri(config.tracking.uri)
    address = without_password(mlflow.get_tracking_uri())
    known = _known_run(out, resume)
    local_id = known.get("local_id") or f"{OFFLINE}{secrets.token_hex(4)}"
    run_id = known.get("run_id") if known.get("tracking_uri") == address else None
    remote = MlflowRun(config.experiment, run_name(config, local_id), local_id, run_id, may_exist=bool(known))
    limits, sender = RequestLimits(), Sender(remote, tell)
    try:
        require_database(mlflow.get_tracking_uri())
        failure = sender.start(START_PATIENCE)
        if failure is not None and is_mistake(failure) and not known:  # what was right once is away, and not wrong
            raise InputError(f"MLflow at {address} cannot be used: {reason(failure)}")
        if failure is None and not remote.is_open:
            tell(f"MLflow at {address} has not answered for {START_PATIENCE:.0f} s: training starts without")
        out = out or Path("runs") / config.experiment / (remote.run_id or local_id)
        run = Run(config=config, out=out, address=address, remote=remote, sender=sender, limits=limits)
    except BaseException:
        sender.stop()
        limits.unset()
        raise
    _record_start(run, config, data)
    return run


def _known_run(out: Path | None, resume: bool) -> dict[str, Any]:
    """What OUT/run.json tells of the run that is gone on with."""
    if out is None or not (out / RUN_FILE).exists():
        return {}
    if not resume:
        raise InputError(f"{out} holds a run already: --resume goes on with it; or choose another folder")
    found = read_json(out / RUN_FILE, "training")
    if not isinstance(found, dict) or not isinstance(found.get("local_id"), str):
        raise InputError(f"training: {out / RUN_FILE} is damaged: local_id is missing")
    return found


def _record_start(run: Run, config: Config, data: dict[str, Any]) -> None:
    """Configuration, data, environment; parameters only once, for MLflow lets none change."""
    settings = config.model_dump(mode="json")
    if config.tracking.uri:
        settings["tracking"]["uri"] = without_password(config.tracking.uri)
    path = Path(data["path"]) / "profile.json"
    profile = read_json(path, "prepared data") if path.is_file() else {}
    splits = {name: found["rows"] for name, found in profile.get("splits", {}).items()}
    if run.is_fresh:
        run.params(flat(settings))
    run.dataset(data["schema"]["name"], Path(data["path"]), data["pipeline_digest"], splits)
    run.text(_json(data), "data.json")
    run.text(_json(profile), "profile.json")
    found = environment()
    run.tags(run_tags(config, data, splits, found))
    run.text(yaml.safe_dump(settings, sort_keys=False), "config.yaml")
    run.text(_json(found), "environment.json")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def attach_report(run_id: str | None, files: Sequence[Path], place: str) -> None:
    """Store an evaluation's files as report/PLACE of the run that trained the model, where that run is known here."""
    with suppress(MlflowException):  # a bundle's folder may have come from elsewhere
        client = mlflow.MlflowClient()
        if run_id is not None and run_id.startswith(OFFLINE):  # trained while MLflow was away
            everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
            run_id = run_with_local_id(client, run_id, everywhere)
        if run_id is not None:
            for file in files:  # the folder is the user's, and may hold more
                client.log_artifact(run_id, str(file), f"report/{place}")


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as one level of keys joined by points."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
