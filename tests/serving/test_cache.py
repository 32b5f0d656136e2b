"""Copies of registered models: whole or absent, checked, shared by processes, and few."""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from features.errors import InputError
from features.files import hash_tree
from serving.life.cache import KEEP, REGISTRIES, ModelCache, default_folder
from serving.models import NotNow, Registered, RegistryAway
from tests.serving.conftest import Make

STORE = "sqlite:////data/mlflow.db"


def version(number: int, name: str = "small") -> Registered:
    return Registered(name, str(number), f"models:/m-{number}", 1_700_000_000_000 + number)


class Store:
    """What stands for MLflow's files: every version is the same bundle."""

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.asked = bundle, list[str]()
        self.spoils: str | None = None
        self.cuts = list[int | None]()  # bytes that arrive of a member's weights, by downloads; None for all

    def __call__(self, found: Registered, folder: Path) -> Path:
        self.asked.append(found.version)
        shutil.copytree(self.bundle, folder / "artifacts" / "bundle")
        cut = self.cuts.pop(0) if self.cuts else None
        if cut is not None:
            os.truncate(folder / "artifacts" / "bundle" / "members" / "00" / "network.safetensors", cut)
        if self.spoils:
            file = folder / "artifacts" / "bundle" / self.spoils
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        return folder / "artifacts" / "bundle"


@pytest.fixture
def store(make: Make) -> Store:
    return Store(make().path)


@pytest.fixture
def cache(tmp_path: Path, store: Store) -> ModelCache:
    return ModelCache(tmp_path / "cache", STORE, store)


def test_a_version_is_copied_once_and_whole(cache: ModelCache, store: Store) -> None:
    path = cache.get(version(1))
    assert path == cache.path(version(1)) == cache.get(version(1))
    assert hash_tree(path) == hash_tree(store.bundle)
    assert store.asked == ["1"]


@pytest.mark.parametrize("file", ["golden.json", "members/00/network.safetensors", "manifest.json"])
def test_a_changed_byte_is_told_without_paths_and_nothing_is_kept(cache: ModelCache, store: Store, file: str) -> None:
    store.spoils = file
    with pytest.raises(InputError, match=r"^bundle models:/small/1 is damaged: .*" + Path(file).name) as told:
        cache.get(version(1))
    assert str(cache.folder) not in str(told.value)
    assert not cache.path(version(1)).exists()
    assert store.asked == ["1", "1"], "what arrives twice alike is so where it comes from"
    store.spoils = None
    assert hash_tree(cache.get(version(1))) == hash_tree(store.bundle)


def test_a_transfer_that_broke_off_is_made_again(cache: ModelCache, store: Store) -> None:
    store.cuts = [100]
    assert hash_tree(cache.get(version(1))) == hash_tree(store.bundle)
    assert store.asked == ["1", "1"]


def test_transfers_that_break_off_here_and_there_say_nothing_of_the_version(cache: ModelCache, store: Store) -> None:
    store.cuts = [100, 200]
    with pytest.raises(NotNow, match=r"^models:/small/1 was downloaded twice, and damaged twice, each"):
        cache.get(version(1))
    assert not cache.path(version(1)).exists()
    assert hash_tree(cache.get(version(1))) == hash_tree(store.bundle)


def test_what_is_no_bundle_is_told(cache: ModelCache, tmp_path: Path) -> None:
    empty = ModelCache(tmp_path / "other", STORE, lambda found, folder: folder / "artifacts" / "bundle")
    with pytest.raises(InputError, match="models:/small/3 holds no bundle"):
        empty.get(version(3))


def test_a_copy_that_was_damaged_later_is_known_and_made_anew(cache: ModelCache, store: Store) -> None:
    path = cache.get(version(1))
    assert not cache.is_damaged(version(1))
    (path / "golden.json").write_text("{}")
    assert cache.is_damaged(version(1))
    cache.discard_damaged(version(1))
    assert not cache.is_damaged(version(1)), "what is not there is not damaged"
    assert hash_tree(cache.get(version(1))) == hash_tree(store.bundle)
    assert store.asked == ["1", "1"]


def test_an_outage_in_the_middle_leaves_nothing(cache: ModelCache, tmp_path: Path) -> None:
    def away(found: Registered, folder: Path) -> Path:
        (folder / "artifacts").mkdir(parents=True)
        raise RegistryAway("connection reset")

    broken = ModelCache(tmp_path / "cache", STORE, away)
    with pytest.raises(RegistryAway):
        broken.get(version(1))
    assert [path.name for path in (broken.folder / "small").iterdir()] == [".lock"]


def test_a_model_that_was_made_anew_under_the_same_number_is_another(cache: ModelCache, store: Store) -> None:
    first = cache.get(version(1))
    anew = replace(version(1), created=1_800_000_000_000)
    assert cache.get(anew) != first
    assert cache.get(replace(version(1), compatible=True)) == first, "a tag makes no other model"
    assert store.asked == ["1", "1"]


def test_registries_do_not_mix(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(address: str) -> Path:
        return ModelCache(tmp_path / "cache", address, store).folder

    assert folder("http://one:5000") != folder("http://two:5000")
    assert folder("http://ann:old@one:5000") == folder("http://ann:new@one:5000") == folder("http://one:5000")
    here = folder("sqlite:///mlflow.db")
    assert here == folder(f"sqlite:///{Path.cwd()}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    assert folder("sqlite:///mlflow.db") != here


def test_what_a_model_stood_for_is_remembered_while_its_copy_is_there(cache: ModelCache) -> None:
    alias = "models:/small@champion"
    assert cache.remembered(alias) is None
    cache.get(version(1))
    cache.remember(alias, version(1))
    assert cache.remembered(alias) == version(1)
    cache.remember(alias, version(2))
    assert cache.remembered(alias) is None, "version 2 was never copied"
    cache.get(version(2))
    assert cache.remembered(alias) == version(2)
    assert cache.remembered("models:/small@candidate") is None
    (memory,) = cache.folder.glob("@*.json")
    memory.write_text('{"name": "small"}')
    assert cache.remembered(alias) is None


def test_the_newest_and_the_remembered_are_kept(cache: ModelCache) -> None:
    cache.get(version(1))
    cache.remember("models:/small@stable", version(1))
    for number in range(2, 2 + KEEP + 3):
        os.utime(cache.get(version(number)), (number, number))  # the order of their use
    cache.get(version(2))  # used again
    cache.get(version(50))
    kept = {path.name.partition("-")[0] for path in (cache.folder / "small").glob("[0-9]*")}
    assert "1" in kept
    assert kept - {"1"} == {"50", "2", "9", "8", "7"}


def test_of_the_models_that_stood_for_versions_the_last_are_remembered(cache: ModelCache) -> None:
    for number in range(1, KEEP + 4):
        os.utime(cache.get(version(number)), (number, number))
        cache.remember(f"models:/small/{number}", version(number))
        os.utime(next(cache.folder.glob(f"@*%2F{number}.json")), (number, number))
    assert cache.remembered("models:/small/2") == version(2), "used again"
    for number in range(100, 100 + KEEP):
        cache.get(version(number))
    known = {n for n in range(1, KEEP + 4) if cache.remembered(f"models:/small/{n}")}
    assert known == {2, 5, 6, 7, 8}
    assert len(list(cache.folder.glob("@*.json"))) == KEEP
    kept = {path.name.partition("-")[0] for path in (cache.folder / "small").glob("[0-9]*")}
    assert kept == {"2", "5", "6", "7", "8", "100", "101", "102", "103", "104"}


def test_the_registries_used_last_are_kept(store: Store, tmp_path: Path) -> None:
    def use(number: int) -> Path:
        cache = ModelCache(tmp_path / "cache", f"http://mlflow:{number}", store)
        cache.get(version(1))
        return cache.folder

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "notes").mkdir()
    folders = [use(number) for number in range(REGISTRIES)]
    for age, folder in enumerate(folders):
        os.utime(folder, (1000 + age, 1000 + age))
    held = ModelCache(tmp_path / "cache", "http://mlflow:1", store)
    os.utime(held.folder, (1001, 1001))
    more = [use(number) for number in range(REGISTRIES, REGISTRIES + 3)]
    kept = {path for path in (tmp_path / "cache").iterdir() if path.name != "notes"}
    assert kept == {held.folder, *folders[3:], *more}
    assert (tmp_path / "cache" / "notes").is_dir(), "it is none of ours"
    assert hash_tree(held.get(version(1))) == hash_tree(store.bundle)
    last = folders[4:]
    del held
    use(REGISTRIES + 3)
    assert {path for path in (tmp_path / "cache").iterdir() if path.name != "notes"} - set(more) == {
        *last, ModelCache(tmp_path / "cache", f"http://mlflow:{REGISTRIES + 3}", store).folder,
    }  # fmt: skip


def test_several_read_at_the_same_time(cache: ModelCache, store: Store) -> None:
    """Workers that load a version do not wait for each other, however long it takes."""
    cache.get(version(1))
    met = threading.Barrier(3)

    def read() -> None:
        with ModelCache(cache.folder.parent, STORE, store).reading(version(1)):
            met.wait(10)

    others = [threading.Thread(target=read) for _ in range(2)]
    with cache.reading(version(1)):
        for other in others:
            other.start()
        met.wait(10)
    for other in others:
        other.join(10)
    assert store.asked == ["1"]


def test_nobody_replaces_what_is_read(cache: ModelCache, store: Store) -> None:
    """A damaged copy is removed once those who read it are done, and one made anew meanwhile is not."""
    (cache.get(version(1)) / "golden.json").write_text("{}")
    other = ModelCache(cache.folder.parent, STORE, store)
    thread = threading.Thread(target=other.discard_damaged, args=(version(1),))
    with cache.reading(version(1)) as path:
        thread.start()
        thread.join(0.2)
        assert (path / "golden.json").read_text() == "{}"
    thread.join(10)
    assert not path.exists()
    with cache.reading(version(1)) as path:
        assert hash_tree(path) == hash_tree(store.bundle)
    cache.discard_damaged(version(1))
    assert path.is_dir()


def test_a_disk_that_is_full_is_told_by_its_error_and_leaves_nothing(
    cache: ModelCache, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache.get(version(1))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space left on device"):
            cache.get(version(2))
        patch.setattr(Path, "write_bytes", full)
        cache.remember("models:/small@champion", version(1))
    names = sorted(path.name for path in (cache.folder / "small").iterdir())
    assert names == [".lock", cache.path(version(1)).name]
    assert caplog.messages == [
        "models:/small@champion: a start without MLflow will not know of models:/small/1: No space left on device"
    ]
    assert cache.remembered("models:/small@champion") is None


def test_names_stay_in_their_folder(cache: ModelCache) -> None:
    paths = [cache.path(version(1, name)) for name in ("..", ".", "a/b", "a b", "größe")]
    for path in paths:
        assert path.parent.parent == cache.folder
        assert path.resolve().parent.parent == cache.folder.resolve()
    assert len({path.parent for path in paths}) == len(paths)


def test_of_many_that_want_a_version_one_downloads_it(store: Store, tmp_path: Path) -> None:
    def slow(found: Registered, folder: Path) -> Path:
        time.sleep(0.2)
        return store(found, folder)

    found = list[Path]()
    caches = [ModelCache(tmp_path / "cache", STORE, slow) for _ in range(6)]
    threads = [threading.Thread(target=lambda c=cache: found.append(c.get(version(1)))) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found)), store.asked) == (6, 1, ["1"])


KILLED = """
import os, signal, sys
from pathlib import Path
from serving.life.cache import ModelCache
from serving.models import Registered

def download(found, folder):
    (folder / "artifacts").mkdir(parents=True)
    (folder / "artifacts" / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

ModelCache(Path(sys.argv[1]), sys.argv[2], download).get(Registered("small", "1", "models:/m-1", 1_700_000_000_001))
"""


@pytest.mark.long
def test_a_process_that_was_killed_leaves_neither_a_lock_nor_half_a_model(cache: ModelCache, store: Store) -> None:
    command = [sys.executable, "-c", KILLED, str(cache.folder.parent), STORE]
    assert subprocess.run(command, check=False).returncode == -9
    assert [path.name[:3] for path in (cache.folder / "small").iterdir() if path.is_dir()] == [".1-"]
    assert hash_tree(cache.get(version(1))) == hash_tree(store.bundle)
    assert sorted(path.name for path in (cache.folder / "small").iterdir()) == [".lock", cache.path(version(1)).name]


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == Path("/home/ann/.cache/masknet")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert default_folder() == Path("/var/cache/masknet")


def test_a_folder_that_cannot_be_made_is_told(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache .*file/cache cannot be made: Not a directory"):
        ModelCache(tmp_path / "file" / "cache", STORE, store)


def test_a_link_that_leads_nowhere_is_told(store: Store, tmp_path: Path) -> None:
    """As where the disk that it leads to is not there; whoever waits for it to be removed waits for ever."""
    (tmp_path / "cache").symlink_to(tmp_path / "away" / "cache")
    with pytest.raises(InputError, match=r"cache .*cache cannot be made: File exists"):
        ModelCache(tmp_path / "cache", STORE, store)
