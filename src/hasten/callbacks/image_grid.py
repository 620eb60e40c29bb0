"""ImageGrid: what the module draws, as pictures on disk and in the logger, every so many steps."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image

from hasten.callbacks._logging import log_files, log_image
from hasten.callbacks._sampling import sampling
from hasten.errors import HastenError
from hasten.formats import whole_file
from hasten.nn.protocols import HasPictures


class ImageGrid(Callback):
    """Draw the module's ``pictures()`` every ``every_n_steps`` optimizer steps and at the end of the fit.

    Each picture becomes ``<folder>/<name>_<step>.png`` and ``<folder>/<name>.png``, always the latest, and an image
    in Weights & Biases or TensorBoard where that logger is on; with ``hasten.loggers.wandb`` the last ones are an
    artifact "pictures" too. A picture with a row for each of the datamodule's ``class_names`` has these beside it.
    Under EMA the averaged weights draw. Training does not notice: evaluation mode, no gradients, random state as
    before.

    Args:
        folder: where the pictures go; made if missing.
        every_n_steps: optimizer steps between two drawings, >= 1.
        clip_std: show pixels within so many standard deviations of their mean, stretched to [0, 1]; for images whose
            pixels were themselves optimised, and stray. All pictures of a step share one range, so that they compare.
            None: pixels as they are.
        unclipped: names of pictures that ``clip_std`` leaves alone, as maps.
        min_cell_px: smaller images are enlarged by a whole factor until they are at least so wide, >= 1.

    Raises:
        ValueError: for a number out of its range.
        HastenError: at set-up, where the module has no ``pictures()``.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ImageGrid("pictures", every_n_steps=500)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_n_steps: int,
        clip_std: float | None = None,
        unclipped: Collection[str] = (),
        min_cell_px: int = 48,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("min_cell_px", min_cell_px)):
            if value < 1:
                raise ValueError(f"image_grid: {name}: expected >= 1, got {value}")
        if clip_std is not None and not clip_std > 0:
            raise ValueError(f"image_grid: clip_std: expected > 0 or None, got {clip_std}; 2.5 is usual")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.clip_std = clip_std
        self.unclipped = unclipped
        self.min_cell_px = min_cell_px
        self._drawn_at = 0
        self._names: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(pl_module, HasPictures):
            raise HastenError(
                f"image_grid: {type(pl_module).__name__}: expected a method pictures() that returns name -> (rows, "
                "columns, C, H, W) in [0, 1], got none; add it or leave ImageGrid out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module)
        if trainer.is_global_zero and self._names:
            log_files(trainer, "pictures", {f"{name}.png": self.folder / f"{name}.png" for name in self._names})

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step == self._drawn_at:
            return  # a batch of an accumulated step, or the last step
        self._drawn_at = step
        # on every process, though one writes: a sharded module draws together or not at all
        with sampling(trainer, pl_module):
            pictures = cast(HasPictures, pl_module).pictures()
        if trainer.is_global_zero:
            class_names = getattr(trainer.datamodule, "class_names", ())  # type: ignore[attr-defined]
            for name, images in self._pixels(pictures).items():
                image = tiled(enlarged(images, self.min_cell_px))
                if len(images) == len(class_names):
                    image = labelled(image, class_names)
                write_png(image, self.folder / f"{name}_{step:06d}.png")
                write_png(image, self.folder / f"{name}.png")
                log_image(trainer, name, image, step)
            self._names = list(pictures)

    def _pixels(self, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is shown of the module's pictures, each (rows, columns, C, H, W) in [0, 1]."""
        for name, images in pictures.items():
            if images.ndim != 5 or images.size(2) not in (1, 3):
                raise HastenError(
                    f"image_grid: pictures()[{name!r}]: expected (rows, columns, C, H, W) with C = 1 or 3, got "
                    f"{tuple(images.shape)}"
                )
        shown = {name: images.detach().float().cpu() for name, images in pictures.items()}
        stray = [name for name in shown if name not in self.unclipped]
        if self.clip_std is not None and stray:
            pixels = torch.cat([shown[name].flatten() for name in stray])
            low, high = (pixels.mean() + sign * self.clip_std * pixels.std() for sign in (-1, 1))
            shown |= {name: (shown[name] - low) / (high - low).clamp(min=1e-8) for name in stray}
        return {name: images.clamp(0, 1) for name, images in shown.items()}


def enlarged(images: Tensor, min_cell_px: int = 48) -> Tensor:
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


def labelled(image: Tensor, names: Sequence[str]) -> Tensor:
    """Write names left of rows that share the height of an image, (3, height, width) in [0, 1] -> the same, wider.

    Example:
        >>> import torch
        >>> image = labelled(torch.zeros(3, 100, 50), ["ant", "bee"])
        >>> image.size(1), image.size(2) > 50
        (100, True)
    """
    font = ImageFont.load_default()
    boxes = [font.getbbox(name) for name in names]
    width = math.ceil(max(right for _, _, right, _ in boxes)) + 6
    strip = Image.new("RGB", (width, image.size(1)), "white")
    for row, (name, (_, top, right, bottom)) in enumerate(zip(names, boxes, strict=True)):
        middle = (row + 0.5) * image.size(1) / len(names)
        ImageDraw.Draw(strip).text((width - 3 - right, middle - (top + bottom) / 2), name, fill="black", font=font)
    return torch.cat([pil_to_tensor(strip).to(image) / 255, image], dim=2)


def write_png(image: Tensor, path: Path) -> None:
    """Write (3, height, width) in [0, 1] as a PNG that is whole at any moment; viewers may have it open.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp(), "black.png")
        >>> write_png(torch.zeros(3, 8, 8), path)
        >>> path.exists()
        True
    """
    with whole_file(path) as unfinished:
        save_image(image, unfinished)
