import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from hasten.callbacks import SaveTrajectory
from hasten.datamodules import EpochLoader
from hasten.errors import HastenError
from hasten.formats import Trajectory, open_trajectories
from hasten.modules import ExpertTraining
from hasten.nn import DSA, ConvNet, FlatModel

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": -1,
}


class Foreign(LightningModule):
    """Trains linear experts in its own way, and has never heard of hasten but for the protocol."""

    experts, epochs = 2, 1

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.form = FlatModel(self.net)
        self.expert = self.epoch = 0
        self.left = [0, 1]

    def recipe(self):
        return {"net": "linear"}

    def train_only(self, experts, *, epochs):
        self.left = list(experts)

    def theta(self):
        return self.form.flatten(self.net)

    def load_theta(self, theta):
        self.net.load_state_dict(self.form.filled(theta).state_dict())

    def on_train_epoch_start(self):
        self.expert = self.left[self.current_epoch]
        self.net.reset_parameters()

    def training_step(self, batch, batch_idx):
        return self.net(batch).mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1)


def attached(folder):
    return SaveTrajectory(folder / "experts"), Foreign(), DataLoader(torch.ones(2, 4))


class Noise(LightningDataModule):
    """Twelve images of three classes, in batches of four."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        images = torch.randn(12, 1, 8, 8, generator=generator)
        self.pairs = [(image, i % 3) for i, image in enumerate(images)]

    def train_dataloader(self):
        return EpochLoader(self.pairs, 4)

    def val_dataloader(self):
        return EpochLoader(self.pairs, 12, shuffle=False)


class Watch(Callback):
    """Every place an expert was at, in a copy of its own, and what validations said."""

    def __init__(self):
        self.thetas, self.accs = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.thetas.setdefault((pl_module.expert, pl_module.epoch), copy.deepcopy(pl_module.theta()))

    def on_train_epoch_end(self, trainer, pl_module):
        self.thetas[pl_module.expert, pl_module.epoch + 1] = copy.deepcopy(pl_module.theta())

    def on_validation_end(self, trainer, pl_module):
        self.accs[pl_module.expert, pl_module.epoch + 1] = trainer.callback_metrics["val/acc"].item()


class Stop(Callback):
    """An error after so many steps, as a power cut would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("broken off")


def fitted(folder, *callbacks, lr=0.1, last_epoch=None, trainer=(), **settings):
    module = ExpertTraining(
        ConvNet(1, 8, 3, width=4, depth=2), partial(SGD, lr=lr, momentum=0.9), augment=DSA(["crop"]),
        **{"experts": 3, "epochs": 4} | settings,
    )  # fmt: skip
    watch = Watch()
    Trainer(**QUIET | dict(trainer), callbacks=[SaveTrajectory(folder, last_epoch=last_epoch), watch, *callbacks]).fit(
        module, datamodule=Noise()
    )
    return module, watch


def test_every_point_of_every_expert_is_written_and_no_two_are_one(tmp_path):
    module, watch = fitted(tmp_path)
    experts = open_trajectories(tmp_path)
    assert [each.path.name for each in experts] == [f"expert_000{number}.safetensors" for number in range(3)]
    for number, expert in enumerate(experts):
        assert (expert.epochs, expert.names, expert.shapes) == (4, [*module.form.names], [*module.form.shapes])
        for epoch in range(5):
            torch.testing.assert_close(expert.at(epoch), watch.thetas[number, epoch], rtol=0, atol=0)
        for epoch in range(4):
            assert not torch.equal(expert.at(epoch), expert.at(epoch + 1))  # rows that alias the weights all end alike


def test_accuracies_are_those_that_were_logged_and_nan_where_there_were_none(tmp_path):
    _, watch = fitted(tmp_path, trainer={"check_val_every_n_epoch": 2})
    for number, expert in enumerate(open_trajectories(tmp_path)):
        assert [math.isnan(accuracy) for accuracy in expert.val_acc] == [True, True, False, True, False]
        assert expert.val_acc[4] == pytest.approx(watch.accs[number, 4])
        assert math.isnan(expert.train_acc[0]) and all(0 <= accuracy <= 1 for accuracy in expert.train_acc[1:])


def test_a_run_that_was_broken_off_goes_on_with_the_expert_it_was_at(tmp_path):
    fitted(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="broken off"):
        fitted(tmp_path / "parts", Stop(12 + 7))  # 3 batches an epoch, 4 epochs an expert
    kept = tmp_path / "parts" / "expert_0000.safetensors"
    assert [*(tmp_path / "parts").iterdir()] == [kept]
    written = kept.stat().st_mtime_ns
    _, watch = fitted(tmp_path / "parts")
    assert kept.stat().st_mtime_ns == written
    assert {expert for expert, _ in watch.thetas} == {1, 2}
    pairs = zip(open_trajectories(tmp_path / "whole"), open_trajectories(tmp_path / "parts"), strict=True)
    for whole, resumed in pairs:
        torch.testing.assert_close(resumed.between(0, 4), whole.between(0, 4), rtol=0, atol=0)


def test_more_experts_of_one_recipe_are_added_to_those_that_are_there(tmp_path):
    fitted(tmp_path, experts=1)
    _, watch = fitted(tmp_path, experts=3)
    assert {expert for expert, _ in watch.thetas} == {1, 2}
    assert len(open_trajectories(tmp_path)) == 3


def test_where_nothing_is_left_the_fit_ends_at_once_with_the_last_expert(tmp_path):
    fitted(tmp_path)
    module, watch = fitted(tmp_path)
    assert watch.thetas == {}
    torch.testing.assert_close(module.theta(), open_trajectories(tmp_path)[-1].at(-1), rtol=0, atol=0)


def test_experts_end_with_the_last_epoch_that_is_wanted(tmp_path):
    _, watch = fitted(tmp_path / "short", last_epoch=2)
    fitted(tmp_path / "long")
    assert max(epoch for _, epoch in watch.thetas) == 2
    for short, long in zip(open_trajectories(tmp_path / "short"), open_trajectories(tmp_path / "long"), strict=True):
        assert (short.epochs, short.recipe_hash) == (2, long.recipe_hash)
        torch.testing.assert_close(short.between(0, 2), long.between(0, 2), rtol=0, atol=0)
    _, watch = fitted(tmp_path / "short")  # all epochs now: the short ones are not complete
    assert {expert for expert, _ in watch.thetas} == {0, 1, 2}
    _, watch = fitted(tmp_path / "long", last_epoch=2)  # the long ones are
    assert watch.thetas == {}


def test_a_last_epoch_beyond_the_training_is_its_end(tmp_path):
    fitted(tmp_path, experts=1, last_epoch=9)
    assert open_trajectories(tmp_path)[0].epochs == 4


def test_experts_of_another_recipe_are_refused_and_stay(tmp_path):
    fitted(tmp_path, experts=1)
    with pytest.raises(
        HastenError, match=r"expert_0000.safetensors and this run differ in optimizer\.groups.*0\.1 and 0\.2"
    ) as error:
        fitted(tmp_path, lr=0.2)
    assert "\n" not in str(error.value)
    assert Trajectory(tmp_path / "expert_0000.safetensors").epochs == 4


def test_a_broken_file_is_refused_and_what_was_half_written_is_cleared_away(tmp_path):
    (tmp_path / ".expert_0001-x1y2.safetensors").write_bytes(b"half")
    fitted(tmp_path, experts=1)
    assert [path.name for path in tmp_path.iterdir()] == ["expert_0000.safetensors"]
    (tmp_path / "expert_0000.safetensors").write_bytes(b"half")
    with pytest.raises(HastenError, match=r"expert_0000.*delete it"):
        fitted(tmp_path)


def test_an_expert_that_max_steps_cuts_short_is_not_written(tmp_path):
    fitted(tmp_path, trainer={"max_steps": 14})
    assert len(open_trajectories(tmp_path)) == 1


def test_a_module_that_trains_no_experts_is_refused_in_one_line(tmp_path):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch), torch.zeros(1, 2))

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.1)

    with pytest.raises(HastenError, match="save_trajectory: expected a module that trains experts, got Plain") as error:
        Trainer(**QUIET, callbacks=[SaveTrajectory(tmp_path)]).fit(Plain(), DataLoader(torch.ones(2, 4)))
    assert "\n" not in str(error.value)


def test_a_last_epoch_below_one_is_refused(tmp_path):
    with pytest.raises(HastenError, match="last_epoch: expected >= 1 or null, got 0"):
        SaveTrajectory(tmp_path, last_epoch=0)


def test_a_foreign_module_that_keeps_the_protocol_is_served(tmp_path):
    callback, module, data = attached(tmp_path)
    Trainer(**QUIET | {"max_epochs": 2}, callbacks=[callback]).fit(module, data)
    experts = open_trajectories(tmp_path / "experts")
    assert [each.epochs for each in experts] == [1, 1]
    torch.testing.assert_close(experts[1].at(1), module.theta(), rtol=0, atol=0)
