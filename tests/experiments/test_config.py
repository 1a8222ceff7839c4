"""The command line: layers in any order, mistakes that die at once with a word of help."""

import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import yaml

import datamodules
from datamodules import folder, kaggle_csv
from datamodules.base import PictureData
from datamodules.knobs import height_width
from experiments import config
from experiments.cli import knobs
from experiments.cli import recipes as recipe
from experiments.config import Config, parse, read
from experiments.running import run_directory


def refused(capsys, line: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(line.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("run.py: ") and error.count("\n") == 1
    return error


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "RECIPES", tmp_path)

    def write(name: str, **values):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))

    write(
        "vit_b16",
        lr=5e-4,
        lr_scaling="linear",
        lr_batch=512,
        epochs=300,
        global_batch_size=1024,
        warmup_epochs=20,
        model_args={"a": 1, "b": 2},
    )
    write("demo", model="vit_nano4", data="digits", epochs=40)
    write("finetune", lr=5e-5)
    return write


def test_later_layers_win_in_any_order_of_flags(recipes, tmp_path):
    file = tmp_path / "config.yml"
    file.write_text("epochs: 7\nmodel_args: {b: 3}\nseed: 1\n")
    for line in (f"--seed 2 --config {file} --model vit_b16", f"--model vit_b16 --config {file} --seed 2"):
        cfg = parse(line.split())
        assert (cfg.seed, cfg.epochs, cfg.global_batch_size, cfg.weight_decay) == (2, 7, 1024, 0.05)
    assert parse(["--model_args.c", "0.5", "--model", "vit_b16"]).model_args == {"a": 1, "b": 2, "c": 0.5}


def test_yaml_reads_scientific_notation_as_a_number(recipes, tmp_path):
    (tmp_path / "c.yml").write_text("lr: 3e-4\n")
    assert parse(f"--model vit_b16 --config {tmp_path}/c.yml".split()).lr == 3e-4


@pytest.mark.parametrize(
    "line, name",
    [
        ("", "demo"),
        ("--epochs 3", "demo"),
        ("--model vit_b16", "vit_b16"),
        ("--model vit_b16 --data imagenet", "vit_b16"),
        ("--model vit_b16 --data folder", "none"),
        ("--model vit_b16 --data_dir d", "none"),
        ("--model vit_s16", "none"),
        ("--model vit_b16 --init w.pth --eval_only", "none"),
        ("--model vit_b16 --data folder --init w.pth", "finetune"),
        ("--model vit_b16 --init w.pth", "vit_b16"),
        ("--model vit_b16 --recipe none", "none"),
        ("--recipe demo --data folder", "demo"),
    ],
)
def test_recipe_follows_from_what_is_given(recipes, line, name):
    assert parse(line.split()).recipe == name
    assert read(line.split()).notes[0].startswith(f"recipe {name} (")


def test_the_ends_of_a_schedule_come_down_to_a_low_peak(recipes):
    recipes("low", min_lr=5e-6, warmup_lr=1e-6, lr=5e-6, lr_scaling="linear", lr_batch=512, global_batch_size=512)
    command = read(["--recipe", "low", "--model", "vit_s16", "--global_batch_size", "64"])
    assert (command.config.lr, command.config.min_lr, command.config.warmup_lr) == (6.25e-7, 6.25e-7, 6.25e-7)
    assert any(note.startswith("min_lr 5e-06") for note in command.notes)
    assert read(["--recipe", "low", "--model", "vit_s16"]).config.min_lr == 5e-6


def test_learning_rate_is_always_the_true_peak(recipes, tmp_path):
    command = read(["--model", "vit_b16"])
    assert command.config.lr == 1e-3 and "lr 0.001 = 0.0005 x 1024/512" in command.notes
    assert parse(["--model", "vit_b16", "--global_batch_size", "256"]).lr == 2.5e-4
    assert parse(["--model", "vit_b16", "--lr_scaling", "sqrt"]).lr == pytest.approx(5e-4 * 2**0.5)
    given = parse(["--global_batch_size", "64", "--model", "vit_b16", "--lr", "3e-4"])
    assert (given.lr, given.lr_scaling) == (3e-4, "none")
    (tmp_path / "again.yml").write_text(yaml.safe_dump(config.plain(command.config)))
    assert parse(["--config", f"{tmp_path}/again.yml"]) == replace(command.config, lr_scaling="none")


def test_booleans_read_bare_with_a_value_and_negated():
    read_as = [
        parse(f"--model vit_b16 {words}".split()).overwrite
        for words in (
            "",
            "--overwrite",
            "--overwrite true",
            "--overwrite=false",
            "--no_overwrite",
            "--overwrite --seed 3",
        )
    ]
    assert read_as == [False, True, True, False, False, True]


@pytest.mark.parametrize(
    "line, words",
    [
        ("--modle vit_b16", "--model"),
        ("--globl_batch_size=3", "--global_batch_size"),
        ("--lr.x 3", "unknown flag --lr.x"),
        ("--lr fast", "--lr: expected a number, got fast"),
        ("--seed x", "--seed: expected a whole number, got x"),
        ("--model_args 3", "--model_args: expected KEY VALUE after a dot, got 3"),
        ("--gpus 2", "unknown flag --gpus; here it is --devices"),
        ("vit_b16", "vit_b16: one word too many; a value follows its flag"),
        ("-lr 3", "unknown flag -lr: flags begin with --"),
        ("--epochs 2.5", "--epochs"),
        ("--epochs 0", "at least 1"),
        ("--overwrite maybe", "--overwrite"),
        ("--precision 8", "32-true"),
        ("--recipe dem", "did you mean demo"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--model_args 3", "--model_args"),
        ("--image_size 12x", "--image_size 12x"),
        ("--crop_scale [0.9,0.1]", "--crop_scale"),
        ("--warmup_epochs 9 --epochs 3", "--warmup_epochs"),
        ("--eval_only --model vit_b16", "--init"),
        ("--min_lr 1 --lr 0.1", "--min_lr"),
        ("--resume a --overwrite", "--resume"),
        ("--hflip 2", "--hflip"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(capsys, line, words):
    assert words in refused(capsys, line)


def test_mistakes_in_files_name_the_file_and_the_closest_key(capsys, recipes, tmp_path):
    recipes("bad", learning_rate=1)
    assert "recipe bad" in refused(capsys, "--recipe bad")
    recipes("paths", data_dir="/x")
    assert "never paths" in refused(capsys, "--recipe paths")
    (tmp_path / "c.yml").write_text("epoch: 3\n")
    assert "did you mean epochs" in refused(capsys, f"--config {tmp_path}/c.yml")
    (tmp_path / "c.yml").write_text("epochs: [\n")
    assert "is not YAML" in refused(capsys, f"--config {tmp_path}/c.yml")


def test_short_runs_shorten_a_recipes_warm_up(recipes):
    command = read(["--model", "vit_b16", "--epochs", "2"])
    assert command.config.warmup_epochs is None and any("warm-up" in note for note in command.notes)


MOST_FLAGS = 78  # only fewer: a rare knob is typed within a dictionary


def test_every_knob_is_declared_once_with_a_full_phrase_under_a_heading():
    texts = [knob.metadata["help"] for knob in fields(Config)]
    assert all(text[0].isupper() and text.endswith(".") and len(text.split()) > 2 for text in texts), texts
    rooms = [vars(room).get("__annotations__", {}) for room in Config.__mro__]
    declared = [name for room in rooms for name in room if name != "title"]
    assert len(declared) == len({*declared}) == len(fields(Config))
    for room in (PictureData, folder.DataModule, kaggle_csv.DataModule):
        assert not {*room.__annotations__} & {*declared}, room
    headed = [knob for members in knobs.groups().values() for knob in members]
    assert headed and {knob.name for knob in headed} == {*declared}


def test_flags_are_few(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    flags = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert len(flags) == MOST_FLAGS + 1 and "config" in flags


def test_data_modules_have_the_ranges_and_defaults_of_flags():
    data = datamodules.create("digits")
    for knob in fields(knobs.data.Augmentation):
        assert getattr(data, knob.name) == getattr(Config(), knob.name), knob.name
    with pytest.raises(ValueError, match="mixup -1: must not be negative"):
        datamodules.create("digits", mixup=-1)


@pytest.mark.parametrize("name, flag", [("cache_side", "--data_args.cache_side"), ("tags", "--logger_args.tags")])
def test_old_spellings_name_the_new_one_and_are_read_from_files(capsys, tmp_path, name, flag):
    assert refused(capsys, f"--{name} 3") == f"run.py: --{name} is now typed as {flag}\n"
    assert "recorded in config.yaml" in refused(capsys, "--extend_step 3")
    assert (
        getattr(parse([flag, "3"]), name)
        == getattr(parse([f"{flag}=3"]), name)
        == type(getattr(parse([flag, "3"]), name))(3)
    )
    (tmp_path / "old.yaml").write_text(f"{name}: 3\nmodel: vit_nano4\n" if name != "tags" else "tags: '3'\n")
    assert getattr(parse(["--config", f"{tmp_path}/old.yaml"]), name) == getattr(parse([flag, "3"]), name)
    (tmp_path / "new.yaml").write_text(f"{flag[2:].split('.')[0]}: {{{name}: 3}}\n")
    assert f"is the key {name} in a YAML file" in refused(capsys, f"--config {tmp_path}/new.yaml")


def test_another_value_under_the_name_of_a_run_is_refused(tmp_path):
    cfg = Config(model="vit_nano4", data="digits", name="one", runs_dir=str(tmp_path), recipe="demo")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(config.plain(cfg)))
    assert not run_directory.look(cfg, {})
    for other, name in ((replace(cfg, lr=0.5), "another"), (replace(cfg, data_dir="pics"), "one-pics")):
        with pytest.raises(ValueError, match=f"is a run with other values .* --name {name}, or --overwrite"):
            run_directory.look(other, {})


def test_a_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().seed = 3


def test_image_sizes():
    assert [height_width(text) for text in (224, "224", "512x1024", [3, 4])] == [
        (224, 224),
        (224, 224),
        (512, 1024),
        (3, 4),
    ]


def name_of(line: str) -> str:
    command = read(line.split())
    return run_directory.run_name(command.config, command.recipe_alone)


@pytest.mark.parametrize(
    "line, name",
    [
        ("", "digits-vit_nano4-s0"),
        ("--seed 3", "digits-vit_nano4-s3"),
        ("--lr 3e-4", "digits-vit_nano4-s0-lr0.0003"),
        ("--lr 1e-3 --epochs 2", "digits-vit_nano4-s0-epochs2-lr0.001"),
        ("--devices 2 --workers 0 --logger csv", "digits-vit_nano4-s0"),
        ("--model timm/resnet18 --data digits", "digits-timm_resnet18-s0"),
        ("--model_args.drop_path 0.2", "digits-vit_nano4-s0-drop_path0.2"),
        ("--global_batch_size 32", "digits-vit_nano4-s0-global_batch_size32"),
        ("--recipe demo --eval_only --init a/b.pth", "digits-vit_nano4-s0-eval-inita_b.pth"),
    ],
)
def test_run_names(line, name):
    assert name_of(line) == name


def test_more_than_two_differences_become_six_hex_digits_that_differ():
    first, second = (name_of(f"--lr 1e-3 --epochs 2 --weight_decay {decay}") for decay in (0.2, 0.3))
    assert (
        first != second
        and len(first) == len("digits-vit_nano4-s0-") + 6
        and name_of("--lr 1e-3 --epochs 2 --weight_decay 0.2") == first
    )


@pytest.mark.parametrize(
    "line, words",
    [
        ("--optimizer_args.head_lr_scale 0", "--optimizer_args.head_lr_scale 0: must be above 0"),
        ("--ema_decay 1", "--ema_decay 1: must be below 1"),
        ("--clip_grad 0", "null does not clip"),
        ("--use_ema", "--ema_decay 0.9999 keeps them"),
        ("--average_checkpoints 5", "last-5 or best-3"),
        ("--warmup_epochs 1 --warmup_steps 5", "say the same thing"),
        ("--schedule deit --warmup_epochs 1.5", "a whole number of --warmup_epochs"),
        ("--distill soft", "--teacher names it"),
        ("--mixup -1", "must not be negative"),
        ("--random_erasing 2", "between 0 and 1"),
    ],
)
def test_training_knobs_out_of_range(capsys, line, words):
    assert words in refused(capsys, line)
