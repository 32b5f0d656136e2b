"""A bundle whose fields are managed: the rows that training gave to ids are those that every score is made of.

Legend: N rows, F fields, d embedding width, K ids with rows.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from safetensors.numpy import load_file, save_file
from starlette.testclient import TestClient

from features.encoders import AnyEncoder, Hash, Managed
from features.errors import InputError
from features.id_maps import IdMap
from features.pipeline import FeaturePipeline
from features.schema import Schema
from masknet.config import MaskNetConfig
from masknet.model import MaskNet
from serving.api.routes import Routes
from serving.bundle import Bundle, fields_of, load_bundle, tables_of, write_bundle
from serving.members import Member
from serving.ranking.engine import RankingEngine
from tests.serving.parts import parts_of

RATE, DIM = 0.25, 4
SCHEMA = Schema.model_validate(
    {
        "name": "managed",
        "label": {"column": "click"},
        "context": ["user"],
        "negative_sampling": {"rate": RATE},
        "fields": [
            {"name": "shop", "type": "categorical", "encoder": "hash", "buckets": 5},
            {"name": "liked", "type": "list", "separator": " ", "share_with": "user"},
            {"name": "user", "type": "categorical", "encoder": "managed", "buckets": 9},
            {"name": "tags", "type": "list", "separator": " ", "encoder": "managed", "buckets": 7, "pooling": "sum"},
            {
                "name": "slot",
                "type": "categorical",
                "encoder": "managed",
                "buckets": 6,
                "training_only": {"default": 3},
            },
            {"name": "user_x_shop", "type": "cross", "of": ["user", "shop"], "encoder": "managed", "buckets": 20},
        ],
    }
)
ENCODERS: dict[str, AnyEncoder] = {
    "shop": Hash(5),
    "user": Managed(9, "lfu"),
    "tags": Managed(7, "lru"),
    "slot": Managed(6, "lfu"),
    "user_x_shop": Managed(20, "distance_lfu"),
}
PIPELINE = FeaturePipeline.build(SCHEMA.fields, ENCODERS)
CONFIG = MaskNetConfig(embedding_dim=DIM, blocks=1, block_width=6, head=())
KNOWN = {"user": {"ann": 7, "bob": 3, "ü": 2}, "tags": {"a": 6, "b": 4}, "slot": {"3": 5, "4": 2}}
USERS, SHOPS = ["ann", "zoe", None, "bob"], ["x", "y", None, "x"]
ROWS: dict[str, list[Any]] = {
    "user": USERS,
    "shop": SHOPS,
    "liked": ["bob ann new", "", "ü", "bob"],
    "tags": ["a b", "c", None, "b b"],
}


def id_of(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def id_map(rows: dict[int, int], step: int = 40) -> IdMap:
    ids = np.array(sorted(rows), np.int64)
    return IdMap(ids, np.array([rows[i] for i in ids.tolist()], np.int32), {"counts": np.arange(len(ids))}, step)


def crosses() -> list[int]:
    """What the pipeline makes of the rows' crosses; the formula has a test of its own."""
    found: list[int] = PIPELINE.encode(ROWS)["user_x_shop"].to_pylist()
    return found


def maps() -> dict[str, IdMap]:
    named = {name: id_map({id_of(text): row for text, row in rows.items()}) for name, rows in KNOWN.items()}
    return {**named, "user_x_shop": id_map({crosses()[0]: 12, crosses()[3]: 19})}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Random weights, far from those of any initialization."""
    tables = tables_of(PIPELINE)
    model = MaskNet(CONFIG, tables, fields_of(PIPELINE))
    generator = torch.Generator().manual_seed(2)
    path = tmp_path_factory.mktemp("managed") / "bundle"
    write_bundle(
        path,
        name="managed",
        config=CONFIG,
        schema=SCHEMA,
        pipeline=PIPELINE,
        members=[
            Member(
                {name: torch.randn(w.shape, generator=generator) / 3 for name, w in model.dense_state().items()},
                {t.name: torch.randn(t.rows, DIM, generator=generator) for t in tables},
            )
        ],
        sampling_rate=RATE,
        run_id=None,
        evaluate=lambda scorer: {},
        id_maps=maps(),
    )
    return load_bundle(path)


def expected_scores(bundle: Bundle) -> np.ndarray:
    """The trained network on rows of the tables' files, picked by hand."""
    files = sorted((bundle.path / "members" / "00" / "embeddings").glob("*"))
    shop, user, tags, slot, crossed = (load_file(file)["weight"] for file in files)
    liked = [[3, 7, 1], [0], [2], [3]]
    cross_rows = [12, 1, 0, 19]
    embedded = []
    for row in range(4):
        text = SHOPS[row]
        shop_row = 0 if text is None else 2 + xxhash.xxh3_64_intdigest(text.encode()) % 5
        embedded.append(
            [
                shop[shop_row],
                user[liked[row]].mean(0),
                user[[7, 1, 0, 3][row]],
                tags[[[6, 4], [1], [0], [4, 4]][row]].sum(0),
                slot[5],
                crossed[cross_rows[row]],
            ]
        )
    emb_NFd = torch.from_numpy(np.array(embedded))
    with torch.no_grad():
        logit_N = bundle.scorer.models[0].network(emb_NFd).float()
    return torch.sigmoid(logit_N + math.log(RATE)).numpy()


def test_every_way_to_a_score_goes_through_the_map(bundle: Bundle) -> None:
    expected = expected_scores(bundle)
    assert len(set(expected.round(4).tolist())) == 4
    np.testing.assert_allclose(bundle.scorer.score(ROWS), expected, rtol=0, atol=1e-6)
    encoded = PIPELINE.encode({**ROWS, "slot": ["4", "9", None, "3"]})  # as training has seen them
    np.testing.assert_allclose(bundle.scorer.score_encoded(encoded), expected, rtol=0, atol=1e-6)
    engine = RankingEngine.load(bundle.path, "1")
    np.testing.assert_allclose(engine.predict(pa.table(ROWS)), expected, rtol=0, atol=1e-6)
    app = Routes(parts_of(engine)).app
    client = TestClient(app)
    answer = client.post("/predict", json={"rows": ROWS})
    np.testing.assert_allclose(answer.json()["scores"], expected, rtol=0, atol=1e-6)
    for row, user in enumerate(USERS):
        candidates = {name: [values[row]] for name, values in ROWS.items() if name != "user"}
        ranked = client.post("/rank", json={"context": {"user": user}, "candidates": candidates}).json()
        assert ranked["items"][0]["score"] == pytest.approx(expected[row], abs=1e-6)


def test_maps_come_back_as_they_were(bundle: Bundle) -> None:
    for name, given in maps().items():
        found = bundle.scorer.id_maps[name]
        assert found.ids_K.tolist() == given.ids_K.tolist()
        assert found.rows_K.tolist() == given.rows_K.tolist()
        assert (found.ids_K.dtype, found.rows_K.dtype, found.step) == (np.int64, np.int32, 40)
        assert {key: used.tolist() for key, used in found.usage.items()} == {"counts": list(range(len(given.ids_K)))}
    files = {path.name for path in (bundle.path / "id_maps").iterdir()}
    assert files == {"001.safetensors", "002.safetensors", "003.safetensors", "004.safetensors"}
    assert {f"id_maps/{name}" for name in files} <= bundle.manifest["files"].keys()


def test_golden_rows_hold_missing_never_seen_and_known_ids(bundle: Bundle) -> None:
    golden = json.loads((bundle.path / "golden.json").read_text())
    assert list(golden["ids"]) == ["liked", "user", "tags", "slot", "user_x_shop"]
    for name, owner in (("user", "user"), ("liked", "user"), ("user_x_shop", "user_x_shop")):
        known = set(maps()[owner].ids_K.tolist())
        assert golden["ids"][name][:2] == [None, None]
        given = [ids if isinstance(ids, list) else [ids] for ids in golden["ids"][name][2:]]
        assert {id_ for ids in given for id_ in ids} == known
    assert golden["rows"]["user"][:2] == [None, "golden never seen"]
    assert not {"ann", "bob", "ü"} & set(golden["rows"]["user"])


Reseal = Callable[..., None]


def with_map(bundle: Bundle, copy: Path, reseal: Reseal, **changed: Any) -> Path:
    """A copy of the bundle with other tensors in the users' map."""
    shutil.copytree(bundle.path, copy)
    path = copy / "id_maps" / "001.safetensors"
    save_file({**load_file(path), **changed}, path)
    reseal(copy)
    return copy


def test_another_map_fails_the_golden_rows(bundle: Bundle, tmp_path: Path, reseal: Reseal) -> None:
    rows = bundle.scorer.id_maps["user"].rows_K
    with pytest.raises(InputError, match=r"is refused: golden row \d+ scores"):
        load_bundle(with_map(bundle, tmp_path / "copy", reseal, rows=rows[[1, 0, 2]]))


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": np.array([9, 3, 2], np.int32)},
        {"rows": np.array([1, 3, 2], np.int32)},
        {"rows": np.array([3, 3, 2], np.int32)},
        {"ids": np.array([9, 8, 10])},
        {"step": np.array([], np.int64)},
    ],
)
def test_a_map_that_is_none_is_named(bundle: Bundle, tmp_path: Path, reseal: Reseal, changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"id_maps/001\.safetensors"):
        load_bundle(with_map(bundle, tmp_path / "copy", reseal, **changed))


def test_a_missing_map_is_named(bundle: Bundle, tmp_path: Path, reseal: Reseal) -> None:
    shutil.copytree(bundle.path, tmp_path / "copy")
    (tmp_path / "copy" / "id_maps" / "002.safetensors").unlink()
    with pytest.raises(InputError, match=r"id_maps/002\.safetensors is missing"):
        load_bundle(tmp_path / "copy")
    reseal(tmp_path / "copy")
    with pytest.raises(InputError, match=r"id_maps/002\.safetensors"):
        load_bundle(tmp_path / "copy")


def test_a_map_without_ids_scores_everyone_as_never_seen(bundle: Bundle, tmp_path: Path) -> None:
    nobody = {name: id_map({}) for name in maps()}
    write_bundle(
        tmp_path / "bundle",
        name="managed",
        config=CONFIG,
        schema=SCHEMA,
        pipeline=PIPELINE,
        members=[Member.of(bundle.scorer.models[0])],
        sampling_rate=RATE,
        run_id=None,
        evaluate=lambda scorer: {},
        id_maps=nobody,
    )
    empty = load_bundle(tmp_path / "bundle")
    one = {"user": ["ann", "zoe"], "shop": ["x", "x"], "liked": ["", ""], "tags": ["a", "q"]}
    first, second = empty.scorer.score(one)
    assert first == second
    assert bundle.scorer.score(one)[0] != bundle.scorer.score(one)[1]


def test_a_bundle_from_before_there_were_managed_ids_loads(bundle: Bundle, tmp_path: Path, reseal: Reseal) -> None:
    schema = Schema.model_validate(
        {**SCHEMA.plain(), "context": [], "fields": [SCHEMA.fields[0].plain() | {"type": "categorical"}]}
    )
    pipeline = FeaturePipeline.build(schema.fields, {"shop": Hash(5)})
    model = MaskNet(CONFIG, tables_of(pipeline), fields_of(pipeline))
    path = tmp_path / "bundle"
    write_bundle(
        path,
        name="old",
        config=CONFIG,
        schema=schema,
        pipeline=pipeline,
        members=[Member(model.dense_state(), {"shop": torch.randn(7, DIM)})],
        sampling_rate=RATE,
        run_id=None,
        evaluate=lambda scorer: {},
    )
    golden = json.loads((path / "golden.json").read_text())
    del golden["ids"]
    (path / "golden.json").write_text(json.dumps(golden))
    reseal(path)
    assert not (path / "id_maps").exists()
    assert load_bundle(path).scorer.id_maps == {}
