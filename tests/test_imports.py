"""Who may import whom, as the architecture says it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "features": set(),
    "masknet": set(),
    "serving": {"features", "masknet"},
    "training": {"features", "masknet", "serving"},
}
FORBIDDEN_LIBRARIES = {
    "features": {"mlflow", "bentoml", "starlette", "httpx"},
    "masknet": {"mlflow", "bentoml", "starlette", "httpx", "pathlib", "os"},
    "training": {"starlette"},
}
ENVIRONMENT = ROOT / "masknet" / "kernels" / "dispatch.py"  # reads one variable


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.partition(".")[0])
    return modules


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        strangers = (imported(path) & ALLOWED.keys()) - ALLOWED[room] - {room}
        assert not strangers, f"{path} imports {strangers}"


@pytest.mark.parametrize("room", FORBIDDEN_LIBRARIES)
def test_a_room_does_not_know_the_libraries_of_others(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        allowed = {"os"} if path == ENVIRONMENT else set()
        assert not (imported(path) & FORBIDDEN_LIBRARIES[room]) - allowed, path


def test_help_imports_nothing_heavy() -> None:
    script = "import sys, training.cli; print([m for m in ('torch', 'mlflow', 'pandas', 'polars') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_nothing_unpickles() -> None:
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            assert not imported(path) & {"pickle", "cloudpickle", "joblib", "dill"}, path
