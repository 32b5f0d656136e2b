"""Libraries' harmless start-up noise, kept away from people. The tests' list of warnings gives each one's reason."""

import logging
import os
import warnings

_NOISE = (
    r"(?s).*Failed to import.*",  # fbgemm: parts of its CUDA build
    r"(?s).*split_table_batched_embeddings_ops.*",  # fbgemm: deprecated module that torchrec still imports
    r"(?s).*HeuristicalStorageReservation.*",  # torchrec planner
    r"(?s).*broadcast_buffers.*",  # torchrec passes it to DDP
    r"(?s).*ShardedTensor.*",  # torchrec still uses it
    r"(?s).*torch\.jit.*",
    r"(?s).*This API is deprecated.*",
    r"(?s).*dense_embedding_codegen_lookup_function.*",  # fbgemm on CPUs: differentiable, but not declared so
)


def quiet_libraries() -> None:
    """Filter known warnings and lower the loggers that report nothing a user can act on."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("torchrec", "torch.fx", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torchrec's planner tells so of every data_parallel table, which has no shards to specify
    logging.getLogger().addFilter(lambda record: "Sharding spec not found" not in record.getMessage())
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of databases that are away
    logging.getLogger("alembic").setLevel(logging.WARNING)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is told by whoever needed it
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is the command's
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # of no command, whatever the environment says
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
