"""LightningModules, one training recipe each."""

from hasten.modules.classification import Classification
from hasten.modules.diffusion import Diffusion

__all__ = ["Classification", "Diffusion"]
