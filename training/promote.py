"""`masknet promote`: move an alias in the registry, and write down who replaced whom."""

from datetime import UTC, datetime
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from features.errors import InputError
from serving.bundle import load_bundle
from serving.models import locate

CHAMPION = "champion"


def promote(model: str, alias: str = CHAMPION) -> dict[str, Any]:
    """Give `alias` to a registered version after verifying its bundle; tags on both versions record the change.

    Raises:
        InputError: the model is not in the registry, or its bundle is damaged.
    """
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
    except MlflowException:
        return None  # nobody has held the alias yet
