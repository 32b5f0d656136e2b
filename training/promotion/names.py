"""What people may give as an alias, a registered model's name, and a reason."""

import re

from features.errors import InputError

_ALIAS, _RESERVED = re.compile(r"[A-Za-z0-9_-]+"), re.compile(r"[vV]\d+")
_REASON = 500  # characters that a reason may have: it is read in lists


def require_alias(alias: str) -> None:
    """InputError for what MLflow takes for no alias."""
    if not _ALIAS.fullmatch(alias) or alias == "latest" or _RESERVED.fullmatch(alias):
        raise InputError(f"alias {alias!r} must be letters, digits, - or _, and neither 'latest' nor like v1")


def require_reason(reason: str | None) -> None:
    """InputError for a reason that tells nothing, or too much."""
    if reason is None:
        return
    if not reason.strip():
        raise InputError("--force needs a reason in words: it is what people will read later")
    if len(reason) > _REASON or "\n" in reason:
        raise InputError(f"--force takes a reason in one line of at most {_REASON} characters")


def require_name(model: str, alias: str) -> str:
    """The registered model's name in `name`, `models:/name` or `models:/name@alias`.

    Raises:
        InputError: it names a version or another alias: a rollback finds the version by itself.
    """
    name, at, named = model.removeprefix("models:/").partition("@")
    if not name or "/" in name:
        raise InputError(f"--rollback finds the version by itself: name the model alone, models:/name, not {model!r}")
    if at and named != alias:
        raise InputError(f"model {model!r} and --alias {alias} name two aliases")
    return name
