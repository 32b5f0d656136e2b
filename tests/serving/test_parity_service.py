"""Train/serve parity over HTTP: 100,000 rows with every kind of field, in JSON and Arrow, ranked and predicted.

Legend: N rows.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import numpy as np
import pytest

from serving.api import arrow, requests
from serving.bundle import Bundle, load_bundle
from serving.client_bodies import Call, Ranking, Scores, predict_call, rank_call
from serving.ranking.asked import Encoding
from tests.serving.every_kind import SCHEMA, write_every_kind
from tests.serving.running import Service
from tests.serving.test_parity import require_equal

pytestmark = pytest.mark.long

REQUESTS, REQUEST = 200, 500
ROWS = REQUESTS * REQUEST
CONTEXT = ["user", "age"]
Columns = dict[str, list[Any]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_every_kind(tmp_path_factory.mktemp("every") / "bundle"))


def some(random: np.random.Generator, values: list[Any], count: int) -> list[Any]:
    return [values[place] for place in random.integers(len(values), size=count)]


def lists(random: np.random.Generator, values: list[str], longest: int, count: int) -> list[list[str] | None]:
    """Lists of any length, empty ones and gaps too."""
    lengths = random.integers(-1, longest + 1, size=count).tolist()
    drawn = iter(some(random, values, int(np.maximum(lengths, 0).sum())))
    return [None if length < 0 else [next(drawn) for _ in range(length)] for length in lengths]


def numbers(random: np.random.Generator, count: int) -> list[float | None]:
    """Of every size and both signs, and gaps."""
    drawn = random.normal(size=count) * 10.0 ** random.uniform(-3, 6, size=count)
    return [None if gap else value for gap, value in zip(random.random(count) < 0.05, drawn.tolist(), strict=True)]


def as_in_files(random: np.random.Generator, count: int) -> Columns:
    """Rows as training reads them: ids are text."""
    known = ["ann", "bob", "cat"]
    integers = [str(value) for value in range(300)]
    return {
        "price": numbers(random, count),
        "liked": lists(random, [*known, "zoë", "7"], 6, count),
        "item": some(random, [*integers, *(f"film {value}" for value in range(500)), None], count),
        "slot": some(random, [*integers[:10], None], count),
        "codes": lists(random, integers[:8], 5, count),
        "genres": lists(random, ["drama", "war", "opera", "sci fi"], 3, count),
        "clicks": some(random, [*range(-5, 2000), None], count),
        "income": numbers(random, count),
        "share": numbers(random, count),
    }


def repeated(random: np.random.Generator, values: list[Any]) -> list[Any]:
    """One for each request."""
    return [value for value in some(random, values, REQUESTS) for _ in range(REQUEST)]


def whole(text: Any) -> Any:
    return int(text) if isinstance(text, str) and text.isdecimal() else text


def as_sent(columns: Columns, number: int) -> Columns:
    """The same values as clients write them: ids as numbers, lists as text, in each request another way."""
    sent = dict(columns)
    if number % 3:
        sent["slot"] = [whole(value) for value in columns["slot"]]
        sent["codes"] = [codes and [int(code) for code in codes] for codes in columns["codes"]]
    if number % 5 < 2:
        sent["genres"] = ["|".join(genres) if genres else None for genres in columns["genres"]]
    return sent


def calls(columns: Columns, number: int) -> tuple[Call, Callable[[bytes], dict[str, Any]], bool]:
    """A request, how the service parses it into context, candidates and time, and whether it ranks."""
    part = as_sent(
        {name: values[number * REQUEST : (number + 1) * REQUEST] for name, values in columns.items()}, number
    )
    form = ("json", "arrow")[number % 2]
    parser = requests if form == "json" else arrow
    schema, seconds = SCHEMA, part["seen"][0]
    if number % 4 < 2:
        if form == "json":  # numbers among text, which a column of Arrow cannot have
            part["item"] = [whole(value) for value in part["item"]]
        once = {name: part.pop(name)[0] for name in CONTEXT}
        del part["seen"]
        time = seconds if number % 8 < 4 else datetime.fromtimestamp(seconds, UTC).isoformat()

        def ranked(body: bytes) -> dict[str, Any]:
            asked = parser.parse_rank(body, schema)
            return {"context": asked.context, "candidates": asked.candidates, "time": asked.time}

        return rank_call(form, once, part, REQUEST, time, None), ranked, True
    return predict_call(form, part, None), lambda body: {"rows": parser.parse_predict(body, schema)}, False


def test_encodings_are_equal_and_scores_within_1e_6(every_service: Service, bundle: Bundle) -> None:
    random = np.random.default_rng(5)
    columns = as_in_files(random, ROWS)
    columns["user"] = repeated(random, ["ann", "bob", "cat", "dan", "8", None])
    columns["age"] = repeated(random, [20, 40, 19.999, None, -1.0, 33])
    columns["seen"] = repeated(random, list(range(1_500_000_000, 1_800_000_000, 987_654)))
    files = columns | {"seen": [datetime.fromtimestamp(seconds, UTC) for seconds in columns["seen"]]}
    encoded = bundle.pipeline.encode(files)
    expected_N, served = bundle.scorer.score_encoded(encoded), bundle.pipeline.as_served(encoded)
    assert len(np.unique(expected_N)) > ROWS / 2
    encoding = Encoding(bundle.schema, bundle.pipeline, {})
    worst = {}
    with httpx.Client(base_url=every_service.uri, timeout=30) as client:
        for number in range(REQUESTS):
            call, parsed, ranks = calls(columns, number)
            mine = slice(number * REQUEST, (number + 1) * REQUEST)
            asked = encoding.request(**parsed(call.body)) if ranks else encoding.rows(**parsed(call.body))
            require_equal(asked and asked.encoded, served.slice(mine.start, REQUEST))
            found_N = scores_of(client.post(call.path, content=call.body, headers=call.headers), ranks)
            kind = call.path, call.headers["content-type"]
            worst[kind] = max(worst.get(kind, 0.0), float(np.abs(found_N - expected_N[mine]).max()))
    assert len(worst) == 4
    assert max(worst.values()) <= 1e-6, worst


def scores_of(answer: httpx.Response, ranks: bool) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    if not ranks:
        return np.array(Scores.of(answer).scores)
    items = Ranking.of(answer).items
    scores = [item.score for item in items]
    assert scores == sorted(scores, reverse=True)
    found_N = np.full(REQUEST, np.nan)
    found_N[[item.index for item in items]] = scores
    return found_N
