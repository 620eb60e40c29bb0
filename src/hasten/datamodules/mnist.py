"""MNIST, handwritten digits."""

from torchvision import datasets

from hasten.datamodules.downloads import DownloadedImages


class MNIST(DownloadedImages):
    """60,000 and 10,000 handwritten digits, 28x28 and grey; the arguments are those of DownloadedImages.

    Example:
        >>> MNIST("data", image_size=32, batch_size=64).image_shape
        (1, 32, 32)
    """

    name = "mnist"
    _source = datasets.MNIST
    _folder = "MNIST/raw"
    _files = "the four unpacked *-ubyte files"
    _shape = (1, 28, 28)
    _num_classes = 10
