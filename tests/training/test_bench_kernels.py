"""`masknet bench kernels`: its result, its arithmetic, and that the rivals it times compute the same."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from training.bench import comparing, kernels, libraries, report
from training.bench.comparing import Bench, Case, distance, tensors
from training.bench.gemms import longest_run, measured_gemms
from training.bench.row_kernels import embedding_cases, hidden_cases
from training.bench.timing import Call, in_turns
from training.cli import main

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
RIVALS = {
    "LN_EMB": ["a norm per field", "vectorized"],
    "LN_HID and ReLU": ["eager"],
    "ranking": ["unfolded", "unfolded, oneDNN", "folded", "folded, context apart"],
}
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="another result where there is CUDA")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True)


@without_cuda
def test_the_result_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "new" / "kernels.json"
    shown = run("-m", "training", "bench", "kernels", "--quick", "--out", out)
    result = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["kernels.json"]
    assert result["device"]["cores"] >= 1
    assert result["device"]["threads"] >= 1
    assert result["versions"]["torch"] == torch.__version__
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        key = ", ".join(str(row.get(name)) for name in ("name", "kind", "pass", "N"))
        cases.setdefault(key, []).append(row)
    assert len(cases) == 2 * 2 + 2 * 2  # two norms, two passes; two networks, two numbers of candidates
    for rows in cases.values():
        assert [row["rival"] for row in rows] == RIVALS[rows[0]["name"]]
        for row in rows:
            assert 0 < row["p20"] <= row["p50"] <= row["p80"]
            assert (row["unit"], row["runs"], row["clock"]) == ("ms", 5, "host")
            assert row["ratio"] == pytest.approx(rows[0]["p50"] / row["p50"], rel=1e-3)
            assert row["baseline"] == rows[0]["rival"]
    assert {(entry["name"], entry["reason"]) for entry in result["skipped"]} == {
        (name, "no CUDA device") for name in kernels.ON_CUDA
    }
    assert "skipped: serving: no CUDA device" in shown.stdout
    assert "folded, context apart" in shown.stdout


@without_cuda
def test_it_needs_no_library_of_the_command_line_or_the_tables(tmp_path: Path) -> None:
    absent = ("rich", "typer", "torchrec", "fbgemm_gpu", "mlflow", "polars", "pandas", "pyarrow", "yaml", "sklearn")
    script = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
sys.argv[1:] = ["--quick", "--only", "norms", "--out", {str(tmp_path / "norms.json")!r}]
runpy.run_module("training.bench.kernels", run_name="__main__")
"""
    shown = run("-c", script).stdout.splitlines()
    rows = json.loads((tmp_path / "norms.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"LN_EMB", "LN_HID and ReLU"}
    assert [line.split()[0] for line in shown] == ["measured", *[row["name"].split()[0] for row in rows], "written:"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["masknet", "bench", "kernels", "--quick", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.mark.parametrize(("place", "reason"), [("file/out.json", "File exists|Not a directory"), (".", "a folder")])
def test_a_place_that_cannot_be_written_is_told_at_once(
    place: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(kernels, "measure", pytest.fail)
    assert command(monkeypatch, "--out", tmp_path / place) == 2
    told = capfd.readouterr()
    assert told.out == ""
    [line] = told.err.splitlines()
    assert re.search(reason, line)


def test_a_part_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--only", "gemm") == 2
    assert capfd.readouterr().err.startswith("masknet: --only gemm: the parts are embedding_norm_mask, ")


def test_an_interrupted_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "measure", interrupted)
    assert command(monkeypatch, "--out", tmp_path / "out.json") == 130
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("old")
    with pytest.raises(TypeError):
        report.write(out, {"rows": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert out.read_text() == "old"


class Stopped:
    """A clock that says what it was told to."""

    name = "stopped"

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.told = times

    def times(self, calls: Mapping[str, Call], runs: int) -> dict[str, list[float]]:
        return {name: self.told[name] for name in calls}


def rows_of(rivals: dict[str, Any], times: dict[str, list[float]], **facts: Any) -> tuple[list[Any], list[Any]]:
    bench = Bench(CPU, runs=4, copy_bytes_per_second=1e9)
    bench.l2_bytes = 1000
    bench.clocks[False] = Stopped(times)
    bench.run(Case("case", {"B": 2}, lambda: rivals, **facts))
    return bench.rows, bench.skipped


def test_a_row_has_the_ratio_of_medians_the_share_of_turns_and_the_traffic() -> None:
    times = {"eager": [4.0, 4.0, 4.0, 4.0], "fused": [1.0, 2.0, 2.0, 5.0]}
    rows, _ = rows_of(dict.fromkeys(times, lambda: torch.ones(3)), times, moved=10**6)
    eager, fused = rows
    assert (eager["p50"], eager["ratio"], "faster_share" in eager) == (4.0, 1.0, False)
    assert (fused["p20"], fused["p50"], fused["p80"]) == (1.6, 2.0, 3.2)
    assert (fused["ratio"], fused["faster_share"]) == (2.0, 0.75)
    # 1e6 bytes in 2 ms are 5e8 bytes per second, half of the copy's
    assert (fused["gb_per_second"], fused["copy_share"], fused["fits_l2"]) == (0.5, 0.5, False)
    [small, _], _ = rows_of(dict.fromkeys(times, lambda: torch.ones(3)), times, moved=900)
    assert (small["copy_share"], small["fits_l2"]) == (None, True)


def test_rivals_that_fail_differ_or_are_missing_are_left_out_with_the_reason() -> None:
    def fails() -> None:
        raise ValueError("no\nkernel")

    rivals = {
        "eager": lambda: [torch.ones(4), torch.ones(2)],
        "close": lambda: [torch.ones(4), torch.tensor([1.0, 1.001])],
        "wrong": lambda: [torch.ones(4), torch.tensor([1.0, 1.1])],
        "nan": lambda: [torch.full((4,), float("nan")), torch.ones(2)],
        "short": lambda: [torch.ones(4)],
        "fails": fails,
        "missing": "it is not installed",
    }
    rows, skipped = rows_of(rivals, {name: [1.0] for name in rivals})
    assert [row["rival"] for row in rows] == ["eager", "close"]
    reasons = {entry["rival"]: entry["reason"] for entry in skipped}
    assert reasons.pop("short").startswith("ValueError: zip()")
    assert reasons == {
        "wrong": "differs from eager: 0, 0.071",
        "nan": "differs from eager: nan, 0",
        "fails": "ValueError: no kernel",
        "missing": "it is not installed",
    }


def test_a_case_whose_baseline_fails_has_no_rows() -> None:
    rows, skipped = rows_of({"eager": "it is not there", "fused": lambda: torch.ones(1)}, {"fused": [1.0]})
    assert (rows, [entry["reason"] for entry in skipped]) == ([], ["it is not there"])


def test_rivals_take_turns_in_another_order_each_run() -> None:
    assert "".join(in_turns("abc", 4)) == "abcbcacababc"


def row(N: int, rival: str, p50: float, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"name": "maskblock_gemm", "dtype": dtype, "N": N, "rival": rival, "p50": p50}


def test_the_dispatchers_line_has_the_longest_range_in_which_the_gemms_win() -> None:
    times = {1: (2, 3), 64: (4, 3), 500: (2, 3), 2048: (2, 3), 8192: (9, 3)}
    rows = [
        row(N, rival, p50) for N, pair in times.items() for rival, p50 in zip(("gemms", "eager"), pair, strict=True)
    ]
    rows.append(row(500, "cublas batched", 2.5))
    rows += [
        row(1, "gemms", 2.0, "float32"),
        row(1, "eager", 1.0, "float32"),
        {**row(1, "eager", 1.0), "name": "other"},
    ]
    assert measured_gemms(rows, (9, 0)) == "MEASURED_GEMMS = {((9, 0), torch.bfloat16): (500, 2048)}"
    assert measured_gemms([], (9, 0)) == "MEASURED_GEMMS = {}"


@pytest.mark.parametrize(
    ("flags", "found"), [([], None), ([0, 0], None), ([1, 0, 1, 1], (2, 3)), ([1, 0, 1], (0, 0)), ([1, 1], (0, 1))]
)
def test_longest_run(flags: Sequence[int], found: tuple[int, int] | None) -> None:
    assert longest_run([bool(flag) for flag in flags]) == found


def outputs_of(case: Case) -> dict[str, list[torch.Tensor]]:
    rivals = {name: call for name, call in case.rivals().items() if not isinstance(call, str)}
    return {name: list(tensors(call())) for name, call in rivals.items()}


def not_compiled(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
    return function


@pytest.mark.parametrize("part", ["embedding_norm_mask", "hidden_norm_act", "power_norm_act", "maskblock_gemm"])
def test_rivals_for_cuda_agree(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", not_compiled)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in kernels.ON_CUDA[part](device, True):
        found = outputs_of(case)
        expected = found[case.baseline]
        for name, outputs in found.items():
            assert max(map(distance, outputs, expected)) < 1e-5, name
        assert len(found) >= 2


class Library:
    """torch's norms behind the names of Liger-Kernel's and quack's."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.apply = function


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, casting: str, in_place: bool) -> torch.Tensor:
    assert (offset, casting, in_place) == (0.0, "gemma", False)
    return functional.rms_norm(x, x.shape[1:], weight, eps)


def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[1:], weight, bias, eps)


def dyt(x: torch.Tensor, alpha: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return gamma * (alpha * x).tanh() + beta


@pytest.mark.parametrize("cases", [embedding_cases, hidden_cases])
@pytest.mark.parametrize("kind", ["layer", "rms", "dyt"])
def test_other_libraries_get_what_the_norms_have(
    kind: str, cases: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    liger = SimpleNamespace(LigerLayerNormFunction=Library(layer), LigerRMSNormFunction=Library(rms))
    liger.LigerDyTFunction = Library(dyt)
    quack = SimpleNamespace(
        layernorm_fwd=layer, rmsnorm=lambda x, weight, eps: functional.rms_norm(x, x.shape[1:], weight, eps)
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(ops=liger))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", liger)
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(rmsnorm=quack))
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", quack)
    monkeypatch.setattr(torch, "compile", not_compiled)
    monkeypatch.setattr(f"training.bench.row_kernels.{cases.__name__.split('_')[0].upper()}_KINDS", {True: (kind,)})
    found = set()
    for case in cases(CPU, True):
        rivals = case.rivals()
        expected = list(tensors(rivals["eager"]()))
        for name in ("liger", "quack"):
            if not isinstance(rivals[name], str):
                found.add((name, case.facts["pass"]))
                assert max(map(distance, tensors(rivals[name]()), expected)) < 1e-5, name
    both = ("forward", "forward and backward")
    quacks = {"layer": both[:1], "rms": both, "dyt": ()}[kind]
    assert found == {("liger", each) for each in both} | {("quack", each) for each in quacks}


def test_reasons_why_a_library_has_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found = libraries.row_norms("layer", True)
    assert found["quack"] == "quack's layer norm has no autograd"
    assert isinstance(found["liger"], str)
    assert libraries.row_norms("affine", False)["quack"] == "quack has no affine"


def test_a_distance_is_relative() -> None:
    assert distance(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert distance(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert comparing.TOLERANCES.keys() == {torch.float32, torch.float16, torch.bfloat16}
