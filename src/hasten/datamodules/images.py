"""What the image datamodules share: the split, the loaders, the range of the pixels, the checks of their arguments."""

from abc import abstractmethod
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from hasten.datamodules.loader import EpochLoader
from hasten.errors import HastenError


@dataclass(frozen=True)
class Splits:
    """Three datasets of (image, label); ``val`` and ``test`` may be empty."""

    train: Sized
    val: Sized
    test: Sized


class ImageDataModule(LightningDataModule):
    """Images with class labels in three splits; a subclass says in ``read`` where they come from.

    Every batch is a tuple: images (B, C, H, W) float32 in the range of the model, labels (B,) int64. The splits depend
    on ``split_seed`` alone, so that runs with different ``seed`` are tested on the same images.

    Args:
        image_shape: (C, H, W), with H = W.
        num_classes: labels are 0 to num_classes - 1.
        batch_size: images per batch and process, >= 1.
        flip: mirror half of the training images.
        crop: pad training images with so many pixels of black and cut their size out of that anywhere; 0 <= crop < H.
        mean: subtracted from pixels in [0, 1]; a number, or one per channel.
        std: what they are divided by then, > 0; with 0.5 for both the model sees [-1, 1].
        num_workers: processes per loader that read ahead, >= 0.
        seed: of the order of the training images and of their augmentation, >= 0.
        split_seed: of what is dealt to train, val and test, >= 0.

    Example:
        >>> class Blank(ImageDataModule):
        ...     def read(self):
        ...         images = TensorImages(torch.zeros(9, 1, 4, 4), torch.arange(9) % 3, self.pixels)
        ...         return Splits(train=images, val=images, test=images)
        >>> len(Blank((1, 4, 4), 3, batch_size=2).train_dataloader())
        5
    """

    name = "images"
    """How the module is called in its error messages."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        batch_size: int = 64,
        flip: bool = False,
        crop: int = 0,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ):
        super().__init__()
        channels, size, _ = image_shape
        self._check_int("image_size", size, at_least=1)
        self._check_int("batch_size", batch_size, at_least=1)
        self._check_int("crop", crop, at_least=0)
        self._check_int("num_workers", num_workers, at_least=0)
        self._check_int("seed", seed, at_least=0)
        self._check_int("split_seed", split_seed, at_least=0)
        if crop >= size:
            raise HastenError(f"{self.name}: crop: expected less than the {size} pixels of an image, got {crop}")
        self.pixels = PixelRange(self._per_channel("mean", mean, channels), self._per_channel("std", std, channels))
        if not (self.pixels.std > 0).all():
            raise HastenError(f"{self.name}: std: expected > 0, got {std}")
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.flip = flip
        self.crop = crop
        self.num_workers = num_workers
        self.seed = seed
        self.split_seed = split_seed

    @abstractmethod
    def read(self) -> Splits:
        """The three datasets, from wherever they are kept."""

    @cached_property
    def splits(self) -> Splits:
        """The three datasets, read at first use."""
        return self.read()

    def train_dataloader(self) -> EpochLoader:
        """Shuffled and augmented."""
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return EpochLoader(
            self._augmented(self.splits.train),
            self.batch_size,
            shuffle=not overfits,  # the same few batches every epoch
            seed=self.seed,
            num_workers=self.num_workers,
            pin_memory=self._on_gpu(),
            steps_per_epoch=self._steps_per_epoch,
        )

    def val_dataloader(self) -> EpochLoader | list[Any]:
        """In the order of the data; an empty list, which Lightning skips, where there is nothing to validate on."""
        return self._in_order(self.splits.val)

    def test_dataloader(self) -> EpochLoader | list[Any]:
        """In the order of the data; an empty list, which Lightning skips, where there is nothing to test on."""
        return self._in_order(self.splits.test)

    def normalize(self, images: Tensor) -> Tensor:
        """From [0, 1] to the range of the model, (..., C, H, W)."""
        return self.pixels.normalize(images)

    def denormalize(self, images: Tensor) -> Tensor:
        """From the range of the model to [0, 1], (..., C, H, W)."""
        return self.pixels.denormalize(images)

    def _augmented(self, dataset: Sized) -> Sized:
        steps: list[Any] = []
        if self.crop:
            black = self.normalize(torch.zeros(self.image_shape[0], 1, 1)).flatten().tolist()
            steps.append(v2.RandomCrop(self.image_shape[1:], padding=self.crop, fill=black))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        return Augmented(dataset, v2.Compose(steps)) if steps else dataset

    def _in_order(self, dataset: Sized) -> EpochLoader | list[Any]:
        if len(dataset) == 0:
            return []
        workers = self.num_workers
        return EpochLoader(dataset, self.batch_size, shuffle=False, num_workers=workers, pin_memory=self._on_gpu())

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _steps_per_epoch(self) -> int | float:
        trainer = self.trainer
        return trainer.num_training_batches if trainer is not None and trainer.training else float("inf")

    def _carve(self, labels: Tensor, *parts: int | float) -> list[Tensor]:
        """Deal the indices of ``labels`` (N,) into ``parts`` and a rest, each with the classes in equal measure.

        Args:
            labels: of all images.
            parts: numbers of images, or where they are floats shares of all.
        """
        sizes = self._sizes(len(labels), *parts)
        order = stratified_order(labels, seed=self.split_seed)
        return [part.sort().values for part in order.split([*sizes, len(labels) - sum(sizes)])]

    def _sizes(self, total: int, *parts: int | float) -> list[int]:
        """``parts`` of ``total`` images as numbers, if they leave some."""
        sizes = [round(part * total) if isinstance(part, float) else part for part in parts]
        if sum(sizes) >= total:
            raise HastenError(
                f"{self.name}: expected some of {total} images left for training, "
                f"got {' + '.join(map(str, sizes))} taken out; lower val or test"
            )
        return sizes

    def _check_int(self, key: str, value: Any, *, at_least: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise HastenError(f"{self.name}: {key}: expected an int >= {at_least}, got {value!r}")

    def _check_part(self, key: str, value: Any) -> None:
        """Whether ``value`` is a number of images, or a share of them."""
        if not isinstance(value, float):
            self._check_int(key, value, at_least=0)
        elif not 0 <= value < 1:
            raise HastenError(f"{self.name}: {key}: expected a number of images or a share in [0, 1), got {value}")

    def _per_channel(self, key: str, value: float | Sequence[float], channels: int) -> Tensor:
        try:
            numbers = torch.tensor(value, dtype=torch.float32).view(-1, 1, 1)
        except (TypeError, ValueError):
            numbers = torch.empty(0)
        if len(numbers) not in (1, channels):
            raise HastenError(f"{self.name}: {key}: expected a number, or {channels} for the channels, got {value!r}")
        return numbers


@dataclass(frozen=True, eq=False)
class PixelRange:
    """[0, 1] <-> the range of the model.

    Args:
        mean: becomes 0, () or (C, 1, 1).
        std: becomes 1, of the same shape.

    Example:
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


class TensorImages(Dataset[Any]):
    """Images in memory, handed out by whole batches.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1].
        labels: (N,) int64.
        pixels: the range of the model.

    Example:
        >>> plain = PixelRange(torch.tensor(0.0), torch.tensor(1.0))
        >>> TensorImages(torch.zeros(3, 1, 2, 2), torch.arange(3), plain).batch([2, 0])[1]
        tensor([2, 0])
    """

    def __init__(self, images: Tensor, labels: Tensor, pixels: PixelRange):
        self.images = images
        self.labels = labels
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batch([index])
        return images[0], labels[0]

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32 in the range of the model, labels (B,)."""
        images = self.images[indices]
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return self.pixels.normalize(images), self.labels[indices]


class Augmented(Dataset[Any]):
    """(image, label) of another dataset, each image changed by ``transform``, which may draw at random.

    Example:
        >>> Augmented([(1, "label")], transform=lambda image: image + 1)[0]
        (2, 'label')
    """

    def __init__(self, dataset: Any, transform: Any):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = self.dataset[index]
        return self.transform(image), label


def resized(images: Tensor, size: int) -> Tensor:
    """Square images in another size, (N, C, H, H) -> (N, C, size, size).

    Example:
        >>> resized(torch.zeros(5, 1, 8, 8), 16).shape
        torch.Size([5, 1, 16, 16])
    """
    return v2.functional.resize(images, [size, size], antialias=True)


def stratified_order(labels: Tensor, *, seed: int) -> Tensor:
    """A random order in which the classes are spread evenly, labels (N,) -> indices (N,).

    Each class has its share of the first n samples, whatever n is, to within one sample.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[stratified_order(labels, seed=0)][:3].tolist().count(1)
        1
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = labels[shuffled] == label
        count = int(members.sum())
        place[members] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return shuffled[place.argsort(stable=True)]
