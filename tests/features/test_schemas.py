"""The schema files that come with the package, on rows in the formats in which the data is distributed."""

import gzip
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from features.dataset import PreparedDataset
from features.prepare import prepare
from features.schema import load_schema
from features.splits import SplitRule

SCHEMAS = Path(str(files("features.schemas")))
ROWS = 400
RANDOM = np.random.default_rng(11)


def criteo(row: int) -> str:
    """A line of train.txt: empty values, negative counts, hashes."""
    counts = [str(value) if value > -3 else "" for value in RANDOM.integers(-4, 500, 13)]
    hashes = [f"{value:08x}" if value % 9 else "" for value in RANDOM.integers(0, 40, 26)]
    return "\t".join([str(row % 2), *counts, *hashes])


def avazu(row: int) -> str:
    """A line of Avazu's train: an id of 20 digits, the hour as YYMMDDHH."""
    hour = f"1410{21 + row * 9 // ROWS}{row * 7 % 24:02d}"
    words = [f"{value:08x}" for value in RANDOM.integers(0, 30, 9)]
    numbers = [str(value) for value in RANDOM.integers(-1, 9, 11)]
    return ",".join([f"{10**19 + row}", str(row % 5 // 4), hour, numbers[0], *words, *numbers])


def movielens(row: int) -> str:
    """A line of u.data."""
    return f"{row % 40}\t{row % 17}\t{1 + row % 5}\t{881250949 + row * 977}"


def kuairec(row: int) -> str:
    """A line of interactions.csv."""
    return f"{row % 14},{row % 9},{row % 30 / 10:.13f}"


def libfm(row: int) -> str:
    """A line of ml-tag.train.libfm."""
    return f"{1 if row % 3 else -1} {row % 20}:1 {row % 30 + 90}:1 {row % 7 + 500}:1"


AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)
FORMATS: dict[str, tuple[str, str, Callable[[int], str], str]] = {
    "criteo": ("train.txt", "", criteo, "random:0.8,0.1,0.1"),
    "avazu": ("train.gz", AVAZU, avazu, "time:0.8,0.1,0.1"),
    "movielens_ratings": ("u.data", "", movielens, "time:0.8,0.1,0.1"),
    "kuairec": ("interactions.csv", "user_id,video_id,watch_ratio", kuairec, "random:0.8,0.1,0.1"),
    "libfm": ("ml-tag.train.libfm", "", libfm, "random:0.8,0.1,0.1"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_raw_files_need_nothing_but_their_schema(tmp_path: Path, name: str) -> None:
    file, header, line, rule = FORMATS[name]
    text = "\n".join([*([header] if header else []), *(line(row) for row in range(ROWS))]) + "\n"
    path = tmp_path / file
    path.write_bytes(gzip.compress(text.encode()) if file.endswith(".gz") else text.encode())
    schema = load_schema(SCHEMAS / f"{name}.yaml")
    done = prepare(schema, {"input": [str(path)]}, tmp_path / "data", split=SplitRule.parse(rule), max_bad_rows=0.0)
    assert sum(done.rows.values()) == ROWS
    assert 0 < done.profile["splits"]["train"]["rate"] < 1
    for field in schema.fields:
        assert done.profile["fields"][field.name]["train"]["distinct"] > 0, field.name


def test_avazus_hours_are_hours(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(AVAZU + "\n" + "\n".join(avazu(row) for row in range(ROWS)) + "\n")
    schema = load_schema(SCHEMAS / "avazu.yaml")
    prepare(schema, {"input": [str(path)]}, tmp_path / "data", split=SplitRule.parse("time:0.8,0.1,0.1"))
    train = PreparedDataset.open(tmp_path / "data").split("train")
    hours = [int(line.split(",")[2][-2:]) for line in path.read_text().splitlines()[1:]]
    assert train["hour_of_day"].to_pylist() == [2 + hours[line - 2] for line in train["_line"].to_pylist()]
    # 2014-10-21 was a Tuesday
    first = train["_line"].to_pylist().index(2)
    assert train["weekday"].to_pylist()[first] == 2 + 1


def test_every_schema_file_is_tested() -> None:
    tested = {*FORMATS, "movielens"}  # the demo's, on which most other tests run
    assert {path.stem for path in SCHEMAS.glob("*.yaml")} == tested
    assert all(re.search(r"^name: ", path.read_text(), re.MULTILINE) for path in SCHEMAS.glob("*.yaml"))
