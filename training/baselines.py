"""What a model has to beat: the base rate, and logistic regression on the same encoded fields."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as sparse
from sklearn.linear_model import LogisticRegression

from features.batches import EncodedRows
from features.dataset import LABEL, PreparedDataset
from features.encoders import FIRST, UNKNOWN, Scale
from features.metrics import logloss

ScoreN = npt.NDArray[np.float64]
STRENGTHS = (0.01, 0.1, 1.0)  # inverse L2 penalties tried; the validation split chooses
HIDING_SEED = 1
ITERATIONS = 1000  # more than it takes; the solver stops by itself


def baseline_scores(dataset: PreparedDataset, split: str) -> dict[str, ScoreN]:
    """Scores of `split` by each baseline, fitted on the training split."""
    train, valid, asked = (dataset.split(name) for name in ("train", "valid", split))
    rate = float(train[LABEL].to_numpy().mean())
    return {
        "base rate": np.full(asked.num_rows, rate),
        "logistic regression": _logistic_regression(dataset, train, valid, asked),
    }


def _logistic_regression(dataset: PreparedDataset, train: pa.Table, valid: pa.Table, asked: pa.Table) -> ScoreN:
    train_x, valid_x = _columns(dataset, train, hide=True), _columns(dataset, valid)
    train_y, valid_y = train[LABEL].to_numpy(), valid[LABEL].to_numpy()
    if train_y.min() == train_y.max():
        return np.full(asked.num_rows, float(train_y[0]))
    models = [LogisticRegression(C=c, max_iter=ITERATIONS).fit(train_x, train_y) for c in STRENGTHS]
    best = min(models, key=lambda model: logloss(valid_y, model.predict_proba(valid_x)[:, 1]))
    score_N: ScoreN = best.predict_proba(_columns(dataset, asked))[:, 1]
    return score_N


def _columns(dataset: PreparedDataset, table: pa.Table, hide: bool = False) -> sparse.csr_matrix:
    """A column per id of every field, [N, Σ ids], and one per value and missing value; a list's ids share one.

    With `hide`, the share unknown_rate of the ids is hidden, as it is from the model in training.
    """
    rows = EncodedRows.of(dataset.pipeline.as_served(table), dataset.pipeline.layout)
    if hide:
        random = np.random.default_rng(HIDING_SEED)
        for name, rate in dataset.pipeline.hidden.items():
            rows.hide(name, rate, UNKNOWN, random)
    ids, values, missing = rows.gather(np.arange(table.num_rows))
    blocks = [sparse.csr_matrix(values.numpy()), sparse.csr_matrix(missing.numpy())]
    for field in dataset.pipeline.fields:
        if isinstance(field.encoder, Scale):
            continue
        jagged = ids[field.name]
        length_N = jagged.lengths().numpy()
        offsets = np.concatenate([[0], np.cumsum(length_N)])
        weights = np.repeat(1.0 / length_N, length_N)
        ids_I, width = jagged.values().numpy(), field.encoder.num_ids
        if field.is_managed:  # there is no map without a model: hashes share columns
            ids_I = np.where(ids_I < FIRST, ids_I, FIRST + ids_I % (width - FIRST))
        blocks.append(sparse.csr_matrix((weights, ids_I, offsets), shape=(table.num_rows, width)))
    return sparse.hstack(blocks).tocsr()
