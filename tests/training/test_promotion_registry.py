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
from training.promotion.command import given_rows, run_promote
from training.promotion.promote import PromoteOptions, promote, roll_back
from training.promotion.registry import AliasRecord, Change, stack_of
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
    with pytest.raises(InputError, match=rf"models:/deleted/1, {alias} before models:/deleted/2, was deleted"):
        roll_back(name, alias)
    assert holder(alias, name) == "2"


def test_rollback_opens_the_bundle_first(register: Register, bundle: Bundle, alias: str) -> None:
    name, client = "damaged", mlflow.MlflowClient()
    for _ in range(2):
        force(register(bundle.path, name), alias, name)
    folder = Path(mlflow.artifacts.download_artifacts(client.get_model_version_download_uri(name, "1")))
    (folder / "artifacts" / "bundle" / "golden.json").unlink()
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
    with monkeypatch.context() as patch:
        patch.setattr(AliasRecord, "_write_history", killed)
        with pytest.raises(KeyboardInterrupt):
            roll_back(NAME, alias)
    assert (record.holder(), record.stack()) == (first, [first])


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
        ({"model": str(bundle.path), "force": "because"}, "is a folder"),
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
