"""The result over all folds of a run: every row predicted by the network that has not seen it, one score over all
rows, test predictions averaged. Rows are joined by id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.cli.errors import UsageError
from lightning_modules.callbacks import prediction_table
from lightning_modules.objectives import metrics
from models.spec import Spec

OOF, PREDICTIONS, FOLDS = "oof.csv", "predictions.csv", "folds.csv"
RESAMPLES, BOOT_SEED = 1000, 0


def merge(folder: Path, places: dict[int, Path], spec: Spec, metric: str, *, skipped: bool = False) -> dict[str, Any]:
    """Merge the finished folds into `folder`: oof.csv in the order of its folds.csv, predictions.csv where the folds
    have one.

    Args:
        places: run directory of each finished fold.
        metric: a name of `metrics`, or my.py:function.
        skipped: rows of folds.csv may be missing, their pictures being bad.

    Returns what result.json says of it: fold_scores (None of a fold that is not there), overall (one metric over all
    rows, not a mean of means) with its 95 % interval ci_low, ci_high, by `n_boot` resamples of the rows; oof_rows,
    test_rows, predictions_of. Raises ValueError for files that do not belong together.
    """
    table = whole(folder / FOLDS, places, skipped=skipped)
    target, prediction = prediction_table.arrays(table, spec)
    if target is None:
        raise UsageError(f"{next(iter(places.values())) / OOF} has no targets: --overwrite starts all folds again")
    chosen = metrics.find(metric, spec["task"])
    fold = table["fold"].astype(int).to_numpy()
    scores = [
        metrics.score(chosen, target[fold == k], prediction[fold == k], spec) if k in places else None
        for k in range(_count(folder / FOLDS))
    ]
    low, high, resamples = interval(
        lambda rows: metrics.score(chosen, target[rows], prediction[rows], spec), len(table), prediction.shape[1]
    )
    prediction_table.write(table, folder / OOF)
    test = averaged(places, spec)
    if test is not None:
        prediction_table.write(test, folder / PREDICTIONS)
    return {
        "metric": f"oof/{chosen.name}",
        "overall": metrics.score(chosen, target, prediction, spec),
        "ci_low": low,
        "ci_high": high,
        "n_boot": resamples,
        "boot_seed": BOOT_SEED,
        "fold_scores": scores,
        "oof_rows": len(table),
        "test_rows": 0 if test is None else len(test),
        "predictions_of": len(places),
    }


def whole(folds: Path, places: dict[int, Path], *, skipped: bool = False) -> pd.DataFrame:
    """The rows of every fold's oof.csv as text, each row of the folds once, in the order of folds.csv. Raises
    UsageError for a file that is not there or has other columns, ids or fold numbers than it should."""
    order, parts = _text(folds), {k: _text(place / OOF) for k, place in sorted(places.items())}
    column, first = order.columns[0], next(iter(parts))
    for k, part in parts.items():
        name = places[k] / OOF
        if [*part.columns] != [*parts[first].columns] or part.columns[0] != column:
            raise UsageError(
                f"{name} has the columns {', '.join(part.columns)}, {places[first] / OOF} "
                f"{', '.join(parts[first].columns)}, and the "
                f"id is {column}: they are of different runs; --overwrite starts all folds again"
            )
        meant, there = order.loc[order["fold"] == str(k), column], part[column]
        if there.duplicated().any():
            raise UsageError(f"{name}: the id {there[there.duplicated()].iloc[0]} is there twice")
        missing, foreign = meant[~meant.isin(there)], there[~there.isin(meant)]
        if len(foreign) or len(missing) and not skipped or (part["fold"] != str(k)).any():
            example = [*foreign, *missing, there.iloc[0]][0]
            raise UsageError(
                f"{name} is not of fold {k} of {folds}: {len(missing)} ids missing, {len(foreign)} of other folds "
                f"(such as {example}); "
                "--overwrite starts all folds again"
            )
    together = pd.concat(parts.values(), ignore_index=True).set_index(column, drop=False)
    return together.loc[[each for each in order[column] if each in together.index]].reset_index(drop=True)


def averaged(places: dict[int, Path], spec: Spec) -> pd.DataFrame | None:
    """The mean of the folds' predictions of the test rows (of probabilities, or of values in own units), in the order
    of the first; None where no fold has any. Raises UsageError for files with other columns or ids."""
    files = [place / PREDICTIONS for _, place in sorted(places.items())]
    there = [file for file in files if file.is_file()]
    if not there:
        return None
    if len(there) < len(files):
        raise UsageError(
            f"{next(file for file in files if file not in there)} is not there, and {there[0]} is: --overwrite starts "
            f"all folds again"
        )
    tables = [_text(file).set_index(spec["id_column"]) for file in files]
    for file, each in zip(files, tables):
        if (
            not each.index.is_unique
            or [*each.columns] != [*tables[0].columns]
            or len(each) != len(tables[0])
            or not each.index.isin(tables[0].index).all()
        ):
            raise UsageError(
                f"{file} has other ids or columns than {files[0]}, or an id twice: test.csv has changed in between; "
                f"--overwrite starts "
                "all folds again"
            )
    names = [name for name in tables[0].columns if name == "prediction" or name.startswith("prediction_")]
    mean = np.mean([each.loc[tables[0].index, names].to_numpy(np.float64) for each in tables], axis=0).astype(
        prediction_table.dtype(spec)
    )
    return pd.concat([tables[0].drop(columns=names), pd.DataFrame(mean, tables[0].index, names)], axis=1).reset_index()


def interval(score: Callable[[np.ndarray], float], rows: int, outputs: int) -> tuple[float, float, int]:
    """(2.5 %, 97.5 % percentile, resamples) of `score` over rows drawn with replacement (Efron's percentile bootstrap);
    200 resamples of a large table. It covers the choice of rows, not another training."""
    resamples = int(np.clip(20_000_000 // (rows * outputs), 200, RESAMPLES))
    rng = np.random.default_rng(BOOT_SEED)
    found = np.array([score(rng.integers(rows, size=rows)) for _ in range(resamples)])
    found = found[np.isfinite(found)]  # a resample may lack a class that the metric needs
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (float("nan"), float("nan"))
    return float(low), float(high), resamples


def _text(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UsageError(f"{path} is not there, and its run is finished: --overwrite starts all folds again")
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _count(folds: Path) -> int:
    return int(_text(folds)["fold"].astype(int).max()) + 1
