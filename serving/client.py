"""A client of the service, for Python: `Client` and, for asyncio, `AsyncClient`; JSON, or Arrow for heavy callers.

    with Client("http://localhost:3000") as client:
        ranking = client.rank({"user_id": "13"}, {"item_id": ["50", "181"]}, top_k=1)

Candidates and rows are columns, rows, a frame or an Arrow table; None and NaN are missing values. Legend: N rows.
"""

import asyncio
import time
from collections.abc import Mapping
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, get_args

import httpx

from serving.client_bodies import Call, Model, Ranked, Ranking, RankingError, Scores, predict_call, rank_call

if TYPE_CHECKING:  # pandas and polars take a second, which a client may not need
    from features.columns import Rows

__all__ = ["AsyncClient", "Client", "Model", "Ranked", "Ranking", "RankingError", "Scores"]
Form = Literal["json", "arrow"]
_BUSY = (429, 503)
_LONGEST = 10.0  # seconds between two tries, whatever the service asks for


class Options(TypedDict, total=False):
    """What else a client can be told: see `_Base`."""

    timeout: float
    form: Form
    retries: int


class _Base:
    """What both clients know."""

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 5.0, form: Form = "json", retries: int = 0
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: of the service, as in http://localhost:3000.
            token: the bearer token, where the service wants one.
            timeout: seconds for connecting, and for each wait for bytes.
            form: of requests and answers.
            retries: further tries where the service is busy (429, 503), after the time that it asks for.

        Raises:
            ValueError: there is no such form.
        """
        if form not in get_args(Form):
            raise ValueError(f"form is one of {', '.join(get_args(Form))}, not {form!r}")
        self._form, self._retries = form, retries
        self._options: dict[str, Any] = {"base_url": url, "timeout": timeout}
        if token is not None:
            self._options["headers"] = {"authorization": f"Bearer {token}"}

    def _wait(self, response: httpx.Response, tries: int) -> float | None:
        """Seconds before the next try; None where there is none."""
        if response.status_code not in _BUSY or tries >= self._retries:
            return None
        asked = response.headers.get("retry-after", "")
        return min(_LONGEST, float(asked) if asked.isdecimal() else 1.0)


class Client(_Base):
    """Calls wait for their answers; safe to share between threads. To be closed, or used in a with statement.

    Every call raises RankingError where the service refuses, httpx.HTTPError where it cannot be reached, and ValueError
    for infinity, which no field takes.
    """

    def __init__(self, url: str, token: str | None = None, **options: Unpack[Options]) -> None:
        super().__init__(url, token, **options)
        self._http = httpx.Client(**self._options)

    def rank(
        self,
        context: Mapping[str, Any],
        candidates: "Rows",
        *,
        top_k: int = 10,
        time: datetime | float | str | None = None,
        request_id: str | None = None,
    ) -> Ranking:
        """The best `top_k` candidates, best first; `time` feeds date fields and is now by default."""
        call = rank_call(self._form, context, candidates, top_k, time, request_id)
        return Ranking.of(self._send(call))

    def predict(self, rows: "Rows", *, request_id: str | None = None) -> Scores:
        """Scores [N] of rows that have every field."""
        return Scores.of(self._send(predict_call(self._form, rows, request_id)))

    def model(self) -> dict[str, Any]:
        """The served model: version, metrics, schema, and more."""
        about: dict[str, Any] = self._send(Call("GET", "/model", b"", {})).json()
        return about

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call) -> httpx.Response:
        tries = 0
        while True:
            response = self._http.request(call.method, call.path, content=call.body, headers=call.headers)
            wait = self._wait(response, tries)
            if wait is None:
                return RankingError.unless_done(response)
            time.sleep(wait)
            tries += 1


class AsyncClient(_Base):
    """As Client, for asyncio; belongs to one event loop."""

    def __init__(self, url: str, token: str | None = None, **options: Unpack[Options]) -> None:
        super().__init__(url, token, **options)
        self._http = httpx.AsyncClient(**self._options)

    async def rank(
        self,
        context: Mapping[str, Any],
        candidates: "Rows",
        *,
        top_k: int = 10,
        time: datetime | float | str | None = None,
        request_id: str | None = None,
    ) -> Ranking:
        """The best `top_k` candidates, best first; `time` feeds date fields and is now by default."""
        call = rank_call(self._form, context, candidates, top_k, time, request_id)
        return Ranking.of(await self._send(call))

    async def predict(self, rows: "Rows", *, request_id: str | None = None) -> Scores:
        """Scores [N] of rows that have every field."""
        return Scores.of(await self._send(predict_call(self._form, rows, request_id)))

    async def model(self) -> dict[str, Any]:
        """The served model: version, metrics, schema, and more."""
        about: dict[str, Any] = (await self._send(Call("GET", "/model", b"", {}))).json()
        return about

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _send(self, call: Call) -> httpx.Response:
        tries = 0
        while True:
            response = await self._http.request(call.method, call.path, content=call.body, headers=call.headers)
            wait = self._wait(response, tries)
            if wait is None:
                return RankingError.unless_done(response)
            await asyncio.sleep(wait)
            tries += 1
