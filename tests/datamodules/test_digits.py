import pytest
import torch
from sklearn.datasets import load_digits

from hasten.datamodules import Digits
from hasten.errors import HastenError


def test_the_splits_have_the_sizes_asked_for():
    splits = Digits().splits
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [1197, 200, 400]
    shares = Digits(val=0.1, test=0.2).splits
    assert [len(part) for part in (shares.train, shares.val, shares.test)] == [1258, 180, 359]


def test_every_split_has_all_digits_in_near_equal_numbers():
    splits = Digits().splits
    assert all(39 <= count <= 41 for count in splits.test.labels.bincount())
    assert all(19 <= count <= 21 for count in splits.val.labels.bincount())
    assert len(splits.train.labels.bincount()) == 10


def test_each_image_is_in_one_split_with_its_own_label():
    data, digits = Digits(val=100, test=100), load_digits()
    found = {}
    for part in (data.splits.train, data.splits.val, data.splits.test):
        for image, label in zip(part.images, part.labels, strict=True):
            found.setdefault((image * 16).int().flatten().numpy().tobytes(), []).append(int(label))
    expected = {}
    for image, label in zip(digits.images, digits.target, strict=True):
        expected.setdefault(torch.from_numpy(image).int().flatten().numpy().tobytes(), []).append(int(label))
    assert found == expected


def test_the_test_images_do_not_depend_on_the_validation_images():
    assert torch.equal(Digits(val=0).splits.test.images, Digits(val=300).splits.test.images)


def test_pixels_span_the_range_of_the_model():
    images = torch.cat([images for images, _ in Digits().train_dataloader()])
    assert (images.min(), images.max()) == (-1, 1)
    assert Digits().denormalize(images).unique().tolist() == [i / 16 for i in range(17)]


def test_without_validation_images_there_is_no_validation_loader():
    assert Digits(val=0).val_dataloader() == []
    assert Digits(test=0).test_dataloader() == []


def test_images_can_be_larger_than_the_originals():
    small, large = Digits(), Digits(image_size=16)
    assert large.image_shape == (1, 16, 16) and large.splits.train.images.shape == (1197, 1, 16, 16)
    mean = large.splits.train.images.mean((1, 2, 3)) - small.splits.train.images.mean((1, 2, 3))
    assert mean.abs().max() < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": -1}, "digits: val: expected an int >= 0, got -1"),
        ({"test": 1.5}, r"digits: test: expected a number of images or a share in \[0, 1\), got 1.5"),
        ({"val": 1000, "test": 797}, "digits: expected some of 1797 images left for training"),
        ({"image_size": 0}, "digits: image_size: expected an int >= 1, got 0"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(HastenError, match=message):
        Digits(**options)
