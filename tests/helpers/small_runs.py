"""A small run by the command line, and the rows it leaves."""

import csv

TINY = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 "
    "--model_args.drop_path 0.2 "
    "--recipe none --global_batch_size 8 --lr 2e-3 --workers 0 --logger csv --micro_batch_size 4"
)


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))
