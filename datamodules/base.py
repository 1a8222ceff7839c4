"""The data module every image data set shares: splits, loaders, position for exact resume, normalisation on the
device."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.cache.build import ImageCache, default_side
from datamodules.knobs import Augmentation, Batches, Preparation, Source, height_width, out_of_range
from datamodules.loading.image_check import only_skips_differ
from datamodules.loading.images import EvalPictures, Split, TrainPictures, fingerprint, hold_out, spread
from datamodules.loading.samplers import EvalSampler, TrainSampler, passes_per_step
from datamodules.loading.workers import loader, worker_count
from datamodules.transforms.augment import check_policy, inactive, read_augment
from datamodules.transforms.crop_sizes import training_sizes
from datamodules.transforms.erasing import Boxes
from datamodules.transforms.image_transforms import Transform, eval_transform, train_transform
from datamodules.transforms.mixing import Mixer, check_mixing
from datamodules.transforms.on_device import OnDevice
from datamodules.transforms.user_function import UserTransform, digest

if TYPE_CHECKING:
    from models.spec import Batch, Spec

PREPARATION = {
    "image_size": 224,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_pct": DEFAULT_CROP_PCT,
    "crop_mode": "center",
}  # defaults


@dataclass(kw_only=True, eq=False, repr=False)
class PictureData(Batches, Augmentation, Preparation, Source, L.LightningDataModule):
    """Subclasses implement `read`; a knob of their own is a dataclass field more. Works in a Trainer with default flags
    on any number of ranks.

    Args:
        all of `Source`, `Preparation`, `Augmentation` and `Batches` (datamodules/knobs.py). What `Preparation` leaves
            out is here 224 pixels and timm's values for ImageNet. With mixup or CutMix targets in training are (B, K)
            float32, `label_smoothing` folded in; the incomplete last batch of an epoch is dropped.
        own_augment: my.py:build in place of `train_transform` (`UserTransform`).
        class_names: fixes the index order, e.g. from a checkpoint.
        encoding, outputs_per_target: how a network gives the targets of a regression
            (lightning_modules/objectives/targets.py).

    Raises:
        ValueError, FileNotFoundError: a value or a folder that cannot be used.
    """

    if TYPE_CHECKING:  # as `__post_init__` leaves them
        image_size: tuple[int, int]  # type: ignore[assignment]
        mean: tuple[float, float, float]
        std: tuple[float, float, float]
        interpolation: str  # type: ignore[assignment]
        crop_pct: float
        crop_mode: str  # type: ignore[assignment]
        task: Any  # what `read` may change, with the next three
        target_names: list[str] | None
        target_range: Any
        id_column: str | None

    in_memory: ClassVar[bool] = False

    own_augment: str | None = None
    class_names: list[str] | None = None
    encoding: str = "sigmoid"
    outputs_per_target: int = 1

    def __post_init__(self) -> None:
        L.LightningDataModule.__init__(self)  # super() is a group of knobs, which would set them anew
        for name, usual in PREPARATION.items():
            if getattr(self, name) is None:
                setattr(self, name, usual)
        self.image_size = height_width(self.image_size)
        for name in ("mean", "std", "crop_scale"):
            setattr(self, name, tuple(getattr(self, name)))
        self.augment = read_augment(self.augment_args)
        self._check_knobs()
        self.train_sizes = training_sizes(self.train_size, self.image_size, self.epochs)
        self.task, self.target_names, self.target_range, self.id_column = "classification", None, None, None
        self.class_names, self.splits = self.read()
        if self.limit_val is not None:
            self.splits |= {
                name: spread(self.splits[name], self.limit_val) for name in self.splits.keys() & {"val", "test"}
            }
        if "train" in self.splits and not self.eval_only:
            self._check_global_batch()
            self.training_view(self.image_size)  # raises for one that cannot be used
        self.cache = self._planned_cache()
        self.cache_side = self.cache.side if self.cache else None
        mixer = None
        if self.mixing:
            mixer = Mixer(
                mixup=self.mixup,
                cutmix=self.cutmix,
                augment=self.augment,
                smoothing=self.label_smoothing,
                num_classes=len(self.class_names or ()),
                task=self.task,
            )
        self._on_device = OnDevice(
            self.mean, self.std, erasing_mode=self.augment.erasing_mode, mixer=mixer, seed=self.seed
        )
        self._resume: tuple[int, int] | None = None  # epoch and samples of it, for the next train_dataloader()

    def _check_knobs(self) -> None:
        """Raises ValueError for the first value that breaks its rule."""
        try:
            str_to_interp_mode(self.interpolation)
        except KeyError:
            words = "nearest, bilinear, bicubic, box, hamming or lanczos"
            raise ValueError(f"interpolation {self.interpolation!r}: {words}") from None
        if broken := out_of_range(self):
            knob, value, rule = broken
            raise ValueError(f"{knob.name} {value!r}: {rule}")
        if self.crop_mode not in ("center", "squash", "border"):
            raise ValueError(f"crop_mode {self.crop_mode!r}: center, squash or border")
        if self.rand_augment is not None:
            check_policy(self.rand_augment, "--rand_augment", ["rand"])
            if self.augment.auto_augment is not None:
                raise ValueError("--rand_augment and --augment_args.auto_augment are two policies: give one")
        check_mixing(self.mixup, self.cutmix, self.augment)

    def read(self) -> tuple[list[str] | None, dict[str, Split]]:
        """(class names in index order, {"train" | "val" | "test" | "predict": Split}, absent splits left out); lists,
        opens no image.

        `predict` has no labels. For another task it sets `task`; of a regression `target_names` and `target_range` (T
        pairs, own units), and class names are None. `id_column` is a table's.
        """
        raise NotImplementedError

    def with_val(self, train: Split, class_names: list[str]) -> dict[str, Split]:
        """{"train", "val"} by the common rule: stratified `val_fraction` by `split_seed`; no val when the fraction is
        0."""
        if self.val_fraction == 0:
            return {"train": train}
        rest, val = hold_out(train, self.val_fraction, self.split_seed, class_names)
        return {"train": rest, "val": val}

    def training_view(self, size: tuple[int, int]) -> Transform:
        """`train_transform`, or the user's function. Raises ValueError where that cannot be used."""
        return UserTransform(self.own_augment, size) if self.own_augment else self.train_transform(size)

    def train_transform(self, size: tuple[int, int] | None = None) -> Transform:
        """RGB image -> (3, H, W) uint8 of `size` or else image_size, random."""
        return train_transform(
            size or self.image_size,
            interpolation=self.interpolation,
            mean=self.mean,
            crop_scale=self.crop_scale,
            hflip=self.hflip,
            rand_augment=self.rand_augment,
            augment=self.augment,
        )

    def eval_transform(self) -> Transform:
        """RGB image -> (3, H, W) uint8, as timm evaluates."""
        return eval_transform(
            self.image_size,
            interpolation=self.interpolation,
            mean=self.mean,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    @property
    def spec(self) -> "Spec":
        """Specification of the data for a model; plain values only, so a checkpoint with it loads with
        weights_only."""
        return {
            "task": self.task,
            "num_outputs": len(self.class_names)
            if self.class_names
            else len(self.target_names or ()) * self.outputs_per_target,
            "class_names": self.class_names and list(self.class_names),
            "target_names": self.target_names,
            "target_range": self.target_range,
            "encoding": self.encoding if self.task == "regression" else None,
            "image_size": list(self.image_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "id_column": self.id_column,
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of train, val and test; 0 for an absent split."""
        return {split: len(self.splits.get(split, ())) for split in ("train", "val", "test")}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of names and targets (`images.fingerprint`)."""
        return fingerprint(self.splits)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values that must be equal for a position in training to mean the same samples."""
        order: dict[str, Any] = {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "repeated_augment": self.repeated_augment,
        }
        order |= {"augment": digest(self.own_augment)} if self.own_augment else {}
        return {**order, "sizes": self.sizes, "fingerprint": self.fingerprint}

    @property
    def mixing(self) -> bool:
        """Whether batches are mixed in training, and targets soft."""
        return self.mixup > 0 or self.cutmix > 0

    def notes(self) -> list[str]:
        """Lines to print: given values that change nothing in training, and the cache."""
        if self.eval_only:
            return []
        flag = "rand_augment" if self.rand_augment else "auto_augment"
        policy = self.rand_augment or self.augment.auto_augment
        if self.own_augment:
            return [
                f"augment {self.own_augment} makes the training pictures: crop_scale, hflip, rand_augment and their "
                f"like do nothing",
                *self._cache_notes(),
            ]
        lines = inactive(
            self.augment, policy=policy, policy_flag=flag, erasing=self.random_erasing > 0, mixing=self.mixing
        )
        return lines + self._cache_notes()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch: whole global batches."""
        return self.sizes["train"] // self.global_batch_size

    def accumulation(self, world_size: int) -> int:
        """Passes per optimizer step (`passes_per_step`); even ones where training mixes pairs. Raises ValueError where
        there is none."""
        pairs = self.mixing and self.augment.mix_mode != "roll" and not self.eval_only
        return passes_per_step(self.global_batch_size, world_size, self.micro_batch_size, even=pairs)

    def setup(self, stage: str) -> None:
        self._resume = None  # load_state_dict, if there is a checkpoint, comes after

    def train_dataloader(self) -> DataLoader:
        if "train" not in self.splits:
            raise ValueError("there is no train folder: these data can only be evaluated (--eval_only)")
        self._check_global_batch()
        passes = self.accumulation(self._world_size)
        self._accumulate(passes)
        epoch, start = self._resume or (getattr(self.trainer, "current_epoch", 0), 0)
        self._resume = None
        sampler = TrainSampler(
            self.sizes["train"],
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            epoch=epoch,
            start=start,
            repeats=self.repeated_augment,
            **self._place,
        )
        transforms = {size: self.training_view(size) for size in set(self.train_sizes)}
        boxes = Boxes(self.random_erasing, self.augment.erasing_count) if self.random_erasing else None
        pictures = TrainPictures(
            self._served("train"),
            [transforms[size] for size in self.train_sizes],
            self.seed,
            boxes,
            self.repeated_augment,
        )
        return self._loader(pictures, sampler, self.global_batch_size // self._world_size // passes)

    def val_dataloader(self) -> DataLoader | list:
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return [] if fitting and "val" not in self.splits else self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Loader of the split without labels, else of test, else of val."""
        return self._eval_loader(next((name for name in ("predict", "test") if name in self.splits), "val"))

    def state_dict(self) -> dict[str, Any]:
        """Position in training (samples of all ranks), with what must be equal for it to mean the same on resume."""
        if self.trainer is None or not self.steps_per_epoch:
            return {}
        passes = self.accumulation(self._world_size)
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, batches = divmod(batches, int(min(self.trainer.num_training_batches, self.steps_per_epoch * passes)))
        position = {
            "epoch": epoch,
            "samples": batches * self.global_batch_size // passes,
            "world_size": self._world_size,
        }
        crops = self.cache and self.cache.crop_filter
        return position | {"accumulation": passes, "crops": crops} | self.identity

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was saved; another world size is fine. Only fitting uses it.

        Raises:
            ValueError: data, seed, global batch or accumulation are others than in the checkpoint. (Lightning counts
                passes: with another number of them per step it would end the epoch elsewhere, unless AtomicCheckpointIO
                    has counted them anew.)
        """
        if not state or (self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING):
            return
        now = {"accumulation": self.accumulation(self._world_size)} | self.identity
        free = ("sizes", "fingerprint") if only_skips_differ(state, now) else ()
        changed = [
            f"{key} was {state[key]}, is {value}"
            for key, value in now.items()
            if key not in free and state.get(key, value) != value
        ]
        if changed:
            raise ValueError("cannot resume, the data are read in another order than before: " + "; ".join(changed))
        self._resume = (state["epoch"], state["samples"])
        if self._rank == 0 and self.cache and state.get("crops") not in (None, self.cache.crop_filter):
            print(
                f"training crops were resized by {state['crops']}, from here on by {self.cache.crop_filter}: near, but "
                f"not equal to a run on one machine"
            )

    def on_before_batch_transfer(self, batch: "Batch", dataloader_idx: int) -> "Batch":
        """Host side of the work on the device (`OnDevice.before`)."""
        return self._on_device.before(batch, getattr(self.trainer, "current_epoch", 0), self._rank)

    def on_after_batch_transfer(self, batch: "Batch", dataloader_idx: int) -> "Batch":
        """Normalised, erased and mixed on the device (`OnDevice.after`)."""
        return self._on_device.after(batch)

    @property
    def _rank(self) -> int:
        return getattr(self.trainer, "global_rank", 0)

    @property
    def _world_size(self) -> int:
        return getattr(self.trainer, "world_size", 1)

    @property
    def _place(self) -> dict[str, int | None]:
        """Rank and world size of a sampler; None without a Trainer: the process group's, when the loader is used."""
        return (
            dict(rank=None, world_size=None)
            if self.trainer is None
            else dict(rank=self._rank, world_size=self._world_size)
        )

    def _accumulate(self, passes: int) -> None:
        """Make a Trainer with the default accumulate_grad_batches accumulate `passes`. Raises ValueError for another
        number given to it."""
        asked = getattr(self.trainer, "accumulate_grad_batches", passes)
        if asked not in (1, passes):
            raise ValueError(
                f"Trainer(accumulate_grad_batches={asked}), but global and micro batch size need {passes}: leave it out"
            )
        if self.trainer is not None and asked != passes:
            rank_zero_info(
                f"{passes} passes of each process make one optimizer step of {self.global_batch_size} pictures "
                f"(accumulate_grad_batches={passes})"
            )
            self.trainer.accumulate_grad_batches = passes

    def _eval_loader(self, split: str) -> DataLoader:
        if split not in self.splits:
            raise ValueError(f"these data have no {split} split (sizes: {self.sizes})")
        sampler = EvalSampler(len(self.splits[split]), **self._place)
        pictures = EvalPictures(self._served(split), self.eval_transform())
        per_rank = -(-self.global_batch_size // self._world_size)
        return self._loader(pictures, sampler, min(per_rank, self.micro_batch_size or per_rank))

    def _loader(self, pictures: Dataset, sampler: Sampler, batch_size: int) -> DataLoader:
        workers = worker_count(self.workers, self.in_memory, getattr(self.trainer, "num_devices", 1))
        return loader(pictures, sampler, batch_size, workers, self.seed)

    def _served(self, split: str) -> Split:
        """The split with its images as batches shall have them: out of the cache where there is one."""
        return self.cache.serve(self.splits[split]) if self.cache else self.splits[split]

    def _planned_cache(self) -> ImageCache | None:
        """The cache that `cache_dir` asks for, built or not; None without it, for data in memory and for images that
        are no files. Raises ValueError for `cache_side` without `cache_dir`."""
        if self.cache_side is not None and not self.cache_dir:
            raise ValueError(
                f"--data_args.cache_side {self.cache_side} is the size of pictures in --cache_dir, which is not given"
            )
        if not self.cache_dir or self.in_memory or not all(hasattr(each.open, "path") for each in self.splits.values()):
            return None
        side = self.cache_side or default_side(self.image_size, self.crop_pct, self.train_sizes)
        return ImageCache(str(self.cache_dir), side, self.interpolation, dict(self.splits), self.workers)

    def _cache_notes(self) -> list[str]:
        """Lines on the cache, or on why there is none where one was asked for."""
        if self.cache is None:
            unused = "cache_dir is not used: these data are in memory, or their pictures are no files"
            return [unused] if self.cache_dir else []
        plain = self.crop_mode == "center" and len({*self.image_size}) == 1
        evaluated = self.image_size[0] / self.crop_pct if plain else None
        return self.cache.notes([self.image_size, *self.train_sizes], evaluated)

    def _check_global_batch(self) -> None:
        given, largest = self.global_batch_size, self.sizes["train"]
        if given > largest:
            raise ValueError(
                f"--global_batch_size {given} is larger than the training set; the largest that fits is {largest}"
            )
