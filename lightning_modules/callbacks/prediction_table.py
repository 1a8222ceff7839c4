"""Predictions as a table and back: the columns of oof.csv and predictions.csv. No Lightning and no torch.

Legend: N rows, K classes or labels, T targets. Probabilities are float32, values of a regression float64; read back
they are the same to the last bit, and so is their score.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from models.spec import Spec

MOST_COLUMNS = 100  # classes that get a column each; of more only the likeliest is written, but for a table


def table(
    ids: Any, spec: "Spec", prediction: np.ndarray, target: np.ndarray | None = None, fold: Any = None
) -> pd.DataFrame:
    """The table of a split.

    Columns: a table's id under its own name, or `id`; `fold` where it is given; with targets `target` (class name or
    own units), or of several `target_<name>`; `prediction` (own units), or `prediction_<class, label or target>`
    (probabilities, own units). For more than 100 classes of what has no id column `prediction` (the likeliest class)
    and its `probability`.

    Args:
        ids: (N,).
        prediction: (N, K) or (N, T), of `targets.predict`.
        target: (N,) class numbers, or (N, K) or (N, T).
        fold: a number, or (N,) of them.
    """
    names = spec["class_names"] or spec["target_names"] or []
    columns = {spec.get("id_column") or "id": ids} | ({} if fold is None else {"fold": np.broadcast_to(fold, len(ids))})
    if target is not None and spec["task"] == "classification":
        columns["target"] = [names[k] for k in target]
    elif target is not None:
        target = np.rint(target).astype(int) if spec["task"] == "multilabel" else target
        columns |= {key: target[:, k] for k, key in enumerate(_named("target", names))}
    if spec["task"] == "classification" and len(names) > MOST_COLUMNS and not spec.get("id_column"):
        columns |= {"prediction": [names[k] for k in prediction.argmax(1)], "probability": prediction.max(1)}
    else:
        columns |= {key: prediction[:, k] for k, key in enumerate(_named("prediction", names))}
    return pd.DataFrame(columns)


def arrays(content: pd.DataFrame, spec: "Spec") -> tuple[np.ndarray | None, np.ndarray]:
    """The arrays behind a `table`, as `metrics.score` takes them: (targets or None, predictions of the spec's `dtype`).

    Raises ValueError for a column that is missing or a class that the spec does not have.
    """
    names = spec["class_names"] or spec["target_names"] or []
    predicted, answered = (
        _named("prediction", names),
        ["target"] if spec["task"] == "classification" else _named("target", names),
    )
    if missing := [key for key in predicted if key not in content]:
        raise ValueError(f"there is no column {missing[0]!r} ({len(missing)} of {len(predicted)} are missing)")
    prediction = content[predicted].to_numpy(np.float64).astype(dtype(spec))
    if any(key not in content for key in answered):
        return None, prediction
    if spec["task"] != "classification":
        return content[answered].to_numpy(np.float64).astype(dtype(spec)), prediction
    target = pd.Index(names).get_indexer(content["target"].astype(str))
    if (target < 0).any():
        raise ValueError(
            f"column 'target' has {content['target'][target < 0].iloc[0]!r}, which is no class (there are "
            f"{', '.join(names[:5])})"
        )
    return target.astype(np.int64), prediction


def dtype(spec: "Spec") -> type[np.floating]:
    """The type of predictions: float32 for probabilities, float64 for values in own units."""
    return np.float64 if spec["task"] == "regression" else np.float32


def _named(kind: str, names: list[str]) -> list[str]:
    return [kind] if len(names) == 1 else [f"{kind}_{name}" for name in names]


def fixed_rows(ids: Sequence[Any], count: int = 32) -> list[int]:
    """Rows to show of a split, the same ones whatever model, seed, order of the rows or number of processes: those
    whose ids have the smallest hashes. Of all kinds, where the first rows of a folder are one class."""
    marks = [hashlib.blake2b(str(each).encode("utf-8", "surrogatepass"), digest_size=8).digest() for each in ids]
    return sorted(range(len(ids)), key=lambda row: (marks[row], row))[:count]


def write(content: pd.DataFrame, path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    content.to_csv(partial, index=False)
    os.replace(partial, path)
