"""DistilledSet: train anything on a distilled set, and test it on the real images as the set sees them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from hasten.datamodules.images import TensorImages
from hasten.datamodules.loader import EpochLoader
from hasten.errors import HastenError
from hasten.formats.distilled import Distilled
from hasten.formats.pixels import ZCA, PixelRange


class DistilledSet(LightningDataModule):
    """The images of a distilled set to train on, real images to validate and test on, all in the range of the set.

    A training batch holds images (B, C, H, W) and targets: probabilities (B, K), which ``cross_entropy`` takes in the
    place of class numbers, or class numbers (B,) where the set's labels are hard. The real images leave the range of
    their own datamodule for the one that the set was distilled in, which is never fitted anew.

    Args:
        path: the folder that ``ExportDistilled`` wrote.
        batch_size: images a batch, >= 1.
        test: the datamodule of the real images; None: there is nothing to validate or test on.
        seed: of the order of the distilled images.

    Attributes:
        distilled: the set.

    Raises:
        HastenError: where there is no such set, or the real images or their split are others than its own.

    Example:
        >>> import tempfile
        >>> folder, plain = tempfile.mkdtemp(), PixelRange(torch.tensor(0.5), torch.tensor(0.5))
        >>> Distilled(torch.zeros(2, 1, 8, 8), torch.zeros(2, 2), torch.arange(2), 0.02, plain).write(folder)
        >>> images, targets = next(iter(DistilledSet(folder).train_dataloader()))
        >>> images.shape, targets[0]
        (torch.Size([2, 1, 8, 8]), tensor([0.5000, 0.5000]))
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 128,
        test: LightningDataModule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.distilled = Distilled.read(path)
        self.batch_size = batch_size
        self.test: Any = test
        self.seed = seed
        if test is not None:
            self._check_classes()

    def prepare_data(self) -> None:
        if self.test is not None:
            self.test.prepare_data()

    def setup(self, stage: str) -> None:
        if self.test is not None:
            self.test.trainer = self.trainer
            self.test.setup(stage)
            describe = getattr(self.test, "description", dict)
            self.distilled.check_made_of(describe(), owner="distilled_set")

    def teardown(self, stage: str) -> None:
        if self.test is not None:
            self.test.teardown(stage)

    def train_dataloader(self) -> EpochLoader:
        """The distilled images, shuffled."""
        distilled = self.distilled
        targets = distilled.hard_labels if distilled.has_hard_labels else distilled.label_logits.softmax(1)
        as_they_are = PixelRange(torch.tensor(0.0), torch.tensor(1.0))
        return EpochLoader(TensorImages(distilled.images, targets, as_they_are), self.batch_size, seed=self.seed)

    def val_dataloader(self) -> Any:
        """Real images in the range of the set; an empty list, which Lightning skips, where there are none."""
        return self._real("val")

    def test_dataloader(self) -> Any:
        """Likewise."""
        return self._real("test")

    @property
    def train_labels(self) -> Tensor:
        """Of the real training images, (n,) int64."""
        return self._data().train_labels

    def train_images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Real training images without augmentation in the range of the set, (B,) -> (B, C, H, W)."""
        return self._converted(self._data().train_images(indices))

    @property
    def num_classes(self) -> int:
        """Labels are 0 to num_classes - 1."""
        return self.distilled.num_classes

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels."""
        return list(self.distilled.about.get("classes") or map(str, range(self.num_classes)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.distilled.image_shape

    @property
    def pixels(self) -> PixelRange | ZCA:
        """[0, 1] <-> the range of the set."""
        return self.distilled.pixels

    def normalize(self, images: Tensor) -> Tensor:
        """From [0, 1] to the range of the set, (..., C, H, W)."""
        return self.pixels.normalize(images)

    def denormalize(self, images: Tensor) -> Tensor:
        """From the range of the set to [0, 1], (..., C, H, W)."""
        return self.pixels.denormalize(images)

    def _check_classes(self) -> None:
        for name in ("num_classes", "image_shape"):
            own, real = getattr(self.distilled, name), getattr(self.test, name)
            if own != real:
                raise HastenError(
                    f"distilled_set: test: expected {name} {own} as in {self.path}, got {real}; set data to that"
                )
        for own, real in zip(self.class_names, self.test.class_names, strict=True):
            if "classes" in self.distilled.about and own != real:
                raise HastenError(
                    f"distilled_set: test: expected the classes of {self.path}, got {real!r} for {own!r}; set data to "
                    "what was distilled"
                )

    def _data(self) -> Any:
        if self.test is None:
            raise HastenError("distilled_set: test: expected the datamodule of the real images, got none; set test")
        return self.test

    def _real(self, split: str) -> Any:
        loader = [] if self.test is None else getattr(self.test, f"{split}_dataloader")()
        return _Converted(loader, self._converted) if len(loader) else []

    def _converted(self, images: Tensor) -> Tensor:
        """From the range of the real images' datamodule to that of the set; to the last bit where it is the same."""
        data = self._data()
        return images if self.distilled.is_in_range(data.pixels) else self.normalize(data.denormalize(images))


class _Converted:
    """A loader of (images, labels) whose images pass through a function."""

    def __init__(self, loader: Any, convert: Any) -> None:
        self.loader = loader
        self.convert = convert

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.convert(images), labels) for images, labels in self.loader)
