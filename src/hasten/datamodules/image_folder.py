"""Images on disk, one folder per class."""

import re
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

from hasten.datamodules.images import ImageDataModule, Splits
from hasten.errors import HastenError

Transform = Callable[[Image.Image], Tensor]


class ImageFolder(ImageDataModule):
    """Images under ``root/train/<class>/``, and under ``root/val`` and ``root/test`` where there are such folders.

    Without ``root/val``, validation images are taken out of the training images; without ``root/test`` there is no
    test. Classes are numbered in the alphabetical order of their folders in ``root/train``.

    Args:
        root: the folder with ``train``.
        image_size: side in pixels; images are resized until the shorter side has it, and cut at the centre.
        channels: 3 for colour, 1 for grey.
        batch_size: images per batch and process, >= 1.
        val: training images kept for validation where there is no ``root/val``; a number, or a share below 1.
        flip: mirror half of the training images.
        crop: shift training images by up to so many pixels.
        test: the folder of the test images; "val" for data sets whose test labels are not given out, as ImageNet's.
        train_transform: from a PIL image to the (C, H, H) float32 that the model is trained on, in place of resizing,
            cutting and normalizing; e.g. what ``timm.data.create_transform(is_training=True, ...)`` returns.
        eval_transform: likewise, for validation and test. ``mean`` and ``std`` must be those of the transforms.
        mean: this and the rest as in ImageDataModule.

    Example:
        >>> import tempfile
        >>> cats = Path(tempfile.mkdtemp(), "train", "cat")
        >>> cats.mkdir(parents=True)
        >>> Image.new("RGB", (60, 40)).save(cats / "1.png")
        >>> data = ImageFolder(cats.parents[1], image_size=32, val=0)
        >>> [images.shape for images, labels in data.train_dataloader()]
        [torch.Size([1, 3, 32, 32])]
    """

    name = "image_folder"

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int,
        channels: int = 3,
        batch_size: int = 64,
        val: int | float = 0.1,
        flip: bool = False,
        crop: int = 0,
        test: str = "test",
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        zca: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ):
        self.root = Path(root).expanduser()
        self.classes = self._folders("train")
        super().__init__(
            (channels, image_size, image_size),
            len(self.classes),
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
        if channels not in (1, 3):
            raise HastenError(f"{self.name}: channels: expected 1 for grey or 3 for colour, got {channels!r}")
        if zca and not (train_transform is None and eval_transform is None):
            raise HastenError(f"{self.name}: zca: expected no train_transform and eval_transform beside it, got some")
        self._check_part("val", val)
        self.val = val
        self.test = test
        squared = self._squared
        self.train_transform = squared if train_transform is None else train_transform
        self.eval_transform = squared if eval_transform is None else eval_transform
        for part in ("val", test):
            self._check_classes(part)

    @property
    def class_names(self) -> list[str]:
        """The names of the folders, in the order of the labels."""
        return self.classes

    def description(self) -> dict[str, Any]:
        """As of every ImageDataModule, with ``train_transform`` in words."""
        described = super().description()
        if self.train_transform != self._squared:
            # without the address of a function, which is another one in every process
            words = re.sub(r" at 0x[0-9a-f]+", "", repr(self.train_transform))
            described["augmentation"] |= {"train_transform": words}
        return described

    def read(self) -> Splits:
        """The files of each split; the images are read when they are asked for."""
        train, val, test = (self._files(part) for part in ("train", "val", self.test))
        if not (self.root / "val").exists():
            labels = torch.tensor([label for _, label in train])
            val, train = ([train[index] for index in part.tolist()] for part in self._carve(labels, self.val))
        mode = "L" if self.image_shape[0] == 1 else "RGB"
        return Splits(
            FileImages(train, mode, self.train_transform),
            FileImages(val, mode, self.eval_transform),
            FileImages(test, mode, self.eval_transform),
        )

    def _plain_train(self) -> Sized:
        train = self.splits.train
        return FileImages(train.files, train.mode, self.eval_transform) if isinstance(train, FileImages) else train

    def _squared(self, image: Image.Image) -> Tensor:
        """The whole of the shorter side, the middle of the longer one, in the range of the model."""
        size = self.image_shape[1]
        square = v2.CenterCrop(size)(v2.Resize(size)(image))
        return self.unwhitened.normalize(v2.functional.pil_to_tensor(square).float() / 255)

    def _folders(self, part: str) -> list[str]:
        """The names of the classes in ``part``."""
        folder = self.root / part
        entries = list(folder.iterdir()) if folder.is_dir() else []
        if names := sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."):
            return names
        raise HastenError(
            f"{self.name}: root: expected a folder per class in {str(folder)!r}, got "
            f"{'none' if folder.is_dir() else 'no such folder'}; root is the folder that holds 'train'"
        )

    def _check_classes(self, part: str) -> None:
        if (self.root / part).exists() and (strange := set(self._folders(part)) - set(self.classes)):
            raise HastenError(
                f"{self.name}: expected only classes of 'train' in {str(self.root / part)!r}, got {min(strange)!r}; "
                f"rename or delete it"
            )

    def _files(self, part: str) -> list[tuple[str, int]]:
        """Path and label of every image of ``part``; none where there is no such folder."""
        folder = self.root / part
        if not folder.exists():
            return []
        numbers = {name: self.classes.index(name) for name in self._folders(part)}
        files = make_dataset(folder, numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
        if empty := set(numbers.values()) - {label for _, label in files}:
            raise HastenError(
                f"{self.name}: expected images in {str(folder / self.classes[min(empty)])!r}, got none that end in "
                f"{' '.join(IMG_EXTENSIONS)}; add some or delete the folder"
            )
        return files


class FileImages(Dataset[Any]):
    """Images in files, read one by one.

    Args:
        files: path and label of each.
        mode: Pillow's name of what the transform gets: "L" for grey, "RGB" for colour.
        transform: from a PIL image to a tensor.
    """

    def __init__(self, files: list[tuple[str, int]], mode: str, transform: Transform):
        self.files = files
        self.mode = mode
        self.transform = transform

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return torch.tensor([label for _, label in self.files], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as file:
                image = file.convert(self.mode)
        except Exception as error:  # Pillow names a broken file by half a dozen exceptions
            raise HastenError(f"image_folder: cannot read {path!r} ({error}); replace or delete it") from error
        return self.transform(image), label
