"""Training and evaluation mode, for those who look at a module in the midst of its training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Every submodule is afterwards in the mode it was in, whatever the block sets, also after an exception.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with modes_kept(net):
        ...     _ = net.train()
        >>> net[0].training, net[1].training
        (True, False)
    """
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training  # not .train(), which a module with frozen parts may override


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode in the block; afterwards every submodule is in the mode it was in, also after an exception.

    Example:
        >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(net):
        ...     net.training
        False
        >>> net.training, net[0].training, net[1].training
        (True, True, False)
    """
    with modes_kept(module):
        module.eval()
        yield
