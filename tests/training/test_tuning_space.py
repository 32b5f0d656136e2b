"""The space that `masknet tune` searches: what files may say, and that every draw is a configuration."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from features.errors import InputError
from training.config import Config, load_config
from training.tuning.space import DEFAULT, Space

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "movielens.yaml"


@pytest.fixture(scope="module")
def base() -> Config:
    return load_config(CONFIG, [])


def space_of(tmp_path: Path, base: Config, fixed: tuple[str, ...] = (), **ranges: Any) -> Space:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({key.replace("__", "."): value for key, value in ranges.items()}, sort_keys=False))
    return Space.load(path, base, list(fixed))


def draws(space: Space, count: int) -> list[tuple[optuna.Trial, Config]]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trials = [study.ask() for _ in range(count)]
    return [(trial, space.suggest(trial)) for trial in trials]


def test_every_draw_of_the_default_space_is_a_configuration(base: Config) -> None:
    space = Space.load(None, base, [])
    seen = draws(space, 300)
    for _, config in seen:
        assert Config.model_validate(config.model_dump(mode="json")) == config
        assert config.model.kind == "parallel" or config.model.head == ()
        assert 0.1 <= config.model.reduction_ratio <= 4
        assert config.train.seed == base.train.seed
        assert config.tracking == base.tracking
    assert {config.model.kind for _, config in seen} == {"parallel", "serial"}
    assert {config.model.blocks for _, config in seen} == {1, 2, 3, 4, 5}
    assert {(400, 400), (64,), ()} <= {config.model.head for _, config in seen if config.model.kind == "parallel"}
    assert {("layer", 1e-5), ("layer", 0.1), ("none", 1e-5)} <= {
        (config.model.embedding_norm.name, config.model.embedding_norm.eps) for _, config in seen
    }
    for trial, config in seen[:20]:
        assert space.of(trial.params) == config, "the stored parameters are the same configuration"


def test_the_default_space_holds_what_is_promised() -> None:
    searched = yaml.safe_load(DEFAULT.read_text())
    assert searched["model.reduction_ratio"] == {"low": 0.1, "high": 4.0, "log": True}
    assert searched.keys() >= {
        "model.kind",
        "model.blocks",
        "model.block_width",
        "model.head",
        "model.embedding_dim",
        "model.embedding_norm",
        "model.hidden_norm",
        "model.dropout",
        "optimizer.embedding_l2",
        "optimizer.dense.lr",
        "optimizer.sparse.lr",
        "train.batch_size",
    }


@pytest.mark.parametrize("path", sorted(CONFIG.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_first_trial_is_the_configuration(path: Path) -> None:
    base = load_config(path, [])
    space = Space.load(None, base, [])
    assert space.of(space.configured()) == base
    assert space.changed() == {}
    searched = yaml.safe_load(DEFAULT.read_text())
    assert space.plain()["model.embedding_norm"]["choices"] == searched["model.embedding_norm"]["choices"]


def test_what_is_configured_is_a_choice(tmp_path: Path) -> None:
    slot = {"name": "layer", "eps": 0.02}
    base = load_config(CONFIG, [f"model.embedding_norm={json.dumps(slot)}", "model.head=[24]", "model.blocks=2"])
    default = Space.load(None, base, [])
    assert default.of(default.configured()) == base
    assert {config.model.embedding_norm.eps for _, config in draws(default, 60)} == {1e-5, 0.01, 0.02, 0.1}
    space = space_of(
        tmp_path,
        base,
        model__embedding_norm={"choices": ["rms"]},
        model__blocks={"choices": [2, 4]},
        model__head={"choices": [[8], []], "when": {"model.kind": "serial"}},  # which it is not
    )
    assert space.plain()["model.embedding_norm"]["choices"] == ["rms", slot]
    assert space.plain()["model.blocks"]["choices"] == [2, 4]
    assert space.plain()["model.head"]["choices"] == [[8], []]
    assert space.of(space.configured()) == base
    assert {config.model.embedding_norm.eps for _, config in draws(space, 20)} == {1e-5, 0.02}


def test_the_configured_number_has_all_its_digits() -> None:
    base = load_config(CONFIG, ["optimizer.sparse.lr=0.0123456789"])
    space = Space.load(None, base, [])
    assert space.of(space.configured()) == base
    assert all(len(str(config.optimizer.sparse.lr).strip("0.")) <= 4 for _, config in draws(space, 50))


def test_the_nearest_of_what_a_space_has_not(tmp_path: Path, base: Config) -> None:
    space = space_of(
        tmp_path,
        base,
        model__dropout={"low": 0.0, "high": 0.3, "step": 0.15},  # configured: 0.5
        model__blocks={"low": 4, "high": 8, "step": 2},  # 3
        model__block_width={"low": 10, "high": 100, "step": 30},  # 64
        optimizer__dense__lr={"low": 1.0e-3, "high": 1.0e-2, "log": True},  # 3e-4
    )
    assert space.configured() == {
        "model.dropout": 0.3,
        "model.blocks": 4,
        "model.block_width": 70,
        "optimizer.dense.lr": 1e-3,
    }
    assert space.changed() == {
        "model.dropout": {"configured": 0.5, "first": 0.3},
        "model.blocks": {"configured": 3, "first": 4},
        "model.block_width": {"configured": 64, "first": 70},
        "optimizer.dense.lr": {"configured": 3e-4, "first": 1e-3},
    }


def test_a_key_that_does_not_apply_is_told_when_it_changes(tmp_path: Path, base: Config) -> None:
    heads = {"choices": [[8]], "when": {"model.kind": "serial"}, "otherwise": []}
    space = space_of(tmp_path, base, model__blocks=_WHOLE, model__head=heads)
    assert space.changed() == {"model.head": {"configured": [64], "first": []}}


def test_a_key_is_searched_only_where_it_matters(tmp_path: Path, base: Config) -> None:
    kinds = {"choices": ["parallel", "serial"]}
    heads = {"choices": [[8], [16]], "when": {"model.kind": "parallel"}, "otherwise": []}
    rates = {"low": 0.1, "high": 0.2, "when": {"model.kind": ["serial", "residual_serial"]}}
    space = space_of(tmp_path, base, model__kind=kinds, model__head=heads, model__dropout=rates)
    for trial, config in draws(space, 40):
        if config.model.kind == "parallel":
            assert list(config.model.head) == json.loads(trial.params["model.head"])
            assert config.model.dropout == base.model.dropout
            assert "model.dropout" not in trial.params
        else:
            assert config.model.head == ()
            assert "model.head" not in trial.params
            assert 0.1 <= config.model.dropout <= 0.2


def test_what_is_set_is_not_searched(tmp_path: Path) -> None:
    base = load_config(CONFIG, ["model.kind=serial", "model.head=[]"])
    kinds = {"choices": ["parallel", "serial"]}
    heads = {"choices": [[8], [16]], "when": {"model.kind": "parallel"}, "otherwise": []}
    space = space_of(tmp_path, base, fixed=("model.kind",), model__kind=kinds, model__head=heads, model__blocks=_WHOLE)
    assert {config.model.kind for _, config in draws(space, 10)} == {"serial"}
    assert space.configured() == {"model.blocks": 3}
    with pytest.raises(InputError, match="nothing is left to search"):
        space_of(tmp_path, base, fixed=("model",), model__kind=kinds)


_WHOLE = {"low": 1, "high": 3}


@pytest.mark.parametrize(
    ("ranges", "told"),
    [
        ({"model.block": _WHOLE}, "model.block: unknown key"),
        ({"model.blocks.more": _WHOLE}, "model.blocks.more: unknown key"),
        ({"experiment": {"choices": ["a"]}}, "experiment: only keys of model, optimizer, schedule and train"),
        ({"train.seed": _WHOLE}, "train.seed: a trial's luck"),
        ({"train.members": _WHOLE}, "train.members: a trial is one model; --ensemble"),
        ({"train.early_stop.metric": {"choices": ["auc"]}}, "train.early_stop.metric: that is --metric"),
        ({"model.blocks": {"low": 3, "high": 1}}, "model.blocks: low 3 must be below high 1"),
        ({"model.blocks": {"low": 0, "high": 3}}, "model.blocks: 0: Input should be greater than or equal to 1"),
        ({"model.blocks": {"low": 1.0, "high": 3.5}}, "model.blocks: 3.5: Input should be a valid integer"),
        ({"model.blocks": {"low": 1.0, "high": 3.0}}, "model.blocks: it takes whole numbers"),
        ({"model.blocks": {"low": 1}}, "model.blocks: there must be choices, or low and high"),
        ({"model.blocks": {"low": 1, "high": 4, "steps": 1}}, "model.blocks: steps: unknown key"),
        ({"model.blocks": {"low": 1, "high": 4, "step": 2}}, "model.blocks: from low 1 to high 4 is no whole number"),
        ({"model.blocks": {"low": 1, "high": 4, "step": 1, "log": True}}, "model.blocks: log and step do not go"),
        ({"model.blocks": {"low": "x", "high": 4}}, "model.blocks: low"),
        ({"model.blocks": [1, 2]}, "model.blocks: Input should be a valid dictionary"),
        ({"model.dropout": {"low": 0.0, "high": 0.5, "log": True}}, "model.dropout: log needs a low above 0"),
        ({"model.dropout": {"low": 0.0, "high": 1.0}}, "model.dropout: 1.0: Input should be less than 1"),
        ({"model.kind": {"choices": []}}, "model.kind: choices"),
        ({"model.kind": {"choices": ["parallel", "parallel"]}}, "model.kind: a choice is there twice"),
        ({"model.kind": {"choices": ["serial", "linear"]}}, "model.kind: linear: Input should be"),
        ({"model.kind": {"choices": ["serial"], "low": 1}}, "model.kind: choices stand alone"),
        ({"model.kind": {"choices": ["serial"], "otherwise": "serial"}}, "model.kind: otherwise needs a when"),
        ({"model.hidden_norm": {"choices": ["layer", "batchnorm"]}}, "model.hidden_norm: batchnorm: 'batchnorm' is no"),
        (
            {"model.hidden_norm": {"choices": ["layer"]}, "model.hidden_norm.eps": {"low": 0.1, "high": 1.0}},
            "model.hidden_norm and model.hidden_norm.eps: one is part of the other",
        ),
        ({"model.blocks": {**_WHOLE, "when": {"model.knd": "serial"}}}, "model.blocks: when: model.knd: unknown key"),
        (
            {"model.blocks": {**_WHOLE, "when": {"model.kind": "serial"}}, "model.kind": {"choices": ["serial"]}},
            "model.blocks: when: model.kind must stand further up",
        ),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, base: Config, ranges: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        space_of(tmp_path, base, **ranges)
    assert str(error.value).startswith(f"space {tmp_path / 'space.yaml'}: {told}")
    assert "\n" not in str(error.value)


def test_a_space_that_does_not_go_with_the_configuration_is_refused_at_once(tmp_path: Path) -> None:
    base = load_config(CONFIG, ["model.kind=residual_serial", "model.head=[]"])
    heads = {"choices": [[8]], "when": {"model.kind": "parallel"}, "otherwise": [16]}
    with pytest.raises(InputError, match=r"head must be \[\] for kind residual_serial"):
        space_of(tmp_path, base, model__head=heads)
