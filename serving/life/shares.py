"""Which users a challenger answers."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from features.errors import InputError, listed
from features.fields import CategoricalField
from features.schema import Schema

_SALT = b"masknet share"  # apart from every other hash of ids: buckets of a model, or another experiment's split


def takes_part(context: Mapping[str, Any], key: str, share: float) -> bool:
    """Whether this user is among the share, in every process and at all times alike; without a value never.

    The first 64 bits of BLAKE2b of the value as text, over 2^64, are below the share: a larger share keeps the users of
    a smaller one.
    """
    value = context.get(key)
    if value is None or value == "":
        return False
    digest = blake2b(str(value).encode(errors="replace"), digest_size=8, person=_SALT).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def require_key(schema: Schema, key: str) -> None:
    """InputError unless clients send this field and its values are ids."""
    ids = [field.name for field in schema.served_fields if isinstance(field, CategoricalField)]
    if key not in ids:
        raise InputError(f"challenger.key: {key!r} is no categorical field that clients send; those are {listed(ids)}")
