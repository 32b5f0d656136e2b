"""The bundle on disk: what is in it, and that one changed byte anywhere is noticed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from features.dataset import PreparedDataset
from features.errors import InputError
from serving.bundle import Bundle, load_bundle
from serving.golden import check_golden

Reseal = Callable[..., None]


@pytest.fixture
def copy(bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path, tmp_path / "bundle"))


def test_only_plain_files(bundle_path: Path) -> None:
    suffixes = {path.suffix for path in bundle_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".sha256", ".yaml", ".parquet", ".safetensors"}


def test_every_file_is_covered_by_a_digest(bundle_path: Path, bundle: Bundle) -> None:
    files = {path.relative_to(bundle_path).as_posix() for path in bundle_path.rglob("*") if path.is_file()}
    assert files == set(bundle.manifest["files"]) | {"manifest.json", "manifest.sha256"}


def test_one_changed_byte_in_any_file_is_refused(copy: Path) -> None:
    random = np.random.default_rng(3)
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        at = int(random.integers(len(whole)))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        with pytest.raises(InputError, match=r"damaged") as error:
            load_bundle(copy)
        name = "manifest.json" if path.name == "manifest.sha256" else path.name
        assert name in str(error.value)
        path.write_bytes(whole)
    load_bundle(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "members" / "00" / "embeddings" / "003.safetensors").unlink()
    with pytest.raises(InputError, match=r"003\.safetensors is missing"):
        load_bundle(copy)


def test_a_stranger_among_the_files_is_named(copy: Path) -> None:
    (copy / "members" / "00" / "extra.bin").write_text("x")
    with pytest.raises(InputError, match=r"extra\.bin is not in manifest\.json"):
        load_bundle(copy)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no bundle: manifest\.json is missing"):
        load_bundle(tmp_path)


def test_resealed_but_other_weights_fail_the_golden_rows(copy: Path, reseal: Reseal) -> None:
    path = copy / "members" / "00" / "network.safetensors"
    state = load_file(path)
    state["logit.bias"] = state["logit.bias"] + 0.01
    save_file(state, path)
    reseal(copy)
    with pytest.raises(InputError, match=r"is refused: golden row \d+ scores"):
        load_bundle(copy)


def test_weights_of_another_shape_are_refused(copy: Path, reseal: Reseal) -> None:
    path = copy / "members" / "00" / "embeddings" / "000.safetensors"
    save_file({"weight": torch.zeros(3, 8)}, path)
    reseal(copy)
    with pytest.raises(InputError, match="do not fit the model"):
        load_bundle(copy)


def test_a_nan_score_is_no_match(bundle: Bundle) -> None:
    golden = json.loads((bundle.path / "golden.json").read_text())
    golden["scores"][0] = float("nan")
    with pytest.raises(InputError, match="is refused"):
        check_golden(bundle.scorer, golden, "x")


def test_golden_rows_hold_missing_unknown_and_known_values(bundle: Bundle) -> None:
    golden = json.loads((bundle.path / "golden.json").read_text())
    encoded = bundle.pipeline.encode(golden["rows"])
    assert encoded.num_rows == len(golden["scores"]) == 16
    user_N = encoded["user_id"].to_numpy()
    assert user_N[0] == 0
    assert user_N[1] == 1
    assert (user_N[2:] >= 2).all()
    assert len(set(golden["scores"])) > 8


def test_recorded_metrics_are_the_scorers(bundle: Bundle, dataset: PreparedDataset) -> None:
    table = dataset.split("test")
    score_N = bundle.scorer.score_encoded(table)
    label_N = table["_label"].to_numpy()
    loss = -np.mean(np.where(label_N == 1, np.log(score_N), np.log(1 - score_N)))
    # the scores are fp32: 1 - p loses up to 6e-8 of it, relative to p near 1
    assert bundle.manifest["metrics"]["test"]["logloss"] == pytest.approx(float(loss), rel=1e-5)


def test_a_rows_score_does_not_depend_on_its_batch(bundle: Bundle, dataset: PreparedDataset) -> None:
    table = dataset.split("test").slice(0, 200)
    together = bundle.scorer.score_encoded(table)
    alone = np.concatenate([bundle.scorer.score_encoded(table.slice(row, 1)) for row in range(200)])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)  # the promise of every published score


def test_scores_come_from_the_folded_network(
    bundle: Bundle, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the trained network was asked")

    golden = json.loads((bundle_path / "golden.json").read_text())
    monkeypatch.setattr(bundle.scorer.models[0].network, "forward", refuse)
    check_golden(bundle.scorer, golden, "bundle")
