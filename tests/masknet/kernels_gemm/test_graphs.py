"""The graph runner's padding, buffers and locking; on a CPU, where the network is called in place of a replay."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from masknet.kernels.graphs import GraphRunner, size_for

CONTEXT, CANDIDATE = 3, 5


class Ranker(nn.Module):
    """Logits of candidates [N, R] beside a context [1, C]; notes how many rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(CONTEXT + CANDIDATE, 8)
        self.logit = nn.Linear(8, 1)
        self.rows: list[int] = []
        self.seconds = 0.0

    def forward(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        """Logits [N]."""
        self.rows.append(len(candidates_NR))
        context_NC = context_1C.expand(len(candidates_NR), -1)
        hidden_Nh = self.hidden(torch.cat([context_NC, candidates_NR], 1)).tanh()
        time.sleep(self.seconds)
        return self.logit(hidden_Nh).squeeze(1)


@pytest.fixture
def ranker() -> Ranker:
    torch.manual_seed(0)
    return Ranker().eval()


def request_of(rows: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, CONTEXT, generator=generator), torch.randn(rows, CANDIDATE, generator=generator)


def expected(ranker: Ranker, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
    """Logits by the formula, in fp64."""
    x = torch.cat([context_1C.expand(len(candidates_NR), -1), candidates_NR], 1).double()
    hidden = torch.tanh(x @ ranker.hidden.weight.double().T + ranker.hidden.bias.double())
    return hidden @ ranker.logit.weight.double()[0] + ranker.logit.bias.double()


@pytest.mark.parametrize(("rows", "size"), [(0, 1), (1, 1), (2, 64), (64, 64), (65, 256), (2048, 2048), (2049, None)])
def test_a_request_takes_the_smallest_size_with_room(rows: int, size: int | None) -> None:
    assert size_for(rows, (2048, 1, 64, 256)) == size


@pytest.mark.parametrize(("rows", "given"), [(0, 4), (1, 4), (4, 4), (5, 8), (8, 8), (9, 9)])
def test_logits_are_the_networks_at_every_size_and_above_the_largest(ranker: Ranker, rows: int, given: int) -> None:
    runner = GraphRunner(ranker, sizes=(8, 4))
    context, candidates = request_of(rows)
    logits = runner(context, candidates)
    assert logits.shape == (rows,)
    assert not logits.requires_grad
    torch.testing.assert_close(logits.double(), expected(ranker, context, candidates), rtol=1e-5, atol=1e-6)
    assert ranker.rows == [given]


def test_what_other_requests_left_in_the_buffers_does_not_matter(ranker: Ranker) -> None:
    runner, fresh = GraphRunner(ranker, sizes=(8,)), GraphRunner(ranker, sizes=(8,))
    runner(*request_of(8, seed=2))
    runner(request_of(1)[0], torch.full((8, CANDIDATE), float("nan")))
    context, candidates = request_of(5)
    assert torch.equal(runner(context, candidates), fresh(context, candidates))


def test_a_result_stays_when_the_next_request_comes(ranker: Ranker) -> None:
    buffer = torch.zeros(8)

    def like_a_graph(context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        return buffer.copy_(ranker(context_1C, candidates_NR))  # the same memory every time

    runner = GraphRunner(like_a_graph, sizes=(8,))
    first = runner(*request_of(3))
    kept = first.clone()
    runner(*request_of(3, seed=2))
    assert torch.equal(first, kept)


def test_inputs_are_left_as_they_were(ranker: Ranker) -> None:
    runner = GraphRunner(ranker, sizes=(8,))
    context, candidates = request_of(3)
    before = context.clone(), candidates.clone()
    runner(context, candidates)
    runner(*request_of(8, seed=2))
    assert torch.equal(context, before[0])
    assert torch.equal(candidates, before[1])


def test_weights_loaded_in_place_are_seen(ranker: Ranker) -> None:
    runner = GraphRunner(ranker, sizes=(4,))
    context, candidates = request_of(2)
    runner(context, candidates)
    ranker.load_state_dict({name: 2 * value for name, value in ranker.state_dict().items()})
    logits = runner(context, candidates)
    torch.testing.assert_close(logits.double(), expected(ranker, context, candidates), rtol=1e-5, atol=1e-6)


def test_warm_runs_every_size_once_from_the_largest(ranker: Ranker) -> None:
    runner = GraphRunner(ranker, sizes=(1, 4, 8))
    context, candidates = request_of(3)
    runner.warm(context, candidates[:0])
    assert ranker.rows == [8, 4, 1]
    torch.testing.assert_close(
        runner(context, candidates).double(), expected(ranker, context, candidates), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("modes", [(True, False), (False, True)], ids=str)
def test_inference_mode_may_come_and_go(ranker: Ranker, modes: tuple[bool, bool]) -> None:
    runner = GraphRunner(ranker, sizes=(4, 8))
    for seed, mode in enumerate(modes):
        context, candidates = request_of(3 + seed, seed)
        with torch.inference_mode(mode):
            logits = runner(context, candidates)
        torch.testing.assert_close(logits.double(), expected(ranker, context, candidates), rtol=1e-5, atol=1e-6)
    logits = runner(*request_of(2)).requires_grad_()  # what came last, outside that mode or in it, binds nobody
    logits.square().sum().backward()
    torch.testing.assert_close(logits.grad, 2 * logits.detach())


class Event:
    """In the place of CUDA's: notes when it is waited for and recorded."""

    def __init__(self, notes: list[object]) -> None:
        self.notes = notes

    def wait(self) -> None:
        """Of the stream."""
        self.notes.append("wait")

    def record(self) -> None:
        """On the stream."""
        self.notes.append("record")


def test_calls_warm_ups_and_failures_wait_for_each_other_across_streams() -> None:
    notes: list[object] = []

    def network(context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        notes.append(len(candidates_NR))
        if candidates_NR[0, 0] == 7:
            raise RuntimeError("seven")
        return candidates_NR[:, 0]

    runner, (context, candidates) = GraphRunner(network, sizes=(4, 8)), request_of(3)
    runner(context, candidates)
    assert runner._inputs is not None
    runner._inputs.done = Event(notes)  # type: ignore[assignment]
    notes.clear()
    runner(context, candidates)
    runner.warm(context, candidates)
    with pytest.raises(RuntimeError, match="seven"):
        runner(context, torch.full_like(candidates, 7))
    with pytest.raises(RuntimeError, match="seven"):
        runner.warm(context, candidates)
    turns = [[4], [8, 4], [4], [8]]
    assert notes == [note for turn in turns for note in ("wait", *turn, "record")]


@pytest.mark.parametrize(
    ("context", "candidates", "message"),
    [
        (torch.zeros(1, CONTEXT + 1), torch.zeros(2, CANDIDATE), "context must have 3 columns"),
        (torch.zeros(CONTEXT), torch.zeros(2, CANDIDATE), "context must have 3 columns"),
        (torch.zeros(2, CONTEXT), torch.zeros(2, CANDIDATE), "context must have one row"),
        (torch.zeros(1, CONTEXT), torch.zeros(2, CANDIDATE - 1), "candidates must have 5 columns"),
        (torch.zeros(1, CONTEXT), torch.zeros(99, CANDIDATE - 1), "candidates must have 5 columns"),
        (torch.zeros(1, CONTEXT), torch.zeros(2, CANDIDATE).double(), "candidates must be torch.float32 on cpu"),
    ],
)
def test_a_request_of_another_kind_is_refused_and_changes_nothing(
    ranker: Ranker, context: torch.Tensor, candidates: torch.Tensor, message: str
) -> None:
    runner = GraphRunner(ranker, sizes=(4,))
    before = runner(*request_of(2))
    with pytest.raises(ValueError, match=message):
        runner(context, candidates)
    assert torch.equal(runner(*request_of(2)), before)


def test_a_refused_first_request_does_not_fix_the_widths(ranker: Ranker) -> None:
    runner = GraphRunner(ranker, sizes=(4,))
    with pytest.raises(ValueError, match="context must have one row"):
        runner(torch.zeros(2, CONTEXT - 1), torch.zeros(2, CANDIDATE))
    context, candidates = request_of(2)
    torch.testing.assert_close(
        runner(context, candidates).double(), expected(ranker, context, candidates), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("sizes", [(), (0, 4)])
def test_sizes_are_numbers_of_rows(ranker: Ranker, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sizes must be positive"):
        GraphRunner(ranker, sizes=sizes)


def test_requests_of_several_threads_do_not_mix(ranker: Ranker) -> None:
    ranker.seconds = 0.002  # threads change here, between the copies into the buffers and the result
    runner = GraphRunner(ranker, sizes=(4, 8))
    requests = [request_of(1 + seed % 8, seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda request: runner(*request), requests))
    for request, logits in zip(requests, results, strict=True):
        torch.testing.assert_close(logits.double(), expected(ranker, *request), rtol=1e-5, atol=1e-6)
