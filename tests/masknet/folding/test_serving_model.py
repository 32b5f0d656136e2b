"""The whole model for inference gives the trained model's logits, whatever its fields are.

Legend: B rows, d embedding width.
"""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from masknet.config import MaskNetConfig
from masknet.model import MaskNet, Table
from masknet.serving_model import ServingModel
from masknet.values import ValueField

B, DIM = 30, 4
TABLES = (
    Table(name="user", features=("user",), rows=11, pooling="sum"),
    Table(name="tags", features=("tags",), rows=7, pooling="mean"),
    Table(name="item", features=("item", "last_item"), rows=13, pooling="sum"),
    Table(name="age", features=("age",), rows=5, pooling="sum"),
)
FIELDS = ("tags", "user", ValueField(name="price"), "item", "age", ValueField(name="rate", normalize=True), "last_item")
SINGLE = ("user", "item", "last_item", "age")


def a_model(fields: tuple[str | ValueField, ...], tables: tuple[Table, ...], norm: str) -> MaskNet:
    torch.manual_seed(2)
    config = MaskNetConfig(embedding_dim=DIM, blocks=2, block_width=8, head=(5,), embedding_norm=norm)
    model = MaskNet(config, tables, fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def inputs(tables: tuple[Table, ...], num_values: int) -> tuple[KeyedJaggedTensor, torch.Tensor, torch.Tensor]:
    """Rows of lists with 0 to 3 tags, and of one id for every other field."""
    generator = torch.Generator().manual_seed(4)
    names, values, lengths = [], [], []
    for table in tables:
        for name in table.features:
            length = torch.randint(0, 4, (B,), generator=generator) if name == "tags" else torch.ones(B).long()
            names.append(name)
            lengths.append(length.int())
            values.append(torch.randint(0, table.rows, (int(length.sum()),), generator=generator))
    missing = (torch.rand(B, num_values, generator=generator) < 0.3).float()
    numbers = torch.randn(B, num_values, generator=generator) * (1 - missing)
    return KeyedJaggedTensor(names, torch.cat(values), lengths=torch.cat(lengths)), numbers, missing


@pytest.mark.parametrize("single", [(), ("age",), SINGLE], ids=len)
@pytest.mark.parametrize("norm", ["layer", "rms", "dyt", "batch", "seednorm", "conditional", "none"])
def test_logits_are_the_trained_models(norm: str, single: tuple[str, ...]) -> None:
    model = a_model(FIELDS, TABLES, norm)
    serving, given = ServingModel(model, single), inputs(TABLES, 2)
    with torch.no_grad():
        expected, found = model(*given), serving(*given)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # both end in fp32: half a unit of 1 to 8
    assert serving.single == [
        name for name in ("user", "age") if name in single and norm not in ("conditional", "none")
    ]


@pytest.mark.parametrize("norm", ["layer", "dyt"])
def test_rows_hold_the_embedding_and_its_norm(norm: str) -> None:
    tables = (TABLES[3], TABLES[0])
    model = a_model(("user", "age"), tables, norm)
    serving = ServingModel(model, ("user", "age"))
    assert serving.embeddings is None
    assert serving.rows_R2d.shape == (5 + 11, 2 * DIM)
    weights = [model.embeddings.embedding_bags[key].weight.detach() for key in ("t000", "t001")]
    torch.testing.assert_close(serving.rows_R2d[:, :DIM], torch.cat(weights[::-1]), rtol=0, atol=0)
    # times γ, which is in the masks by now, and the shift taken as it is, it is LN_EMB of the row
    norm_FD = model.network.embedding_norm
    for weight, field, rows in ((weights[0], 1, slice(11, 16)), (weights[1], 0, slice(0, 11))):
        emb_RFd = weight.new_zeros(len(weight), 2, DIM)
        emb_RFd[:, field] = weight
        with torch.no_grad():
            expected = norm_FD(emb_RFd)[:, field] / norm_FD.weight[field]
        torch.testing.assert_close(serving.rows_R2d[rows, DIM:], expected, rtol=1e-5, atol=1e-5)
    given = inputs(tables, 0)
    with torch.no_grad():
        torch.testing.assert_close(serving(*given), model(*given), rtol=0, atol=2e-5)


def one_id_each(ids: list[int], lengths: list[int]) -> tuple[KeyedJaggedTensor, torch.Tensor, torch.Tensor]:
    count = torch.tensor([1, 1, *lengths], dtype=torch.int32)
    nothing = torch.empty(2, 0)
    return KeyedJaggedTensor(["user", "age"], torch.tensor([0, 1, *ids]), lengths=count), nothing, nothing


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([4, 5], [1, 1], "not in its table"),
        ([-1, 0], [1, 1], "not in its table"),
        ([1, 2], [2, 0], "age must have one id in each of the 2 rows"),
        ([1, 2, 3], [2, 1], "age must have one id in each of the 2 rows"),
    ],
)
def test_ids_that_cannot_be(ids: list[int], lengths: list[int], message: str) -> None:
    serving = ServingModel(a_model(("user", "age"), (TABLES[0], TABLES[3]), "layer"), ("user", "age"))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        serving(*one_id_each(ids, lengths))
    with torch.no_grad():
        assert serving(*one_id_each([4, 0], [1, 1])).isfinite().all()


def test_single_fields_must_have_ids() -> None:
    with pytest.raises(ValueError, match="there are no ids of price, shoe"):
        ServingModel(a_model(FIELDS, TABLES, "layer"), ("user", "price", "shoe"))


@pytest.mark.parametrize("single", [(), ("user", "age")], ids=len)
def test_it_asks_for_no_gradients_and_takes_no_rows(single: tuple[str, ...]) -> None:
    serving = ServingModel(a_model(FIELDS, TABLES, "layer"), single)
    assert not serving(*inputs(TABLES, 2)).requires_grad


def test_norms_come_from_the_tables() -> None:
    serving, given = ServingModel(a_model(FIELDS, TABLES, "layer"), ("user", "age")), inputs(TABLES, 2)
    before = serving(*given)
    serving.rows_R2d[:, DIM:] += 1.0
    assert (serving(*given) - before).abs().min() > 1e-4
