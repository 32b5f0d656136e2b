"""`masknet train`: from prepared data to a registered bundle."""

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from features.dataset import PreparedDataset
from features.errors import InputError
from features.files import file_written_whole, read_json, write_json
from serving.bundle import tables_of, write_bundle
from serving.calibration import Calibration
from serving.members import Member
from serving.scorer import Scorer
from training.backends import checked
from training.calibration import calibrate, require_calibratable
from training.config import Config, save_config
from training.distributed import World, from_rank_0, join_world
from training.embeddings.placement import placements
from training.errors import Stopped
from training.evaluation.scored import metrics_of
from training.fit.dataset import FitResult, Going, fit_data_of_days
from training.fit.days import is_whole, open_data, scored_rows
from training.fit.guard import require_pipeline
from training.fit.identity import IDENTITY_FILE, identity_of, require_same
from training.fit.members import fit_members, require_members_possible
from training.fit.observer import Observer
from training.fit.starting import (
    Start,
    Weights,
    build_model,
    require_start_fits,
    require_trainable,
    without_norms,
)
from training.fit.state import Position
from training.fit.stopping import stop_request
from training.progress import Silent, TrainingObserver
from training.tracking.opening import Run, open_run
from training.trained_rows import reference_of

Result = dict[str, Any]
Metrics = dict[str, dict[str, float | None]]
RESULT = "result.json"  # written when the bundle is whole


def train(
    config: Config,
    data: Path | Sequence[Path],
    out: Path | None,
    console: Console,
    start: Start | None = None,
    resume: bool = False,
    register: bool = True,
) -> Result | None:
    """Train, write `out` (config.yaml, checkpoints/, bundle/, result.json), register the bundle; None on ranks but 0.

    Args:
        config: what to train.
        data: a prepared data set; or days, which have no validation split, or folders of them.
        out: where to write; by default runs/<experiment>/<run id>.
        console: where a person reads along.
        start: the model to go on from, and whether its norms are removed on the way; by default a fresh one.
        resume: go on with what is in `out`; a training that is done is registered, if it was not.
        register: False for a model that is not to be a candidate, or not yet; a later call with `resume` registers it.

    Raises:
        InputError: configuration, data and start do not go together.
        Failure: the loss left its bounds.
        Stopped: a signal has asked for it; `out` can be resumed.
    """
    started = time.perf_counter()
    job = _Job(config, open_data([data] if isinstance(data, Path) else list(data)), start)
    job.require_possible()
    identity = identity_of(config, job.data, start)
    if resume and out is not None and (out / IDENTITY_FILE).exists():
        require_same(identity, read_json(out / IDENTITY_FILE, "training"), str(out))
    with join_world() as world, stop_request() as stop, ExitStack() as stack:
        job.require_placeable(world)
        run, observer = _reporting(job, world, console, out, resume, stack)
        if run is not None:
            with file_written_whole(run.out / IDENTITY_FILE) as aside:
                write_json(aside, identity)
        out = from_rank_0(run.out if run is not None else None)
        assert out is not None  # rank 0 has a run
        fitted = None
        if not (out / RESULT).exists():
            going = Going(
                checkpoints=out / "checkpoints",
                failed=out / "failed",
                observer=observer,
                resume=resume,
                stop_asked=stop.was_asked,
            )
            try:
                fitted = job.fit(world, going)
            except Stopped as stopped:
                raise Stopped(f"{stopped}; go on with the same command and --out {out} --resume") from None
            if run is not None:
                shutil.rmtree(out / "bundle", ignore_errors=True)  # of a training that was killed before its result
                job.write_bundle(fitted, out / "bundle", run.run_id, observer)
        result = None if run is None else _finish(out, run, fitted, started, register)
        from_rank_0(None)  # others wait here, where a signal does not end them
        return result


@dataclass(frozen=True)
class _Job:
    """What is trained: on one data set with a validation split, or on days without."""

    config: Config
    data: list[PreparedDataset]
    start: Start | None

    @property
    def dataset(self) -> PreparedDataset:
        """The data set, or the first day."""
        return self.data[0]

    @cached_property
    def splits(self) -> dict[str, pa.Table]:
        return {name: self.dataset.split(name) for name in ("valid", "test")} if is_whole(self.dataset) else {}

    def require_possible(self) -> None:
        require_trainable(self.config, self.dataset, self.splits.get("valid"))
        require_start_fits(self.config, self.dataset, self.start)
        require_members_possible(self.config, self.dataset, self.start)
        require_calibratable(self.config.calibration.method, self.splits.get("valid"))
        if not self.splits:
            for day in self.data:
                scored_rows(day)
            if self.start is not None and self.start.remove_norms:
                raise InputError("--remove-norms needs a data set with a validation split; this one is a day")

    def require_placeable(self, world: World) -> None:
        placements(self.config, tables_of(self.dataset.pipeline), world.size, world.device.type)
        require_pipeline(self.config, world.device.type)

    def fit(self, world: World, going: Going) -> list[FitResult]:
        """A result per member."""
        if self.splits:
            return fit_members(self.config, self.dataset, world, going, self.start)
        return [fit_data_of_days(self.config, self.data, world, going, self.start, self._day_metrics)]

    def _day_metrics(self, weights: Weights, day: int) -> dict[str, float | None]:
        """Metrics of a day's rows by the scorer."""
        model = build_model(self.config.model, self.dataset)
        model.load_weights(weights.network, [weights.tables[name] for name in model.table_names])
        split, rate = scored_rows(self.data[day])
        return metrics_of(Scorer(self.dataset.pipeline, [model], rate, weights.id_maps), self.data[day].split(split))

    def write_bundle(self, fitted: Sequence[FitResult], path: Path, run_id: str, observer: Observer) -> None:
        model, members = self.config.model, [result.weights for result in fitted if result.weights is not None]
        assert len(members) == len(fitted)  # on rank 0
        if self.start is not None and self.start.remove_norms:
            model, weights = without_norms(model, self.dataset, members[0])
            members = [weights]

        def calibrated(scorer: Scorer) -> Calibration:
            method = self.config.calibration.method
            found = calibrate(method, scorer, self.dataset)
            if found.kind != method:
                observer.noted(f"not calibrated: clicks of the validation split do not rise with the scores ({method})")
            return found

        def evaluate(scorer: Scorer) -> Metrics:
            if self.splits:
                return {name: metrics_of(scorer, table) for name, table in self.splits.items()}
            return {"progressive": fitted[0].position.history[-1]}  # of the last day, before it was trained on

        write_bundle(
            path,
            name=self.config.tracking.registered_model,
            config=model,
            schema=self.dataset.schema,
            pipeline=self.dataset.pipeline,
            sampling_rate=self.dataset.schema.sampling_rate,
            members=[Member(weights.network, weights.tables, run_id) for weights in members],
            id_maps=members[0].id_maps,  # of several members there are none
            run_id=run_id,
            calibrate=calibrated,
            evaluate=evaluate,
            reference=lambda scorer: reference_of(scorer, self.data),
            check=lambda scorer: checked(self.config.serving, scorer, self.data[-1], observer.noted),
        )


def _reporting(
    job: _Job, world: World, console: Console, out: Path | None, resume: bool, stack: ExitStack
) -> tuple[Run | None, Observer]:
    if not world.is_main:
        return None, Silent()
    data = {"path": str(job.dataset.path), **job.dataset.manifest}
    run = stack.enter_context(open_run(job.config, data, out, resume, console=console))
    save_config(job.config, run.out / "config.yaml")
    return run, stack.enter_context(TrainingObserver(run, console))


def _finish(out: Path, run: Run, fitted: list[FitResult] | None, started: float, register: bool) -> Result:
    """Register what was trained, and write result.json; without `fitted`, that of a training that was done before."""
    if fitted is None:
        result: Result = read_json(out / RESULT, "training")
    else:
        result = _result(out, [member.position for member in fitted], time.perf_counter() - started)
        _write_result(out, result)  # at once: what follows can be made up for
    for split, found in result["metrics"].items():
        run.metrics(result["steps"], {f"{split}_{name}": value for name, value in found.items()})
    result |= {"run_id": run.run_id, "model_uri": run.register(out / "bundle") if register else None}
    _write_result(out, result)
    return result


def _result(out: Path, members: list[Position], seconds: float) -> Result:
    """`history` and `best_epoch` are the first member's; `members` has everyone's."""
    return {
        "out": str(out),
        "bundle": str(out / "bundle"),
        "metrics": read_json(out / "bundle" / "manifest.json", "bundle")["metrics"],
        **_course(members[0]),
        "members": [_course(position) for position in members],
        "steps": sum(position.step for position in members),
        "skipped_batches": sum(position.skipped for position in members),
        "samples_per_second": sum(p.samples for p in members) / sum(p.seconds for p in members),
        "seconds": seconds,
    }


def _course(position: Position) -> Result:
    return {
        "history": position.history,
        "epochs": len(position.history),
        "best_epoch": position.best_epoch + 1,
    }


def _write_result(out: Path, result: Result) -> None:
    with file_written_whole(out / RESULT) as aside:
        write_json(aside, result)
