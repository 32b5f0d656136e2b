"""Fast backends of a GPU, as far as a machine without one can tell: the network runs on the CPU all the same."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.errors import InputError
from masknet.folding import fold
from masknet.kernels.graphs import GraphRunner
from serving.backends import check as check_module
from serving.backends import choose, fast
from serving.backends import gpu as gpu_module
from serving.backends.check import BATCHES, check_backends
from serving.backends.gpu import GPUBackend
from serving.backends.record import Backends
from serving.bundle import Bundle, load_bundle
from tests.serving.conftest import Make
from tests.serving.test_backends import CPU, allow_all, the_rows
from training.backends import with_backends

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has both kinds of device, one of which is the CPU again."""

    def made(name: str, network: Any, device: torch.device, *rest: Any) -> GPUBackend:
        assert device == torch.device("cuda")
        return GPUBackend(name, network, CPU, *rest)

    monkeypatch.setattr(fast, "at_hand", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(check_module, "at_hand", lambda: ("cpu", "cuda"))
    monkeypatch.setattr(check_module, "versions", lambda device: {device: "this one"})
    monkeypatch.setattr(fast, "GPUBackend", made)
    monkeypatch.setattr(choose, "GPUBackend", made)


def both(bundle: Bundle) -> Backends:
    return check_backends(bundle.scorer, *the_rows(bundle.scorer), "valid")


def test_graphs_on_a_cpu_take_the_same_way(make: Make) -> None:
    torch.manual_seed(0)
    network = fold(make().scorer.models[0].network, [0])
    backend = GPUBackend("fp32", network, CPU, torch.float32)
    context_1C, candidates_NR = torch.randn(1, 4), torch.randn(2070, 4)
    with torch.inference_mode():
        expected_N = network(context_1C, candidates_NR)
    torch.testing.assert_close(backend.logits(context_1C, candidates_NR), expected_N, rtol=0, atol=2e-6)
    half = GPUBackend("bf16", network, CPU, torch.bfloat16, bound=0.1)
    assert half.bound == 0.1
    half_N = half.logits(context_1C, candidates_NR)
    assert half_N.dtype == torch.float32
    assert 0 < float((half_N - expected_N).abs().max()) < 0.3 * float(expected_N.std())  # of two thousand
    assert (half_N != half_N.bfloat16()).float().mean() > 0.9  # the last layer rounds nothing: scores would be equal


def test_rounded_products_are_of_one_size(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's score is the same to the last bit in any batch, since its products are."""
    sizes: list[int] = []

    class Seen(GraphRunner):
        def __call__(self, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
            sizes.append(len(candidates_NR))
            return super().__call__(context_1C, candidates_NR)

    monkeypatch.setattr(gpu_module, "GraphRunner", Seen)
    backend = GPUBackend("bf16", fold(make().scorer.models[0].network, [0]), CPU, torch.bfloat16)
    rows: set[int] = set()
    backend._runner.network.register_forward_pre_hook(lambda _, given: rows.add(len(given[1])))
    context_1C, candidates_NR = torch.randn(1, 4), torch.randn(1100, 4)
    whole_N = backend.logits(context_1C, candidates_NR)
    assert sizes == [512, 512, 76]
    for size in (*BATCHES, 700):
        parts = [backend.logits(context_1C, part) for part in torch.split(candidates_NR, size)]
        assert torch.equal(torch.cat(parts), whole_N)
    assert rows == {512}


@pytest.mark.usefixtures("gpu")
def test_every_device_at_hand_is_checked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_all(monkeypatch)
    bundle = make()
    found = both(bundle)
    assert list(found.devices) == ["cpu", "cuda"]
    record = found.devices["cuda"]
    assert record.versions == {"cuda": "this one"}
    assert list(record.backends) == ["bf16"]
    verdict = record.backends["bf16"]
    assert verdict.passed
    assert verdict.batch_difference is not None
    assert verdict.batch_difference <= 1e-6
    encoded, label_N = the_rows(bundle.scorer)
    network = fold(bundle.scorer.models[0].network)
    backend = choose.make_backend(network, "fast", "cuda", None, found)
    assert (type(backend), backend.name, backend.bound) == (GPUBackend, "bf16", verdict.largest_difference)
    rows = np.sort(np.random.default_rng(0).permutation(len(label_N))[len(label_N) // 4 :])
    apart_N = np.abs(
        bundle.scorer.with_networks([backend.logits]).score_encoded(encoded) - bundle.scorer.score_encoded(encoded)
    )
    assert verdict.largest_difference == pytest.approx(float(apart_N[rows].max()), abs=1e-7)
    assert backend.bound > 1e-5


@pytest.mark.usefixtures("gpu")
def test_a_gpu_whose_rows_depend_on_their_batch_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_all(monkeypatch)

    def logits(backend: GPUBackend, context_1C: torch.Tensor, candidates_NR: torch.Tensor) -> torch.Tensor:
        return honest(backend, context_1C, candidates_NR) + 1e-4 * len(candidates_NR)

    honest = GPUBackend.logits
    monkeypatch.setattr(GPUBackend, "logits", logits)
    found = both(make())
    verdict = found.devices["cuda"].backends["bf16"]
    assert "a row's score moves by" in str(verdict.reason)
    assert "with its batch" not in str(found.devices["cpu"].backends["bf16"].reason)
    with pytest.raises(InputError, match=r"none may be taken on cuda \(bf16: a row's score moves by"):
        choose.chosen("cuda", found)


def test_a_file_from_before_devices_is_of_a_cpu(make: Make, reseal: Callable[..., None]) -> None:
    bundle = make(check=lambda scorer: check_backends(scorer, *the_rows(scorer), "valid", devices=["cpu"]))
    file = bundle.path / "backends.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data["devices"]["cpu"]))
    reseal(bundle.path)
    old = load_bundle(bundle.path).backends
    assert old is not None
    assert bundle.backends is not None
    assert old.devices == bundle.backends.devices


@pytest.mark.usefixtures("gpu")
def test_a_copy_with_another_devices_verdict(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allow_all(monkeypatch)
    bundle = make("two", 1, 2, check=lambda scorer: check_backends(scorer, *the_rows(scorer), "valid", devices=["cpu"]))
    given = (bundle.scorer, *the_rows(bundle.scorer), "test")
    assert bundle.backends is not None
    with_backends(bundle, bundle.backends.joined(check_backends(*given, devices=["cuda"])), tmp_path / "copy")
    copy = load_bundle(tmp_path / "copy")
    assert copy.backends is not None
    assert copy.backends.devices["cpu"] == bundle.backends.devices["cpu"]
    assert copy.backends.devices["cuda"].split == "test"
    assert len(copy.backends.ranges) == len(bundle.backends.ranges)
    assert {**copy.manifest, "files": 0} == {**bundle.manifest, "files": 0}
    changed = {name for name, digest in copy.manifest["files"].items() if bundle.manifest["files"].get(name) != digest}
    assert changed == {"backends.json"}
    encoded, _ = the_rows(bundle.scorer)
    assert np.array_equal(copy.scorer.score_encoded(encoded), bundle.scorer.score_encoded(encoded))


@pytest.mark.long
def test_the_command_checks_a_model_here(bundle_path: Path, data: Path, tmp_path: Path) -> None:
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "training.backends", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)

    done = run(bundle_path, "--data", data, "--out", tmp_path / "copy", "--rows", 100)
    assert done.returncode == 0, done.stderr
    devices = fast.at_hand()
    told = [f"backend {name} on {device} may" for device in devices for name in fast.FASTEST_FIRST[device]]
    assert [line.partition(" may")[0] + " may" for line in done.stdout.splitlines()] == told
    found = load_bundle(tmp_path / "copy").backends
    assert found is not None
    assert {device: (record.split, record.rows) for device, record in found.devices.items()} == dict.fromkeys(
        devices, ("valid", 100)
    )
    again = run(bundle_path, "--data", data, "--out", tmp_path / "copy")
    assert (again.returncode, again.stdout) == (2, ""), "told before anything is checked"
    assert f"masknet: {tmp_path / 'copy'} exists already" in again.stderr
