"""The model cache with several real processes: what one removes or makes anew is not what another reads or uses."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from features.files import hash_tree
from serving.life.cache import KEEP, ModelCache
from serving.models import Registered
from tests.serving.conftest import Make
from tests.serving.running import ROOT
from tests.serving.test_cache import STORE, version

pytestmark = pytest.mark.long

# Opens version 1 whenever it is told to, and says how that went. Others have time between the check of the digests and
# the reading of the files.
WORKER = """
import gc, random, shutil, sys, time
from pathlib import Path
import serving.bundle
from serving.life import opening
from serving.models import Registered
from serving.settings import ServeSettings

cache, bundle, downloads, store = (*map(Path, sys.argv[1:4]), sys.argv[4])
found = Registered("small", "1", "models:/m-1", 1_700_000_000_001)
verified = serving.bundle.verified_manifest

def download(found, folder):
    with downloads.open("a") as file:
        file.write("1")
    return shutil.copytree(bundle, folder / "artifacts" / "bundle")

def slowly(path):
    time.sleep(random.random() * 0.1)
    try:
        return verified(path)
    finally:
        time.sleep(random.random() * 0.1)

serving.bundle.verified_manifest = slowly
opening.download, opening.registry_uri = download, lambda: store
opener = opening.Opener(ServeSettings(cache=cache, threads=1))
print("ready", flush=True)
for line in sys.stdin:
    try:
        engine = opener.open(found)
        print("opened", len(engine.members), flush=True)
    except Exception as error:
        print(type(error).__name__, str(error)[:200], flush=True)
    if line.strip() == "forget":
        del engine
        gc.collect()
        print("forgotten", flush=True)
"""


class Worker:
    """A process that opens versions."""

    def __init__(self, *words: str | Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WORKER, *map(str, words)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.says() == "ready"

    def ask(self, what: str = "open") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def bundle(make: Make) -> Path:
    return make().path


@pytest.fixture
def cache(tmp_path: Path, bundle: Path) -> ModelCache:
    def download(found: Registered, folder: Path) -> Path:
        return Path(shutil.copytree(bundle, folder / "artifacts" / "bundle"))

    return ModelCache(tmp_path / "cache", STORE, download)


@pytest.fixture
def start(tmp_path: Path, bundle: Path) -> Iterator[Callable[[], Worker]]:
    workers = list[Worker]()

    def started() -> Worker:
        workers.append(Worker(tmp_path / "cache", bundle, tmp_path / "downloads", STORE))
        return workers[-1]

    yield started
    for worker in workers:
        with worker.process:  # which closes its pipes
            worker.process.kill()


def test_a_damaged_copy_is_made_anew_once_and_all_open_it(
    cache: ModelCache, bundle: Path, start: Callable[[], Worker], tmp_path: Path
) -> None:
    path = cache.get(version(1))
    workers = [start(), start()]
    for turn in range(12):
        weights = path / "members" / "00" / "embeddings" / "000.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1 - turn] ^= 1
        weights.with_name("aside").write_bytes(content)
        weights.with_name("aside").replace(weights)
        for worker in workers:
            worker.ask()
        assert [worker.says() for worker in workers] == ["opened 1", "opened 1"]
        assert hash_tree(path) == hash_tree(bundle)
        assert (tmp_path / "downloads").read_text() == "1" * (turn + 1)


def test_what_another_process_uses_is_kept(cache: ModelCache, start: Callable[[], Worker]) -> None:
    worker = start()
    worker.ask()
    assert worker.says() == "opened 1"
    used = cache.path(version(1))
    os.utime(used, (1, 1))
    for number in range(2, KEEP + 3):
        os.utime(cache.get(version(number)), (number, number))
    assert used.is_dir()
    assert not cache.path(version(2)).exists()
    worker.process.kill()
    worker.process.wait()
    cache.get(version(50))
    assert not used.exists()


def test_what_a_process_has_let_go_is_not_kept(cache: ModelCache, start: Callable[[], Worker]) -> None:
    worker = start()
    worker.ask("forget")
    assert (worker.says(), worker.says()) == ("opened 1", "forgotten")
    os.utime(cache.path(version(1)), (1, 1))
    for number in range(2, KEEP + 3):
        cache.get(version(number))
    assert not cache.path(version(1)).exists()
    assert cache.folder.is_dir()
