"""Which backend serves: the check on rows, its record in the bundle, and the choice."""

import json
import re
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
from serving.backends import choose, fast
from serving.backends.check import check_backends
from serving.backends.choose import make_backend
from serving.backends.fast import lacking
from serving.backends.record import Backends, Device, Record, Verdict
from serving.bundle import Bundle, load_bundle
from serving.ranking.engine import RankingEngine
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
    return check_backends(scorer, *the_rows(scorer), "valid", devices=["cpu"])


def allow_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows here are too few to tell."""
    monkeypatch.setattr(check_module, "MOST_LOST", 1.0)
    monkeypatch.setattr(check_module, "LEAST_ROWS", 2)


def record_of(device: Device = "cpu", /, **verdicts: Verdict) -> Backends:
    given = {"split": "valid", "rows": 1, "range_rows": 1, "versions": {}, "backends": verdicts}
    return Backends({device: Record.model_validate(given)})


def logits(bundle: Bundle, kind: str, member: int = 0) -> torch.Tensor:
    """Of one member, all rows."""
    model = bundle.scorer.models[member]
    backend = make_backend(fold(model.network), kind, "cpu", None, bundle.backends, member=member)  # type: ignore[arg-type]
    emb_BD = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    return backend.logits(torch.empty(1, 0), emb_BD)


@int8
def test_the_record_is_what_the_scores_say(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_all(monkeypatch)
    scorer = make().scorer
    found = check(scorer)
    encoded, label_N = the_rows(scorer)
    row_N, record = np.random.default_rng(0).permutation(len(label_N)), found.devices["cpu"]
    rows = np.sort(row_N[len(label_N) // 4 :])
    assert (record.rows, record.range_rows) == (len(rows), len(label_N) // 4)
    exact_N = scorer.uncalibrated(encoded)[rows]
    backend = make_backend(fold(scorer.models[0].network), "fast", CPU, None, found)
    fast_N = scorer.with_networks([backend.logits]).uncalibrated(encoded)[rows]
    verdict, label_N = record.backends["int8"], label_N[rows]
    assert verdict.auc_loss == pytest.approx(auc_of(label_N, exact_N) - auc_of(label_N, fast_N), abs=1e-9)
    losses = [-np.log(np.where(label_N > 0, p, 1 - p)) for p in (exact_N.astype(float), fast_N.astype(float))]
    assert verdict.logloss_increase == pytest.approx(losses[1].mean() - losses[0].mean(), abs=1e-7)
    assert verdict.logloss_error == pytest.approx(np.std(losses[1] - losses[0]) / (len(rows) - 1) ** 0.5, abs=1e-7)
    drawn = [np.random.default_rng(seed).integers(len(rows), size=len(rows)) for seed in range(400)]
    spread = np.std([auc_of(label_N[i], exact_N[i]) - auc_of(label_N[i], fast_N[i]) for i in drawn])
    assert verdict.auc_error == pytest.approx(spread, rel=0.25)  # the bootstrap's; it strays by 4 % itself
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
        ("CONFIDENT", 1e9, "too few rows to tell: on 135 it loses"),
        ("BATCH_TOLERANCE", -1.0, "a row's score moves by"),
    ],
)
def test_what_fails_the_check(
    make: Make, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, reason: str
) -> None:
    monkeypatch.setattr(check_module, "LEAST_ROWS", 2)
    monkeypatch.setattr(check_module, limit, value)
    verdict = check(make().scorer).devices["cpu"].backends["int8"]
    assert not verdict.passed
    assert verdict.reason is not None
    assert reason in verdict.reason


@int8
def test_bounds_of_other_rows_fail_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    observed = check_module._ranges

    def narrow(*given: Any) -> Any:
        return [{name: range_2Z / 20 for name, range_2Z in each.items()} for each in observed(*given)]

    monkeypatch.setattr(check_module, "_ranges", narrow)
    verdict = check(make().scorer).devices["cpu"].backends["int8"]
    assert not verdict.passed
    assert verdict.largest_difference is not None
    assert verdict.largest_difference > 0.02


def test_rows_of_one_class_pass_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = make().scorer
    encoded, label_N = the_rows(scorer)
    monkeypatch.setattr(check_module, "LEAST_ROWS", 2)
    for name, verdict in check_backends(scorer, encoded, 0 * label_N, "valid").devices["cpu"].backends.items():
        assert not verdict.passed
        assert verdict.reason == lacking(name) or "one class" in str(verdict.reason)


def test_a_network_that_a_backend_does_not_take(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("could not create\na primitive")

    monkeypatch.setattr(check_module, "fast_network", refuse)
    monkeypatch.setattr(check_module, "lacking", lambda name, device: None)
    reasons = {verdict.reason for verdict in check(make().scorer).devices["cpu"].backends.values()}
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
    with pytest.raises(InputError, match=r"backends\.json has no check on cpu; .* take backend exact"):
        logits(bundle, "fast")


def test_fast_where_none_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "lacking", lambda name, device: "this CPU lacks it" if name == "bf16" else None)
    allowed = record_of(int8=Verdict(passed=False, reason="it loses much"), bf16=Verdict(passed=True))
    with pytest.raises(InputError, match=r"int8: it loses much; mixed: not checked; bf16: this CPU lacks it\); take"):
        choose.chosen("cpu", allowed)
    with pytest.raises(InputError, match="int8: it loses much; mixed: not checked; bf16: not checked"):
        choose.chosen("cpu", record_of(int8=Verdict(passed=False, reason="it loses much")))


@pytest.mark.parametrize(
    ("int8", "mixed", "name"), [(True, True, "int8"), (False, True, "mixed"), (False, False, "bf16")]
)
def test_the_fastest_that_passed(monkeypatch: pytest.MonkeyPatch, int8: bool, mixed: bool, name: str) -> None:
    monkeypatch.setattr(choose, "lacking", lambda name, device: None)
    verdicts = {"bf16": True, "mixed": mixed, "int8": int8}
    allowed = record_of(**{each: Verdict(passed=passed, reason="r") for each, passed in verdicts.items()})
    assert choose.chosen("cpu", allowed)[0] == name


@pytest.mark.parametrize(
    ("vnni", "bf16", "lacks"),
    [
        (True, True, {}),
        (True, False, {"mixed": "BF16", "bf16": "BF16"}),
        (False, True, {"int8": "VNNI", "mixed": "VNNI"}),
        (False, False, {"int8": "VNNI", "mixed": "VNNI", "bf16": "BF16"}),
    ],
)
def test_what_a_cpu_lacks(monkeypatch: pytest.MonkeyPatch, vnni: bool, bf16: bool, lacks: dict[str, str]) -> None:
    monkeypatch.setattr(fast.int8, "runs_here", lambda: vnni)
    monkeypatch.setattr(fast.bf16, "runs_here", lambda: bf16)
    names = fast.FASTEST_FIRST["cpu"]
    found = {name: lacking(name) for name in names}
    assert found == {name: f"this CPU has no AVX-512 {lacks[name]}" if name in lacks else None for name in names}


@int8
@bf16
def test_bounds_are_kept_where_mixed_alone_has_passed(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    allow_all(monkeypatch)
    bundle = make()
    measured = check_module._Trial.verdict

    def verdict(trial: Any, name: str, *rest: Any) -> Verdict:
        found = measured(trial, name, *rest)  # type: ignore[arg-type]
        return found.model_copy(update={"passed": name in passing, "reason": None if name in passing else "r"})

    monkeypatch.setattr(check_module._Trial, "verdict", verdict)
    passing = {"mixed"}
    found = check(bundle.scorer)
    found.save(tmp_path)
    loaded = Backends.load(tmp_path, members=1)
    assert loaded is not None
    assert loaded.devices == found.devices
    network = fold(bundle.scorer.models[0].network)
    backend = make_backend(network, "fast", "cpu", None, loaded)
    assert (backend.name, backend.bound) == ("mixed", found.devices["cpu"].backends["mixed"].largest_difference)
    emb_ND = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected_N = fast.fast_network("mixed", network, found.ranges[0])(torch.empty(1, 0), emb_ND)
    assert torch.equal(backend.logits(torch.empty(1, 0), emb_ND), expected_N)
    passing = {"bf16"}
    found = check(bundle.scorer)
    assert found.ranges == ()
    (tmp_path / "bf16").mkdir()
    found.save(tmp_path / "bf16")
    assert [path.name for path in (tmp_path / "bf16").iterdir()] == ["backends.json"]


def test_a_check_on_one_device_says_nothing_of_another(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "lacking", lambda name, device: None)
    on_cpu = record_of(int8=Verdict(passed=True), bf16=Verdict(passed=True, largest_difference=0.2))
    message = r"no check on cuda; on a machine with one run python -m training\.backends MODEL --data DIR --out BUNDLE"
    with pytest.raises(InputError, match=message):
        make_backend(fold(make().scorer.models[0].network), "fast", "cuda", None, on_cpu)
    on_gpu = record_of("cuda", bf16=Verdict(passed=True, largest_difference=0.1))
    both = on_cpu.joined(on_gpu)
    assert choose.chosen("cuda", both) == ("bf16", on_gpu.devices["cuda"].backends["bf16"])
    assert choose.chosen("cpu", both)[0] == "int8"
    with pytest.raises(InputError, match=r"none may be taken on cuda \(bf16: it loses much"):
        choose.chosen("cuda", on_cpu.joined(record_of("cuda", bf16=Verdict(passed=False, reason="it loses much"))))


@pytest.mark.parametrize(
    ("lost", "error", "reason"),
    [
        (0.0, 0.0, None),
        (-0.5, 0.1, None),
        (5e-5, 3e-5, None),  # 9.9e-5 at most
        (5e-5, 3.1e-5, "too few rows to tell: on 1,000 it loses 5.0e-05 ± 3.1e-05 of AUC; .* some 1,041 rows"),
        (-1e-4, 2e-4, r"too few rows to tell: on 1,000 it loses -1\.0e-04 ± 2\.0e-04"),
        (1e-4, 1e-5, "too few rows to tell: .* is the limit$"),
        (3e-4, 2e-4, "too few rows to tell"),
        (3e-4, 1e-4, r"it loses 3\.0e-04 of AUC; less than 1e-04 is allowed"),  # 1.4e-4 at least
        (5e-5, None, "too few rows to tell: 1000, with less than five of a class"),
    ],
)
def test_a_loss_has_to_be_surely_small(lost: float, error: float | None, reason: str | None) -> None:
    found = check_module._loses("AUC", lost, error, 1000)
    assert found is None if reason is None else re.search(reason, str(found))


@int8
def test_every_member_has_its_own_bounds(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_all(monkeypatch)
    bundle = make("two", 1, 2, check=check)
    assert bundle.backends is not None
    assert len(bundle.backends.ranges) == 2
    for member in (0, 1):
        exact_N, fast_N = logits(bundle, "exact", member), logits(bundle, "fast", member)
        alone = make(f"alone {member}", member + 1, check=check)
        torch.testing.assert_close(logits(alone, "fast"), fast_N)
        assert 0 < float((fast_N - exact_N).abs().median()) < 0.1 * float(exact_N.std())


@int8
def test_an_engine_tells_its_bound_and_what_the_check_has_found(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_all(monkeypatch)
    bundle = make("checked", 1, 2, check=check)
    assert bundle.backends is not None
    verdict = bundle.backends.devices["cpu"].backends["int8"]
    about = RankingEngine(bundle, "1", backend="fast").about()
    assert (about["backend"], about["largest_difference"]) == ("int8", verdict.largest_difference)
    assert verdict.largest_difference is not None
    assert verdict.largest_difference > 0
    assert about["check"] == verdict.model_dump()
    assert {"auc_loss", "logloss_increase"} <= about["check"].keys()
    about = RankingEngine(make("exact", 1), "1").about()
    assert (about["backend"], about["largest_difference"], about["check"]) == ("fp32", 0.0, None)
    about = RankingEngine(make("rounded", 1), "1", tables="fp16").about()
    assert about["largest_difference"] is None  # nobody has looked


@int8
def test_a_damaged_record_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reseal: Callable[..., None]
) -> None:
    allow_all(monkeypatch)
    path = make(check=check).path
    for number, (file, text, message) in enumerate(
        [
            ("backends/int8-00.safetensors", None, r"backends/int8-00\.safetensors cannot be read"),
            ("backends/int8-00.safetensors", "no such file", r"backends/int8-00\.safetensors cannot be read"),
            ("backends.json", "{}", r"backends\.json: devices: required key is missing"),
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


@int8
@bf16
def test_training_checks_its_model(bundle: Bundle, dataset: PreparedDataset) -> None:
    """The trained bundle's record is of its validation split, and its fast scores are within it."""
    assert bundle.backends is not None
    record, valid = bundle.backends.devices["cpu"], dataset.split("valid")
    assert (record.split, record.rows + record.range_rows) == ("valid", valid.num_rows)
    assert list(record.backends) == ["int8", "mixed", "bf16"]
    for verdict in record.backends.values():
        assert verdict.batch_difference is not None
        assert verdict.batch_difference <= 1e-6
        assert verdict.auc_loss is not None
        assert abs(verdict.auc_loss) < 5e-3  # of a few hundred rows, where one pair in the wrong order is 1e-5
        assert verdict.passed == (verdict.reason is None)
    assert checked(ServingConfig(fast=False), bundle.scorer, dataset) is None
    told: list[str] = []
    again = checked(ServingConfig(check_rows=50), bundle.scorer, dataset, told.append, ["cpu"])
    assert again is not None
    assert again.devices["cpu"].rows == 50
    few = "too few rows to tell: 50, and it takes 3,000 at least"
    assert told == [f"backend {name} on cpu may not serve: {few}" for name in ("int8", "mixed", "bf16")]


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
    record = found.devices["cpu"]
    assert (record.split, record.rows + record.range_rows) == ("test", len(dataset.split("test")[LABEL]))
