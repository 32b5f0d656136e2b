"""Training configurations, and the check that torch and fbgemm fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from features.errors import InputError, without_password
from training.config import load_config, save_config
from training.stack import check_stack

GOOD = "experiment: e\ntracking: {registered_model: m}\nmodel: {hidden_norm: rms}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    return path


def test_overrides_are_yaml_values(path: Path) -> None:
    config = load_config(path, ["model.head=[5, 4]", "train.epochs=3", "optimizer.sparse.name=sgd", "model.dropout=.5"])
    assert config.model.head == (5, 4)
    assert config.train.epochs == 3
    assert config.optimizer.sparse.name == "sgd"
    assert config.model.dropout == 0.5
    assert config.model.hidden_norm.name == "rms"


def test_saved_configuration_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["model.embedding_norm={name: layer, eps: 0.5}"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", []) == config


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.blcks=3", "model.blcks: unknown key"),
        ("colour=red", "colour: unknown key"),
        ("model.hidden_norm=layernorm", "'layernorm' is no normalization; there are layer, rms, none"),
        ("model.hidden_norm=crms", "with a ReLU between, as in a MaskBlock, that is wrong"),
        ("model.hidden_norm={name: dyt, alfa: 1}", "alfa: unknown key; dyt has eps, alpha"),
        ("model.hidden_norm={name: power, alpha: 2}", "alpha: Input should be less than 1"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=0", "train.epochs"),
        ("train.average.name=swa", "train.average.name"),
        ("train.average=ema", "train.average"),
        ("train.average.span=0", "train.average.span"),
        ("train.average.every=0", "train.average.every"),
        ("optimizer.sparse.name=adamw", "optimizer.sparse.name"),
        ("model={kind: serial}", "head must be []"),
        ("train.epochs", "not of the form"),
        ("tracking.registered_model=a/b", "tracking.registered_model"),
        ("experiment=../x", "experiment"),
        ("model.reduction_ratio=.inf", "model.reduction_ratio"),
        ("experiment.name=x", "experiment is a value, not a section"),
        ("model.head=[", "not YAML"),
        ("tracking={}", "tracking.registered_model: required key is missing"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(path: Path, override: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(path, [override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@host:5000", "http://me:***@host:5000"),
        ("postgresql://me:sec/ret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:sec@ret:?#@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@here:secret@host/db", "postgresql://me@here:***@host/db"),
        ("postgresql://:secret@host/db", "postgresql://:***@host/db"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me&password=***"),
        ("postgresql://host:5432/db?PassWord=sec@ret&user=me", "postgresql://host:5432/db?PassWord=***&user=me"),
        ("postgresql://host/db?sslpassword=secret&port=1", "postgresql://host/db?sslpassword=***&port=1"),
        ("mysql://me:secret@host/db?passwd=secret", "mysql://me:***@host/db?passwd=***"),
        ("tracking.uri=postgresql://me:secret@host/db", "tracking.uri=postgresql://me:***@host/db"),
        ("http://127.0.0.1:5000/path", "http://127.0.0.1:5000/path"),
        ("http://me@host:5000", "http://me@host:5000"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_an_address_is_shown_without_its_password_and_else_whole(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml", [])


def test_the_installed_stack_fits() -> None:
    check_stack()


@pytest.mark.parametrize(
    ("torch", "fbgemm", "told"),
    [
        ("2.13.0", "1.7.0", "torch 2.13.0 needs fbgemm-gpu-cpu 1.8, but there is fbgemm-gpu-cpu 1.7.0"),
        ("2.11.0+cu130", "1.8.0", "torch 2.11.0+cu130 needs fbgemm-gpu-cpu 1.6, but there is fbgemm-gpu-cpu 1.8.0"),
        ("2.9.0", "1.8.0", "torch 2.9.0 is not supported"),
    ],
)
def test_versions_that_do_not_fit_are_one_clear_line(tmp_path: Path, torch: str, fbgemm: str, told: str) -> None:
    for name, version in (("torch", torch), ("fbgemm-gpu-cpu", fbgemm)):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    # a real process, in which these stand before the installed ones
    answer = subprocess.run(
        [sys.executable, "-m", "training", "promote", "models:/x/1"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert told in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "Traceback" not in answer.stderr
