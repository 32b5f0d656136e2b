"""A sample of the broken inputs of fuzz.py, whose `--runs 10000` takes a quarter of an hour."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent / "fuzz.py")
assert _SPEC is not None
assert _SPEC.loader is not None
_FUZZ = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FUZZ)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))])
def test_broken_inputs_end_in_data_or_one_clear_error(seed: int) -> None:
    ended = _FUZZ.fuzz(40, seed)
    assert sum(ended.values()) == 40
    assert ended["data"] > 3, "the mutations are too harsh to test anything"
    assert ended["error"] > 3, "the mutations are too mild to test anything"
