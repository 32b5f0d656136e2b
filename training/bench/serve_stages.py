"""Where a request's time goes, from the endpoint's own /metrics."""

from collections.abc import Mapping

import httpx

from serving.monitoring.metrics import EVERY

Reading = Mapping[str, tuple[float, float]]
METRIC = "masknet_stage_seconds"
OUTSIDE = "HTTP"  # what the client sees beside the stages
BUT_MODEL = "all but the model"
WAIT = 1.5 * EVERY  # seconds, after which the server's counts are handed over


def read_stages(text: str) -> dict[str, tuple[float, float]]:
    """Seconds and requests of each stage since the server's start, over all models that answer."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, tuple[float, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.name != METRIC or sample.labels.get("role") == "shadow":
                continue
            seconds, count = found.get(sample.labels["stage"], (0.0, 0.0))
            if sample.name == f"{METRIC}_sum":
                found[sample.labels["stage"]] = (seconds + sample.value, count)
            elif sample.name == f"{METRIC}_count":
                found[sample.labels["stage"]] = (seconds, count + sample.value)
    return found


def scrape(url: str) -> dict[str, tuple[float, float]]:
    """`read_stages` of a server that runs."""
    return read_stages(httpx.get(f"{url}/metrics", timeout=30.0).text)


def split(before: Reading, after: Reading, client_ms: float) -> dict[str, float]:
    """Mean milliseconds of a request's stages between two readings; `client_ms` is the mean that the client saw."""
    stages = {}
    for stage, (seconds, count) in after.items():
        earlier_seconds, earlier_count = before.get(stage, (0.0, 0.0))
        if count > earlier_count:
            stages[stage] = 1e3 * (seconds - earlier_seconds) / (count - earlier_count)
    if "model" not in stages:
        return {}
    return {**stages, OUTSIDE: client_ms - sum(stages.values()), BUT_MODEL: client_ms - stages["model"]}
