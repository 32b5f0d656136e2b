"""Online encoding with vocabularies of given sizes, in a process of its own; `encode` starts it.

    python -m tests.benchmarks.encode_once SIZE [SIZE ...] [--requests N] [--candidates N]

Every SIZE is a categorical field with a vocabulary of so many values, texts of 8 to 12 digits. Prints one line of JSON:
milliseconds of each request, and the memory that the fitted pipeline holds.

Timed: `FeaturePipeline.encode` of a mapping of lists of text, ready for the model. Not timed: the parsing of the
request's JSON (done right before, so the texts are fresh), the start, and the first requests, which warm up.

Requests are drawn in two ways, each with 2 % of values that were never seen: `zipf`, by rank with probability about
proportional to 1 / rank, and `uniform`, where nearly every value misses the processor's caches. Two requests in a row
are one of each, so neither has the caches for itself.

Memory is counted (the index and the values' Arrow buffers) and measured (resident memory after `warm_up`, less that
before the vocabularies were made; what the allocators keep for reuse is in it).
"""

import argparse
import gc
import json
import time

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl
import pyarrow as pa

from features.encoders import Vocabulary
from features.fields import CategoricalField
from features.pipeline import FeaturePipeline
from tests.benchmarks.common import peak_rss_mib, rss_mib

STEP = 982_451_653  # a prime, so that multiples of it are all different below the range of values
NEVER_SEEN = 0.02
WARM_UP = 20


def texts(field: int, place_N: npt.NDArray[np.int64]) -> pl.Series:
    """The values at these places of a field's vocabulary, or behind its end: 8 to 12 digits, without order."""
    lowest = 10 ** (7 + field % 5)
    return pl.Series(lowest + place_N * STEP % (9 * lowest)).cast(pl.String)


def build(sizes: list[int]) -> FeaturePipeline:
    """A pipeline of categorical fields, warmed up."""
    specs = tuple(CategoricalField(name=f"field_{number}", type="categorical") for number in range(len(sizes)))
    vocabularies = {
        spec.name: Vocabulary(texts(number, np.arange(size)).to_arrow().cast(pa.string()))
        for number, (spec, size) in enumerate(zip(specs, sizes, strict=True))
    }
    pipeline = FeaturePipeline.build(specs, {**vocabularies})
    pipeline.warm_up()
    return pipeline


def request(sizes: list[int], candidates: int, way: str, random: np.random.Generator) -> bytes:
    """The JSON of a request: a list of text for each field."""
    columns = {}
    for number, size in enumerate(sizes):
        uniform_N = random.random(candidates)
        place_N = ((size + 1.0) ** uniform_N - 1.0 if way == "zipf" else size * uniform_N).astype(np.int64)
        new_N = size + random.integers(0, size, candidates)
        place_N = np.where(random.random(candidates) < NEVER_SEEN, new_N, np.minimum(place_N, size - 1))
        columns[f"field_{number}"] = texts(number, place_N).to_list()
    return orjson.dumps(columns)


def main() -> None:
    """Build, encode, and print what it took."""
    parser = argparse.ArgumentParser(description="Milliseconds of online encoding.")
    parser.add_argument("sizes", type=int, nargs="+", help="values in each field's vocabulary")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--candidates", type=int, default=500)
    options = parser.parse_args()
    texts(0, np.arange(1000)).to_arrow()  # the libraries' own memory comes before the first reading
    gc.collect()
    before = rss_mib()
    pipeline = build(options.sizes)
    gc.collect()
    pa.default_memory_pool().release_unused()
    held = rss_mib() - before
    peak = peak_rss_mib()
    random = np.random.default_rng(1)
    samples: dict[str, list[float]] = {"zipf": [], "uniform": []}
    unknown = 0
    for number in range(options.requests + WARM_UP):
        for way, found in samples.items():
            rows = orjson.loads(request(options.sizes, options.candidates, way, random))
            start = time.perf_counter()
            table = pipeline.encode(rows)
            seconds = time.perf_counter() - start
            if number >= WARM_UP:
                found.append(1000 * seconds)
                unknown += sum((column.to_numpy() == 1).sum() for column in table.columns)
    values = sum(field.encoder.values.nbytes for field in pipeline.fields if isinstance(field.encoder, Vocabulary))
    asked = 2 * options.requests * options.candidates * len(options.sizes)
    facts = {
        "entries": sum(options.sizes),
        "index_bytes": pipeline.lookup.nbytes,
        "values_bytes": values,
        "held_mib": held,
        "peak_rss_mib": peak,
        "never_seen": round(float(unknown / asked), 4),
    }
    print(json.dumps({"milliseconds": samples, **facts}))


if __name__ == "__main__":
    main()
