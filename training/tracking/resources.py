"""CPU, memory and GPU while training runs, sampled in a thread of their own."""

import threading
from collections.abc import Callable

import psutil
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

SAMPLE_SECONDS = 10.0
_MB = 1e6


class ResourceSampler:
    """Takes a sample every ten seconds and one at the end.

    MLflow's monitors give the machine's numbers (cpu_utilization_percentage, system_memory_usage_megabytes,
    gpu_0_utilization_percentage, …); process_cpu_percentage (100 a core) and process_memory_megabytes are this
    process's. MLflow's own thread around its monitors ends when the server is away, which this one does not.
    """

    def __init__(self, record: Callable[[dict[str, float]], None]) -> None:
        """Args: `record` takes a sample; names begin with "system/", which gives them a page of their own in MLflow."""
        self._record = record
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), *_gpu_monitors()]
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="resources", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample and end the thread."""
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        self._process.cpu_percent()  # the share is of the time since this thread's call before
        psutil.cpu_percent()
        while not self._ended.wait(SAMPLE_SECONDS):
            self._record(self._sample())
        self._record(self._sample())

    def _sample(self) -> dict[str, float]:
        values = {
            "process_cpu_percentage": self._process.cpu_percent(),
            "process_memory_megabytes": round(self._process.memory_info().rss / _MB, 1),
        }
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in values.items()}


def _gpu_monitors() -> list[BaseMetricsMonitor]:
    try:
        return [GPUMonitor()]
    except (ImportError, RuntimeError):  # no NVIDIA GPU, or no driver
        return []
