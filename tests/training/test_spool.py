"""The spool of a run's records: what was flushed is there after any end of the process, in order and whole."""

import json
import threading
from pathlib import Path

from training.tracking.spool import Spool


def records(first: int, count: int) -> list[dict[str, object]]:
    return [{"kind": "text", "name": "é", "content": str(first + offset)} for offset in range(count)]


def filled(folder: Path, count: int) -> Spool:
    spool = Spool(folder)
    for record in records(0, count):
        spool.append(record)
    spool.flush()
    return spool


def test_a_later_process_finds_what_was_flushed_and_what_of_it_was_sent(tmp_path: Path) -> None:
    first = filled(tmp_path, 3)
    first.append({"kind": "lost with the process"})
    batch = first.unsent()
    assert batch is not None
    assert batch.records == records(0, 3)
    first.mark_sent(batch.end)
    assert first.unsent() is None

    second = Spool(tmp_path)
    assert second.unsent() is None
    for record in records(3, 2):
        second.append(record)
    assert second.unsent() is None, "only what is on disk is sent"
    second.flush()
    found = Spool(tmp_path).unsent()
    assert found is not None
    assert found.records == records(3, 2)
    assert Spool(tmp_path).tail() == records(0, 5)


def test_batches_are_whole_lines_in_order(tmp_path: Path) -> None:
    spool = filled(tmp_path, 20_000)
    found, sizes = [], []
    while (batch := spool.unsent()) is not None:
        found += batch.records
        sizes.append(len(batch.records))
        spool.mark_sent(batch.end)
    assert found == records(0, 20_000)
    assert len(sizes) > 1
    assert spool.unsent_bytes == 0


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    for torn in (whole + b'{"kind": "te', whole[:-1], b'{"ki'):
        path.write_bytes(torn)
        spool = Spool(tmp_path)
        kept = torn[: torn.rfind(b"\n") + 1]
        assert path.read_bytes() == kept
        spool.append({"kind": "next"})
        spool.flush()
        assert path.read_bytes() == kept + b'{"kind": "next"}\n'


def test_a_damaged_memory_of_what_was_sent_sends_everything_anew(tmp_path: Path) -> None:
    spool = filled(tmp_path, 2)
    spool.mark_sent(spool.unsent_bytes)
    (tmp_path / "sent.json").write_text("{")
    found = Spool(tmp_path).unsent()
    assert found is not None
    assert found.records == records(0, 2)


def test_a_full_disk_ends_the_recording_and_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").symlink_to("/dev/full")
    spool = Spool(tmp_path)
    spool.append({"kind": "too much"})
    assert spool.fault is None
    spool.flush()
    assert spool.fault == "[Errno 28] No space left on device"
    spool.append({"kind": "too much"})
    spool.flush()
    assert spool.unsent() is None


def test_threads_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    spool = Spool(tmp_path)

    def work(name: int) -> None:
        for number in range(500):
            spool.append({"thread": name, "number": number})
            spool.flush()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    for name in range(4):
        assert [record["number"] for record in found if record["thread"] == name] == list(range(500))
