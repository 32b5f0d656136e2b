"""The command line. It only wires: a command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from features.errors import InputError
from masknet.kernels.modes import KernelsError
from training.errors import Failure, PeerLost, Stopped
from training.stack import check_stack

if TYPE_CHECKING:
    from training.config import Config
    from training.launch import Launch

app = typer.Typer(
    name="masknet",
    help="Click-through-rate ranking with MaskNet: "
    "prepare rows, train, tune, ablate, evaluate, promote, score and serve.",
    epilog="MODEL is a bundle's folder, models:/name@alias, models:/name/3, or an MLflow run id. "
    "MLflow is found through MLFLOW_TRACKING_URI (default sqlite:///mlflow.db).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Bundle folder, models:/name@alias, models:/name/3 or run id.")
]
MaxBadRows = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Largest share of bad rows that is set aside rather than refused.")
]


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 2."""
    from training.launch import end_with_torchrun
    from training.quiet import quiet_libraries

    quiet_libraries()
    end_with_torchrun()
    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except KernelsError as error:
        _fail(str(error), 2)
    except PeerLost as error:
        _fail(str(error), 1, others_know=True)
    except Failure as error:
        _fail(str(error), 1)
    except Stopped as error:
        _stopped(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", 1)


def _fail(message: str, code: int, *, others_know: bool = False) -> NoReturn:
    from training.launch import let_rank_0_speak

    let_rank_0_speak(others_know=others_know)
    console.print(f"masknet: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _stopped(message: str) -> NoReturn:
    from training.launch import STOPPED, let_rank_0_speak

    let_rank_0_speak()
    if os.environ.get("RANK", "0") == "0":  # every rank has stopped, and one tells
        console.print(f"masknet: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    sys.exit(STOPPED)


def _answer(as_json: bool, result: dict[str, Any], text: str) -> None:
    sys.stdout.write((json.dumps(result, ensure_ascii=False) if as_json else text) + "\n")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's data, model and report; made anew.")] = Path(
        "runs/demo"
    ),
) -> None:
    """The whole way on real data: MovieLens-100k from raw rows to a ranked list over HTTP, in under two minutes."""
    check_stack()
    from training.demo import run_demo

    run_demo(out, Console())


@app.command()
def prepare(
    schema: Annotated[
        str, typer.Argument(help="Schema file: which columns there are and what each becomes; or synthetic:criteo.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the prepared data set; must not exist yet.")],
    input: Annotated[
        list[str] | None, typer.Option(help="Raw file, folder, glob or URI to split with --split; repeatable.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="time:0.8,0.1,0.1 or random:0.8,0.1,0.1 (train, valid, test).")
    ] = None,
    train: Annotated[list[str] | None, typer.Option(help="Raw files of the training split; repeatable.")] = None,
    valid: Annotated[list[str] | None, typer.Option(help="Raw files of the validation split; repeatable.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="Raw files of the test split; repeatable.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Encode with this model's fitted encoders; any splits will do.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local (threads of this process) or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to use with --engine ray; by default one is started here.")
    ] = None,
    max_bad_rows: MaxBadRows = 0.01,
    rows: Annotated[int, typer.Option(min=1, help="Rows of synthetic:criteo.")] = 1_000_000,
    cardinality: Annotated[int, typer.Option(help="Distinct ids of synthetic:criteo's largest field.")] = 1_000_000,
    seed: Annotated[int, typer.Option(min=0, max=2**20, help="Seed of synthetic:criteo.")] = 1,
    as_json: Json = False,
) -> None:
    """Turn raw click logs (CSV, TSV, Parquet; plain, gzip or zstd) into a prepared data set.

    Give all rows with --input and --split, or the three splits with --train, --valid and --test. Encoders are fitted on
    the training split only. Rows that break a rule go to OUT/quarantine with file, line, column and reason.

        masknet prepare features/schemas/movielens.yaml --input clicks.parquet --split time:0.8,0.1,0.1 --out data
        masknet prepare features/schemas/criteo.yaml --input train.txt --split random:0.8,0.1,0.1 --out data
        masknet prepare schema.yaml --test today/ --pipeline models:/ranker@champion --out today-encoded
        masknet prepare synthetic:criteo --rows 1000000 --out data
    """
    from training.preparing import PrepareOptions, run_prepare

    given = {"input": input, "train": train, "valid": valid, "test": test}
    options = PrepareOptions(
        schema=schema,
        out=out,
        sources={name: files for name, files in given.items() if files},
        split=split,
        pipeline=pipeline,
        engine=engine,
        address=address,
        max_bad_rows=max_bad_rows,
        rows=rows,
        cardinality=cardinality,
        seed=seed,
    )
    result, done = run_prepare(options, console)
    if not as_json:
        from training.tables import profile_table

        Console().print(profile_table(done.profile))
    for finding in done.profile["findings"]:
        console.print(f"look at  {finding}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    told = ", ".join(f"{name} {count:,}" for name, count in done.rows.items())
    _answer(as_json, result, f"{out}: {told} rows; {done.bad_rows} set aside")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Training configuration (YAML).")],
    data: Annotated[
        list[Path], typer.Option(help="Prepared data set, or days without validation split, or folders of them.")
    ],
    out: Annotated[Path | None, typer.Option(help="Output folder; default runs/EXPERIMENT/RUN-ID.")] = None,
    set: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Override a key: model.blocks=5. Repeatable.")
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on each machine; tables are sharded over them.")] = 1,
    nnodes: Annotated[
        str, typer.Option(metavar="N|MIN:MAX", help="Machines; run the same command on each, as torchrun's.")
    ] = "1",
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet: any port of any one of them.")
    ] = None,
    rdzv_id: Annotated[
        str, typer.Option(metavar="NAME", help="Tells this training from another at the same endpoint.")
    ] = "masknet",
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often to go on from the last checkpoint when a process has died.")
    ] = 0,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="Go on from this model's weights; same data encoding.")
    ] = None,
    remove_norms: Annotated[
        bool, typer.Option("--remove-norms", help="Freeze the norms of --from in turn, so that none is left to serve.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print where the tables would go and what they take, and stop.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with what is in --out, if anything: its last checkpoint, or what is unsent."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a MaskNet, write its bundle and register it under the alias `candidate`.

    masknet train training/configs/movielens.yaml --data data --set train.epochs=3 --nproc 2
    masknet train config.yaml --data today --from models:/ranker@champion --set train.train_only_affine=true
    masknet train config.yaml --data data --from models:/ranker@champion --remove-norms
    masknet train config.yaml --data data --set sharding.type=column_wise --nproc 4 --plan
    masknet train config.yaml --data data --out runs/big --nnodes 4 --nproc 8 --rdzv-endpoint host0:29400 --resume
    """
    check_stack()
    from training.config import load_config
    from training.launch import Launch, is_worker, run_processes

    loaded = load_config(config, set or [])
    if remove_norms and from_ is None:
        raise InputError("--remove-norms fine-tunes a trained model: give it with --from")
    if is_worker():
        launch = Launch.of_torchrun()
        resume = resume or launch.starts_again
    else:
        launch = Launch(processes=nproc, machines=nnodes, endpoint=rdzv_endpoint, job=rdzv_id, restarts=max_restarts)
    if plan:
        _show_plan(loaded, data, launch, as_json)
        return
    if resume and out is None:
        raise InputError("--resume goes on with what is in a folder: give it with --out")
    if launch.needs_shared_folder and out is None:
        raise InputError("--nnodes and --max-restarts need --out: a folder that all machines see, for the checkpoints")
    for made in ("bundle", "checkpoints"):
        if out and not resume and (out / made).exists():
            raise InputError(f"{out / made} exists already; go on with --resume, or choose another --out")
    if launch.is_needed and not is_worker():
        from training.fit.days import open_data

        open_data(data)  # a wrong path is told here, in one line, and not by every process
        again = ["--resume"] if launch.starts_again else []
        sys.exit(run_processes(launch, "training", [sys.argv[1], *again, *sys.argv[2:]]))
    from training.fit.starting import Start
    from training.train import train as run_train

    start = None
    if from_ is not None:
        from serving.bundle import load_bundle
        from serving.models import locate

        start = Start(load_bundle(locate(from_).path), remove_norms)
    result = run_train(loaded, data, out, console, start, resume)
    if result is not None:
        from training.numbers import number

        split, found = list(result["metrics"].items())[-1]  # test, or the last day before it was trained on
        numbers = f"{split} auc {number(found['auc'])}, logloss {number(found['logloss'])}"
        uri = result["model_uri"]
        registered = f"registered as {uri}, alias candidate" if uri else "not registered yet"
        text = f"{result['bundle']}: {numbers}; {registered}"
        _answer(as_json, result, text)


def _show_plan(config: Config, data: list[Path], launch: Launch, as_json: bool) -> None:
    from training.embeddings.plan import plan_tables, plan_training
    from training.fit.days import open_data

    world_size = launch.processes * int(launch.machines.rpartition(":")[2])
    found = plan_training(config, open_data(data)[0], world_size=world_size, per_machine=launch.processes)
    if os.environ.get("RANK", "0") != "0":  # under torchrun itself, every process gets here
        return
    if as_json:
        _answer(True, found.plain(), "")
    else:
        Console().print(plan_tables(found))


@app.command()
def ablate(
    config: Annotated[Path, typer.Argument(help="Training configuration (YAML) that every cell starts from.")],
    data: Annotated[Path, typer.Option(help="Prepared data set.")],
    norms: Annotated[
        str, typer.Option(help="Norms to compare: NAME, EMBEDDING/HIDDEN, NAME(key=value), NAME+ACTIVATION; or config.")
    ] = "layer,none",
    placements: Annotated[
        str, typer.Option(help="Also every norm in a residual_serial network: pre,post,peri,mix,none.")
    ] = "",
    without: Annotated[str, typer.Option(help="Also the baseline without: mask,norm,feed-forward.")] = "",
    blocks: Annotated[str, typer.Option(help="Also the baseline with so many blocks: 1,3,5.")] = "",
    embedding_dims: Annotated[str, typer.Option(help="Also with embeddings so wide: 8,16.")] = "",
    ratios: Annotated[str, typer.Option(help="Also with these reduction ratios: 1,2,3.")] = "",
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V,V", help="Also with any key at these values. Repeatable.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="The one of --norms that all others are compared with.")] = "layer",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per cell, with seeds 1 to N.")] = 5,
    tune_lr: Annotated[
        int, typer.Option(min=1, help="Learning rates tried per cell, a factor of 3 apart; 1: the configured one.")
    ] = 3,
    rates: Annotated[
        Path | None, typer.Option(help="Learning rates by cell instead, as an ablation's rates.json has them.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time; they share the cores.")] = 1,
    landscape: Annotated[
        str, typer.Option(help="Cells whose loss surface and Hessian are looked at, side by side: layer,none.")
    ] = "",
    set: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Override a key of CONFIG. Repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The study's name; default CONFIG's experiment.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; default runs/ablations/NAME.")] = None,
    document: Annotated[
        Path | None, typer.Option(help="Markdown file in which this study's section is written anew.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare normalizations or other variants fairly: same seeds, data and budget, each at its own learning rate.

    Intervals and tests allow for seeds and for the test rows, and are corrected for the number of cells. Finished runs
    are not run again when the command is repeated; a cell that diverges is a row that says so.

        masknet ablate config.yaml --data data --norms layer,none,rms,dyt,layer/none --jobs 2
        masknet ablate config.yaml --data data --norms layer --without mask,norm,feed-forward --blocks 1,3,5,7,9
        masknet ablate config.yaml --data data --norms layer,rms --placements pre,post,peri --landscape layer,rms
    """
    check_stack()
    from features.errors import without_password
    from training.ablation.cells import Grid, numbers, split_norms
    from training.ablation.command import AblateOptions, run_ablate
    from training.ablation.tables import differences_table, metrics_table

    options = AblateOptions(
        config=config,
        data=data,
        out=out,
        set=set or [],
        grid=Grid(
            norms=split_norms(norms),
            placements=split_norms(placements),
            without=split_norms(without),
            blocks=numbers("--blocks", blocks, int),
            embedding_dims=numbers("--embedding-dims", embedding_dims, int),
            ratios=numbers("--ratios", ratios, float),
            vary=tuple(vary or ()),
        ),
        baseline=baseline,
        name=name,
        seeds=seeds,
        tune_lr=tune_lr,
        jobs=jobs,
        rates=rates,
        landscape=split_norms(landscape),
        document=document,
        command=shlex.join(["masknet", *map(without_password, sys.argv[1:])]),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        found, folder = run_ablate(options, console)
    except KeyboardInterrupt:
        console.print("masknet: stopped; the same command goes on with what is done", style="yellow", highlight=False)
        sys.exit(75)
    if not as_json:
        Console().print(metrics_table(found), differences_table(found))
    _answer(as_json, {"out": str(folder), "cells": found["cells"]}, f"report: {folder / 'report.html'}")


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="Training configuration (YAML); what is not searched stays as it is.")],
    data: Annotated[Path, typer.Option(help="Prepared data set.")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="Configurations tried in all; default 50, or no limit with --minutes.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Begin no trial after so many minutes, of all calls together; those under way end."
        ),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(help="What is searched instead of training/tuning/space.yaml, in its format.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="[logloss|auc]", help="Decides, on validation; default CONFIG's train.early_stop.metric."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time; they share the cores.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of the best configuration, with seeds 1 to N.")] = 5,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="Register the mean of these models as one, not the best of them.")
    ] = False,
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Override a key of CONFIG, which is then not searched. Repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The study's name; default CONFIG's experiment.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study; default runs/tuning/NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Search a better configuration (Optuna's TPE), train it with several seeds and register what comes of it.

    Trials are judged on the validation split, and those worse than the median are ended early; no choice looks at the
    test split. OUT/best.yaml is a configuration for masknet train. The same command goes on with a study that was
    stopped, and with more --trials or --minutes adds to it.

        masknet tune config.yaml --data data --trials 50 --jobs 2
        masknet tune config.yaml --data data --minutes 60 --space space.yaml --ensemble
    """
    check_stack()
    from training.tuning.command import TuneOptions, run_tune
    from training.tuning.results import best_table, changes_table, trials_table

    options = TuneOptions(
        config=config,
        data=data,
        out=out,
        name=name,
        trials=trials,
        minutes=minutes,
        space=space,
        jobs=jobs,
        seeds=seeds,
        ensemble=ensemble,
        metric=metric,
        set=set or [],
    )
    answer, rows = run_tune(options, console)
    best = answer["best"]
    if not as_json:
        Console().print(trials_table(rows, answer), changes_table(rows, answer), best_table(answer))
    uri = best["model"]["model_uri"]
    registered = f"registered as {uri}, alias candidate" if uri else "not registered yet"
    result = {"out": answer["out"], "best": best, "config": answer["config"]}
    _answer(
        as_json,
        result,
        f"{best['sentence']}\n{answer['config']}: for masknet train; {best['model']['bundle']}: {registered}",
    )


@app.command()
def evaluate(
    model: Model,
    data: Annotated[Path | None, typer.Option(help="Prepared data set, encoded by the model's pipeline.")] = None,
    input: Annotated[list[str] | None, typer.Option(help="Raw labelled files instead; repeatable.")] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "test",
    against: Annotated[str | None, typer.Option(help="Another MODEL to compare it with, on the same rows.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of report.html, metrics.json and slices.csv; default runs/evaluations/NAME-VERSION-SPLIT."
        ),
    ] = None,
    replicates: Annotated[int, typer.Option(min=100, help="Bootstrap draws that the intervals come from.")] = 1000,
    html: Annotated[bool, typer.Option(help="Write the report for people: one file, no network.")] = True,
    max_bad_rows: MaxBadRows = 0.01,
    as_json: Json = False,
) -> None:
    """Measure a model on labelled rows, alone or against another one, and write a report.

    The base rate and logistic regression stand beside it with --data, which has the training split that they need.
    Two models with pipelines of their own are compared on raw rows: --input.

        masknet evaluate models:/movielens-ranker@candidate --data data --against models:/movielens-ranker@champion
    """
    check_stack()
    from training.commands import run_evaluate
    from training.evaluation.wording import verdict
    from training.tables import metrics_table

    result, evaluation = run_evaluate(
        model, data, input or [], split, out, max_bad_rows, against=against, replicates=replicates, html=html
    )
    if not as_json:
        output = Console()
        output.print(metrics_table(evaluation))
        output.print("\n".join(verdict(evaluation)), markup=False, highlight=False, soft_wrap=True)
    _answer(as_json, result, f"report: {result['report']}")


@app.command()
def score(
    model: Model,
    input: Annotated[list[str], typer.Option(help="Raw file, folder, glob or URI; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder of the scored Parquet parts; must not exist yet.")],
    columns: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Raw columns to keep beside the score; by default all.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local (threads of this process) or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to use with --engine ray; by default one is started here.")
    ] = None,
    max_bad_rows: MaxBadRows = 0.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run with this --out has left, if anything.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score raw rows (CSV, TSV, Parquet; plain, gzip or zstd): the chosen columns are kept, and `score` is added.

    Rows keep their order, over parts named in the order of the files. The folder appears when all of it is there; the
    model's name, version and digest are in every part's metadata. Rows that cannot be scored end it, unless there are
    few enough by --max-bad-rows: then they go to OUT/_quarantine with file, line, column and reason.

        masknet score models:/movielens-ranker@champion --input today.parquet --out scored
        masknet score models:/ranker/7 --input logs/ --columns user_id,item_id --out scored --resume
    """
    check_stack()
    from training.scoring import ScoreOptions, run_score

    options = ScoreOptions(
        model=model,
        sources=input,
        out=out,
        columns=columns,
        engine=engine,
        address=address,
        max_bad_rows=max_bad_rows,
        resume=resume,
    )
    result, done = run_score(options, console)
    aside = f"; {done.bad_rows:,} set aside" if done.bad_rows else ""
    _answer(as_json, result, f"{out}: {done.rows:,} rows{aside}")


@app.command()
def promote(
    model: Model,
    data: Annotated[
        Path | None, typer.Option(help="Prepared data set to judge by; both models must have its encoding.")
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(help="Raw labelled rows instead, encoded by each model's own pipeline; repeatable."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "test",
    max_bad_rows: MaxBadRows = 0.01,
    config: Annotated[Path | None, typer.Option(help="Thresholds and slices of the checks (YAML).")] = None,
    alias: Annotated[str, typer.Option(help="Alias to give.")] = "champion",
    force: Annotated[
        str | None, typer.Option(metavar="REASON", help="Promote whatever the checks say, and record why.")
    ] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Give the alias back to the version before; MODEL is models:/NAME.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Give a registered model the alias `champion` if it stands the test against the present one, and record why.

    It is refused when it is significantly worse in log loss or AUC, badly calibrated, or worse on a slice that the
    configuration names.

        masknet promote models:/movielens-ranker@candidate --data data
        masknet promote models:/movielens-ranker@candidate --input clicks.parquet --config gate.yaml
        masknet promote models:/movielens-ranker@candidate --force "the champion knows none of the new items"
        masknet promote models:/movielens-ranker --rollback
    """
    check_stack()
    from training.promotion.command import checks_table, given_rows, run_promote
    from training.promotion.promote import PromoteOptions

    given = given_rows(data, input or [], split, max_bad_rows)
    options = PromoteOptions(model=model, alias=alias, given=given, config=config, force=force)
    done = run_promote(options, rollback, console)
    if done.checks and not as_json:
        Console().print(checks_table(done.checks))
    _answer(as_json, done.plain(), str(done))


@app.command()
def drift(
    log: Annotated[
        list[str], typer.Argument(metavar="LOG…", help="Prediction log, or any raw rows: files, folders or globs.")
    ],
    against: Annotated[str, typer.Option(metavar="MODEL", help="The model whose training rows are the measure.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of drift.html and drift.json; default runs/drift/NAME-VERSION.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Stability index (PSI) beyond what chance leaves, above which it is drift.")
    ] = 0.2,
    as_json: Json = False,
) -> None:
    """Compare what a model is asked with what it was trained on: field by field, and its scores.

    Exit codes: 0 nothing has drifted, 3 the score or a field has, 2 wrong input, 1 anything else.

        masknet drift /var/log/masknet --against models:/movielens-ranker@champion
    """
    check_stack()
    from training.drifting import DRIFTED, run_drift

    result, words = run_drift(log, against, out, threshold)
    _answer(as_json, result, "\n".join([*words, f"report: {result['report']}"]))
    if result["drifted"]:
        sys.exit(DRIFTED)


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="See masknet --help; default models:/movielens-ranker@champion, or what FILE says."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The service's settings (YAML).")] = None,
    set: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Override a key: limits.rows=2000. Repeatable.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 3000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")] = "127.0.0.1",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes, each with a copy of the model; default 1.")
    ] = None,
) -> None:
    """Serve a model over REST: POST /rank and /predict, GET /model, /readyz, /metrics and /docs.json.

    An alias is followed while the service runs: a new version is checked, warmed up and switched to. All settings are
    in serving/README.md.

        masknet serve models:/movielens-ranker@champion --port 3000
        masknet serve --config serve.yaml --set challenger.share=0.2 --workers 4
    """
    check_stack()
    from serving.start import read_settings, start

    start(read_settings(config, set or [], model=model, workers=workers), host=host, port=port)


@bench.command("kernels")
def bench_kernels(
    out: Annotated[Path | None, typer.Option(help="JSON file of the result.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few runs of small sizes.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="One part of the benchmark. Repeatable.")
    ] = None,
) -> None:
    """Time the fused kernels and whole networks, and what else could do their work, on the GPU if there is one.

    On a CPU: folded networks and the norms by torch. A wrong PART is answered with the list of parts. The same as
    `python -m training.bench.kernels`, which needs torch, triton, numpy and pydantic alone.

        masknet bench kernels --out kernels.json
        masknet bench kernels --only serving --only maskblock_gemm
    """
    from training.bench.kernels import run_kernels

    run_kernels(out, quick, only or [])


@bench.command("train")
def bench_train(
    out: Annotated[Path | None, typer.Option(help="JSON file of the result.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few steps of a small shape.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also a step's stages, and what is reached.")] = False,
    as_json: Json = False,
) -> None:
    """Measure training's samples per second in each precision, on the GPU if there is one.

    CPU: 26 fields × 16, 1 M ids, batches of 4,096. CUDA: 39 fields × 16, 50 M ids, batches of 32,768 in memory. A
    profile has a step's stages, this machine's rate of products, and the shares of it and of the roofline.

        masknet bench train --profile --out train.json
    """
    check_stack()
    from training.bench.train import run_train, shown

    result = run_train(out, quick, profile)
    _answer(as_json, result, shown(result) + (f"\nwritten: {out}" if out else ""))


@bench.command("serve")
def bench_serve(
    out: Annotated[Path | None, typer.Option(help="JSON file of the result.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few requests to a small model.")] = False,
    soak: Annotated[
        int, typer.Option(min=0, help="Requests that are sent to see whether memory grows; none by default.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Measure the ranking endpoint beside FastAPI with PyTorch or ONNX Runtime and `mlflow models serve`, in turns.

    39 fields × 10, 3 parallel blocks × 400, random weights; a request is a user and 500 candidates. Latency of one
    client and the endpoint's stages, the largest rate at which 99 % are answered in 50 ms, and memory. All servers run
    at once: 8 GB of memory, half an hour. Rivals are part of the source tree alone.

        masknet bench serve --soak 100000 --out tests/benchmarks/results/serve.json
        python -m training.bench.serve_page tests/benchmarks/results/serve.json serving/BENCHMARK.md
    """
    check_stack()
    from training.bench.serve import run_serve, shown

    result = run_serve(out, quick, soak)
    _answer(as_json, result, shown(result) + (f"\nwritten: {out}" if out else ""))
