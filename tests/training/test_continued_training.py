"""Training that goes on from a model: as it is, of its affines only, and to be rid of its norms."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from features.dataset import LABEL, PreparedDataset
from features.errors import InputError
from features.metrics import auc
from features.pipeline import FeaturePipeline
from features.prepare import prepare
from features.schema import Schema
from features.splits import SplitRule
from masknet.networks import PartialNorm
from masknet.norms.affine import AffineOnly
from masknet.norms.base import Norm
from masknet.norms.none import NoNorm
from masknet.removal import begin_removal
from serving.bundle import Bundle, load_bundle, write_bundle
from serving.members import Member
from serving.scorer import Scorer
from training import train as train_module
from training.cli import app
from training.config import Config, load_config
from training.fit.starting import Start, Weights, build_model, without_norms
from training.train import train

ROOT = Path(__file__).parent.parent.parent
QUIET = Console(quiet=True)
SHAPE = ["model.embedding_dim=4", "model.block_width=16", "model.head=[8]", "model.blocks=2"]
RATES = ["optimizer.sparse={name: rowwise_adagrad, lr: 0.1}", "optimizer.dense.lr=0.005"]
# too small to change an fp32 weight, and of one that is 0 it makes some 1e-30
NO_RATES = ["optimizer.sparse={name: rowwise_adagrad, lr: 1.0e-30}", "optimizer.dense.lr=1.0e-30"]

State = dict[str, torch.Tensor]


def has_norms(network: nn.Module) -> bool:
    """Whether anything but affines and nothing is left in the norms' places."""
    return any(isinstance(m, Norm) and not isinstance(m, AffineOnly | NoNorm | PartialNorm) for m in network.modules())


def planted(home: Path, values: int = 8, seed: int = 0, pipeline: FeaturePipeline | None = None) -> Path:
    """Clicks that depend on a product of two fields, and on a number."""
    random = np.random.default_rng(seed)
    a_N, b_N, x_N = random.integers(0, values, 6000), random.integers(0, values, 6000), random.normal(size=6000)
    click_N = random.random(6000) < np.where(((a_N + b_N) % 2 == 0) ^ (x_N > 1), 0.9, 0.1)
    pd.DataFrame({"a": a_N, "b": b_N, "x": x_N, "click": click_N.astype(int)}).to_parquet(home / "rows.parquet")
    fields = [{"name": name, "type": "categorical"} for name in "ab"]
    fields += [{"name": "x", "type": "numeric", "encoder": "standard"}]
    schema = Schema.model_validate({"name": "planted", "label": {"column": "click"}, "fields": fields})
    source = {"input": [str(home / "rows.parquet")]}
    prepare(schema, source, home / "data", split=SplitRule.parse("random:0.8,0.1,0.1"), pipeline=pipeline)
    return home / "data"


@pytest.fixture(scope="module")
def planted_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def planted_set(planted_data: Path) -> PreparedDataset:
    return PreparedDataset.open(planted_data)


def config_file(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text("experiment: planted\ntracking: {registered_model: planted}\n")
    return path


def small(folder: Path, *overrides: str) -> Config:
    return load_config(config_file(folder), [*SHAPE, *RATES, "train.batch_size=256", *overrides])


@pytest.fixture(scope="module")
def home(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model to start from is trained; MLflow puts its artifacts below the working directory."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home: Path, planted_data: Path) -> Bundle:
    """A trained model with layer norms, in parallel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        result = train(small(home, "train.epochs=4"), planted_data, home / "out", QUIET)
    assert result is not None
    assert result["metrics"]["test"]["auc"] > 0.85
    return load_bundle(Path(result["bundle"]))


@pytest.fixture(autouse=True)
def _at_home(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def untrained(mine: Config, dataset: PreparedDataset, out: Path) -> Bundle:
    """A bundle of a configuration's model as it starts, but for statistics and affines of one step at random."""
    torch.manual_seed(0)
    model = build_model(mine.model, dataset)
    model.network.train()(torch.randn(64, 3, 4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "norm" in name:
                parameter.uniform_(-1.5, 1.5, generator=generator)
    return write_bundle(
        out,
        name="untrained",
        config=mine.model,
        schema=dataset.schema,
        pipeline=dataset.pipeline,
        members=[Member.of(model)],
        sampling_rate=1.0,
        run_id=None,
        evaluate=lambda scorer: {},
    )


def weights_of(bundle: Path) -> State:
    """A bundle's weights as they lie on disk; tables by their files."""
    member = bundle / "members" / "00"
    tables = {path.name: load_file(path)["weight"] for path in sorted((member / "embeddings").iterdir())}
    return {**load_file(member / "network.safetensors"), **tables}


def scores(scorer: Scorer, dataset: PreparedDataset) -> np.ndarray:
    return scorer.score_encoded(dataset.split("test"))


# --from.


def test_training_starts_at_the_models_weights(first: Bundle, planted_data: Path, tmp_path: Path) -> None:
    """At a rate of next to nothing it also ends there. Another dropout, or start of embeddings, is no other shape."""
    free = ["model.dropout=0.1", "model.embedding_dropout=0.1", "model.embedding_init=0.5"]
    mine = small(tmp_path, *NO_RATES, "train.epochs=1", "train.seed=9", *free)
    result = train(mine, planted_data, tmp_path / "out", QUIET, Start(first))
    assert result is not None
    before, after = weights_of(first.path), weights_of(Path(result["bundle"]))
    assert before.keys() == after.keys()
    assert {"000.safetensors", "001.safetensors", "values.scale", "logit.bias"} <= before.keys()
    for name, weight in before.items():  # 19 steps of 1e-30 each
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-28, msg=name)
    assert result["metrics"]["test"] == pytest.approx(first.manifest["metrics"]["test"])
    assert load_bundle(Path(result["bundle"])).config.dropout == 0.1


def test_training_goes_on_with_newer_rows(first: Bundle, tmp_path: Path) -> None:
    data = planted(tmp_path, seed=1, pipeline=first.pipeline)
    result = train(small(tmp_path, "train.epochs=1"), data, tmp_path / "out", QUIET, Start(first))
    assert result is not None
    before, after = weights_of(first.path), weights_of(Path(result["bundle"]))
    same = {name for name, weight in before.items() if torch.equal(after[name], weight)}
    assert same == {"values.missing"}  # no value is missing
    # what was learned is still there; the best possible is .9, give or take .02 on 600 rows, and chance .5
    assert result["metrics"]["test"]["auc"] > 0.85


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.block_width=8", r"model\.block_width is not that of model planted \(16\), where training starts"),
        ("model.hidden_norm=rms", r"model\.hidden_norm is not that of model planted"),
        ("model.hidden_norm={name: layer, eps: 0.001}", r"model\.hidden_norm is not that of model planted"),
    ],
)
def test_another_shape_is_refused(
    first: Bundle, planted_data: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(small(tmp_path, override), planted_data, tmp_path / "out", QUIET, Start(first))
    assert not (tmp_path / "out").exists()


def test_a_prior_that_pulls_to_0_is_refused(first: Bundle, planted_data: Path, tmp_path: Path) -> None:
    config = small(tmp_path, "optimizer.embedding_prior=1")
    with pytest.raises(InputError, match=r"optimizer\.embedding_prior .* set it to 0"):
        train(config, planted_data, tmp_path / "out", QUIET, Start(first))


def test_data_of_another_pipeline_is_refused(first: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"another pipeline than that of model planted.* --pipeline"):
        train(small(tmp_path), planted(tmp_path, values=9), tmp_path / "out", QUIET, Start(first))


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "training", "train", str(config_file(home)), *words]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_the_command_line_refuses_in_one_line(first: Bundle, planted_data: Path, tmp_path: Path) -> None:
    settings = [word for setting in (*SHAPE, "model.block_width=8") for word in ("--set", setting)]
    answer = run(tmp_path, "--data", str(planted_data), "--from", str(first.path), *settings)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert len(answer.stderr.splitlines()) == 1
    assert "model.block_width is not that of model planted (16)" in answer.stderr


# Only affines.


@pytest.mark.parametrize("sparse", ["sgd", "adagrad", "rowwise_adagrad"])
def test_only_affines_and_the_logit_are_trained(first: Bundle, planted_data: Path, tmp_path: Path, sparse: str) -> None:
    settings = ["train.train_only_affine=true", "train.epochs=1", f"optimizer.sparse={{name: {sparse}, lr: 0.5}}"]
    mine = small(tmp_path, *settings, "optimizer.dense.weight_decay=0.1")
    result = train(mine, planted_data, tmp_path / "out", QUIET, Start(first))
    assert result is not None
    before, after = weights_of(first.path), weights_of(Path(result["bundle"]))
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    norms = [*(f"blocks.{k}.norm" for k in range(2)), "embedding_norm.norm", "logit"]
    assert changed == {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}


def test_only_affines_with_both_other_switches(first: Bundle, planted_data: Path, tmp_path: Path) -> None:
    """SCALE has nothing but the last layer and affines then, and projection nothing to bring back."""
    dense = "optimizer.dense={name: scale, lr: 0.005, weight_decay: 0.1, normalize_and_project: true}"
    mine = small(tmp_path, "train.train_only_affine=true", "train.epochs=1", dense)
    result = train(mine, planted_data, tmp_path / "out", QUIET, Start(first))
    assert result is not None
    before, after = weights_of(first.path), weights_of(Path(result["bundle"]))
    assert all(
        torch.equal(after[name], before[name]) == ("norm" not in name and "logit" not in name) for name in before
    )


def test_a_fresh_model_is_not_trained_by_its_affines(planted_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.train_only_affine .* give one with --from"):
        train(small(tmp_path, "train.train_only_affine=true"), planted_data, tmp_path / "out", QUIET)


def test_a_model_without_affines_is_refused(planted_data: Path, planted_set: PreparedDataset, tmp_path: Path) -> None:
    mine = small(tmp_path, "train.train_only_affine=true", "model.hidden_norm=none", "model.embedding_norm=none")
    start = Start(untrained(mine, planted_set, tmp_path / "start"))
    with pytest.raises(InputError, match="this model's norms have no parameters to train"):
        train(mine, planted_data, tmp_path / "out", QUIET, start)


# --remove-norms.


def captured(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """The fine-tuned weights that training is about to fold."""
    kept: list[Weights] = []

    def keep(model: Any, dataset: PreparedDataset, weights: Weights) -> Any:
        kept.append(weights)
        return without_norms(model, dataset, weights)

    monkeypatch.setattr(train_module, "without_norms", keep)
    return kept


def test_norms_are_removed(
    first: Bundle, planted_data: Path, planted_set: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = captured(monkeypatch)
    mine = small(tmp_path, "train.epochs=5")
    result = train(mine, planted_data, tmp_path / "out", QUIET, Start(first, remove_norms=True))
    assert result is not None
    assert result["best_epoch"] >= 3  # .6 of five epochs: all norms are frozen then
    bundle = load_bundle(Path(result["bundle"]))
    assert (bundle.config.hidden_norm.name, bundle.config.embedding_norm.name) == ("affine", "affine")
    assert bundle.config.embedding_norm.parameters["centred"]
    assert not has_norms(bundle.scorer.models[0].network)
    # the network before it was folded, put together by hand
    model = build_model(mine.model, planted_set)
    begin_removal(model.network, mine.model)
    model.load_weights(kept[0].network, [kept[0].tables[name] for name in model.table_names])
    assert has_norms(model.network)
    unfolded = Scorer(planted_set.pipeline, [model], 1.0)
    # fp32: sums in another order, scores below 1
    np.testing.assert_allclose(scores(bundle.scorer, planted_set), scores(unfolded, planted_set), rtol=0, atol=1e-6)
    found = auc(planted_set.split("test")[LABEL].to_numpy(), scores(bundle.scorer, planted_set))
    assert found == pytest.approx(result["metrics"]["test"]["auc"])
    # what removal may cost: a tenth of the way from chance to the best possible; 600 rows alone make it ± .02
    assert found == pytest.approx(first.manifest["metrics"]["test"]["auc"], abs=0.03)
    saved = load_config(tmp_path / "out" / "config.yaml", [])
    assert saved.model.hidden_norm.name == "layer"  # the configuration of the run, not of what came out


@pytest.mark.long
def test_norms_are_removed_by_two_processes(
    first: Bundle, planted_data: Path, planted_set: PreparedDataset, tmp_path: Path
) -> None:
    settings = [*SHAPE, *RATES, "train.epochs=2", "train.batch_size=256"]
    words = [word for setting in settings for word in ("--set", setting)]
    answer = run(
        tmp_path,
        *("--data", str(planted_data), "--from", str(first.path), "--remove-norms"),
        *("--out", "out", "--nproc", "2", "--json", *words),
    )
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["best_epoch"] == 2
    bundle = load_bundle(tmp_path / result["bundle"])
    assert not has_norms(bundle.scorer.models[0].network)
    before, after = (scores(each.scorer, planted_set) for each in (first, bundle))
    label_N = planted_set.split("test")[LABEL].to_numpy()
    assert auc(label_N, after) == pytest.approx(auc(label_N, before), abs=0.03)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.hidden_norm=dyt"], "--remove-norms: hidden_norm dyt has no divisor that could be frozen"),
        (["model.kind=residual_serial", "model.head=[]"], "--remove-norms: norms are removed from serial and parallel"),
        (["model.hidden_norm={name: power, group_scaling: 2}"], "--remove-norms: hidden_norm power with group_scaling"),
    ],
    ids=["dyt", "residual_serial", "group_scaling"],
)
def test_norms_that_cannot_be_removed(
    planted_data: Path, planted_set: PreparedDataset, tmp_path: Path, overrides: list[str], reason: str
) -> None:
    mine = small(tmp_path, *overrides)
    start = Start(untrained(mine, planted_set, tmp_path / "start"), remove_norms=True)
    with pytest.raises(InputError, match=reason):
        train(mine, planted_data, tmp_path / "out", QUIET, start)


def test_there_must_be_norms_to_begin_with(planted_data: Path, tmp_path: Path) -> None:
    words = ["train", str(config_file(tmp_path)), "--data", str(planted_data), "--remove-norms"]
    with pytest.raises(InputError, match="--remove-norms fine-tunes a trained model: give it with --from"):
        app(words, standalone_mode=False)


@pytest.mark.parametrize("name", ["batch", "power_v", "power", "unified", "affine"])
def test_running_norms_go_without_a_fine_tune(planted_set: PreparedDataset, tmp_path: Path, name: str) -> None:
    mine = small(
        tmp_path, f"model.hidden_norm={name}", f"model.embedding_norm={name}", "model.weight_standardization=true"
    )
    bundle = untrained(mine, planted_set, tmp_path / "start")
    shape, weights = without_norms(mine.model, planted_set, Start(bundle).weights)
    assert (shape.hidden_norm.name, shape.embedding_norm.name) == ("affine", "affine")
    assert not shape.embedding_norm.parameters["centred"]
    model = build_model(shape, planted_set)
    model.load_weights(weights.network, [weights.tables[table] for table in model.table_names])
    assert not has_norms(model.network)
    expected = scores(bundle.scorer, planted_set)
    assert expected.std() > 0.003  # thousands of times the tolerance: fp32, sums in another order
    np.testing.assert_allclose(scores(Scorer(planted_set.pipeline, [model], 1.0), planted_set), expected, atol=1e-6)


@pytest.mark.parametrize("hidden", ["batch", "prepbn"])
def test_running_norms_are_removed_by_training(
    planted_data: Path, planted_set: PreparedDataset, tmp_path: Path, hidden: str
) -> None:
    """Also PRepBN's, which is no affine before .8 of training: of three epochs only the last will do."""
    mine = small(tmp_path, f"model.hidden_norm={hidden}", "train.epochs=3")
    start = Start(untrained(mine, planted_set, tmp_path / "start"), remove_norms=True)
    result = train(mine, planted_data, tmp_path / "out", QUIET, start)
    assert result is not None
    assert result["best_epoch"] in ({3} if hidden == "prepbn" else {2, 3})
    assert not has_norms(load_bundle(Path(result["bundle"])).scorer.models[0].network)
