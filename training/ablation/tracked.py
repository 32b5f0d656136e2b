"""An ablation in MLflow: a run for the study, and one below it for every cell and seed."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from features.errors import InputError, one_line
from training.ablation.jobs import Job
from training.ablation.study import Study
from training.config import Config
from training.tracking.mlflow_run import metric_name
from training.tracking.opening import flat
from training.workers import DONE

_NO_TIME = 0


class TrackedStudy:
    """Writes to MLflow from this process alone; its workers do not know it."""

    def __init__(self, study: Study, config: Config, known: dict[str, Any]) -> None:
        """Open the study's run, or go on with the one that `known`, an earlier call's facts, tells of.

        Raises:
            InputError: the tracking store cannot be reached.
        """
        if config.tracking.uri:
            mlflow.set_tracking_uri(config.tracking.uri)
        self._client = mlflow.MlflowClient()
        try:
            self._experiment = mlflow.set_experiment(config.experiment).experiment_id
        except MlflowException as error:
            raise InputError(f"MLflow at {mlflow.get_tracking_uri()} cannot be used: {one_line(error)}") from None
        goes_on = self._reopens(known.get("run_id"))
        self.run_id = known["run_id"] if goes_on else self._open(study)
        self._children: dict[str, dict[str, str]] = dict(known["children"]) if goes_on else {}

    @property
    def known(self) -> dict[str, Any]:
        """What a later call has to know: the study's run, and the run and status of each seed."""
        return {"run_id": self.run_id, "children": self._children}

    def _reopens(self, run_id: str | None) -> bool:
        if run_id is None:
            return False
        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException:
            return False  # another store than the last time
        return True

    def _open(self, study: Study) -> str:
        tags = {MLFLOW_RUN_NAME: f"ablation {study.name}", "masknet.ablation": study.name}
        run = self._client.create_run(self._experiment, tags=tags)
        facts = {"baseline": study.baseline, "seeds": study.seeds, "trials": study.trials, "cells": len(study.cells)}
        self._client.log_batch(run.info.run_id, params=[Param(key, str(value)) for key, value in facts.items()])
        return str(run.info.run_id)

    def add(self, key: str, job: Job, result: dict[str, Any]) -> None:
        """A run below the study's for a seed's result, unless it is there; `key` names the seed's file."""
        before = self._children.get(key)
        if before is not None and before["status"] == result["status"]:
            return
        if before is not None:
            with suppress(MlflowException):
                self._client.delete_run(before["run_id"])
        self._children[key] = {"run_id": self._add(job, result), "status": result["status"]}

    def _add(self, job: Job, result: dict[str, Any]) -> str:
        done = result["status"] == DONE
        tags = {
            MLFLOW_PARENT_RUN_ID: self.run_id,
            MLFLOW_RUN_NAME: f"{job.cell}, seed {result['seed']}",
            "masknet.cell": job.cell,
        }
        run_id = str(self._client.create_run(self._experiment, tags=tags).info.run_id)
        params = [Param(key, str(value)) for key, value in flat(job.config.model_dump(mode="json")).items()]
        metrics = [
            Metric(f"valid_{name}" if name != "train_loss" else name, value, _NO_TIME, epoch)
            for epoch, values in enumerate(result.get("history", []), start=1)
            for name, value in values.items()
            if value is not None
        ]
        test = result.get("test", {})
        metrics += [
            Metric(metric_name(f"test_{key}"), value, _NO_TIME, 0) for key, value in test.items() if value is not None
        ]
        note = [] if done else [RunTag("masknet.reason", str(result["reason"])[:5000])]
        self._client.log_batch(run_id, metrics=metrics, params=params, tags=note)
        self._client.set_terminated(run_id, "FINISHED" if done else "FAILED")
        return run_id

    def close(self, out: Path, status: str) -> None:
        """End the study's run, with the files of its answer."""
        for name in ("cells.json", "cells.csv", "rates.json", "report.html"):
            if status == "FINISHED" and (out / name).is_file():
                self._client.log_artifact(self.run_id, str(out / name))
        self._client.set_terminated(self.run_id, status)
