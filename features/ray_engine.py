"""The passes of `prepare` on Ray Data: the same functions on the same units, in any process of a cluster.

Every process has to see the output folder under the same path (a shared file system), and the input, which may also be
object storage (s3://, gs://). A unit's files are written aside and renamed, and a unit whose process died is done
again, so nothing is lost or doubled.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported: no usage reports

import ray
import ray.data

from features.errors import InputError

T = TypeVar("T")
RETRIES = 8  # of a unit whose process died


class RayEngine:
    """Runs units as rows of a Ray data set, each in a task of its own."""

    def __init__(self, address: str | None = None) -> None:
        """Join the cluster at `address`, or start one on this machine; one that is joined already is used."""
        if not ray.is_initialized():
            try:
                ray.init(
                    address=address or "local", log_to_driver=False, configure_logging=False, include_dashboard=False
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(f"--address {address!r}: no Ray cluster answers there: {error}") from None
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False

    def run(self, function: Callable[[int], Iterable[T]], units: int) -> Iterator[T]:
        """See `features.engines.Engine`."""
        rows = ray.data.range(units, override_num_blocks=units)
        tasks = rows.flat_map(
            lambda row: _results(function, int(row["id"])), ray_remote_args_fn=lambda: {"max_retries": RETRIES}
        )
        for row in tasks.iter_rows():
            result: Any = row["result"]
            if isinstance(result, InputError):
                raise result
            yield result


def _results(function: Callable[[int], Iterable[Any]], unit: int) -> Iterator[dict[str, Any]]:
    try:
        for result in function(unit):
            yield {"result": result}
    except InputError as error:  # as a result: Ray would wrap it, and try again
        yield {"result": error}
