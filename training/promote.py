"""`masknet promote`: move an alias in the registry, and write down who replaced whom."""

import re
from datetime import UTC, datetime
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from features.errors import InputError
from serving.bundle import load_bundle
from serving.models import locate

CHAMPION = "champion"
_ALIAS, _RESERVED = re.compile(r"[A-Za-z0-9_-]+"), re.compile(r"[vV]\d+")


def promote(model: str, alias: str = CHAMPION) -> dict[str, Any]:
    """Give `alias` to a registered version after verifying its bundle; tags on both versions record the change.

    Raises:
        InputError: the model is not in the registry, or its bundle is damaged.
    """
    if not _ALIAS.fullmatch(alias) or alias == "latest" or _RESERVED.fullmatch(alias):
        raise InputError(f"alias {alias!r} must be letters, digits, - or _, and neither 'latest' nor like v1")
    located = locate(model)
    if located.version is None:
        raise InputError(f"model {model!r} is a folder; only a registered model, models:/name/version, can be promoted")
    load_bundle(located.path)
    name = located.uri.split("/")[1]
    client = mlflow.MlflowClient()
    replaced = _holder(client, name, alias)
    if replaced == located.version:
        return _result(located.uri, alias, None, f"was {alias} already")
    client.set_registered_model_alias(name, alias, located.version)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    tags = client.get_model_version(name, located.version).tags
    for ended in (f"masknet.{alias}.until", f"masknet.{alias}.replaced_by"):
        if ended in tags:  # it held the alias before, and holds it again
            client.delete_model_version_tag(name, located.version, ended)
    client.set_model_version_tag(name, located.version, f"masknet.{alias}.since", now)
    client.set_model_version_tag(name, located.version, f"masknet.{alias}.replaced", replaced or "none")
    if replaced:
        client.set_model_version_tag(name, replaced, f"masknet.{alias}.until", now)
        client.set_model_version_tag(name, replaced, f"masknet.{alias}.replaced_by", located.version)
    return _result(located.uri, alias, f"models:/{name}/{replaced}" if replaced else None, "promoted by hand")


def _result(uri: str, alias: str, replaced: str | None, reason: str) -> dict[str, Any]:
    return {"model_uri": uri, "alias": alias, "replaced": replaced, "reason": reason}


def _holder(client: mlflow.MlflowClient, name: str, alias: str) -> str | None:
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None  # nobody holds the alias
        raise
