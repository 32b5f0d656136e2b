"""ABLATION.md: a section and pictures for each study, made by its command; the commentary is a person's and stays."""

import re
from pathlib import Path
from typing import Any

from features.files import file_written_whole
from training.ablation.report import forest, surfaces
from training.ablation.tables import FAMILIES, mean_of, p_value, ratio_range, with_margin
from training.ablation.verdict import cautions, verdict
from training.numbers import number

PICTURES = "pictures"  # folder beside the document

_HEAD = """# Ablation: what normalization does to MaskNet

Made by `masknet ablate … --document` (the command stands above each table); of this file only the commentary is written
by hand. Every cell is trained with the same seeds, data order and budget, at the learning rate that did best for it on
the validation split with a seed of its own (the luck of that search is not in the intervals), and its best epoch is the
validation split's. ± is half of a 95 % interval over seeds and test rows together. Δ is the paired difference to the
baseline; p is corrected for all cells of the study (Holm), and * marks p < .05. "Step" and "serve" are times over the
baseline's, measured in turns (median, 20th and 80th percentile): a training step of the network, and the forward pass
over 500 rows once folded. A name stands for both slots, a pair for LN_EMB/LN_HID.

## What the numbers do and do not say

<!-- commentary -->
<!-- end of commentary -->
"""


def update_document(path: Path, found: dict[str, Any]) -> None:
    """Write or replace the section of `found`'s study in the Markdown file at `path`; other sections stay as they
    are."""
    text = path.read_text() if path.is_file() else _HEAD
    head = text[text.index("<!-- commentary -->") :] if "<!-- commentary -->" in text else ""
    text = _HEAD[: _HEAD.index("<!-- commentary -->")] + head if head else _HEAD + text
    begin, end = f"<!-- study {found['study']} -->", f"<!-- end of study {found['study']} -->"
    section = f"{begin}\n{_section(found, path.parent / PICTURES)}\n{end}"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.S)
    if not pattern.search(text):
        text = f"{text.rstrip()}\n\n{begin}{end}\n"
    text = pattern.sub(lambda _: section, text)
    with file_written_whole(path) as aside:
        aside.write_text(text)


def _section(found: dict[str, Any], pictures: Path) -> str:
    parts = [f"## {found['study']}", _facts(found), f"```sh\n{found['command']}\n```"]
    parts += [" ".join([*verdict(found), *cautions(found)])]
    families = dict.fromkeys(cell["family"] for cell in found["cells"])
    for family in families:
        cells = [cell for cell in found["cells"] if cell["family"] == family or cell["cell"] == found["baseline"]]
        parts += [f"### {FAMILIES.get(family, family)}", _table(cells)]
    for metric, title in (("auc", "AUC"), ("logloss", "log loss")):
        picture = forest(found, metric)
        if picture is not None:
            alt = f"Differences in {title} to {found['baseline']} with 95 % intervals, as in the tables"
            parts.append(_picture(pictures / f"{found['study']}-{metric}.svg", picture, alt))
    parts += ["### Blocks, mean over seeds", _diagnostics(found["cells"])]
    curves = [cell for cell in found["cells"] if cell["landscape"] is not None]
    if curves:
        parts += ["### Curvature at the trained weights (seed 1)", _curvature(curves)]
        picture = surfaces({cell["cell"]: cell["landscape"] for cell in curves})
        alt = "The loss on a plane through the trained weights, a step of 1 being as long as they are"
        parts.append(_picture(pictures / f"{found['study']}-landscape.svg", picture, alt))
    return "\n\n".join(parts)


def _picture(path: Path, svg: str, alt: str) -> str:
    with file_written_whole(path) as aside:
        aside.write_text(svg)
    return f"![{alt}]({PICTURES}/{path.name})"


def _facts(found: dict[str, Any]) -> str:
    data, device = found["data"], found["device"]
    rows = ", ".join(f"{split} {count:,}" for split, count in data["rows"].items())
    groups = "" if data["groups"] is None else f" of {data['groups']:,} {data['group']}"
    lines = f"Data: {data['schema']}, {rows} rows; {data['test_clicks']:,} clicks among the test rows{groups}. "
    best = data["best_possible"]
    if best is not None:
        lines += f"No model can beat AUC {best['auc']:.4f} and log loss {best['logloss']:.4f} on it. "
    trials = found["trials"]
    tried = "given" if trials is None else "as configured" if trials == 1 else f"searched ({trials} tried and more)"
    minutes = found["training_seconds"] / 60
    lines += f"{found['seeds']} seeds; learning rates {tried}; {minutes:.0f} minutes of training in all on "
    return lines + f"{device['cores']} cores of {device['cpu']}, torch {device['versions']['torch']}."


def _table(cells: list[dict[str, Any]]) -> str:
    heads = [
        "cell",
        "AUC",
        "log loss",
        "NE",
        "ECE",
        "Δ AUC",
        "p",
        "Δ log loss",
        "p",
        "lr",
        "step ×",
        "serve ×",
        "weights",
    ]
    return _markdown(heads, [_row(cell) for cell in cells])


def _row(cell: dict[str, Any]) -> list[str]:
    if not cell["seeds_done"]:
        return [cell["cell"], str(cell["trouble"]), *[""] * 11]
    metrics, differences = cell["metrics"], cell["differences"]
    row = [cell["cell"] + (f" ({cell['trouble']})" if cell["trouble"] else "")]
    row += [with_margin(metrics["auc"]), with_margin(metrics["logloss"])]
    row += [number(mean_of(metrics[name])) for name in ("ne", "ece")]
    for name in ("auc", "logloss"):
        row += [_difference(differences[name]), p_value(differences[name])]
    edge = " (edge)" if cell["lr_at_edge"] else ""
    return [
        *row,
        f"{cell['lr']:g}{edge}",
        ratio_range(cell["step"]),
        ratio_range(cell["forward"]),
        f"{cell['parameters']:,}",
    ]


def _difference(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "–"
    star = "" if difference["verdict"] == "not told apart" else " *"
    return f"{difference['mean']:+.5f} ±{(difference['high'] - difference['low']) / 2:.5f}{star}"


def _diagnostics(cells: list[dict[str, Any]]) -> str:
    heads = {
        "output_variance": "output variance",
        "dead": "dead channels",
        "gradient_norm": "gradient norm",
        "saturation": "saturated tanh",
        "gate_mean": "mean gate",
        "gate_deviation": "gate between rows",
        "angle": "angle to the block before, /π",
        "auc_drop": "AUC lost without it",
    }
    rows = [
        [cell["cell"], *(" · ".join(_short(block[key]) for block in cell["blocks"]) for key in heads)]
        for cell in cells
        if cell["blocks"]
    ]
    return _markdown(["cell", *heads.values()], rows)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _curvature(cells: list[dict[str, Any]]) -> str:
    heads = ["cell", "largest eigenvalue", "trace", "largest, relative to filters", "trace, relative to filters"]
    keys = ("largest", "trace", "largest_normalized", "trace_normalized")
    rows = []
    for cell in cells:
        found = cell["landscape"]["curvature"]
        rows.append([cell["cell"], *(f"{_short(found[key])} ±{_short(found[key + '_error'])}" for key in keys)])
    return _markdown(heads, rows)


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])
