"""What is learned, matched and measured in dataset distillation; public names are re-exported from ``hasten.nn``."""

from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.nn.dataset_distillation.masks import DepthMask, LossQuantileMask

__all__ = ["DepthMask", "FlatModel", "LossQuantileMask"]
