"""`run.py --list`: tables of registered names. Only models need torch, for their parameters and layers."""

import re
from collections.abc import Callable, Iterable

from datamodules.knobs import height_width
from experiments.cli import recipes as recipe
from experiments.cli import registered
from experiments.config import Config


def main(cfg: Config) -> int:
    """Print the names of one kind; with --model its layers. Raises ValueError for an unknown model."""
    if cfg.list == "models" and cfg.model:
        _columns(_layers(cfg.model, cfg))
        return 0
    _columns(rows(str(cfg.list)))
    if cfg.list == "models":
        print("timm/<name>: any of timm's models, as timm/resnet50 or timm/vit_base_patch16_224.augreg_in1k")
    if cfg.list == "metrics":
        print(f"left out: what the data are known for, else {_default_metrics()}")
    return 0


def rows(kind: str) -> list[tuple[str, ...]]:
    """One row for each registered name of a kind; the first row of models holds headings. The docs' tables are the
    same."""
    kinds: dict[str, Callable[[], list[tuple[str, ...]]]] = {
        "models": _models,
        "data": lambda: [*registered.data_sets().items()],
        "losses": _losses,
        "metrics": _metrics,
        "recipes": lambda: [(name, purpose(name)) for name in recipe.recipe_names()],
    }
    return kinds[kind]()


def _columns(rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows with each column as wide as its longest cell."""
    rows = [*rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())


def purpose(name: str) -> str:
    """The first phrase of a recipe's header, over as many lines as it takes."""
    header = []
    for line in (recipe.RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or re.match(r"# \w+:", line):
            break
        header.append(line.lstrip("# "))
    return re.split(r";|(?<!et al)\.(?=\s|$)", " ".join(header))[0].strip()


def _losses() -> list[tuple[str, ...]]:
    shared = registered.shared_keywords()
    return [
        *((f"--loss {name}", f"{', '.join(tasks)}: {text}") for name, (tasks, text) in registered.losses().items()),
        *(
            (f"--distill {name}", f"{text} ({', '.join([*shared, *keywords])})")
            for name, (text, keywords) in registered.distill_losses().items()
        ),
        ("--loss_args.target_weights [1,2]", "how much each label or target weighs, of multilabel and regression"),
    ]


def _metrics() -> list[tuple[str, ...]]:
    from lightning_modules.objectives import metrics

    return [
        *(
            (name, entry.mode, f"{', '.join(entry.tasks)}: {registered.summary(entry.compute.__doc__)}")
            for name, entry in metrics.METRICS.items()
        ),
        (
            "my.py:function",
            "max",
            '(target, prediction), whole arrays -> a number; smaller is better with function.mode = "min"',
        ),
    ]


def _default_metrics() -> str:
    from lightning_modules.objectives import metrics

    return ", ".join(f"{name} ({task})" for task, name in metrics.DEFAULTS.items())


def _models() -> list[tuple[str, ...]]:
    import torch

    import models
    from models import cost

    recipes = recipe.recipe_names()
    rows: list[tuple[str, ...]] = [("name", "parameters", "GMACs", "size", "recipe", "in timm")]
    for name in models.names():
        entry = models.REGISTRY[name]
        with torch.device("meta"):
            count = cost.parameters(models.create(name))
        rows.append(
            (
                name,
                f"{count:>13,}",
                f"{entry.gmacs:>7.2f}",
                f"{entry.image_size:>4}",
                name if name in recipes else "-",
                entry.timm or "-",
            )
        )
    return rows


def _layers(model: str, cfg: Config) -> list[tuple[str, ...]]:
    import torch

    import models
    from models import cost

    image_size = height_width(cfg.image_size or models.preprocessing(model)["image_size"])
    with torch.device("meta"):
        meta = models.create(model, image_size=image_size, **cfg.model_args)
    rows = [
        *cost.layer_table(meta, image_size),
        (model, image_size, cost.parameters(meta), cost.gmacs(meta, image_size)),
    ]
    return [
        ("layer", "output", "parameters", "GMACs"),
        *((name, "x".join(map(str, shape)), f"{count:>13,}", f"{gmacs:>10.4f}") for name, shape, count, gmacs in rows),
    ]
