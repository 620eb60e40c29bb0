"""ConvNet: the small classifier of the data set distillation literature, also our feature net."""

from torch import Tensor, nn

from hasten.errors import did_you_mean


class ConvNet(nn.Module):
    """``depth`` blocks of convolution, norm, ReLU and 2x pooling, then a linear classifier: (B, C, H, W) -> (B, K).

    Args:
        in_channels: C.
        image_size: H = W, at least 2 ** depth, unless ``pad_to`` is.
        num_classes: K.
        width: channels of every block.
        depth: number of blocks.
        norm: "instance", which is GroupNorm with one group a channel; or "batch".
        pad_to: frame the images with zeros to this size first; that literature pads MNIST from 28 to 32.

    Raises:
        ValueError: where the image is halved away, or for a norm that there is not.

    Source: Dataset Distillation by Matching Training Trajectories, arXiv:2203.11932, section 4; EDF, arXiv:2410.17193.

    Example:
        >>> import torch
        >>> ConvNet(1, 8, 10, width=16, depth=2)(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
        pad_to: int | None = None,
    ):
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"convnet: depth and width: expected >= 1, got {depth} and {width}")
        if norm not in _NORMS:
            raise ValueError(f"convnet: norm: got {norm!r}{did_you_mean(norm, _NORMS)}")
        if pad_to is not None and pad_to < image_size:
            raise ValueError(f"convnet: pad_to: expected >= image_size = {image_size}, got {pad_to}")
        size = image_size if pad_to is None else pad_to
        if size < 2**depth:
            raise ValueError(
                f"convnet: depth: expected 2 ** depth <= image_size = {size}, got depth {depth}; "
                f"use at most {size.bit_length() - 1}"
            )
        before, after = (size - image_size) // 2, (size - image_size + 1) // 2
        self.pad = nn.ZeroPad2d((before, after, before, after)) if size > image_size else nn.Identity()
        self.blocks = nn.Sequential(*(_block(in_channels if i == 0 else width, width, norm) for i in range(depth)))
        side = size // 2**depth
        self.classifier = nn.Linear(width * side * side, num_classes)

    @property
    def saliency_layer(self) -> str:
        """Name of the layer whose output class activation maps are made of: the last ReLU, before the pooling."""
        return f"blocks.{len(self.blocks) - 1}.2"

    def features(self, images: Tensor) -> Tensor:
        """What the classifier sees, (B, C, H, W) -> (B, width * (H // 2 ** depth) ** 2)."""
        return self.blocks(self.pad(images)).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


_NORMS = {"instance": lambda width: nn.GroupNorm(width, width), "batch": nn.BatchNorm2d}


def _block(in_channels: int, width: int, norm: str) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), _NORMS[norm](width), nn.ReLU(), nn.AvgPool2d(2))
