"""The record of a training under way: to disk at once, from there to MLflow in the background."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from features.files import canonical_json, file_written_whole, write_json
from training.config import Config
from training.errors import Stopped
from training.tracking.mlflow_run import MlflowRun
from training.tracking.outages import RequestLimits, reason
from training.tracking.resources import ResourceSampler
from training.tracking.sender import Sender
from training.tracking.spool import Record, Spool

RUN_FILE = "run.json"
PATIENCE = 60.0  # seconds that a run waits at its end until MLflow has everything
SHORT_PATIENCE = 10.0  # the same while MLflow is away
KILLED_PATIENCE = 5.0  # and after a signal, behind which a stronger one follows
_SILENCE = 2.0  # seconds of waiting that nobody is told of
_DIGEST = 36  # characters that MLflow takes of a data set's
_Number = tuple[str, float, int]  # name, value, step


class Run:
    """A training's record. Recording waits neither for MLflow nor for its answer, and nothing here fails with it."""

    def __init__(
        self, *, config: Config, out: Path, address: str, remote: MlflowRun, sender: Sender, limits: RequestLimits
    ) -> None:
        """For `open_run`.

        Args:
            config: what is trained.
            out: where the spool and run.json are written.
            address: MLflow's, as it may be shown.
            remote: the run in MLflow, open or not.
            sender: started, without a spool.
            limits: set for as long as the run goes.

        Raises:
            InputError: `out` cannot be written.
        """
        self.out, self.local_id = out, remote.local_id
        self._config, self._address = config, address
        self._remote, self._sender, self._limits = remote, sender, limits
        self._spool = Spool(out / "tracking")
        self.is_fresh = self._spool.is_empty  # nothing was recorded before this process
        self._step = 0
        self._closed = self._waited_in_vain = False
        self._recorded = _numbers(self._spool.tail())
        self._remember()
        sender.attach(self._spool, self._remember)
        self._sampler = ResourceSampler(lambda values: self.metrics(self._step, values))

    @property
    def run_id(self) -> str:
        """MLflow's id of the run, or the local one as long as MLflow has not been reached."""
        return self._remote.run_id or self.local_id

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit, Stopped)) else "FAILED")

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record numbers of a step; None is left out."""
        self._step = max(self._step, step)
        self._record_numbers([(name, float(value), step) for name, value in values.items() if value is not None])

    def series(self, name: str, first_step: int, values: list[float]) -> None:
        """Record a number of several steps that follow each other."""
        self._step = max(self._step, first_step + len(values) - 1)
        self._record_numbers([(name, float(value), first_step + offset) for offset, value in enumerate(values)])

    def _record_numbers(self, numbers: list[_Number]) -> None:
        """All but those that a process before this one recorded, of steps that are gone through once more."""
        fresh = [number for number in numbers if number not in self._recorded]
        if fresh:
            self._spool.append({"kind": "metrics", "time": int(time.time() * 1000), "values": fresh})

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters, which never change."""
        self._spool.append({"kind": "params", "values": {key: str(value) for key, value in values.items()}})

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags; the newest value is the one that stays."""
        self._spool.append({"kind": "tags", "values": dict(values)})

    def text(self, content: str, name: str) -> None:
        """Store a text file under the run."""
        self._spool.append({"kind": "text", "name": name, "content": content})

    def artifacts(self, folder: Path, name: str) -> None:
        """Store a folder's files under the run; they are read when they are sent."""
        path = folder.absolute()
        home = self.out.absolute()
        inside = path.relative_to(home) if path.is_relative_to(home) else path
        self._spool.append({"kind": "artifacts", "name": name, "folder": str(inside)})

    def dataset(self, name: str, path: Path, digest: str, profile: Any) -> None:
        """Record what the run is trained on, for MLflow's column of data sets."""
        facts = {"name": name, "digest": digest[:_DIGEST], "source_type": "local", "source": _json({"uri": str(path)})}
        self._spool.append({"kind": "dataset", **facts, "profile": _json(profile)})

    def flush(self) -> None:
        """Hand everything so far to the file system, where it outlives this process."""
        self._spool.flush()

    @property
    def is_connected(self) -> bool:
        """Whether MLflow has opened the run and answered when it was last asked."""
        return self._sender.is_connected

    def wait_until_sent(self, patience: float) -> bool:
        """Wait until MLflow has everything so far; False if that took longer than `patience` seconds."""
        return self._sender.drained(patience)

    def register(self, bundle: Path) -> str | None:
        """Register the bundle as `candidate` and return its URI, or None where MLflow is away; then a person is told.

        A run registers once: later calls return the same URI.
        """
        if self._drained():
            try:
                with self._limits.lasting():
                    return self._remote.register(bundle, self._config.tracking.registered_model)
            except Exception as error:
                why = reason(error)
        else:
            why = f"MLflow at {self._address} does not answer"
        self._sender.tell(f"{bundle} is whole, but not registered: {why}; {self._later}")
        return None

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED, once; wait for what is unsent, and tell of what stays unsent.

        KILLED ends the run in MLflow though it can be resumed, so that nobody takes it for one that is running.
        """
        if self._closed:
            return
        self._closed = True
        self._sampler.stop()
        self._sender.status = status
        done = self._drained(KILLED_PATIENCE if status == "KILLED" else PATIENCE)
        self._sender.stop()
        self._spool.flush()
        self._limits.unset()
        if not done:
            left = self._spool.unsent_bytes
            what = f"{left:,} bytes of records in {self._spool.path}" if left else f"the status {status}"
            self._sender.tell(f"MLflow has not got {what}; {self._later}")

    def _drained(self, patience: float = PATIENCE) -> bool:
        """Wait until MLflow has everything."""
        if not self._sender.is_connected:
            patience = min(patience, _SILENCE if self._waited_in_vain else SHORT_PATIENCE)
        if self._sender.drained(min(_SILENCE, patience)):
            return True
        if patience > _SILENCE:
            self._sender.tell(f"waiting for MLflow to take the last records, {patience:.0f} s at most")
        done = self._sender.drained(max(0.0, patience - _SILENCE))
        self._waited_in_vain = not done
        return done

    @property
    def _later(self) -> str:
        return f"later: the same command with --out {self.out} --resume"

    def _remember(self) -> None:
        """Write OUT/run.json."""
        known = {
            "run_id": self._remote.run_id,
            "local_id": self.local_id,
            "experiment": self._config.experiment,
            "tracking_uri": self._address,
        }
        with suppress(OSError), file_written_whole(self.out / RUN_FILE) as aside:  # MLflow knows the local id, too
            write_json(aside, known)


def _json(value: Any) -> str:
    return canonical_json(value).decode()


def _numbers(records: list[Record]) -> set[_Number]:
    return {tuple(number) for record in records if record["kind"] == "metrics" for number in record["values"]}
