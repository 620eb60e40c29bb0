"""LightningModules, one training recipe each."""

from hasten.modules.classification import Classification
from hasten.modules.diffusion import Diffusion
from hasten.modules.hypernetwork import HyperNetwork

__all__ = ["Classification", "Diffusion", "HyperNetwork"]
