"""Which backend serves: the check on rows, its record in the bundle, and the choice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from features.dataset import LABEL, PreparedDataset
from features.errors import InputError
from masknet.folding import fold
from serving.backends import check as check_module
from serving.backends import choose
from serving.backends.check import check_backends
from serving.backends.choose import make_backend
from serving.backends.fast import lacking
from serving.backends.gpu import GPUBackend
from serving.backends.record import Backends, Record, Verdict
from serving.bundle import Bundle, load_bundle
from serving.scorer import Scorer
from tests.serving.backends import auc_of
from tests.serving.conftest import ITEMS, Make
from training.backends import checked
from training.sections import ServingConfig

int8 = pytest.mark.skipif(lacking("int8") is not None, reason=str(lacking("int8")))
bf16 = pytest.mark.skipif(lacking("bf16") is not None, reason=str(lacking("bf16")))
CPU = torch.device("cpu")


def the_rows(scorer: Scorer) -> tuple[pa.Table, np.ndarray]:
    """Every item shown to each of three users, some with a click."""
    rows = {"user": [user for user in ("ann", "bob", None) for _ in range(ITEMS)], "item": [*range(ITEMS)] * 3}
    label_N = (np.random.default_rng(3).random(3 * ITEMS) < 0.4).astype(np.float64)
    return scorer.pipeline.encode(rows), label_N


def check(scorer: Scorer) -> Backends:
    return check_backends(scorer, *the_rows(scorer), "valid")


def record_of(**verdicts: Verdict) -> Backends:
    given = {"split": "valid", "rows": 1, "range_rows": 1, "versions": {}, "backends": verdicts}
    return Backends(Record.model_validate(given))


def logits(bundle: Bundle, kind: str, member: int = 0) -> torch.Tensor:
    """Of one member, all rows."""
    model = bundle.scorer.models[member]
    backend = make_backend(fold(model.network), kind, "cpu", None, bundle.backends, member=member)  # type: ignore[arg-type]
    emb_BD = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    return backend.logits(torch.empty(1, 0), emb_BD)


@int8
def test_the_record_is_what_the_scores_say(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "MOST_LOST", 1.0)  # the rows are too few to tell
    scorer = make().scorer
    found = check(scorer)
    encoded, label_N = the_rows(scorer)
    row_N = np.random.default_rng(0).permutation(len(label_N))
    rows = np.sort(row_N[len(label_N) // 2 :])
    assert (found.record.rows, found.record.range_rows) == (len(rows), len(label_N) // 2)
    exact_N = scorer.uncalibrated(encoded)[rows]
    backend = make_backend(fold(scorer.models[0].network), "fast", CPU, None, found)
    fast_N = scorer.with_networks([backend.logits]).uncalibrated(encoded)[rows]
    verdict, label_N = found.record.backends["int8"], label_N[rows]
    assert verdict.auc_loss == pytest.approx(auc_of(label_N, exact_N) - auc_of(label_N, fast_N), abs=1e-9)
    losses = [-np.log(np.where(label_N > 0, p, 1 - p)).mean() for p in (exact_N.astype(float), fast_N.astype(float))]
    assert verdict.logloss_increase == pytest.approx(losses[1] - losses[0], abs=1e-7)
    assert verdict.largest_difference == pytest.approx(float(np.abs(fast_N - exact_N).max()), abs=1e-7)
    assert backend.bound == verdict.largest_difference
    assert backend.bound > 1e-5  # it rounds, so this test could fail
    assert verdict.batch_difference is not None
    assert verdict.batch_difference <= 1e-6


@int8
@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("MOST_LOST", -1.0, "of AUC; less than -1e+00 is allowed"),
        ("BATCH_TOLERANCE", -1.0, "a row's score moves by"),
    ],
)
def test_what_fails_the_check(
    make: Make, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, reason: str
) -> None:
    monkeypatch.setattr(check_module, limit, value)
    verdict = check(make().scorer).record.backends["int8"]
    assert not verdict.passed
    assert verdict.reason is not None
    assert reason in verdict.reason


@int8
def test_bounds_of_other_rows_fail_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    observed = check_module._ranges

    def narrow(*given: Any) -> Any:
        return [{name: range_2Z / 20 for name, range_2Z in each.items()} for each in observed(*given)]

    monkeypatch.setattr(check_module, "_ranges", narrow)
    verdict = check(make().scorer).record.backends["int8"]
    assert not verdict.passed
    assert verdict.largest_difference is not None
    assert verdict.largest_difference > 0.02


def test_rows_of_one_class_pass_nothing(make: Make) -> None:
    scorer = make().scorer
    encoded, label_N = the_rows(scorer)
    for name, verdict in check_backends(scorer, encoded, 0 * label_N, "valid").record.backends.items():
        assert not verdict.passed
        assert verdict.reason == lacking(name) or "one class" in str(verdict.reason)


def test_a_network_that_a_backend_does_not_take(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("could not create\na primitive")

    monkeypatch.setattr(check_module, "fast_network", refuse)
    monkeypatch.setattr(check_module, "lacking", lambda name: None)
    reasons = {verdict.reason for verdict in check(make().scorer).record.backends.values()}
    assert reasons == {"it does not take this network: could not create a primitive"}


def test_exact_is_the_folded_network(make: Make) -> None:
    bundle = make()
    network = fold(bundle.scorer.models[0].network, [0])
    context_1C, candidates_NR = torch.randn(1, 4), torch.randn(9, 4)
    with torch.no_grad():
        expected_N = bundle.scorer.models[0].network(
            torch.cat([context_1C.expand(9, -1), candidates_NR], 1).view(9, 2, 4)
        )
    backend = make_backend(network, "exact", "cpu", None, None)
    assert (backend.name, backend.bound) == ("fp32", 0.0)
    torch.testing.assert_close(backend.logits(context_1C, candidates_NR), expected_N, rtol=0, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_products_run_on_that_many_threads(make: Make, threads: int) -> None:
    seen: list[int] = []
    network = fold(make().scorer.models[0].network)
    network.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads)
        make_backend(network, "exact", "cpu", threads, None).logits(torch.empty(1, 0), torch.randn(5, 8))
    finally:
        torch.set_num_threads(before)
    assert seen == [threads]


def test_fast_without_a_record(make: Make) -> None:
    bundle = make()
    assert bundle.backends is None
    with pytest.raises(InputError, match=r"the bundle has no backends\.json.* take backend exact"):
        logits(bundle, "fast")


def test_fast_where_none_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "lacking", lambda name: "this CPU has no such thing" if name == "bf16" else None)
    allowed = record_of(int8=Verdict(passed=False, reason="it loses much"), bf16=Verdict(passed=True))
    with pytest.raises(
        InputError, match=r"int8: it loses much; bf16: this CPU has no such thing\); take backend exact"
    ):
        choose.chosen(CPU, allowed)
    with pytest.raises(InputError, match="int8: it loses much; bf16: not checked"):
        choose.chosen(CPU, record_of(int8=Verdict(passed=False, reason="it loses much")))


@pytest.mark.parametrize(("passed", "device", "name"), [(True, "cpu", "int8"), (False, "cpu", "bf16")])
def test_the_fastest_that_passed(monkeypatch: pytest.MonkeyPatch, passed: bool, device: str, name: str) -> None:
    monkeypatch.setattr(choose, "lacking", lambda name: None)
    allowed = record_of(int8=Verdict(passed=passed, reason="r"), bf16=Verdict(passed=True))
    assert choose.chosen(torch.device(device), allowed)[0] == name
    assert choose.chosen(torch.device("cuda"), allowed)[0] == "bf16"


@int8
def test_every_member_has_its_own_bounds(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "MOST_LOST", 1.0)  # the rows are too few to tell
    bundle = make("two", 1, 2, check=check)
    assert bundle.backends is not None
    assert len(bundle.backends.ranges) == 2
    for member in (0, 1):
        exact_N, fast_N = logits(bundle, "exact", member), logits(bundle, "fast", member)
        alone = make(f"alone {member}", member + 1, check=check)
        torch.testing.assert_close(logits(alone, "fast"), fast_N)
        assert 0 < float((fast_N - exact_N).abs().median()) < 0.1 * float(exact_N.std())


@int8
def test_a_damaged_record_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reseal: Callable[..., None]
) -> None:
    monkeypatch.setattr(check_module, "MOST_LOST", 1.0)
    path = make(check=check).path
    for number, (file, text, message) in enumerate(
        [
            ("backends/int8-00.safetensors", None, r"backends/int8-00\.safetensors cannot be read"),
            ("backends/int8-00.safetensors", "no such file", r"backends/int8-00\.safetensors cannot be read"),
            ("backends.json", "{}", r"backends\.json: split: required key is missing"),
            ("backends.json", "{", r"backends\.json is damaged"),
        ]
    ):
        copy = tmp_path / f"copy {number}"
        shutil.copytree(path, copy)
        (copy / file).unlink() if text is None else (copy / file).write_text(text)
        with pytest.raises(InputError, match="is damaged"):
            load_bundle(copy)
        if text is None:
            files = json.loads((copy / "manifest.json").read_text())["files"]
            reseal(copy, files={name: digest for name, digest in files.items() if name != file})
        else:
            reseal(copy)
        with pytest.raises(InputError, match=message):
            load_bundle(copy)


def test_graphs_on_a_cpu_take_the_same_way(make: Make) -> None:
    network = fold(make().scorer.models[0].network, [0])
    backend = GPUBackend("fp32", network, CPU, torch.float32)
    context_1C, candidates_NR = torch.randn(1, 4), torch.randn(70, 4)
    with torch.inference_mode():
        expected_N = network(context_1C, candidates_NR)
    torch.testing.assert_close(backend.logits(context_1C, candidates_NR), expected_N, rtol=0, atol=2e-6)
    half = GPUBackend("bf16", network, CPU, torch.bfloat16, bound=0.1)
    assert half.bound == 0.1
    half_N = half.logits(context_1C, candidates_NR)
    assert half_N.dtype == torch.float32
    assert 0 < float((half_N - expected_N).abs().max()) < 0.1 * float(expected_N.std())
    assert (half_N != half_N.bfloat16()).float().mean() > 0.9  # the last layer rounds nothing: scores would be equal


@int8
@bf16
def test_training_checks_its_model(bundle: Bundle, dataset: PreparedDataset) -> None:
    """The trained bundle's record is of its validation split, and its fast scores are within it."""
    assert bundle.backends is not None
    record, valid = bundle.backends.record, dataset.split("valid")
    assert (record.split, record.rows + record.range_rows) == ("valid", valid.num_rows)
    assert list(record.backends) == ["int8", "bf16"]
    for verdict in record.backends.values():
        assert verdict.batch_difference is not None
        assert verdict.batch_difference <= 1e-6
        assert verdict.auc_loss is not None
        assert abs(verdict.auc_loss) < 5e-3  # of a few hundred rows, where one pair in the wrong order is 1e-5
        assert verdict.passed == (verdict.reason is None)
    assert checked(ServingConfig(fast=False), bundle.scorer, dataset) is None
    again = checked(ServingConfig(check_rows=50), bundle.scorer, dataset)
    assert again is not None
    assert again.record.rows == 50


def test_training_of_days_checks_the_last_one(bundle: Bundle, dataset: PreparedDataset, tmp_path: Path) -> None:
    """Without a validation split the rows are those that a day is scored on."""

    class Day:
        splits = ("train", "test")
        path, schema = dataset.path, dataset.schema

        def split(self, name: str) -> pa.Table:
            assert name == "test"
            return dataset.split("test")

    found = checked(ServingConfig(), bundle.scorer, Day())  # type: ignore[arg-type]
    assert found is not None
    assert found.record.split == "test"
    assert found.record.rows + found.record.range_rows == len(dataset.split("test")[LABEL])
