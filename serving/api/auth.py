"""Bearer tokens: who may ask, where MASKNET_TOKENS or MASKNET_TOKENS_FILE says so."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from features.errors import InputError

TOKENS_VARIABLE, FILE_VARIABLE, METRICS_VARIABLE = "MASKNET_TOKENS", "MASKNET_TOKENS_FILE", "MASKNET_PROTECT_METRICS"
_HEALTH = frozenset({"/livez", "/readyz", "/healthz"})
_METRICS = "/metrics"


@dataclass(frozen=True)
class Tokens:
    """SHA-256 of every token, and the paths that need none; without tokens everything is open."""

    digests: tuple[bytes, ...]
    open_paths: frozenset[str]

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Tokens":
        """The tokens in the environment, parted by commas or white space, and those in a file, in the same form.

        Raises:
            InputError: the file cannot be read, or a variable is set and holds no token: nothing is opened by mistake.
        """
        tokens: list[str] = []
        texts = {TOKENS_VARIABLE: environment.get(TOKENS_VARIABLE)}
        file = environment.get(FILE_VARIABLE)
        if file is not None:
            texts[FILE_VARIABLE] = _text(file) if file else ""
        for variable, text in texts.items():
            found = (text or "").replace(",", " ").split()
            if text is not None and not found:
                raise InputError(f"{variable} is set, and holds no token")
            tokens += found
        protected = environment.get(METRICS_VARIABLE, "") not in ("", "0")
        open_paths = _HEALTH if protected else _HEALTH | {_METRICS}
        return cls(tuple(_digest(token.encode()) for token in tokens), open_paths)

    @property
    def required(self) -> bool:
        """Whether requests need a token at all."""
        return bool(self.digests)

    def admit(self, path: str, authorization: bytes) -> bool:
        """Whether a request may go on; takes the same time whatever part of a token is right."""
        if not self.required or path in self.open_paths:
            return True
        scheme, _, token = authorization.partition(b" ")
        given = _digest(token.strip())
        right = False
        for digest in self.digests:
            right |= hmac.compare_digest(given, digest)
        return right and scheme.lower() == b"bearer"


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{FILE_VARIABLE}: {file} cannot be read: {reason}") from None
