"""ClassConsistency: does a small classifier read the drawn images as the classes that were asked for?"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor

from hasten.callbacks._logging import log_image
from hasten.callbacks._sampling import draw, publish, sampling, unit_range
from hasten.errors import HastenError
from hasten.formats.pictures import enlarged, tiled, write_png
from hasten.nn.protocols import GeneratesImages

_COLUMNS = 10  # of the picture


class Classifier(Protocol):
    """What scikit-learn's classifiers offer."""

    def fit(self, X: Any, y: Any) -> Any: ...

    def predict(self, X: Any) -> Any: ...


class ClassConsistency(Callback):
    """At the end of the fit, report the share of drawn images that a small classifier reads as their own class.

    The classifier learns the datamodule's training images, as flat pixels in [0, 1]. Logs ``sample/class_accuracy``
    and, as the ceiling to compare it with, ``sample/class_accuracy_real``: the same classifier on the real validation
    images. Under EMA the averaged weights draw. The share says whether conditioning works and images are legible; it
    does not see a lack of variety, which a Frechet distance does.

    Args:
        classifier: with scikit-learn's ``fit`` and ``predict``; None: ``sklearn.svm.SVC()``, good for small images.
        n_per_class: images drawn of each class, >= 1.
        folder: where class_consistency.png goes, a row a class with a red frame around what was misread; None: nowhere.
        max_real: so many training and so many validation images are read at most, >= 1: an SVM's time grows with
            their square.
        batch_size: images drawn at once, >= 1.
        seed: of the images drawn.

    Raises:
        ValueError: for a number out of its range.
        HastenError: at set-up, where the module has no ``generate()`` or the fit no datamodule.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ClassConsistency(n_per_class=50)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        classifier: Classifier | None = None,
        *,
        n_per_class: int = 20,
        folder: str | Path | None = None,
        max_real: int = 5000,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        for name, value in (("n_per_class", n_per_class), ("max_real", max_real), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"class_consistency: {name}: expected >= 1, got {value}")
        self.classifier = classifier
        self.n_per_class = n_per_class
        self.folder = None if folder is None else Path(folder)
        self.max_real = max_real
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, GeneratesImages):
            raise HastenError(
                f"class_consistency: {type(pl_module).__name__}: expected a method generate(n, labels, ...) that draws "
                "images, got none; add it or leave ClassConsistency out"
            )
        if getattr(pl_module, "num_classes", 0) is None:
            raise HastenError(
                f"class_consistency: {type(pl_module).__name__}: expected a module that draws by class, got "
                "num_classes = None; set it or leave ClassConsistency out"
            )
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            raise HastenError(
                "class_consistency: expected a datamodule with labelled train and val images, got plain loaders; pass "
                "one to fit(datamodule=...)"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not on_fit_end: by then Lightning has moved the module to the CPU
        to_unit, data = unit_range(trainer), trainer.datamodule  # type: ignore[attr-defined]
        with sampling(trainer, pl_module):
            images, labels = _read(data.train_dataloader(), self.max_real)
            classifier = (self.classifier or _support_vectors()).fit(_pixels(to_unit(images)), labels.numpy())
            real, real_labels = _read(data.val_dataloader(), self.max_real)
            wanted = labels.unique().repeat_interleave(self.n_per_class)
            batches = draw(pl_module, len(wanted), wanted, batch_size=self.batch_size, seed=self.seed)
            drawn = torch.cat([to_unit(batch) for batch in batches])
        hits = _hits(classifier, drawn, wanted)
        ceiling = _hits(classifier, to_unit(real), real_labels).float().mean()
        # each process has a classifier of its own, of its share of the real images
        mine = torch.stack([hits.float().mean(), ceiling]).to(pl_module.device)
        accuracy, ceiling = trainer.strategy.reduce(mine).tolist()
        publish(trainer, {"sample/class_accuracy": accuracy, "sample/class_accuracy_real": ceiling})
        pl_module.print(
            f"sample/class_accuracy {100 * accuracy:.1f} %   ({self.n_per_class} samples a class, read by a "
            f"{type(classifier).__name__} that reads {100 * ceiling:.1f} % of {len(real)} real validation images right)"
        )
        if self.folder is not None and trainer.is_global_zero:
            picture = _picture(drawn, hits, self.n_per_class)
            write_png(picture, self.folder / "class_consistency.png")
            log_image(trainer, "class_consistency", picture, trainer.global_step)


def _read(loader: Iterable[Any], limit: int) -> tuple[Tensor, Tensor]:
    """The first ``limit`` images and labels of a loader of (images, labels)."""
    images, labels, seen = [], [], 0
    for batch in loader:
        images.append(batch[0])
        labels.append(batch[1])
        seen += len(batch[0])
        if seen >= limit:
            break
    return torch.cat(images)[:limit], torch.cat(labels)[:limit]


def _support_vectors() -> Classifier:
    from sklearn.svm import SVC  # noqa: PLC0415 - a second of import for those who use it only

    return SVC()


def _pixels(images: Tensor) -> Any:
    return images.flatten(1).numpy()


def _hits(classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    return torch.as_tensor(classifier.predict(_pixels(images))) == labels


def _picture(drawn: Tensor, hits: Tensor, n_per_class: int) -> Tensor:
    """The first images of each class, a row a class, (3, height, width); a red frame around what was misread."""
    cells = enlarged(drawn.expand(-1, 3, -1, -1)).unflatten(0, (-1, n_per_class))[:, :_COLUMNS]
    missed = ~hits.view(-1, n_per_class)[:, :_COLUMNS, None, None, None]
    frame = torch.ones(cells.shape[-2:], dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    return tiled(torch.where(missed & frame, torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1), cells))
