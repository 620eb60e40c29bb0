import logging
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from hasten.callbacks import EMA, ExactResume
from hasten.datamodules import Digits, EpochLoader
from hasten.modules import Classification, Diffusion
from hasten.nn import unet

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|logging interval|no `val_dataloader`|recommended to use|isinstance.treespec)",
    "ignore:__array__ implementation:DeprecationWarning",
)


class Foreign(LightningModule):
    """Draws from every generator it can reach, in training and in validation."""

    def __init__(self, schedule):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.generator = torch.Generator()
        self.schedule = schedule

    def on_train_start(self):
        torch.manual_seed(self.global_step)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [part + torch.randn_like(part) for part in batch]

    def training_step(self, batch, batch_idx):
        noise = random.random() + np.random.standard_normal() + torch.randn((), generator=self.generator)
        loss = (self.net(batch[0]) + noise).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch[0]).square().mean() + torch.rand(()) + random.random())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        total = self.trainer.estimated_stepping_batches
        schedules = {
            "linear": {"scheduler": LambdaLR(optimizer, lambda step: 1 - step / (total + 1)), "interval": "step"},
            "endless": {"scheduler": LambdaLR(optimizer, lambda step: 1 / (1 + step)), "interval": "step"},
            "metric": {
                "scheduler": ReduceLROnPlateau(optimizer, patience=0, threshold=9.0),
                "monitor": "val/loss",
                "frequency": 2,
            },
        }
        return {"optimizer": optimizer, "lr_scheduler": schedules[self.schedule]}


def foreign(schedule="linear"):
    torch.manual_seed(0)
    return Foreign(schedule)


class Numbers(LightningDataModule):
    """Three batches of two, by loaders of ours or of torch."""

    def __init__(self, *, plain=False, workers=0):
        super().__init__()
        self.plain, self.workers = plain, workers
        self.numbers = TensorDataset(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))

    def train_dataloader(self):
        if self.plain:
            return DataLoader(self.numbers, 2, shuffle=True, num_workers=self.workers)
        steps = lambda: self.trainer.num_training_batches  # noqa: E731
        return EpochLoader(self.numbers, 2, num_workers=self.workers, steps_per_epoch=steps)

    def val_dataloader(self):
        return DataLoader(self.numbers, 3) if self.plain else EpochLoader(self.numbers, 3, shuffle=False)


def attached(folder):
    return ExactResume(), foreign(), Numbers(plain=True)


class Rows(Logger):
    """What is logged, with its step, in the list of what happens."""

    name, version = "rows", 0

    def __init__(self, events):
        super().__init__()
        self.events = events

    def log_hyperparams(self, *_):
        pass

    def log_metrics(self, metrics, step=None):
        self.events.append(("log", step, metrics))


class Tape(Callback):
    """Notes everything that happens in a fit, and at its end all that a checkpoint would hold.

    With a folder: writes a checkpoint in each hook that may follow an optimizer step, and notes where it stood.
    """

    def __init__(self, folder=None):
        self.events, self.saved, self.folder, self.end = [], {}, folder, {}

    def note(self, trainer, hook, *what):
        if trainer.sanity_checking:
            return
        self.events.append((hook, trainer.current_epoch, trainer.global_step, *what))

    def save(self, trainer, hook):
        if self.folder is not None and not trainer.sanity_checking and not trainer.fit_loop._should_accumulate():
            path = self.folder / f"{hook}-{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            self.saved[path] = len(self.events) + (hook == "on_train_batch_end")  # the step is logged after it

    def on_train_epoch_start(self, trainer, pl_module):
        self.note(trainer, "epoch starts")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.note(trainer, "batch", batch_idx, batch[0].tolist(), float(outputs["loss"]), rates)
        self.save(trainer, "on_train_batch_end")

    def on_validation_start(self, trainer, pl_module):
        self.note(trainer, "validation starts")

    def on_validation_end(self, trainer, pl_module):
        self.note(trainer, "validated", {name: float(value) for name, value in trainer.callback_metrics.items()})
        self.save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.note(trainer, "epoch ends")
        self.save(trainer, "on_train_epoch_end")

    def on_train_end(self, trainer, pl_module):
        whole = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self.end = {name: value for name, value in whole.items() if name != "callbacks"}


def fit(module, data, *callbacks, folder=None, ckpt_path=None, seed=7, **settings):
    lightning.seed_everything(seed, verbose=False)
    tape = Tape(folder)
    trainer = Trainer(
        accelerator="cpu",
        logger=Rows(tape.events),
        log_every_n_steps=1,
        callbacks=[*callbacks, tape],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"num_sanity_val_steps": 0} | settings),
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return tape


def same(one, other):
    """Bit for bit, in whatever nests."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_every_checkpoint(tmp_path, make, *, only=lambda path: True, **settings):
    """Whether a run resumed from any checkpoint of an uninterrupted one goes on as that did.

    Args:
        tmp_path: for the checkpoints.
        make: returns a new module, its data, and callbacks.
        only: which checkpoints.
        settings: of the trainer.
    """
    whole = fit(*make(), folder=tmp_path, **settings)
    saved = [path for path in whole.saved if only(path)]
    assert any(step_of(path) < whole.end["global_step"] for path in saved)
    for path in saved:
        resumed = fit(*make(), ckpt_path=path, seed=99, **settings)
        if not resumed.end:  # Lightning begins no fit whose steps, or epochs, are done
            assert step_of(path) == whole.end["global_step"]
            continue
        assert resumed.events == whole.events[whole.saved[path] :], path.stem
        assert same(resumed.end, whole.end), path.stem


def step_of(path):
    return int(path.stem.split("-")[1])


def ends_an_epoch(path):
    return step_of(path) % 3 == 0


DURATIONS = [{"max_epochs": 2}, {"max_steps": 6}]
VALIDATIONS = [
    {"limit_val_batches": 0},
    {},
    {"val_check_interval": 2},
    {"val_check_interval": 2, "check_val_every_n_epoch": None},
]


@pytest.mark.parametrize("duration", DURATIONS, ids=str)
@pytest.mark.parametrize("validation", VALIDATIONS, ids=str)
def test_a_run_resumes_from_any_step_as_if_it_had_never_stopped(tmp_path, duration, validation):
    check_every_checkpoint(tmp_path, lambda: (foreign(), Numbers(), ExactResume()), **duration, **validation)


@pytest.mark.parametrize("duration", DURATIONS, ids=str)
@pytest.mark.parametrize("validation", VALIDATIONS[:3], ids=str)
def test_a_strangers_shuffled_loaders_resume_at_the_end_of_an_epoch(tmp_path, duration, validation):
    make = lambda: (foreign(), Numbers(plain=True), ExactResume())  # noqa: E731
    check_every_checkpoint(tmp_path, make, only=ends_an_epoch, **duration, **validation)


@pytest.mark.parametrize("plain", [False, True])
def test_workers_change_nothing(tmp_path, plain):
    make = lambda: (foreign(), Numbers(plain=plain, workers=2), ExactResume())  # noqa: E731
    stems = ["on_train_batch_end-3"] if plain else ["on_train_batch_end-2", "on_validation_end-3"]
    check_every_checkpoint(tmp_path, make, only=lambda path: path.stem in stems, max_epochs=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 2, "limit_train_batches": 2},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        {"max_steps": 4, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "num_sanity_val_steps": 2},
    ],
    ids=str,
)
def test_limits_accumulation_and_sanity_checks_change_nothing(tmp_path, settings):
    check_every_checkpoint(tmp_path, lambda: (foreign(), Numbers(), ExactResume()), **settings)


@pytest.mark.parametrize("duration", [{"max_epochs": 4}, {"max_steps": 4}], ids=str)
def test_a_schedule_that_watches_a_metric_goes_on(tmp_path, duration):
    make = lambda: (foreign("metric"), Numbers(), ExactResume())  # noqa: E731
    check_every_checkpoint(tmp_path, make, limit_train_batches=1, **duration)


# ------------------------------------------------------------------ the modules of this library


def classification(workers=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 10))
    module = Classification(model, partial(torch.optim.AdamW, lr=1e-2), num_classes=10, mixup=0.4, cutmix=1.0)
    data = Digits(batch_size=8, val=8, flip=True, crop=2, num_workers=workers)
    return module, data, ExactResume(), EMA(0.9)


def diffusion(workers=0):
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    model = unet(1, 8, num_classes=10, widths=(8, 8))
    module = Diffusion(model, DDPMScheduler(), num_classes=10, val_timesteps=4, sample_steps=2)
    return module, Digits(batch_size=8, val=8, num_workers=workers), ExactResume(), EMA(0.9)


def mid_and_end_of_epoch(path):
    return path.stem in ("on_train_batch_end-2", "on_train_batch_end-3", "on_validation_end-3")


@pytest.mark.parametrize("make", [classification, diffusion])
def test_classification_and_diffusion_with_their_averages_resume_exactly(tmp_path, make):
    settings = {"max_steps": 5, "limit_train_batches": 3}
    check_every_checkpoint(tmp_path, make, only=mid_and_end_of_epoch, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("make", [classification, diffusion])
@pytest.mark.parametrize(("workers", "accumulated"), [(0, 1), (0, 2), (2, 1)])
@pytest.mark.parametrize("settings", [{"max_epochs": 2}, {"max_steps": 5, "val_check_interval": 2}], ids=str)
def test_they_resume_exactly_from_any_step(tmp_path, make, workers, accumulated, settings):
    settings = {"limit_train_batches": 3, "accumulate_grad_batches": accumulated} | settings
    check_every_checkpoint(tmp_path, partial(make, workers), **settings)


# ------------------------------------------------------------------ further runs


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_that_never_stops_is_what_it_would_be_without(tmp_path, plain):
    one = fit(foreign(), Numbers(plain=plain), ExactResume(), folder=tmp_path, max_epochs=2)
    other = fit(foreign(), Numbers(plain=plain), max_epochs=2)
    assert one.events == other.events
    epochs = [[event[4] for event in one.events if event[:2] == ("batch", epoch)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_longer_run_goes_on_as_one_that_was_long_at_once(tmp_path, steps):
    whole = fit(foreign("endless"), Numbers(), ExactResume(), max_steps=6)

    class Last(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    fit(foreign("endless"), Numbers(), ExactResume(), Last(), max_steps=steps)
    resumed = fit(foreign("endless"), Numbers(), ExactResume(), ckpt_path=tmp_path / "last.ckpt", seed=99, max_steps=6)
    assert resumed.events == whole.events[-len(resumed.events) :]
    assert sum(event[0] == "batch" for event in resumed.events) == 6 - steps
    assert same(resumed.end, whole.end)


def test_a_run_may_stop_again_and_again(tmp_path):
    make = lambda: (foreign(), Numbers(), ExactResume())  # noqa: E731
    whole = resumed = fit(*make(), folder=tmp_path, max_epochs=2)
    for step in range(1, 6):
        path = tmp_path / f"on_train_batch_end-{step}.ckpt"
        resumed = fit(*make(), folder=tmp_path, ckpt_path=path, seed=step, max_epochs=2)
    assert resumed.events and resumed.events == whole.events[-len(resumed.events) :]
    assert same(resumed.end, whole.end)


@pytest.mark.parametrize("step", [1, 2, 3])  # of which the second is validated: Lightning breaks that off
def test_a_run_ended_by_sigterm_goes_on(tmp_path, step):
    class Terminated(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer._signal_connector.received_sigterm = trainer.global_step == step

        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    settings = {"max_epochs": 2, "val_check_interval": 2}
    whole = fit(foreign(), Numbers(), ExactResume(), **settings)
    with pytest.raises(SIGTERMException):
        fit(foreign(), Numbers(), ExactResume(), Terminated(), **settings)
    resumed = fit(foreign(), Numbers(), ExactResume(), ckpt_path=tmp_path / "last.ckpt", seed=99, **settings)
    assert resumed.events == whole.events[-len(resumed.events) :]
    assert sum(event[0] == "batch" for event in resumed.events) == 6 - step
    assert sum(event[0] == "validated" for event in resumed.events) == (2 if step < 3 else 1)
    assert same(resumed.end, whole.end)


def test_a_plain_loader_within_an_epoch_gets_one_warning(tmp_path):
    fit(*attached(tmp_path)[1:], ExactResume(), folder=tmp_path, max_epochs=2)
    for step, warnings in ((2, 1), (3, 0)):
        path = tmp_path / f"on_train_batch_end-{step}.ckpt"
        with pytest.warns() as caught:
            fit(*attached(tmp_path)[1:], ExactResume(), ckpt_path=path, max_epochs=2)
        assert sum("your dataloader is not resumable" in str(warning.message) for warning in caught) == warnings


def test_gradients_lost_within_an_accumulated_step_get_one_warning(tmp_path):
    class Early(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "early.ckpt")
            trainer.should_stop = True

    settings = {"max_epochs": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    fit(foreign(), Numbers(), ExactResume(), Early(), **settings)
    with pytest.warns(UserWarning, match="within an accumulated step, whose gradients are lost"):
        fit(foreign(), Numbers(), ExactResume(), ckpt_path=tmp_path / "early.ckpt", **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["states"].append({}), "of 2 processes on cpu, this run has 1 on cpu: it draws afresh"),
        (lambda found: found.update(device="cuda"), "of 1 processes on cuda, this run has 1 on cpu: it draws afresh"),
    ],
)
def test_other_processes_and_devices_draw_afresh_with_one_warning(tmp_path, change, message):
    fit(foreign(), Numbers(), ExactResume(), folder=tmp_path, max_epochs=2)
    path = tmp_path / "on_train_batch_end-4.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["exact_resume"])
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match=message) as caught:
        resumed = fit(foreign(), Numbers(), ExactResume(), ckpt_path=path, max_epochs=2)
    assert sum("exact_resume" in str(warning.message) for warning in caught) == 1
    assert [event[3] for event in resumed.events if event[0] == "batch"] == [1, 2]


def test_a_checkpoint_without_it_resumes_as_ever_with_one_warning(tmp_path):
    fit(foreign(), Numbers(), folder=tmp_path, max_epochs=2)
    path = tmp_path / "on_validation_end-3.ckpt"
    expected = fit(foreign(), Numbers(), ckpt_path=path, max_epochs=2)
    with pytest.warns(UserWarning, match="exact_resume: the checkpoint was written without ExactResume") as caught:
        resumed = fit(foreign(), Numbers(), ExactResume(), ckpt_path=path, max_epochs=2)
    assert sum("exact_resume" in str(warning.message) for warning in caught) == 1
    assert resumed.events == expected.events


def test_a_second_fit_takes_up_nothing(tmp_path):
    used = ExactResume()
    fit(foreign(), Numbers(), used, folder=tmp_path, max_epochs=1)
    fit(foreign(), Numbers(), used, ckpt_path=tmp_path / "on_train_batch_end-2.ckpt", max_epochs=1)
    again, fresh = (fit(foreign(), Numbers(), resume, max_epochs=1) for resume in (used, ExactResume()))
    assert again.events == fresh.events


def test_a_validation_of_a_checkpoint_draws_as_ever(tmp_path):
    fit(foreign(), Numbers(), ExactResume(), folder=tmp_path, max_epochs=1)

    def validate(*callbacks):
        lightning.seed_everything(3, verbose=False)
        trainer = Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), enable_progress_bar=False)
        path = tmp_path / "on_train_batch_end-2.ckpt"
        return trainer.validate(foreign(), Numbers(), ckpt_path=path, weights_only=True, verbose=False)

    assert validate(ExactResume()) == validate()


def test_an_exception_before_the_first_batch_leaves_the_strategy_as_it_was(tmp_path):
    class Breaks(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("too early")

    fit(foreign(), Numbers(), ExactResume(), folder=tmp_path, max_epochs=1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[ExactResume(), Breaks()])
    before = set(vars(trainer.strategy))
    with pytest.raises(RuntimeError, match="too early"):
        trainer.fit(foreign(), Numbers(), ckpt_path=tmp_path / "on_train_batch_end-2.ckpt", weights_only=True)
    assert set(vars(trainer.strategy)) <= before


def two_processes(folder):
    """On each rank: a whole run with checkpoints, and the rest of it from one; writes how both ended."""

    settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "limit_train_batches": 3}
    whole = fit(*diffusion(), folder=folder, max_epochs=2, **settings)
    resumed = fit(*diffusion(), ckpt_path=folder / "on_train_batch_end-4.ckpt", seed=99, max_epochs=2, **settings)
    rank = torch.distributed.get_rank()
    equal = resumed.events == whole.events[whole.saved[folder / "on_train_batch_end-4.ckpt"] :]
    torch.save({"equal": equal and same(resumed.end, whole.end)}, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_resume_each_with_its_own_draws(tmp_path):
    words = [sys.executable, __file__, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    states = torch.load(tmp_path / "on_train_batch_end-4.ckpt", weights_only=True)["exact_resume"]["states"]
    assert not same(*states)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True)["equal"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    two_processes(Path(sys.argv[1]))
