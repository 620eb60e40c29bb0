"""DSA as an object: which operations, and whether the images of a batch share their numbers."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from hasten.functional.dsa import DSA_OPS, Draw, dsa, dsa_draw


class DSA:
    """Differentiable Siamese augmentation of normalised images: one operation a batch, each as likely.

    Args:
        ops: names of operations; leave out "flip" for digits and other images that a mirror changes.
        share: "sample": each image has its own numbers; "batch": all images have the same, whatever their number.

    Raises:
        ValueError: for no operation, one that there is not, or another ``share``.

    Source: arXiv:2102.08259, with the ranges of its strategy color_crop_cutout_flip_scale_rotate.

    Example:
        >>> augment = DSA(["crop", "rotate"])
        >>> draw = augment.draw(batch=4, size=8, generator=torch.Generator().manual_seed(0))
        >>> augment(torch.ones(4, 1, 8, 8), draw).shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(self, ops: Sequence[str] = DSA_OPS, *, share: str = "sample"):
        self.ops = tuple(ops)
        self.share = share
        self.draw(1, 8, torch.Generator())  # refuses wrong arguments now, not after the experts are trained

    def draw(self, batch: int, size: int, generator: Generator) -> Draw:
        """An operation and its numbers for ``batch`` images of ``size`` x ``size``; ``generator`` is on the CPU."""
        return dsa_draw(self.ops, batch, size, share=self.share, generator=generator)

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """The images as ``draw`` changes them, (B, C, H, W) -> (B, C, H, W)."""
        return dsa(images, draw)

    def __repr__(self) -> str:
        return f"DSA({self.ops!r}, share={self.share!r})"
