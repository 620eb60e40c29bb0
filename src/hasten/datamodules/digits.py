"""Scikit-learn's handwritten digits, which need no download."""

from collections.abc import Sequence

import torch

from hasten.datamodules.images import ImageDataModule, Splits, TensorImages, resized


class Digits(ImageDataModule):
    """1,797 handwritten digits, 8x8 and grey, out of scikit-learn: real images for runs of a minute.

    Args:
        batch_size: images per batch and process, >= 1.
        val: images for validation, a number or a share below 1.
        test: images for testing, likewise; those of one ``split_seed`` do not depend on ``val``.
        image_size: side in pixels; the originals are 8x8.
        flip: mirror half of the training images.
        crop: shift training images by up to so many pixels.
        mean: see ImageDataModule, as the other arguments.

    Example:
        >>> data = Digits(batch_size=32)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    name = "digits"

    def __init__(
        self,
        batch_size: int = 64,
        *,
        val: int | float = 200,
        test: int | float = 400,
        image_size: int = 8,
        flip: bool = False,
        crop: int = 0,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        zca: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ):
        super().__init__(
            (1, image_size, image_size),
            num_classes=10,
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
        self._check_part("test", test)
        self._sizes(1797, test, val)
        self.val = val
        self.test = test

    def read(self) -> Splits:
        """The three splits of the 1,797 images."""
        from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second

        pixels, targets = load_digits(return_X_y=True)
        images = resized(torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, self.image_shape[1])
        labels = torch.from_numpy(targets).long()
        test, val, train = (
            TensorImages(images[part], labels[part], self.unwhitened)
            for part in self._carve(labels, self.test, self.val)
        )
        return Splits(train, val, test)
