"""Attention maps: those of the same networks with their softmax written out; rollout by hand; refused where there are
none; as a picture."""

import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import set_fused_attn, use_fused_attn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.data import default_collate

import datamodules
import models
from datamodules.loading.images import EvalPictures
from experiments import visualize
from experiments.reporting import attention_maps
from lightning_modules.callbacks.prediction_table import fixed_rows
from models import attention

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2}
OURS = {
    "vit_s16": {"patch_size": 8, **TINY},
    "vit_b16": {"patch_size": 8, "pool": "mean", **TINY},
    "simple_vit_s16": {"patch_size": 8, **TINY},
    "deit_s16": {"patch_size": 8, **TINY},
    "deit_s16_distilled": {"patch_size": 8, **TINY},
    "deit3_s16": {"patch_size": 8, **TINY},
    "vit5_s16": {"patch_size": 8, **TINY},
}
TIMM = [
    "vit_small_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
]
LINE = (
    "--data_dir pics --image_size 16 --model vit_nano4 --model_args.embed_dim 32 --model_args.depth 2 --recipe none "
    "--global_batch_size 8 "
    "--lr 2e-3 --workers 0 --logger csv --epochs 1"
)


class Softmax(TorchFunctionMode):
    """What a network's own softmax over (B, H, N, N) gives."""

    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.softmax and args[0].ndim == 4:
            self.maps.append(out)
        assert func is not F.scaled_dot_product_attention
        return out


@pytest.mark.parametrize("name", OURS)
def test_ours_are_those_of_the_softmax_written_out(name):
    torch.manual_seed(0)
    model = models.create(name, 5, (24, 40), **OURS[name])
    for parameter in model.parameters():  # far from uniform attention
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    images = torch.randn(2, 3, 24, 40)
    with Softmax() as written, torch.no_grad():
        model.eval()(images)
    maps = attention.attention_maps(model, images)
    assert len(maps) == len(written.maps) == 3 and max(float(each.std()) for each in maps) > 0.02
    for ours, own in zip(maps, written.maps):
        assert torch.allclose(ours, own, rtol=1e-4, atol=1e-6)
    assert attention.on_grid(model, attention.rollout(maps), (24, 40)).shape == (2, 3, 5)


@pytest.mark.parametrize("name", TIMM)
def test_timms_are_those_before_their_dropout(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, img_size=(28, 56), patch_size=14, depth=2, embed_dim=64, num_heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images, kept = torch.randn(2, 3, 28, 56), []
    model.eval()
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, given, out: kept.append(out))
    with torch.no_grad():
        model(images)
    own = kept[:2]
    maps = attention.attention_maps(model, images)
    assert len(maps) == 2 and all(torch.allclose(each, other, rtol=1e-4, atol=1e-6) for each, other in zip(maps, own))
    assert not any(block.attn.fused_attn for block in model.blocks) and float(maps[0].std()) > 0.01
    assert attention.on_grid(model, maps[-1].mean(1), (28, 56)).shape == (2, 2, 4)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"scale": 0.7},
        {"is_causal": True},
        {"attn_mask": torch.randn(2, 1, 6, 6)},
        {"attn_mask": torch.rand(6, 6) > 0.4 * (1 - torch.eye(6))},
        {"enable_gqa": True},
    ],
)
def test_weights_are_the_kernels(words):
    torch.manual_seed(0)
    q, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    k = torch.randn(2, 2 if "enable_gqa" in words else 4, 6, 8)
    given = v[:, : k.shape[1]]
    out = F.scaled_dot_product_attention(q, k, given, **words)
    whole = given.repeat_interleave(4 // k.shape[1], 1)
    assert torch.allclose(attention.weights(q, k, given, **words) @ whole, out, atol=1e-6)
    assert attention.weights(q.bfloat16(), k.bfloat16(), given.bfloat16(), **words).dtype == torch.float32


def test_rollout_by_hand():
    first = torch.tensor(
        [[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]]
    )  # two heads, whose mean is a half everywhere
    second = torch.tensor([[[[0.2, 0.8], [0.6, 0.4]], [[0.2, 0.8], [0.6, 0.4]]]])
    # 0.5 mean + 0.5 identity: [[.75, .25], [.25, .75]], then [[.6, .4], [.3, .7]]; the second times the first
    assert torch.allclose(attention.rollout([first, second]), torch.tensor([[[0.55, 0.45], [0.40, 0.60]]]))
    masked = torch.tensor([[[[0.5, 0.0], [0.0, 0.5]]]])  # rows that do not sum to 1 do after
    assert torch.allclose(attention.rollout([masked]).sum(-1), torch.ones(1, 2))


def test_the_grid_has_the_patches_alone_in_their_places():
    def network(name, **more):
        with torch.device("meta"):
            return models.create(name, 5, (24, 40), **OURS[name] | more)

    value = torch.arange(20 * 20.0).view(1, 20, 20)
    for name, tokens, first in (
        ("vit_s16", 16, 1),
        ("deit_s16_distilled", 17, 2),
        ("deit3_s16", 16, 1),
        ("vit5_s16", 20, 1),
    ):
        maps = value[:, :tokens, :tokens]
        assert torch.equal(
            attention.on_grid(network(name), maps, (24, 40))[0].flatten(), maps[0, 0, first : first + 15]
        )  # of 4 registers none
    for name in ("vit_b16", "simple_vit_s16"):
        maps = value[:, :15, :15]
        assert torch.equal(attention.on_grid(network(name), maps, (24, 40)), maps.mean(1).view(1, 3, 5))
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=(28, 42), global_pool="avg", depth=1)
    assert torch.equal(
        attention.on_grid(model, value[:, :11, :11], (28, 42)), value[:, 5:11, 5:11].mean(1).view(1, 2, 3)
    )


def test_attention_follows_the_picture():
    """A patch that every token looks for is where the map is brightest, on a picture that is no square."""
    model = models.create("vit_s16", 2, (16, 32), patch_size=8, embed_dim=8, depth=1, num_heads=1, pos="none").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.weight[0] = 1  # channel 0: how bright
        block = model.blocks[0]
        block.norm1.weight.fill_(1)
        block.attn.qkv.bias[0], block.attn.qkv.weight[8, 0] = (
            30,
            1,
        )  # every query asks, and the keys of bright patches answer
    images = torch.zeros(1, 3, 16, 32)
    images[:, :, 8:, 16:24] = 1
    shown = attention.on_grid(model, attention.attention_maps(model, images)[0].mean(1), (16, 32))[0]
    assert shown.argmax() == 1 * 4 + 2 and shown.max() > 0.9


@pytest.mark.parametrize(
    "name",
    [
        "swin_t",
        "convnext_t",
        "timm/swin_tiny_patch4_window7_224",
        "timm/resnet18",
        "timm/pvt_v2_b0",
        "timm/cait_xxs24_224",
        "timm/maxvit_tiny_rw_224",
        "timm/xcit_nano_12_p16_224",
        "timm/mixer_s32_224",
    ],
)
def test_networks_that_see_parts_are_refused(name):
    with torch.device("meta"):
        model = models.create(name, 5)
    with pytest.raises(ValueError, match="no attention between all patches"):
        attention.check(model, (224, 224))
    assert use_fused_attn() and not use_fused_attn(experimental=True)


class Calls(torch.nn.Module):
    """Two by two patches and two blocks, each calling the kernel with (batch, queries, keys)."""

    def __init__(self, *calls):
        super().__init__()
        self.calls, self.blocks, self.patch_embed = (
            calls,
            torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()]),
            torch.nn.Module(),
        )
        self.patch_embed.proj = torch.nn.Conv2d(3, 8, 4, 4)

    def forward_features(self, x):
        for batch, queries, keys in self.calls:
            F.scaled_dot_product_attention(
                torch.zeros(batch, 1, queries, 8), torch.zeros(batch, 1, keys, 8), torch.zeros(batch, 1, keys, 8)
            )


@pytest.mark.parametrize(
    "calls, fits",
    [
        ([(2, 5, 5), (2, 5, 5)], True),
        ([(2, 4, 4), (2, 4, 4)], True),
        ([(2, 4, 4)], False),
        ([], False),
        ([(8, 4, 4), (8, 4, 4)], False),
        ([(2, 4, 4), (8, 4, 4)], False),
        ([(2, 3, 3), (2, 3, 3)], False),
        ([(2, 5, 4), (2, 5, 4)], False),
        ([(2, 5, 5), (2, 4, 4)], False),
    ],
)
def test_every_block_looks_from_all_tokens_to_all(calls, fits):
    if fits:
        assert len(attention.attention_maps(Calls(*calls), torch.zeros(2, 3, 8, 8))) == 2
    else:
        with pytest.raises(ValueError, match="Calls has no attention"):
            attention.attention_maps(Calls(*calls), torch.zeros(2, 3, 8, 8))


def test_the_network_and_the_switches_stay_as_they_were():
    model = models.create("vit_s16", 5, 16, **OURS["vit_s16"], dropout=0.5, attn_dropout=0.5, drop_path=0.5).train()
    model.set_grad_checkpointing()
    before, images = {key: value.clone() for key, value in model.state_dict().items()}, torch.randn(3, 3, 16, 16)
    try:
        set_fused_attn(False)
        first, again = attention.attention_maps(model, images), attention.attention_maps(model, images)
        assert not use_fused_attn()
    finally:
        set_fused_attn(True)
    assert all(torch.equal(one, other) for one, other in zip(first, again))  # in evaluation mode nothing is dropped
    assert model.training and model.grad_checkpointing and all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(
        parameter.grad is None and parameter.requires_grad and not parameter.is_inference()
        for parameter in model.parameters()
    )
    compiled = torch.compile(model)
    assert torch.equal(attention.attention_maps(compiled, images)[-1], first[-1])
    columns = models.create("vit_s16", 5, 16, columns=2, **OURS["vit_s16"])
    assert len(attention.attention_maps(columns, images)) == 3


# As a picture


def drawn_by(argv, capsys):
    code = 0
    try:
        code = visualize.main(argv)
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    return code, told.out + told.err


def test_the_network_is_shown_what_it_is_evaluated_on(pics, monkeypatch):
    data = datamodules.create(
        "folder",
        data_dir=str(pics / "pics"),
        image_size=(16, 24),
        mean=(0.2, 0.3, 0.4),
        std=(0.3, 0.2, 0.1),
        crop_pct=0.8,
        global_batch_size=8,
        workers=0,
    )
    model, given = models.create("vit_s16", 3, (16, 24), **OURS["vit_s16"]), []
    maps = attention.attention_maps
    monkeypatch.setattr(attention, "attention_maps", lambda model, images: given.append(images) or maps(model, images))
    attention_maps.draw(model, data.spec, attention_maps.of_split(data, 5))
    split = data.splits["test"]
    rows = fixed_rows([name.decode() for name in split.names], 5)
    batch = default_collate([EvalPictures(split, data.eval_transform())[row, True] for row in rows])
    assert torch.equal(torch.cat(given), data.on_after_batch_transfer(batch, 0)["image"])
    titles = [title for title, _ in attention_maps.of_split(data, 5)]
    assert titles == [split.names[row].decode().split("/")[-2] for row in rows]


def test_from_the_command_line(pics, launch, capsys, monkeypatch):
    monkeypatch.chdir(pics)
    shutil.rmtree(pics / "pics" / "test")
    ended = launch(f"{LINE} --name one --logger_args.attention true --val_fraction 0.3")
    assert ended.code == 0 and "could not" not in ended.out, ended.out
    kept = (pics / "runs/one/attention.png").read_bytes()
    code, told = drawn_by(["attention", "runs/one"], capsys)
    assert (
        code == 2
        and "runs/one/attention.png is there already" in told
        and (pics / "runs/one/attention.png").read_bytes() == kept
    ), told
    code, told = drawn_by(["attention", "runs/one", "--overwrite"], capsys)
    assert code == 0 and "attention of 8 pictures -> runs/one/attention.png" in told, told
    assert (pics / "runs/one/attention.png").read_bytes() == kept  # the very picture that the run has left
    code, told = drawn_by(
        ["attention", "runs/one/checkpoints/best.ckpt", "--count", "3", "--out", "new/three.png"], capsys
    )
    assert code == 0 and Image.open("new/three.png").width < Image.open("runs/one/attention.png").width, told
    shutil.copytree("pics", "moved")
    assert drawn_by(["attention", "runs/one", "--data_dir", "moved", "--out", "m.png"], capsys)[0] == 0
    assert (pics / "m.png").read_bytes() == kept
    Image.new("RGB", (50, 30), "red").save("red.png")
    code, told = drawn_by(["attention", "runs/one", "--images", "red.png", "--out", "red-seen.png"], capsys)
    pixels = np.asarray(Image.open("red-seen.png"))
    assert code == 0 and ((pixels == [254, 0, 0]) | (pixels == [255, 0, 0])).all(-1).sum() > 1000
    (pics / "no.jpg").write_bytes(b"no picture")
    for line, words in (
        ("attention nowhere", "no weights at nowhere"),
        ("attention runs/one --count 0", "from 1 on"),
        ("attention runs/one --images no.jpg --out x.png", "cannot read picture no.jpg"),
        ("attentio runs/one", "did you mean attention"),
        ("attention runs/one runs/two", "runs/two: one word too many"),
        ("attention runs/one --out folder", "ends in .png"),
        ("attention runs/one --images a --data_dir b", "not allowed with"),
        ("attention runs/one --data_dir gone --out x.png", "gone"),
        ("attention", "missing: RUN"),
    ):
        code, told = drawn_by(line.split(), capsys)
        assert code == 2 and words in told and "Traceback" not in told and not (pics / "x.png").exists(), told
    code, told = drawn_by(["--help"], capsys)
    assert code == 0 and "attention" in told


def test_what_has_no_maps_is_told_before_anything(pics, launch):
    for more, words in (
        ("--model swin_t --image_size 64 --model_args.window_size 4", "has no attention"),
        ("--model convnext_t --image_size 64", "ConvNeXt has no attention"),
        ("--val_fraction 0", "test or val"),
    ):
        if more.startswith("--val"):
            shutil.rmtree(pics / "pics" / "test")
        line = (
            LINE
            if more.startswith("--val")
            else LINE.split(" --model ")[0] + " --recipe none --logger csv --global_batch_size 8"
        )
        line = line.replace(" --image_size 16", "") if "--image_size" in more else line
        ended = launch(f"{line} {more} --logger_args.attention true --name refused")
        assert ended.code == 2 and "--logger_args.attention" in ended.out and words in ended.out, ended.out
        assert not (pics / "runs" / "refused").exists() and "Traceback" not in ended.out


def test_lines_do_not_wait_for_torch():
    import subprocess

    code = (
        "import sys; from experiments import visualize; visualize.main(['--help']); sys.exit('torch' in "
        "sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
