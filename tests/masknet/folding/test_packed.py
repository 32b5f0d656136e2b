"""Linear layers by oneDNN: torch's values, with NaN and infinities, after every change of their weights.

Legend: N rows; 40 rows of 100 inputs and 90 outputs are enough work for oneDNN to be taken.
"""

import copy
import threading

import pytest
import torch

from masknet.config import MaskNetConfig
from masknet.folding import ServingNetwork, fold
from masknet.folding.packed import PackedLinear
from masknet.networks import build_network

N, INPUTS, OUTPUTS = 40, 100, 90
# sums of 100 products of about 1, each rounded to 6e-8, in another order, and multiplied once more
CLOSE = {"rtol": 1e-6, "atol": 2e-5}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def a_layer(bias: bool = True) -> PackedLinear:
    return PackedLinear(normal(OUTPUTS, INPUTS, seed=1), normal(OUTPUTS, seed=2) if bias else None)


def exact(layer: PackedLinear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    bias = layer.bias if bias is None else bias
    out = x.double() @ layer.weight.double().t()
    return out if bias is None else out + bias.double()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("rows", [1, 2, N])
@pytest.mark.parametrize("bias", [True, False])
def test_values(bias: bool, rows: int) -> None:
    layer, x, times = a_layer(bias), normal(rows, INPUTS), normal(rows, OUTPUTS, seed=3)
    with torch.no_grad():
        assert layer.uses_onednn(x) == (rows == N)
        close(layer(x), exact(layer, x))
        close(layer(x, "relu"), exact(layer, x).relu())
        close(layer(x, times=times), exact(layer, x) * times)
        close(layer(x, times=times[:1]), exact(layer, x) * times[:1])
        other = normal(OUTPUTS, seed=4)
        close(layer(x, "relu", bias=other), exact(layer, x, other).relu())
        wide = normal(rows, 3 * INPUTS)
        close(layer(wide[:, 7 : 7 + INPUTS]), exact(layer, wide[:, 7 : 7 + INPUTS]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [1, N])
def test_what_is_not_finite_stays_so(rows: int, bad: float) -> None:
    layer, x = a_layer(), normal(rows, INPUTS)
    x[-1, 5] = bad
    with torch.no_grad():
        close(layer(x, "relu"), exact(layer, x).relu())
        close(layer(x, times=x[:, :OUTPUTS]), exact(layer, x) * x[:, :OUTPUTS].double())
        layer.weight[3, 4] = bad
        fresh = copy.deepcopy(layer)
        close(fresh(x, "relu"), exact(fresh, x).relu())


def test_weights_may_change() -> None:
    layer, x = a_layer(), normal(N, INPUTS)
    with torch.no_grad():
        layer(x)
        layer.load_state_dict({"weight": normal(OUTPUTS, INPUTS, seed=5), "bias": normal(OUTPUTS, seed=6)})
        close(layer(x), exact(layer, x))
        assert layer.double()(x.double()).dtype == torch.float64
        close(layer.float()(x), exact(layer, x))
        layer.weight.mul_(2)
        close(layer(x), exact(layer, x))
        twin = copy.deepcopy(layer)
        layer.load_state_dict({"weight": torch.zeros(OUTPUTS, INPUTS), "bias": torch.zeros(OUTPUTS)})
        assert not layer(x).any()
        close(twin(x), exact(twin, x))


# Whole networks, wide enough for oneDNN.


def a_network(kind: str, hidden_norm: str = "layer") -> torch.nn.Module:
    torch.manual_seed(3)
    head = (64,) if kind == "parallel" else ()
    config = MaskNetConfig(kind=kind, embedding_dim=16, blocks=3, block_width=128, head=head, hidden_norm=hidden_norm)
    network = build_network(config, 10).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return network


def embeddings(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all fields, of the context's four, and of the candidates' six."""
    emb = normal(rows, 10, 16)
    emb[:, :4] = emb[0, :4].clone()
    return emb, emb[:1, :4].flatten(1), emb[:, 4:].flatten(1)


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("hidden_norm", ["layer", "batch", "seednorm", "dyt"])
@pytest.mark.parametrize("kind", ["parallel", "serial"])
def test_networks(kind: str, hidden_norm: str, rows: int) -> None:
    network = a_network(kind, hidden_norm)
    emb, context, candidates = embeddings(rows)
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(emb.double())
        folded = fold(network, range(4))
        whole, apart = fold(network)(torch.empty(1, 0), emb.flatten(1)), folded(context, candidates)
    scale = float(expected.abs().max())
    for found in (whole, apart):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("kind", ["parallel", "serial"])
def test_a_broken_network_has_no_scores(kind: str, rows: int) -> None:
    emb, context, candidates = embeddings(rows)
    for name in ("blocks.1.mask.aggregate.weight", "blocks.1.linear.weight", "blocks.2.mask.project.bias"):
        network = a_network(kind)
        with torch.no_grad():
            network.get_parameter(name).fill_(torch.nan)
            assert network(emb).isnan().all()
            assert fold(network, range(4))(context, candidates).isnan().all()


@pytest.mark.parametrize("kind", ["parallel", "serial"])
def test_a_bad_row_is_alone(kind: str) -> None:
    network = a_network(kind)
    _, context, candidates = embeddings(200)
    folded = fold(network, range(4))
    with torch.no_grad():
        before = folded(context, candidates)
        candidates[17, 3] = torch.nan
        after = folded(context, candidates)
    assert after.isnan().nonzero().flatten().tolist() == [17]
    kept = torch.arange(200) != 17
    torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0)


def test_autocast() -> None:
    network = a_network("parallel")
    emb, context, candidates = embeddings(200)
    with torch.no_grad():
        expected, folded = network(emb), fold(network, range(4))
        with torch.autocast("cpu", torch.bfloat16):
            found = folded(context, candidates), fold(network)(torch.empty(1, 0), emb.flatten(1))
    for each in found:  # five layers in a row, each rounded to 2⁻⁹
        assert (each.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_gradients_are_refused() -> None:
    folded = fold(a_network("serial"), range(4))
    _, context, candidates = embeddings(5)
    assert not folded(context, candidates).requires_grad
    with pytest.raises(RuntimeError, match="gives no gradients"):
        folded(context, candidates.requires_grad_())


@pytest.mark.parametrize("kind", ["parallel", "serial"])
def test_copies_moves_and_new_weights(kind: str) -> None:
    _, context, candidates = embeddings(200)
    one, changed = fold(a_network(kind), range(4)), a_network(kind)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.mul_(-1)  # signs that pass the ReLU
        other = fold(changed, range(4))
        expected = other(context, candidates)
        one(context, candidates)
        one.load_state_dict(other.state_dict())
        torch.testing.assert_close(one(context, candidates), expected)
        moved = copy.deepcopy(one).double().float()
        torch.testing.assert_close(moved(context, candidates), expected)
    assert storage(moved) == storage(one)


def storage(network: ServingNetwork) -> int:
    """Bytes that the weights take, counted once where they are shared."""
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in network.buffers()}
    return sum(storages.values())


def test_requests_at_once() -> None:
    """Weights are laid out at the first request, which may be several."""
    folded = fold(a_network("parallel"), range(4))
    _, context, candidates = embeddings(200)
    with torch.no_grad():
        expected = copy.deepcopy(folded)(context, candidates)
    found: list[torch.Tensor] = []
    start = threading.Barrier(4)

    def request() -> None:
        start.wait()
        with torch.inference_mode():
            found.append(folded(context, candidates).clone())

    threads = [threading.Thread(target=request) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found:
        torch.testing.assert_close(each, expected)


def test_a_fold_can_be_loaded_into_whatever_mode_it_was_made_in() -> None:
    _, context, candidates = embeddings(200)
    with torch.inference_mode():
        made = fold(a_network("parallel"), range(4))
        made(context, candidates)
    network = a_network("parallel")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    new = fold(network, range(4))
    made.load_state_dict(new.state_dict())
    torch.testing.assert_close(made(context, candidates), new(context, candidates))


def test_moving_to_where_it_is_moves_nothing() -> None:
    folded = fold(a_network("parallel"), range(4))

    def places() -> dict[str, int]:
        return {name: buffer.data_ptr() for name, buffer in folded.named_buffers(remove_duplicate=False)}

    before = places()
    folded.to("cpu").float()
    assert places() == before
