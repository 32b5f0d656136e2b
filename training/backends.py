"""The check of fast backends, on rows that a model was validated on: at a training's end, or of a bundle, here.

    python -m training.backends MODEL --data DIR --out BUNDLE [--rows N]

A bundle is checked on the devices of the machine that trains it. Where it is served on another kind, this command
checks it there, on prepared rows, and writes a copy that may be served by what has passed.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from features.dataset import LABEL, PreparedDataset
from features.errors import InputError
from features.files import folder_written_whole, require_absent
from serving.backends.check import check_backends
from serving.backends.record import BACKENDS_FILE, FOLDER, Backends, Device
from serving.bundle import Bundle, load_bundle
from serving.manifest import MANIFEST, SEAL, seal
from serving.models import locate
from serving.scorer import Scorer
from training.fit.days import told_split
from training.sections import ServingConfig


def checked(
    config: ServingConfig,
    scorer: Scorer,
    dataset: PreparedDataset,
    tell: Callable[[str], None] = lambda line: None,
    devices: Sequence[Device] | None = None,
) -> Backends | None:
    """Which fast backends may serve a model, by the validation split or, of a day, by the rows that it was scored on.

    None where the configuration asks for no check, or there are fewer than two rows.

    Args:
        tell: hears what came of each, and why it may not serve.
        devices: on which; by default those that this machine has.
    """
    if not config.fast:
        return None
    split = told_split(dataset)
    table = dataset.split(split)
    if table.num_rows < 2:
        return None
    label_N: np.ndarray = table[LABEL].to_numpy()
    found = check_backends(scorer, table, label_N, split, config.check_rows, devices=devices)
    for device, record in found.devices.items():
        for name, verdict in record.backends.items():
            tell(f"backend {name} on {device} {'may serve' if verdict.passed else f'may not serve: {verdict.reason}'}")
    return found


def with_backends(bundle: Bundle, backends: Backends, out: Path) -> None:
    """Write a copy of a bundle with other records; InputError where `out` exists."""
    facts = {key: value for key, value in bundle.manifest.items() if key not in ("format", "files")}
    with folder_written_whole(out) as folder:
        for path in bundle.path.iterdir():
            if path.is_dir() and path.name != FOLDER:
                shutil.copytree(path, folder / path.name)
            elif path.is_file() and path.name not in (MANIFEST, SEAL, BACKENDS_FILE):
                shutil.copy2(path, folder)
        backends.save(folder)
        seal(folder, facts)


def main() -> None:
    """Check a model on this machine's devices."""
    parser = argparse.ArgumentParser(description="Check which fast backends may serve a model on this machine.")
    parser.add_argument("model", help="a bundle's folder, an MLflow model URI or a run id")
    parser.add_argument("--data", type=Path, required=True, help="prepared rows, encoded as the model's")
    parser.add_argument("--out", type=Path, required=True, help="folder of the copy; must not exist yet")
    parser.add_argument("--rows", type=int, default=ServingConfig().check_rows, help="that are scored, at most")
    given = parser.parse_args()
    try:
        require_absent(given.out)  # the check takes minutes
        bundle, dataset = load_bundle(locate(given.model).path), PreparedDataset.open(given.data)
        dataset.require_pipeline(bundle.pipeline.digest, given.model)
        found = checked(ServingConfig(check_rows=given.rows), bundle.scorer, dataset, tell=print)
        if found is None:
            raise InputError(f"--data {given.data} has fewer than two rows to check on")
        with_backends(bundle, bundle.backends.joined(found) if bundle.backends else found, given.out)
    except InputError as error:
        sys.stderr.write(f"masknet: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
