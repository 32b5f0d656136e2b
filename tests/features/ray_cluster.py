"""Prepares data on a Ray cluster of two nodes while its workers are killed and a node goes; run by test_ray.py.

Arguments: the schema, the raw file, the output folder. Prints how many workers were killed and how many nodes went.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from features import units
from features.prepare import prepare
from features.ray_engine import RayEngine
from features.schema import load_schema
from features.splits import SplitRule

KILLS = 3
UNIT_BYTES = 20_000


def busy_workers(cluster_pid: int) -> list[psutil.Process]:
    """Worker processes that are running a task: Ray writes its name into their titles."""
    found = []
    for process in psutil.Process(cluster_pid).children(recursive=True):
        try:
            if "ray::FlatMap" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def disturb(cluster: Cluster, second: object, told: dict[str, int]) -> None:
    """Kill busy workers until KILLS have died, and take the second node away after the first."""
    while told["killed"] < KILLS and not told["over"]:
        for process in busy_workers(os.getpid())[:1]:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            told["killed"] += 1
            if told["killed"] == 1:
                cluster.remove_node(second)
                told["nodes"] += 1
        time.sleep(0.3)


def main() -> None:
    schema, raw, out = (Path(argument) for argument in sys.argv[1:])
    units.UNIT_BYTES = UNIT_BYTES
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    engine = RayEngine(cluster.address)  # before there is a second node: this process belongs to the first
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    assert len(ray.nodes()) == 2
    told = {"killed": 0, "nodes": 0, "over": 0}
    thread = threading.Thread(target=disturb, args=(cluster, second, told))
    thread.start()
    rule = SplitRule.parse("time:0.8,0.1,0.1")
    prepare(load_schema(schema), {"input": [str(raw)]}, out, split=rule, engine=engine, max_bad_rows=0.5)
    told["over"] = 1
    thread.join()
    sys.stdout.write(f"killed {told['killed']} nodes {told['nodes']}\n")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
