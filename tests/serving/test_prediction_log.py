"""The prediction log: what its files hold, that `prepare` reads it back to the same encodings, and how files rotate."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.dataset import LABEL, PreparedDataset
from features.encoders import DatePart, Hash, Scale, Vocabulary
from features.errors import InputError
from features.pipeline import FeaturePipeline
from features.prepare import prepare
from features.schema import Schema
from serving.bundle import Bundle
from serving.monitoring.log import OnDrop, PredictionLogWriter, is_sampled
from serving.settings import PredictionLog
from serving.trace import Trace

SCHEMA = Schema.model_validate(
    {
        "name": "s",
        "label": {"column": "click"},
        "time": "at",
        "context": ["user"],
        "fields": [
            {"name": "user", "type": "categorical"},
            {"name": "index", "type": "categorical", "encoder": "hash", "buckets": 50},
            {"name": "tags", "type": "list", "max_length": 2},
            {"name": "price", "type": "numeric", "encoder": "standard"},
            {"name": "hour", "type": "date", "from": "shown", "part": "hour", "format": "%d/%m/%Y %H:%M"},
            {"name": "slot", "type": "categorical", "encoder": "hash", "buckets": 9, "training_only": {"default": "1"}},
        ],
    }
)
PIPELINE = FeaturePipeline.build(
    SCHEMA.fields,
    {
        "user": Vocabulary(pa.array(["ann", "bob"])),
        "index": Hash(50),
        "tags": Vocabulary(pa.array(["a", "b", "c"])),
        "price": Scale("standard", 1.0, 2.0),
        "hour": DatePart(24, "hour", "UTC"),
        "slot": Hash(9),
    },
)
COLUMNS = {"index": ["x", None, "z"], "tags": [["c", "b", "a"], None, ["q"]], "price": [1.5, None, -3.0]}
AT = datetime(2026, 3, 1, 23, 59, 30, tzinfo=UTC)


def asked(request_id: str = "r1", **changed: Any) -> Trace:
    given: dict[str, Any] = {"name": "m", "version": "7", "rows": 3, "context": {"user": "ann"}, "columns": COLUMNS}
    given |= {"time": AT, "score_N": np.array([0.1, 0.2, 0.3], np.float32)}
    return Trace("/rank", request_id=request_id, **(given | changed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def start(folder: Path) -> Callable[..., PredictionLogWriter]:
    def started(
        schema: Schema = SCHEMA, worker: int = 0, on_drop: OnDrop = lambda count: None, **settings: Any
    ) -> PredictionLogWriter:
        log = PredictionLog(folder=folder, **({"share": 1.0} | settings))
        made = PredictionLogWriter.of(log, worker, on_drop)
        assert made is not None
        made.follow("m", "7", schema)
        return made

    return started


def rows_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not what() and time.monotonic() < until:
        time.sleep(0.01)


def test_a_row_per_candidate(start: Callable[..., PredictionLogWriter], folder: Path) -> None:
    log = start()
    before = datetime.now(UTC)
    log.offer(asked())
    log.close()
    (file,) = folder.iterdir()
    assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"
    found = pq.read_table(file).to_pydict()
    answered = found.pop("time")
    assert before <= answered[0] == answered[2] <= datetime.now(UTC)
    assert found == {
        "request_id": ["r1"] * 3,
        "model": ["m"] * 3,
        "version": ["7"] * 3,
        "role": ["champion"] * 3,
        "served_index": [0, 1, 2],  # a field is called index
        "score": pytest.approx([0.1, 0.2, 0.3], abs=1e-7),
        "user": ["ann"] * 3,
        "index": ["x", None, "z"],
        "tags": [["c", "b", "a"], None, ["q"]],  # as sent, though two are encoded
        "price": [1.5, None, -3.0],
        "shown": [AT] * 3,
        "at": [AT] * 3,
    }


def test_prepare_reads_dates_lists_and_numbers_back(start: Callable[..., PredictionLogWriter], folder: Path) -> None:
    """/rank with a time, and /predict with a column of times, one without a zone; then a label beside each row."""
    times = [AT + timedelta(hours=5), datetime(2026, 3, 2, 7, 0), None]
    rows = {"user": ["bob", "cat", None], **COLUMNS, "shown": times}
    log = start()
    log.offer(asked())
    log.offer(asked("r2", context={}, columns=rows, time=None))
    log.close()
    logged = rows_of(folder)
    joined = folder / "joined.parquet"
    clicks = [1, 0, 0, 0, 1, 1]
    pq.write_table(logged.append_column("click", pa.array(clicks)), joined)
    prepare(SCHEMA, {"test": [str(joined)]}, folder / "data", pipeline=PIPELINE)
    table = PreparedDataset.open(folder / "data").split("test")
    served = [
        PIPELINE.encode({"user": ["ann"] * 3, **COLUMNS, "shown": [AT] * 3}),
        PIPELINE.encode({**rows, "shown": [times[0], datetime(2026, 3, 2, 7, 0, tzinfo=UTC), None]}),
    ]
    assert table.select(PIPELINE.names).to_pydict() == pa.concat_tables(served).to_pydict()
    assert [part["hour"].to_pylist()[0] for part in served] == [25, 6]  # 23 and 4 o'clock, behind missing and unknown
    assert table[LABEL].to_pylist() == clicks


def test_prepare_reads_real_rows_back(
    bundle: Bundle, raw_rows: Path, start: Callable[..., PredictionLogWriter], folder: Path
) -> None:
    """Requests of MovieLens's users as the service parses them, joined with the ratings by request and index."""
    raw = pl.read_parquet(raw_rows).head(1500)
    log = start(bundle.schema)
    labels = []
    for number, (_, rows) in enumerate(raw.group_by("user_id", maintain_order=True)):
        user, per_row = rows.row(0, named=True), rows.to_dict(as_series=False)
        trace = asked(
            f"request {number}",
            context={name: float(user[name]) if name == "age" else str(user[name]) for name in bundle.schema.context},
            columns={
                "item_id": [str(item) for item in per_row["item_id"]],
                "title": per_row["title"],
                "year": [float(year) for year in per_row["year"]],
                "genres": [text.split(" ") for text in per_row["genres"]],
            },
            score_N=np.zeros(len(rows), np.float32),
        )
        until = time.monotonic() + 10
        while log._waiting.full() and time.monotonic() < until:
            time.sleep(0.001)
        log.offer(trace)
        place = pl.Series("index", np.arange(len(rows), dtype=np.int32))
        labels.append(rows.select("rating").with_columns(pl.lit(trace.request_id).alias("request_id"), place))
    log.close()
    joined = pl.concat(labels).join(pl.from_arrow(rows_of(folder)), on=["request_id", "index"])  # type: ignore[arg-type]
    assert joined.height == raw.height
    joined.write_parquet(folder / "joined.parquet")
    prepare(bundle.schema, {"test": [str(folder / "joined.parquet")]}, folder / "data", pipeline=bundle.pipeline)
    table = PreparedDataset.open(folder / "data").split("test")
    ordered = pl.concat([rows for _, rows in raw.group_by("user_id", maintain_order=True)])
    assert table.select(bundle.pipeline.names).to_pydict() == bundle.pipeline.encode(ordered.to_arrow()).to_pydict()
    assert table[LABEL].to_pylist() == (ordered["rating"] >= 4).cast(pl.Int8).to_list()


def test_files_end_by_rows_and_by_fields_and_the_newest_are_kept(
    start: Callable[..., PredictionLogWriter], folder: Path
) -> None:
    log = start(file_rows=6, keep_files=3)
    for number in range(10):
        log.offer(asked(str(number)))
    log.offer(asked("more", context={"user": "ann", "plan": "gold", "spent": 2.5, "seen": ["i", "j"]}))
    log.close()
    files = sorted(folder.iterdir())
    assert [pq.read_table(file)["request_id"].unique().to_pylist() for file in files] == [
        ["6", "7"], ["8", "9"], ["more"],
    ]  # fmt: skip
    more = pq.read_table(files[-1])
    assert [more[name].to_pylist()[0] for name in ("plan", "spent", "seen")] == ["gold", 2.5, ["i", "j"]]


def test_fields_of_a_later_model_are_of_one_kind(start: Callable[..., PredictionLogWriter], folder: Path) -> None:
    log = start()
    for number, spent in enumerate([2.5, None, 3, None, 0.5]):
        log.offer(asked(str(number), context={"user": "ann", "spent": spent}))
    log.close()
    (file,) = folder.iterdir()
    assert pq.read_table(file)["spent"].to_pylist()[::3] == [2.5, None, 3.0, None, 0.5]


def test_a_change_of_schema_begins_a_file_in_the_new_columns(
    start: Callable[..., PredictionLogWriter], folder: Path
) -> None:
    """Answers of the old version that are on their way keep its columns; each file is prepared with its own model."""
    other = SCHEMA.plain()
    other["fields"] = [
        {"name": "user", "type": "categorical"},
        {"name": "tags", "type": "categorical", "encoder": "hash", "buckets": 50},  # was a list
        {"name": "price", "type": "numeric", "encoder": "standard"},
        {"name": "plan", "type": "categorical", "encoder": "hash", "buckets": 7},
    ]
    new = Schema.model_validate(other)
    encoders = {"user": PIPELINE.fields[0].encoder, "tags": Hash(50), "price": Scale("standard", 0.0, 1.0)}
    pipeline = FeaturePipeline.build(new.fields, {**encoders, "plan": Hash(7)})
    rows = {"tags": ["a", None, "c"], "price": [1.0, 2.0, None], "plan": ["gold", None, "tin"]}
    log = start()
    log.offer(asked("old"))
    log.follow("m", "8", new)
    log.offer(asked("old, late"))
    log.offer(asked("new", version="8", columns=rows))
    log.offer(asked("of a shadow", version="9", role="shadow", columns=rows))
    log.close()
    files = sorted(folder.glob("*.parquet"))
    assert [pq.read_table(file)["request_id"].unique().to_pylist() for file in files] == [
        ["old", "old, late"], ["new", "of a shadow"],
    ]  # fmt: skip
    served = [
        PIPELINE.encode({"user": ["ann"] * 3, **COLUMNS, "shown": [AT] * 3}),
        pipeline.encode({"user": ["ann"] * 3, **rows}),
    ]
    for file, schema, fitted, encoded in zip(files, (SCHEMA, new), (PIPELINE, pipeline), served, strict=True):
        logged = pq.read_table(file)
        pq.write_table(logged.append_column("click", pa.array([1, 0, 0] * 2)), file)
        prepare(schema, {"test": [str(file)]}, folder / file.stem, pipeline=fitted)
        table = PreparedDataset.open(folder / file.stem).split("test")
        assert table.select(fitted.names).to_pydict() == pa.concat_tables([encoded] * 2).to_pydict()


def test_a_file_ends_by_time(start: Callable[..., PredictionLogWriter], folder: Path) -> None:
    log = start(file_seconds=0.05)
    log.offer(asked())
    wait_for(lambda: bool(list(folder.glob("predictions-*"))))
    assert rows_of(folder).num_rows == 3  # without another request, and before the log is closed
    log.close()


def test_workers_write_side_by_side_and_clear_up_after_a_kill(
    start: Callable[..., PredictionLogWriter], folder: Path
) -> None:
    folder.mkdir()
    own, others = folder / ".predictions-001-x.parquet", folder / ".predictions-002-x.parquet"
    own.touch()
    others.touch()
    logs = [start(worker=number) for number in (1, 3)]
    for log in logs:
        log.offer(asked())
        log.close()
    assert not own.exists()
    assert others.exists()
    assert sorted(file.name[:15] for file in folder.glob("predictions*")) == ["predictions-001", "predictions-003"]


def test_services_may_share_a_folder(start: Callable[..., PredictionLogWriter], folder: Path) -> None:
    """A second one with workers of the same numbers, as while pods are replaced."""
    before = start(worker=1)
    before.offer(asked("before"))
    wait_for(lambda: bool(list(folder.glob(".predictions-001-*"))))
    after = start(worker=1)
    after.offer(asked("after"))
    before.close()
    after.close()
    assert sorted(rows_of(folder)["request_id"].unique().to_pylist()) == ["after", "before"]


def test_the_sample_is_the_same_wherever_it_is_drawn() -> None:
    ids = [f"request-{number}" for number in range(20_000)]
    tenth = {id_ for id_ in ids if is_sampled(id_, 0.1)}
    assert abs(len(tenth) - 2000) < 5 * np.sqrt(20_000 * 0.09)
    assert tenth == {id_ for id_ in reversed(ids) if is_sampled(id_, 0.1)}
    assert tenth < {id_ for id_ in ids if is_sampled(id_, 0.3)}
    assert all(is_sampled(id_, 1.0) for id_ in ids)


def test_only_sampled_and_scored_requests_are_logged(start: Callable[..., PredictionLogWriter], folder: Path) -> None:
    log = start(share=0.5)
    ids = [f"r{number}" for number in range(60)]
    for id_ in ids:
        log.offer(asked(id_))
        log.offer(asked(id_, score_N=None))
    log.close()
    assert rows_of(folder)["request_id"].unique().to_pylist() == [id_ for id_ in ids if is_sampled(id_, 0.5)]


def test_what_does_not_fit_is_dropped_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    log = PredictionLogWriter.of(PredictionLog(folder=folder, share=1.0), 0, dropped.append)
    assert log is not None
    log.follow("m", "7", SCHEMA)
    gate = threading.Event()
    work = log._rows.of
    monkeypatch.setattr(type(log._rows), "of", lambda self, trace, at: (gate.wait(10), work(trace, at))[1])
    for number in range(100):
        log.offer(asked(str(number)))
    gate.set()
    log.close()
    assert 100 - 65 <= sum(dropped) <= 100 - 64
    assert rows_of(folder).num_rows == 3 * (100 - sum(dropped))


class Odd:
    """What no column holds."""

    def __repr__(self) -> str:
        return "a-secret-value"


def test_a_request_that_cannot_be_logged_costs_no_other(
    start: Callable[..., PredictionLogWriter], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dropped: list[int] = []
    log = start(on_drop=dropped.append)
    for trace in (asked("good"), asked("bad", context={"user": "ann", "odd": Odd()}), asked("good too")):
        log.offer(trace)
    log.close()
    assert rows_of(folder)["request_id"].unique().to_pylist() == ["good", "good too"]
    assert dropped == [1]
    (told,) = caplog.messages
    assert told.startswith("a request is not in the prediction log\n  File ")
    assert "secret" not in told  # Arrow quotes what it cannot convert


def test_a_full_disk_costs_rows_and_nothing_else(
    start: Callable[..., PredictionLogWriter], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    log = start(on_drop=dropped.append)
    write = pq.ParquetWriter.write_table

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    for _ in range(3):
        log.offer(asked("lost"))
    log.close()
    assert dropped == [3]
    assert not list(folder.glob("predictions-*"))
    assert not list(folder.glob(".*"))
    monkeypatch.setattr(pq.ParquetWriter, "write_table", write)
    log = start()
    log.offer(asked("kept"))
    log.close()
    assert rows_of(folder)["request_id"].to_pylist() == ["kept"] * 3


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"log\.folder .*file/log cannot be written to: Not a directory"):
        PredictionLogWriter.of(PredictionLog(folder=tmp_path / "file" / "log"), 0)
    assert PredictionLogWriter.of(None, 0) is None
