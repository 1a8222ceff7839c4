"""--logger tensorboard: what TensorBoard reads back is metrics.csv, over kills, resumes and ranks."""

import sys
from pathlib import Path

import pytest
from conftest import result_of

from lightning_modules.loggers.csv_logger import read_history

LINE = (
    "--recipe demo --model_args.depth 2 --model_args.embed_dim 32 --epochs 2 --global_batch_size 256 --val_fraction "
    "0.2 --log_every_steps 1 "
    "--name board --logger tensorboard"
)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each tag, by TensorBoard's own reader."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.slow
def test_its_files_are_metrics_csv_over_kills_resumes_and_ranks(launch, tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "runs" / "board"
    assert launch(LINE, kill_at_step=3).code == -9  # before the first checkpoint: a row that nothing is left of
    assert launch(f"{LINE} --save_every_steps 6", kill_at_step=7).code == -9
    assert [step for step, _ in scalars(folder / "tensorboard")["train/loss"]] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]  # 7 is to be done again
    ended = launch(f"{LINE} --devices 2 --accelerator cpu", ranks=2)
    assert ended.code == 0 and "resumed from" in ended.out, ended.outs
    found, rows, result = scalars(folder / "tensorboard"), read_history(folder / "metrics.csv"), result_of(folder)
    assert [row["step"] for row in rows] == [*range(1, 9)]
    for key in {key for row in rows for key in row} - {"step"}:
        assert found[key] == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows if key in row], key
    final = {key: value for key, value in result.items() if key == "best" or key.startswith("test/")}
    assert len(final) >= 3 and {key: values for key, values in found.items() if key in final} == {
        key: [(8, pytest.approx(value, rel=1e-6))] for key, value in final.items()
    }
    assert len(list((folder / "tensorboard").iterdir())) == 4  # one writer a launch, and one after training


def test_hyperparameters_and_scores_stand_on_its_page(tmp_path):
    summary = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from lightning_modules.loggers.tensorboard_logger import TensorBoard

    board = TensorBoard(tmp_path, {"model": "vit_nano4", "model_args": {"depth": 2}, "lr": 0.1, "init": None})
    board.summarise({"best": 0.5, "test/acc1": 0.25, "params": 7, "steps": 8})
    board.close(0)
    found = (
        accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        .Reload()
        .summary_metadata["_hparams_/session_start_info"]
    )
    about = summary.HParamsPluginData.FromString(found.plugin_data.content).session_start_info.hparams
    assert (
        about["model"].string_value == "vit_nano4"
        and about["model_args/depth"].number_value == 2
        and about["lr"].number_value == 0.1
    )
    assert scalars(tmp_path / "tensorboard") == {"best": [(8, 0.5)], "test/acc1": [(8, 0.25)]}


def test_a_folder_that_takes_nothing_costs_a_warning(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from lightning_modules.loggers.tensorboard_logger import TensorBoard

    (tmp_path / "tensorboard").write_text("a file in the way")
    board = TensorBoard(tmp_path, {})
    board.log_metrics({"train/loss": 1.0}, step=2)
    board.close(0)
    assert capsys.readouterr().err.count("warning: TensorBoard's files take nothing more") == 1


def without() -> None:
    """For `launch(..., before=without)`: the package is not there."""
    sys.modules["tensorboard"] = None


def test_without_the_package_a_line_says_what_to_install(launch, tmp_path):
    ended = launch(LINE, before=without)
    assert ended.code == 2 and "pip install tensorboard" in ended.out and not (tmp_path / "runs").exists(), ended.out
    assert len(ended.out.splitlines()) <= 3
