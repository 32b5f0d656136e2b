"""The same service with ONNX Runtime: the trained network exported in fp32, all fields of every row as its input.

python -m tests.benchmarks.rivals.serving_onnx BUNDLE --port 8000 --threads 1
"""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from fastapi import FastAPI

from features.batches import EncodedRows
from masknet.model import MaskNet
from serving.bundle import Bundle
from tests.benchmarks.rivals.serving_common import Ranking, main, make_app


def session_of(model: MaskNet, fields: int, width: int, threads: int) -> onnxruntime.InferenceSession:
    """Embeddings [B, F, d] in, logits [B] out, for any number of rows."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        rows = torch.export.Dim("rows", min=1, max=1_000_000)
        example = (torch.randn(8, fields, width),)
        torch.onnx.export(
            model.network, example, path, dynamo=True, dynamic_shapes=({0: rows},), input_names=["emb_BFd"],
            verbose=False,
        )  # fmt: skip
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def app_of(bundle: Bundle, threads: int) -> FastAPI:
    """The service."""
    torch.set_num_threads(threads)
    (model,) = bundle.scorer.models
    session = session_of(model, len(bundle.pipeline.fields), bundle.config.embedding_dim, threads)

    def scores(rows: dict[str, list[object]]) -> np.ndarray:
        encoded = EncodedRows.of(bundle.pipeline.encode(rows), bundle.pipeline.layout)
        with torch.inference_mode():
            emb_BFd = model.embed(*encoded.gather(np.arange(encoded.num_rows))).numpy()
        (logit_B,) = session.run(None, {"emb_BFd": emb_BFd})
        return 1.0 / (1.0 + np.exp(-logit_B))

    return make_app(bundle.schema, Ranking(scores))


if __name__ == "__main__":
    main(app_of)
