"""The range of the model: how pixels in [0, 1] become what a model sees and back, and how a file keeps that."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from hasten.functional.whitening import zca_colour, zca_fit, zca_whiten


@dataclass(frozen=True, eq=False)
class PixelRange:
    """[0, 1] <-> the range of the model, by one mean and one standard deviation a channel.

    Args:
        mean: becomes 0, () or (C, 1, 1).
        std: becomes 1, of the same shape.

    Example:
        >>> import torch
        >>> PixelRange(torch.tensor(0.5), torch.tensor(0.5)).normalize(torch.tensor([0.0, 1.0]))
        tensor([-1.,  1.])
    """

    mean: Tensor
    std: Tensor

    def normalize(self, images: Tensor) -> Tensor:
        """From [0, 1] to the range of the model."""
        return (images - self.mean.to(images)) / self.std.to(images)

    def denormalize(self, images: Tensor) -> Tensor:
        """From the range of the model to [0, 1]."""
        return images * self.std.to(images) + self.mean.to(images)

    def to_tensors(self) -> dict[str, Tensor]:
        """What ``pixels_from_tensors`` makes it of."""
        return {"mean": self.mean, "std": self.std}


@dataclass(frozen=True, eq=False)
class ZCA:
    """[0, 1] <-> whitened pixels, for images (..., C, H, W) of one size; D = C H W.

    Fitted once, on the training images, and kept with whatever was made in its range: a second fit is another range.

    Args:
        mean: becomes 0, (D,).
        matrix: what whitens, (D, D).
        inverse: of the matrix, (D, D).

    Example:
        >>> import torch
        >>> images = torch.rand(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> pixels = ZCA.fit([images])
        >>> torch.allclose(pixels.denormalize(pixels.normalize(images)), images, atol=1e-5)
        True
    """

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    @classmethod
    def fit(cls, batches: Iterable[Tensor], *, lam: float = 0.1) -> Self:
        """Of the training images in [0, 1], in batches (B, C, H, W)."""
        return cls(*zca_fit(batches, lam=lam))

    def normalize(self, images: Tensor) -> Tensor:
        """From [0, 1] to whitened."""
        return zca_whiten(images, self.mean.to(images), self.matrix.to(images))

    def denormalize(self, images: Tensor) -> Tensor:
        """From whitened to [0, 1]."""
        return zca_colour(images, self.mean.to(images), self.inverse.to(images))

    def to_tensors(self) -> dict[str, Tensor]:
        """What ``pixels_from_tensors`` makes it of."""
        return {"zca_mean": self.mean, "zca_matrix": self.matrix, "zca_inverse": self.inverse}


def pixels_from_tensors(tensors: Mapping[str, Tensor]) -> PixelRange | ZCA:
    """The range that ``to_tensors`` wrote; other tensors in the mapping are left alone.

    Raises:
        ValueError: where neither kind is there whole.

    Example:
        >>> import torch
        >>> pixels_from_tensors({"mean": torch.tensor(0.5), "std": torch.tensor(0.25)}).std
        tensor(0.2500)
    """
    if {"zca_mean", "zca_matrix", "zca_inverse"} <= tensors.keys():
        return ZCA(tensors["zca_mean"], tensors["zca_matrix"], tensors["zca_inverse"])
    if {"mean", "std"} <= tensors.keys():
        return PixelRange(tensors["mean"], tensors["std"])
    raise ValueError(
        f"pixels: expected mean and std, or zca_mean, zca_matrix and zca_inverse, "
        f"got {', '.join(sorted(tensors)) or 'nothing'}"
    )
