"""ZCA whitening: pixels become uncorrelated and of like variance, while an image stays nearest to what it was."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

_LARGE = 8192
"""Dimensions from which a fit takes minutes: a matrix has half a GiB in double precision."""


def zca_fit(batches: Iterable[Tensor], *, lam: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), matrix (D, D) and its inverse, float32, of the images in ``batches`` (B, C, H, W), D = C H W.

    With S the covariance of the pixels, divided by n - 1, the matrix is (S + lam)^(-1/2). Sums and eigenvectors are
    float64; at 64x64 in colour each matrix of them has 1.1 GiB.

    Args:
        batches: of images in [0, 1] and of any sizes, read once.
        lam: added to the variances, > 0, so that directions of almost none do not become noise.

    Raises:
        ValueError: for fewer than two images, pixels that are not finite, or lam <= 0.

    Source: the usual whitening of CIFAR in data set distillation, as in arXiv:2203.11932.

    Example:
        >>> images = torch.rand(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> mean, matrix, inverse = zca_fit([images])
        >>> torch.allclose(matrix @ inverse, torch.eye(4), atol=1e-5)
        True
    """
    if not lam > 0:
        raise ValueError(f"zca: lam: expected > 0, got {lam}; 0.1 is usual")
    n, total, products = 0, torch.empty(0), torch.empty(0)
    for batch in batches:
        pixels = batch.flatten(1).double()
        if n == 0:
            dimensions = pixels.shape[1]
            if dimensions > _LARGE:
                _warn_of_size(dimensions)
            total, products = pixels.new_zeros(dimensions), pixels.new_zeros(dimensions, dimensions)
        n += len(pixels)
        total += pixels.sum(0)
        products.addmm_(pixels.T, pixels)
    if n < 2:
        raise ValueError(f"zca: expected at least 2 images, got {n}")
    mean = total / n
    # pixels in [0, 1] and float64: what the difference cancels is far below lam
    covariance = products.addr_(mean, mean, alpha=-n).div_(n - 1)
    if not covariance.isfinite().all():
        raise ValueError("zca: expected finite pixels, got some that are not")
    variances, directions = torch.linalg.eigh(covariance)
    scale = (variances.clamp(min=0) + lam).sqrt()
    matrix, inverse = ((directions * by) @ directions.T for by in (1 / scale, scale))
    return mean.float(), matrix.float(), inverse.float()


def zca_whiten(images: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """(x - mean) matrix, (..., C, H, W) -> (..., C, H, W).

    Example:
        >>> zca_whiten(torch.ones(1, 1, 2), torch.tensor([0.5, 1.0]), 2 * torch.eye(2))
        tensor([[[1., 0.]]])
    """
    return ((images.flatten(-3) - mean) @ matrix).view(images.shape)


def zca_colour(images: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Undo ``zca_whiten``, z inverse + mean, (..., C, H, W) -> (..., C, H, W).

    Example:
        >>> zca_colour(torch.tensor([[[1.0, 0.0]]]), torch.tensor([0.5, 1.0]), 0.5 * torch.eye(2))
        tensor([[[1., 1.]]])
    """
    return (images.flatten(-3) @ inverse + mean).view(images.shape)


def _warn_of_size(dimensions: int) -> None:
    gigabytes = dimensions**2 * 8 / 2**30
    warnings.warn(
        f"zca: {dimensions} pixels an image: each matrix of the fit has {gigabytes:.1f} GiB and the fit takes minutes; "
        f"smaller images are whitened at a fraction of that",
        stacklevel=3,
    )
