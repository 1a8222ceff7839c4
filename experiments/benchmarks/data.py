"""`benchmark.py data`: training batches of our loader, from the picture cache and from files, beside timm's."""

import multiprocessing
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import PIL
import timm
import torch
from timm.data import ImageDataset, create_loader

import datamodules
from datamodules.base import PictureData
from datamodules.loading.workers import keep_memory
from datamodules.transforms import array_transforms

Words = dict[str, Any]


def ours(words: Words, without_opencv: bool = False) -> tuple[Iterable, Callable[[int], None]]:
    """(loader, what starts an epoch), in a process that keeps its memory as our workers do."""
    keep_memory()
    if without_opencv:
        array_transforms.opencv = lambda: None
    loader = _data(words).train_dataloader()
    return loader, loader.sampler.set_epoch


def timms(words: Words) -> tuple[Iterable, Callable[[int], None]]:
    """Its own loader up to where ours ends: uint8 batches, to be normalised on the device."""
    data = _data(words)
    loader = create_loader(
        ImageDataset(f"{data.data_dir}/train"),
        (3, *data.image_size),
        data.global_batch_size,
        is_training=True,
        scale=data.crop_scale,
        ratio=data.augment.crop_ratio,
        hflip=data.hflip,
        color_jitter=None,
        interpolation=data.interpolation,
        num_workers=0,
        persistent_workers=False,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    return loader.loader, lambda epoch: None


def _data(words: Words) -> PictureData:
    return datamodules.create(datamodules.detect(words["data_dir"]), val_fraction=0.0, workers=0, **words)


def contenders(words: Words, cache_dir: str) -> dict[str, Callable[[], tuple[Iterable, Callable[[int], None]]]]:
    """Who is measured. Builds the cache."""
    cached = {**words, "cache_dir": cache_dir}
    data = _data(cached)
    if not data.sizes["train"]:
        raise ValueError(f"--data_dir {words['data_dir']} has no train folder: training batches are measured")
    data.cache.build()
    files = {**words, "cache_side": None}
    found = {f"cache, {array_transforms.filter_name(words['interpolation'])}": partial(ours, cached)}
    if array_transforms.opencv():
        found["cache, without OpenCV"] = partial(ours, cached, True)
    return {**found, "files": partial(ours, files), "timm": partial(timms, files)}


def serve(make: Callable, batches: int, pipe: Connection) -> None:
    """The process of one contender: for each round that it hears the processor seconds of one picture."""
    torch.set_num_threads(1)
    loader, start_epoch = make()
    while (number := pipe.recv()) is not None:
        start_epoch(number)
        begun, pictures = time.process_time(), 0
        for batch in islice(loader, batches):
            pictures += len(batch["image"] if isinstance(batch, dict) else batch[0])
        pipe.send((time.process_time() - begun) / pictures)


def rounds_of(found: dict[str, Callable], rounds: int, batches: int) -> dict[str, list[float]]:
    """Each contender in a process of its own; in every round each works once, alone, in a shuffled order.

    Raises ValueError for one that fails.
    """
    pipes, times = {}, {name: [] for name in found}
    for name, make in found.items():
        pipes[name], theirs = multiprocessing.Pipe()
        multiprocessing.Process(target=serve, args=(make, batches, theirs), daemon=True).start()
        theirs.close()  # so that the end of a process that fails is seen here
    for number in range(rounds + 1):  # one to warm up
        for name in random.sample(list(found), len(found)):
            pipes[name].send(number)
            try:
                taken = pipes[name].recv()
            except EOFError:
                raise ValueError(f"the process of {name!r} has failed, its own words tell why") from None
            if number:
                times[name].append(taken)
    for pipe in pipes.values():
        pipe.send(None)
    return times


def measure(words: Words, cache_dir: str | None, rounds: int, batches: int) -> None:
    """Print pictures per second and core of each contender (median over rounds), and ours over timm's: ratio of
    medians, quartiles of the rounds'."""
    with tempfile.TemporaryDirectory() as scratch:
        times = rounds_of(contenders(words, cache_dir or scratch), rounds, batches)
    print(
        f"{words['data_dir']}, {words['image_size']} px, batches of {words['global_batch_size']} uint8 pictures in "
        f"one process, {rounds} "
        f"interleaved rounds of {batches} batches, processor time\n{platform.machine()}, torch {torch.__version__}, "
        f"timm {timm.__version__}, "
        f"Pillow {PIL.__version__}"
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    width = max(map(len, medians))
    for name in sorted(medians, key=medians.get):
        line = f"  {name:<{width}}{1 / medians[name]:>10,.0f} pictures/s a core"
        if name != "timm":
            low, _, high = statistics.quantiles([theirs / own for own, theirs in zip(times[name], times["timm"])], n=4)
            line += (
                f"   {medians['timm'] / medians[name]:.1f} times timm's loader (quartiles of the rounds {low:.1f} "
                f"to {high:.1f})"
            )
        print(line)
