"""What an ablation compares: the cells that the command line's words stand for."""

from pathlib import Path

import pytest

from features.errors import InputError
from training.ablation.cells import Cell, Grid, next_rate, numbers, rates, split_norms, with_rate
from training.config import Config, load_config

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "movielens.yaml"


@pytest.fixture
def movielens() -> Config:
    return load_config(CONFIG, [])


def cells_of(
    config: Config, norms: str = "layer", baseline: str = "layer", **grid: tuple[object, ...]
) -> dict[str, Cell]:
    made = Grid(norms=split_norms(norms), **grid).cells(config, baseline)  # type: ignore[arg-type]
    return {cell.name: cell for cell in made}


def test_commas_in_brackets_separate_parameters() -> None:
    assert split_norms("layer, power(group_scaling=4, alpha=0.95),none/rms") == (
        "layer",
        "power(group_scaling=4, alpha=0.95)",
        "none/rms",
    )
    assert split_norms("") == ()


@pytest.mark.parametrize(
    ("text", "embedding", "hidden", "activation"),
    [
        ("rms", {"name": "rms", "eps": 1e-5}, {"name": "rms", "eps": 1e-5}, "relu"),
        ("layer/none", {"name": "layer", "eps": 1e-5}, {"name": "none", "eps": 1e-5}, "relu"),
        ("none+selu", {"name": "none", "eps": 1e-5}, {"name": "none", "eps": 1e-5}, "selu"),
        (
            "layer(eps=0.1)/dyt(alpha=2)",
            {"name": "layer", "eps": 0.1},
            {"name": "dyt", "eps": 1e-5, "alpha": 2.0},
            "relu",
        ),
    ],
)
def test_a_norms_text(
    movielens: Config, text: str, embedding: dict[str, object], hidden: dict[str, object], activation: str
) -> None:
    model = cells_of(movielens, f"layer,{text}")[text].config.model
    assert model.embedding_norm.model_dump() == embedding
    assert model.hidden_norm.model_dump() == hidden
    assert model.activation == activation
    # a name alone means the norm's own defaults: not the eps of .1 that this configuration has at LN_EMB
    assert movielens.model.embedding_norm.eps == 0.1


def test_config_stands_for_the_configuration_as_it_is(movielens: Config) -> None:
    assert cells_of(movielens, "layer,config")["config"].config == movielens


def test_the_papers_ablations_start_from_the_baseline(movielens: Config) -> None:
    cells = cells_of(
        movielens,
        "rms,layer",
        "layer",
        without=("mask", "norm", "feed-forward"),
        blocks=(1, 3, 9),
        embedding_dims=(8, 16),
        ratios=(2.0,),
        vary=("model.dropout=0.1,0.2",),
    )
    assert list(cells) == [
        *("rms", "layer", "no mask", "no norm", "no feed-forward", "model.blocks=1", "model.blocks=9"),
        *("model.embedding_dim=8", "model.reduction_ratio=2.0", "model.dropout=0.1", "model.dropout=0.2"),
    ]
    assert {cell.family for cell in cells.values()} == {
        *("normalization", "without", "model.blocks", "model.embedding_dim", "model.reduction_ratio", "model.dropout")
    }
    base = cells["layer"].config.model
    assert cells["model.blocks=9"].config.model == base.model_copy(update={"blocks": 9})
    assert cells["no mask"].config.model == base.model_copy(update={"mask": False})
    assert not cells["no feed-forward"].config.model.feed_forward
    assert cells["no norm"].config.model.embedding_norm.name == "none"
    assert cells["model.dropout=0.2"].config.model.dropout == 0.2


def test_placements_are_of_a_residual_network(movielens: Config) -> None:
    cells = cells_of(movielens, "layer,rms", placements=("pre", "peri", "none"))
    names = ["layer pre", "rms pre", "layer peri", "rms peri", "layer none", "rms none"]
    assert list(cells) == ["layer", "rms", *names]
    model = cells["rms peri"].config.model
    assert (model.kind, model.placement, model.hidden_norm.name, model.head) == ("residual_serial", "peri", "rms", ())
    bare = cells["rms none"].config.model
    assert (bare.embedding_norm.name, bare.hidden_norm.name, bare.placement) == ("rms", "none", "none")


def test_a_placement_can_be_the_baseline(movielens: Config) -> None:
    cells = cells_of(movielens, "layer", "layer pre", placements=("pre",), blocks=(5,))
    assert cells["model.blocks=5"].config.model == cells["layer pre"].config.model.model_copy(update={"blocks": 5})


def test_values_of_any_key_are_yaml(movielens: Config) -> None:
    cells = cells_of(movielens, vary=("model.head=[64, 32],[8]",))
    assert [cell.config.model.head for cell in cells.values()] == [(64,), (64, 32), (8,)]


@pytest.mark.parametrize(
    ("norms", "grid", "told"),
    [
        ("layer,batchnorm", {}, "cell batchnorm: model.embedding_norm.name: 'batchnorm' is no normalization"),
        ("layer,crms", {}, "with a ReLU between, as in a MaskBlock, that is wrong"),
        ("layer,a/b/c", {}, "more than two slots"),
        ("layer,power(", {}, "not of the form"),
        ("layer,dyt(alfa=1)", {}, "alfa: unknown key; dyt has eps, alpha"),
        ("rms", {}, "--baseline layer is no cell; there are rms"),
        ("layer", {"without": ("masks",)}, "--without masks is none of mask, norm, feed-forward"),
        ("layer", {"vary": ("model.blocks",)}, "not of the form"),
        ("layer", {"vary": ("model.blcks=1",)}, "model.blcks: unknown key"),
        ("layer", {"vary": ("modle.blocks=1",)}, "only keys of model, optimizer and train differ between cells"),
        ("layer", {"vary": ("model.nrom.eps=1",)}, "model.nrom: unknown key"),
        ("layer", {"vary": ("train.seed=3,4",)}, "--vary train.seed: it is the same for all cells"),
        ("layer", {"vary": ("train.epochs=[",)}, "is not YAML"),
        ("layer,power(alpha=[)", {}, "is not YAML"),
        ("layer,power(name=rms)", {}, "name is no parameter"),
        ("layer", {"placements": ("sideways",)}, "cell layer sideways: model.placement"),
        ("layer,evonorm_s0", {"placements": ("pre",)}, "evonorm_s0 stands for a norm and the activation"),
        ("layer", {"blocks": (0,)}, "cell model.blocks=0: model.blocks"),
    ],
)
def test_a_mistake_names_the_cell_and_the_rule(
    movielens: Config, norms: str, grid: dict[str, tuple[object, ...]], told: str
) -> None:
    with pytest.raises(InputError) as error:
        cells_of(movielens, norms, **grid)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_of_an_option() -> None:
    assert numbers("--blocks", "1, 3", int) == (1, 3)
    with pytest.raises(InputError, match="--blocks '1,two' is no list of numbers"):
        numbers("--blocks", "1,two", int)


def test_rates_are_a_factor_of_3_apart_around_the_configured_one(movielens: Config) -> None:
    assert rates(movielens, 3) == [1e-4, 3e-4, 9e-4]
    assert rates(movielens, 1) == [3e-4]
    assert (next_rate(3e-4, up=True), next_rate(3e-4, up=False)) == (9e-4, 1e-4)
    changed = with_rate(movielens, 1e-4, 7)
    assert (changed.optimizer.dense.lr, changed.train.seed) == (1e-4, 7)
    assert changed.model == movielens.model
