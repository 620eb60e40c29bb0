"""ConvNet: the small classifier of the data set distillation literature, also our feature net."""

from torch import Tensor, nn


class ConvNet(nn.Module):
    """``depth`` blocks of convolution, norm, ReLU and 2x pooling, then a linear classifier: (B, C, H, W) -> (B, K).

    The norm is GroupNorm with one group a channel, which that literature calls instance norm.

    Args:
        in_channels: C.
        image_size: H = W, at least 2 ** depth.
        num_classes: K.
        width: channels of every block.
        depth: number of blocks.

    Raises:
        ValueError: where the image is halved away.

    Source: Dataset Distillation by Matching Training Trajectories, arXiv:2203.11932, section 4; EDF, arXiv:2410.17193.

    Example:
        >>> import torch
        >>> ConvNet(1, 8, 10, width=16, depth=2)(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, *, width: int = 128, depth: int = 3):
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"convnet: depth and width: expected >= 1, got {depth} and {width}")
        if image_size < 2**depth:
            raise ValueError(
                f"convnet: depth: expected 2 ** depth <= image_size = {image_size}, got depth {depth}; use fewer blocks"
            )
        self.blocks = nn.Sequential(*(_block(in_channels if i == 0 else width, width) for i in range(depth)))
        side = image_size // 2**depth
        self.classifier = nn.Linear(width * side * side, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """What the classifier sees, (B, C, H, W) -> (B, width * (H // 2 ** depth) ** 2)."""
        return self.blocks(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def _block(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)
    )
