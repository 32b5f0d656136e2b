"""Who holds an alias, what is written down about it, and the way back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console

from features.errors import InputError
from serving.bundle import Bundle
from training.errors import Failure
from training.promotion.command import given_rows, run_promote
from training.promotion.promote import PromoteOptions, promote
from training.promotion.registry import AliasRecord, Change, stack_of
from training.promotion.rollback import roll_back
from training.promotion.trial import Given

NAME = "held"
Register = Callable[[Path, str], str]


@pytest.fixture(scope="module")
def three(register: Register, bundle: Bundle) -> tuple[str, str, str]:
    """Versions of the same model; which holds an alias matters here, and not what it is worth."""
    return register(bundle.path, NAME), register(bundle.path, NAME), register(bundle.path, NAME)


@pytest.fixture
def alias(request: pytest.FixtureRequest) -> str:
    """One of the test's own."""
    return request.node.name.partition("[")[0]


def force(version: str, alias: str, name: str = NAME, reason: str = "a history") -> dict[str, Any]:
    return promote(PromoteOptions(model=f"models:/{name}/{version}", alias=alias, force=reason)).plain()


def tags(version: str, alias: str) -> dict[str, str]:
    found = mlflow.MlflowClient().get_model_version(NAME, version).tags
    return {key.removeprefix(f"masknet.{alias}."): value for key, value in found.items() if f".{alias}." in key}


def holder(alias: str, name: str = NAME) -> str | None:
    return AliasRecord(name, alias).holder()


def damage(name: str, version: str) -> None:
    uri = mlflow.MlflowClient().get_model_version_download_uri(name, version)
    (Path(mlflow.artifacts.download_artifacts(uri)) / "artifacts" / "bundle" / "golden.json").unlink()


def artifact(version: str, file: str) -> dict[str, Any]:
    client = mlflow.MlflowClient()
    run = client.get_run(client.get_model_version(NAME, version).run_id)
    return mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{file}")


def test_a_promotion_records_who_replaced_whom_and_why(three: tuple[str, str, str], alias: str) -> None:
    first, second, _ = three
    done = force(first, alias, reason="there was none")
    assert json.loads(json.dumps(done)) == {
        "model_uri": f"models:/{NAME}/{first}",
        "alias": alias,
        "replaced": None,
        "reason": "forced: there was none",
        "checks": [],
    }
    assert force(second, alias)["replaced"] == f"models:/{NAME}/{first}"
    assert holder(alias) == second
    old, new = tags(first, alias), tags(second, alias)
    assert (old["reason"], old["replaced"], old["replaced_by"]) == ("forced: there was none", "none", second)
    assert (old["ended"], old["until"]) == ("forced: a history", new["since"])
    assert (new["replaced"], new["reason"], new["failed"]) == (first, "forced: a history", "not evaluated")
    record = artifact(second, "promotion.json")
    assert (record["replaced"], record["forced"], record["evidence"]) == (f"models:/{NAME}/{first}", True, None)
    again = force(second, alias)
    assert (again["replaced"], again["reason"]) == (None, f"was {alias} already")
    repeated = promote(PromoteOptions(model=f"models:/{NAME}/{second}", alias=alias, force="a history"))
    assert str(repeated) == f"models:/{NAME}/{second} was {alias} already: nothing has changed"
    force(first, alias)
    assert tags(first, alias)["replaced"] == second
    assert not {"until", "replaced_by", "ended"} & tags(first, alias).keys()


def test_rollback_goes_back_along_the_chain(three: tuple[str, str, str], alias: str) -> None:
    first, second, third = three
    for version in (first, second, first, third):
        force(version, alias)
    done = roll_back(f"models:/{NAME}", alias)
    assert (holder(alias), done.replaced) == (first, f"models:/{NAME}/{third}")
    assert done.reason == f"rolled back from models:/{NAME}/{third}"
    old, new = tags(third, alias), tags(first, alias)
    assert (old["replaced_by"], old["ended"]) == (first, done.reason)
    assert (new["replaced"], new["reason"]) == (third, done.reason)
    assert not {"until", "replaced_by", "ended", "failed"} & new.keys()
    assert artifact(third, "rollback.json")["model_uri"] == f"models:/{NAME}/{first}"
    roll_back(NAME, alias)
    assert holder(alias) == second  # it goes on, and not forth to the third
    roll_back(f"models:/{NAME}@{alias}", alias)
    assert holder(alias) == first
    with pytest.raises(InputError, match=f"models:/{NAME}/{first} is the first {alias}: there is none before it"):
        roll_back(NAME, alias)
    force(third, alias)  # from what was rolled back there is no way back any more
    roll_back(NAME, alias)
    assert holder(alias) == first


def test_rollback_after_deletions(register: Register, bundle: Bundle, alias: str) -> None:
    name, client = "deleted", mlflow.MlflowClient()
    versions = [register(bundle.path, name) for _ in range(3)]
    for version in versions:
        force(version, alias, name)
    client.delete_model_version(name, "3")  # and with it, silently, the alias
    assert holder(alias, name) is None
    restored = roll_back(name, alias)
    assert (holder(alias, name), restored.replaced) == ("2", None)
    client.delete_model_version(name, "1")
    left = f"none that was {alias} before models:/deleted/2 is left to go back to: models:/deleted/1 was deleted"
    with pytest.raises(InputError, match=left):
        roll_back(name, alias)
    assert holder(alias, name) == "2"


@pytest.mark.long
def test_rollback_passes_over_what_is_not_there(register: Register, bundle: Bundle, alias: str) -> None:
    name, client = "gaps", mlflow.MlflowClient()
    for _ in range(5):
        register(bundle.path, name)
    for version in ("1", "2", "3", "4", "2"):
        force(version, alias, name)
    client.delete_model_version(name, "4")
    damage(name, "3")
    force("5", alias, name)
    assert roll_back(name, alias).reason == "rolled back from models:/gaps/5"
    done = roll_back(name, alias)  # down to the 2 below 3 and 4 would be no way: it is what holds the alias
    assert (
        done.reason
        == "rolled back from models:/gaps/2, past version 4, which was deleted, version 3, which does not open"
    )
    assert (holder(alias, name), AliasRecord(name, alias).stack()) == ("1", ["1"])


def test_rollback_opens_the_bundle_first(register: Register, bundle: Bundle, alias: str) -> None:
    name = "damaged"
    for _ in range(2):
        force(register(bundle.path, name), alias, name)
    damage(name, "1")
    with pytest.raises(InputError, match=r"golden\.json is missing"):
        roll_back(name, alias)
    assert holder(alias, name) == "2"


def test_an_interrupted_change_leaves_the_alias_and_can_be_repeated(
    three: tuple[str, str, str], alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = three
    force(first, alias)
    record = AliasRecord(NAME, alias)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            force(second, alias)
    assert (record.holder(), record.stack()) == (first, [first])
    force(second, alias)
    assert (record.holder(), record.stack()) == (second, [first, second])


@pytest.mark.parametrize(
    "at",
    [
        "set_registered_model_tag",
        pytest.param("set_registered_model_alias", marks=pytest.mark.long),
        pytest.param("delete_registered_model_tag", marks=pytest.mark.long),
    ],
)
def test_an_interrupted_rollback_is_ended_and_not_done_twice(
    three: tuple[str, str, str], alias: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = three
    alias = f"{alias}_{at}"
    for version in three:
        force(version, alias)
    call = getattr(mlflow.MlflowClient, at)

    def killed(client: Any, name: str, key: str, *value: Any) -> None:
        if key.endswith(".rollback") and value:  # the mark is set before
            call(client, name, key, *value)
            return
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, at, killed)
        with pytest.raises(KeyboardInterrupt):
            roll_back(NAME, alias)
    done = roll_back(NAME, alias)
    assert (done.model_uri, done.replaced) == (f"models:/{NAME}/{second}", f"models:/{NAME}/{third}")
    assert done.reason.startswith(f"rolled back from models:/{NAME}/{third}")
    assert ("interrupted" in done.reason) == (at != "set_registered_model_alias")  # before that nothing has moved
    assert (holder(alias), AliasRecord(NAME, alias).stack()) == (second, [first, second])
    roll_back(NAME, alias)  # the next one is another
    assert (holder(alias), AliasRecord(NAME, alias).stack()) == (first, [first])


@pytest.mark.long
def test_the_mark_of_a_rollback_does_not_outlive_a_promotion(
    three: tuple[str, str, str], alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = three
    for version in three:
        force(version, alias)
    with monkeypatch.context() as patch:
        patch.setattr(AliasRecord, "_write_history", lambda *_: None)  # killed after the alias
        roll_back(NAME, alias)
    force(third, alias)
    record = AliasRecord(NAME, alias)
    assert (record.stack(), record.unfinished()) == ([first, second, third], None)
    assert [roll_back(NAME, alias).model_uri, roll_back(NAME, alias).model_uri] == [
        f"models:/{NAME}/{second}",
        f"models:/{NAME}/{first}",
    ]


def test_an_alias_that_moves_during_a_rollback_is_not_overrun(
    three: tuple[str, str, str], alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = three
    force(first, alias)
    force(second, alias)

    def open_slowly(path: Path) -> None:
        mlflow.MlflowClient().set_registered_model_alias(NAME, alias, third)

    monkeypatch.setattr("training.promotion.rollback.load_bundle", open_slowly)
    with pytest.raises(Failure, match=f"{alias} was given to another version meanwhile"):
        roll_back(NAME, alias)
    assert holder(alias) == third


@pytest.mark.parametrize(
    ("history", "holder", "stack"),
    [
        ([], None, []),
        ([], "1", ["1"]),  # given by hand
        (["1", "2"], "2", ["1", "2"]),
        (["1", "2"], None, ["1", "2"]),  # version 2 was deleted
        (["1", "2"], "5", ["1", "2", "5"]),  # given by hand
        (["1", "2", "3"], "2", ["1", "2"]),  # killed: a promotion of 3, or a rollback from it
        (["1", "2", "1", "2"], "1", ["1", "2", "1"]),  # killed: the second promotion of 2
        (["3", "2", "3"], "2", ["3", "2"]),  # killed: a rollback from 3 to 2
    ],
)
def test_the_history_is_read_by_what_the_alias_says(history: list[str], holder: str | None, stack: list[str]) -> None:
    assert stack_of(history, holder) == stack


def test_a_history_from_before_there_was_one(three: tuple[str, str, str], alias: str) -> None:
    first, second, _ = three
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(NAME, alias, second)
    client.set_model_version_tag(NAME, second, f"masknet.{alias}.replaced", first)
    assert roll_back(NAME, alias).model_uri == f"models:/{NAME}/{first}"


def test_only_the_newest_holders_are_kept(three: tuple[str, str, str], alias: str) -> None:
    client, record = mlflow.MlflowClient(), AliasRecord(NAME, alias)
    client.set_registered_model_tag(NAME, f"masknet.{alias}.history", " ".join(["8", "9"] * 150))
    record.promote(Change(three[0], None, "", {}))
    assert record.stack() == [*["9", "8"] * 99, "9", three[0]]


@pytest.mark.parametrize("name", ["", "v1", "latest", "a b"])
def test_aliases_that_the_registry_keeps_for_itself(name: str) -> None:
    with pytest.raises(InputError, match="alias"):
        force("1", name)


def test_mistakes_are_told(three: tuple[str, str, str], bundle: Bundle, alias: str) -> None:
    model = f"models:/{NAME}/{three[0]}"
    for options, told in (
        ({"model": model}, "give --data or --input"),
        ({"model": model, "force": " "}, "--force needs a reason"),
        ({"model": model, "force": "a\nb"}, "in one line"),
        ({"model": model, "force": "because", "config": Path("nowhere.yaml")}, "nowhere.yaml does not exist"),
        ({"model": str(bundle.path), "force": "because"}, f"is the folder {bundle.path}, no version in the registry"),
        ({"model": f"models:/{NAME}/999", "force": "because"}, "is not in the registry"),
    ):
        with pytest.raises(InputError, match=told):
            promote(PromoteOptions(alias=alias, **options))
    for model, told in (
        (f"models:/{NAME}/1", "--rollback finds the version by itself"),
        (f"models:/{NAME}@other", "name two aliases"),
        ("nobody", "no version of models:/nobody has held the alias"),
        (NAME, f"no version of models:/{NAME} has held the alias"),
    ):
        with pytest.raises(InputError, match=told):
            roll_back(model, alias)


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="give either --data or --input"):
        given_rows(Path("data"), ["rows.csv"], "test", 0.01)
    assert given_rows(None, [], "test", 0.01) is None
    assert given_rows(None, ["rows.csv"], "test", 0.0) == Given(None, ("rows.csv",), "test", 0.0)
    for more in ({"given": Given(Path("data"))}, {"force": "because"}, {"config": Path("gate.yaml")}):
        with pytest.raises(InputError, match="--rollback makes no checks: it goes with --alias alone"):
            run_promote(PromoteOptions(model=NAME, **more), True, Console(quiet=True))
