"""From a model and two factories to what Lightning's ``configure_optimizers`` returns."""

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` in two groups: with weight decay, and without (its ``weight_decay`` is 0).

    Without decay stay vectors and scalars (biases, norms) and the names that ``model.no_weight_decay()`` returns,
    timm's convention. An empty group is left out.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 3))]
        [1, 1]
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def configure_optimizers(
    groups: list[dict[str, Any]],
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    total_steps: Callable[[], int],
) -> OptimizerConfig | OptimizerLRSchedulerConfig:
    """One optimizer over ``groups`` and, where given, one schedule stepped after every optimizer step.

    Args:
        groups: as ``parameter_groups`` makes them.
        optimizer: called with the groups.
        scheduler: called with the optimizer, and with ``total_steps`` where it takes such an argument.
        total_steps: asked only then: Lightning counts batches for it.

    Example:
        >>> from functools import partial
        >>> from torch.optim import SGD
        >>> from hasten.optim import cosine
        >>> groups = parameter_groups(nn.Linear(2, 3))
        >>> made = configure_optimizers(groups, partial(SGD, lr=0.1), cosine, total_steps=lambda: 100)
        >>> made["lr_scheduler"]["interval"]
        'step'
    """
    made = optimizer(groups)
    if scheduler is None:
        return {"optimizer": made}
    wants_steps = "total_steps" in inspect.signature(scheduler).parameters
    schedule = scheduler(made, total_steps=total_steps()) if wants_steps else scheduler(made)
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
