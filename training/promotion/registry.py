"""Aliases in the registry, who held them in turn, and the tags that say since when and why.

MLflow keeps no history of an alias, and drops it silently with a deleted version. So a tag of the registered model,
masknet.ALIAS.history, has its holders as a stack ("1 3 4", the present one last); promotion pushes, rollback pops.
Tags of a version say the rest: masknet.ALIAS.since, .replaced, .reason, .failed, .metrics of what holds the alias or
has held it, and .until, .replaced_by, .ended of what was replaced.

The alias is the truth, and it moves after all tags are written: what holds it has its whole record. A kill before that
leaves tags about a change that did not happen; the same command writes them again, and `stack_of` reads the history
by what the alias says. Of a rollback the tag masknet.ALIAS.rollback ("3 1": from 3 to 1) stands until it has shortened
the history: killed after the alias has moved, the same command ends it, and does not go back once more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

NONE = "none"  # the tag of what replaced nothing
_MOST = 200  # holders that the history keeps
_ABSENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # a missing alias, a missing model or version


def stack_of(history: list[str], holder: str | None) -> list[str]:
    """The holders in turn, the present one last, whatever an interrupted change or a hand has left of the history.

    Who holds the alias is on top: what is above it never held it, or has given it back; a holder that the history does
    not know was given the alias by hand. Without a holder (its version was deleted) the history stands as it is.
    """
    if holder is None:
        return history
    if holder not in history:
        return [*history, holder]
    last = len(history) - history[::-1].index(holder)
    return history[:last]


@dataclass(frozen=True)
class Change:
    """An alias goes from one version to another; `tags` are further ones of the new holder, by their short names."""

    new: str
    old: str | None
    reason: str
    tags: Mapping[str, str]


class AliasRecord:
    """An alias of a registered model."""

    def __init__(self, name: str, alias: str) -> None:
        self.name, self.alias = name, alias
        self._client = mlflow.MlflowClient()

    def uri(self, version: str) -> str:
        return f"models:/{self.name}/{version}"

    def holder(self) -> str | None:
        """The version that holds the alias, or None."""
        found = self._or_none(lambda: self._client.get_model_version_by_alias(self.name, self.alias))
        return None if found is None else str(found.version)

    def exists(self, version: str) -> bool:
        """Whether the version is still there."""
        return self._or_none(lambda: self._client.get_model_version(self.name, version)) is not None

    def stack(self) -> list[str]:
        """The holders in turn, as `stack_of`."""
        holder = self.holder()
        history = self._model_tags().get(self._tag("history"), "").split()
        if not history and holder is not None:  # from before there was a history
            replaced = self._client.get_model_version(self.name, holder).tags.get(self._tag("replaced"), NONE)
            history = [] if replaced == NONE else [replaced]
        return stack_of(history, holder)

    def promote(self, change: Change) -> None:
        """Push the new holder: history and tags first, the alias last."""
        self._write_history([*self.stack(), change.new])
        self._write_tags(change)
        self._client.set_registered_model_alias(self.name, self.alias, change.new)

    def roll_back(self, change: Change, below: list[str], last: str) -> None:
        """Give the alias from `last` to the top of `below`."""
        self._write_tags(change)
        self._tag_model("rollback", f"{last} {change.new}")
        self._client.set_registered_model_alias(self.name, self.alias, change.new)
        self._write_history(below)

    def unfinished(self) -> tuple[str, str] | None:
        """From which version a rollback that was killed has moved the alias, and why; None if none was."""
        last, _, target = self._model_tags().get(self._tag("rollback"), "").partition(" ")
        if not target or target != self.holder():
            return None
        tags = self._client.get_model_version(self.name, target).tags
        return last, tags.get(self._tag("reason"), "")

    def finish_rollback(self) -> None:
        """What a kill has left to do: shorten the history."""
        self._write_history(self.stack())

    def attach(self, version: str, record: dict[str, Any], file: str) -> None:
        """Store a record as a file of the run that made the version; not where that run is gone."""
        run_id = self._client.get_model_version(self.name, version).run_id
        if run_id:
            self._or_none(lambda: self._client.log_dict(run_id, record, file))

    def _write_history(self, stack: list[str]) -> None:
        """And with it goes the mark of a rollback: whatever was interrupted is in the past."""
        self._tag_model("history", " ".join(stack[-_MOST:]))
        if self._tag("rollback") in self._model_tags():
            self._client.delete_registered_model_tag(self.name, self._tag("rollback"))

    def _model_tags(self) -> dict[str, str]:
        model = self._or_none(lambda: self._client.get_registered_model(self.name))
        return {} if model is None else dict(model.tags)

    def _tag_model(self, key: str, value: str) -> None:
        self._client.set_registered_model_tag(self.name, self._tag(key), value)

    def _write_tags(self, change: Change) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        if change.old is not None and self.exists(change.old):
            self._tag_version(change.old, {"until": now, "replaced_by": change.new, "ended": change.reason})
        replaced = {"since": now, "replaced": change.old or NONE, "reason": change.reason}
        self._tag_version(change.new, {**replaced, **change.tags})
        self._untag_version(change.new, {"until", "replaced_by", "ended", "failed", "metrics"} - change.tags.keys())

    def _tag_version(self, version: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self._client.set_model_version_tag(self.name, version, self._tag(key), value)

    def _untag_version(self, version: str, keys: set[str]) -> None:
        """What an earlier time as holder has left."""
        known = self._client.get_model_version(self.name, version).tags
        for key in keys:
            if self._tag(key) in known:
                self._client.delete_model_version_tag(self.name, version, self._tag(key))

    def _tag(self, key: str) -> str:
        return f"masknet.{self.alias}.{key}"

    @staticmethod
    def _or_none(ask: Any) -> Any:
        try:
            return ask()
        except MlflowException as error:
            if error.error_code in _ABSENT:
                return None
            raise
