"""GSAM: gradient steps towards flat minima, at the price of two forward and backward passes a step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

_EPS = 1e-12


class GSAM(Optimizer):
    """Surrogate-gap minimisation around another optimizer, whose steps it takes with another gradient.

    A step looks at two gradients: g1 here, and g2 at a worse place near by, w + rho w^2 g1 / ||w g1|| (``adaptive``) or
    w + rho g1 / ||g1||. The base steps, from here, with g2 less ``alpha`` times the part of g1 that is orthogonal to
    g2: the loss of the worse place falls as along g2, and the gap between it and the loss here narrows. Norms are over
    all parameters.

    ``step`` calls its closure twice. Whatever the closure draws at random has to be drawn alike both times, and batch
    norm should leave its running statistics alone the second time. A schedule of this optimizer is one of the base.

    Args:
        params: parameters or groups of them, as of any optimizer.
        base: from groups to the optimizer whose steps are taken, such as a partial ``torch.optim.SGD``.
        rho: how far the worse place is, >= 0.
        alpha: weight of the orthogonal part, >= 0; 0 is SAM, or ASAM where ``adaptive``.
        adaptive: measure the distance relative to each weight's own size.

    Raises:
        ValueError: for a negative number.

    Source: GSAM, arXiv:2203.08065; adaptive: ASAM, arXiv:2102.11600; both in FTD's experts, arXiv:2211.11004.

    Example:
        >>> from functools import partial
        >>> weight = torch.tensor([2.0], requires_grad=True)
        >>> optimizer = GSAM([weight], partial(torch.optim.SGD, lr=0.1), rho=0.5, alpha=0.0)
        >>> _ = optimizer.step(lambda: (optimizer.zero_grad(), (weight**2 / 2).backward()))
        >>> weight.item()  # the gradient at the worse place, 2 + 0.5 * 2**2 * 2 / |2 * 2| = 3, is 3
        1.7000000476837158
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        rho: float = 0.01,
        alpha: float = 0.3,
        adaptive: bool = True,
    ):
        if rho < 0 or alpha < 0:
            raise ValueError(f"gsam: rho and alpha: expected >= 0, got {rho} and {alpha}")
        super().__init__(params, {"rho": rho, "alpha": alpha, "adaptive": adaptive})
        self.base = base(self.param_groups)
        self._share(self.base.state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: clears the gradients, computes the loss and its gradients, and returns the loss.

        Returns:
            What the closure returned before the step.

        Raises:
            TypeError: without a closure; Lightning's precision=16-mixed gives none.
        """
        if closure is None:
            raise TypeError(
                "gsam: step: expected a closure, got none; Lightning: use precision=bf16-mixed, not 16-mixed"
            )
        closure = torch.enable_grad()(closure)
        result = closure()
        moved = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        weights = [p.detach().clone() for _, p in moved]
        first = [p.grad.clone() for _, p in moved]
        with torch.no_grad():
            _ascend(moved, first)
        try:
            closure()
        finally:
            with torch.no_grad():
                for (_, p), weight in zip(moved, weights, strict=True):
                    p.copy_(weight)  # back where it was; a subtraction would round
        with torch.no_grad():
            _combine(moved, first)
        self.base.step()
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share(self.state)

    def _share(self, state: Any) -> None:
        """One state and one list of groups for both: schedules and checkpoints know this optimizer only."""
        self.state = self.base.state = state
        self.base.param_groups = self.param_groups


_Moved = list[tuple[dict[str, Any], Tensor]]
"""The parameters that have a gradient, each with its group."""


def _ascend(moved: _Moved, gradients: list[Tensor]) -> None:
    """To the worse place, in place."""
    scales = [p.abs() if group["adaptive"] else torch.ones_like(p) for group, p in moved]
    norm = get_total_norm([scale * g for scale, g in zip(scales, gradients, strict=True)]) + _EPS
    for (group, p), scale, g in zip(moved, scales, gradients, strict=True):
        p.add_(group["rho"] * scale**2 * g / norm)


def _combine(moved: _Moved, first: list[Tensor]) -> None:
    """The gradient for the base, made of those here and at the worse place, which the parameters hold; in place."""
    second = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in moved]
    first_norm, second_norm = get_total_norm(first), get_total_norm(second)
    inner = sum((a * b).sum() for a, b in zip(first, second, strict=True))
    cosine = inner / (first_norm * second_norm + _EPS)
    for (group, p), a, b in zip(moved, first, second, strict=True):
        p.grad = b - group["alpha"] * (a - cosine * first_norm * b / (second_norm + _EPS))
