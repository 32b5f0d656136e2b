"""training/QUALITY.md from the quality benchmark's results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "training" / "QUALITY.md"
TITLES = {
    "movielens-time": "MovieLens-100k, by time",
    "movielens-random": "MovieLens-100k, at random",
    "kuairec": "KuaiRec (small matrix), at random",
    "returning-users": "Planted: users who return to their own items",
    "criteo": "Planted: Criteo's shape",
}


def page(rows: Sequence[dict[str, Any]], seeds: int) -> str:
    """A section per data set, and where the default loses."""
    parts = [_HEAD.format(seeds=seeds), _summary(rows), *(_section(row) for row in rows)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    won, open_, lost = [], [], []
    for row in rows:
        for model, metrics in row["models"].items():
            for metric in ("auc", "logloss"):
                difference = metrics[metric]["difference"]
                if difference is not None and not model.startswith("MaskNet"):
                    text = f"{TITLES[row['name']]}: {model}, {_NAMES[metric]}"
                    # the verdict speaks of the rival
                    {"worse": won, "better": lost}.get(difference["verdict"], open_).append(text)
    total = len(won) + len(open_) + len(lost)
    lines = [
        "## Where it wins and where it loses",
        f"Of {total} comparisons (a data set, a rival, a metric) MaskNet is better in {len(won)}, not told apart in "
        f"{len(open_)} and worse in {len(lost)}, by a test that allows for seeds and test rows, corrected for the "
        "number of rivals.",
    ]
    lines += ["Worse:" if lost else "Worse: nowhere.", *(f"- {text}" for text in lost)]
    lines += ["Not told apart:" if open_ else "Not told apart: none.", *(f"- {text}" for text in open_)]
    return "\n".join(_with_gaps(lines))


def _with_gaps(lines: list[str]) -> list[str]:
    """An empty line where a list begins or ends, as Markdown wants it."""
    out: list[str] = []
    for line in lines:
        if out and not (line.startswith("- ") and out[-1].startswith("- ")):
            out.append("")
        out.append(line)
    return out


def _section(row: dict[str, Any]) -> str:
    counts = ", ".join(f"{name} {count:,}" for name, count in row["rows"].items())
    lines = [f"## {TITLES[row['name']]}", "", f"{row['fields']} fields; rows: {counts}.", ""]
    lines += ["| model | AUC | ± seeds | log loss | ± seeds | AUC, model − MaskNet | log loss, model − MaskNet |"]
    lines += ["|---|---:|---:|---:|---:|---|---|"]
    for model, metrics in row["models"].items():
        auc, loss = metrics["auc"], metrics["logloss"]
        cells = [model, *_mean(auc), *_mean(loss), _difference(auc), _difference(loss)]
        lines.append(f"| {' | '.join(cells)} |")
    if row["best_logloss"] is not None:
        lines += ["", _attained(row)]
    return "\n".join(lines)


def _mean(metric: dict[str, Any]) -> tuple[str, str]:
    return f"{metric['mean']:.4f}", "–" if not metric["sd_seeds"] else f"{metric['sd_seeds']:.4f}"


def _difference(metric: dict[str, Any]) -> str:
    found = metric["difference"]
    return "" if found is None else f"{found['mean']:+.4f}, {found['verdict']}"


def _attained(row: dict[str, Any]) -> str:
    base, best = row["base_logloss"], row["best_logloss"]
    shares = [f"{model} {(base - m['logloss']['mean']) / (base - best):.1%}" for model, m in row["models"].items()]
    return (
        f"Always predicting the base rate costs {base:.4f}, the probabilities that labels were drawn from {best:.4f}. "
        f"Of that gain: {', '.join(shares)}."
    )


_NAMES = {"auc": "AUC", "logloss": "log loss"}
_HEAD = """
# What the default configuration reaches

Written by `python -m tests.benchmarks.quality`. Every data set is trained with the same configuration,
[`configs/default.yaml`](configs/default.yaml), and {seeds} seeds; the validation split ends training and chooses the
rivals' settings, the test split decides on nothing. Rivals have the same encoded columns:

- **LightGBM**: ids as categorical features, early stop, the best of eight settings (leaves, smoothing of
  categories, rows that a category needs) by validation log loss.
- **DNN**: two layers of 400 on embeddings of the same width, trained in every way as MaskNet is, prior and averages
  included. **Plain DNN**: the same network with usual settings (rate of the tables 0.02, no prior, no averages; dropout
  and batch size as in the configuration).
- **MaskNet, 4 members** is no rival but an option of the configuration (`train.members: 4`): the mean score of four
  of the seeds. Its five values share members, so that their spread says less than that of seeds.
- **Logistic regression** on one column per id, the best of three penalties.

Means over seeds, their standard deviation, and differences with a verdict on the rival by a test that allows for seeds
and for test rows (users where there are users), corrected for the number of rivals. The planted sets are without the
deep networks, and the one in Criteo's shape without LightGBM.

What makes the default good, in the order of its effect: the **prior** on embeddings (`optimizer.embedding_prior`: an id
pays once a pass, however rare it is) together with a large rate of the tables; **no hidden norm**; an **eps** of LN_EMB
that lets rare ids stay small; **averages** of weights; small blocks with dropout. The prior lifts the deep network just
as much. It is not applied to fields with managed ids, and training
on from a model (`--from`, day by day) needs other settings: no prior and a small rate.
"""
