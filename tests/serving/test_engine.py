"""The engine's scores are the reference scorer's, however a request divides and writes its fields.

Legend: N candidates.
"""

import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from features.errors import InputError
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.backends.base import Backend, CPUBackend
from serving.backends.choose import make_backend
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member
from serving.ranking import engine as engine_module
from serving.ranking.engine import RankingEngine
from serving.ranking.tables import Tables
from serving.ranking.transfer import OneTrip
from serving.trace import Trace
from tests.serving.every_kind import CANDIDATES as WRITTEN
from tests.serving.every_kind import CONTEXT, ENCODERS, SCHEMA

# as the routes hand them over: ids as text, lists as lists
LISTS: dict[str, list[Any]] = {"codes": [["0", "5"], ["2"], []], "genres": [["war", "drama"], ["war"], ["opera"]]}
CANDIDATES = WRITTEN | LISTS | {"item": ["x", "17", None], "slot": ["3", "7", "99"]}
WHEN = datetime(2024, 5, 5, 16, 30, tzinfo=UTC)
DIM = 6  # no multiple of 4, as FBGEMM's int8 rows would have it
PARALLEL = MaskNetConfig(embedding_dim=DIM, blocks=2, block_width=8, head=(5,))
SERIAL = MaskNetConfig(kind="serial", embedding_dim=DIM, blocks=2, block_width=8, head=())
ROW_WISE = MaskNetConfig(embedding_dim=DIM, blocks=2, block_width=8, embedding_norm="conditional", head=())

Make = Callable[..., Bundle]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Bundles over every kind of field, with random weights, far from those of any initialization."""

    bundles: dict[Any, Bundle] = {}

    def make(config: MaskNetConfig = PARALLEL, members: int = 1, context: tuple[str, ...] = SCHEMA.context) -> Bundle:
        key = (config.model_dump_json(), members, context)
        if key not in bundles:
            bundles[key] = written(config, members, context)
        return bundles[key]

    def written(config: MaskNetConfig, members: int, context: tuple[str, ...]) -> Bundle:
        schema = Schema.model_validate({**SCHEMA.plain(), "context": list(context)})
        pipeline = FeaturePipeline.build(schema.fields, ENCODERS)
        path = tmp_path_factory.mktemp("engine") / "bundle"
        write_bundle(
            path,
            name="every",
            config=config,
            schema=schema,
            pipeline=pipeline,
            members=[random_member(seed, config, pipeline) for seed in range(members)],
            sampling_rate=0.2,
            run_id=None,
            evaluate=lambda scorer: {},
        )
        return load_bundle(path)

    return make


def random_member(seed: int, config: MaskNetConfig, pipeline: FeaturePipeline) -> Member:
    model = MaskNet(config, tables_of(pipeline), fields_of(pipeline))
    generator = torch.Generator().manual_seed(seed)
    tables = {t.name: torch.randn(t.rows, DIM, generator=generator) for t in tables_of(pipeline)}
    return Member({n: torch.randn(w.shape, generator=generator) / 3 for n, w in model.dense_state().items()}, tables)


def many(count: int) -> dict[str, list[Any]]:
    """The candidates over and over, no two columns in step."""
    return {
        name: [values[(i * (place + 1) + i // 7) % 3] for i in range(count)]
        for place, (name, values) in enumerate(CANDIDATES.items())
    }


def expected_of(bundle: Bundle, rows: dict[str, Any]) -> np.ndarray:
    """The reference's scores of whole rows, in the order of the request."""
    count = max(len(values) for values in rows.values() if isinstance(values, list))
    whole = {name: values if isinstance(values, list) else [values] * count for name, values in rows.items()}
    return bundle.scorer.score({"seen": [WHEN] * count} | whole)


def require_ranked(engine: RankingEngine, context: dict[str, Any], candidates: Any, expected_N: np.ndarray) -> None:
    best = engine.rank(context, candidates, len(expected_N), WHEN)
    assert sorted(item.index for item in best) == list(range(len(expected_N)))
    found_N = np.array([item.score for item in best])
    np.testing.assert_allclose(found_N, expected_N[[item.index for item in best]], rtol=0, atol=1e-6)
    assert (np.diff(found_N) <= 0).all()


@pytest.mark.parametrize("config", [PARALLEL, SERIAL, ROW_WISE], ids=["parallel", "serial", "row-wise"])
@pytest.mark.parametrize("members", [1, 3])
def test_scores_are_the_reference_scorer_s(made: Make, config: MaskNetConfig, members: int) -> None:
    bundle = made(config, members)
    engine = RankingEngine(bundle, "1")
    assert engine.encoding.context == ("user", "hour", "age", "position", "delay", "weekday")
    for count in (1, 2, 3, 40):
        expected_N = expected_of(bundle, many(count) | CONTEXT)
        require_ranked(engine, CONTEXT, many(count), expected_N)
        whole = {
            n: v if isinstance(v, list) else [v] * count for n, v in (many(count) | CONTEXT | {"seen": WHEN}).items()
        }
        np.testing.assert_allclose(engine.predict(whole), expected_N, rtol=0, atol=1e-6)
    assert expected_N.std() > 1e-3


def test_the_context_is_looked_up_and_computed_once(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Any] = []

    def recorded(network: Any, *args: Any, **kwargs: Any) -> CPUBackend:
        def call(context: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
            shapes.append((tuple(context.shape), tuple(candidates.shape)))
            return network(context, candidates)

        return CPUBackend("recorded", call)

    bundle = made()
    monkeypatch.setattr(engine_module, "make_backend", recorded)
    engine = RankingEngine(bundle, "1")
    engine.rank(CONTEXT, many(5000), 1)
    engine.rank({"age": 33}, many(3) | {"user": ["bob"] * 3}, 1)
    split, whole = [(1, 6 * DIM), 10 * DIM], [(1, 0), 16 * DIM]
    assert shapes == [
        *((split[0], (rows, split[1])) for rows in (2048, 2048, 904)),
        (whole[0], (3, whole[1])),
    ]


def test_every_way_to_divide_and_to_write_a_request(made: Make) -> None:
    bundle = made()
    engine, candidates = RankingEngine(bundle, "1"), many(11)
    expected_N = expected_of(bundle, candidates | CONTEXT)
    table = pa.table({name: pa.array(values) for name, values in candidates.items()})
    require_ranked(engine, CONTEXT, table, expected_N)
    require_ranked(engine, CONTEXT, pd.DataFrame(candidates), expected_N)
    numbers = {"item": [None if i % 3 == 2 else i for i in range(11)], "slot": list(range(11))}
    require_ranked(engine, CONTEXT, candidates | numbers, expected_of(bundle, candidates | CONTEXT | numbers))
    rows = [dict(zip(candidates, values, strict=True)) for values in zip(*candidates.values(), strict=True)]
    require_ranked(engine, CONTEXT, rows, expected_N)
    per_candidate = {"user": ["ann", "bob"] * 5 + [None]}
    require_ranked(
        engine, {"age": 33}, candidates | per_candidate, expected_of(bundle, candidates | {"age": 33} | per_candidate)
    )
    for name in CANDIDATES:  # in the context, what is usually a candidate's
        rest = {other: values for other, values in candidates.items() if other != name}
        expected_N = expected_of(bundle, rest | CONTEXT | {name: [candidates[name][1]] * 11})
        require_ranked(engine, CONTEXT | {name: candidates[name][1]}, rest, expected_N)
    times = [WHEN, datetime(2021, 1, 2, 3, tzinfo=UTC)] * 5 + [None]
    require_ranked(
        engine, CONTEXT, candidates | {"seen": times}, expected_of(bundle, candidates | CONTEXT | {"seen": times})
    )
    require_ranked(
        engine, CONTEXT | {"seen": None}, candidates, expected_of(bundle, candidates | CONTEXT | {"seen": [None] * 11})
    )


@pytest.mark.parametrize("context", [(), tuple(field.name for field in SCHEMA.served_fields)], ids=["none", "all"])
def test_a_schema_without_a_context_and_one_of_nothing_else(made: Make, context: tuple[str, ...]) -> None:
    bundle = made(context=context)
    engine = RankingEngine(bundle, "1")
    expected_N = expected_of(bundle, many(4) | CONTEXT)
    require_ranked(engine, CONTEXT, many(4), expected_N)
    require_ranked(engine, {}, many(4) | {"user": ["bob"] * 4, "age": [33] * 4}, expected_N)


@pytest.mark.parametrize("count", [2047, 2049, 5000])
def test_thousands_of_candidates(made: Make, count: int) -> None:
    bundle = made()
    require_ranked(RankingEngine(bundle, "1"), CONTEXT, many(count), expected_of(bundle, many(count) | CONTEXT))


def test_a_table_is_scored_in_parts(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = made()
    monkeypatch.setattr("serving.ranking.asked.ENCODE_AT_ONCE", 16)
    whole = many(50) | {"user": ["bob", None] * 25, "age": list(range(50)), "seen": [WHEN] * 50}
    table, trace = pa.table({name: pa.array(values) for name, values in whole.items()}), Trace("/predict")
    engine = RankingEngine(bundle, "1")
    np.testing.assert_allclose(engine.predict(table, trace), bundle.scorer.score(table), rtol=0, atol=1e-6)
    assert (trace.rows, trace.values["user"], trace.missing["user"]) == (50, 50, 25)
    bad = table.set_column(table.column_names.index("slot"), "slot", pa.array(["3"] * 40 + ["-1"] * 10))
    with pytest.raises(InputError, match="row 40, column 'slot': '-1' is no whole number"):
        engine.predict(bad)


def test_nothing_to_rank(made: Make) -> None:
    engine = RankingEngine(made(), "1")
    assert engine.rank(CONTEXT, {name: [] for name in CANDIDATES}, 3) == []
    whole = {name: [] for name in (*CANDIDATES, *CONTEXT, "seen")}
    assert engine.predict(whole).tolist() == []


@pytest.mark.parametrize(
    ("context", "change", "told"),
    [
        (CONTEXT, {"user": ["ann"] * 3}, "field 'user' is given both in the context and per candidate"),
        ({"user": "bob"}, {}, "column 'age' is missing"),
        (CONTEXT, {"slot": ["1", "2", "-3"]}, "row 2, column 'slot': '-3' is no whole number of 0 or more"),
        (CONTEXT, {"slot": ["1", "2"]}, "rows do not form a table"),
        (CONTEXT | {"age": float("inf")}, {}, "row 0, column 'age': 'inf' is not a finite number"),
        (CONTEXT, {"item": ["a", "b", "c\0"]}, "row 2, column 'item': 'c\\x00' contains a NUL"),
    ],
)
def test_what_is_wrong_is_told_as_by_the_pipeline(made: Make, context: Any, change: Any, told: str) -> None:
    with pytest.raises(InputError) as error:
        RankingEngine(made(), "1").rank(context, CANDIDATES | change, 3)
    assert told in str(error.value)


def test_unusual_values_are_scored_too(made: Make) -> None:
    bundle, unusual = made(), {"item": [True, False, True], "slot": [1.0, 2.0, 3.0], "price": ["1.5", " 2", None]}
    expected_N = expected_of(bundle, CANDIDATES | CONTEXT | unusual)
    require_ranked(RankingEngine(bundle, "1"), CONTEXT, CANDIDATES | unusual, expected_N)


def test_the_trace_of_a_request(made: Make) -> None:
    bundle, trace = made(), Trace("/rank")
    RankingEngine(bundle, "1").rank({"user": "nobody", "age": None}, CANDIDATES, 1, WHEN, trace)
    assert trace.seconds.keys() == {"encode", "lookup", "model"}
    assert min(trace.seconds.values()) > 0
    assert (trace.rows, trace.time) == (3, WHEN)
    assert trace.values == {
        "user": 1, "age": 1, "hour": 1, "weekday": 1, "price": 3, "liked": 5, "item": 3, "slot": 3, "codes": 4,
        "genres": 4, "clicks": 3, "income": 3, "share": 3, "user_x_genre": 4,
    }  # fmt: skip
    assert {name: count for name, count in trace.missing.items() if count} == {
        "age": 1, "price": 1, "liked": 1, "item": 1, "codes": 1, "clicks": 1, "income": 1, "share": 1,
    }  # fmt: skip
    assert {n: count for n, count in trace.unknown.items() if count} == {"user": 1, "slot": 1, "genres": 1}
    expected_N = expected_of(bundle, CANDIDATES | {"user": "nobody", "age": [None] * 3})
    assert trace.score_N is not None
    np.testing.assert_allclose(trace.score_N, expected_N, rtol=0, atol=1e-6)


def test_threads_are_those_of_the_thread_that_computes(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def recorded(network: Any, *args: Any, **kwargs: Any) -> CPUBackend:
        def call(context: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return network(context, candidates)

        return CPUBackend("recorded", call)

    bundle, before = made(), torch.get_num_threads()
    monkeypatch.setattr(engine_module, "make_backend", recorded)
    engine = RankingEngine(bundle, "1", threads=before + 1)
    try:
        torch.set_num_threads(before)
        engine.rank(CONTEXT, CANDIDATES, 1)
        worker = threading.Thread(target=engine.rank, args=(CONTEXT, CANDIDATES, 1))
        worker.start()
        worker.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1] * 2
    assert engine.about()["threads"] == before + 1


@pytest.mark.parametrize(("precision", "entry"), [("fp16", 2), ("int8", 1)])
def test_tables_of_lower_precision(made: Make, precision: Any, entry: int) -> None:
    bundle = made(members=2)
    model = bundle.scorer.models[0]
    weights = [bag.weight.detach().clone() for bag in model.embeddings.embedding_bags.values()]
    exact_Rd = torch.cat(weights)
    rows = exact_Rd.shape[0]
    tables = Tables(model, precision)
    found_Rd = tables.rows(torch.arange(rows))
    error_R = (found_Rd - exact_Rd).abs().amax(1)
    span_R = exact_Rd.amax(1) - exact_Rd.amin(1)
    # half a step; in int8 its scale and shift are fp16, of which 255 steps and the shift make the most
    rounding_R = exact_Rd.abs().amax(1) * 2**-11
    bound_R = rounding_R if precision == "fp16" else span_R / 510 + span_R * 2**-11 + rounding_R
    assert (error_R <= bound_R * 1.01).all()
    assert tables.largest_error == float(error_R.max()) > 0
    width = DIM if precision == "fp16" else DIM + 2 + 4  # padded, then scale and shift
    assert rows * width * entry <= tables.nbytes < rows * width * entry + 128
    engine = RankingEngine(bundle, "1", backend="exact", tables=precision)
    expected_N = expected_of(bundle, many(30) | CONTEXT)
    found_N = np.array([r.score for r in sorted(engine.rank(CONTEXT, many(30), 30, WHEN), key=lambda r: r.index)])
    assert 0 < np.abs(found_N - expected_N).max() < 0.02
    assert engine.about()["tables"]["bytes"] == 2 * tables.nbytes
    assert engine.about()["tables"]["precision"] == precision


def test_fp32_tables_are_in_memory_once(made: Make) -> None:
    bundle = made()
    tables = Tables(bundle.scorer.models[0], "fp32")
    first = tables.rows(torch.zeros(1, dtype=torch.int64)).data_ptr()
    bags = list(bundle.scorer.models[0].embeddings.embedding_bags.values())
    assert bags[1].weight.data_ptr() - bags[0].weight.data_ptr() == bags[0].weight.nbytes != first
    assert tables.nbytes == sum(bag.weight.nbytes for bag in bags)
    assert tables.largest_error == 0


def test_load_lets_go_of_what_is_rounded(made: Make) -> None:
    path = made().path
    engine = RankingEngine.load(path, "3", tables="int8")
    bags = engine.bundle.scorer.models[0].embeddings.embedding_bags.values()
    assert {bag.weight.device.type for bag in bags} == {"meta"}
    exact = RankingEngine.load(path, "3")
    found, expected = (each.rank(CONTEXT, many(9), 9, WHEN) for each in (engine, exact))
    scores = [{item.index: item.score for item in items} for items in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
    assert (exact.name, exact.version, exact.bound) == ("every", "3", 0.0)
    np.testing.assert_array_equal(
        exact.bundle.scorer.score(many(3) | {"user": ["a"] * 3, "age": [1] * 3, "seen": [WHEN] * 3}).shape, (3,)
    )


@pytest.mark.parametrize("broken", ["rows", "requests"])
def test_a_backend_with_other_scores_is_refused(made: Make, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = made().path

    def wrong(network: Any, *args: Any, **kwargs: Any) -> Any:
        if (network.context_width == 0) == (broken == "rows"):
            return CPUBackend("wrong", lambda context, candidates: network(context, candidates) + 0.01)
        return make_backend(network, *args, **kwargs)

    monkeypatch.setattr(engine_module, "make_backend", wrong)
    told = "scores" if broken == "rows" else "scores in a request"
    with pytest.raises(InputError, match=rf"bundle {path} is refused: golden row \d+ {told} \S+ off its record"):
        RankingEngine.load(path, "1")


def test_what_travels_to_a_device_arrives() -> None:
    class Sum:
        name, bound = "sum", 0.5

        def __init__(self, times: float) -> None:
            self.times = times

        def logits(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
            return self.times * (context_1C.sum() + candidates_NR[:, 0] - candidates_NR[:, 1])

    trip = OneTrip([Sum(1), Sum(10)], "cpu")
    for rows in (3, 1, 5):
        context_1C, candidates_NR = torch.ones(1, 4), torch.arange(2.0 * rows).view(2, rows).t()
        found_MN = trip.logits([(context_1C, candidates_NR), (2 * context_1C, candidates_NR)])
        assert found_MN.tolist() == [[4.0 - rows] * rows, [10 * (8.0 - rows)] * rows]
    nothing, x_12 = torch.empty(1, 0), torch.tensor([[5.0, 2.0]])
    assert trip.logits([(nothing, x_12), (nothing, x_12)]).tolist() == [[3.0], [30.0]]


@pytest.mark.parametrize("members", [1, 3])
def test_on_a_device_a_request_travels_once(made: Make, monkeypatch: pytest.MonkeyPatch, members: int) -> None:
    trips: list[tuple[int, int]] = []

    class Counted(OneTrip):
        """The device is the CPU again."""

        def __init__(self, backends: Sequence[Backend], device: str) -> None:
            assert device == "cuda"
            super().__init__(backends, "cpu")

        def logits(self, parts_M: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
            trips.append((len(parts_M), len(parts_M[0][1])))
            return super().logits(parts_M)

    def here(network: Any, kind: Any, device: str, *args: Any, **kwargs: Any) -> Any:
        assert device == "cuda"
        return make_backend(network, kind, "cpu", *args, **kwargs)

    bundle = made(members=members)
    expected = RankingEngine(bundle, "1").rank(CONTEXT, many(2500), 2500, WHEN)
    monkeypatch.setattr(engine_module, "OneTrip", Counted)
    monkeypatch.setattr(engine_module, "make_backend", here)
    engine = RankingEngine(bundle, "1", device="cuda")
    found = engine.rank(CONTEXT, many(2500), 2500, WHEN)
    scores = [{item.index: item.score for item in items} for items in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=2e-6)
    rows = many(7) | {"user": ["a"] * 7, "age": [1] * 7, "seen": [WHEN] * 7}
    np.testing.assert_allclose(engine.predict(rows), bundle.scorer.score(rows), rtol=0, atol=2e-6)
    assert trips == [(members, 2500), (members, 7)]
