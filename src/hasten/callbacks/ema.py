"""EMA: train one set of weights; validate, draw and keep their exponential moving average."""

import warnings
from itertools import chain
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hasten.errors import HastenError
from hasten.nn.protocols import TrainsExperts


class EMA(EMAWeightAveraging):
    """Keep an exponential moving average of the weights, with a warm-up that makes it useful from the first step on.

    Lightning's callback of the same purpose, with the decay min(decay, (1 + n) / (10 + n)) after n updates: a plain
    decay of 0.9999 remembers the initial weights for tens of thousands of steps. The first update takes the weights
    as they are; integer buffers, and parameters that ask for no gradient, are never averaged but keep their present
    value. So do non-persistent buffers: tables derived from something else, they are no state, and the module keeps its
    own throughout.

    Validation runs on the average. In a checkpoint ``state_dict`` is the average and ``current_model_state`` what is
    trained; a resumed fit takes up both. After the fit the module holds the average.

    The average is a copy of the whole LightningModule: keep frozen parts, such as an autoencoder, out of its tree.

    Args:
        decay: in [0, 1); the share of the old average that an update keeps, once warm.
        update_every_n_steps: optimizer steps between two updates, >= 1.
        device: where the average lives; None: with the module. "cpu" saves GPU memory and costs a copy an update.

    Attributes:
        is_in: whether at this moment the module holds the average.

    Raises:
        ValueError: for a number out of its range.
        HastenError: at set-up for sharded strategies, for weights-only checkpoints (Lightning writes those without
            asking callbacks, so they would hold the raw weights), for modules that build layers in ``setup`` and for
            those that train experts, of which each begins anew.

    Example:
        >>> ema = EMA(0.999)
        >>> [round(ema.decay_after(n), 3) for n in (1, 10, 100, 100_000)]
        [0.182, 0.55, 0.918, 0.999]
    """

    def __init__(
        self, decay: float = 0.9999, *, update_every_n_steps: int = 1, device: torch.device | str | int | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema: decay: expected 0 <= decay < 1, got {decay}; 0.9999 is usual for long runs")
        if update_every_n_steps < 1:
            raise ValueError(f"ema: update_every_n_steps: expected >= 1, got {update_every_n_steps}")
        super().__init__(device=device, decay=decay, update_every_n_steps=update_every_n_steps)
        self._kwargs.clear()  # the parent's averaging function, whose decay knows no warm-up
        self.decay = decay
        self._updates = 0
        self.is_in = False

    def decay_after(self, n: int) -> float:
        """The decay of the update that follows ``n`` >= 1 others."""
        return min(self.decay, (1 + n) / (10 + n))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if isinstance(pl_module, TrainsExperts):
            raise HastenError(
                f"ema: expected one network a fit, got {type(pl_module).__name__}, which draws a new one for each "
                "expert; leave EMA out"
            )
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise HastenError(
                f"ema: strategy: expected whole weights on every device, got {type(trainer.strategy).__name__}, which "
                "shards them; use ddp or leave EMA out"
            )
        if any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in trainer.checkpoint_callbacks):
            raise HastenError(
                "ema: ModelCheckpoint: expected save_weights_only=False, got True, which would save the raw weights in "
                "place of the average; save whole checkpoints"
            )
        self._latest_update_step = trainer.global_step  # the callback may have served another fit
        self._updates, self.is_in = 0, False
        with warnings.catch_warnings():
            # of modules that could shard: strategies that would are refused above
            warnings.filterwarnings("ignore", message=".*overrides the configure_model")
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be averaged: the two sets of weights are paired by position."""
        if self._average_model is None:
            return
        then, now = _layout(self._average_model.module), _layout(pl_module)
        if then != now:
            name = next(name for name in chain(now, then) if then.get(name) != now.get(name))
            raise HastenError(
                f"ema: {name}: expected {then.get(name, 'nothing')} as when the average was made, got "
                f"{now.get(name, 'nothing')}; build layers in __init__, and train in float32 or mixed precision"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._latest_update_step and self.should_update(step_idx=step - 1):
            self._latest_update_step = step
            self._update(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_models(pl_module)  # not a copy: a checkpoint may yet ask for the trained weights

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the trained weights back where a validation broke off; the average stays for a checkpoint to save."""
        if self.is_in:
            self._swap_models(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the copy go, or a later ``trainer.validate`` would swap a stale average in."""
        self._average_model, self.is_in = None, False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.is_in:
            average = checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], average

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:  # a test reads the average from state_dict: no reason to warn
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            self._updates = int(self._average_model.n_averaged)

    def _swap_models(self, pl_module: LightningModule) -> None:
        average = cast(AveragedModel, self._average_model).module
        for old, new in zip(_tensors(average).values(), _tensors(pl_module).values(), strict=True):
            trained = new.data.clone()
            new.data.copy_(old.data)
            old.data.copy_(trained)
        self.is_in = not self.is_in

    @torch.no_grad()
    def _update(self, pl_module: LightningModule) -> None:
        """Move the average towards the weights.

        Not by ``AveragedModel.update_parameters``: that asks the GPU how many updates there were, and so makes the
        host wait for it at every step.
        """
        average = cast(AveragedModel, self._average_model)
        averaged, current = [], []
        for old, new in zip(_tensors(average.module).values(), _tensors(pl_module).values(), strict=True):
            learned = new.requires_grad or not isinstance(new, nn.Parameter)  # what is not may be infinite
            if self._updates and learned and (old.is_floating_point() or old.is_complex()):
                averaged.append(old)
                current.append(new.to(old.device))
            else:
                old.copy_(new)
        if averaged:
            torch._foreach_lerp_(averaged, current, 1 - self.decay_after(self._updates))
        self._updates += 1
        average.n_averaged += 1  # what a checkpoint holds


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer."""
    derived = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, child in module.named_modules()
        for name in child._non_persistent_buffers_set
    }
    tensors = chain(module.named_parameters(), module.named_buffers())
    return {name: tensor for name, tensor in tensors if name not in derived}


def _layout(module: nn.Module) -> dict[str, str]:
    return {
        name: f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in _tensors(module).items()
    }
