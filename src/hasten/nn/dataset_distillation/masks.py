"""Which of a network's parameters trajectories are matched on: (P,), (P,) -> (P,) bool."""

from collections.abc import Sequence

from torch import Tensor

from hasten.functional.matching import depth_keep, loss_quantile_keep


class LossQuantileMask:
    """Common pattern dropout: keep all parameters but the share that is matched best, (P,), (P,) -> (P,) bool.

    Args:
        alpha: the share that is dropped, in [0, 1); 0 keeps all.

    Raises:
        ValueError: for another share.

    Source: EDF, arXiv:2410.17193.

    Example:
        >>> import torch
        >>> LossQuantileMask(0.5)(torch.tensor([1.0, 4.0, 2.0, 3.0]), torch.zeros(4)).tolist()
        [False, True, False, True]
    """

    def __init__(self, alpha: float) -> None:
        if not 0 <= alpha < 1:
            raise ValueError(f"LossQuantileMask: alpha: expected a share in [0, 1), got {alpha}; 0 drops nothing")
        self.alpha = alpha

    def __call__(self, end: Tensor, target: Tensor) -> Tensor:
        return loss_quantile_keep(end, target, drop=self.alpha)

    def __repr__(self) -> str:
        return f"LossQuantileMask(alpha={self.alpha:g})"


class DepthMask:
    """PAD's mask: keep all parameters but those of the first layers, (P,), (P,) -> (P,) bool.

    Args:
        ratio: the share of the network that is dropped, in [0, 1).
        shapes: of the parameters, in the order of theta; may be set later, before the first call.
        by: what the share is of: "layer" or "scalar", see :func:`hasten.functional.depth_keep`.

    Raises:
        ValueError: for other values, and for a call before there are shapes.

    Source: PAD, arXiv:2408.03360.

    Example:
        >>> import torch
        >>> mask = DepthMask(0.5, [(2, 2), (2,), (1, 2), (1,)])
        >>> mask(torch.zeros(9), torch.zeros(9)).tolist()
        [False, False, False, False, False, False, True, True, True]
    """

    def __init__(self, ratio: float, shapes: Sequence[Sequence[int]] | None = None, *, by: str = "layer") -> None:
        self.ratio, self.shapes, self.by = ratio, shapes, by
        depth_keep([], drop=ratio, by=by)  # a mistake shows where it is made

    def __call__(self, end: Tensor, target: Tensor) -> Tensor:
        if self.shapes is None:
            raise ValueError("DepthMask: shapes: expected those of the parameters, got none; set them before the call")
        return depth_keep(self.shapes, drop=self.ratio, by=self.by).to(end.device)

    def __repr__(self) -> str:
        return f"DepthMask(ratio={self.ratio:g}, by={self.by!r})"
