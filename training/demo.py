"""`masknet demo`: every stage of the main job on MovieLens-100k, each through the same code as its command."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from features import movielens
from features.errors import InputError
from features.prepare import prepare
from features.schema import load_schema
from features.splits import SplitRule
from serving.bundle import load_bundle
from serving.models import locate
from serving.scoring.files import SCORE, score_files
from training.commands import run_evaluate
from training.config import load_config
from training.errors import Failure
from training.evaluation.evaluate import MODEL, Evaluation
from training.promotion.command import checks_table
from training.promotion.promote import CHAMPION, Promoted, PromoteOptions, Refused, promote
from training.promotion.trial import Given
from training.served import post, running_service
from training.tables import metrics_table
from training.train import train

CONFIG = Path(str(files("training.configs") / "movielens.yaml"))
SPLIT = "time:0.8,0.1,0.1"
FILMS, TOP = 200, 5
PARITY = 1e-6  # the largest difference allowed between a score over HTTP and the same row's in batch


class Stages:
    """Times the demo's stages and announces each."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        self._console.print(f"[bold cyan]{name:<9}[/] {what}", highlight=False, soft_wrap=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def run_demo(out: Path, console: Console) -> None:
    """Run every stage into `out`, which is made anew, and print what came of it.

    Raises:
        InputError: the data is not to be had, or `out` holds something else than an earlier demo.
    """
    _make_anew(out)
    stage = Stages(console)
    raw, data = out / "movielens.parquet", out / "data"
    with stage("data", "MovieLens-100k: a click is a rating of 4 or more"):
        movielens.write_flat(raw)
    with stage("prepare", f"fit encoders on the oldest 80 %, split {SPLIT}"):
        prepared = prepare(load_schema(movielens.SCHEMA), {"input": [str(raw)]}, data, split=SplitRule.parse(SPLIT))
    with stage("train", "ParallelMaskNet, tables sharded by TorchRec, tracked by MLflow"):
        trained = train(load_config(CONFIG, []), data, out / "train", console)
        assert trained is not None  # this process is alone, so it is rank 0
    with stage("evaluate", "beside the base rate and logistic regression, on the newest 10 %"):
        evaluated, evaluation = run_evaluate(trained["model_uri"], data, [], "test", out / "report", 0.0)
    with stage("promote", f"{trained['model_uri']} becomes champion if it stands the test on the same rows"):
        _tell_of_promotion(console, _promote(trained["model_uri"], raw, data, out))
    champion = f"models:/{load_bundle(Path(trained['bundle'])).name}@{CHAMPION}"
    with stage("serve", f"BentoML loads {champion}; one user, {FILMS} films over HTTP"):
        context, films = _request(raw, data)
        ranked = _rank_over_http(champion, context, films)
    _check_against_batch(champion, context, films, ranked, out)
    _print_ranking(console, context, films, ranked)
    rows = ", ".join(f"{name} {count:,}" for name, count in prepared.rows.items())
    aside = f"{prepared.bad_rows} rows without a readable year were set aside"
    console.print(f"\n{rows} rows; {aside}", highlight=False, soft_wrap=True)
    _print_summary(console, stage, evaluation, str(evaluated["report"]))


def _make_anew(out: Path) -> None:
    marker = out / "movielens.parquet"
    if out.exists() and not (out.is_dir() and (marker.exists() or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is not an earlier demo's folder; choose another --out")
    shutil.rmtree(out, ignore_errors=True)


def _promote(model: str, raw: Path, data: Path, out: Path) -> Promoted | Refused:
    """By the test split, or, if an earlier demo's champion has another encoding, by its raw rows."""
    reason = ""
    for given in (Given(data), Given(None, (str(_raw_test_rows(raw, data, out)),), max_bad_rows=0.0)):
        try:
            return promote(PromoteOptions(model=model, given=given))
        except Refused as refused:
            return refused
        except InputError as error:
            reason = f"the earlier champion cannot judge: {error}"[:200]
    return promote(PromoteOptions(model=model, force=reason))


def _raw_test_rows(raw: Path, data: Path, out: Path) -> Path:
    rows = out / "test.parquet"
    pl.read_parquet(raw)[pl.read_parquet(data / "test")["_line"].to_numpy() - 1].write_parquet(rows)
    return rows


def _tell_of_promotion(console: Console, done: Promoted | Refused) -> None:
    if isinstance(done, Refused):
        console.print(checks_table(done.evidence.checks))
        console.print(f"{done}; the {CHAMPION} stays", style="yellow", markup=False, highlight=False, soft_wrap=True)
        return
    if done.checks:
        console.print(checks_table(done.checks))
    console.print(f"{CHAMPION}: {done.model_uri}, {done.reason}", markup=False, highlight=False, soft_wrap=True)


def _request(raw: Path, data: Path) -> tuple[dict[str, Any], pl.DataFrame]:
    """The user with the most training rows, and the films with the most ratings, as raw values."""
    known = pl.read_parquet(data / "train")["_group"].value_counts(sort=True).sort(["count", "_group"], descending=True)
    flat = pl.read_parquet(raw)
    readable = flat.filter(pl.col("year").str.contains(r"^\d{4}$"))
    films = readable.group_by("item_id", "title", "year", "genres").len().sort(["len", "item_id"], descending=True)
    user = flat.filter(pl.col("user_id") == known["_group"][0]).select("user_id", "age", "gender", "occupation")
    return user.row(0, named=True), films.head(FILMS).drop("len").with_columns(pl.col("year").cast(pl.Int64))


def _rank_over_http(model: str, context: dict[str, Any], films: pl.DataFrame) -> dict[str, Any]:
    body = {"context": context, "candidates": films.to_dict(as_series=False), "top_k": films.height}
    with running_service(model) as address:
        return post(f"{address}/rank", body)


def _check_against_batch(
    model: str, context: dict[str, Any], films: pl.DataFrame, ranked: dict[str, Any], out: Path
) -> None:
    """The same rows through `masknet score` must have the same scores."""
    rows = out / "ranked.parquet"
    films.with_columns(**{name: pl.lit(value) for name, value in context.items()}).write_parquet(rows)
    score_files(load_bundle(locate(model).path), [str(rows)], out / "scored")
    batch_N = pl.read_parquet(out / "scored")[SCORE].to_numpy()
    order_N = np.array([item["index"] for item in ranked["items"]])
    served_N = np.array([item["score"] for item in ranked["items"]])
    difference = float(np.abs(batch_N[order_N] - served_N).max())
    if difference > PARITY:
        raise Failure(f"/rank and masknet score differ by {difference:.1e}, above {PARITY}")


def _print_ranking(console: Console, context: dict[str, Any], films: pl.DataFrame, ranked: dict[str, Any]) -> None:
    who = json.dumps(context, ensure_ascii=False)
    console.print(f"\nbest {TOP} of {films.height} films for {who}", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("film")
    table.add_column("score", justify="right")
    for item in ranked["items"][:TOP]:
        film = films.row(item["index"], named=True)
        table.add_row(f"{film['title']} ({film['year']})", f"{item['score']:.4f}")
    console.print(table)
    console.print(f"all {films.height} scores equal masknet score's to {PARITY:g}", highlight=False)


def _print_summary(console: Console, stage: Stages, evaluation: Evaluation, report: str) -> None:
    console.print(metrics_table(evaluation))
    seconds = Table(title="seconds per stage", title_justify="left")
    for name in (*stage.seconds, "all"):
        seconds.add_column(name, justify="right")
    seconds.add_row(*(f"{value:.1f}" for value in (*stage.seconds.values(), sum(stage.seconds.values()))))
    console.print(seconds)
    own, rival = (evaluation.metrics[name] for name in (MODEL, "logistic regression"))
    console.print(
        f"{MODEL} against logistic regression on the same rows: AUC {_signed(own['auc'], rival['auc'])}, "
        f"log loss {_signed(own['logloss'], rival['logloss'])}\n\n"
        f"report   {report}\n"
        f"runs     mlflow ui --backend-store-uri sqlite:///mlflow.db\n"
        f"serve    make serve\n"
        f"help     masknet --help",
        highlight=False,
        soft_wrap=True,
    )


def _signed(own: float | None, rival: float | None) -> str:
    return "–" if own is None or rival is None else f"{own - rival:+.4f}"
