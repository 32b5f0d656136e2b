"""One run in MLflow: find or make it, bring records there, register the model."""

import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_RUN_NAME

from features.errors import one_line
from features.schema import load_schema
from serving.models import BUNDLE_ARTIFACT, VERSION_TAG
from serving.scoring.frames import signature_of
from training.tracking.outages import is_refusal
from training.tracking.spool import Record

CANDIDATE = "candidate"
OFFLINE = "offline-"  # with eight hexadecimal digits: what a run is called until MLflow has it
LOCAL_ID_TAG = "masknet.local_id"
_LIMITS = {"metrics": 1000, "params": 100, "tags": 100}  # what MLflow takes at once
_ENOUGH = 10  # refusals, after which single ones are no longer looked for: a deleted run refuses all
# What loading a bundle imports beside this package, which has to be installed where a model is loaded.
_NEEDS = ("mlflow", "torch", "torchrec", "pandas", "polars", "pyarrow", "pydantic", "safetensors", "polars-hash")


class MlflowRun:
    """The run of one training, `run_id` None until MLflow has it. Every method but the constructor may take long."""

    def __init__(self, experiment: str, name: str, local_id: str, run_id: str | None, may_exist: bool) -> None:
        """Nothing is asked of MLflow yet.

        Args:
            experiment: its name.
            name: the run's name, for a new one.
            local_id: what the run is called where MLflow is not known; a tag, by which it is found again.
            run_id: MLflow's id, of a run to go on with.
            may_exist: an earlier process may have made the run and not have learned of it.
        """
        self.run_id, self.is_open, self.is_new = run_id, False, False
        self.local_id, self._experiment, self._name = local_id, experiment, name
        self._may_exist, self._abandoned = may_exist, False
        self._known: mlflow.MlflowClient | None = None

    @property
    def _client(self) -> mlflow.MlflowClient:
        if self._abandoned:
            raise ConnectionAbortedError("the run was left to a later process")
        if self._known is None:
            self._known = mlflow.MlflowClient()
        return self._known

    def abandon(self) -> None:
        """Make no more requests: each raises ConnectionAbortedError. One under way cannot be called back."""
        self._abandoned = True

    def open(self) -> None:
        """Set the run going: the known one, one that was made for this training before, or a new one."""
        if self.run_id is not None:
            try:
                self._client.update_run(self.run_id, status="RUNNING")
                self.is_open = True
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self.run_id, self._may_exist = None, True  # the store is another, or was emptied
        experiment = self._experiment_id()
        found = self._found(experiment) if self._may_exist else None
        self._may_exist = True  # an answer that is lost on its way does not undo what was made
        if found is None:
            tags = {MLFLOW_RUN_NAME: self._name, LOCAL_ID_TAG: self.local_id.removeprefix(OFFLINE)}
            found = str(self._client.create_run(experiment, tags=tags).info.run_id)
        self.run_id, self.is_open, self.is_new = found, True, True

    def _experiment_id(self) -> str:
        known = self._client.get_experiment_by_name(self._experiment)
        if known is not None:
            return str(known.experiment_id)
        try:
            return str(self._client.create_experiment(self._experiment))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return str(self._client.get_experiment_by_name(self._experiment).experiment_id)  # made by another run just now

    def _found(self, experiment: str) -> str | None:
        return run_with_local_id(self._client, self.local_id, [experiment])

    def send(self, records: list[Record], home: Path) -> list[str]:
        """Bring records to MLflow, numbers and short texts in batches; return the reasons of those it refuses.

        Args:
            records: as `Run` makes them.
            home: what relative folders are relative to.

        Raises:
            Exception: an outage; what was sent of the records may be sent again.
        """
        refused: list[str] = []
        for items in _batches(records):
            self._log_batch(items, refused)
        for record in records:
            try:
                self._log_file(record, home)
            except Exception as error:
                if not is_refusal(error):
                    raise
                refused.append(f"{record['name']}: {one_line(error)}")
        return refused

    def _log_batch(self, items: dict[str, list[Any]], refused: list[str]) -> None:
        try:
            self._client.log_batch(self.run_id, **items)
        except Exception as error:
            if not is_refusal(error):
                raise
            ((kind, values),) = items.items()
            if len(values) == 1 or len(refused) >= _ENOUGH:
                refused.append(f"{kind} {values[0].key}: {one_line(error)}")
                return
            half = len(values) // 2  # one of many is wrong: all others go
            self._log_batch({kind: values[:half]}, refused)
            self._log_batch({kind: values[half:]}, refused)

    def _log_file(self, record: Record, home: Path) -> None:
        match record["kind"]:
            case "text":
                self._client.log_text(self.run_id, record["content"], record["name"])
            case "artifacts":
                folder = home / record["folder"]
                if not folder.is_dir():
                    raise FileNotFoundError(f"{folder} is not there any more")  # of which MLflow would say nothing
                self._client.log_artifacts(self.run_id, str(folder), record["name"])
            case "dataset":
                found = Dataset(**{key: record[key] for key in ("name", "digest", "source_type", "source", "profile")})
                context = InputTag(MLFLOW_DATASET_CONTEXT, "training")
                self._client.log_inputs(self.run_id, [DatasetInput(found, [context])])

    def set_status(self, status: str) -> None:
        """End the run."""
        self._client.set_terminated(self.run_id, status)

    def register(self, bundle: Path, name: str) -> str:
        """Log the bundle as a python_function without pickle, register it as `candidate`, and return its URI.

        What the run has registered already is not registered twice: its tag, set last, tells that nothing is left to
        do, and without the tag a version that an interrupted call has made is gone on with.
        """
        known = self._client.get_run(self.run_id).data.tags.get(VERSION_TAG)
        if known is not None:
            return str(known)
        made = self._client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        number = str(made[0].version) if made else self._new_version(bundle, name)
        self._client.set_registered_model_alias(name, CANDIDATE, number)
        uri = f"models:/{name}/{number}"
        self._client.set_tag(self.run_id, VERSION_TAG, uri)
        return uri

    def _new_version(self, bundle: Path, name: str) -> str:
        spec = find_spec("serving.pyfunc")
        assert spec is not None
        assert spec.origin is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*An input example was not provided")  # it would score it
            info = Model.log(
                artifact_path=None,
                name="model",
                flavor=mlflow.pyfunc,
                run_id=self.run_id,
                python_model=spec.origin,
                artifacts={BUNDLE_ARTIFACT: str(bundle)},
                signature=signature_of(load_schema(bundle / "schema.yaml")),
                pip_requirements=[f"{package}=={version(package)}" for package in _NEEDS],
            )
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        made = self._client.create_model_version(name, info.model_uri, self.run_id, model_id=info.model_id)
        return str(made.version)


def run_with_local_id(client: mlflow.MlflowClient, local_id: str, experiments: list[str]) -> str | None:
    """MLflow's id of the run that was called `local_id`, or None."""
    wanted = f"tags.`{LOCAL_ID_TAG}` = '{local_id.removeprefix(OFFLINE)}'"
    runs = client.search_runs(experiments, wanted, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def metric_name(name: str) -> str:
    """A metric's name as MLflow takes it, which refuses "@": ndcg@10 is ndcg_at_10 there."""
    return name.replace("@", "_at_")


def _batches(records: list[Record]) -> list[dict[str, list[Any]]]:
    """What `log_batch` takes, in as few calls as its limits allow."""
    found: dict[str, list[Any]] = {kind: [] for kind in _LIMITS}
    for record in records:
        if record["kind"] == "metrics":
            time = record["time"]
            found["metrics"] += [Metric(metric_name(key), value, time, step) for key, value, step in record["values"]]
        elif record["kind"] in ("params", "tags"):
            entity = Param if record["kind"] == "params" else RunTag
            found[record["kind"]] += [entity(key, str(value)) for key, value in record["values"].items()]
    return [
        {kind: values[start : start + _LIMITS[kind]]}
        for kind, values in found.items()
        for start in range(0, len(values), _LIMITS[kind])
    ]
