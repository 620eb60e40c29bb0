"""SyntheticSet: the few images that dataset distillation learns, their labels and the step size for them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SyntheticSet(nn.Module):
    """N = K * ipc images, the logits of their labels and one step size: what is distilled, and what a checkpoint holds.

    The images of a class stand together, class 0 first. All is zero until ``fill``; pixels are in the range of the
    model and are never clamped.

    Args:
        num_classes: K, at least 2.
        ipc: images per class, at least 1.
        image_shape: (C, H, W).
        lr: step size of training on the images, at least ``lr_floor``.
        learn_labels: whether ``labels`` asks for gradients.
        learn_lr: whether ``lr`` does.
        lr_floor: what ``clamp_lr_`` holds the step size above, > 0.

    Attributes:
        images: (N, C, H, W).
        labels: logits (N, K); a hard label is 0 at its class and -inf elsewhere.
        lr: ().
        classes: the class that each image stands for, (N,) int64.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> synthetic = SyntheticSet(3, 2, (1, 8, 8), lr=0.05)
        >>> synthetic.images.shape, synthetic.classes.tolist()
        (torch.Size([6, 1, 8, 8]), [0, 0, 1, 1, 2, 2])
    """

    classes: Tensor

    def __init__(
        self,
        num_classes: int,
        ipc: int,
        image_shape: tuple[int, int, int],
        *,
        lr: float = 0.01,
        learn_labels: bool = True,
        learn_lr: bool = True,
        lr_floor: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, value, least in (("num_classes", num_classes, 2), ("ipc", ipc, 1)):
            if value < least:
                raise ValueError(f"synthetic: {name}: expected >= {least}, got {value}")
        if not lr_floor > 0:
            raise ValueError(f"synthetic: lr_floor: expected > 0, got {lr_floor}")
        if not lr >= lr_floor:
            raise ValueError(f"synthetic: lr: expected >= lr_floor = {lr_floor:g}, got {lr}")
        self.num_classes = num_classes
        self.ipc = ipc
        self.lr_floor = lr_floor
        self.images = nn.Parameter(torch.zeros(num_classes * ipc, *image_shape))
        self.labels = nn.Parameter(torch.zeros(num_classes * ipc, num_classes), requires_grad=learn_labels)
        self.lr = nn.Parameter(torch.tensor(float(lr)), requires_grad=learn_lr)
        self.register_buffer("classes", torch.arange(num_classes).repeat_interleave(ipc))

    @torch.no_grad()
    def fill(self, images: Tensor, labels: Tensor, lr: float | None = None) -> None:
        """Start from images (N, C, H, W) and logits (N, K), class-major.

        Raises:
            ValueError: for another shape, a pixel that is not finite, or a label that cannot be one.
        """
        for name, tensor, own in (("images", images, self.images), ("labels", labels, self.labels)):
            if tensor.shape != own.shape:
                raise ValueError(f"synthetic: {name}: expected {tuple(own.shape)}, got {tuple(tensor.shape)}")
        if stray := int((~images.isfinite()).sum()):
            raise ValueError(f"synthetic: images: expected finite pixels, got {stray} that are not")
        if wrong := int((~labels.softmax(1).isfinite()).any(1).sum()):
            raise ValueError(f"synthetic: labels: expected logits of a distribution, got {wrong} rows without one")
        self.images.copy_(images)
        self.labels.copy_(labels)
        if lr is not None:
            self.lr.fill_(lr)

    def check_data(self, num_classes: int, image_shape: Sequence[int]) -> None:
        """Refuse data whose images it could not hold.

        Raises:
            ValueError: for other classes or another shape.
        """
        own = (self.num_classes, tuple(self.images.shape[1:]))
        if own != (num_classes, tuple(image_shape)):
            raise ValueError(
                f"synthetic: expected {num_classes} classes of images {tuple(image_shape)} as in the data, got "
                f"{own[0]} of {own[1]}"
            )

    def by_class(self, tensor: Tensor) -> Tensor:
        """What belongs to the images a row a class, (N, ...) -> (K, ipc, ...)."""
        return tensor.unflatten(0, (self.num_classes, self.ipc))

    @torch.no_grad()
    def clamp_lr_(self) -> None:
        """Lift the step size to its floor: the authors' may turn negative, and then the inner loop climbs."""
        self.lr.clamp_(min=self.lr_floor)

    def extra_repr(self) -> str:
        return f"classes={self.num_classes}, ipc={self.ipc}, image_shape={tuple(self.images.shape[1:])}"
