"""Every way in which a request can be refused: the codes of errors, the one list of them.

ApiError takes no other; the OpenAPI description and serving/README.md show the list. `python -m serving.api.codes`
prints the latter's table.
"""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Refusal(NamedTuple):
    """A code's status, what it means, and an error that has it."""

    status: int
    meaning: str
    message: str
    location: str | None = None


_LIST = {
    "not_json": Refusal(400, "the body is not JSON (NaN and Infinity are not)", "the body is not JSON: …"),
    "not_arrow": Refusal(400, "the body is no Arrow IPC stream", "the body is no Arrow IPC stream: …"),
    "bad_request": Refusal(400, "the server cannot read the request", "the request cannot be answered"),
    "unauthorized": Refusal(401, "no valid token", "send a valid token in the header Authorization: Bearer …"),
    "not_found": Refusal(404, "no such route", "there is no /ranks; see /docs.json"),
    "method_not_allowed": Refusal(405, "the route takes another method (see the header Allow)", "/rank takes POST"),
    "body_too_slow": Refusal(408, "the body came too slowly", "the body did not arrive within 5 s"),
    "too_many_rows": Refusal(
        413, "more than `limits.rows`", "5001 candidates; at most 5000 are taken at once", "candidates"
    ),
    "body_too_large": Refusal(413, "more than `limits.body_bytes`", "the body is above 16777216 bytes"),
    "content_type": Refusal(415, "the body is neither JSON nor Arrow", "the body must be application/json or …"),
    "content_encoding": Refusal(415, "the body is compressed", "the body must not be compressed"),
    "compressed": Refusal(415, "Arrow's buffers are compressed", "the stream's buffers are compressed; …"),
    "delta": Refusal(415, "Arrow's dictionaries grow from batch to batch", "the stream's dictionaries grow …"),
    "missing_key": Refusal(422, "a key of the body is missing", "the key 'candidates' is missing", "candidates"),
    "unknown_key": Refusal(422, "the body has a key that there is not", "unknown key 'limit'; there are …", "limit"),
    "missing_field": Refusal(
        422, "a field is not there", "field 'age' is missing; send null for no value", "candidates.age"
    ),
    "unknown_field": Refusal(
        422, "a field that clients do not send", "unknown field 'aeg'; there are …", "context.aeg"
    ),
    "field_twice": Refusal(
        422, "a field is in the context and per candidate", "field 'age' is also in the context", "candidates.age"
    ),
    "no_rows": Refusal(422, "there is nothing to score", "candidates is empty", "candidates"),
    "ragged_columns": Refusal(
        422, "columns differ in length", "column 'age' has 2 values where others have 3", "candidates.age"
    ),
    "wrong_type": Refusal(422, "a value is of another type", "expected a finite number, not str", "candidates.age[3]"),
    "bad_value": Refusal(
        422, "a value cannot be what its field says", "'x' is no whole number of 0 or more", "candidates[3].item"
    ),
    "queue_full": Refusal(429, "too many requests wait, or are on their way", "too many requests wait already"),
    "internal": Refusal(500, "the server failed; its log says why", "the server failed on this request"),
    "not_ready": Refusal(503, "no model is ready, or the service is about to end", "no model is ready"),
    "deadline": Refusal(
        503, "the deadline would pass before the request's turn", "the request's turn does not come within 1000 ms"
    ),
    "too_slow": Refusal(503, "computing takes too long", "the request takes too long to compute"),
}
CODES: Mapping[str, Refusal] = MappingProxyType(_LIST)


def codes_reference() -> str:
    """A Markdown table with a row per code."""
    rows = [f"| {status} | `{code}` | {meaning} |" for code, (status, meaning, _, _) in CODES.items()]
    return "\n".join(["| status | code | when |", "|---|---|---|", *rows])


if __name__ == "__main__":
    sys.stdout.write(codes_reference() + "\n")
