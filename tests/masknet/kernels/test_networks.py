"""Networks through the kernels: fused gives what eager gives, in training and folded, and says which it took.

Legend: B rows, F fields, d embedding width.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from masknet.config import MaskNetConfig
from masknet.folding import fold
from masknet.folding.network import ParallelBody
from masknet.kernels import dispatch
from masknet.kernels.limits import WIDEST_HIDDEN
from masknet.kernels.modes import KernelsError, Mode
from masknet.networks import build_network
from masknet.norms import NORMS, make_norm, set_progress

B, F, DIM = 12, 3, 8
KINDS: list[dict[str, object]] = [
    {"kind": "parallel", "head": (6,)},
    {"kind": "serial", "head": ()},
    {"kind": "residual_serial", "head": (), "placement": "peri"},
]
# Eager and fused sum in another order: 6e-8 a rounding, some hundreds of them, of terms of a size of some tens
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _fresh_log() -> Iterator[None]:
    dispatch._said.clear()
    yield
    dispatch._said.clear()


def a_network(config: dict[str, object], raw: tuple[int, ...] = ()) -> torch.nn.Module:
    torch.manual_seed(0)
    base = {"embedding_dim": DIM, "block_width": 16, "blocks": 2, "reduction_ratio": 0.5}
    network = build_network(MaskNetConfig.model_validate({**base, **config}), F, raw)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return network


def embeddings(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, F, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def steps(network: torch.nn.Module, mode: Mode, count: int = 3) -> list[torch.Tensor]:
    """Logits, the embedding's gradient, and all parameters and buffers after some steps of training."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    seen = []
    with dispatch.kernels(mode):
        for step in range(count):
            emb = (embeddings() * (1 + step)).requires_grad_()
            set_progress(network, step / count)
            logit_B = network.train()(emb)
            optimizer.zero_grad()
            (logit_B.sigmoid() * torch.linspace(-1, 1, B)).sum().backward()
            optimizer.step()
            seen += [logit_B.detach(), emb.grad]
    state = [value.float() for value in network.state_dict().values()]
    return [*seen, *state]


@pytest.mark.parametrize("config", KINDS[::2], ids=lambda config: str(config["kind"]))
@pytest.mark.parametrize("norm", [name for name in NORMS if name not in ("none", "evonorm_s0")])
def test_training_steps(norm: str, config: dict[str, object]) -> None:
    slot: dict[str, object] = {"name": norm, "warmup_steps": 1} if norm == "power" else {"name": norm}
    both = [
        steps(a_network({**config, "hidden_norm": slot, "embedding_norm": slot}), mode) for mode in ("eager", "fused")
    ]
    for eager, fused in zip(*both, strict=True):
        torch.testing.assert_close(fused, eager, **CLOSE)


@pytest.mark.parametrize("switch", [{"mask": False}, {"activation": "elu"}, {"weight_standardization": True}], ids=str)
def test_switches(switch: dict[str, object]) -> None:
    for eager, fused in zip(
        *(steps(a_network({**KINDS[0], **switch}), mode) for mode in ("eager", "fused")), strict=True
    ):
        torch.testing.assert_close(fused, eager, **CLOSE)


def test_raw_fields_stay_as_they_are() -> None:
    both = [steps(a_network(KINDS[1], raw=(1,)), mode) for mode in ("eager", "fused")]
    for eager, fused in zip(*both, strict=True):
        torch.testing.assert_close(fused, eager, **CLOSE)


def test_autocast() -> None:
    outs = []
    for mode in ("eager", "fused"):
        network = a_network(KINDS[0]).train()
        with dispatch.kernels(mode), torch.autocast("cpu", torch.bfloat16):
            outs.append(network(embeddings()))
    # one rounding to 2⁻⁹ in another place, of logits of a size of 1
    torch.testing.assert_close(outs[1].float(), outs[0].float(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_dropout_drops_and_scales(rate: float) -> None:
    norm, x_Bh = make_norm("layer", (512,), eps=1e-5), torch.randn(200, 512)
    dropout = torch.nn.Dropout(rate)
    with dispatch.kernels("fused"):
        dropped = dispatch.norm_act(norm, torch.nn.ReLU(), dropout.train(), x_Bh, x_Bh)
        whole = dispatch.norm_act(norm, torch.nn.ReLU(), dropout.eval(), x_Bh, x_Bh)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - rate), rtol=1e-5, atol=1e-6)
    share = kept.sum() / (whole > 0).sum()
    assert abs(float(share) - (1 - rate)) < 0.01  # 51,200 positive entries: a standard error of .002


@pytest.mark.parametrize("norm", [name for name in NORMS if name != "evonorm_s0"])
@pytest.mark.parametrize("config", KINDS[:2], ids=lambda config: str(config["kind"]))
def test_folded(config: dict[str, object], norm: str) -> None:
    network = a_network({**config, "hidden_norm": norm, "embedding_norm": norm}).eval()
    set_progress(network, 1.0)
    emb = embeddings()
    emb[:, :1] = emb[0, :1].clone()
    folded = fold(network, (0,))
    with torch.no_grad():
        expected = network(emb)
        with dispatch.kernels("fused"):
            out = folded(emb[:1, :1].flatten(1), emb[:, 1:].flatten(1))
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("embedding_norm", ["conditional", "none", "layer"])
@pytest.mark.parametrize("hidden_norm", ["layer", "rms", "batch", "none", "l1", "bhyt"])
def test_folded_with_a_norm_of_its_own_in_each_slot(hidden_norm: str, embedding_norm: str) -> None:
    config = {**KINDS[0], "hidden_norm": hidden_norm, "embedding_norm": embedding_norm}
    folded, other = (fold(a_network(config).eval(), (0,)) for _ in range(2))
    context, candidates = embeddings()[:1, :1].flatten(1), embeddings()[:, 1:].flatten(1)
    with torch.no_grad():
        expected = folded(context, candidates)
        with dispatch.kernels("fused"):
            torch.testing.assert_close(folded(context, candidates), expected, **CLOSE)
            for buffer in other.buffers():  # weights loaded after the first request are the ones that count
                buffer.mul_(0.5)
            folded.load_state_dict(other.state_dict())
            loaded = folded(context, candidates)
        torch.testing.assert_close(loaded, other(context, candidates), **CLOSE)
    assert (loaded - expected).abs().max() > 1e-3


def test_folded_under_autocast() -> None:
    folded = fold(a_network(KINDS[0]).eval(), (0,))
    context, candidates = embeddings()[:1, :1].flatten(1), embeddings()[:, 1:].flatten(1)
    with torch.no_grad(), dispatch.kernels("fused"):
        expected = folded(context, candidates)
        with torch.autocast("cpu", torch.bfloat16):
            found = folded(context, candidates)
    # five layers in a row, each rounded to 2⁻⁹
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("mask", [True, False])
def test_no_rows(mask: bool) -> None:
    network = a_network({**KINDS[0], "mask": mask})
    with dispatch.kernels("fused"):
        assert network(embeddings()[:0]).shape == (0,)


def said(caplog: pytest.LogCaptureFixture, mode: Mode, network: torch.nn.Module) -> list[str]:
    caplog.set_level(logging.DEBUG, logger="masknet.kernels.dispatch")
    dtype = next(network.parameters()).dtype
    with dispatch.kernels(mode), torch.no_grad():
        network(embeddings(dtype))
        network(embeddings(dtype))
    return [record.getMessage() for record in caplog.records]


def test_it_says_once_which_path_it_took(caplog: pytest.LogCaptureFixture) -> None:
    assert said(caplog, "fused", a_network(KINDS[1]).eval()) == [
        "embedding_norm_mask of LayerNorm, cpu, torch.float32, rows of 8: fused",
        "hidden_norm_act of LayerNorm, cpu, torch.float32, rows of 16: fused",
        "hidden_norm_act of NoNorm, cpu, torch.float32, rows of 16: eager, the norm has no kernel",
    ]


@pytest.mark.parametrize(
    ("mode", "config", "reason"),
    [
        ("eager", KINDS[0], "eager, as MASKNET_KERNELS says"),
        ("auto", KINDS[0], "eager, Triton's interpreter is for tests"),
        (
            "fused",
            {**KINDS[0], "hidden_norm": "conditional", "embedding_norm": "conditional"},
            "the norm has no kernel",
        ),
    ],
)
def test_it_says_why_not(caplog: pytest.LogCaptureFixture, mode: Mode, config: dict[str, object], reason: str) -> None:
    messages = said(caplog, mode, a_network(config).eval())
    assert len(messages) == 2
    assert all(reason in message for message in messages)


def test_double_precision_is_eager(caplog: pytest.LogCaptureFixture) -> None:
    messages = said(caplog, "fused", a_network(KINDS[0]).double().eval())
    assert all("eager, there is no kernel for torch.float64" in message for message in messages)


def test_rows_too_wide_are_eager() -> None:
    assert not dispatch.takes_kernel("hidden_norm_act", torch.zeros(1, 8193), WIDEST_HIDDEN)


def test_fused_is_an_error_where_no_kernel_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_INTERPRETED", False)
    with dispatch.kernels("fused"), pytest.raises(KernelsError, match="kernels run on CUDA, not on cpu"):
        a_network(KINDS[0])(embeddings())
    monkeypatch.setattr(dispatch, "_TRITON", False)
    monkeypatch.setattr(dispatch, "_RUNS", False)
    with dispatch.kernels("fused"), pytest.raises(KernelsError, match="Triton is not installed"):
        a_network(KINDS[0])(embeddings())


def test_unknown_modes() -> None:
    with pytest.raises(KernelsError, match="must be one of auto, fused, eager"), dispatch.kernels("fast"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("mode", ["eager", "fused"])
@pytest.mark.parametrize("config", KINDS, ids=lambda config: str(config["kind"]))
def test_folded_networks_compile_and_export_as_one_graph(config: dict[str, object], mode: Mode) -> None:
    folded = fold(a_network(config).eval(), (0,))
    context, candidates = embeddings()[:1, :1].flatten(1), embeddings()[:, 1:].flatten(1)
    torch.compiler.reset()
    with dispatch.kernels(mode), torch.no_grad():
        compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
        rows = torch.export.Dim("rows", min=2, max=4096)
        exported = torch.export.export(folded, (context, candidates), dynamic_shapes=(None, {0: rows})).module()
        for count in (B, 5):
            expected = folded(context, candidates[:count])
            torch.testing.assert_close(compiled(context, candidates[:count]), expected, **CLOSE)
            torch.testing.assert_close(exported(context, candidates[:count]), expected, **CLOSE)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("mode", "script", "reason"),
    [
        ("fast", "import masknet.networks", "MASKNET_KERNELS is 'fast'; it must be one of auto, fused, eager"),
        (
            "fused",
            "import torch; from masknet.config import MaskNetConfig as C; from masknet.networks import build_network;"
            " build_network(C(embedding_dim=2), 3)(torch.zeros(1, 3, 2))",
            "MASKNET_KERNELS=fused: kernels run on CUDA, not on cpu",
        ),
    ],
)
def test_the_environment_is_read_when_a_process_starts(mode: str, script: str, reason: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "MASKNET_KERNELS": mode, "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"masknet.kernels.modes.KernelsError: {reason}"


def test_a_wrong_environment_is_one_line_of_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training", "bench", "kernels", "--quick"],
        env={**os.environ, "MASKNET_KERNELS": "fast"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "masknet: MASKNET_KERNELS is 'fast'; it must be one of auto, fused, eager\n"


@pytest.mark.long
def test_networks_compile_as_one_graph_where_no_kernel_can_run() -> None:
    script = """
import torch
from masknet.config import MaskNetConfig
from masknet.folding import fold
from masknet.networks import build_network

network, emb = build_network(MaskNetConfig(embedding_dim=4, block_width=8, head=(4,)), 3), torch.randn(6, 3, 4)
folded, empty = fold(network), torch.empty(1, 0)
whole = {"fullgraph": True, "backend": "aot_eager"}
with torch.no_grad():
    torch.testing.assert_close(torch.compile(network.eval(), **whole)(emb), network(emb))
    torch.testing.assert_close(torch.compile(folded, **whole)(empty, emb.flatten(1)), folded(empty, emb.flatten(1)))
torch.compile(network.train(), **whole)(emb).sum().backward()
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(
        command,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_products_go_to_the_kernels_where_they_were_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a GPU of compute capability 9.0, of which the benchmark has said so for 2 to 5 candidates
    monkeypatch.setattr(dispatch, "_reason_for_eager", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(dispatch, "MEASURED_GEMMS", {((9, 0), torch.float32): (2, 5)})
    with dispatch.kernels("auto"):
        assert [rows for rows in range(8) if dispatch.takes_gemms(torch.zeros(rows, 4), 512)] == [2, 3, 4, 5]
        assert not dispatch.takes_gemms(torch.zeros(3, 4), 513)
        assert not dispatch.takes_gemms(torch.zeros(3, 4, dtype=torch.bfloat16), 512)
    with dispatch.kernels("fused"):
        assert dispatch.takes_gemms(torch.zeros(7, 4), 512)


@pytest.mark.parametrize("norm", ["layer", "rms", "none", "batch"])
def test_blocks_in_batched_products_give_what_they_give_one_by_one(norm: str) -> None:
    torch.manual_seed(0)
    config = MaskNetConfig(embedding_dim=4, blocks=3, block_width=16, head=(8,), hidden_norm=norm)
    network = build_network(config, 5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folded = fold(network.eval().double(), (0, 1))
    body = folded.body
    assert isinstance(body, ParallelBody)
    assert body.grouped is not None
    context, candidates = torch.randn(1, 8).double(), torch.randn(7, 12).double()
    hidden = folded.first(context, candidates)
    x_ND = torch.randn(7, 20).double()
    one_by_one = torch.cat([block(x_ND, hidden) for block in body.blocks], 1)
    torch.testing.assert_close(body.grouped.batched(body.blocks, x_ND, hidden), one_by_one, rtol=1e-12, atol=1e-12)
    # as on a GPU: the whole network
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "blocks_together", lambda *_: "batched")
        batched = folded(context, candidates)
    torch.testing.assert_close(batched, folded(context, candidates), rtol=1e-12, atol=1e-12)
