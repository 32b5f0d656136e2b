"""The answer of a study: trials as rows, and what is written and shown of the best one."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import polars as pl
from optuna.trial import FrozenTrial
from rich.table import Table

from features.files import file_written_whole, write_json
from training.numbers import number
from training.tuning.search import FORMAT, Question, facts_of
from training.tuning.trained import Spread, Trained, compared, spread, spreads
from training.workers import DONE

_FACTS = ("valid_logloss", "valid_auc", "best_epoch", "seconds", "samples_per_second", "reason")
_SHOWN = {"auc": "AUC", "logloss": "log loss", "calibration": "calibration", "ece": "ECE"}
_ROWS = 5  # of trials on a terminal
Answer = dict[str, Any]


def trial_rows(study: optuna.Study) -> list[dict[str, Any]]:
    """A row per trial that is over, in the order they began: how it ended, its metrics, and what was searched."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    return [
        {"trial": trial.number, "status": facts_of(trial).get("status")}
        | {"epochs": len(trial.intermediate_values), "value": trial.value}
        | {fact: facts_of(trial).get(fact) for fact in _FACTS}
        | {key: trial.params.get(key) for key in keys}
        for trial in trials
    ]


def answer_of(
    question: Question, study: optuna.Study, best: FrozenTrial, trained: Trained, model: dict[str, Any]
) -> Answer:
    """What was found, as result.json has it; `model` is the registered one."""
    rows, dataset, metrics = trial_rows(study), trained.dataset, spreads(trained.done)
    first, changed = study.get_trials(deepcopy=False)[0].value, question.space.changed()
    value = spread(trained.validated())
    sentence = compared(question.metric, value, first, changed)
    note = "" if trained.config.calibration.method == "none" else " (before calibration)"
    wrong = {seed: result["reason"] for seed, result in trained.results.items() if result["status"] != DONE}
    return {
        "format": FORMAT,
        "study": question.name,
        "out": str(question.out),
        "metric": question.metric,
        "data": {"path": str(question.data), "rows": {name: dataset.files(name).num_rows for name in dataset.splits}},
        "space": question.space.plain(),
        "trials": dict(Counter(row["status"] for row in rows)),
        "seconds": study.user_attrs["seconds"],
        "first": {"value": first, "changed": changed},
        "importances": importances(study),
        "best": {
            "trial": best.number,
            "value": best.value,
            "valid_logloss": facts_of(best)["valid_logloss"],
            "valid_auc": facts_of(best)["valid_auc"],
            "params": best.params,
            "seeds": {"done": list(trained.done), "wrong": wrong, "value": asdict(value), "metrics": _plain(metrics)},
            "sentence": sentence + note,
            "model": model,
        },
    }


def _plain(found: dict[str, dict[str, Spread]]) -> dict[str, dict[str, Any]]:
    return {split: {name: asdict(spread) for name, spread in metrics.items()} for split, metrics in found.items()}


def write_answer(answer: Answer, rows: list[dict[str, Any]], out: Path) -> None:
    """Write result.json and trials.csv."""
    with file_written_whole(out / "result.json") as aside:
        write_json(aside, answer)
    with file_written_whole(out / "trials.csv") as aside:
        pl.DataFrame(rows, infer_schema_length=None, strict=False).write_csv(aside)


def importances(study: optuna.Study) -> dict[str, float]:
    """How much of the trials' differences each key explains (fANOVA, Hutter et al., 2014), largest first.

    Of keys that all finished trials have; empty where there are too few trials.
    """
    if sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return {
        key: float(value) for key, value in optuna.importance.get_param_importances(study, evaluator=evaluator).items()
    }


def trials_table(rows: list[dict[str, Any]], answer: Answer) -> Table:
    """The best trials and the first."""
    metric, best = answer["metric"], answer["best"]["trial"]
    counts = ", ".join(f"{count} {status}" for status, count in answer["trials"].items())
    table = Table(title=f"trials by validation {_SHOWN[metric]}: {counts}", title_justify="left")
    for name in ("trial", "log loss", "AUC", "best epoch", "seconds"):
        table.add_column(name, justify="right")
    done = sorted((row for row in rows if row["status"] == DONE), key=lambda row: row["value"], reverse=metric == "auc")
    for row in done[:_ROWS] + [row for row in done[_ROWS:] if row["trial"] == 0]:
        name = {best: f"best {best}", 0: f"{_first(answer)} 0"}.get(row["trial"], str(row["trial"]))
        numbers = (number(row["valid_logloss"]), number(row["valid_auc"]), str(row["best_epoch"]))
        table.add_row(name, *numbers, f"{row['seconds']:.0f}")
    return table


def _first(answer: Answer) -> str:
    """The first trial's name."""
    return "nearest" if answer["first"]["changed"] else "configured"


def changes_table(rows: list[dict[str, Any]], answer: Answer) -> Table:
    """What was searched: as configured or the nearest in the space, in the best trial, and how much it matters."""
    best, importance = answer["best"]["params"], answer["importances"]
    table = Table(title="what the best trial has; importance: share of the trials' differences", title_justify="left")
    for name in ("key", _first(answer), "best", "importance"):
        table.add_column(name, justify="left" if name == "key" else "right", overflow="fold")
    for key in sorted(best, key=lambda key: -importance.get(key, 0.0)):
        share = f"{100 * importance[key]:.0f} %" if key in importance else number(None)
        table.add_row(key, _short(rows[0].get(key)), _short(best[key]), share)
    return table


def best_table(answer: Answer) -> Table:
    """The best configuration's metrics over seeds, and the ensemble's."""
    best = answer["best"]
    seeds, model = best["seeds"], best["model"]
    table = Table(title=f"trial {best['trial']} trained anew, {len(seeds['done'])} seeds: mean ± 95 % interval of it")
    table.title_justify = "left"
    table.add_column("metric")
    for split in seeds["metrics"]:
        table.add_column(split, justify="right", no_wrap=True)
    ensemble = model["metrics"] if "members" in model else {}
    for split in ensemble:
        table.add_column(f"{split}, as one model", justify="right")
    for name, title in _SHOWN.items():
        cells = [_with_interval(found.get(name)) for found in seeds["metrics"].values()]
        table.add_row(title, *cells, *(number(found[name]) for found in ensemble.values()))
    return table


def _with_interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return number(None)
    if found["high"] is None:
        return number(found["mean"])
    return f"{found['mean']:.4f} ± {found['high'] - found['mean']:.4f}"


def _short(value: Any) -> str:
    return number(None) if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
