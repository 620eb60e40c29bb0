"""What a tool owes to the fit in whose middle it draws: the training neither changes nor seems slower."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from hasten.callbacks.ema import EMA
from hasten.callbacks.throughput import Throughput
from hasten.nn.modes import evaluating
from hasten.nn.protocols import GeneratesImages


@contextmanager
def sampling(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Averaged weights in, evaluation mode, no gradients, the trainer's precision, clocks stopped; then all as before.

    Lightning swaps averaged weights in for the validation batches alone, and a tool's hooks may come before or after
    the average's: so the tools draw outside of validation batches, and swap for themselves.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averages = [c for c in callbacks if isinstance(c, WeightAveraging) and _is_out(c)]
    clocks = [c for c in callbacks if isinstance(c, Throughput)]
    for clock in clocks:
        clock.pause()
    for average in averages:
        average._swap_models(pl_module)
    try:
        with evaluating(pl_module), isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        for average in averages:
            average._swap_models(pl_module)
        for clock in clocks:
            clock.resume()


def _is_out(average: WeightAveraging) -> bool:
    """Whether there is an average to swap in. Lightning's own callback holds the same weights twice once it is in."""
    return average._average_model is not None and not (isinstance(average, EMA) and average.is_in)


def publish(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log numbers where Lightning refuses ``self.log``: once the last batch is over, and at the end of a validation.

    They land in ``trainer.callback_metrics``, which checkpoints, sweepers and result files read, and in every logger.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def unit_range(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """From the module's range to [0, 1]: the datamodule's ``denormalize``, or else from [-1, 1]."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    denormalize = getattr(datamodule, "denormalize", lambda images: (images + 1) / 2)
    return lambda images: denormalize(images.detach().float().cpu()).clamp(0, 1)


def draw(
    pl_module: LightningModule,
    n: int,
    labels: Tensor | None = None,
    *,
    steps: int | None = None,
    batch_size: int,
    seed: int,
) -> Iterator[Tensor]:
    """Batches of together n images of a module that has ``generate``, in its own range; to be used in ``sampling``."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same images whatever the device
    for start in range(0, n, batch_size):
        size = min(batch_size, n - start)
        chosen = None if labels is None else labels[start : start + size].to(pl_module.device)
        yield cast(GeneratesImages, pl_module).generate(size, chosen, steps=steps, generator=generator)
