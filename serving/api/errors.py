"""What goes wrong with a request, and its one body.

ApiError   status, code, message and location; serving.api.routes turns it into
           {"error": {"code": …, "message": …, "location": …}}
"""

import orjson
from starlette.responses import Response

from serving.api.codes import CODES


class ApiError(Exception):
    """A request that cannot be answered, and why: a code of serving.api.codes; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        location: str | None = None,
        *,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.status, self.code, self.message, self.location = status, code, message, location
        self.retry_after, self.allow = retry_after, allow

    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer's JSON."""
        return {"error": {"code": self.code, "message": self.message, "location": self.location}}

    def headers(self) -> dict[str, str]:
        """What HTTP wants beside the body: when to come back, which method, how to log in."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.allow is not None:
            headers["Allow"] = self.allow
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def response(self) -> Response:
        """The whole answer. Text that is not Unicode, as in a broken path, is shown with replacement characters."""
        body = self.body()
        try:
            content = orjson.dumps(body)
        except orjson.JSONEncodeError:
            body["error"]["message"] = self.message.encode(errors="replace").decode()
            content = orjson.dumps(body)
        return Response(content, self.status, self.headers(), "application/json")
