"""Learning-rate schedules that torch offers only in parts."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def cosine(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0, min_lr: float = 0.0) -> LRScheduler:
    """Linear warm-up over ``warmup_steps``, then a cosine down to ``min_lr`` at ``total_steps``; stepped every step.

    Args:
        total_steps: optimizer steps of the whole run, > warmup_steps.
        warmup_steps: steps from lr / warmup_steps up to lr, >= 0.
        min_lr: the last learning rate, >= 0.

    Raises:
        ValueError: for a negative ``min_lr``, and where the warm-up does not fit into the run.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = cosine(optimizer, total_steps=10)
        >>> schedule.get_last_lr()
        [1.0]
    """
    if min_lr < 0:
        raise ValueError(f"scheduler: min_lr: expected >= 0, got {min_lr}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"scheduler: warmup_steps: expected 0 <= warmup_steps < {total_steps} steps of the run, "
            f"got {warmup_steps}; train longer or warm up less"
        )
    decay = CosineAnnealingLR(optimizer, T_max=total_steps - warmup_steps, eta_min=min_lr)
    if warmup_steps == 0:
        return decay
    # LinearLR cannot start at 0; 1 / warmup_steps makes step i of the warm-up lr * (i + 1) / warmup_steps
    warmup = LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=max(1, warmup_steps - 1))
    return SequentialLR(optimizer, [warmup, decay], milestones=[warmup_steps])
