"""What only a GPU can show: offsets beyond 32 bits, streams, waiting for the device, and clocks.

Legend: B rows, h width of a hidden vector.
"""

from collections.abc import Iterator

import pytest
import torch

from masknet.kernels import dispatch
from masknet.kernels.embedding_norm_mask import embedding_norm_mask
from masknet.kernels.graphs import GraphRunner
from masknet.kernels.hidden_norm_act import hidden_norm_act
from masknet.kernels.power_norm_act import power_norm_act, power_norm_act_backward
from tests.gpu.settings import embeddings, network_of
from training.bench.timing import WARM_UPS, DeviceClock, HostClock

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

# torch's, of the first product in a thread and of the mode that makes waiting an error
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]
ROWS, WIDTH = 2**22, 520  # more than 2^31 entries
LAST = 100  # rows at the end, which are looked at
EPS = 1e-5


@pytest.fixture(autouse=True)
def _free_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def large(seed: int = 0) -> torch.Tensor:
    """Rows [ROWS, WIDTH] of bf16, 4 GiB, a leaf."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
    return x.normal_(generator=torch.Generator("cuda").manual_seed(seed)).requires_grad_()


def layer(x: torch.Tensor) -> torch.Tensor:
    """The layer norm of rows in fp64."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def test_hidden_norm_act_of_many_rows() -> None:
    x = large()
    weight = torch.ones(WIDTH, device="cuda", requires_grad=True)
    out = hidden_norm_act(x, weight, None, None, "layer", EPS, 1.0, "relu", 0.0, 0)
    last = x.detach()[-LAST:].double().requires_grad_()
    exact = layer(last).relu()
    torch.testing.assert_close(out[-LAST:].double(), exact, rtol=1e-2, atol=1e-2)
    dx, dweight = torch.autograd.grad(out, [x, weight], torch.ones_like(out))
    [dlast] = torch.autograd.grad(exact.sum(), last)
    torch.testing.assert_close(dx[-LAST:].double(), dlast, rtol=1e-2, atol=2e-2)
    # Σ over rows of relu(x̂), chunk by chunk; the terms are about 0.4
    chunks = (layer(part.double()).relu().sum(0) for part in x.detach().split(2**16))
    torch.testing.assert_close(dweight.double(), torch.stack(list(chunks)).sum(0), rtol=1e-3, atol=0)


def test_embedding_norm_mask_of_many_rows() -> None:
    x, mask = large(), large(seed=1)
    out = embedding_norm_mask(x.view(ROWS, WIDTH // 8, 8), mask, None, None, None, "layer", EPS, 1.0)
    dx, dmask = torch.autograd.grad(out, [x, mask], torch.ones_like(out))
    last = x.detach()[-LAST:].double().requires_grad_()
    normed = layer(last.view(LAST, -1, 8)).flatten(1)
    exact = mask.detach()[-LAST:].double() * normed
    [dlast] = torch.autograd.grad(exact.sum(), last)
    torch.testing.assert_close(out[-LAST:].double(), exact.detach(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dmask[-LAST:].double(), normed.detach(), rtol=1e-2, atol=1e-2)
    scale = dlast.abs().amax(1, keepdim=True)  # rows of small spread have large gradients
    torch.testing.assert_close(dx[-LAST:].double() / scale, dlast / scale, rtol=1e-2, atol=1e-2)


def test_power_norm_act_of_many_rows() -> None:
    x = large().detach()
    ones, zeros = torch.ones(WIDTH, device="cuda"), torch.zeros(WIDTH, device="cuda")
    out, square = power_norm_act(x, 2 * ones, ones, zeros, "relu")
    dx, dweight, dbias, product = power_norm_act_backward(out, x, 2 * ones, ones, zeros, ones, "relu")
    last = x[-LAST:].double()
    kept = 2 * last.relu()
    torch.testing.assert_close(out[-LAST:].double(), kept, rtol=1e-2, atol=0)
    torch.testing.assert_close(dx[-LAST:].double(), 2 * (kept - 2 * last), rtol=1e-2, atol=2e-2)
    squares = torch.stack([part.double().square().sum(0) for part in x.split(2**16)]).sum(0)
    torch.testing.assert_close(square.double(), squares, rtol=1e-4, atol=0)
    positive = torch.stack([(2 * part.double().relu()).square().sum(0) for part in x.split(2**16)]).sum(0)
    sums = torch.stack([2 * part.double().relu().sum(0) for part in x.split(2**16)]).sum(0)
    torch.testing.assert_close(dweight.double(), positive, rtol=1e-3, atol=0)
    torch.testing.assert_close(product.double(), positive, rtol=1e-3, atol=0)
    torch.testing.assert_close(dbias.double(), sums, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", ["layer", "rms", "dyt", "batch", "power_v"])
def test_a_step_of_training_does_not_wait_for_the_device(norm: str) -> None:
    network, emb = network_of(norm).train(), embeddings(500).requires_grad_()
    dout = torch.ones(500, device="cuda")

    def step() -> None:
        with dispatch.kernels("fused"):
            logit_B = network(emb)
        torch.autograd.grad(logit_B, [emb, *network.parameters()], dout)

    step()  # in which kernels are compiled
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_kernels_follow_what_is_before_them_on_their_stream() -> None:
    network, emb = network_of().eval(), embeddings(4096)
    with torch.no_grad(), dispatch.kernels("fused"):
        expected = network(2 * emb)
        for _ in range(20):
            torch.cuda.synchronize()
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                torch.cuda._sleep(10_000_000)  # so that a kernel on another stream would come too early
                late = torch.zeros_like(emb)
                late.add_(emb, alpha=2)
                logits = network(late)
            side.synchronize()
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_gradients_on_a_stream_of_their_own() -> None:
    network, emb = network_of().train(), embeddings(500).requires_grad_()
    inputs, dout = [emb, *network.parameters()], torch.ones(500, device="cuda")
    with dispatch.kernels("fused"):
        expected = torch.autograd.grad(network(emb), inputs, dout)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)
            found = torch.autograd.grad(network(emb), inputs, dout)
        side.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_request_waits_for_a_warm_up_on_another_stream() -> None:
    def network(context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        if len(candidates_NR) == 1:  # the last size that is warmed up
            torch.cuda._sleep(50_000_000)
        return candidates_NR @ context_1C[0]

    runner = GraphRunner(network, sizes=(1, 8))
    context, candidates = torch.randn(1, 5, device="cuda"), torch.randn(8, 5, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        runner.warm(context, candidates)
    logits = runner(context, candidates)
    torch.cuda.current_stream().synchronize()
    assert side.query()
    torch.testing.assert_close(logits, candidates @ context[0])


def test_the_graph_runner_takes_requests_inside_inference_mode_and_outside() -> None:
    context, candidates = torch.randn(1, 5, device="cuda"), torch.randn(8, 5, device="cuda")
    for first in (True, False):
        runner = GraphRunner(lambda context_1C, candidates_NR: candidates_NR @ context_1C[0], sizes=(4, 8))
        for mode, rows in ((first, 8), (not first, 8), (first, 3), (not first, 3)):
            with torch.inference_mode(mode):
                logits = runner(context, candidates[:rows])
            torch.testing.assert_close(logits, candidates[:rows] @ context[0])


def test_clocks_call_as_often_as_they_are_asked_to() -> None:
    device = torch.device("cuda")
    counter = torch.zeros((), device=device)

    def count() -> torch.Tensor:
        return counter.add_(1)

    assert len(HostClock(device).times({"count": count}, 7)["count"]) == 7
    assert counter.item() == 7
    times = DeviceClock(device).times({"count": count}, 7)["count"]
    assert all(time > 0 for time in times)
    assert counter.item() == 7 + WARM_UPS + 7  # what is captured is not run
