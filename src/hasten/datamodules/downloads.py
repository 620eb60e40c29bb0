"""Datasets that torchvision downloads and that fit into memory; mnist.py and cifar.py say which."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from torch import Tensor

from hasten.datamodules.images import ImageDataModule, Splits, TensorImages, resized
from hasten.errors import HastenError


class DownloadedImages(ImageDataModule):
    """A dataset of torchvision with a train and a test part; validation images are taken out of the train part.

    Args:
        root: the folder below which torchvision keeps its datasets.
        download: fetch the files where they are not whole.
        batch_size: images per batch and process, >= 1.
        val: training images kept for validation; a number, or a share below 1.
        image_size: side in pixels to resize to, >= 1; default: as they are.
        flip: mirror half of the training images.
        crop: shift training images by up to so many pixels.
        mean: this and the rest as in ImageDataModule.
    """

    _source: ClassVar[Callable[..., Any]]
    _folder: ClassVar[str]
    """Where ``_source`` looks for its files, below ``root``."""
    _files: ClassVar[str]
    """What belongs there, in words."""
    _shape: ClassVar[tuple[int, int, int]]
    _num_classes: ClassVar[int]

    def __init__(
        self,
        root: str | Path = "data",
        *,
        download: bool = True,
        batch_size: int = 128,
        val: int | float = 5000,
        image_size: int | None = None,
        flip: bool = False,
        crop: int = 0,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        zca: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ):
        channels, size, _ = self._shape
        size = size if image_size is None else image_size
        super().__init__(
            (channels, size, size),
            self._num_classes,
            batch_size=batch_size,
            flip=flip,
            crop=crop,
            mean=mean,
            std=std,
            zca=zca,
            num_workers=num_workers,
            seed=seed,
            split_seed=split_seed,
        )
        self._check_part("val", val)
        self.root = Path(root).expanduser()
        self.download = download
        self.val = val

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels, as torchvision has them."""
        return list(self._open(train=False).classes)

    def prepare_data(self) -> None:
        """Download what is not there; one process at a time, also where several nodes share ``root``."""
        if not self.download:
            return
        try:
            self._open(train=True)
        except HastenError:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{self.name}.lock"):
                self._open(train=True, download=True)

    def read(self) -> Splits:
        """Train and test part in memory, the validation images out of the train part."""
        images, labels = self._tensors(train=True)
        val, train = self._carve(labels, self.val)
        return Splits(
            train=TensorImages(images[train], labels[train], self.unwhitened),
            val=TensorImages(images[val], labels[val], self.unwhitened),
            test=TensorImages(*self._tensors(train=False), self.unwhitened),
        )

    def _tensors(self, *, train: bool) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) uint8 and labels (N,) int64 of one part."""
        part = self._open(train=train)
        images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return resized(images, self.image_shape[1]), labels

    def _open(self, *, train: bool, download: bool = False) -> Any:
        where = self.root / self._folder
        try:
            part = self._source(self.root, train=train, download=download)
            if len(part.data) != len(part.targets):
                raise ValueError(f"{len(part.data)} images and {len(part.targets)} labels")
        except Exception as error:  # torchvision names a broken file by half a dozen exceptions
            reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
            remedy = "connect to the network" if self.download else "set download=true"
            raise HastenError(
                f"{self.name}: expected {self._files} in {str(where)!r}, got no whole copy ({reason}); "
                f"delete what is broken there, then {remedy} or put them there yourself"
            ) from error
        return part
