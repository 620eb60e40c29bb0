"""DSA, differentiable Siamese augmentation: one operation a batch, its numbers drawn in advance as values.

Images are normalised, so nothing here clamps, and what moves in from outside is 0. Gradients flow through every
operation, second derivatives too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hasten.errors import did_you_mean


@dataclass(frozen=True, eq=False)
class Draw:
    """An operation of DSA and its numbers, to be applied as often as one likes.

    Args:
        op: its name.
        values: what it takes, in the order of its function in this file; each (B,), or (1,) for all images alike.

    Example:
        >>> Draw("rotate", (torch.tensor([10.0, -5.0]),)).op
        'rotate'
    """

    op: str
    values: tuple[Tensor, ...]


def dsa_draw(ops: Sequence[str], batch: int, size: int, *, share: str = "sample", generator: Generator) -> Draw:
    """One of ``ops``, each as likely, and its numbers for ``batch`` images of ``size`` x ``size``.

    Args:
        ops: names out of ``DSA_OPS``.
        batch: B.
        size: H = W of the images, >= 1.
        share: "sample": each image has its own numbers; "batch": all have the same, whatever their number.
        generator: on the CPU.

    Raises:
        ValueError: for no operation, one that there is not, or another ``share``.

    Source: Dataset Condensation with Differentiable Siamese Augmentation, arXiv:2102.08259.

    Example:
        >>> draw = dsa_draw(["crop"], batch=3, size=8, generator=torch.Generator().manual_seed(0))
        >>> draw.op, [shift.shape for shift in draw.values]
        ('crop', [torch.Size([3]), torch.Size([3])])
    """
    if len(ops) == 0:
        raise ValueError(f"dsa: ops: expected at least one of {', '.join(DSA_OPS)}, got none; leave out dsa instead")
    if unknown := [op for op in ops if op not in DSA_OPS]:
        raise ValueError(
            f"dsa: ops: expected names of operations, got {unknown[0]!r}{did_you_mean(unknown[0], DSA_OPS)}"
        )
    if share not in ("sample", "batch"):
        raise ValueError(f"dsa: share: expected 'sample' or 'batch', got {share!r}")
    op = ops[int(torch.randint(len(ops), (), generator=generator))]
    return Draw(op, _OPS[op][0](batch if share == "sample" else 1, size, generator))


def dsa(images: Tensor, draw: Draw) -> Tensor:
    """The images as ``draw`` changes them, (B, C, H, W) -> (B, C, H, W).

    Raises:
        ValueError: where ``draw`` is for another number of images.

    Example:
        >>> dsa(torch.tensor([[[[1.0, 2.0]]]]), Draw("flip", (torch.tensor([True]),)))
        tensor([[[[2., 1.]]]])
    """
    drawn = len(draw.values[0])
    if drawn not in (1, len(images)):
        raise ValueError(f"dsa: expected the {drawn} images that the draw is for, got {len(images)}; draw anew")
    values = (value.to(images.device) for value in draw.values)
    return _OPS[draw.op][1](images, *values)


def _draw_color(batch: int, size: int, generator: Generator) -> tuple[Tensor, ...]:
    brightness, saturation, contrast = torch.rand(3, batch, generator=generator)
    return brightness - 0.5, 2 * saturation, contrast + 0.5


def _color(images: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    images = images + _per_image(brightness, images)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + _per_image(saturation, images) * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + _per_image(contrast, images) * (images - mean)


def _draw_crop(batch: int, size: int, generator: Generator) -> tuple[Tensor, ...]:
    reach = int(0.25 * size + 0.5)
    down, right = torch.randint(-reach, reach + 1, (2, batch), generator=generator)
    return down, right


def _crop(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Row i becomes row i + down of the old image, column j its column j + right."""
    batch, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) + down.expand(batch)[:, None]
    columns = torch.arange(width, device=images.device) + right.expand(batch)[:, None]
    inside = _inside(rows, height)[:, :, None] & _inside(columns, width)[:, None, :]
    number = torch.arange(batch, device=images.device)[:, None, None]
    # the slice between the indices puts the channels last
    moved = images[number, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return moved.permute(0, 3, 1, 2) * inside[:, None].to(images.dtype)


def _draw_cutout(batch: int, size: int, generator: Generator) -> tuple[Tensor, ...]:
    side = _cutout_side(size)
    row, column = torch.randint(size - side % 2 + 1, (2, batch), generator=generator)
    return row, column


def _cutout(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Zero a square centred at (row, column), or what of it lies in the image."""
    height, width = images.shape[2:]
    side = _cutout_side(height)
    rows = torch.arange(height, device=images.device) - (row - side // 2)[:, None]
    columns = torch.arange(width, device=images.device) - (column - side // 2)[:, None]
    hole = _inside(rows, side)[:, None, :, None] & _inside(columns, side)[:, None, None, :]
    return images * (~hole).to(images.dtype)


def _draw_flip(batch: int, size: int, generator: Generator) -> tuple[Tensor, ...]:
    return (torch.rand(batch, generator=generator) < 0.5,)


def _flip(images: Tensor, mirrored: Tensor) -> Tensor:
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _draw_scale(batch: int, size: int, generator: Generator) -> tuple[Tensor, ...]:
    most = 1.2
    across, down = torch.rand(2, batch, generator=generator) * (most - 1 / most) + 1 / most
    return across, down


def _scale(images: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Sample the images at ``across`` and ``down`` times their coordinates, so that more than 1 shrinks them."""
    zero = torch.zeros_like(across)
    return _resampled(images, torch.stack([across, zero, zero, zero, down, zero], dim=1))


def _draw_rotate(batch: int, size: int, generator: Generator) -> tuple[Tensor, ...]:
    return ((torch.rand(batch, generator=generator) - 0.5) * 2 * 15,)


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    cos, sin, zero = degrees.deg2rad().cos(), degrees.deg2rad().sin(), torch.zeros_like(degrees)
    return _resampled(images, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1))


_OPS: dict[str, tuple[Callable[[int, int, Generator], tuple[Tensor, ...]], Callable[..., Tensor]]] = {
    "color": (_draw_color, _color),
    "crop": (_draw_crop, _crop),
    "cutout": (_draw_cutout, _cutout),
    "flip": (_draw_flip, _flip),
    "scale": (_draw_scale, _scale),
    "rotate": (_draw_rotate, _rotate),
}
"""Name -> its numbers for (batch, size, generator), and the images changed by them."""

DSA_OPS = tuple(_OPS)
"""The operations of DSA: color, crop, cutout, flip, scale, rotate."""


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.to(images.dtype)[:, None, None, None]


def _inside(places: Tensor, size: int) -> Tensor:
    return (places >= 0) & (places < size)


def _cutout_side(size: int) -> int:
    return int(0.5 * size + 0.5)


def _resampled(images: Tensor, matrices: Tensor) -> Tensor:
    """Bilinear, at the places that ``matrices`` (B, 6) or (1, 6), rows of a 2x3 affine matrix, send the pixels to."""
    matrices = matrices.to(images.dtype).view(-1, 2, 3).expand(len(images), -1, -1)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=True)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=True)
