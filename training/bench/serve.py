"""How fast the ranking endpoint answers, beside what one would write without it.

`masknet bench serve` starts all servers at once and asks them in turns, so that what else the machine does falls on all
of them alike; a server that is not asked does nothing. Each has one process that works, on all cores but one, with as
many threads; the load has the last core. Latency: one client that waits for each answer. Rate: requests arrive by a
Poisson process, the largest rate is searched at which 99 % of the answers come within 50 ms. Overload: likewise, twice
as many as can be computed. Stages are means of a turn that the endpoint itself has measured; "HTTP" is what the client
waits beside them.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from serving.bundle import Bundle
from training.bench import machine, report
from training.bench.serve_loader import Case, Loader, cases_of
from training.bench.serve_model import FULL, SMALL, Request, make_bundle, make_requests
from training.bench.serve_overload import Pressure, overloads
from training.bench.serve_rows import ENDPOINT, Effort, latencies, memory, rates
from training.bench.serve_servers import Server, all_servers, on_cores, shares
from training.errors import Failure

FP32, ANY = 1e-5, 0.1  # by which scores may differ from the reference's: rounding, and `fast`
PACKAGES = ("bentoml", "fastapi", "httptools", "mlflow", "onnxruntime", "uvicorn", "uvloop")
THOROUGH, QUICK = Effort(30, 40, 6, 3, 4.0, 50), Effort(2, 5, 2, 1, 0.5, 10)
LONG_PRESSURE, SHORT_PRESSURE = Pressure(2, 200, 0.1, 4.0, 20.0), Pressure(1, 20, 0.02, 0.5, 2.0)


def run_serve(out: Path | None, quick: bool, soak: int) -> dict[str, Any]:
    """Measure, and write to `out`.

    Raises:
        InputError: `out` cannot be written.
        Failure: the endpoint does not start, or a server's scores are wrong.
    """
    if out is not None:
        report.check_writable(out)
    result = measure(quick, soak)
    if out is not None:
        report.write(out, result)
    return result


def shown(result: dict[str, Any]) -> str:
    """A line per row."""
    lines = [report.device_line(result)]
    for row in result["rows"]:
        what = ", ".join(str(row[key]) for key in ("name", "server", "stage") if key in row)
        more = "".join(f", {key} {row[key]:,g}" for key in ("p99", "ratio", "growth") if row.get(key) is not None)
        lines.append(f"{what}: {row['p50']:,g} {row['unit']} (p20 {row['p20']:,g}, p80 {row['p80']:,g}{more})")
    return "\n".join([*lines, *(f"skipped: {one['name']}: {one['reason']}" for one in result["skipped"])])


def measure(quick: bool, soak: int) -> dict[str, Any]:
    """The result; `soak` requests are sent to see whether memory grows, none with 0."""
    size, effort, pressure = (SMALL, QUICK, SHORT_PRESSURE) if quick else (FULL, THOROUGH, LONG_PRESSURE)
    for_servers, for_load = shares()
    threads = max(len(for_servers), 1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bundle = make_bundle(Path(folder) / "bundle", size)
        requests = make_requests(bundle.schema, size)
        servers, skipped = all_servers(Path(folder), bundle.path, threads)
        with on_cores(for_servers):
            running, failed = _started(stack, servers)
        with on_cores(for_load):
            loader = stack.enter_context(Loader())
        cases = cases_of(running, requests, Path(folder))
        differences = _differences(cases, bundle, requests[0])
        rows = latencies(loader, cases, effort, differences)
        rows += rates(loader, cases, effort, rows)
        rows += overloads(loader, cases, pressure)
        if soak:
            rows += memory(loader, next(case for case in cases if case.name == ENDPOINT), soak)
    return {
        "device": {**machine.facts(), "server_cores": threads},
        "versions": machine.versions() | {name: version(name) for name in PACKAGES if find_spec(name)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "shape": {"fields": len(bundle.schema.fields), "context": len(bundle.schema.context), **vars(size)},
        "rows": rows,
        "skipped": skipped + failed,
    }


def _started(stack: ExitStack, servers: Sequence[Server]) -> tuple[list[Server], list[dict[str, str]]]:
    """The servers that have become ready; a rival that does not is left out, with the reason."""
    for server in servers:
        stack.enter_context(server)
    running, failed = [], []
    for server in servers:
        try:
            server.wait()
            running.append(server)
        except Failure as error:
            if server is servers[0]:
                raise
            failed.append({"name": server.name, "reason": str(error)})
    return running, failed


def _differences(cases: Sequence[Case], bundle: Bundle, request: Request) -> dict[str, float]:
    """The largest distance of each case's scores from the reference scorer's; Failure where it is no rounding."""
    expected_N, found = bundle.scorer.score(request.rows), {}
    for case in cases:
        if not case.server.ranks:
            continue
        way = case.way
        answer = httpx.post(
            case.server.url + way.path, content=way.body(request), headers=dict(way.headers), timeout=60
        )
        if answer.status_code != 200:
            raise Failure(f"{case.name} answers {answer.status_code}: {answer.text[:300]}")
        away = max(abs(float(expected_N[i]) - score) for i, score in way.scores(answer.content).items())
        if away > (ANY if "fast" in case.name else FP32):
            raise Failure(f"{case.name}: scores are {away:.2g} off the reference")
        found[case.name] = away
    return found
