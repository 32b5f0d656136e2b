"""The ranking service that one would write around a trained model: FastAPI, pydantic and PyTorch as it is.

    python -m tests.benchmarks.rivals.serving_eager BUNDLE --port 8000 --threads 1

The bundle's trained network, not folded; its pipeline encodes whole rows, the context repeated in each.
"""

import numpy as np
import torch
from fastapi import FastAPI

from features.batches import EncodedRows
from serving.bundle import Bundle
from tests.benchmarks.rivals.serving_common import Ranking, main, make_app


def app_of(bundle: Bundle, threads: int) -> FastAPI:
    """The service."""
    torch.set_num_threads(threads)
    (model,) = bundle.scorer.models

    def scores(rows: dict[str, list[object]]) -> np.ndarray:
        encoded = EncodedRows.of(bundle.pipeline.encode(rows), bundle.pipeline.layout)
        with torch.inference_mode():
            return model(*encoded.gather(np.arange(encoded.num_rows))).sigmoid().numpy()

    return make_app(bundle.schema, Ranking(scores))


if __name__ == "__main__":
    main(app_of)
