"""Where a run runs: machine, libraries, git revision, and the name that people know the run by."""

import getpass
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_BRANCH,
    MLFLOW_GIT_COMMIT,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from features.errors import without_password
from training.bench.machine import cpu_name
from training.config import Config

_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "pyarrow", "polars", "mlflow")
_GIT_SECONDS = 5


def environment() -> dict[str, Any]:
    """What results and speed depend on beside configuration and data."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def git_revision(folder: Path) -> dict[str, str]:
    """Tags of the commit that `folder` has checked out, and whether files differ; none where there is no git."""
    try:
        commit, branch = _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {MLFLOW_GIT_COMMIT: commit, MLFLOW_GIT_BRANCH: branch, "masknet.git_dirty": str(bool(changed)).lower()}


def run_name(config: Config, local_id: str) -> str:
    """Such as parallel-3x400-layer-7f3a, which fits into MLflow's column: kind, shape, norms, the local id's end."""
    model = config.model
    embedding, hidden = model.embedding_norm.name, model.hidden_norm.name
    norms = hidden if embedding == hidden else f"{embedding}+{hidden}"
    return f"{model.kind}-{model.blocks}x{model.block_width}-{norms}-{local_id[-4:]}"


def run_tags(config: Config, data: dict[str, Any], rows: dict[str, int], found: dict[str, Any]) -> dict[str, str]:
    """Who trained what, where and from which revision; MLflow's own names where it has one.

    Args:
        config: what is trained.
        data: the prepared data set's manifest, and its "path".
        rows: of each split.
        found: `environment`'s.
    """
    where = ", ".join(found["gpus"]) or f"{found['cpu']}, threads: {found['threads']}"
    splits = ", ".join(f"{count:,} {split}" for split, count in rows.items())
    rates = f"{config.optimizer.dense.name} {config.optimizer.dense.lr:g}"
    sparse = f"{config.optimizer.sparse.name} {config.optimizer.sparse.lr:g}"
    note = (
        f"**{config.model.kind}** MaskNet on {data['schema']['name']} (rows: {splits or 'unknown'}), "
        f"batch {config.train.batch_size:,}, "
        f"{rates} for the network and {sparse} for the tables, {config.train.precision}, on {where}."
    )
    return {
        MLFLOW_RUN_NOTE: note,
        MLFLOW_SOURCE_NAME: shlex.join(map(without_password, [Path(sys.argv[0]).name, *sys.argv[1:]])),
        MLFLOW_SOURCE_TYPE: "JOB",
        MLFLOW_USER: _user(),
        "masknet.device": where,
        "masknet.pipeline_digest": data["pipeline_digest"],
        **git_revision(Path.cwd()),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
