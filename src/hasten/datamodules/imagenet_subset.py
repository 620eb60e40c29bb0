"""Classes of ImageNet-1k, by the name of a published subset or by a list of one's own."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from hasten.datamodules.image_folder import FileImages, ImageFolder
from hasten.datamodules.images import Splits, TensorImages
from hasten.errors import HastenError, did_you_mean

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images."""


class ImageNetSubset(ImageFolder):
    """Some classes of a local ImageNet-1k: trains on ``root/train/<class>/``, is tested on ``root/val/<class>/``.

    Labels are 0 to K - 1 in the order of the subset's list. The folders are named by wnid (``n01440764``) or by index
    (``0``, ``000``). Validation images are taken out of the training images, so that nothing is chosen by the test.

    Args:
        root: the folder with ``train`` and, for a test, ``val``.
        subset: a name: imagenette, imagewoof, imagemeow, imagesquawk, imagefruit, imageyellow, in1k_cifar10, or one of
            Comp-DD's, birds|cars|dogs|fish|snake|insect|round|music _ easy|hard; or wnids and indices; or None for
            every folder in ``root/train``, which then need not be of ImageNet.
        image_size: side in pixels.
        fit: "squash" resizes both sides, as the literature on data set distillation does; "crop" resizes the shorter
            one and cuts at the centre.
        val: training images kept for validation; a number, or a share below 1. The test is on ``root/val``.
        in_memory: read every image once, 49 kB each at 128 pixels; False for hundreds of classes.
        batch_size: images per batch and process, >= 1.
        flip: mirror half of the training images.
        mean: None: ImageNet's; this and the rest as in ImageDataModule.

    Source: Comp-DD, EDF, arXiv:2410.17193; Imagenette and Imagewoof, fast.ai; the other five, MTT, arXiv:2203.11932.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for wnid in ("n01440764", "n02102040"):
        ...     (root / "train" / wnid).mkdir(parents=True)
        >>> ImageNetSubset(root, [0, "n02102040"]).class_names
        ['tench', 'English springer']
    """

    name = "imagenet_subset"

    def __init__(
        self,
        root: str | Path,
        subset: str | Sequence[str | int] | None,
        *,
        image_size: int = 128,
        fit: Literal["squash", "crop"] = "squash",
        val: int | float = 0.1,
        in_memory: bool = True,
        batch_size: int = 256,
        flip: bool = False,
        crop: int = 0,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        zca: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ):
        if fit not in _FITS:
            raise HastenError(f"{self.name}: fit: got {fit!r}{did_you_mean(str(fit), _FITS)}")
        self._subset = _subset(subset)
        self.fit = fit
        self.in_memory = in_memory
        usual_mean, usual_std = (0.5, 0.5) if zca else (_MEAN, _STD)  # whitening is instead of them
        super().__init__(
            root,
            image_size=image_size,
            batch_size=batch_size,
            val=val,
            flip=flip,
            crop=crop,
            test="val",
            mean=usual_mean if mean is None else mean,
            std=usual_std if std is None else std,
            zca=zca,
            num_workers=num_workers,
            seed=seed,
            split_seed=split_seed,
        )

    @property
    def wnids(self) -> list[str]:
        """Of the classes, in label order; where no subset is named, the names of the folders."""
        return self.classes if self._subset is None else [known.wnid for known in self._subset.classes]

    @property
    def class_names(self) -> list[str]:
        """In words, likewise."""
        return self.classes if self._subset is None else [known.name for known in self._subset.classes]

    @property
    def imagenet_indices(self) -> list[int]:
        """Label -> index among the 1,000 classes: what a net trained on ImageNet-1k is asked for.

        Raises:
            HastenError: for a folder that is no class of ImageNet-1k.
        """
        classes = map(_imagenet_class, self.wnids) if self._subset is None else self._subset.classes
        return [known.index for known in classes]

    @property
    def released_indices(self) -> list[int]:
        """The list as its authors released it, which in music_hard names a class twice."""
        return self.imagenet_indices if self._subset is None else list(self._subset.released_indices)

    def description(self) -> dict[str, Any]:
        """As of every ImageDataModule, with how the images were made square."""
        return super().description() | {"fit": self.fit}

    def read(self) -> Splits:
        """Training, validation and test images; the latter are ImageNet's validation images."""
        files = self._files("train")
        val, train = self._carve(torch.tensor([label for _, label in files]), self.val)
        parts = [[files[index] for index in part.tolist()] for part in (train, val)]
        return Splits(*(self._images(part) for part in (*parts, self._files("val"))))

    def _images(self, files: list[tuple[str, int]]) -> TensorImages | FileImages:
        if not self.in_memory:
            return FileImages(files, "RGB", self._squared)
        images = torch.empty(len(files), *self.image_shape, dtype=torch.uint8)
        for index, pixels in enumerate(_read_ahead(FileImages(files, "RGB", self._pixels))):
            images[index] = pixels
        return TensorImages(images, torch.tensor([label for _, label in files], dtype=torch.int64), self.unwhitened)

    def _squared(self, image: Image.Image) -> Tensor:
        return self.unwhitened.normalize(self._pixels(image).float() / 255)

    def _pixels(self, image: Image.Image) -> Tensor:
        return v2.functional.pil_to_tensor(_FITS[self.fit](image, self.image_shape[1]))

    def _folders(self, part: str) -> list[str]:
        folder = self.root / part
        if self._subset is None or not folder.is_dir():
            return super()._folders(part)
        names = [_folder_of(known, folder) for known in self._subset.classes]
        if missing := [known for known, name in zip(self._subset.classes, names, strict=True) if name is None]:
            raise HastenError(
                f"{self.name}: root: expected a folder {missing[0].wnid!r} or '{missing[0].index}' "
                f"({missing[0].name}) in {str(folder)!r}, got none; {len(missing)} of the {len(names)} classes are "
                "missing there, and train and val hold a folder for each"
            )
        return [name for name in names if name is not None]


def imagenet_indices(subset: str | Sequence[str | int]) -> list[int]:
    """Label -> index among the 1,000 classes, for the classes of a subset: what a net of ImageNet-1k is asked for.

    Args:
        subset: as of ``ImageNetSubset``.

    Example:
        >>> imagenet_indices("imagenette")
        [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    """
    known = _subset(subset)
    return [] if known is None else [each.index for each in known.classes]


# ------------------------------------------------------------------ classes


@dataclass(frozen=True)
class _Class:
    index: int
    wnid: str
    name: str


@dataclass(frozen=True)
class _Subset:
    classes: Sequence[_Class]
    """In label order."""
    released_indices: Sequence[int]


def _subset(wanted: str | Sequence[str | int] | None) -> _Subset | None:
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return _published_subset(wanted)
    classes = [_imagenet_class(key) for key in wanted]
    if again := [known for number, known in enumerate(classes) if known in classes[:number]]:
        raise HastenError(f"imagenet_subset: subset: expected every class once, got {again[0].wnid} twice; delete one")
    if len(classes) < 2:
        raise HastenError(f"imagenet_subset: subset: expected at least two classes, got {len(classes)}")
    return _Subset(classes, [known.index for known in classes])


def _published_subset(name: str) -> _Subset:
    category, _, difficulty = name.partition("_")
    plural = f"{category}s_{difficulty}"  # bird_hard: the authors' prose has the singular, their code the plural
    subsets = _published()
    if found := subsets.get(name) or subsets.get(plural):
        return found
    remedy = did_you_mean(name, subsets) or f"; choose one of: {', '.join(subsets)}, or list wnids"
    raise HastenError(f"imagenet_subset: subset: got {name!r}{remedy}")


@cache
def _published() -> dict[str, _Subset]:
    facts = json.loads(files("hasten").joinpath("datamodules", "imagenet_subsets.json").read_text(encoding="utf-8"))
    return {
        name: _Subset([_Class(*entry) for entry in subset["classes"]], subset["released_indices"])
        for name, subset in (facts["comp_dd"] | facts["imagenet_subsets"]).items()
    }


def _imagenet_class(key: str | int) -> _Class:
    """The class with a wnid or an index."""
    classes = _imagenet()
    if isinstance(key, int) and 0 <= key < len(classes):
        return classes[key]
    for known in classes:
        if known.wnid == key:
            return known
    raise HastenError(
        f"imagenet_subset: subset: expected wnids such as 'n01440764' or indices in 0..{len(classes) - 1} of "
        f"ImageNet-1k, got {key!r}"
    )


@cache
def _imagenet() -> list[_Class]:
    from timm.data import ImageNetInfo  # noqa: PLC0415 - seconds of import for those who name classes themselves

    known = ImageNetInfo()
    return [
        _Class(index, wnid, known.index_to_description(index).split(",")[0])
        for index, wnid in enumerate(known.label_names())
    ]


def _folder_of(known: _Class, folder: Path) -> str | None:
    """How ``folder`` names a class, or None where it lacks it."""
    names = (known.wnid, f"{known.index}", f"{known.index:03d}", f"{known.index:04d}")
    return next((name for name in names if (folder / name).is_dir()), None)


# ------------------------------------------------------------------ images


def _squash(image: Image.Image, size: int) -> Image.Image:
    return v2.Resize([size, size])(image)


def _crop(image: Image.Image, size: int) -> Image.Image:
    return v2.CenterCrop(size)(v2.Resize(size)(image))


_FITS = {"squash": _squash, "crop": _crop}


def _read_ahead(images: FileImages) -> Iterator[Tensor]:
    """Every image in order, decoded in threads; with a bar, since thousands of photographs take a minute."""
    from rich import get_console  # noqa: PLC0415 - for those who read images into memory only
    from rich.progress import track  # noqa: PLC0415

    unseen = not get_console().is_terminal
    pool = ThreadPoolExecutor()
    try:
        read: Any = pool.map(lambda index: images[index][0], range(len(images)))
        yield from track(read, "reading images", total=len(images), transient=True, disable=unseen)
    finally:
        pool.shutdown(cancel_futures=True)
