"""A study in MLflow: a run for it, and one below for every trial and every model that is trained in the end.

All of it is copied from the study, which is on disk: what MLflow has not got while it is away, it gets when it is back,
or from the same command later.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from optuna import Study
from optuna.trial import FrozenTrial

from features.errors import InputError, without_password
from features.files import file_written_whole, read_json, write_json
from training.config import Config
from training.tracking.opening import flat
from training.tracking.outages import RequestLimits, is_mistake, reason, require_database
from training.tuning.search import facts_of
from training.tuning.space import Space
from training.tuning.trial import PRUNED
from training.workers import DONE

_METRICS = {
    "valid_logloss": "best_valid_logloss",
    "valid_auc": "best_valid_auc",
    "best_epoch": "best_epoch",
    "seconds": "seconds",
}
PAUSE = 60.0  # seconds between two tries while MLflow is away


class TrackedStudy:
    """Copies a study to MLflow; never fails with it, and remembers in OUT/mlflow.json what is there."""

    def __init__(self, name: str, config: Config, space: Space, out: Path, tell: Callable[[str], None]) -> None:
        """Nothing is asked of MLflow yet.

        Args:
            name: the study's.
            config: where MLflow is, and the experiment.
            space: from a trial's parameters to its configuration.
            out: the study's folder.
            tell: gives a person a line.
        """
        if config.tracking.uri:
            mlflow.set_tracking_uri(config.tracking.uri)
        self._name, self._config, self._space, self._tell = name, config, space, tell
        self._path, self._address = out / "mlflow.json", without_password(mlflow.get_tracking_uri())
        known = read_json(self._path, "tuning") if self._path.is_file() else {}
        self._known: dict[str, Any] = known if known.get("tracking_uri") == self._address else self._nothing()
        self._next_try, self._told = 0.0, False
        self._below: list[str] = []

    def _nothing(self) -> dict[str, Any]:
        return {"tracking_uri": self._address, "run_id": None, "trials": {}}

    @property
    def run_id(self) -> str | None:
        """Of the study; None until MLflow has it."""
        run_id: str | None = self._known["run_id"]
        return run_id

    def open(self) -> None:
        """Set the study's run going.

        Raises:
            InputError: MLflow's address or the experiment's name is wrong, rather than MLflow away.
        """
        require_database(mlflow.get_tracking_uri())
        error = self._tried(self._open)
        if error is not None and is_mistake(error) and self.run_id is None:
            raise InputError(f"MLflow at {self._address} cannot be used: {reason(error)}")
        self._look_at(error)

    def copy(self, study: Study) -> None:
        """Bring the trials to MLflow that are over and not there yet; while it is away, once in a while."""
        if time.monotonic() >= self._next_try:
            self._try(lambda: self._copy(study))

    def below(self, run_ids: list[str]) -> None:
        """Show other runs below the study's when it is closed."""
        self._below = run_ids

    def close(self, study: Study, status: str, files: list[Path]) -> None:
        """End the study's run, with the files of its answer."""

        def end() -> None:
            self._copy(study)
            client = mlflow.MlflowClient()
            for run_id in self._below:
                client.set_tag(run_id, MLFLOW_PARENT_RUN_ID, self.run_id)
            for file in files:
                client.log_artifact(self.run_id, str(file))
            client.set_terminated(self.run_id, status)

        self._told = False
        self._try(end)

    def _try(self, send: Callable[[], None]) -> None:
        self._look_at(self._tried(send))

    def _tried(self, send: Callable[[], None]) -> Exception | None:
        limits = RequestLimits()
        try:
            send()
        except Exception as error:
            return error
        finally:
            limits.unset()
        return None

    def _look_at(self, error: Exception | None) -> None:
        """After a failure, wait before the next try, and tell of the first."""
        self._next_try = 0.0 if error is None else time.monotonic() + PAUSE
        if error is not None and not self._told:
            self._tell(f"MLflow takes no records ({reason(error)}): the same command brings them later")
        self._told = error is not None

    def _open(self) -> None:
        client = mlflow.MlflowClient()
        if self.run_id is not None:
            try:
                client.update_run(self.run_id, status="RUNNING")
                return
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        self._known = self._nothing()  # the store is new, or was emptied
        tags = {MLFLOW_RUN_NAME: f"tune {self._name}", "masknet.study": self._name}
        self._known["run_id"] = str(client.create_run(self._experiment(client), tags=tags).info.run_id)
        self._remember()

    def _experiment(self, client: mlflow.MlflowClient) -> str:
        known = client.get_experiment_by_name(self._config.experiment)
        return str(known.experiment_id if known else client.create_experiment(self._config.experiment))

    def _copy(self, study: Study) -> None:
        if self.run_id is None:
            self._open()
        client = mlflow.MlflowClient()
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and str(trial.number) not in self._known["trials"]:
                self._known["trials"][str(trial.number)] = self._add(client, trial)
                self._remember()

    def _add(self, client: mlflow.MlflowClient, trial: FrozenTrial) -> str:
        facts, status = facts_of(trial), str(facts_of(trial).get("status"))
        tags = {
            MLFLOW_PARENT_RUN_ID: self.run_id,
            MLFLOW_RUN_NAME: f"trial {trial.number}",
            "masknet.study": self._name,
            "masknet.trial": str(trial.number),
            "masknet.status": status,
        }
        began, ended = (_milliseconds(moment) for moment in (trial.datetime_start, trial.datetime_complete))
        run = client.create_run(self._experiment(client), start_time=began, tags=tags)
        params = [Param(key, str(value)) for key, value in self._params(trial, status).items()]
        metric = f"valid_{self._config.train.early_stop.metric}"
        metrics = [Metric(metric, value, ended, epoch) for epoch, value in trial.intermediate_values.items()]
        metrics += [Metric(name, facts[key], ended, 0) for key, name in _METRICS.items() if key in facts]
        note = [RunTag("masknet.reason", str(facts["reason"])[:5000])] if "reason" in facts else []
        client.log_batch(run.info.run_id, metrics=metrics, params=params, tags=note)
        client.set_terminated(run.info.run_id, "FINISHED" if status in (DONE, PRUNED) else "FAILED", ended)
        return str(run.info.run_id)

    def _params(self, trial: FrozenTrial, status: str) -> dict[str, Any]:
        """All keys of the configuration, or what was searched where that is refused."""
        try:
            return flat(self._space.of(trial.params).model_dump(mode="json"))
        except (InputError, KeyError):
            return trial.params

    def _remember(self) -> None:
        with file_written_whole(self._path) as aside:
            write_json(aside, self._known)


def _milliseconds(moment: Any) -> int:
    return int(moment.timestamp() * 1000) if moment is not None else 0
