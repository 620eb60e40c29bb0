"""CIFAR-10 and CIFAR-100, small colour photographs."""

from torchvision import datasets

from hasten.datamodules.downloads import DownloadedImages


class CIFAR10(DownloadedImages):
    """50,000 and 10,000 photographs of 10 classes, 32x32; the arguments are those of DownloadedImages.

    Example:
        >>> CIFAR10("data", flip=True, crop=4).image_shape
        (3, 32, 32)
    """

    name = "cifar10"
    _source = datasets.CIFAR10
    _folder = "cifar-10-batches-py"
    _files = "the unpacked files of cifar-10-python.tar.gz"
    _shape = (3, 32, 32)
    _num_classes = 10


class CIFAR100(DownloadedImages):
    """50,000 and 10,000 photographs of 100 classes, 32x32; the arguments are those of DownloadedImages.

    Example:
        >>> CIFAR100("data", flip=True, crop=4).num_classes
        100
    """

    name = "cifar100"
    _source = datasets.CIFAR100
    _folder = "cifar-100-python"
    _files = "the unpacked files of cifar-100-python.tar.gz"
    _shape = (3, 32, 32)
    _num_classes = 100
