"""Throughput: samples and steps a second of the training alone."""

import sys
import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Throughput(Callback):
    """Log how fast training runs, without its first steps and without what is not training.

    Lightning's ThroughputMonitor waits for the GPU after every batch and counts the first ones, compilation included.
    This one waits only where it logs, every ``log_every_n_steps``, and leaves out validation and the pictures and
    samples that hasten's callbacks draw; waiting for data counts.

    Logs ``throughput/samples_per_s`` (over all processes), ``throughput/steps_per_s`` (optimizer steps) and, on CUDA,
    ``throughput/peak_MiB`` (memory allocated on this GPU since the fit began).

    Args:
        warmup_batches: batches at the start of a fit that do not count, >= 0.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Throughput()], log_every_n_steps=50, accelerator="cpu", logger=False)
    """

    def __init__(self, *, warmup_batches: int = 10) -> None:
        if warmup_batches < 0:
            raise ValueError(f"throughput: warmup_batches: expected >= 0, got {warmup_batches}")
        self.warmup_batches = warmup_batches
        self._device = torch.device("cpu")
        self._batches_left = warmup_batches
        self._warm = False
        self._since: float | None = None  # when the clock was last started; None while it stands
        self._elapsed_s = 0.0
        self._samples = 0
        self._step = 0  # the optimizer step the present window began with

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = trainer.strategy.root_device
        self._batches_left = self.warmup_batches
        self._warm, self._since = False, None
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._begin_when_warm(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._warm:
            self._batches_left -= 1
            self._begin_when_warm(trainer)
            return
        # a loader that hands out one item a batch may hand out one tensor of any length, all weights of an expert say
        limit = getattr(trainer.train_dataloader, "batch_size", None) or sys.maxsize
        self._samples += min(_batch_size(batch), limit)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        steps = trainer.global_step - self._step
        if steps == 0 or not every or trainer.global_step % every:
            return
        self.pause()
        pl_module.log_dict(self._metrics(steps, trainer.world_size), rank_zero_only=True)
        self._begin(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warm, self._since = False, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._warm, self._since = False, None

    def pause(self) -> None:
        """Stop the clock, once what the GPU was given is done; nothing where it stands already."""
        if self._since is not None:
            self._elapsed_s += self._now() - self._since
            self._since = None

    def resume(self) -> None:
        """Start the clock again; nothing where it runs, or where no training is being measured."""
        if self._warm and self._since is None:
            self._since = self._now()

    def _begin_when_warm(self, trainer: Trainer) -> None:
        if self._batches_left <= 0:
            self._warm = True
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._samples, self._elapsed_s, self._step = 0, 0.0, trainer.global_step
        self.resume()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels run behind the host's back
        return time.perf_counter()

    def _metrics(self, steps: int, world_size: int) -> dict[str, float]:
        metrics = {"throughput/steps_per_s": steps / self._elapsed_s}
        if self._samples:
            metrics["throughput/samples_per_s"] = self._samples * world_size / self._elapsed_s
        if self._device.type == "cuda":
            metrics["throughput/peak_MiB"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return metrics


def _batch_size(batch: Any) -> int:
    """The length of the first tensor anywhere in the batch; 0 where there is none."""
    return next((leaf.size(0) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)
