"""What the default configuration reaches, beside what a practitioner would take instead: writes training/QUALITY.md.

    python -m tests.benchmarks.quality --kuairec interactions.csv.gz --out runs/quality

Every data set has the same configuration, training/configs/default.yaml, and five seeds. Rivals: LightGBM after a small
search; a deep network of two layers of 400 on embeddings of the same width, trained as MaskNet is ("DNN") and with
usual settings ("plain DNN", without prior and averages); logistic regression. The test split decides on nothing.
What is done is kept in --out, and the same command goes on.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from features.dataset import LABEL, PreparedDataset, groups_of
from features.metrics import logloss
from tests.benchmarks import quality_data as data
from tests.benchmarks.common import write_result
from tests.benchmarks.quality_page import PAGE, page
from tests.benchmarks.rivals.tabular import SEARCHED, lightgbm_searched, logistic_regression
from training.ablation.jobs import Job, run_jobs
from training.ablation.statistics import compare
from training.config import load_config
from training.evaluation.clusters import clusters_of

CONFIG = Path(__file__).parents[2] / "training" / "configs" / "default.yaml"
DNN = [
    "model.mask=false",
    "model.embedding_norm=none",
    "model.blocks=1",
    "model.block_width=400",
    "model.head=[400]",
]
PLAIN = [
    *DNN,
    "optimizer.sparse.lr=0.02",
    "optimizer.embedding_prior=0",
    "train.average.name=none",
]
NETWORKS = {"MaskNet": [], "DNN": DNN, "plain DNN": PLAIN}
SEEDS = 5
Scores = dict[int, npt.NDArray[np.floating]]


def data_sets(kuairec: Path | None) -> dict[str, Callable[[Path], None]]:
    """How to prepare each data set, by its name."""
    made = {
        "movielens-time": data.movielens_data(data.TIME),
        "movielens-random": data.movielens_data(data.RANDOM),
        "returning-users": data.returning_users,
        "criteo": data.criteo_data(300_000, 1000),
    }
    if kuairec is not None:
        made["kuairec"] = data.kuairec_data(kuairec)
    return made


ALONE = {"criteo", "returning-users"}  # without the deep networks
UNBOOSTED = {"criteo"}  # beside its best possible log loss; LightGBM would take hours for the search


def scores_of_networks(dataset: PreparedDataset, folder: Path, seeds: int) -> dict[str, Scores]:
    """Test scores of MaskNet and both deep networks, trained by the project's own loop."""
    name = dataset.path.name
    jobs, home = [], folder / "results" / name
    home.mkdir(parents=True, exist_ok=True)
    for network, changes in NETWORKS.items():
        if name in ALONE and changes:
            continue
        for seed in range(1, seeds + 1):
            config = load_config(CONFIG, [*changes, f"train.seed={seed}"])
            place = (
                home / f"{network.replace(' ', '-')}-{seed}-{_digest(config.model_dump(mode='json'), dataset.digest)}"
            )
            jobs.append(
                Job(
                    cell=network,
                    config=config,
                    data=folder / name,
                    result=place.with_suffix(".json"),
                    scores=place.with_suffix(".npy"),
                )
            )
    run_jobs(jobs, 2, lambda job, found: print(f"{name}: {job.cell}, seed {job.config.train.seed}: {found['status']}"))
    found: dict[str, Scores] = {}
    for job in jobs:
        if job.scores is None or not job.scores.exists():
            raise SystemExit(f"{name}: {job.cell}, seed {job.config.train.seed}, has no scores; see {job.result}")
        found.setdefault(job.cell, {})[job.config.train.seed] = np.load(job.scores)
    return found


def others_means(by_seed: Scores) -> Scores:
    """What an ensemble would say (`train.members`): for each seed the mean score of all the others."""
    return {seed: np.mean([by_seed[other] for other in by_seed if other != seed], axis=0) for seed in by_seed}


def scores_of_tables(dataset: PreparedDataset, folder: Path, seeds: int) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Test scores of LightGBM and logistic regression, and LightGBM's chosen settings."""
    if dataset.path.name in UNBOOSTED:
        return {"logistic regression": dict.fromkeys(range(1, seeds + 1), logistic_regression(dataset))}, {}
    place = folder / "results" / dataset.path.name / f"tabular-{seeds}-{_digest(SEARCHED, dataset.digest)}.npz"
    if not place.exists():
        by_seed, settings = lightgbm_searched(dataset, seeds)
        arrays = {f"lightgbm-{seed}": score_N for seed, score_N in enumerate(by_seed, 1)}
        np.savez(place, logistic=logistic_regression(dataset), settings=json.dumps(settings), **arrays)
    with np.load(place) as kept:
        boosted = {seed: kept[f"lightgbm-{seed}"] for seed in range(1, seeds + 1)}
        linear = dict.fromkeys(boosted, kept["logistic"])  # it has no seed
        return {"LightGBM": boosted, "logistic regression": linear}, json.loads(str(kept["settings"]))


def result_of(name: str, folder: Path, seeds: int) -> dict[str, Any]:
    """Means, intervals and MaskNet's differences from each rival on one data set."""
    dataset = PreparedDataset.open(folder / name)
    scores = scores_of_networks(dataset, folder, seeds)
    if seeds > 2:
        scores[f"MaskNet, {seeds - 1} members"] = others_means(scores["MaskNet"])
    tables, settings = scores_of_tables(dataset, folder, seeds)
    test = dataset.split("test")
    label_N = test[LABEL].to_numpy()
    found = compare(
        label_N, clusters_of(groups_of(test), len(label_N)), [*scores.items(), *tables.items()], baseline="MaskNet"
    )
    rate = float(dataset.split("train")[LABEL].to_numpy().mean())
    return {
        "name": name,
        "rows": {split: dataset.files(split).num_rows for split in dataset.splits},
        "fields": len(dataset.pipeline.fields),
        "base_logloss": logloss(label_N, np.full(len(label_N), rate)),
        "best_logloss": data.best_logloss(folder / name),
        "lightgbm": settings,
        "models": {
            model: {metric: _plain(statistics, metric) for metric in ("auc", "logloss")}
            for model, statistics in found.items()
        },
    }


def _digest(*facts: Any) -> str:
    """Of what decides a result, so that no other is taken for it."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _plain(statistics: Any, metric: str) -> Mapping[str, Any]:
    estimate, difference = statistics.estimates[metric], statistics.differences[metric]
    return {
        "mean": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "sd_seeds": estimate.sd_seeds,
        "difference": None if difference is None else {"mean": difference.mean, "verdict": difference.verdict},
    }


def main() -> None:
    """Prepare, train and compare what is asked for, and write results/quality.json and training/QUALITY.md."""
    parser = argparse.ArgumentParser(description="The default configuration beside LightGBM, DNN, logistic regression.")
    parser.add_argument("--kuairec", type=Path, help="CSV of KuaiRec's small matrix; left out without")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", action="append", help="a data set; repeatable")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, make in data_sets(given.kuairec).items():
        if given.only and name not in given.only:
            continue
        if not (given.out / name).exists():
            make(given.out / name)
        rows.append(result_of(name, given.out, given.seeds))
    write_result("quality", {"seeds": given.seeds, "rows": rows})
    PAGE.write_text(page(rows, given.seeds))
    if given.only:
        print("the page has only what --only names")


if __name__ == "__main__":
    main()
