"""LightningModules, one training recipe each."""

from hasten.modules.classification import Classification
from hasten.modules.diffusion import Diffusion
from hasten.modules.distribution_matching import DistributionMatching
from hasten.modules.expert_training import ExpertTraining
from hasten.modules.hypernetwork import HyperNetwork
from hasten.modules.trajectory_matching import TrajectoryMatching

__all__ = [
    "Classification",
    "Diffusion",
    "DistributionMatching",
    "ExpertTraining",
    "HyperNetwork",
    "TrajectoryMatching",
]
