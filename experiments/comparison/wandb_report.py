"""A report and a workspace in W&B, with the curves, bars, differing configs and scatters of a comparison (package
wandb-workspaces)."""

from importlib.util import find_spec
from pathlib import Path

from experiments.cli.errors import UsageError
from experiments.comparison.tables import Comparison

X = "trainer/global_step"


def ready(places: list[str]) -> str:
    """The entity/project that gets the report. Raises UsageError when the package, or the project, is missing: before
    anything is read."""
    if find_spec("wandb_workspaces") is None:
        raise UsageError("--report needs the package wandb-workspaces: pip install wandb-workspaces")
    projects = [place for place in places if not Path(place).exists()]
    if len(projects) != 1:
        raise UsageError(
            f"--report is for the runs of one W&B project: give it as entity/project (given: {', '.join(places)})"
        )
    return projects[0]


def save(project: str, found: Comparison) -> list[str]:
    """Make both; returns their addresses, a line each. Raises UsageError when W&B refuses."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    entity, name = project.split("/")
    title = f"vitlab: {name} by {found.metric}"
    own = [
        found.metric.replace("oof/", "val/"),
        "val/loss",
    ]  # the score over all folds has no curve, those of the folds have

    def panels() -> list:
        return [
            *(reports.LinePlot(x=X, y=[key]) for key in dict.fromkeys(own)),
            reports.BarPlot(metrics=["best"]),
            reports.RunComparer(diff_only="split"),
            *(reports.ScatterPlot(x=key, y="best") for key in ("params", "gmacs", "images_per_sec", "train_seconds")),
        ]

    try:
        report = reports.Report(
            entity=entity,
            project=name,
            title=title,
            blocks=[
                reports.H1(title),
                reports.PanelGrid(runsets=[reports.Runset(entity=entity, project=name, name=name)], panels=panels()),
            ],
        )
        report.save()
        workspace = workspaces.Workspace(
            entity=entity,
            project=name,
            name=title,
            sections=[workspaces.Section(name=found.metric, is_open=True, panels=panels())],
        )
        workspace.save()
    except Exception as error:  # wandb's, its server's, or the package's own checks
        raise UsageError(
            f"--report: W&B did not take it ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    return [f"report: {report.url}", f"workspace: {workspace.url}"]
