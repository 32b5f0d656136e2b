"""A feature store in Redis: for each key one string, prefix + key, that holds a JSON object of field values."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from features.errors import InputError
from serving.store.base import StoreDown
from serving.store.breaker import Breaker

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError:
    raise InputError("store.kind redis needs Redis's client: install masknet[redis]") from None

_RETRY_SECONDS = 1.0
_CONNECTIONS = 64
_log = logging.getLogger(__name__)


def connect(url: str, timeout_ms: float) -> "redis.Redis":
    """A pool of connections that are made when first used; InputError where the URL cannot be one.

    A password and TLS are part of the URL: rediss://:password@host:6380/0.
    """
    seconds = timeout_ms / 1000
    try:
        # One more try at once where a pooled connection has been closed meanwhile; none after a time-out.
        retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        return redis.Redis.from_url(
            url,
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            max_connections=_CONNECTIONS,
            retry=retry,
            protocol=2,  # no greeting: a fresh connection costs one round trip, and at most one time-out
            driver_info=None,
        )
    except (ValueError, TypeError):  # whose text may hold the password
        raise InputError("store.url is no Redis URL, such as redis://host:6379/0 or rediss://:password@host") from None


class RedisStore:
    """Any number of keys in one round trip. While Redis is away, it is tried once a second by one thread alone.

    Raises:
        InputError: the URL is none.
    """

    def __init__(self, url: str, prefix: str, timeout_ms: float) -> None:
        self._client, self._prefix = connect(url, timeout_ms), prefix
        self._breaker = Breaker(_RETRY_SECONDS)

    def fetch(self, keys: Sequence[str]) -> Sequence[Mapping[str, Any] | None]:
        """See `serving.store.base.FeatureStore`. What is no JSON object counts as no row."""
        if not self._breaker.allows():
            raise StoreDown("Redis did not answer a moment ago")
        try:
            found: Any = self._client.mget([self._prefix + key for key in keys])
        except (redis.RedisError, OSError) as error:
            if self._breaker.failed():
                _log.warning("feature store: Redis does not answer (%s); values count as missing", type(error).__name__)
            raise StoreDown("Redis does not answer") from None
        if self._breaker.worked():
            _log.warning("feature store: Redis answers again")
        return [_row(data) for data in found]

    def close(self) -> None:
        """Close all connections."""
        self._client.close()


def _row(data: bytes | None) -> Mapping[str, Any] | None:
    if data is None:
        return None
    try:
        row = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None
