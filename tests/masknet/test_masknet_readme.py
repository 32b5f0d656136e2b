"""The README of the package: its table is the code's, and its example of a new normalization works as it stands."""

import inspect
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from masknet.config import MaskNetConfig
from masknet.networks import build_network
from masknet.norms import NORMS

ROOT = Path(__file__).parents[2]
README = (ROOT / "masknet" / "README.md").read_text()
TABLE = {
    name: (re.findall(r"`(\w+)`", parameters), left)
    for name, parameters, left in re.findall(r"^\| `(\w+)` \| .*? \| (.*?) ?\| (.*?) \|$", README, re.M)
}
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_every_norm_is_in_the_table_with_its_parameters() -> None:
    assert TABLE.keys() == NORMS.keys()
    for name, (parameters, _) in TABLE.items():
        own = inspect.signature(NORMS[name]).parameters.keys() - {"shape", "eps", "instance_width"}
        assert set(parameters) == own, name


@pytest.mark.parametrize("name", sorted(NORMS))
def test_what_is_left_at_serving(name: str) -> None:
    extra = {"instance_width": 8} if NORMS[name].conditional else {}
    norm = NORMS[name]((8,), eps=1e-5, **extra).eval()
    norm.set_progress(1.0)
    assert (norm.fold() is not None) == TABLE[name][1].startswith("nothing")


def test_the_example_is_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    [source] = [block for block in EXAMPLES if "class ScaleOnlyNorm" in block]
    module = types.ModuleType("masknet.norms.scale_only")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "scale_only.py", "exec"), module.__dict__)
    [(name, cls)] = re.findall(r'`"(\w+)": (\w+)`', README)
    monkeypatch.setitem(NORMS, name, getattr(module, cls))
    slot = {"name": name, "start": 0.5}
    config = MaskNetConfig.model_validate(
        {"embedding_dim": 4, "block_width": 6, "head": [3], "embedding_norm": name, "hidden_norm": slot}
    )
    assert MaskNetConfig.model_validate(config.model_dump(mode="json")) == config
    network = build_network(config, 2)
    emb_BFd = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    # over its largest entry, times the start of .5
    normed_Bh = network.blocks[0].norm(torch.tensor([[1.0, -2.0, 0, 0, 0, 4.0]])).detach()
    assert float(normed_Bh[0, 5]) == pytest.approx(0.5, rel=1e-5)
    network(emb_BFd).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with pytest.raises(ValueError, match="start: Input should be greater than 0"):
        MaskNetConfig.model_validate({"hidden_norm": {"name": name, "start": -1}})


def test_the_explanation_is_what_the_example_prints(capsys: pytest.CaptureFixture[str]) -> None:
    [source] = [block for block in EXAMPLES if "explain" in block]
    exec(compile(source, "explain.py", "exec"), {})
    [printed] = re.findall(r"```text\n(.*?)```", README, re.S)
    assert capsys.readouterr().out == printed


def test_the_figures_of_folding_are_the_committed_ones() -> None:
    rows = json.loads((ROOT / "tests" / "benchmarks" / "results" / "kernels.json").read_text())["rows"]
    median = {(row["kind"], row["N"], row["rival"]): row["p50"] for row in rows if row["name"] == "ranking"}
    table = re.findall(r"^\| ([\d,]+) \| (.* ms .* ×) \|$", README, re.M)
    assert [int(rows.replace(",", "")) for rows, _ in table] == [1, 50, 500, 2000]
    for rows, cells in table:
        expected = []
        for kind in ("parallel", "serial"):
            unfolded, by_onednn, folded = (
                median[kind, int(rows.replace(",", "")), rival]
                for rival in ("unfolded", "unfolded, oneDNN", "folded, context apart")
            )
            expected += [f"{unfolded:.3g} ms", f"{unfolded / folded:.2f} ×", f"{by_onednn / folded:.2f} ×"]
        assert cells.split(" | ") == expected
