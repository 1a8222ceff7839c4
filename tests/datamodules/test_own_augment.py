"""`--augment_args.function my.py:build`: a person's own training views, from the command line."""

import pytest
import torch
from conftest import weights_of
from PIL import Image
from small_runs import TINY

from datamodules.transforms.user_function import UserTransform

OWN = """import random
from PIL import ImageOps
from torchvision.transforms import functional as F

def build(size):
    def view(picture):
        picture = picture.resize(size[::-1])
        return ImageOps.mirror(picture) if random.random() < 0.5 else picture
    return view

def white(size):
    import torch
    return lambda picture: torch.full((3, *size), 255, dtype=torch.uint8)

def wrong(size):
    return lambda picture: F.to_tensor(picture)

def broken(size):
    return lambda picture: picture.nothing()
"""


@pytest.fixture
def own(pics):
    (pics / "my.py").write_text(OWN)
    return pics


def test_the_view_is_what_the_file_makes(own):
    picture = Image.new("RGB", (20, 10), (1, 2, 3))
    image = UserTransform(f"{own}/my.py:build", (8, 6))(picture)
    assert (
        image.shape == (3, 8, 6)
        and image.dtype == torch.uint8
        and image.flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3]
    )
    assert (UserTransform(f"{own}/my.py:white", (8, 6))(picture) == 255).all()


@pytest.mark.parametrize(
    "where, words",
    [
        ("my.py:wrong", "must give a PIL picture or a uint8 tensor of (3, 16, 16), not torch.float32"),
        ("my.py:broken", "AttributeError"),
        ("my.py:gone", "has no function 'gone'"),
        ("gone.py:build", "there is no file 'gone.py'"),
        ("my.py", "give my.py:build"),
    ],
)
def test_mistakes_are_one_line_before_the_run(own, launch, where, words):
    ended = launch(f"{TINY} --image_size 16 --epochs 1 --augment_args.function {where}")
    assert ended.code == 2 and words in ended.out and "Traceback" not in ended.out, ended.out
    assert not (own / "runs").exists()


@pytest.mark.fault
def test_killed_and_resumed_and_changed(own, launch):
    line = f"{TINY} --epochs 2 --augment_args.function my.py:build --save_every_steps 1"
    whole = launch(f"{line} --name whole")
    assert whole.code == 0 and "augment my.py:build makes the training pictures" in whole.out, whole.out
    assert launch(f"{line} --name killed", kill_at_step=3).code == -9
    assert launch(f"{line} --name killed").code == 0
    first, second = (weights_of(own / "runs" / name / "checkpoints" / "last.ckpt") for name in ("whole", "killed"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert launch(f"{line} --name changed", kill_at_step=3).code == -9
    (own / "my.py").write_text(OWN.replace("0.5", "0.4"))
    ended = launch(f"{line} --name changed")
    assert ended.code == 2 and "augment " in ended.out and "saved with other values" in ended.out, ended.out
