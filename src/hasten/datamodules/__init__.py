"""LightningDataModules that share one loader, one split rule and one vocabulary."""

from hasten.datamodules.cifar import CIFAR10, CIFAR100
from hasten.datamodules.digits import Digits
from hasten.datamodules.image_folder import ImageFolder
from hasten.datamodules.images import ImageDataModule
from hasten.datamodules.loader import EpochLoader
from hasten.datamodules.mnist import MNIST

__all__ = ["CIFAR10", "CIFAR100", "MNIST", "Digits", "EpochLoader", "ImageDataModule", "ImageFolder"]
