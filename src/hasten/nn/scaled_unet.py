"""ScaledUNet: a U-Net that is told by which factor each level shrinks its feature maps, and so what it costs."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class ScaledUNet(nn.Module):
    """A U-Net whose levels shrink by a factor of the caller's, (B, C, H, W) -> (B, K, H, W).

    A level is two convolutions of 3x3; from one level to the next the sides are multiplied by ``scale``, rounded, and
    never less than a pixel: by area going down, bilinearly back to the size of the skip connection going up. The
    smaller the factor, the fewer operations, from one set of weights. No norm layers, which would hide how large
    generated weights are.

    Args:
        in_channels: C.
        out_channels: K.
        widths: channels at each level, the image's first.

    Raises:
        ValueError: for no widths; for a scale that shrinks nothing or everything.

    Source: a factor as an input of the network, amortised, after arXiv:2304.05448; area and bilinear are ours.

    Example:
        >>> net = ScaledUNet(1, 2, widths=(4, 8))
        >>> net(torch.zeros(3, 1, 9, 9), scale=0.3).shape
        torch.Size([3, 2, 9, 9])
    """

    def __init__(self, in_channels: int, out_channels: int, *, widths: Sequence[int] = (16, 16, 16, 16)):
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"scaled_unet: widths: expected at least one, each at least 1, got {tuple(widths)}")
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList([_block(in_channels, widths[0]), *(_block(upper, lower) for upper, lower in pairs)])
        self.up = nn.ModuleList(_block(upper + lower, upper) for upper, lower in reversed(pairs))
        self.head = nn.Conv2d(widths[0], out_channels, 1)

    def forward(self, x: Tensor, scale: Tensor | float = 0.5) -> Tensor:
        """Segment images.

        Args:
            x: images.
            scale: in (0, 1]; a tensor, (), is read, for which a GPU has to be waited for: sizes are numbers.
        """
        factor = float(scale)
        if not 0 < factor <= 1:
            raise ValueError(f"scaled_unet: scale: expected a number in (0, 1], got {factor:g}")
        skips: list[Tensor] = []
        for block in self.down:
            if skips:
                x = interpolate(x, [max(1, round(side * factor)) for side in x.shape[-2:]], mode="area")
            skips.append(x := block(x))
        skips.pop()
        for block in self.up:
            skip = skips.pop()
            x = interpolate(x, skip.shape[-2:], mode="bilinear")
            x = block(torch.cat([skip, x], dim=1))
        return self.head(x)


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.ReLU(),
    )
