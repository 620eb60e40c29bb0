"""What an input of a hypernetwork does to a batch: transforms for ``HyperNetwork``, chosen in configs by their path."""

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and targets (B, ...)."""


def rotated(batch: Batch, angle: Tensor, *, fill: float = -1.0) -> Batch:
    """Turn the images of a batch about their centres, counter-clockwise; the targets stay.

    Args:
        batch: images and targets.
        angle: in degrees, () or (B,).
        fill: what comes in at the corners; -1 is black to hasten's datamodules.

    Example:
        >>> images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> rotated((images, torch.zeros(1)), torch.tensor(90.0))[0].round().tolist()
        [[[[2.0, 4.0], [1.0, 3.0]]]]
    """
    images, targets = batch
    height, width = images.shape[-2:]
    radians = angle.to(images).deg2rad().expand(len(images))
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # from where each pixel is taken: coordinates go from -1 to 1 along both sides, y downwards
    rows = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=-1)
    places = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images - fill, places, align_corners=False) + fill, targets
