"""make chaos N=200: short runs killed by kill -9 at random moments and resumed; how many end with the undisturbed run's
weights, to the byte.

Ours through run.py, and beside it the same network and pictures in stock Lightning as its documentation has it
(`shuffle=True`, ModelCheckpoint(save_last=True), ckpt_path="last"). Of the N runs of each every second one has two
ranks, and every third two workers a rank.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import torch  # noqa: E402
from conftest import FORKS, _child, free_port, write_pictures  # noqa: E402
from sabotage import TINY, last, same_weights  # noqa: E402

EPOCHS, EVERY, KILLS = 8, 3, 3  # of 4 steps; optimizer steps between saves; most kills of one run


def stock(folder: str, log: str, env: dict[str, str], ranks: int, workers: int, name: str) -> None:
    """The same training as plain Lightning does it; its last weights go to runs/<name>/final.pt."""
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(env)
    os.chdir(folder)
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    import models

    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = models.create("vit_nano4", 3, 16, embed_dim=32, depth=2, drop_path=0.2)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return cross_entropy(self.model(batch[0]), batch[1], label_smoothing=0.1)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 2e-3)

    L.seed_everything(0, workers=True, verbose=False)
    steps = transforms.Compose(
        [transforms.RandomResizedCrop(16), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    loader = DataLoader(
        datasets.ImageFolder("pics/train", steps), 4 // ranks, shuffle=True, drop_last=True, num_workers=workers
    )
    save = ModelCheckpoint(f"runs/{name}", save_last=True, every_n_train_steps=EVERY)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=EPOCHS,
        callbacks=[save],
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        deterministic=True,
    )
    module, code = Plain(), 1
    try:
        trainer.fit(module, loader, ckpt_path="last")
        if trainer.is_global_zero:
            torch.save({"state_dict": module.state_dict()}, f"runs/{name}/final.pt")
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(kind: str, folder: Path, name: str, ranks: int, workers: int) -> list[Any]:
    port, children = free_port(), []
    for rank in range(ranks):
        env, log = {}, str(folder / f"{kind}-{name}-{rank}.log")
        if ranks > 1:
            env = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "chaos",
            }
        line = (
            TINY.replace("--workers 0", f"--workers {workers}")
            + f" --epochs {EPOCHS} --save_every_steps {EVERY} --devices {ranks}"
        )
        arguments = (
            (f"{line} --name {name} --val_fraction 0.1".split(), env, str(folder), log, None, None)
            if kind == "vitlab"
            else (str(folder), log, env, ranks, workers, name)
        )
        children.append(FORKS.Process(target=_child if kind == "vitlab" else stock, args=arguments))
        children[-1].start()
    return children


def wait(children: list[Any], seconds: float) -> bool:
    """Whether all have ended within this time; a rank that dies takes the others with it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.exitcode is None for child in children):
        if any(child.exitcode not in (None, 0) for child in children):
            time.sleep(0.2)
            kill(children)
        time.sleep(0.005)
    return all(child.exitcode is not None for child in children)


def kill(children: list[Any]) -> None:
    for child in children:
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
    for child in children:
        child.join()


def final(kind: str, folder: Path, name: str) -> Path:
    return last(folder / "runs" / name) if kind == "vitlab" else folder / "runs" / name / "final.pt"


def trial(
    kind: str, folder: Path, name: str, ranks: int, workers: int, longest: float, chance: random.Random
) -> tuple[str, int]:
    """Kill one run up to KILLS times, then let it end. Returns (equal | different | does not end, kills that hit)."""
    for hits in range(KILLS + 1):  # the last time without a kill; a run that has ended is not started again
        children = start(kind, folder, name, ranks, workers)
        if wait(children, chance.uniform(0, longest) if hits < KILLS else 20 * longest):
            break
        kill(children)
    if any(child.exitcode is None for child in children) or any(child.exitcode for child in children):
        kill(children)
        return "does not end", hits
    return (
        "equal"
        if same_weights(final(kind, folder, f"whole-{ranks}-{workers}"), final(kind, folder, name))
        else "different"
    ), hits


def main() -> int:
    number, chance = int(sys.argv[1]) if len(sys.argv) > 1 else 50, random.Random(os.environ.get("CHAOS_SEED", "0"))
    folder, ended, hits = Path(tempfile.mkdtemp(prefix="chaos-")), {}, Counter()
    write_pictures(folder / "pics" / "train", {"dark": 14, "grey": 13, "light": 13}, seed=1)
    wait(start("vitlab", folder, "warm-up", 1, 0), 300)  # the fork server imports once, which is not to count
    for kind in ("vitlab", "stock"):
        shutil.rmtree(folder / "runs", ignore_errors=True)
        longest, ended[kind] = {}, Counter()
        for ranks, workers in ((1, 0), (1, 2), (2, 0), (2, 2)):
            began, children = time.monotonic(), start(kind, folder, f"whole-{ranks}-{workers}", ranks, workers)
            assert wait(children, 300) and not any(child.exitcode for child in children), (
                f"{kind} fails undisturbed: logs in {folder}"
            )
            longest[ranks, workers] = time.monotonic() - began
        for turn in range(number):
            ranks, workers = 1 + turn % 2, 2 * (turn % 3 == 0)
            outcome, kills = trial(kind, folder, f"run{turn}", ranks, workers, longest[ranks, workers], chance)
            ended[kind][outcome] += 1
            hits[kind] += kills
            print(
                f"{kind} {turn + 1}/{number}: {ranks} ranks, {workers} workers, killed {kills} times: {outcome}",
                flush=True,
            )
            if outcome == "equal":
                shutil.rmtree(folder / "runs" / f"run{turn}")
    for kind in ended:
        counts = ", ".join(f"{outcome} {ended[kind][outcome]}" for outcome in ("equal", "different", "does not end"))
        print(f"{kind:<8}{number} runs, killed {hits[kind]} times: {counts}")
    if ended["vitlab"]["equal"] < number:
        print(f"the runs that differ are in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
