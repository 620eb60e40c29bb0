"""Progress: one bar for the whole fit, and one line for each validation."""

import time
from collections.abc import Mapping
from typing import Any

import rich
import rich.progress as bars
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.table import Column
from torch import Tensor

_READINGS_PER_S = 4  # how often metrics are read: a reading waits for the GPU


class Progress(ProgressBar):
    """Show the whole fit as one bar, counted in optimizer steps, with the time left; print a line a validation.

    Beside the bar stands what the module logs with ``prog_bar=True``, or else the training loss. Where the output is
    no terminal, as in a CI log, there is no bar but a line every tenth of the run.

    Args:
        console: where to write; None: rich's own, which is standard output.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Progress()], accelerator="cpu", logger=False)
    """

    def __init__(self, *, console: Console | None = None) -> None:
        super().__init__()
        self.is_enabled = True
        self._given_console = console
        self._bar: bars.Progress | None = None
        self._task = bars.TaskID(0)
        self._total: int | None = None
        self._began_s, self._began_at, self._tenths = 0.0, 0, 0
        self._read_s = float("-inf")

    def enable(self) -> None:
        """Show again."""
        self.is_enabled = True

    def disable(self) -> None:
        """Show nothing, as on every process but the first."""
        self.is_enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = _total_steps(trainer)
        self._began_s, self._began_at = time.monotonic(), trainer.global_step
        self._tenths = self._tenth(trainer.global_step)
        self._read_s = float("-inf")
        self._open("train", self._total, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._bar is None:
            self._print_tenth(trainer, outputs)
            return
        self._bar.update(self._task, completed=step)
        now = time.monotonic()
        if now - self._read_s > 1 / _READINGS_PER_S or step == self._total:
            self._read_s = now
            self._bar.update(self._task, metrics=_line(_training_metrics(trainer, outputs)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._open("validate", _batches(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._bar is None or trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            self._bar.advance(self._task)
        elif total := _batches(trainer.num_val_batches):
            seen = trainer.fit_loop.epoch_loop.val_loop.batch_progress.current.ready
            self._bar.update(self._task, description=f"val {100 * seen // total:3d}%")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self.is_enabled:
            return
        if trainer.state.fn != "fit":
            self._close()
            return
        if self._bar is not None:
            self._bar.update(self._task, description="train")
        metrics = trainer._logger_connector.metrics["callback"]  # this validation's, without the training's
        # one line holds no curves: val/loss@angle=90 and its like are for loggers
        if metrics := {name: value for name, value in metrics.items() if "@" not in name}:
            width = len(str(self._total or 0))
            self._print(f"step {trainer.global_step:{width}d}   {_line(metrics)}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self._total:
            self._close()  # before Lightning says, past any bar, that the fit has stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("test", _batches(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("predict", _batches(trainer.num_predict_batches))

    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _open(self, description: str, total: int | None, completed: int = 0) -> None:
        self._close()
        if not self.is_enabled or not self._console.is_interactive:
            return
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", table_column=Column(min_width=8)),
            bars.BarColumn(bar_width=20),
            bars.TaskProgressColumn(text_format_no_percentage=""),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("left"),
            bars.TextColumn("{task.fields[metrics]}", markup=False),
            console=self._console,
            transient=description != "train",  # the bar of a fit stays as its record
        )
        self._task = self._bar.add_task(description, total=total, completed=completed, metrics="")
        self._bar.start()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def _console(self) -> Console:
        return self._given_console or rich.get_console()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _tenth(self, step: int) -> int:
        return 10 * step // self._total if self._total else 0

    def _print_tenth(self, trainer: Trainer, outputs: Any) -> None:
        """Where there is no bar: a line each time another tenth of the run is done."""
        step = trainer.global_step
        if not self.is_enabled or self._total is None or self._tenth(step) == self._tenths:
            return
        self._tenths = self._tenth(step)
        elapsed_s = time.monotonic() - self._began_s
        left_s = elapsed_s / (step - self._began_at) * (self._total - step)
        self._print(
            f"step {step:{len(str(self._total))}d}/{self._total}   {100 * step // self._total} %   "
            f"{_clock(elapsed_s)} elapsed, {_clock(left_s)} left   {_line(_training_metrics(trainer, outputs))}"
        )

    def __getstate__(self) -> dict[str, Any]:
        # a bar and a console hold locks, which the processes of ddp_spawn cannot receive
        return self.__dict__ | {"_bar": None, "_given_console": None}


def _total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole fit; None where only the clock or the data ends it."""
    total = trainer.estimated_stepping_batches
    if not trainer.lightning_module.automatic_optimization:
        total *= len(trainer.optimizers)  # the step of each counts, where Lightning estimates batches
    if trainer.max_steps != -1:
        total = min(total, trainer.max_steps)
    return int(total) if 0 < total < float("inf") else None


def _batches(counts: int | float | list[int | float]) -> int | None:
    total = sum(counts) if isinstance(counts, list) else counts
    return int(total) if total < float("inf") else None


def _training_metrics(trainer: Trainer, outputs: Any) -> Mapping[str, Any]:
    """What the module wants on its bar, or the loss of this batch."""
    if shown := trainer.progress_bar_metrics:
        return shown
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return {}
    # Lightning hands callbacks the loss divided by this
    return {"loss": loss.item() * trainer.accumulate_grad_batches}


def _line(metrics: Mapping[str, Any]) -> str:
    """Names and values side by side, e.g. ``val/mse 0.1234   val/acc 91.2 %``."""
    return "   ".join(f"{name} {_short(name, float(value))}" for name, value in metrics.items())


def _short(name: str, value: float) -> str:
    fraction = name.rpartition("/")[2] in ("acc", "accuracy") and 0 <= value <= 1
    return f"{100 * value:.1f} %" if fraction else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
