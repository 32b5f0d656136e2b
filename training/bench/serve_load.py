"""The load of the serving benchmark: requests over HTTP/1.1 with keep-alive, in a process of its own.

    python -m training.bench.serve_load

Reads probes, a JSON object a line, from standard input and answers each with a line. A client library would take
longer than some of the servers do; this one writes ready bytes to sockets and parses answers with httptools. A `closed`
probe is one client that waits for each answer, and for a while after it where there is a `pause`; a `busy` one is
several such clients at once; in an `open` one requests arrive by a Poisson process whatever the server does, on as many
connections as it takes, and count from when they were due. Milliseconds are those of answers with status 200.
"""

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httptools

OVERRUN = 200  # requests under way: the server has fallen behind for good
PATIENCE = 30.0  # seconds for one answer
SHED = (429, 503)


class Connection(asyncio.Protocol):
    """One request at a time; closed by whoever wants to."""

    def __init__(self) -> None:
        self.open = False
        self._answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.open = True
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """httptools has seen the answer's end."""
        if not self._parser.should_keep_alive():
            self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(self._parser.get_status_code())

    async def ask(self, request: bytes) -> int:
        """The answer's status; 0 where there is none."""
        self._parser = httptools.HttpResponseParser(self)
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            return await asyncio.wait_for(self._answer, PATIENCE)
        except (TimeoutError, ConnectionResetError):
            self.transport.close()
            self.open = False
            return 0


async def closed(probe: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of `count` requests after `warm` ones, one after the other, `pause` seconds apart."""
    requests = _requests(probe)
    connection = await _connect(probe)
    milliseconds, failures = [], 0
    for number in range(probe["warm"] + probe["count"]):
        if number == probe["warm"]:
            cpu = time.process_time()
        if not connection.open:
            connection = await _connect(probe)
        if probe.get("pause"):
            await asyncio.sleep(probe["pause"])
        started = time.perf_counter()
        status = await connection.ask(next(requests))
        if number < probe["warm"]:
            continue
        if status == 200:
            milliseconds.append(1e3 * (time.perf_counter() - started))
        else:
            failures += 1
    connection.transport.close()
    own = 1e3 * (time.process_time() - cpu) / probe["count"]
    return {"milliseconds": milliseconds, "failures": failures, "own_milliseconds": own}


async def busy(probe: dict[str, Any]) -> dict[str, Any]:
    """How many a second are answered in `seconds` while each of `clients` asks again as soon as it has its answer."""
    requests, failures, answered = _requests(probe), 0, 0
    connections = [await _connect(probe) for _ in range(probe["clients"])]
    start = time.perf_counter()

    async def client(connection: Connection) -> None:
        nonlocal failures, answered
        while connection.open and time.perf_counter() < start + probe["seconds"]:
            if await connection.ask(next(requests)) == 200:
                answered += 1
            else:
                failures += 1
        connection.transport.close()

    await asyncio.gather(*(client(connection) for connection in connections))
    return {"rate": answered / (time.perf_counter() - start), "failures": failures}


async def opened(probe: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of what comes in `seconds` at `rate` a second; `overrun` where the server fell far behind.

    `shed` are the failures that say so, by 429 or 503. `late` is when requests were sent, in milliseconds from when
    they were due, and `core` the share of the time that this process computed: what the load itself adds.
    """
    requests, free, under_way = _requests(probe), [await _connect(probe)], set[asyncio.Task[None]]()
    milliseconds: list[float] = []
    late: list[float] = []
    statuses: Counter[int] = Counter()
    draw, overrun, cpu = random.Random(probe["seed"]), False, time.process_time()

    async def one(due: float, request: bytes) -> None:
        status = 0
        try:
            while free and not free[-1].open:
                free.pop()  # the server has closed it
            connection = free.pop() if free else await _connect(probe)
            late.append(1e3 * (time.perf_counter() - due))
            status = await connection.ask(request)
            free.append(connection)
        except OSError:
            pass  # refused: a failure as any other
        statuses[status] += 1
        if status == 200:
            milliseconds.append(1e3 * (time.perf_counter() - due))

    due = start = time.perf_counter()
    while (due := due + draw.expovariate(probe["rate"])) < start + probe["seconds"]:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if overrun := len(under_way) >= OVERRUN:
            break
        task = asyncio.create_task(one(due, next(requests)))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    for connection in free:
        connection.transport.close()
    found = {"milliseconds": milliseconds, "failures": statuses.total() - statuses[200], "overrun": overrun}
    core = (time.process_time() - cpu) / (time.perf_counter() - start)
    return {**found, "shed": sum(statuses[status] for status in SHED), "late": late, "core": core}


async def _connect(probe: dict[str, Any]) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", probe["port"])
    return connection


def _requests(probe: dict[str, Any]) -> Iterator[bytes]:
    """Whole requests, head and body, again and again."""
    head = "".join(f"{name}: {value}\r\n" for name, value in probe["headers"].items())
    line = f"POST {probe['path']} HTTP/1.1\r\nhost: 127.0.0.1:{probe['port']}\r\n{head}"
    bodies = [_body(file) for file in probe["files"]]
    return itertools.cycle([f"{line}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies])


@cache
def _body(file: str) -> bytes:
    return Path(file).read_bytes()


def main() -> None:
    """Answer probes until standard input ends."""
    kinds = {"closed": closed, "busy": busy, "open": opened}
    for line in sys.stdin:
        probe = json.loads(line)
        sys.stdout.write(json.dumps(asyncio.run(kinds[probe["kind"]](probe))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
