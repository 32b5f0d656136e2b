"""A model that follows the registry: taken when good, refused when not, whatever happens to MLflow meanwhile."""

import errno
import gc
import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from features.encoders import Hash, Identity, Vocabulary
from features.errors import InputError
from features.pipeline import FeaturePipeline
from features.schema import Schema
from serving.life.following import Followed
from serving.life.opening import Opener
from serving.models import NotRegistered
from serving.ranking.engine import RankingEngine
from serving.settings import ServeSettings
from serving.trace import Role
from tests.serving.conftest import FIELDS, ITEMS, PIPELINE, SCHEMA, Make
from tests.serving.registry import CHAMPION, Registry

WIDER = Schema.model_validate(
    SCHEMA.model_dump(by_alias=True)
    | {"fields": [*FIELDS, {"name": "shop", "type": "categorical", "encoder": "hash", "buckets": 5}]}
)
ENCODERS: dict[str, Any] = {"user": Vocabulary(PIPELINE.fields[0].encoder.values), "item": Identity(ITEMS)}
WIDER_PIPELINE = FeaturePipeline.build(WIDER.fields, ENCODERS | {"shop": Hash(5)})


class Counted:
    """What the metrics would be told."""

    def __init__(self) -> None:
        self.swaps, self.models = list[str](), list[tuple[str, str]]()

    def swap(self, outcome: str) -> None:
        self.swaps.append(outcome)

    def model(self, name: str, version: str, role: Role) -> None:
        assert (name, role) == ("small", "champion")
        self.models.append((name, version))


@pytest.fixture
def registry(make: Make, monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry()
    registry.stand_in(monkeypatch)
    registry.add("1", make("one", 1).path)
    return registry


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    return Opener(ServeSettings(cache=tmp_path / "cache", threads=1))


def scores(engine: RankingEngine, rows: Any) -> list[float]:
    return [float(score) for score in engine.predict(rows)]


def follow(opener: Opener, told: Counted | None = None, any_schema: bool = False) -> Followed:
    return Followed("champion", CHAMPION, opener, any_schema, told)


def test_the_alias_moves_and_moves_back(registry: Registry, opener: Opener, make: Make, rows: Any) -> None:
    told = Counted()
    followed = follow(opener, told)
    one, old = scores(followed.engine, rows), followed.engine
    assert not followed.look()
    registry.add("2", make("two", 2).path)
    assert followed.look()
    assert followed.engine.version == "2"
    two = scores(followed.engine, rows)
    assert two == pytest.approx(make_scores(registry, "2", rows), abs=1e-6)
    assert two != one
    assert scores(old, rows) == one, "a request that holds the old one still gets its scores"
    registry.aliases["champion"] = "1"
    assert followed.look()
    assert (followed.engine.version, scores(followed.engine, rows)) == ("1", one)
    assert registry.downloads == ["1", "2"], "the way back is by the cache"
    assert told.models == [("small", version) for version in ("1", "2", "1")]
    assert told.swaps == ["done", "done"]


def make_scores(registry: Registry, version: str, rows: Any) -> list[float]:
    from serving.bundle import load_bundle

    return [float(score) for score in load_bundle(registry.bundles[version]).scorer.score(rows)]


def broken(bundle: Path) -> Path:
    file = bundle / "members" / "00" / "embeddings" / "000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return bundle


def test_a_broken_version_is_refused_once_and_again_only_after_the_alias_has_moved(
    registry: Registry, opener: Opener, make: Make, rows: Any, caplog: pytest.LogCaptureFixture
) -> None:
    told = Counted()
    followed = follow(opener, told)
    before = scores(followed.engine, rows)
    registry.add("2", broken(make("two", 2).path))
    for _ in range(3):
        assert not followed.look()
    assert (followed.engine.version, scores(followed.engine, rows)) == ("1", before)
    assert followed.about()["refused"]["version"] == "2"
    assert "bundle models:/small/2 is damaged" in followed.about()["refused"]["reason"]
    assert (told.swaps, registry.downloads) == (["refused"], ["1", "2", "2"]), "what arrives twice alike is so there"
    assert sum("is refused" in record.message for record in caplog.records) == 1
    registry.aliases["champion"] = "1"
    assert not followed.look()
    assert followed.about()["refused"] is None
    registry.aliases["champion"] = "2"
    followed.look()
    assert registry.downloads == ["1", "2", "2", "2", "2"]
    registry.add("3", make("three", 3).path)
    assert followed.look()
    assert (followed.engine.version, followed.about()["refused"]) == ("3", None)


def test_a_golden_row_that_is_off_is_refused(
    registry: Registry, opener: Opener, make: Make, reseal: Any, rows: Any
) -> None:
    followed = follow(opener)
    two, other = make("two", 2).path, make("other", 3).path
    shutil.copy(other / "golden.json", two / "golden.json")
    reseal(two)
    registry.add("2", two)
    assert not followed.look()
    assert followed.engine.version == "1"
    assert "golden row" in followed.about()["refused"]["reason"]


def test_other_fields_are_refused_unless_they_are_marked_compatible(
    registry: Registry, opener: Opener, make: Make
) -> None:
    followed = follow(opener)
    registry.add("2", wider(make))
    assert not followed.look()
    assert followed.about()["refused"] == {
        "version": "2",
        "reason": "its clients would have to change: it asks for shop",
    }
    assert registry.downloads == ["1", "2"]
    registry.compatible.add("2")  # a tag of the version, set afterwards
    assert followed.look()
    assert followed.engine.version == "2"
    registry.aliases["champion"] = "1"
    assert not followed.look(), "the way back asks for other fields as well"
    assert followed.about()["refused"]["reason"] == "its clients would have to change: it does not take shop"


def test_other_fields_are_taken_where_the_settings_say_so(registry: Registry, opener: Opener, make: Make) -> None:
    followed = follow(opener, any_schema=True)
    registry.add("2", wider(make))
    assert followed.look()
    assert followed.engine.schema == WIDER


def wider(make: Make) -> Path:
    from masknet.model import MaskNet
    from serving.bundle import fields_of, tables_of
    from serving.members import Member
    from tests.serving.conftest import CONFIG

    model = MaskNet(CONFIG, tables_of(WIDER_PIPELINE), fields_of(WIDER_PIPELINE))
    return write(make, "wider", Member.of(model))


def write(make: Make, name: str, member: Any) -> Path:
    from serving.bundle import write_bundle
    from tests.serving.conftest import CONFIG

    path = make("beside").path.parent / name
    write_bundle(
        path,
        name="small",
        config=CONFIG,
        schema=WIDER,
        pipeline=WIDER_PIPELINE,
        members=[member],
        sampling_rate=1.0,
        run_id=None,
        evaluate=lambda scorer: {},
    )
    return path


def test_mlflow_being_away_changes_nothing_and_is_told_once(
    registry: Registry, opener: Opener, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    told = Counted()
    followed = follow(opener, told)
    registry.add("2", make("two", 2).path)
    registry.away = True
    for _ in range(3):
        assert not followed.look()
    assert (followed.engine.version, followed.source) == ("1", "cache")
    assert told.swaps == ["unreachable"] * 3
    assert sum("does not answer" in record.message for record in caplog.records) == 1
    registry.away = False
    assert followed.look()
    assert (followed.engine.version, followed.source) == ("2", "registry")


def test_an_outage_while_a_version_is_downloaded_is_no_refusal(
    registry: Registry, opener: Opener, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = follow(opener)
    registry.add("2", make("two", 2).path)
    found = registry.find(CHAMPION)
    monkeypatch.setattr("serving.life.following.find_registered", lambda model: found)
    registry.away = True
    assert not followed.look()
    assert (followed.about()["refused"], followed.source) == (None, "cache")
    registry.away = False
    assert followed.look()


def unreadable(number: int) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), "/secret/cache/file")

    return fails


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("shutil.copytree", errno.ENOSPC),  # the copy is written
        ("serving.life.downloads.verified_manifest", errno.EIO),  # its digests are looked at
        ("pathlib.Path.rename", errno.EDQUOT),  # it gets its name
        ("serving.members.load_file", errno.ESTALE),  # its weights are read
        ("serving.manifest.hash_tree", errno.EACCES),
    ],
)
def test_a_disk_at_fault_is_no_fault_of_the_version(
    registry: Registry,
    opener: Opener,
    make: Make,
    rows: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    number: int,
) -> None:
    """It is tried again after pauses of 15 s, 30 s, 1 min … 10 min, and told of each time; then it is taken."""
    told, now = Counted(), [0.0]
    followed = Followed("champion", CHAMPION, opener, False, told, clock=lambda: now[0])
    before = scores(followed.engine, rows)
    registry.add("2", make("two", 2).path)
    tries = [0.0, 15.0, 45.0, 105.0, 225.0, 465.0, 945.0, 1545.0, 2145.0]
    with monkeypatch.context() as patch:
        patch.setattr(place, unreadable(number))
        for second in range(0, 2200, 5):
            now[0] = float(second)
            assert not followed.look()
            expected = sum(second >= start for start in tries)
            assert followed.about()["postponed"] == {
                "version": "2",
                "reason": f"models:/small/2 cannot be copied or read: {os.strerror(number)}",
                "tries": expected,
            }
    assert (followed.engine.version, scores(followed.engine, rows)) == ("1", before)
    assert followed.about()["refused"] is None
    assert told.swaps == ["postponed"] * len(tries)
    lines = [record.message for record in caplog.records if "is tried again in" in record.message]
    assert len(lines) == len(tries)
    assert lines[1].startswith("models:/small/2 is tried again in 30 s, version 1 goes on: ")
    assert followed.source == "registry", "MLflow has answered"
    now[0] = 2745.0
    assert followed.look()
    assert scores(followed.engine, rows) == pytest.approx(make_scores(registry, "2", rows), abs=1e-6)
    assert (followed.about()["postponed"], told.swaps[-1]) == (None, "done")


def test_another_version_is_not_kept_waiting(
    registry: Registry, opener: Opener, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = Followed("champion", CHAMPION, opener, False, None, clock=lambda: 0.0)
    registry.add("2", make("two", 2).path)
    registry.add("3", make("three", 3).path)
    registry.aliases["champion"] = "2"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", unreadable(errno.ENOSPC))
        assert not followed.look()
    registry.aliases["champion"] = "1"
    assert not followed.look()
    assert followed.about()["postponed"] is None
    registry.aliases["champion"] = "3"
    assert followed.look()


def test_a_bundle_that_lacks_a_file_though_its_digests_are_right_is_refused(
    registry: Registry, opener: Opener, make: Make, reseal: Any
) -> None:
    followed = follow(opener)
    two = make("two", 2).path
    (two / "golden.json").unlink()
    manifest = json.loads((two / "manifest.json").read_text())
    del manifest["files"]["golden.json"]
    reseal(two, files=manifest["files"])
    registry.add("2", two)
    assert not followed.look()
    assert followed.about()["postponed"] is None
    assert followed.about()["refused"] == {"version": "2", "reason": "bundle: models:/small/2/golden.json is missing"}


def test_a_start_on_a_full_disk_takes_the_last_good_one(
    registry: Registry, opener: Opener, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[str]()
    opener.open_by_registry(CHAMPION, told.append)
    registry.add("2", make("two", 2).path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", unreadable(errno.ENOSPC))
        assert opener.open_by_registry(CHAMPION, told.append).engine.version == "1"
        assert told == [
            "[Errno 28] No space left on device: '/secret/cache/file'; "
            f"{CHAMPION} is served from the cache, as models:/small/1"
        ]
        patch.setattr("serving.members.load_file", unreadable(errno.EIO))
        with pytest.raises(InputError, match=r"^model .* No space left .*, and .*Input/output error"):
            opener.open_by_registry(CHAMPION, told.append)
    assert follow(opener).look()


def test_a_version_that_the_settings_do_not_suit_is_refused(registry: Registry, opener: Opener, make: Make) -> None:
    seen = list[str]()

    def before(engine: RankingEngine) -> None:
        seen.append(engine.version)
        if engine.version == "2":
            raise InputError("store /secret/users.parquet has no column 'age'")

    followed = Followed("champion", CHAMPION, opener, False, None, before)
    registry.add("2", make("two", 2).path)
    assert not followed.look()
    assert followed.about()["refused"] == {"version": "2", "reason": "the service's settings do not suit it"}
    registry.add("3", make("three", 3).path)
    assert followed.look()
    assert (followed.engine.version, seen) == ("3", ["1", "2", "3"])


def test_an_alias_that_is_gone_leaves_the_version(registry: Registry, opener: Opener) -> None:
    followed = follow(opener)
    del registry.aliases["champion"]
    assert not followed.look()
    refused = followed.about()["refused"]
    assert refused == {"version": None, "reason": f"{CHAMPION} is not in the registry"}
    assert followed.engine.version == "1"


def test_clients_are_not_told_where_the_registry_is(
    registry: Registry, opener: Opener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What MLflow says of a version without files, and of a name that it does not have, holds addresses and paths."""
    followed = follow(opener)
    registry.bundles["2"] = registry.bundles["1"]
    registry.aliases["champion"] = "2"

    def absent(*_: Any) -> Any:
        raise NotRegistered("model 'm' is not in the registry sqlite:////secret/mlflow.db: no such artifact /secret/2")

    with monkeypatch.context() as patch:
        patch.setattr("serving.life.cache.ModelCache.get", absent)
        assert not followed.look()
    files = followed.about()["refused"]
    monkeypatch.setattr("serving.life.following.find_registered", absent)
    assert not followed.look()
    assert files == {"version": "2", "reason": "the files of models:/small/2 are not in the registry"}
    assert followed.about()["refused"] == {"version": None, "reason": f"{CHAMPION} is not in the registry"}
    assert sum("/secret/2" in record.message for record in caplog.records) == 2, "the log has it"


def test_a_start_without_mlflow_is_by_the_cache_and_goes_on_when_it_is_back(
    registry: Registry, opener: Opener, make: Make
) -> None:
    told = list[str]()
    assert opener.open_by_registry(CHAMPION, told.append).source == "registry"
    registry.add("2", make("two", 2).path)
    registry.away = True
    opened = opener.open_by_registry(CHAMPION, told.append)
    assert (opened.engine.version, opened.source) == ("1", "cache")
    assert told == [
        "MLflow at http://mlflow:5000 does not answer (Connection refused); "
        f"{CHAMPION} is served from the cache, as models:/small/1"
    ]
    followed = follow(opener)
    assert followed.source == "cache"
    registry.away = False
    assert followed.look()
    assert followed.source == "registry"


def test_a_start_without_mlflow_and_without_a_copy_is_told(registry: Registry, opener: Opener) -> None:
    registry.away = True
    with pytest.raises(InputError, match=r"does not answer \(Connection refused\), and there is no earlier copy in "):
        opener.open_by_registry(CHAMPION, print)


def test_a_start_without_mlflow_and_with_a_damaged_copy_is_told(registry: Registry, opener: Opener) -> None:
    opened = opener.open_by_registry(CHAMPION, print)
    assert opened.found is not None
    broken(opener.cache.path(opened.found))
    registry.away = True
    with pytest.raises(InputError, match=r"does not answer .*, and the copy of models:/small/1 is damaged$"):
        opener.open_by_registry(CHAMPION, print)


def test_a_start_with_a_broken_version_takes_the_last_good_one(registry: Registry, opener: Opener, make: Make) -> None:
    told = list[str]()
    registry.add("2", broken(make("two", 2).path))
    with pytest.raises(InputError, match=r"models:/small/2 is damaged.*and there is no earlier copy"):
        opener.open_by_registry(CHAMPION, told.append)
    registry.aliases["champion"] = "1"
    opener.open_by_registry(CHAMPION, told.append)
    registry.aliases["champion"] = "2"
    assert opener.open_by_registry(CHAMPION, told.append).engine.version == "1"
    assert "models:/small/2 is damaged" in told[0]
    assert "served from the cache, as models:/small/1" in told[0]


def test_a_copy_that_is_damaged_is_downloaded_again(registry: Registry, opener: Opener, rows: Any) -> None:
    opened = opener.open_by_registry(CHAMPION, print)
    assert opened.found is not None
    broken(opener.cache.path(opened.found))
    again = opener.open_by_cache(CHAMPION, print)
    assert registry.downloads == ["1", "1"]
    assert scores(again.engine, rows) == scores(opened.engine, rows)


def test_a_fixed_version_is_not_followed_once_mlflow_has_confirmed_it(registry: Registry, opener: Opener) -> None:
    followed = Followed("champion", "models:/small/1", opener, False, None)
    followed.look()
    assert (followed.is_settled, followed.source) == (True, "registry")
    before = registry.looks
    followed.look()
    assert registry.looks == before


def test_a_fixed_version_that_was_made_anew_is_followed_until_it_is_here(
    registry: Registry, opener: Opener, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, model = [0.0], "models:/small/1"
    Followed("champion", model, opener, False, None)
    followed = Followed("champion", model, opener, False, None, clock=lambda: now[0])
    assert followed.source == "cache"
    registry.add("2", make("two", 2).path)
    registry.aliases["1"] = "2"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", unreadable(errno.ENOSPC))
        assert not followed.look()
    assert (followed.is_settled, followed.about()["postponed"]["version"]) == (False, "2")
    now[0] = 15.0
    assert followed.look()
    assert (followed.is_settled, followed.engine.version) == (True, "2")


def test_a_folder_is_not_followed(registry: Registry, opener: Opener) -> None:
    path = registry.bundles["1"]
    followed = Followed("champion", str(path), opener, False, None)
    assert (followed.is_settled, followed.source, registry.looks) == (True, "folder", 0)
    assert followed.engine.version == followed.engine.bundle.digest[:12]


def test_old_versions_are_let_go_without_the_collector(registry: Registry, opener: Opener, make: Make) -> None:
    registry.add("2", make("two", 2).path)
    registry.aliases["champion"] = "1"
    followed = follow(opener)
    parts = list[weakref.ref[Any]]()
    gc.collect()
    gc.disable()
    try:
        for number in range(20):
            parts += map(weakref.ref, (followed.engine, followed.engine.bundle.scorer, followed.engine.bundle.pipeline))
            registry.aliases["champion"] = str(2 - number % 2)
            assert followed.look()
        alive = [part() for part in parts if part() is not None]
    finally:
        gc.enable()
    assert alive == []
