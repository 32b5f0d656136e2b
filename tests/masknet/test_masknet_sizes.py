"""Parameter counts against closed forms and published totals: a wrong MaskNet trains, but counts differently."""

from itertools import pairwise, product

import pytest
from torch import nn

from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table
from masknet.networks import build_network

NORMS = ("layer", "rms", "none")  # those that the reference here knows


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def closed_form(config: MaskNetConfig, num_fields: int) -> int:
    """Parameters of a network: masks and head with biases, W without, a norm's affine 2n (layer), n (rms) or 0."""
    affine_size = {"layer": 2, "rms": 1, "none": 0}
    big, h, k = num_fields * config.embedding_dim, config.block_width, config.blocks

    def block(z: int) -> int:
        t = int(config.reduction_ratio * z)
        return (big * t + t) + (t * z + z) + z * h + affine_size[config.hidden_norm.name] * h

    total = affine_size[config.embedding_norm.name] * big
    if config.kind == "serial":
        return total + block(big) + (k - 1) * block(h) + h + 1
    widths = [k * h, *config.head, 1]
    return total + k * block(big) + sum((a + 1) * b for a, b in pairwise(widths))


@pytest.mark.parametrize(("embedding", "hidden"), list(product(NORMS, NORMS)))
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("kind", "head"), [("serial", []), ("parallel", []), ("parallel", [4, 6])])
def test_parameter_count(kind: str, blocks: int, head: list[int], embedding: str, hidden: str) -> None:
    values = {"kind": kind, "blocks": blocks, "head": head, "embedding_norm": embedding, "hidden_norm": hidden}
    sizes = {"embedding_dim": 5, "block_width": 7, "reduction_ratio": 1.3}
    config = MaskNetConfig.model_validate({**values, **sizes})
    assert count(build_network(config, 3)) == closed_form(config, 3)


SERIAL = {"kind": "serial", "head": [], "embedding_dim": 10, "blocks": 3, "block_width": 400}
FRAPPE = {"embedding_dim": 10, "blocks": 3, "block_width": 50, "head": [400, 400, 400], "embedding_norm": "none"}
MOVIELENS = {**SERIAL, "reduction_ratio": 4, "embedding_norm": "none"}
AVAZU = {**SERIAL, "reduction_ratio": 2}


@pytest.mark.parametrize(
    ("values", "num_fields", "rows", "network", "in_all"),
    [
        (FRAPPE, 10, 5_389, 517_801, 571_691),
        # of the other two the rows are not published: they are what the two published totals leave for tables
        (MOVIELENS, 3, 90_239, 1_722_151, 2_624_541),
        (AVAZU, 22, 1_298_599, 1_599_901, 14_585_891),
    ],
    ids=["Frappe", "MovielensLatest", "Avazu_x1"],
)
def test_published_sizes(values: dict[str, object], num_fields: int, rows: int, network: int, in_all: int) -> None:
    config = MaskNetConfig.model_validate(values)
    sizes = [1] * (num_fields - 1) + [rows - num_fields + 1]
    names = tuple(f"field{i}" for i in range(num_fields))
    tables = tuple(
        Table(name=name, features=(name,), rows=size, pooling="sum") for name, size in zip(names, sizes, strict=True)
    )
    model = MaskNet(config, tables, names, device="meta")
    assert closed_form(config, num_fields) == network
    assert count(model.network) == network
    assert count(model) == in_all
