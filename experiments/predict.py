"""Predict new images with trained networks: python experiments/predict.py runs/cats --data_dir comp --tta hflip

Each RUN is a run directory, the parent of a run with --folds (all of its folds), a checkpoint, or a file of export.py;
several are averaged. Needs torch, timm, einops, numpy, pandas and Pillow only, and no network.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a checkout need not be installed
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist

from datamodules.loading.cores import cores
from datamodules.loading.decode import Decoding, PictureError
from datamodules.loading.files import write_text
from experiments.cli.errors import Parser, piped, positive
from experiments.prediction import inference
from experiments.prediction.inference import How, Source
from experiments.prediction.rows import Rows, rows_of_folder, rows_of_table
from lightning_modules.callbacks.prediction_table import dtype

CONFIG, PREDICTIONS = "config.yaml", "predictions.csv"
START = "spawn"  # of processes: a fork would carry over the GPU's and the threads' state


@dataclass(frozen=True)
class Job:
    """All that a process needs, as plain values. Process r of `world` takes rows r, r + world, ..."""

    sources: list[Source]
    how: How
    rows: Rows
    world: int
    gpus: int
    shards: str

    def shard(self, rank: int) -> Path:
        return Path(f"{self.shards}-{rank}.partial")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    rank = int(os.environ.get("RANK", 0))
    try:
        return predict(args, rank, int(os.environ.get("WORLD_SIZE", 1)))
    except (ValueError, OSError, PictureError) as error:
        _tell(error, rank)
        return 2
    except RuntimeError as error:  # weights that do not fit, NaN, memory
        _tell(f"{error}{'; try a smaller --batch_size' * isinstance(error, torch.OutOfMemoryError)}", rank)
        return 1


def _tell(message: Any, rank: int = 0) -> None:
    print(f"predict.py: {message}", file=sys.stderr, flush=True) if rank == 0 or isinstance(
        message, PictureError
    ) else None


def predict(args: argparse.Namespace, rank: int, launched: int) -> int:
    """Plan, predict in one or several processes, merge, write. `launched` is the number of processes that torchrun has
    started."""
    start = time.monotonic()
    found, config, notes = inference.sources(args.run)
    gpus, more = inference.usable_gpus(args.accelerator)
    world = _world(args.devices, launched, gpus)
    spec, decoding = found[0].spec, _decoding(args, config)
    how = How(**{key: getattr(args, key) for key in asdict(How()) if key != "decoding"}, decoding=decoding)
    for source in found:
        inference.Views(source.spec, how.tta)  # refuses what cannot be done
    rows = _rows(args, spec, config, decoding, inference.inputs_of(found))
    out = Path(args.out) if args.out else Path(args.runs_dir) / (args.name or _name(args)) / PREDICTIONS
    if rank == 0:
        for note in [*notes, *more]:
            print(f"predict.py: {note}", file=sys.stderr)
        _make_room(out.parent, args, rows.root)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            found, how, rows, world, gpus, str(out.with_name(f".{out.name}")) if launched > 1 else f"{folder}/shard"
        )
        if launched > 1:
            _work_with_others(job, rank)
        elif world > 1:
            _start(job)
        else:
            _work(job, 0)
        if rank > 0:
            return 0
        values, problems, precision = merge([job.shard(each) for each in range(world)], len(rows.ids))
        for each in range(world if launched > 1 else 0):
            job.shard(each).unlink()
    _fill(values, problems | rows.bad, rows.ids)
    _write_table(out, rows.ids, values.astype(dtype(spec)), inference.outputs_of(spec) if values.shape[1] > 1 else None)
    if not args.out:
        _write_about(out.with_name(CONFIG), args, job, precision)
    seconds = time.monotonic() - start
    print(
        f"{len(rows.ids)} predictions of {len(found)} network{'s' * (len(found) > 1)}, {precision}, {seconds:.0f} s "
        f"-> {out}"
    )
    return 0


def _world(devices: int, launched: int, gpus: int) -> int:
    if launched > 1:
        if devices > 1:
            raise ValueError(f"torchrun has started {launched} processes: leave --devices out")
        return launched
    if gpus and devices > gpus:
        raise ValueError(f"--devices {devices}: there are {gpus} GPUs; --accelerator cpu runs processes on the CPU")
    return devices


def _decoding(args: argparse.Namespace, config: dict[str, Any]) -> Decoding:
    """As in training; --max_pixels in its place."""
    trained = {key: value for key, value in (config.get("data_args") or {}).items() if key in ("max_pixels", "white")}
    return Decoding(**trained | ({} if args.max_pixels is None else {"max_pixels": args.max_pixels}))


def _rows(
    args: argparse.Namespace, spec: dict[str, Any], config: dict[str, Any], how: Decoding, inputs: list[str]
) -> Rows:
    if args.folder:
        if args.csv or args.data_dir:
            raise ValueError("--folder predicts pictures without a table: leave --csv and --data_dir out")
        return rows_of_folder(args.folder, inputs)
    scheme = {"id_column": spec.get("id_column")} | (spec.get("table") or {})
    return rows_of_table(
        args.csv,
        args.data_dir,
        config,
        scheme,
        image=args.image,
        id_column=args.id_column,
        fill=args.bad_images == "fill",
        how=how,
        inputs=inputs,
    )


# processes


def _work(job: Job, rank: int, local_rank: int = 0, local_ranks: int = 1) -> None:
    """Predict this process's rows and leave them in its shard."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores(local_ranks))
    if job.gpus and local_rank >= job.gpus:
        raise ValueError(f"{local_ranks} processes on a machine with {job.gpus} GPUs")
    device = torch.device("cuda", local_rank) if job.gpus else torch.device("cpu")
    ensemble = inference.Ensemble(job.sources, job.how, device)
    rows = np.arange(rank, len(job.rows.names), job.world)
    values, problems = inference.predict(ensemble, job.rows.root, job.rows.names, rows, local_ranks, job.rows.columns)
    if ensemble.again:
        _tell(f"{ensemble.again} batches had no finite answer in {ensemble.precision} and were predicted in fp32")
    bad, words = np.array([*problems], np.int64), np.array([*problems.values()], np.str_)
    with open(job.shard(rank), "wb") as file:
        np.savez(
            file,
            index=rows,
            values=values,
            bad=bad,
            words=words,
            precision=np.str_(f"{device.type} {ensemble.precision}"),
        )


def _work_with_others(job: Job, rank: int) -> None:
    """Under torchrun: every process its rows, and none goes on before all shards are there (a folder that all of them
    see)."""
    dist.init_process_group("gloo", timeout=timedelta(hours=24))
    _work(job, rank, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.barrier()
    dist.destroy_process_group()


def _start(job: Job) -> None:
    """A process for each device, awaited; when one fails the others are ended and its exit code is ours. Raises
    RuntimeError, SystemExit."""
    context = torch.multiprocessing.get_context(START)
    children = [context.Process(target=_child, args=(job, rank)) for rank in range(job.world)]
    try:
        for child in children:
            child.start()
        while any(alive := [child.sentinel for child in children if child.exitcode is None]) and not any(
            child.exitcode for child in children
        ):
            connection.wait(alive)
        codes = [child.exitcode for child in children if child.exitcode]
    finally:
        for child in children:
            if child.exitcode is None:
                child.terminate()
            child.join()
    if any(code > 0 for code in codes):
        raise SystemExit(max(codes))  # it has said why
    if codes:
        raise RuntimeError(
            f"a process was ended by signal {-codes[0]} (9: the machine was out of memory; fewer --devices or "
            f"--workers)"
        )


def _child(job: Job, rank: int) -> None:
    threading.Thread(target=_leave_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    try:
        _work(job, rank, rank, job.world)
    except (ValueError, OSError, RuntimeError) as error:
        _tell(error)
        sys.exit(1 if isinstance(error, RuntimeError) and not isinstance(error, PictureError) else 2)


def _leave_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def merge(shards: list[Path], count: int) -> tuple[np.ndarray, dict[int, str], str]:
    """(values (N, O) by row, {row: problem}, device and precision). Raises RuntimeError unless each of `count` rows is
    there once."""
    parts = []
    for shard in shards:
        with np.load(shard, allow_pickle=False) as content:
            parts.append({key: content[key] for key in content.files})
    index = np.concatenate([part["index"] for part in parts])
    order = index.argsort(kind="stable")
    if not np.array_equal(index[order], np.arange(count)):
        raise RuntimeError(f"the processes predicted {len(np.unique(index))} of {count} rows, {len(index)} in all")
    problems = {int(row): str(word) for part in parts for row, word in zip(part["bad"], part["words"])}
    return (
        np.concatenate([part["values"] for part in parts])[order],
        dict(sorted(problems.items())),
        str(parts[0]["precision"]),
    )


# what is left


def _fill(values: np.ndarray, problems: dict[int, str], ids: pd.Series) -> None:
    """Give the rows whose picture cannot be read the mean prediction of the others, in place, and list them."""
    if not problems:
        return
    if len(problems) == len(values):
        raise ValueError(f"none of the {len(values)} pictures can be read: {problems[0]}")
    values[[*problems]] = np.nanmean(values, 0)
    for row, problem in problems.items():
        print(
            f"predict.py: {ids.name} {ids.iloc[row]}: {problem}; predicted as the mean of the others", file=sys.stderr
        )


def _write_table(out: Path, ids: pd.Series, values: np.ndarray, outputs: list[str] | None) -> None:
    columns = ["prediction"] if outputs is None else [f"prediction_{name}" for name in outputs]
    table = pd.concat([ids.reset_index(drop=True), pd.DataFrame(values, columns=columns)], axis=1)
    write_text(out, table.to_csv(index=False))


def _name(args: argparse.Namespace) -> str:
    """`<run>[+n]-predict[-<tta>][-<table or folder>]`."""
    first = Path(args.run[0]).absolute()
    first = (
        first.parents[1]
        if first.parent.name == "checkpoints"
        else first.with_suffix("")
        if first.suffix == ".safetensors"
        else first
    )
    name = f"{first.parent.name}-{first.name}" if re.fullmatch(r"fold\d+", first.name) else first.name
    more = f"+{len(args.run) - 1}" if len(args.run) > 1 else ""
    where = Path(args.folder).absolute().name if args.folder else Path(args.csv).stem if args.csv else "test"
    return f"{name}{more}-predict" + f"-{args.tta}" * (args.tta != "none") + f"-{where}" * (where != "test")


def _make_room(folder: Path, args: argparse.Namespace, root: str) -> None:
    """The folder of the output; a run directory of predict.py's own, of the same networks and rows, is written over,
    another thing's is not. Raises ValueError, OSError."""
    if args.out and os.path.isdir(args.out):
        raise ValueError(f"--out {args.out}: is a folder; it names the file to write")
    if args.name and not re.fullmatch(r"\w[\w.+=-]*", args.name):
        raise ValueError(f"--name {args.name}: letters, digits and . _ + = - only; --runs_dir names the folder")
    folder.mkdir(parents=True, exist_ok=True)
    before = {} if args.out else about(folder)
    if not args.out and any(folder.iterdir()) and before.get("verb") != "predict":
        raise ValueError(f"{folder} is there and not of predict.py: --name another, or --out FILE")
    now = {"runs": [os.path.abspath(run) for run in args.run], "data_dir": [os.path.abspath(root)]}
    there = {"runs": before.get("runs") or now["runs"], "data_dir": [before.get("data_dir") or root]}
    apart = [
        f"{key} {', '.join(there[key])} -> {', '.join(now[key])}"
        for key in now
        if [*map(os.path.realpath, there[key])] != [*map(os.path.realpath, now[key])]
    ]
    if apart and os.path.exists(there["data_dir"][0]):
        raise ValueError(f"{folder} holds other predictions ({', '.join(apart)}): --name another, or --out FILE")


def about(folder: Path) -> dict[str, Any]:
    """What predict.py wrote of its run directory; {} of another's."""
    try:
        return json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}


def _write_about(file: Path, args: argparse.Namespace, job: Job, precision: str) -> None:
    """JSON, which is YAML too: what was predicted from what, and the specification of the columns, for submit.py."""
    left_out = ("run", "name", "runs_dir", "out", "devices", "precision", "batch_size", "workers", "accelerator")
    content = {
        "verb": "predict",
        "runs": [os.path.abspath(run) for run in args.run],
        "files": [source.file for source in job.sources],
        **{key: value for key, value in vars(args).items() if key not in left_out},
        "data_dir": os.path.abspath(job.rows.root),
        "precision": precision,
        "rows": len(job.rows.names),
        "spec": job.sources[0].spec,
    }
    write_text(file, json.dumps(content, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "run", nargs="+", metavar="RUN", help="run directory, parent of folds, checkpoint, or exported file"
    )
    parser.add_argument("--csv", help="table of the pictures; left out: test.csv in --data_dir")
    parser.add_argument(
        "--data_dir", help="folder of the pictures; left out: the table's folder, or the one the run was trained on"
    )
    parser.add_argument("--folder", help="predict all pictures in a folder, without a table")
    parser.add_argument("--image", help="where a table's pictures are, as {split}/{Id}.jpg; left out: as in training")
    parser.add_argument("--id_column", help="column of the ids; left out: as in training")
    parser.add_argument(
        "--tta",
        choices=inference.TTA,
        default="none",
        help="hflip: mean over the picture and its mirror; multicrop: mean over "
        "five crops, the corners and the centre of the resized picture",
    )
    parser.add_argument("--out", help="file to write; left out: predictions.csv in a run directory of its own")
    parser.add_argument("--name", help="of that run directory; left out: the first run's name and what was done")
    parser.add_argument("--runs_dir", default="runs", help="folder of the run directories")
    parser.add_argument(
        "--use_ema",
        type=_boolean,
        metavar="true|false",
        help="averaged or raw weights; left out: the averaged where kept",
    )
    parser.add_argument(
        "--bad_images", choices=["error", "fill"], default="error", help="fill: the mean prediction of the others"
    )
    parser.add_argument(
        "--max_pixels",
        type=positive,
        help="of the largest picture that is read; left out: as in training, else 178,956,970",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", *inference.PRECISIONS],
        default="auto",
        help="auto: bf16 where the GPU has it, else fp16 (T4), on CPU fp32",
    )
    parser.add_argument(
        "--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="auto: the GPU where it can be used"
    )
    parser.add_argument("--devices", type=positive, default=1, help="processes, each on a GPU of its own or on the CPU")
    parser.add_argument("--batch_size", type=positive, default=32, help="pictures at a time in each process")
    parser.add_argument(
        "--workers",
        type=partial(positive, least=0),
        help="processes that read pictures; left out: what the machine has",
    )
    return parser


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


if __name__ == "__main__":
    sys.exit(piped(main))
