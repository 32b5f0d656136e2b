"""Challenger and shadow: who is answered by what, always alike, and nobody waits for the shadow.

Legend: N candidates.
"""

import queue
import threading
from typing import Any

import numpy as np
import pytest

from features.errors import InputError
from serving.api.requests import RankRequest
from serving.life.fleet import Fleet
from serving.life.shadow import WAITING, Shadow
from serving.life.shares import require_key, takes_part
from serving.ranking.engine import RankingEngine
from serving.settings import ServeSettings
from serving.trace import Trace
from tests.serving.conftest import SCHEMA, Make
from tests.serving.test_life_following import wider

USERS = [f"user {number}" for number in range(20_000)]


def part(share: float) -> set[str]:
    return {user for user in USERS if takes_part({"user": user}, "user", share)}


def test_the_share_is_of_users_and_grows_by_adding_some() -> None:
    tenth, half = part(0.1), part(0.5)
    assert abs(len(tenth) / len(USERS) - 0.1) < 0.01  # five standard deviations
    assert abs(len(half) / len(USERS) - 0.5) < 0.02
    assert tenth < half
    assert part(1.0) == set(USERS)


def test_the_split_is_the_same_in_every_version_of_this_program() -> None:
    """Another hash would give users another model after an update."""
    assert [number for number in range(30) if takes_part({"user": str(number)}, "user", 0.2)] == [17, 21, 24, 27]


def test_a_number_is_the_text_of_it_and_no_value_takes_no_part() -> None:
    assert {n for n in range(1000) if takes_part({"user": n}, "user", 0.3)} == {
        n for n in range(1000) if takes_part({"user": str(n)}, "user", 0.3)
    }
    for context in ({}, {"user": None}, {"user": ""}, {"shop": "a"}):
        assert not takes_part(context, "user", 1.0)
    assert takes_part({"user": "\ud800"}, "user", 1.0)


def test_the_key_is_a_field_of_ids_that_clients_send() -> None:
    require_key(SCHEMA, "user")
    with pytest.raises(InputError, match="'users' is no categorical field that clients send; those are user, item"):
        require_key(SCHEMA, "users")


class Heard:
    """Metrics and log in one."""

    def __init__(self) -> None:
        self.scored: queue.Queue[Trace] = queue.Queue()
        self.offered, self.dropped_shadow = list[Trace](), 0
        self.models, self.swaps = list[tuple[str, str, str]](), list[str]()

    def answered(self, trace: Trace) -> None:
        self.scored.put(trace)

    def offer(self, trace: Trace) -> None:
        self.offered.append(trace)

    def dropped(self, what: str, count: int = 1) -> None:
        assert what == "shadow"
        self.dropped_shadow += count

    def model(self, name: str, version: str, role: str) -> None:
        self.models.append((name, version, role))

    def swap(self, outcome: str) -> None:
        self.swaps.append(outcome)


def settings(make: Make, **changed: Any) -> ServeSettings:
    return ServeSettings.model_validate({"model": str(make("champion", 1).path), "threads": 1} | changed)


def test_users_of_the_share_are_answered_by_the_challenger(make: Make) -> None:
    challenger = make("challenger", 2).path
    heard = Heard()
    fleet = Fleet(settings(make, challenger={"model": str(challenger), "share": 0.3, "key": "user"}), 1, heard, heard)
    assert not fleet.ready
    fleet.start()
    assert fleet.ready
    roles = {user: fleet.choose({"user": user}) for user in USERS[:500]}
    theirs = {user for user, (_, role) in roles.items() if role == "challenger"}
    assert theirs == part(0.3) & set(USERS[:500])
    versions = {role: engine.bundle.path.name for engine, role in roles.values()}
    assert versions == {"champion": "champion", "challenger": "challenger"}
    assert fleet.choose({})[1] == "champion"
    assert [role for _, _, role in heard.models] == ["champion", "challenger"]
    assert fleet.about()["challenger"]["source"] == "folder"
    assert fleet.about()["source"] == "folder"
    fleet.stop()
    assert not fleet.ready


def test_the_shadow_scores_what_was_answered(make: Make, rows: Any) -> None:
    heard = Heard()
    shadow = make("shadow", 2)
    fleet = Fleet(settings(make, shadow={"model": str(shadow.path)}), 1, heard, heard)
    fleet.start()
    request = RankRequest({"user": "ann"}, {"item": [str(item) for item in rows["item"]]}, 3, None)
    trace = Trace("/rank", "request 7", context=request.context, columns=request.candidates)
    assert fleet.choose({"user": "ann"})[1] == "champion"
    fleet.after(request, trace)
    scored = heard.scored.get(timeout=20)
    fleet.stop()
    assert (scored.role, scored.request_id, scored.rows) == ("shadow", "request 7", len(rows["item"]))
    assert (scored.name, scored.version) == ("small", shadow.digest[:12])
    assert scored.score_N is not None
    np.testing.assert_allclose(scored.score_N, shadow.scorer.score(rows), rtol=0, atol=1e-6)
    assert heard.offered == [scored]
    assert scored.context == {"user": "ann"}
    assert scored.columns == request.candidates
    assert trace.score_N is None, "the answer's own trace is left alone"


def test_a_worker_starts_anew_after_the_champion_has_come_to_ask_for_other_fields(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    heard, old = Heard(), str(make("old", 2).path)
    champion = wider(make)
    fleet = Fleet(
        settings(
            make, model=str(champion), challenger={"model": old, "share": 1.0, "key": "user"}, shadow={"model": old}
        ),
        1,
        heard,
        heard,
    )
    fleet.start()
    assert fleet.choose({"user": "ann"}) == (fleet.champion, "champion")
    assert fleet.champion.bundle.path == champion
    fleet.stop()
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert [message.split()[0] for message in told] == ["challenger", "shadow"]
    assert all("does not suit the champion's clients: it does not take shop" in message for message in told)


class Stuck:
    """An engine that scores nothing until it may."""

    def __init__(self) -> None:
        self.started, self.may = threading.Event(), threading.Event()
        self.name, self.version, self.ranked = "stuck", "1", 0

    def rank(self, *_: Any) -> None:
        self.started.set()
        self.may.wait(30)
        self.ranked += 1


def test_a_busy_shadow_leaves_requests_out_and_holds_nobody_up() -> None:
    heard, engine = Heard(), Stuck()
    shadow = Shadow(lambda: as_engine(engine), 1.0, heard, None)
    shadow.start()
    request, trace = RankRequest({}, {}, 1, None), Trace("/rank")
    shadow.offer(request, trace)
    assert engine.started.wait(20)
    for _ in range(WAITING + 5):
        shadow.offer(request, trace)
    assert heard.dropped_shadow == 5
    engine.may.set()
    for _ in range(1 + WAITING):
        assert heard.scored.get(timeout=20).role == "shadow"
    shadow.stop()
    assert engine.ranked == 1 + WAITING


def test_a_shadow_ends_while_its_thread_takes_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    shadow = Shadow(lambda: None, 1.0, None, None)
    shadow.start()
    monkeypatch.setattr(shadow._waiting, "empty", lambda: False)  # what was still there a moment ago
    shadow.stop()
    assert not shadow._thread.is_alive()


def test_a_shadow_that_fails_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    heard, engine = Heard(), Stuck()
    engine.may.set()
    engines = iter([None, as_engine(object()), as_engine(engine)])
    shadow = Shadow(lambda: next(engines), 1.0, heard, None)
    shadow.start()
    for _ in range(3):
        shadow.offer(RankRequest({}, {}, 1, None), Trace("/rank"))
    assert heard.scored.get(timeout=20).name == "stuck"
    shadow.stop()
    (told,) = caplog.messages
    assert told.startswith("the shadow failed on a request\n  File ")
    assert told.endswith("\nAttributeError")  # whose text might quote what was asked


def test_a_shadow_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.life.shadow.WAITING", 100_000)
    shadow = Shadow(lambda: None, 0.25, None, None)
    for _ in range(10_000):
        shadow.offer(RankRequest({}, {}, 1, None), Trace("/rank"))
    assert abs(shadow._waiting.qsize() / 10_000 - 0.25) < 0.03


def as_engine(stand_in: Any) -> RankingEngine:
    engine: RankingEngine = stand_in
    return engine
