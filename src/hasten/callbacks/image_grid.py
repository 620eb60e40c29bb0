"""ImageGrid: what the module draws, as pictures on disk and in the logger, every so many steps."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor

from hasten.callbacks._logging import log_files, log_image
from hasten.callbacks._sampling import sampling
from hasten.errors import HastenError
from hasten.formats.pictures import CELL_PX, enlarged, labelled, range_within, stretched, tiled, write_png
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
        min_cell_px: int = CELL_PX,
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
            low, high = range_within(torch.cat([shown[name].flatten() for name in stray]), self.clip_std)
            shown |= {name: stretched(shown[name], low, high) for name in stray}
        return {name: images.clamp(0, 1) for name, images in shown.items()}
