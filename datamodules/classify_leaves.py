"""Classify Leaves (Kaggle 2021, of the course Dive into Deep Learning): 176 kinds of leaves by name; 18,353 photos,
judged by accuracy."""

from dataclasses import dataclass
from typing import ClassVar

from datamodules import kaggle_csv
from datamodules.knobs import Task


@dataclass(kw_only=True, eq=False, repr=False)
class DataModule(kaggle_csv.DataModule):
    """train.csv: `image` (path with suffix, as images/0.jpg) and `label` (text, as maclura_pomifera); test.csv: `image`
    alone; sample_submission.csv: `image,label`, answered by the name of the likeliest class. The images of both lie
    in images/.

    It is the usual form of an image classification, and a pattern for another one: copy the file, put other columns in.
    """

    usual_metric: ClassVar[str | None] = "acc1"

    target: str | None = "label"
    task: Task | None = "classification"
    image: str | None = "{image}"
    group: str | None = "none"
    id_column: str | None = "image"
