from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.utils.data import DataLoader

from hasten.callbacks import Throughput
from hasten.callbacks.throughput import _batch_size
from hasten.datamodules.loader import EpochLoader

CLOCK = SimpleNamespace(now=0.0, perf_counter=lambda: CLOCK.now)


class Foreign(LightningModule):
    """Takes a second a training batch, a hundred where it is slow, as in validation."""

    def __init__(self, *, slow_batches=0):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.slow_batches = slow_batches

    def training_step(self, batch, batch_idx):
        CLOCK.now += 100 if batch_idx < self.slow_batches else 1
        return self.net(batch["x"]).mean()

    def validation_step(self, batch, batch_idx):
        CLOCK.now += 100

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def foreign():
    return Foreign()


class Recorder(DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        if found := {name: value for name, value in metrics.items() if name.startswith("throughput/")}:
            self.rows.append((step, found))


@pytest.fixture(autouse=True)
def _time_is_what_the_module_says(monkeypatch):
    monkeypatch.setattr("hasten.callbacks.throughput.time", CLOCK)


def loader():
    return DataLoader([{"name": "a", "x": torch.zeros(4)}] * 80, batch_size=4)


def attached(folder):
    return Throughput(warmup_batches=0), foreign(), loader()


def fit(module, *callbacks, val=None, **kwargs):
    recorder = Recorder()
    settings = {"log_every_n_steps": 5, "max_epochs": 1, "num_sanity_val_steps": 0} | kwargs
    trainer = Trainer(
        callbacks=list(callbacks),
        logger=recorder,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, loader(), val)
    return trainer, recorder.rows


EXACT = {"throughput/steps_per_s": 1.0, "throughput/samples_per_s": 4.0}


def test_it_logs_with_the_other_metrics_once_warm():
    trainer, rows = fit(foreign(), Throughput())
    assert rows == [(14, EXACT), (19, EXACT)]
    assert trainer.callback_metrics == EXACT


def test_accumulated_batches_make_one_step():
    _, rows = fit(foreign(), Throughput(warmup_batches=0), accumulate_grad_batches=2)
    halved = {"throughput/steps_per_s": 0.5, "throughput/samples_per_s": 4.0}
    assert rows == [(4, halved), (9, halved)]


def test_slow_first_batches_do_not_count():
    _, rows = fit(Foreign(slow_batches=2), Throughput(warmup_batches=2))
    assert [metrics for _, metrics in rows] == [EXACT] * 4


def test_validation_does_not_count():
    _, rows = fit(foreign(), Throughput(warmup_batches=0), val=loader(), val_check_interval=3)
    assert [metrics for _, metrics in rows] == [EXACT] * 4


def test_the_clock_stands_while_paused():
    class Pause(Callback):
        def on_train_batch_end(self, *_):
            throughput.pause()
            CLOCK.now += 100
            throughput.resume()

    throughput = Throughput(warmup_batches=0)
    _, rows = fit(foreign(), Pause(), throughput)
    assert [metrics for _, metrics in rows] == [EXACT] * 4


def test_what_another_callback_takes_does_count():
    class Slow(Callback):
        def on_train_batch_end(self, *_):
            CLOCK.now += 1

    _, rows = fit(foreign(), Slow(), Throughput(warmup_batches=0))
    assert rows[0][1]["throughput/steps_per_s"] == 0.5


def test_a_fit_shorter_than_the_warm_up_logs_nothing():
    assert fit(foreign(), Throughput(warmup_batches=50))[1] == []


def test_logging_may_be_off():
    assert fit(foreign(), Throughput(warmup_batches=0), log_every_n_steps=0)[1] == []


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(3, 2), torch.zeros(4)), 3),
        ({"weight": torch.tensor(1.0), "x": [torch.zeros(5)]}, 5),
        (["a", "b"], 0),
    ],
)
def test_the_batch_size_is_the_first_tensors(batch, expected):
    assert _batch_size(batch) == expected


def test_a_loader_of_one_item_a_batch_counts_one_however_long_its_tensor_is():
    loader = EpochLoader(_Vectors(), 1)
    recorder = Recorder()
    trainer = Trainer(
        callbacks=[Throughput(warmup_batches=0)], logger=recorder, accelerator="cpu", max_epochs=1, log_every_n_steps=5,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(foreign(), loader)
    assert recorder.rows == [(4, {"throughput/steps_per_s": 1.0, "throughput/samples_per_s": 1.0})]


class _Vectors:
    """Items that are one long vector, of which a batch holds one."""

    def __len__(self):
        return 5

    def batch(self, indices):
        return {"x": torch.zeros(400).view(100, 4)}


def test_it_is_safe_to_undo_what_was_never_set_up():
    throughput = Throughput()
    throughput.on_exception(Trainer(logger=False, accelerator="cpu"), foreign(), RuntimeError())
    throughput.pause()
    throughput.resume()
    assert throughput._since is None


def test_a_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"^throughput: warmup_batches: expected >= 0, got -1$"):
        Throughput(warmup_batches=-1)
