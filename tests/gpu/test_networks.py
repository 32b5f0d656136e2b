"""Whole networks through the kernels: trained, compiled, folded, and called by the graph runner.

Legend: B rows, N candidates, F fields, d embedding width.
"""

from typing import Any

import pytest
import torch
from torch.nn import functional

from masknet.folding import fold
from masknet.kernels import dispatch
from masknet.kernels.graphs import GraphRunner
from masknet.kernels.modes import Mode
from masknet.networks import Network
from tests.gpu.settings import CONTEXT, CUDA, DEVICE, embeddings, network_of, request_of
from training.bench.comparing import distance

# torch's, of the first product in a thread and of products in full precision
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
ROWS = 512 if CUDA else 6
NORMS: list[str | dict[str, Any]] = ["layer", "rms", "dyt", {"name": "power", "warmup_steps": 1}]


def losses(network: Network, mode: Mode, bf16: bool, steps: int = 5) -> list[float]:
    """Of steps of SGD on one batch."""
    emb, optimizer = embeddings(ROWS), torch.optim.SGD(network.parameters(), lr=0.05)
    label_B = (torch.arange(ROWS, device=DEVICE) % 2).float()
    seen = []
    for _ in range(steps):
        with dispatch.kernels(mode), torch.autocast(DEVICE, torch.bfloat16, bf16):
            logit_B = network.train()(emb)
        loss = functional.binary_cross_entropy_with_logits(logit_B.float(), label_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["parallel", "serial"])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_losses_of_training(norm: str | dict[str, Any], kind: str, bf16: bool) -> None:
    eager, fused = (losses(network_of(norm, kind), mode, bf16) for mode in ("eager", "fused"))
    assert eager[-1] < eager[0]
    # bf16 carries 8 bits, and eager rounds between norm, product and activation where kernels do not
    assert fused == pytest.approx(eager, rel=1e-2 if bf16 else 1e-4)


@pytest.mark.parametrize("norm", ["layer", "dyt"])
def test_a_compiled_network_is_one_graph_and_gives_the_same(norm: str) -> None:
    torch.compiler.reset()
    network, emb = network_of(norm), embeddings(ROWS).requires_grad_()
    backend = "inductor" if CUDA else "aot_eager"
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    found = []
    for module, mode in ((network, "eager"), (compiled, "auto" if CUDA else "fused")):
        with dispatch.kernels(mode):
            logit_B = module(emb)
        found.append([logit_B.detach(), *torch.autograd.grad(logit_B.sum(), [emb, *network.parameters()])])
    for eager, fused in zip(*found, strict=True):
        # as a whole: of some hundred thousand hidden units one may be so near 0 that rounding decides on its ReLU, and
        # with it on all of its row's gradient
        assert distance(fused, eager) <= 1e-3


@pytest.mark.parametrize("kind", ["parallel", "serial"])
@pytest.mark.parametrize(
    ("norm", "hidden_norm"),
    [*((norm, norm) for norm in NORMS[:3]), ("conditional", "layer"), ("layer", "conditional")],
    ids=str,
)
def test_a_folded_network_gives_the_trained_ones_logits(norm: str, hidden_norm: str, kind: str) -> None:
    network = network_of(norm, kind, hidden_norm).eval()
    context, candidates, emb = request_of(ROWS)
    folded = fold(network, CONTEXT).to(DEVICE)
    with torch.no_grad():
        exact = network.cpu().double()(emb.cpu().double())
        for mode in ("eager", "fused"):
            with dispatch.kernels(mode):
                logits = folded(context, candidates)
            torch.testing.assert_close(logits.cpu().double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # numpy on ∞ · 0, in the interpreter
def test_a_bad_row_is_the_only_one_that_is_not_finite(value: float) -> None:
    network, emb = network_of().eval(), embeddings(ROWS)
    emb[2, 1, 3] = value
    with torch.no_grad(), dispatch.kernels("fused"):
        logit_B = network(emb)
    expected = torch.ones(ROWS, dtype=torch.bool, device=DEVICE)
    expected[2] = False
    assert torch.equal(logit_B.isfinite(), expected)


NORMS_WEIGHTS = [f"{norm}.{name}" for norm in ("embedding_norm", "blocks.1.norm") for name in ("weight", "bias")]
BLOCKS_WEIGHTS = [f"blocks.1.{name}" for name in ("mask.aggregate.weight", "mask.project.bias", "linear.weight")]


@pytest.mark.parametrize("mode", ["eager", "fused"])
@pytest.mark.parametrize("name", [*NORMS_WEIGHTS, *BLOCKS_WEIGHTS, "logit.weight"])
def test_a_bad_weight_makes_every_logit_of_a_folded_network_nan(name: str, mode: Mode) -> None:
    network = network_of().eval()
    with torch.no_grad():
        network.get_parameter(name).view(-1)[1] = float("nan")
    folded = fold(network, CONTEXT).to(DEVICE)
    for rows in (1, ROWS):
        context, candidates, emb = request_of(rows)
        with torch.no_grad(), dispatch.kernels(mode):
            assert network(emb).isnan().all()
            assert folded(context, candidates).isnan().all()


@pytest.mark.parametrize("mode", ["eager", "fused"])
@pytest.mark.parametrize("norm", ["layer", "conditional"])
def test_a_bad_embedding_makes_its_own_logits_of_a_folded_network_nan(norm: str, mode: Mode) -> None:
    folded = fold(network_of(norm, hidden_norm="layer").eval(), CONTEXT).to(DEVICE)
    context, candidates, _ = request_of(ROWS)
    with torch.no_grad(), dispatch.kernels(mode):
        good = folded(context, candidates)
        candidates[2, 3] = float("nan")
        bad = folded(context, candidates)
        context[0, 1] = float("nan")
        all_bad = folded(context, candidates)
    assert bad[2].isnan()
    others = torch.arange(ROWS) != 2
    torch.testing.assert_close(bad[others], good[others], rtol=1e-5, atol=1e-6)
    assert all_bad.isnan().all()


def test_the_graph_runner_gives_the_networks_logits_for_every_number_of_candidates() -> None:
    network = network_of().eval()
    context, candidates, emb = request_of(3000 if CUDA else 9)
    runner = GraphRunner(fold(network, CONTEXT)) if CUDA else GraphRunner(fold(network, CONTEXT), sizes=(1, 4, 8))
    with dispatch.kernels("fused"):
        runner.warm(context, candidates)
        logits = {rows: runner(context, candidates[:rows]) for rows in (range(1, 2049) if CUDA else (1, 3, 4, 5))}
        logits[len(candidates)] = runner(context, candidates)
    with torch.no_grad():
        exact = network.cpu().double()(emb.cpu().double())
    for rows, found in logits.items():
        torch.testing.assert_close(found.cpu().double(), exact[:rows], rtol=1e-4, atol=1e-4)
