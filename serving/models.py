"""MODEL on every command line: a bundle's folder, an MLflow model URI, or a run id."""

import re
from dataclasses import dataclass
from pathlib import Path

from features.errors import InputError

BUNDLE_ARTIFACT = "bundle"
VERSION_TAG = "masknet.model_uri"  # on a run: the registered version that it made
_RUN = re.compile(r"(?:runs:/)?([0-9a-f]{32})(?:/.*)?")


@dataclass(frozen=True)
class Located:
    """A bundle on this machine, and what its users call it. `version` is None outside a registry."""

    path: Path
    uri: str
    version: str | None


def locate(model: str) -> Located:
    """Find (and, from a remote store, download) the bundle that `model` names.

    Raises:
        InputError: nothing has that name; the message says where it was looked for.
    """
    path = Path(model)
    if path.is_dir():
        return Located(path, model, None)
    if not model.startswith("models:/") and not _RUN.fullmatch(model):
        raise InputError(f"model {model!r} is neither a folder nor models:/name@alias, models:/name/1 or a run id")
    return _from_registry(model)


def _from_registry(model: str) -> Located:
    import mlflow  # three seconds, which a bundle's folder does not need
    from mlflow.exceptions import MlflowException

    registry = mlflow.get_registry_uri()
    try:
        client = mlflow.MlflowClient()
        run = _RUN.fullmatch(model)
        if run:
            uri = client.get_run(run[1]).data.tags.get(VERSION_TAG)
            if uri is None:
                raise InputError(f"run {run[1]} has registered no model")
            model = uri
        name, version = _name_and_version(model)
        if not version.isdigit():
            version = str(client.get_model_version_by_alias(name, version).version)
        folder = Path(mlflow.artifacts.download_artifacts(client.get_model_version_download_uri(name, version)))
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model {model!r} is not in the registry {registry}: {reason}") from None
    return Located(folder / "artifacts" / BUNDLE_ARTIFACT, f"models:/{name}/{version}", version)


def _name_and_version(uri: str) -> tuple[str, str]:
    name, alias_mark, alias = uri.removeprefix("models:/").partition("@")
    if alias_mark:
        return name, alias
    name, slash, version = name.rpartition("/")
    if not slash or not version.isdigit():
        raise InputError(f"model {uri!r} names no version: write models:/name/1 or models:/name@alias")
    return name, version
