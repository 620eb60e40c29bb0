"""Checkpoints that are whole or not there, and fits that end where they can go on when they are asked to end.

``Interruptible`` is no part of ``hasten.callbacks``: it knows the run's folder and its ``MetricsFile``, and puts both
right where a fit goes on.
"""

import os
import signal
import threading
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from hasten.errors import HastenError
from hasten.formats import whole_file
from hasten.interruption import stop_at_once
from hasten.loggers import MetricsFile


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints as Lightning writes them, but each takes the place of the one before only when it is on the disk.

    A process that is killed, or a disk that is full, leaves the previous one. Lightning's own goes through memory and
    the system's temporary folder. For ``Trainer(plugins=...)``; sharded checkpoints are folders, which the strategy
    writes in place, without this.

    Raises:
        HastenError: where a checkpoint cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "last.ckpt")
        >>> WholeCheckpoints().save_checkpoint({"step": 3}, path)
        >>> WholeCheckpoints().load_checkpoint(path, weights_only=True)
        {'step': 3}
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options, got {storage_options!r}")
        try:
            with whole_file(path) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            said = _said_by_the_disk(error)
            if said is None:
                raise
            raise HastenError(
                f"checkpoint: cannot write {str(path)!r}: {said}; the one before, if any, is whole: make room and "
                "continue from there"
            ) from error


def read_checkpoint(path: str | os.PathLike[str], *, owner: str) -> dict[str, Any]:
    """What Lightning wrote, on the CPU; nothing of the file runs.

    Raises:
        HastenError: where that is no such file, or half of one; it begins with ``owner``.

    Example:
        >>> read_checkpoint("nowhere.ckpt", owner="export")
        Traceback (most recent call last):
        hasten.errors.HastenError: export: 'nowhere.ckpt' is no whole Lightning checkpoint; choose another
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        dict(checkpoint["state_dict"])
    except Exception as error:  # torch names a broken file by half a dozen exceptions
        raise HastenError(f"{owner}: {str(path)!r} is no whole Lightning checkpoint; choose another") from error
    return checkpoint


class Interruptible(Callback):
    """End a fit at its next batch where SIGTERM or Ctrl-C asks for it, saved as ``<dirpath>/last.ckpt``.

    A batch that has begun is finished, be it of training or of validation, and so is a checkpoint; then Lightning's
    SIGTERMException leaves the fit. With ``ExactResume`` a fit that goes on from there equals one that never stopped.
    Several processes end at the same batch, whichever was asked. A second Ctrl-C does not wait, and once the last
    batch is over nothing waits: then the checkpoint before is what a fit goes on from.

    A fit that goes on from a checkpoint in ``dirpath`` continues metrics.csv behind the rows that were there when that
    was written, keeps the memory of the best checkpoint also where the folder was moved, and is ended as it would have
    been where no batch is left to train: Lightning would leave out what happens at the end.

    Stands before the other callbacks: then it does not wait for what they do at the end of the fit.

    Args:
        dirpath: the folder of the checkpoints.

    Attributes:
        asked: the signal that the fit ends for, or None.

    Example:
        >>> trainer = Trainer(callbacks=[Interruptible("checkpoints")], accelerator="cpu", logger=False)
    """

    def __init__(self, dirpath: str | Path) -> None:
        self.dirpath = Path(dirpath)
        self.asked: int | None = None
        self._trainer: Trainer | None = None
        self._waits = False
        self._pid = 0
        self._limits: tuple[int | None, int] | None = None
        self._saved_groups: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.asked = None  # the callback may have served another fit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a resumed fit begin though no batch may be left: until ``on_train_start`` its limits are one more."""
        if trainer.ckpt_path is None:
            return
        _check_optimizers(trainer, self._saved_groups)
        loop = trainer.fit_loop
        self._limits = loop.max_epochs, loop.max_steps
        loop.max_epochs = _one_more(loop.max_epochs)
        loop.epoch_loop.max_steps = cast(int, _one_more(loop.max_steps))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._limits is not None:
            loop = trainer.fit_loop
            (loop.max_epochs, loop.epoch_loop.max_steps), self._limits = self._limits, None
            if loop.done and loop._combined_loader is not None:
                # What Lightning restores within an epoch alone, and counts at its end: a checkpoint may yet be written.
                loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
                for epochs in cast(list[Any], [loop.epoch_progress.total, loop.epoch_progress.current]):
                    epochs.processed = epochs.completed = epochs.started
        self._waits = True
        self._answer_signals(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._pass_on(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._pass_on(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._waits = False
        if self.asked is not None:
            raise SIGTERMException

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answer_signals(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        waited, self._waits = self._waits, False
        if waited and isinstance(exception, SIGTERMException) and not trainer.fit_loop.done:
            trainer.save_checkpoint(self.dirpath / "last.ckpt")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile) and trainer.is_global_zero:
                checkpoint["metrics_rows"] = logger.rows()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_groups = [state["param_groups"][0] for state in checkpoint.get("optimizer_states", [])]
        here = self.dirpath.resolve()
        if Path(str(trainer.ckpt_path)).resolve().parent != here:
            return
        fits = trainer.state.fn == TrainerFn.FITTING and "metrics_rows" in checkpoint
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile) and trainer.is_global_zero and fits:
                logger.keep(checkpoint["metrics_rows"])
        for name, state in checkpoint["callbacks"].items():
            if isinstance(state, dict) and isinstance(state.get("dirpath"), str):
                checkpoint["callbacks"][name] = _moved(state, state["dirpath"], str(here))

    def _answer_signals(self, trainer: Trainer) -> None:
        """Answer in place of Lightning, whose handler begins a collective operation wherever the processes stand.

        Lightning puts the handlers from before the fit back.
        """
        self._trainer, self._pid = trainer, os.getpid()
        if threading.current_thread() is not threading.main_thread():  # the only one that hears of signals
            return
        for signum in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(signum) != signal.SIG_IGN:  # a job in the background of a script ignores Ctrl-C
                signal.signal(signum, self._answer)

    def _answer(self, signum: int, frame: Any) -> None:
        """Handle a signal: remember it for the end of the batch, or end at once where nothing would come of that."""
        if self._trainer is None or os.getpid() != self._pid:  # in a worker of a loader, which inherits the handler
            return
        if self._trainer.strategy.launcher is not None:
            # To the processes that this one has started. Not Ctrl-C: they may have heard that from the terminal.
            self._trainer.strategy.launcher.kill(signal.SIGTERM)
        if not self._waits or self.asked == signum == signal.SIGINT:
            stop_at_once(signum, frame)
        self.asked = self.asked or signum
        if signum == signal.SIGINT and self._trainer.is_global_zero:
            os.write(2, b"\nhasten: saving at the end of this batch; Ctrl-C again ends at once\n")

    def _pass_on(self, trainer: Trainer) -> None:
        """Tell Lightning of a signal; with several processes all of them, at the same batch."""
        if trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False):
            self.asked = self.asked or signal.SIGTERM
            trainer._signal_connector.received_sigterm = True


def _check_optimizers(trainer: Trainer, saved: list[dict[str, Any]]) -> None:
    """Refuse ``saved`` groups of other optimizers than these: torch would load those of any without a word."""
    for optimizer, group in zip(trainer.optimizers, saved, strict=False):
        wanted = {str(key) for key in optimizer.param_groups[0]} - {"initial_lr"}  # a schedule's
        found = {str(key) for key in group} - {"initial_lr"}
        if wanted != found:
            raise HastenError(
                f"ckpt_path: {str(trainer.ckpt_path)!r} is of another optimizer than {type(optimizer).__name__}: "
                f"only one of the two has {', '.join(sorted(wanted ^ found))}; use the config that wrote it"
            )


def _said_by_the_disk(error: BaseException | None) -> str | None:
    """Why a file could not be written; torch, which closes its archive all the same, then complains of that."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return None if error is None else error.strerror


def _one_more(limit: int | None) -> int | None:
    return limit if limit in (None, -1) else limit + 1


def _moved(value: Any, old: str, new: str) -> Any:
    """What a callback has saved, with the paths in ``old`` now in ``new``."""
    if isinstance(value, str) and (value == old or value.startswith(old + os.sep)):
        return new + value[len(old) :]
    if isinstance(value, dict):
        return {_moved(key, old, new): _moved(item, old, new) for key, item in value.items()}
    return value
