"""A fit that is stopped after a few steps: what they take, in time, in FLOPs and in memory."""

import ctypes
import io
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_WARM_UP = 3  # batches, the first of which counts FLOPs
_TIMED = 20  # batches, or as many as _ENOUGH_S holds
_AT_LEAST = 3
_ENOUGH_S = 5.0
_TIMED_EVALUATION = 3  # batches of validation and of test, the first of which warms up


class Evaluation:
    """A validation or a test, of which a few batches were timed."""

    def __init__(self) -> None:
        self.batches: float = 0
        self.times: list[float] = []
        self._mark = 0.0

    def begin(self, batches: Sequence[float], now: float) -> None:
        self.batches, self._mark = sum(batches), now

    def batch(self, now: float) -> None:
        self.times.append(now - self._mark)
        self._mark = now

    @property
    def total_s(self) -> float:
        """Of all its batches."""
        return self.batches * mean(self.times[1:] or self.times) if self.times else 0.0


class Probe(Callback):
    """Times a few batches, counts the FLOPs of the first one, and ends the fit."""

    def __init__(self, memory: "Memory", *, count_flops: bool) -> None:
        self.memory = memory
        self.count_flops = count_flops
        self.steps: float = 0
        self.accumulated = 1
        self.batches_an_epoch: float = 1
        self.batches_between: float = 1
        self.flops: int | None = None
        self.checkpoint_bytes: int | None = None
        self.validation, self.test = Evaluation(), Evaluation()
        self._times: list[float] = []
        self._mark = 0.0
        self._device = torch.device("cpu")
        self._counting = ExitStack()

    @property
    def batch_s(self) -> float:
        """The median; of a run of a few batches, without the first where there is another."""
        times = self._times[_WARM_UP:] or self._times[1:] or self._times
        return median(times) if times else 0.0

    @property
    def batches_a_step(self) -> float:
        """The mean over the whole fit: the last step of an epoch takes what is left of it."""
        an_epoch, accumulated = self.batches_an_epoch, self.accumulated
        if not self.steps or math.isinf(an_epoch):
            return accumulated
        steps_an_epoch = math.ceil(an_epoch / accumulated)
        if math.isinf(self.steps):
            return an_epoch / steps_an_epoch
        epochs, rest = divmod(self.steps, steps_an_epoch)
        return (epochs * an_epoch + rest * accumulated) / self.steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        self.memory.begin(self._device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps = trainer.estimated_stepping_batches
        self.accumulated = trainer.accumulate_grad_batches
        self.batches_an_epoch = trainer.num_training_batches
        self.batches_between = trainer.val_check_batch or math.inf  # None: by the clock
        self._mark = self._now()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.count_flops and not self._times:
            counter = self._counting.enter_context(FlopCounterMode(display=False))
            self._counting.callback(lambda: setattr(self, "flops", counter.get_total_flops()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._times:
            self._counting.close()
        self._times.append(self._now() - self._mark)
        timed = self._times[_WARM_UP:]
        enough = len(timed) >= _TIMED or (len(timed) >= _AT_LEAST and sum(timed) >= _ENOUGH_S)
        # by one clock: a process that went on alone would wait for the others without end
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(enough, all=False)
        self._mark = self._now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        counted = _Counted()
        torch.save(checkpoint, counted)
        shards = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, DTensor)]
        with_others = sum(shard.nbytes - shard.to_local().nbytes for shard in shards)  # what other processes write
        self.checkpoint_bytes = counted.count + with_others

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._counting.close()  # else it would count whatever comes next in this process

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation.begin(trainer.num_val_batches, self._now())

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._evaluated(self.validation)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = self._now()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.test.begin(trainer.num_test_batches, self._now())

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._evaluated(self.test)

    def _evaluated(self, evaluation: Evaluation) -> None:
        evaluation.batch(self._now())
        if len(evaluation.times) >= _TIMED_EVALUATION:
            raise StopIteration  # Lightning's evaluation loop ends by it, as at the end of the data

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels run behind the host's back
        return time.perf_counter()


class Memory:
    """The most memory since it was made: allocated on CUDA, or by how much the process grew."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        with suppress(OSError, AttributeError):  # without glibc
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide how much this one takes
        self._before = _resident_bytes("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        except OSError:
            self._before = None  # not Linux

    def begin(self, device: torch.device) -> None:
        if device.type == "cuda" and device != self._device:
            torch.cuda.reset_peak_memory_stats(device)
        self._device = device

    def peak_bytes(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = _resident_bytes("VmHWM")
        return None if self._before is None or peak is None else max(0, peak - self._before)


def _resident_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class _Counted(io.BytesIO):
    """A file that keeps nothing but how many bytes were written to it."""

    count = 0

    def write(self, data: Any, /) -> int:
        self.count += len(data)
        return len(data)
