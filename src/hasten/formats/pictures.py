"""Pictures that people look at: images as cells of a grid, names beside rows, figures as pixels, PNGs that are whole.

A picture is (3, height, width) in [0, 1].
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

from hasten.formats.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL_PX = 48
"""How wide an image is shown at the least; of smaller ones nobody would see what they are."""


def enlarged(images: Tensor, min_cell_px: int = CELL_PX) -> Tensor:
    """Repeat pixels until images are at least ``min_cell_px`` wide, (..., H, W) -> (..., k H, k W).

    Example:
        >>> import torch
        >>> enlarged(torch.zeros(1, 8, 8)).shape
        torch.Size([1, 48, 48])
    """
    factor = -(-min_cell_px // images.size(-1))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def tiled(images: Tensor) -> Tensor:
    """Lay images out with white gaps, (rows, columns, C, H, W) in [0, 1] -> (3, height, width).

    Example:
        >>> import torch
        >>> tiled(torch.zeros(2, 5, 1, 48, 48)).shape
        torch.Size([3, 102, 252])
    """
    return make_grid(images.flatten(0, 1), nrow=images.size(1), padding=2, pad_value=1.0)


def labelled(picture: Tensor, names: Sequence[str]) -> Tensor:
    """Write names left of rows that share the height of a picture, (3, height, width) -> the same, wider.

    Example:
        >>> import torch
        >>> picture = labelled(torch.zeros(3, 100, 50), ["ant", "bee"])
        >>> picture.size(1), picture.size(2) > 50
        (100, True)
    """
    font = ImageFont.load_default()
    boxes = [font.getbbox(name) for name in names]
    width = math.ceil(max(right for _, _, right, _ in boxes)) + 6
    strip = Image.new("RGB", (width, picture.size(1)), "white")
    for row, (name, (_, top, right, bottom)) in enumerate(zip(names, boxes, strict=True)):
        middle = (row + 0.5) * picture.size(1) / len(names)
        ImageDraw.Draw(strip).text((width - 3 - right, middle - (top + bottom) / 2), name, fill="black", font=font)
    return torch.cat([pil_to_tensor(strip).to(picture) / 255, picture], dim=2)


def range_within(pixels: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Where pixels lie that are no further than ``std`` standard deviations from their mean: the lowest, the highest.

    For images whose pixels were themselves optimised: they stray far beyond it.

    Example:
        >>> import torch
        >>> range_within(torch.tensor([0.0, 1.0, 2.0]), 2.0)
        (tensor(-1.), tensor(3.))
    """
    return pixels.mean() - std * pixels.std(), pixels.mean() + std * pixels.std()


def stretched(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Bring ``low`` to 0 and ``high`` to 1, and clamp what is beyond: any shape -> the same.

    Example:
        >>> import torch
        >>> stretched(torch.tensor([0.0, 3.0, 9.0]), torch.tensor(1.0), torch.tensor(5.0))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return ((images - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches that draws into memory, whatever backend the user has chosen; for ``drawn``.

    Example:
        >>> new_figure(4, 3).get_size_inches().tolist()
        [4.0, 3.0]
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - only those who draw wait for it
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # becomes the figure's canvas
    return figure


def drawn(figure: "Figure") -> Tensor:
    """The pixels of a ``new_figure``, 100 an inch.

    Example:
        >>> drawn(new_figure(2, 1)).shape
        torch.Size([3, 100, 200])
    """
    canvas = figure.canvas
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)  # type: ignore[attr-defined]
    width, height = canvas.get_width_height()
    return pixels.view(height, width, 4)[..., :3].permute(2, 0, 1).float() / 255


def write_png(picture: Tensor, path: Path) -> None:
    """Write a picture as a PNG that is whole at any moment; viewers may have it open.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp(), "black.png")
        >>> write_png(torch.zeros(3, 8, 8), path)
        >>> path.exists()
        True
    """
    with whole_file(path) as unfinished:
        save_image(picture, unfinished)
