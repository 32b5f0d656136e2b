"""What a model has to beat: the base rate, and logistic regression on the same encoded fields.

Their probabilities are corrected for dropped negatives as the model's are, p / (p + (1 − p) / rate). Memory does not
grow with the training split.

Legend: N rows, S rows of a sample.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as sparse
from sklearn.linear_model import LogisticRegression

from features.batches import EncodedRows
from features.dataset import LABEL, PreparedDataset, SplitFiles, weights_of
from features.encoders import FIRST, UNKNOWN, Scale
from features.metrics import logloss

ScoreN = npt.NDArray[np.float64]
STRENGTHS = (0.01, 0.1, 1.0)  # inverse L2 penalties tried; the validation split chooses
HIDING_SEED = 1
MOST_ROWS = 500_000  # of a split that are encoded at once: the model is fitted, and chosen, on that many
SAMPLE_SEED = 0
ITERATIONS = 1000  # more than it takes; the solver stops by itself


def baseline_scores(dataset: PreparedDataset, split: str) -> dict[str, ScoreN]:
    """Scores of `split` by each baseline, fitted on the training split and corrected for its dropped negatives."""
    train, asked = dataset.files("train"), dataset.files(split)
    rate, sampling = _base_rate(train), dataset.schema.sampling_rate
    model = _logistic_regression(dataset, train)
    base = np.full(asked.num_rows, rate)
    fitted = base if model is None else _probabilities(dataset, model, asked)
    return {"base rate": corrected(base, sampling), "logistic regression": corrected(fitted, sampling)}


def sample_notes(train: SplitFiles) -> tuple[str, ...]:
    """What a reader must know of how they were fitted."""
    if train.num_rows <= MOST_ROWS:
        return ()
    return (f"Logistic regression is fitted on {MOST_ROWS:,} of {train.num_rows:,} training rows, drawn at random.",)


def corrected(score_N: ScoreN, rate: float) -> ScoreN:
    """Probabilities among all rows, of those among rows of which the share `rate` of negatives was kept."""
    return score_N / (score_N + (1 - score_N) / rate)


def _base_rate(train: SplitFiles) -> float:
    clicks = sum(float(train.read(group, [LABEL])[LABEL].to_numpy().sum()) for group in train.row_groups)
    return clicks / train.num_rows


def _logistic_regression(dataset: PreparedDataset, train: SplitFiles) -> LogisticRegression | None:
    """The best on the validation split of those tried; None where the rows to fit it on are of one class."""
    table = _sample(train, [*dataset.pipeline.names, LABEL])
    label_S = table[LABEL].to_numpy()
    if label_S.min() == label_S.max():
        return None
    columns = _columns(dataset, table, hide=True)
    models = [LogisticRegression(C=c, max_iter=ITERATIONS).fit(columns, label_S) for c in STRENGTHS]
    valid = _sample(dataset.files("valid"), [*dataset.pipeline.names, LABEL])
    valid_x, valid_S = _columns(dataset, valid), valid[LABEL].to_numpy()
    weight_S = weights_of(dataset.schema, valid_S)

    def loss(model: LogisticRegression) -> float:
        score_S = corrected(model.predict_proba(valid_x)[:, 1], dataset.schema.sampling_rate)
        return logloss(valid_S, score_S, weight_S)

    return min(models, key=loss)


def _probabilities(dataset: PreparedDataset, model: LogisticRegression, asked: SplitFiles) -> ScoreN:
    parts = [np.empty(0)]
    for group in asked.row_groups:
        table = asked.read(group, list(dataset.pipeline.names))
        for start in range(0, table.num_rows, MOST_ROWS):
            parts.append(model.predict_proba(_columns(dataset, table.slice(start, MOST_ROWS)))[:, 1])
    return np.concatenate(parts)


def _sample(files: SplitFiles, columns: list[str]) -> pa.Table:
    """Columns of a split's rows, of MOST_ROWS drawn at random where there are more, in their order."""
    row_S = np.arange(min(files.num_rows, MOST_ROWS))
    if files.num_rows > MOST_ROWS:
        row_S = np.sort(np.random.default_rng(SAMPLE_SEED).choice(files.num_rows, MOST_ROWS, replace=False))
    tables, first = [], 0
    for group in files.row_groups:
        low, high = np.searchsorted(row_S, (first, first + group.rows))
        tables.append(files.read(group, columns).take(pa.array(row_S[low:high] - first)))
        first += group.rows
    return pa.concat_tables(tables)


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
