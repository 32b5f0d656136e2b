"""ABLATION.md can be repeated: its commands are accepted, stored rates are of their cells, pictures exist."""

import json
import re
import shlex
from pathlib import Path

import pytest

from training.ablation.cells import Grid, numbers, split_norms
from training.config import load_config

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "masknet" / "ABLATION.md").read_text()
COMMANDS = re.findall(r"^masknet ablate (.*)$", DOCUMENT, re.M)


def option(words: list[str], name: str, default: str = "") -> str:
    return words[words.index(name) + 1] if name in words else default


def test_every_study_has_its_command() -> None:
    assert len(COMMANDS) == DOCUMENT.count("<!-- study ")


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_studys_cells_are_those_of_its_command(command: str) -> None:
    words = shlex.split(command)
    config = load_config(ROOT / words[0], [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    grid = Grid(
        norms=split_norms(option(words, "--norms")),
        placements=split_norms(option(words, "--placements")),
        without=split_norms(option(words, "--without")),
        blocks=numbers("--blocks", option(words, "--blocks"), int),
        embedding_dims=numbers("--embedding-dims", option(words, "--embedding-dims"), int),
        ratios=numbers("--ratios", option(words, "--ratios"), float),
    )
    cells = [cell.name for cell in grid.cells(config, option(words, "--baseline", "layer"))]
    section = DOCUMENT.partition(command)[2].partition("<!-- end of study ")[0]
    shown = {name for name, auc in re.findall(r"^\| (\S.*?) \| (0\.\d{4}) ±", section, re.M)}
    assert shown == set(cells)
    if "--rates" in words:
        assert json.loads((ROOT / option(words, "--rates")).read_text()).keys() == set(cells)


def test_pictures_exist() -> None:
    pictures = re.findall(r"\]\((pictures/[^)]+)\)", DOCUMENT)
    assert len(pictures) >= len(COMMANDS)
    assert {path.name for path in (ROOT / "masknet" / "pictures").iterdir()} == {Path(name).name for name in pictures}
