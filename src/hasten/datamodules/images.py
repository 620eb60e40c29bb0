"""What the image datamodules share: the split, the loaders, the range of the pixels, the checks of their arguments."""

from abc import abstractmethod
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from hasten.datamodules.loader import EpochLoader
from hasten.errors import HastenError
from hasten.formats.pixels import ZCA, PixelRange

__all__ = ["Augmented", "ImageDataModule", "PixelRange", "Splits", "TensorImages", "resized", "stratified_order"]


@dataclass(frozen=True)
class Splits:
    """Three datasets of (image, label), each with all ``labels``, (N,) int64; ``val`` and ``test`` may be empty."""

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
        zca: whiten the pixels instead, as fitted on the training images; keeps all images in memory as float32.
        num_workers: processes per loader that read ahead, >= 0.
        seed: of the order of the training images and of their augmentation, >= 0.
        split_seed: of what is dealt to train, val and test, >= 0.

    Attributes:
        train_subset: () -> the training images that the next training loader shows, (m,) int64; None: all. A curriculum
            sets it.

    Example:
        >>> class Blank(ImageDataModule):
        ...     def read(self):
        ...         images = TensorImages(torch.zeros(9, 1, 4, 4), torch.arange(9) % 3, self.unwhitened)
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
        zca: bool = False,
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
        if zca and (flip or crop):
            raise HastenError(
                f"{self.name}: zca: expected flip=false and crop=0, which have no meaning for whitened pixels, "
                f"got flip={str(flip).lower()} and crop={crop}; augment by DSA"
            )
        if zca and not mean == std == 0.5:
            raise HastenError(
                f"{self.name}: zca: expected no mean and std beside it, got {mean} and {std}; leave them out"
            )
        if zca:
            mean, std = 0.0, 1.0
        self.unwhitened = PixelRange(self._per_channel("mean", mean, channels), self._per_channel("std", std, channels))
        if not (self.unwhitened.std > 0).all():
            raise HastenError(f"{self.name}: std: expected > 0, got {std}")
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.flip = flip
        self.crop = crop
        self.zca = zca
        self.num_workers = num_workers
        self.seed = seed
        self.split_seed = split_seed
        self.train_subset: Callable[[], Tensor] | None = None

    @abstractmethod
    def read(self) -> Splits:
        """The three datasets, from wherever they are kept, with images in the range ``self.unwhitened``."""

    @property
    def splits(self) -> Splits:
        """The three datasets in the range of the model, read at first use."""
        return self._ready[0]

    @property
    def pixels(self) -> PixelRange | ZCA:
        """[0, 1] <-> the range of the model; with ``zca`` the training images are read for it."""
        return self._ready[1] if self.zca else self.unwhitened

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels."""
        return [str(label) for label in range(self.num_classes)]

    @property
    def train_labels(self) -> Tensor:
        """Of the training images, (n,) int64; no image is read for it."""
        return self.splits.train.labels  # type: ignore[attr-defined]

    def train_images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Training images without augmentation in the range of the model, (B,) -> (B, C, H, W)."""
        return _gathered(self._plain_train(), torch.as_tensor(indices, dtype=torch.int64).tolist())

    def description(self) -> dict[str, Any]:
        """What a training run on the training images depends on, as JSON; reads a few images for it.

        ``split`` is a hash of the training labels and of 32 training images, evenly spread.
        """
        mean, std = (numbers.flatten().tolist() for numbers in (self.unwhitened.mean, self.unwhitened.std))
        return {
            "name": self.name,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            "split": self._split_hash(),
            # whitening is a function of the split; hashed itself, it would differ from machine to machine
            "transform": "zca" if self.zca else {"mean": mean, "std": std},
            "augmentation": {"flip": self.flip, "crop": self.crop},
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def train_dataloader(self) -> EpochLoader:
        """Shuffled and augmented."""
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return EpochLoader(
            self._augmented(self.splits.train),
            self.batch_size,
            shuffle=not overfits,  # the same few batches every epoch
            subset=None if self.train_subset is None else self.train_subset(),
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

    @cached_property
    def _ready(self) -> tuple[Splits, PixelRange | ZCA]:
        """The splits, and the range that their images are in."""
        splits = self.read()
        if not self.zca:
            return splits, self.unwhitened
        # in memory once and for all: a whitened image costs (C H W) ** 2 products, too many to repeat every epoch
        parts = [self._in_memory(part) for part in (splits.train, splits.val, splits.test)]
        pixels = ZCA.fit(parts[0].images.split(1024))
        for images in (images for part in parts for images in part.images.split(1024) if len(images)):
            images.copy_(pixels.normalize(images))
        return Splits(*parts), pixels

    def _in_memory(self, dataset: Any) -> "TensorImages":
        images = torch.empty(len(dataset), *self.image_shape)
        for part in torch.arange(len(dataset)).split(1024) if len(dataset) else ():
            images[part] = _gathered(dataset, part.tolist())
        labels = dataset.labels if len(dataset) else torch.empty(0, dtype=torch.int64)
        return TensorImages(images, labels, PixelRange(torch.tensor(0.0), torch.tensor(1.0)))

    def _plain_train(self) -> Sized:
        """The training images without any augmentation."""
        return self.splits.train

    def _split_hash(self) -> str:
        labels = self.train_labels
        images = self.denormalize(self.train_images(torch.linspace(0, len(labels) - 1, 32).long()))
        # 0.28: neither bytes nor the sixteenths of the digits come near an edge, where rounding errors would decide
        levels = (images * 255 + 0.28).floor().clamp(0, 255).to(torch.uint8)
        return sha256(labels.numpy().tobytes() + levels.numpy().tobytes()).hexdigest()[:12]

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
        """Refuse what is neither a number of images nor a share of them."""
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


def _gathered(dataset: Any, indices: list[int]) -> Tensor:
    """The images of ``dataset`` at ``indices``, (B, C, H, W)."""
    return dataset.batch(indices)[0] if hasattr(dataset, "batch") else torch.stack([dataset[i][0] for i in indices])


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
