"""What both callbacks of a distilled set ask of the module whose images are learned."""

from typing import Any

from lightning import LightningModule

from hasten.errors import HastenError
from hasten.nn.dataset_distillation.comparison import FewImages
from hasten.nn.dataset_distillation.synthetic import SyntheticSet


def check_synthetic(pl_module: LightningModule, owner: str, name: str) -> None:
    """Whether the module distils a data set.

    Raises:
        HastenError: where not; ``owner`` is the callback as its errors call it, ``name`` its class.
    """
    if not isinstance(getattr(pl_module, "synthetic", None), SyntheticSet):
        raise HastenError(
            f"{owner}: {type(pl_module).__name__}: expected an attribute synthetic with a SyntheticSet, got none; "
            f"add it or leave {name} out"
        )


def described(data: Any) -> dict[str, Any]:
    """What the datamodule, or the one it is built around, says of its images; nothing where it is someone else's."""
    real = data if hasattr(data, "description") else getattr(data, "data", None)
    return getattr(real, "description", dict)()


def few_images(pl_module: LightningModule) -> FewImages:
    """The set as it is now, on the CPU, in memory of its own."""
    synthetic: SyntheticSet = pl_module.synthetic  # type: ignore[assignment]
    images, labels, classes = (
        tensor.detach().to("cpu", copy=True) for tensor in (synthetic.images, synthetic.labels, synthetic.classes)
    )
    return FewImages(images.float(), labels.float(), classes, synthetic.lr.item())
