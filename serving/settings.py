"""The service's configuration: a YAML file, every key described here; `masknet serve --set section.key=value`.

Workers get it as JSON in the environment (`VARIABLE`), with the model's name and what it was resolved to at the start.
"""

from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from features.validation import Frozen

VARIABLE = "MASKNET_SERVE"


class _Section(Frozen):
    """Workers get it as JSON, which has no infinity."""

    model_config = ConfigDict(allow_inf_nan=False)


class Limits(_Section):
    """What one worker takes on, and what is refused at once."""

    rows: int = Field(default=5000, ge=1, description="most candidates, or rows, of one request; more is 413")
    body_bytes: int = Field(default=16 * 2**20, ge=1024, description="largest request body; a larger one is 413")
    body_seconds: float = Field(default=5.0, gt=0, description="in which a request's body arrives whole, or it is 408")
    concurrency: int = Field(default=1, ge=1, description="requests that one worker computes at the same time")
    queue: int = Field(
        default=16,
        ge=0,
        description="requests that wait for their turn in one worker; more are 429. While more arrive than can be "
        "done, one for each that computes",
    )
    deadline_ms: float = Field(
        default=1000.0,
        gt=0,
        description="from a request's arrival; one whose turn comes later, or could not come in time, is 503 and not "
        "computed",
    )
    drain_seconds: float = Field(
        default=5.0, ge=0, description="after SIGTERM not ready, but still answering, before connections are refused"
    )


class Follow(_Section):
    """How the service keeps up with the registry."""

    interval_seconds: float = Field(
        default=15.0, gt=0, description="between looks at the alias; of no consequence for a folder or a version"
    )
    compatible_schemas: bool = Field(
        default=False, description="take a new version whose schema asks clients for other fields than the present one"
    )


class Challenger(_Section):
    """A second model that answers a share of users."""

    model: str = Field(description="any MODEL; an alias is followed")
    share: float = Field(gt=0, le=1, description="of users, by a stable hash of `key`")
    key: str = Field(description="the context field that tells users apart; without a value the champion answers")


class Shadow(_Section):
    """A model that scores requests after they were answered, for its metrics and log alone."""

    model: str = Field(description="any MODEL; an alias is followed")
    share: float = Field(default=1.0, gt=0, le=1, description="of requests; under load fewer")


class PredictionLog(_Section):
    """A sample of what was asked and answered, in Parquet."""

    folder: Path = Field(description="where the files go; each worker writes its own")
    share: float = Field(default=0.01, gt=0, le=1, description="of requests")
    file_rows: int = Field(default=100_000, ge=1, description="rows after which a file is closed")
    file_seconds: float = Field(default=300.0, gt=0, description="seconds after which a file is closed")
    keep_files: int = Field(default=100, ge=1, description="newest files of a worker that are kept")


class Tracing(_Section):
    """Requests and their stages as OpenTelemetry spans."""

    endpoint: str = Field(
        pattern="^https?://[^/]",
        description="a collector of OTLP over HTTP, as in http://collector:4318/v1/traces; needs the extra otlp",
    )
    share: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="of requests; one that comes with a traceparent is traced if its caller is",
    )


class Store(_Section):
    """Where field values are fetched by key when a request names the key alone."""

    kind: Literal["redis", "parquet"] = Field(description="redis, or a Parquet file held in memory")
    url: str = Field(description="redis://host:6379/0, or the file's path")
    key: str = Field(description="the field whose value is the key, such as user_id")
    fields: tuple[str, ...] = Field(min_length=1, description="the fields that are fetched where a request lacks them")
    prefix: str = Field(default="", description="of keys in Redis, as in masknet:user:")
    timeout_ms: float = Field(
        default=20.0, gt=0, description="after which the values count as missing (and are counted in a metric)"
    )


class ServeSettings(_Section):
    """Everything that `masknet serve` can be told."""

    model: str = Field(default="models:/movielens-ranker@champion", description="MODEL: folder, URI or run id")
    backend: Literal["exact", "fast"] = Field(
        default="exact",
        description="exact: within 1e-6 of the reference scorer; fast: the fastest that passed the bundle's check",
    )
    tables: Literal["fp32", "fp16", "int8"] = Field(
        default="fp32", description="embedding tables in memory; only fp32 is exact"
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where the network runs")
    threads: int | None = Field(
        default=None, ge=1, description="of one worker's products; by default its share of the cores"
    )
    workers: int = Field(default=1, ge=1, description="processes, each with a copy of the model")
    limits: Limits = Limits()
    follow: Follow = Follow()
    challenger: Challenger | None = None
    shadow: Shadow | None = None
    log: PredictionLog | None = None
    tracing: Tracing | None = None
    store: Store | None = None
    cache: Path | None = Field(
        default=None, description="folder of downloaded models, by default ~/.cache/masknet; a start without MLflow"
    )
    log_requests: bool = Field(
        default=False, description="write values of refused requests to the service's log, for debugging"
    )

    @model_validator(mode="after")
    def _only_fp32_is_exact(self) -> "ServeSettings":
        if self.backend == "exact" and self.tables != "fp32":
            raise ValueError(f"tables: {self.tables} rounds embeddings; set backend: fast, or tables: fp32")
        return self
