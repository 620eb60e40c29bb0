"""A datamodule around another one: its own training batches, and the other's images, labels and held-out splits."""

import inspect
from collections.abc import Sequence
from typing import Any

from lightning import LightningDataModule
from torch import Tensor

from hasten.errors import HastenError

_NEEDED = (
    "train_labels",
    "train_images",
    "num_classes",
    "class_names",
    "image_shape",
    "normalize",
    "denormalize",
    "pixels",
)


class AroundData(LightningDataModule):
    """What a datamodule knows of its real images, for one that trains on something else made of them.

    A subclass says in ``train_dataloader`` what it trains on. Validation and test are those of ``data``.

    Args:
        data: the datamodule of the real images.

    Raises:
        HastenError: where ``data`` cannot hand out its training images.

    Example:
        >>> from hasten.datamodules.digits import Digits
        >>> AroundData(Digits()).train_labels.shape
        torch.Size([1197])
    """

    def __init__(self, data: LightningDataModule):
        super().__init__()
        # asked of the class: an answer of the instance may read the whole data set
        missing = [name for name in _NEEDED if inspect.getattr_static(data, name, self) is self]
        if missing:
            raise HastenError(
                f"{type(self).__name__}: data: expected a datamodule with {', '.join(_NEEDED)}, "
                f"got {type(data).__name__} without {', '.join(missing)}"
            )
        self.data: Any = data

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer
        self.data.setup(stage)

    def teardown(self, stage: str) -> None:
        self.data.teardown(stage)

    def val_dataloader(self) -> Any:
        """That of the real images."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """That of the real images."""
        return self.data.test_dataloader()

    @property
    def train_labels(self) -> Tensor:
        """Of the real training images, (n,) int64."""
        return self.data.train_labels

    def train_images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Real training images without augmentation in the range of the model, (B,) -> (B, C, H, W)."""
        return self.data.train_images(indices)

    @property
    def num_classes(self) -> int:
        """Labels are 0 to num_classes - 1."""
        return self.data.num_classes

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels."""
        return self.data.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.data.image_shape

    @property
    def pixels(self) -> Any:
        """[0, 1] <-> the range of the model."""
        return self.data.pixels

    def normalize(self, images: Tensor) -> Tensor:
        """From [0, 1] to the range of the model, (..., C, H, W)."""
        return self.data.normalize(images)

    def denormalize(self, images: Tensor) -> Tensor:
        """From the range of the model to [0, 1], (..., C, H, W)."""
        return self.data.denormalize(images)
