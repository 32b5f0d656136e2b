"""What goes wrong with a request, and its one body.

ApiError   status, code, message and location; serving.api.routes turns it into
           {"error": {"code": …, "message": …, "location": …}}
"""


class ApiError(Exception):
    """A request that cannot be answered, and why."""

    def __init__(self, status: int, code: str, message: str, location: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.location = status, code, message, location

    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer's JSON."""
        return {"error": {"code": self.code, "message": self.message, "location": self.location}}
