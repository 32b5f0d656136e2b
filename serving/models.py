"""MODEL on every command line: a bundle's folder, an MLflow model URI, or a run id."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from features.errors import InputError, one_line, without_password

BUNDLE_ARTIFACT = "bundle"
VERSION_TAG = "masknet.model_uri"  # on a run: the registered version that it made
SCHEMA_TAG = "masknet.schema"  # on a version: "compatible" where clients may be asked for other fields than before
_RUN = re.compile(r"(?:runs:/)?([0-9a-f]{32})(?:/.*)?")
_ABSENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # MLflow's codes of what it does not have
# Of a request to an MLflow server, where the environment does not say: who asks can wait and try again.
_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # whatever it says: nothing here is read by pickle


class NotRegistered(InputError):
    """The registry has no such version. What it says, and where it is, are for who asked, and not for clients."""


class NotNow(RuntimeError):
    """A version cannot be had now, for a reason that may pass: it is tried again later. `details` are for the log."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details or message


class RegistryAway(NotNow):
    """MLflow does not answer now."""


@dataclass(frozen=True)
class Located:
    """A bundle on this machine, and what its users call it. `version` is None outside a registry."""

    path: Path
    uri: str
    version: str | None


@dataclass(frozen=True)
class Registered:
    """A version in the registry. What it was made of tells it from one of the same number in a store made anew."""

    name: str
    version: str
    source: str  # where its files are
    created: int  # milliseconds since 1970
    compatible: bool = False  # tagged so: see SCHEMA_TAG

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def identity(self) -> str:
        """Twelve hexadecimal digits that no other version has."""
        made_of = f"{self.name}\n{self.version}\n{self.source}\n{self.created}"
        return sha256(made_of.encode()).hexdigest()[:12]


def locate(model: str) -> Located:
    """Find (and, from a remote store, download) the bundle that `model` names.

    Raises:
        InputError: nothing has that name; the message says where it was looked for.
    """
    if not is_registered(model):
        return Located(Path(model), model, None)
    try:
        found = find_registered(model)
        return Located(download(found, None), found.uri, found.version)
    except NotNow as error:
        raise InputError(f"model {model!r} is not in the registry {registry_uri()}: {error.details}") from None


def is_registered(model: str) -> bool:
    """Whether MODEL is the registry's and not a folder; InputError where it is neither."""
    if Path(model).is_dir():
        return False
    if not model.startswith("models:/") and not _RUN.fullmatch(model):
        raise InputError(f"model {model!r} is neither a folder nor models:/name@alias, models:/name/1 or a run id")
    return True


def is_alias(model: str) -> bool:
    """Whether a registered MODEL may mean another version tomorrow."""
    return "@" in model


def registry_uri() -> str:
    """Where MLflow's registry is, without a password."""
    import mlflow

    return without_password(str(mlflow.get_registry_uri()))


def find_registered(model: str) -> Registered:
    """The version that a model URI or run id means now.

    Raises:
        InputError: the URI is none; NotRegistered: the registry has none of this name.
        RegistryAway: it does not answer.
    """
    with _answers(model):
        import mlflow  # three seconds, which a bundle's folder does not need

        client = mlflow.MlflowClient()
        run = _RUN.fullmatch(model)
        if run:
            uri = client.get_run(run[1]).data.tags.get(VERSION_TAG)
            if uri is None:
                raise InputError(f"run {run[1]} has registered no model")
            model = uri
        name, version = _name_and_version(model)
        by = client.get_model_version if version.isdigit() else client.get_model_version_by_alias
        found = by(name, version)
        compatible = found.tags.get(SCHEMA_TAG) == "compatible"
        return Registered(name, str(found.version), str(found.source), int(found.creation_timestamp), compatible)


def download(found: Registered, folder: Path | None) -> Path:
    """Copy a version's files into a folder, or find them where they are on this machine; the path of its bundle.

    Raises:
        NotRegistered: the registry does not have it any more.
        RegistryAway: it does not answer.
        NotNow: what holds the files does not answer, or the disk here is full.
    """
    with _answers(found.uri):
        import mlflow

        uri = mlflow.MlflowClient().get_model_version_download_uri(found.name, found.version)
    target = None if folder is None else str(folder)
    try:
        with _answers(found.uri):
            return Path(mlflow.artifacts.download_artifacts(uri, dst_path=target)) / "artifacts" / BUNDLE_ARTIFACT
    except RegistryAway as error:  # which MLflow does not tell from a full disk
        raise NotNow(f"the files of {found.uri} cannot be copied", str(error)) from None


@contextmanager
def _answers(model: str) -> Iterator[None]:
    """MLflow's errors told as what they mean, and its requests ended in time."""
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    for name, limit in _LIMITS.items():
        os.environ.setdefault(name, limit)
    try:
        yield
    except MlflowException as error:
        if error.error_code in _ABSENT:
            reason = str(error).splitlines()[0]
            raise NotRegistered(f"model {model!r} is not in the registry {registry_uri()}: {reason}") from None
        raise RegistryAway(_cause(one_line(error))) from None
    except (OSError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise RegistryAway(_cause(one_line(error))) from None


def _cause(reason: str) -> str:
    """What the system has said, or the end of what requests and SQLAlchemy tell at length."""
    system = re.search(r"\[Errno \d+\].*", reason)
    if system:
        return system[0][:200]
    told = reason.partition("(Caused by ")[2].removesuffix(")") or reason
    return told.partition(" (Background on this error")[0][-200:]


def _name_and_version(uri: str) -> tuple[str, str]:
    name, alias_mark, alias = uri.removeprefix("models:/").partition("@")
    if alias_mark:
        return name, alias
    name, slash, version = name.rpartition("/")
    if not slash or not version.isdigit():
        raise InputError(f"model {uri!r} names no version: write models:/name/1 or models:/name@alias")
    return name, version
