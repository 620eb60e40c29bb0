import math

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from hasten.callbacks import SkipGuard
from hasten.errors import HastenError


class Foreign(LightningModule):
    """One weight; each batch, a number, is the slope of its loss."""

    def __init__(self, optimizer=torch.optim.SGD):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.optimizer = optimizer
        self.after = []

    def training_step(self, batch, batch_idx):
        self.after.append(self.weight.item())
        return (self.weight * batch).sum()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1)


class Manual(Foreign):
    """Leaves out the update of a batch of zero by itself; its loss is the batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.weight.grad = None if batch == 0 else batch.squeeze()
        self.optimizers().step()
        return {"loss": batch.squeeze()}


class Explains(Manual):
    def skip_report(self, losses):
        return f"of {losses}; take larger batches"


def attached(folder):
    return SkipGuard(), Foreign(), DataLoader(torch.ones(3))


def fit(module, slopes, guard, *callbacks, ckpt_path=None):
    trainer = Trainer(
        callbacks=[guard, *callbacks], accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.tensor(slopes)), ckpt_path=ckpt_path, weights_only=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_momentum(wrong):
    def momentum(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.5)

    guarded, clean = Foreign(momentum), Foreign(momentum)
    metrics = fit(guarded, [1.0, wrong, 2.0, wrong], SkipGuard())
    fit(clean, [1.0, 2.0], SkipGuard())
    assert guarded.weight.equal(clean.weight) and guarded.weight.isfinite()
    assert metrics == {"train/skipped": 2, "train/non_finite": 2}


def test_what_a_module_leaves_out_is_counted():
    assert fit(Manual(), [1.0, 0.0, 2.0, 0.0, math.nan], SkipGuard()) == {"train/skipped": 3, "train/non_finite": 1}


def test_a_fit_stops_after_so_many_updates_in_a_row_that_are_not_finite():
    module = Foreign()
    slopes = [1.0, *[math.nan] * 2, 1.0, *[math.nan] * 3, 1.0]
    line = r"^skip_guard: loss or gradients were nan or infinite 3 times in a row at step 7: lower the learning rate$"
    with pytest.raises(HastenError, match=line):
        fit(module, slopes, SkipGuard(patience=3))
    assert module.weight.item() == pytest.approx(-0.2)
    assert len(module.after) == 7


def test_a_fit_stops_after_so_many_updates_in_a_row_that_were_left_out_and_the_module_explains():
    line = r"^skip_guard: 2 updates in a row were left out at step 3: of \[0.0, 0.0\]; take larger batches$"
    with pytest.raises(HastenError, match=line):
        fit(Explains(), [1.0, 0.0, 0.0, 1.0], SkipGuard(skip_patience=2))


def test_a_fit_that_left_out_most_of_its_updates_says_so_at_its_end(capsys):
    fit(Explains(), [1.0, 0.0, 2.0, 0.0], SkipGuard())
    assert "skip_guard" not in capsys.readouterr().out
    fit(Explains(), [0.0, 0.0, 1.0, 0.0, 2.0], SkipGuard())
    line = "skip_guard: 3 of 5 updates were left out: of [0.0, 0.0, 0.0]; take larger batches\n"
    assert capsys.readouterr().out.endswith(line)
    fit(Foreign(), [math.nan], SkipGuard())
    assert capsys.readouterr().out.endswith("skip_guard: 1 of 1 updates were left out: lower the learning rate\n")


def test_the_last_good_weights_are_on_disk_when_the_fit_stops(tmp_path):
    end = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    with pytest.raises(HastenError, match="in a row"):
        fit(Foreign(), [1.0, math.nan, math.nan, 1.0], SkipGuard(patience=2), end)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"].item() == pytest.approx(-0.1)


@pytest.mark.filterwarnings("ignore:.*(using `ckpt_path`|not resumable)")
def test_counts_and_patience_go_on_where_a_fit_is_resumed_and_patience_begins_anew_after_a_stop(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(HastenError, match="3 times"):
        fit(Foreign(), [1.0, *[math.nan] * 3, 1.0], SkipGuard(patience=3), saving)
    for stopped_at, goes_on_to, count in ((3, 4, 3), (4, 7, 6)):
        guard = SkipGuard(patience=3)
        with pytest.raises(HastenError, match=f"3 times in a row at step {goes_on_to}"):
            fit(Foreign(), [math.nan] * 9, guard, ckpt_path=tmp_path / f"step={stopped_at}.ckpt")
        assert guard.state_dict() == {"skipped": count, "non_finite": count, "losses": []}


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"skip_patience": 0}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"^skip_guard: .* expected >= 1, got 0"):
        SkipGuard(**arguments)
