import io
import pickle
import re

import pytest
import torch
from lightning import LightningModule, Trainer
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hasten.callbacks import Progress
from hasten.callbacks.progress import _clock, _line


class Foreign(LightningModule):
    """Loss 0.25 by construction."""

    def __init__(self, *, prog_bar=False):
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.prog_bar = prog_bar

    def training_step(self, batch, batch_idx):
        loss = 0 * self.net(batch).sum() + 0.25
        self.log("train/loss", loss)
        self.log("train/shown", 0.5, prog_bar=self.prog_bar)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/mse", 0.12345)
        self.log("val/acc", 0.9123)

    def test_step(self, batch, batch_idx):
        self.log("test/acc", 0.5)

    def predict_step(self, batch, batch_idx):
        return self.net(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def foreign():
    return Foreign()


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(1)


def loader():
    return DataLoader(torch.zeros(10, 1))


def attached(folder):
    return Progress(), foreign(), loader()


def trainer(terminal, **kwargs):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None, _environ={})
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_model_summary": False} | kwargs
    return Trainer(callbacks=[Progress(console=console)], accelerator="cpu", **settings), out


def fit(module, *, terminal, val=None, train=None, **kwargs):
    fitting, out = trainer(terminal, **kwargs)
    fitting.fit(module, loader() if train is None else train, val)
    return out.getvalue()


def frames(text):
    """What a terminal showed: without control sequences, a list of lines."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


def test_one_bar_counts_the_steps_of_the_whole_fit():
    bars = [line for line in frames(fit(foreign(), terminal=True)) if "/20" in line]
    assert re.fullmatch(r"train +━+ 100% 20/20 0:00:\d\d 0:00:00 left loss 0\.25 *", bars[-1])
    assert not any("/10 " in line for line in bars)


def test_what_the_module_logs_for_the_bar_stands_beside_it():
    bars = [line for line in frames(fit(Foreign(prog_bar=True), terminal=True)) if "20/20" in line]
    assert bars[-1].rstrip().endswith("left train/shown 0.5")


def test_every_validation_but_the_sanity_check_leaves_a_line_of_its_own_metrics():
    lines = [line.rstrip() for line in frames(fit(foreign(), terminal=True, val=loader()))]
    wanted = ["step 10   val/mse 0.1235   val/acc 91.2 %", "step 20   val/mse 0.1235   val/acc 91.2 %"]
    assert [line for line in lines if line.startswith("step")] == wanted


def test_the_line_of_a_validation_leaves_out_the_points_of_a_curve():
    class Curve(Foreign):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("val/loss@angle=90", 0.5)

    text = fit(Curve(), terminal=False, val=loader())
    assert "@" not in text and "val/mse 0.1235" in text


def test_without_a_terminal_there_are_lines_and_no_bar():
    text = fit(foreign(), terminal=False, val=loader())
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 10 + 2
    assert re.fullmatch(r"step  2/20   10 %   0:\d\d elapsed, 0:\d\d left   loss 0\.25", lines[0])
    assert re.fullmatch(r"step 20/20   100 %   0:\d\d elapsed, 0:00 left   loss 0\.25", lines[-2])
    assert lines[-1] == "step 20   val/mse 0.1235   val/acc 91.2 %"


def test_a_long_run_without_a_terminal_takes_ten_lines():
    text = fit(foreign(), terminal=False, max_epochs=-1, max_steps=95)
    assert len(text.splitlines()) == 10


def test_the_loss_of_an_accumulated_step_is_shown_whole():
    assert "loss 0.25" in fit(foreign(), terminal=False, accumulate_grad_batches=5)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_without_an_end_in_sight_has_no_total(terminal):
    text = fit(
        foreign(),
        terminal=terminal,
        train=DataLoader(Endless(), batch_size=1),
        max_epochs=-1,
        max_time={"milliseconds": 300},
        log_every_n_steps=1,
    )
    assert "%" not in text
    assert "nan" not in text
    assert ("/?" in text) is terminal


def test_a_resumed_run_begins_where_it_stopped(tmp_path):
    first, _ = trainer(terminal=False, max_epochs=1)
    first.fit(foreign(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    second, out = trainer(terminal=False)
    second.fit(foreign(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert out.getvalue().startswith("step 12/20   60 %")


@pytest.mark.parametrize(("max_steps", "total"), [(-1, 40), (30, 30)])
def test_the_steps_of_several_optimizers_all_count(max_steps, total):
    class Two(Foreign):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    text = fit(Two(), terminal=True, max_steps=max_steps)
    assert f"100% {total}/{total} " in [line for line in frames(text) if line.startswith("train")][-1]


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_other_loops_have_a_bar_that_goes_away(loop, terminal):
    evaluating, out = trainer(terminal)
    extra = {} if loop == "predict" else {"verbose": False}
    getattr(evaluating, loop)(foreign(), loader(), **extra)
    text = out.getvalue()
    assert bool(text) is terminal
    if terminal:
        assert any(line.startswith(loop) and "10/10" in line for line in frames(text))
        assert text.endswith("\x1b[2K")  # the line is erased


def test_long_validations_show_how_far_they_are():
    class Watching(Foreign):
        def on_validation_batch_end(self, *_):
            seen.append(self.trainer.progress_bar_callback._bar.tasks[0].description)

        def on_train_batch_end(self, *_):
            seen.append(self.trainer.progress_bar_callback._bar.tasks[0].description)

    seen = []
    fit(Watching(), terminal=True, val=DataLoader(torch.zeros(4, 1)), limit_train_batches=1, num_sanity_val_steps=0)
    assert seen == 2 * ["train", "val  25%", "val  50%", "val  75%", "val 100%"]


def test_other_processes_print_nothing():
    fitting, out = trainer(terminal=True)
    fitting.callbacks[0].disable()
    fitting.fit(foreign(), loader(), loader())
    assert out.getvalue() == ""


def test_an_exception_ends_the_bar():
    module = foreign()

    def broken(batch, batch_idx):
        raise RuntimeError("broken")

    module.training_step = broken
    fitting, out = trainer(terminal=True)
    with pytest.raises(RuntimeError, match="broken"):
        fitting.fit(module, loader())
    assert fitting.callbacks[0]._bar is None
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_it_is_safe_to_undo_what_was_never_set_up_and_to_send_to_another_process():
    progress = Progress(console=Console())
    progress.teardown(Trainer(logger=False, accelerator="cpu"), foreign(), "fit")
    assert pickle.loads(pickle.dumps(progress)).is_enabled


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("val/acc", 1.0, "val/acc 100.0 %"),
        ("val/accuracy", torch.tensor(0.5), "val/accuracy 50.0 %"),
        ("val/acc", 91.2, "val/acc 91.2"),
        ("val/loss", 0.000012345, "val/loss 1.234e-05"),
        ("val/fd_net", 123456.0, "val/fd_net 1.235e+05"),
        ("val/mse", float("nan"), "val/mse nan"),
    ],
)
def test_numbers_are_short(name, value, line):
    assert _line({name: value}) == line


@pytest.mark.parametrize(("seconds", "clock"), [(0.4, "0:00"), (61, "1:01"), (3599.7, "1:00:00")])
def test_clocks_show_hours_only_where_there_are_any(seconds, clock):
    assert _clock(seconds) == clock
