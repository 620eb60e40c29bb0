"""Other architectures for small images: a distilled set is worth what nets learn from it that had no part in it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from hasten.errors import did_you_mean
from hasten.nn.convnet import ConvNet

_CIFAR_LIKE = 64
"""Smaller images are not halved twice before the first block of a ResNet."""


def resnet18(in_channels: int, image_size: int, num_classes: int, *, norm: str = "instance") -> nn.Module:
    """ResNet-18 of timm, (B, C, H, W) -> (B, K), below 64 pixels with a 3x3 stem that keeps the size.

    Args:
        in_channels: C.
        image_size: H = W; with "instance" at least 9, else its last blocks see single pixels.
        num_classes: K.
        norm: "instance", which is GroupNorm with one group a channel; or "batch".

    Raises:
        ValueError: for a norm that there is not, or an image that is too small for it.

    Example:
        >>> import torch
        >>> resnet18(1, 16, 10)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """
    import timm  # noqa: PLC0415 - seconds of import for those who evaluate on a ResNet only

    _check_norm("resnet18", norm)
    if norm == "instance":
        _check_size("resnet18", image_size, 9, "with norm=instance", "use norm=batch, or larger images")
    layer: Any = _InstanceNorm if norm == "instance" else nn.BatchNorm2d
    net: Any = timm.create_model("resnet18", in_chans=in_channels, num_classes=num_classes, norm_layer=layer)
    if image_size < _CIFAR_LIKE:
        net.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm begins its own
        net.maxpool = nn.Identity()
    return net


def vgg11(in_channels: int, image_size: int, num_classes: int, *, norm: str = "instance") -> nn.Module:
    """The convolutions of VGG-11, then the mean over what is left and a linear layer, (B, C, H, W) -> (B, K).

    Args:
        in_channels: C.
        image_size: H = W, at least 32: it is halved five times.
        num_classes: K.
        norm: "instance" or "batch", after every convolution.

    Raises:
        ValueError: for a norm that there is not, or an image that is too small.

    Source: the variant for small images of dataset condensation, arXiv:2006.05929.

    Example:
        >>> import torch
        >>> vgg11(1, 32, 10)(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """
    _check_norm("vgg11", norm)
    _check_size("vgg11", image_size, 32, "which it halves five times", "use larger images, or another net")
    layers: list[nn.Module] = []
    for width in (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None):
        if width is None:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), _NORMS[norm](width), nn.ReLU()]
            in_channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))


def alexnet(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """AlexNet for small images, five convolutions without norm and one linear layer: (B, C, H, W) -> (B, K).

    Args:
        in_channels: C.
        image_size: H = W, at least 8: it is halved three times.
        num_classes: K.

    Raises:
        ValueError: for an image that is too small.

    Source: the variant for small images of dataset condensation, arXiv:2006.05929.

    Example:
        >>> import torch
        >>> alexnet(1, 8, 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check_size("alexnet", image_size, 8, "which it halves three times", "use larger images, or another net")
    return nn.Sequential(
        *(nn.Conv2d(in_channels, 128, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(128, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(192, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 192, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(192 * (image_size // 8) ** 2, num_classes),
    )


def vit_tiny(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """ViT-Ti of timm on about 8 x 8 patches, at least 2 x 2 pixels each, (B, C, H, W) -> (B, K).

    Args:
        in_channels: C.
        image_size: H = W, at least 4.
        num_classes: K.

    Raises:
        ValueError: for an image that is too small.

    Example:
        >>> import torch
        >>> vit_tiny(1, 8, 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    import timm  # noqa: PLC0415 - seconds of import for those who evaluate on a ViT only

    _check_size("vit_tiny", image_size, 4, "for some patches", "use larger images, or another net")
    patch = max(p for p in range(1, max(2, image_size // 8) + 1) if image_size % p == 0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=image_size,
        patch_size=patch,
        in_chans=in_channels,
        num_classes=num_classes,
    )


def named_nets(
    names: Sequence[str],
    in_channels: int,
    image_size: int,
    num_classes: int,
    *,
    convnet: Mapping[str, Any] | None = None,
) -> dict[str, Callable[[], nn.Module]]:
    """Name -> function that makes a fresh net, of convnet, resnet18, vgg11, alexnet, vit_tiny; "_batch" for batch norm.

    Args:
        names: such as ``["convnet", "resnet18", "resnet18_batch"]``; without suffix it is instance norm, where any is.
        in_channels: C.
        image_size: H = W.
        num_classes: K.
        convnet: ``width``, ``depth`` and ``pad_to`` of ConvNet; None: those of the literature, 128 wide, and blocks
            until 4 x 4 pixels are left.

    Raises:
        ValueError: for a name that there is not, or an image that is too small for a net.

    Example:
        >>> named_nets(["convnet", "vit_tiny"], 1, 8, 10).keys()
        dict_keys(['convnet', 'vit_tiny'])
    """
    usual = {"depth": max(1, image_size.bit_length() - 3)}
    makers: dict[str, Callable[..., nn.Module]] = {
        "convnet": partial(ConvNet, **(usual if convnet is None else dict(convnet))),
        "resnet18": resnet18,
        "vgg11": vgg11,
    }
    makers |= {f"{name}_batch": partial(maker, norm="batch") for name, maker in makers.items()}
    makers |= {"alexnet": alexnet, "vit_tiny": vit_tiny}
    found = {}
    for name in names:
        if name not in makers:
            raise ValueError(f"nets: got {name!r}{did_you_mean(name, makers)}")
        found[name] = partial(makers[name], in_channels, image_size, num_classes)
        found[name]()  # one that does not fit says so now
    return found


class _InstanceNorm(nn.GroupNorm):
    """One group a channel, made as timm makes norms: by the number of channels."""

    def __init__(self, channels: int, **arguments: Any) -> None:
        super().__init__(channels, channels, **arguments)


_NORMS: dict[str, Callable[[int], nn.Module]] = {"instance": _InstanceNorm, "batch": nn.BatchNorm2d}


def _check_norm(net: str, norm: str) -> None:
    if norm not in _NORMS:
        raise ValueError(f"{net}: norm: got {norm!r}{did_you_mean(norm, _NORMS)}")


def _check_size(net: str, size: int, least: int, why: str, remedy: str) -> None:
    if size < least:
        raise ValueError(f"{net}: image_size: expected >= {least}, {why}, got {size}; {remedy}")
