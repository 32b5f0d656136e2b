"""What a request's fields were like: how many of their values were missing or never seen."""

from collections import defaultdict
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from features.encoders import MISSING, UNKNOWN
from serving.ranking.asked import Asked
from serving.trace import Trace


def note_counts(trace: Trace, asked: Asked, hidden: Collection[str]) -> None:
    """Add what has been asked to the trace: rows, and by field values, missing ones and ids of the never seen.

    A field that all candidates share counts once; of a list every id does, an empty one being a missing one.
    Those in `hidden` are defaults of fields that serving does not know.
    """
    trace.rows += asked.rows
    values, missing, unknown = dict(trace.values), dict(trace.missing), dict(trace.unknown)

    def add(names: list[str], count: int, missing_S: list[int], unknown_S: list[int]) -> None:
        for name, lacking, strange in zip(names, missing_S, unknown_S, strict=True):
            values[name] = values.get(name, 0) + count
            missing[name] = missing.get(name, 0) + lacking
            unknown[name] = unknown.get(name, 0) + strange

    alike: defaultdict[int, dict[str, npt.NDArray[np.integer]]] = defaultdict(dict)
    for name, (ids_K, _) in asked.encoded.ids.items():
        if name not in hidden:
            alike[len(ids_K)][name] = ids_K
    for count, ids in alike.items():
        id_SK = np.stack(list(ids.values()))
        found = [np.count_nonzero(id_SK == reserved, axis=1).tolist() for reserved in (MISSING, UNKNOWN)]
        add(list(ids), count, *found)
    for name, value_N in asked.encoded.values.items():
        if name not in hidden:
            add([name], len(value_N), [int(np.isnan(value_N).sum())], [0])
    trace.values, trace.missing, trace.unknown = values, missing, unknown
