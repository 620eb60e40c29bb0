"""Two thousand steps hold no more memory and no more files than six hundred, in each kind of training."""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch import Callback

from hasten.check import build
from hasten.run import compose, run

EARLY, LATE = 600, 2000
"""Steps; after the first of them nothing new begins: each tool has worked a few times, and each cache is as large as it
gets. Between steps 200 and 600 a hypernetwork's run still grows once, by 2 to 4 MiB, and by 0.1 MiB after that."""

TIDIED = 200
"""Steps from one giving back to the next."""

NOISE_MIB = 2.0
"""What an allocator keeps in pieces differs from one moment to the next; over 1,400 steps, 1.5 kB a step."""

COMMON = """
    trainer.limit_val_batches=1 trainer.check_val_every_n_epoch=null trainer.val_check_interval=150
    data.batch_size=2 callbacks.progress=null
"""
RUNS = {
    "classification": """experiment=tome_digits callbacks=[default,token_merging,distillation] first=[]
        model.checkpoint=null model.depth=1 model.embed_dim=16 callbacks.token_merging.folder=null
        trainer.max_epochs=-1""",
    "diffusion": """experiment=speed_digits model.model.widths=[8] callbacks.image_grid=null
        callbacks.class_consistency=null""",
    "hypernetwork": """experiment=mip_digits module.grid=2 callbacks.image_grid=null
        callbacks.magnitude_probe.every_n_steps=150""",
    "matching": """experiment=mtt_digits first=[] datamodule.path=experts datamodule.max_start=2
        datamodule.initial_max_start=1 module.syn_steps=1 callbacks.evaluate_distilled=null
        callbacks.image_grid=null callbacks.export_distilled=null callbacks.best=null""",
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


class Footprint(Callback):
    """What the process holds after so many steps: memory of its own, once the free is given back, and open files."""

    def __init__(self, *steps: int):
        self.steps = steps
        self.memory_MiB: list[float] = []
        self.files: list[int] = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % TIDIED == 0:
            # also between two looks: what piles up until Python collects it leaves holes that are never given back
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        if trainer.global_step in self.steps:
            # without what is mapped from files: of a library more and more pages are read
            held = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
            self.memory_MiB.append(int(held[1]) / 1024)
            self.files.append(len(os.listdir("/proc/self/fd")))

    def grown(self) -> tuple[float, int]:
        """MiB and files since the first look."""
        return self.memory_MiB[-1] - self.memory_MiB[0], self.files[-1] - self.files[0]


def _grown(words: str, steps: int, beside: Callback | None = None) -> tuple[float, int]:
    """What a fit comes to hold between its early steps and its last, with the loggers and checkpoints of a run."""
    cfg = compose([*words.split(), *COMMON.split(), f"trainer.max_steps={steps}", "run_dir=long"])
    seed_everything(cfg.seed, verbose=False)
    data, module = build(cfg, "data" if cfg.datamodule is None else "datamodule"), build(cfg, "module")
    callbacks = [build(cfg, f"callbacks.{name}") for name in cfg.callbacks if cfg.callbacks[name] is not None]
    footprint = Footprint(EARLY, steps)
    callbacks += [footprint] if beside is None else [beside, footprint]
    build(cfg, "trainer", callbacks=callbacks, logger=[build(cfg, "logger.csv")]).fit(module, data)
    return footprint.grown()


@pytest.mark.filterwarnings("ignore:.*(logging interval|no `validation_step`)")
@pytest.mark.parametrize("kind", RUNS)
def test_a_long_run_stays_flat(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "matching":
        run(compose(["experiment=experts_digits", *compose(["experiment=experts_digits"]).tiny, "run_dir=."]))
    memory_MiB, files = _of_a_fresh_process(kind, LATE)
    assert memory_MiB < NOISE_MIB, f"{memory_MiB:.1f} MiB more after {LATE} steps than after {EARLY}"
    assert files == 0


class Leaks(Callback):
    """Keeps a tensor at every step, and a file now and then."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, *_):
        self.kept.append(torch.ones(1500))
        if trainer.global_step % 100 == 0:
            self.kept.append(open(os.devnull))  # noqa: SIM115 - it is not to be closed


def test_a_leak_of_six_kilobytes_a_step_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory_MiB, files = _of_a_fresh_process("classification", 1200, "leaking")
    assert memory_MiB > NOISE_MIB
    assert files == 6


def _of_a_fresh_process(kind: str, steps: int, *words: str) -> tuple[float, int]:
    """What has grown in a process that has run nothing else: what others have left comes and goes by megabytes."""
    called = [sys.executable, "-W", "ignore", __file__, kind, str(steps), *words]
    done = subprocess.run(called, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked, last, *others = sys.argv[1:]
    print(json.dumps(_grown(RUNS[asked], int(last), Leaks() if others else None)))
