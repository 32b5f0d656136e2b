"""MLflow's failures: which will pass, which are a person's mistake, and how long a request may take."""

import os
import socket
import sqlite3
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import sqlalchemy.exc
from mlflow.exceptions import InvalidUrlException, MlflowException
from sqlalchemy import make_url

from features.errors import InputError, one_line

_REFUSED_BY_DATABASE = ("authentication failed", "does not exist")  # the user, and the database or the role


def is_refusal(error: Exception) -> bool:
    """Whether MLflow, or what holds its files, will never take this record; all else may pass."""
    if isinstance(error, MlflowException):
        too_large = "failed with error code 413" in error.message
        return too_large or error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
    if isinstance(error, OSError):  # a request's, too; a store's disk may be full, broken or not mounted for a time
        return isinstance(error, FileNotFoundError)  # the record's own folder
    passing = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.TimeoutError)
    return not isinstance(error, passing)


def is_mistake(error: Exception) -> bool:
    """Whether what a person gave is wrong, rather than MLflow away: a scheme, a name, a host, a password, a driver."""
    if isinstance(error, MlflowException):
        # something else than MLflow answers at this address: with 404, or with a page
        elsewhere = error.get_http_status_code() in (401, 403, 404) or "not in a valid JSON" in error.message
        return elsewhere or isinstance(error, InvalidUrlException) or is_refusal(error) or _is_wrong_host(error)
    if isinstance(error, (PermissionError, NotADirectoryError)):  # a folder that was never right
        return True
    return is_refusal(error) or _is_wrong_host(error) or any(words in str(error) for words in _REFUSED_BY_DATABASE)


def reason(error: Exception) -> str:
    """In a few words what is wrong: what the operating system or the database said, or else MLflow."""
    told = [inner for inner in _chain(error) if isinstance(inner, (OSError, sqlite3.Error))]
    return one_line(told[-1] if told else error).partition(" (Background on this error")[0][:300]


def _is_wrong_host(error: BaseException) -> bool:
    """Whether no such host exists, or it is not the one that its certificate tells of."""
    return any(
        isinstance(inner, ssl.SSLCertVerificationError)
        or (isinstance(inner, socket.gaierror) and inner.errno == socket.EAI_NONAME)
        for inner in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it comes from, outermost first; urllib3 and requests carry theirs beside Python's chain."""
    seen: set[int] = set()
    inner: Any = error
    while isinstance(inner, BaseException) and id(inner) not in seen:
        yield inner
        seen.add(id(inner))
        beside = getattr(inner, "reason", None) or (inner.args[0] if inner.args else None)
        inner = inner.__cause__ or inner.__context__ or beside


def require_database(uri: str) -> None:
    """InputError for an SQLite address that is no database's; MLflow itself would try for minutes."""
    if not uri.startswith("sqlite:"):
        return
    path = make_url(uri).database
    if path is None or not Path(path).exists():
        return  # MLflow makes it
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, timeout=1)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.DatabaseError as error:
        if "locked" not in str(error):
            raise InputError(f"MLflow at {uri} cannot be used: {one_line(error)}") from None


class RequestLimits:
    """How long MLflow's requests may take and how often they are repeated, unless the environment says so itself.

    Quick: a request that hangs holds up the records behind it, and the sender tries again by itself. Lasting: a model's
    files take long to store.
    """

    _QUICK: ClassVar = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    _LASTING: ClassVar = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "300", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}

    def __init__(self) -> None:
        self._ours = [key for key in self._QUICK if key not in os.environ]
        self._set(self._QUICK)

    def _set(self, values: dict[str, str]) -> None:
        os.environ.update({key: values[key] for key in self._ours})

    @contextmanager
    def lasting(self) -> Iterator[None]:
        """For the length of a block requests may take long."""
        self._set(self._LASTING)
        try:
            yield
        finally:
            self._set(self._QUICK)

    def unset(self) -> None:
        """As it was before."""
        for key in self._ours:
            os.environ.pop(key, None)
