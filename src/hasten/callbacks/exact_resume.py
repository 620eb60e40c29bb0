"""ExactResume: a run that was interrupted and resumed equals one that never stopped, bit for bit."""

import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Generator


class ExactResume(Callback):
    """Resume a run as if it had never stopped: the same draws, batches, validations, counters and logged steps.

    A checkpoint holds the random state of every process at the moment it is written: of Python, NumPy, torch, the
    process's GPU, and of each ``torch.Generator`` that the module or a child of it has as an attribute. A resumed fit
    puts it back once, when the last ``on_train_start`` is over. Nothing else draws differently: without an interruption
    a run is what it would be without this callback.

    Lightning's own resume skips the validation that is due at the saved step, forgets the end of an epoch whose last
    batch was saved, miscounts epochs under ``max_steps``, and does not restore the loaders where a schedule has asked
    for ``estimated_stepping_batches``. All that is put right: the fit goes on with what came next, be it the
    validation, the end of the epoch or the next batch.

    With ``hasten.datamodules.EpochLoader`` a run resumes between any two batches. With a loader that cannot be restored
    it resumes exactly at the end of an epoch only; elsewhere Lightning warns.

    What stays inexact: means over the epoch of what is logged in training, and the state of training metrics, begin
    anew within an epoch; gradients within an accumulated step are lost, with a warning. On other devices, or another
    number of processes, than the checkpoint's a run draws afresh, with a warning.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ExactResume()], accelerator="cpu", logger=False)
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._resumed = None  # the callback may have served another fit

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = _random_state(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the state of all processes: Lightning keeps the file of rank zero alone."""
        validated = trainer.fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch
        # a validation that breaks off, as on SIGTERM, is run anew
        broken_off = trainer.validating and not validated and self._before_validation is not None
        states: list[Any] = [self._before_validation if broken_off else _random_state(trainer, pl_module)]
        if dist.is_available() and dist.is_initialized():
            own, states = states[0], [None] * dist.get_world_size()
            dist.all_gather_object(states, own)
        device = trainer.strategy.root_device.type
        checkpoint["exact_resume"] = {
            "states": states,
            "device": device,
            "validating": trainer.validating,
            "metrics": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "exact_resume" not in checkpoint:
            rank_zero_warn("exact_resume: the checkpoint was written without ExactResume: the run draws afresh")
            return
        self._resumed = resumed = checkpoint["exact_resume"]
        resumed["pending"] = _complete(checkpoint["loops"]["fit_loop"], validating=resumed["validating"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the strategy's hook of this name: before it, any callback and the module may draw, or seed."""
        if self._resumed is None:
            return
        strategy = trainer.strategy
        hook = strategy.on_train_start

        def go_on() -> None:
            _undo(trainer)
            hook()
            self._go_on(trainer, pl_module)

        strategy.on_train_start = go_on

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _undo(trainer)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resumed = cast(dict[str, Any], self._resumed)
        trainer.callback_metrics.update(resumed["metrics"])
        _continue(trainer, pending=resumed["pending"])
        states, device = resumed["states"], trainer.strategy.root_device.type
        if len(states) == trainer.world_size and resumed["device"] == device:
            _put_back(states[trainer.global_rank], trainer, pl_module)
        else:
            rank_zero_warn(
                f"exact_resume: the checkpoint is of {len(states)} processes on {resumed['device']}, this run has "
                f"{trainer.world_size} on {device}: it draws afresh, not as the first would have"
            )


def _undo(trainer: Trainer) -> None:
    vars(trainer.strategy).pop("on_train_start", None)


# ------------------------------------------------------------------ random state


def _random_state(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The state of all generators of this process, in types that a weights-only load accepts."""
    version, words, gauss = random.getstate()
    algorithm, key, *rest = cast(tuple[Any, ...], np.random.get_state())
    state = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [algorithm, torch.from_numpy(key.astype(np.int64)), *rest],  # pickle knows no tensors of uint32
        "torch": torch.get_rng_state(),
        "module": {path: generator.get_state() for path, generator in _generators(pl_module)},
    }
    device = trainer.strategy.root_device
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _put_back(state: dict[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    algorithm, key, *rest = state["numpy"]
    np.random.set_state((algorithm, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    for path, generator in _generators(pl_module):
        if path in state["module"]:
            generator.set_state(state["module"][path].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), trainer.strategy.root_device)


def _generators(pl_module: LightningModule) -> Iterator[tuple[str, Generator]]:
    """Where it is -> generator, in the module and its children."""
    for prefix, module in pl_module.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Generator):
                yield f"{prefix}.{name}", value


# ------------------------------------------------------------------ Lightning's counters


def _complete(loops: dict[str, Any], *, validating: bool) -> str:
    """Count as completed what was, and as unfinished what was broken off, in the counters of a checkpoint.

    Lightning counts a batch, and an epoch, only after the hooks of its end, in which checkpoints are written.

    Returns:
        Whose end Lightning had not done with when the checkpoint was written: "batch", "epoch" or "nothing".
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    in_batch_end = batches["current"]["processed"] > batches["current"]["completed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    in_epoch_end = epochs["current"]["processed"] > epochs["current"]["completed"]
    for span in ("total", "current"):
        batches[span]["completed"] = batches[span]["processed"]
        epochs[span]["completed"] = epochs[span]["processed"]
    if in_batch_end or (validating and not validation["is_last_batch"]):
        # Lightning takes a validation that is due for done, unless it broke off within a batch
        begun = 0 if in_batch_end else validation["current"]["completed"]
        for counts in (validation["total"], validation["current"]):
            done = counts["completed"] - begun
            counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    # a fit that ends within an epoch counts the whole epoch; the resumed one is meant to last longer
    broken_off = batches["current"]["ready"] > 0 and not batches["is_last_batch"]
    if broken_off and epochs["current"]["processed"] == epochs["current"]["started"]:
        for span in ("total", "current"):
            epochs[span].update(processed=epochs[span]["started"] - 1, completed=epochs[span]["started"] - 1)
        return "nothing"
    if in_batch_end or validating:
        return "batch"
    return "epoch" if in_epoch_end else "nothing"


def _continue(trainer: Trainer, *, pending: str) -> None:
    """Let Lightning, whose loops are restored but have yet to run, go on with what came after the checkpoint."""
    fit_loop = trainer.fit_loop
    epoch_loop, fetcher = fit_loop.epoch_loop, cast(Any, fit_loop._data_fetcher)
    if fit_loop.restarted_mid_epoch and fit_loop._combined_loader_states_to_load:
        # a schedule has asked for the number of steps, and so for the loaders, before there was anything to restore
        fit_loop._load_combined_loader_states()
        iter(fetcher)
    fit_loop._restarting = False  # or schedules that watch a metric would pass over the end of this epoch
    if not fit_loop.restarted_mid_epoch:
        if pending == "epoch":
            fit_loop.epoch_progress.current.completed -= 1  # as it was counted when those schedules were to be stepped
            epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            fit_loop.epoch_progress.current.completed += 1
        # the next epoch begins as any other, with an iterator made after its hooks
        epoch_loop.restarting = fit_loop._resuming_from_checkpoint = False
        return
    validation = epoch_loop.val_loop
    validation.restarting = False  # from its first batch, and with its counters as they were saved
    for progress in (validation.batch_progress.total, validation.batch_progress.current):
        progress.reset_on_restart()
    due = epoch_loop._should_check_val_fx(fetcher)  # if so Lightning runs, or skips, the validation, and then counts
    if epoch_loop._should_accumulate():
        rank_zero_warn("exact_resume: the checkpoint is from within an accumulated step, whose gradients are lost")
    else:
        epoch_loop._batches_that_stepped += (pending == "batch") - due
    if epoch_loop._num_ready_batches_reached() and not due:
        fetcher.done = True  # or Lightning would draw one batch more
