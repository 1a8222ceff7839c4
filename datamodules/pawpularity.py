"""PetFinder.my Pawpularity (Kaggle 2021): how popular is the photo of a pet, 1 to 100; 9,912 photos `train/<Id>.jpg`,
judged by RMSE."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from datamodules import kaggle_csv
from datamodules.knobs import Task


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(kaggle_csv.DataModule):
    """train.csv: `Id` (without suffix), twelve columns of 0 and 1 (Subject Focus, Eyes, Face, Near, Action, Accessory,
    Group, Collage, Human, Occlusion, Info, Blur), which tell next to nothing about the target, and `Pawpularity`.
    test.csv holds eight placeholders; the real rows come when the notebook is run for the score, so nothing may depend
    on their number.

    Scaled by the known range 0-100, learned with BCE on the sigmoid (the loss that runs on regressions take), folds
    binned by quantiles of the target. Always the mean, 38.04, has RMSE 20.59; the winners' single networks reached 17.3
    to 17.5, their ensemble 16.8.
    """

    usual_metric: ClassVar[str | None] = "rmse"

    target: str | None = "Pawpularity"
    task: Task | None = "regression"
    image: str | None = "{split}/{Id}.jpg"
    group: str | None = "none"
    id_column: str | None = "Id"
    target_range: list[Any] | tuple[Any, ...] | None = field(default_factory=lambda: [0.0, 100.0])
