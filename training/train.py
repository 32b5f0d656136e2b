"""`masknet train`: from a prepared data set to a registered bundle."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from features.dataset import LABEL, PreparedDataset, groups_of
from features.files import file_written_whole, write_json
from features.metrics import score_metrics
from serving.bundle import write_bundle
from serving.scorer import Scorer
from training.config import Config, save_config
from training.distributed import World, join_world
from training.fitting import Start, fit_dataset, require_start_fits, require_trainable, without_norms
from training.loop import FitResult, Observer
from training.progress import Silent, TrainingObserver
from training.tracking import Run, track

Result = dict[str, Any]


def train(config: Config, data: Path, out: Path | None, console: Console, start: Start | None = None) -> Result | None:
    """Train, write `out` (config.yaml, bundle/, result.json), register the bundle; None on every rank but 0.

    Args:
        config: what to train.
        data: a prepared data set.
        out: where to write; by default runs/<experiment>/<run id>.
        console: where a person reads along.
        start: the model to go on from, and whether its norms are removed on the way; by default a fresh one.
    """
    started = time.perf_counter()
    dataset = PreparedDataset.open(data)
    splits = {name: dataset.split(name) for name in ("valid", "test")}
    require_trainable(config, dataset, splits["valid"])
    require_start_fits(config, dataset, start)
    with join_world() as world, ExitStack() as stack:
        run, observer = _reporting(config, dataset, world, console, stack)
        fitted = fit_dataset(config, dataset, world, observer, start)
        if run is None:
            return None
        model, weights = config.model, fitted.weights
        if start is not None and start.remove_norms:
            model, weights = without_norms(model, dataset, weights)
        out = out or Path("runs") / config.experiment / run.run_id
        out.mkdir(parents=True, exist_ok=True)
        save_config(config, out / "config.yaml")
        bundle = write_bundle(
            out / "bundle",
            name=config.tracking.registered_model,
            config=model,
            schema=dataset.schema,
            pipeline=dataset.pipeline,
            sampling_rate=dataset.schema.sampling_rate,
            network=weights.network,
            tables=weights.tables,
            run_id=run.run_id,
            evaluate=lambda scorer: _split_metrics(scorer, splits),
        )
        result = _result(fitted, run, out, bundle.manifest["metrics"])
        _record(run, fitted, bundle.manifest["metrics"], out)
        result |= {"model_uri": run.register(bundle.path), "seconds": time.perf_counter() - started}
        with file_written_whole(out / "result.json") as aside:
            write_json(aside, result)
        return result


def _reporting(
    config: Config, dataset: PreparedDataset, world: World, console: Console, stack: ExitStack
) -> tuple[Run | None, Observer]:
    if not world.is_main:
        return None, Silent()
    run = stack.enter_context(track(config, {"path": str(dataset.path), **dataset.manifest}))
    return run, stack.enter_context(TrainingObserver(run, console))


def _split_metrics(scorer: Scorer, splits: dict[str, pa.Table]) -> dict[str, dict[str, float | None]]:
    """Metrics of validation and test, by the scorer that will serve the model."""
    metrics = {}
    for name in ("valid", "test"):
        table = splits[name]
        metrics[name] = score_metrics(table[LABEL].to_numpy(), scorer.score_encoded(table), groups_of(table))
    return metrics


def _result(fitted: FitResult, run: Run, out: Path, metrics: dict[str, Any]) -> Result:
    return {
        "out": str(out),
        "run_id": run.run_id,
        "bundle": str(out / "bundle"),
        "metrics": metrics,
        "epochs": len(fitted.history),
        "best_epoch": fitted.best_epoch + 1,
        "steps": fitted.steps,
        "samples_per_second": fitted.samples / fitted.train_seconds,
    }


def _record(run: Run, fitted: FitResult, metrics: dict[str, Any], out: Path) -> None:
    """The final numbers and the configuration, to MLflow."""
    values = {f"{split}_{name}": value for split, found in metrics.items() for name, value in found.items()}
    run.metrics(fitted.steps, values)
    run.flush(fitted.steps)
    run.text((out / "config.yaml").read_text(), "config.yaml")
