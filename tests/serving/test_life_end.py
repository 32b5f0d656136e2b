"""The end of a process in the middle of a change of version."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import Make
from tests.serving.running import ROOT

pytestmark = pytest.mark.long

ENDS = """
import shutil, sys, threading, time
from pathlib import Path
from serving.life import following, opening
from serving.life.fleet import Fleet
from serving.models import Registered
from serving.settings import ServeSettings

cache, bundle, version, begun = Path(sys.argv[1]), Path(sys.argv[2]), ["1"], threading.Event()
following.find_registered = opening.find_registered = lambda model: Registered("small", version[0], "", 1, False)
opening.download = lambda found, folder: shutil.copytree(bundle, folder / "bundle")
opening.registry_uri = lambda: "http://mlflow:5000"
settings = {"model": "models:/small@champion", "cache": cache, "threads": 1, "follow": {"interval_seconds": 0.01}}
fleet, load = Fleet(ServeSettings.model_validate(settings), 1), opening.RankingEngine.load
fleet.start()

def told(*given, **more):
    begun.set()
    return load(*given, **more)

opening.RankingEngine.load = told
version[0] = "2"
assert begun.wait(60)
time.sleep(float(sys.argv[3]))
fleet.stop()
print(fleet.champion.version)
"""


def test_a_process_that_ends_while_a_version_is_loaded_ends_in_order(make: Make, tmp_path: Path) -> None:
    bundle = make().path
    for number in range(3):
        words = (str(tmp_path / f"cache {number}"), str(bundle), str(0.05 * number))
        command = [sys.executable, "-W", "ignore", "-c", ENDS, *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr[-2000:]
