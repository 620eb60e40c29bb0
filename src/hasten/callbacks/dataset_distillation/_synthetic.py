"""What both callbacks of a distilled set ask of the module whose images are learned."""

from typing import cast

from lightning import LightningModule

from hasten.errors import HastenError
from hasten.nn.dataset_distillation.comparison import FewImages
from hasten.nn.dataset_distillation.synthetic import SyntheticSet
from hasten.nn.protocols import HasSynthetic


def check_synthetic(pl_module: LightningModule, owner: str, name: str) -> None:
    """Refuse a module that distils no data set.

    Raises:
        HastenError: where not; ``owner`` is the callback as its errors call it, ``name`` its class.
    """
    if not isinstance(getattr(pl_module, "synthetic", None), SyntheticSet):
        raise HastenError(
            f"{owner}: {type(pl_module).__name__}: expected an attribute synthetic with a SyntheticSet, got none; "
            f"add it or leave {name} out"
        )


def few_images(pl_module: LightningModule) -> FewImages:
    """The set as it is now, on the CPU, in memory of its own."""
    synthetic = cast(HasSynthetic, pl_module).synthetic
    images, labels, classes = (
        tensor.detach().to("cpu", copy=True) for tensor in (synthetic.images, synthetic.labels, synthetic.classes)
    )
    return FewImages(images.float(), labels.float(), classes, synthetic.lr.item())
