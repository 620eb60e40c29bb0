"""LightningDataModules that share one loader, one split rule and one vocabulary."""

from hasten.datamodules.cifar import CIFAR10, CIFAR100
from hasten.datamodules.class_batches import ClassBatches
from hasten.datamodules.digits import Digits
from hasten.datamodules.distilled_set import DistilledSet
from hasten.datamodules.expert_trajectories import ExpertTrajectories
from hasten.datamodules.image_folder import ImageFolder
from hasten.datamodules.imagenet_subset import ImageNetSubset, imagenet_indices
from hasten.datamodules.images import ImageDataModule
from hasten.datamodules.loader import EpochLoader
from hasten.datamodules.mnist import MNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "ClassBatches",
    "Digits",
    "DistilledSet",
    "EpochLoader",
    "ExpertTrajectories",
    "ImageDataModule",
    "ImageFolder",
    "ImageNetSubset",
    "imagenet_indices",
]
