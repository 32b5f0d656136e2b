"""A ranking model to measure serving with, as a bundle with random weights, and requests for it.

39 fields as in Criteo's data, 26 categorical and 13 numeric, 20 of them context (a user, a page, a device) and 19 per
candidate. Two categorical fields are hashed into 200,000 buckets, the others have vocabularies of 3 to 100,000 texts of
eight hexadecimal digits; ten numeric fields are cut at 31 quantiles, three are values. A request's values are drawn by
Zipf's law, 2 % of the texts were never seen, 3 % of all values are missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from features.batches import EncodedRows
from features.encoders import AnyEncoder, Hash, Quantile, Scale, Vocabulary
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.backends.check import check_backends
from serving.backends.record import Backends
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member
from serving.scorer import Scorer

NAME = "bench"
NEVER_SEEN, MISSING = 0.02, 0.03
TOP_K = 10
MEAN_LOGIT = -2.0
_PRIME = 2_654_435_761  # odd, so that multiples of it are all different in 32 bits
# Values of the categorical fields; the first of the context and the second of the candidates are hashed.
_CONTEXT = (200_000, 100_000, 20_000, 5_000, 2_000, 1_000, 500, 200, 100, 50, 20, 10, 4)
_CANDIDATE = (100_000, 200_000, 50_000, 10_000, 5_000, 2_000, 1_000, 500, 200, 100, 40, 12, 3)
_HASHED = ("context_c0", "candidate_c1")
_NUMBERS = {"context": 7, "candidate": 6}
_VALUES = {"context_n6": "standard", "candidate_n4": "standard", "candidate_n5": "log1p"}  # the others are quantiles


@dataclass(frozen=True)
class Size:
    """How large the model and its requests are; vocabularies are divided by `shrink`. `check_rows` decide on `fast`."""

    width: int = 400
    head: int = 400
    shrink: int = 1
    candidates: int = 500
    requests: int = 64
    check_rows: int = 400_000


FULL: Final = Size()
SMALL: Final = Size(width=32, head=16, shrink=100, candidates=50, requests=8, check_rows=100_000)


@dataclass(frozen=True)
class Request:
    """A user's values, and those of the candidates, a column each."""

    context: dict[str, Any]
    candidates: dict[str, list[Any]]

    @property
    def rows(self) -> dict[str, list[Any]]:
        """The candidates' rows as a model without requests reads them: the context stands in each."""
        count = len(next(iter(self.candidates.values())))
        return {**{name: [value] * count for name, value in self.context.items()}, **self.candidates}


def values_of_fields(size: Size) -> dict[str, int]:
    """How many values each categorical field has."""
    counts = {f"context_c{i}": n for i, n in enumerate(_CONTEXT)}
    counts |= {f"candidate_c{i}": n for i, n in enumerate(_CANDIDATE)}
    return {name: max(n // size.shrink, 3) for name, n in counts.items()}


def bench_schema(size: Size) -> Schema:
    """39 fields; those of the context come first."""
    fields: list[dict[str, Any]] = []
    counts = values_of_fields(size)
    for side, numbers in _NUMBERS.items():
        for name in (name for name in counts if name.startswith(side)):
            hashed = {"encoder": "hash", "buckets": counts[name]} if name in _HASHED else {}
            fields.append({"name": name, "type": "categorical", **hashed})
        names = [f"{side}_n{i}" for i in range(numbers)]
        fields += [{"name": n, "type": "numeric", "encoder": _VALUES.get(n, "quantile")} for n in names]
    context = [field["name"] for field in fields if field["name"].startswith("context")]
    return Schema.model_validate({"name": NAME, "label": {"column": "click"}, "context": context, "fields": fields})


def make_bundle(out: Path, size: Size) -> Bundle:
    """Three parallel blocks, r = 2, embeddings of 10, random weights; logits with mean −2 and a deviation of 1."""
    schema = bench_schema(size)
    pipeline = FeaturePipeline.build(schema.fields, _encoders(schema, values_of_fields(size)))
    config = MaskNetConfig(embedding_dim=10, blocks=3, block_width=size.width, reduction_ratio=2.0, head=(size.head,))
    torch.manual_seed(0)
    model = MaskNet(config, tables_of(pipeline), fields_of(pipeline))
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.add_(0.02 * torch.randn_like(weight))  # ones and zeros of norms would fold to nothing
        for bag in model.embeddings.embedding_bags.values():
            bag.weight.normal_()
        _spread(model, pipeline, schema, size)
    write_bundle(
        out,
        name=NAME,
        config=config,
        schema=schema,
        pipeline=pipeline,
        members=[Member.of(model)],
        sampling_rate=1.0,
        run_id=None,
        evaluate=lambda scorer: {},
        check=lambda scorer: _checked(scorer, schema, size),
    )
    return load_bundle(out)


def _spread(model: MaskNet, pipeline: FeaturePipeline, schema: Schema, size: Size) -> None:
    """Give logits the spread of a trained model's; those of random weights are nearly the same."""
    few = replace(size, requests=2_000 // size.candidates)
    rows = EncodedRows.of(pipeline.encode(joined(make_requests(schema, few, seed=4))), pipeline.layout)
    logit_N = model(*rows.gather(np.arange(rows.num_rows)))
    last = model.network.logit
    last.weight.div_(logit_N.std())
    last.bias.sub_(logit_N.mean()).div_(logit_N.std()).add_(MEAN_LOGIT)


def _checked(scorer: Scorer, schema: Schema, size: Size) -> Backends:
    """The fast backends that pass on rows whose labels are drawn from the model's own scores."""
    rows = joined(make_requests(schema, replace(size, requests=size.check_rows // size.candidates), seed=2))
    encoded = scorer.pipeline.encode(rows)
    score_N = scorer.score_encoded(encoded)
    label_N = (np.random.default_rng(3).random(len(score_N)) < score_N).astype(np.int64)
    return check_backends(scorer, encoded, label_N, "rows of the benchmark", size.check_rows)


def make_requests(schema: Schema, size: Size, seed: int = 1) -> list[Request]:
    """`size.requests` users, each with candidates of their own."""
    random, counts = np.random.default_rng(seed), values_of_fields(size)

    def side(names: tuple[str, ...], rows: int) -> dict[str, list[Any]]:
        return {name: _column(counts.get(name), rows, random) for name in names}

    requests = []
    for _ in range(size.requests):
        context = {name: column[0] for name, column in side(schema.context, 1).items()}
        requests.append(Request(context, side(schema.candidate_fields, size.candidates)))
    return requests


def joined(requests: list[Request]) -> dict[str, list[Any]]:
    """All rows of all requests."""
    columns: dict[str, list[Any]] = {}
    for request in requests:
        for name, values in request.rows.items():
            columns.setdefault(name, []).extend(values)
    return columns


def _encoders(schema: Schema, counts: Mapping[str, int]) -> dict[str, AnyEncoder]:
    boundaries = np.exp(np.linspace(-2.0, 6.0, 31, dtype=np.float64))
    made: dict[str, Callable[[str], AnyEncoder]] = {
        "vocabulary": lambda name: Vocabulary(pa.array([_text(i) for i in range(counts[name])])),
        "hash": lambda name: Hash(counts[name]),
        "quantile": lambda name: Quantile(boundaries),
        "standard": lambda name: Scale("standard", 8.0, 12.0),
        "log1p": lambda name: Scale("log1p", 1.5, 1.5),
    }
    return {field.name: made[schema.encoder_of(field)](field.name) for field in schema.fields}


def _text(place: int) -> str:
    return f"{place * _PRIME % 2**32:08x}"


def _column(values: int | None, rows: int, random: np.random.Generator) -> list[Any]:
    """Texts of a field with so many values, or numbers."""
    missing_N = random.random(rows) < MISSING
    if values is None:
        number_N = np.round(np.exp(random.normal(1.5, 1.2, rows)), 3)
        return [None if missing else float(x) for missing, x in zip(missing_N, number_N, strict=True)]
    place_N = np.minimum((values + 1.0) ** random.random(rows) - 1.0, values - 1).astype(np.int64)
    place_N = np.where(random.random(rows) < NEVER_SEEN, values + place_N, place_N)
    return [None if missing else _text(int(place)) for missing, place in zip(missing_N, place_N, strict=True)]
