import pytest
import torch
from lightning import LightningDataModule

from hasten.datamodules import MNIST, Digits
from hasten.datamodules.around import AroundData
from hasten.errors import HastenError


def test_it_answers_as_the_datamodule_that_it_is_around():
    data = Digits(mean=0.2, std=0.7)
    around = AroundData(data)
    indices = torch.tensor([3, 1, 1000])
    assert torch.equal(around.train_labels, data.train_labels)
    assert torch.equal(around.train_images(indices), data.train_images(indices))
    assert torch.equal(around.train_images([3, 1]), data.train_images(torch.tensor([3, 1])))
    assert (around.num_classes, around.class_names, around.image_shape) == (10, data.class_names, (1, 8, 8))
    assert around.pixels is data.pixels
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(around.normalize(images), data.normalize(images))
    assert torch.equal(around.denormalize(images), data.denormalize(images))


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_images_are_those_of_the_datamodule(split):
    data = Digits()
    ours, theirs = (getattr(each, f"{split}_dataloader")() for each in (AroundData(data), data))
    for (images, labels), (wanted, wanted_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, wanted) and torch.equal(labels, wanted_labels)


def test_the_datamodule_is_set_up_and_torn_down_with_it():
    class Noted(Digits):
        calls = []

        def prepare_data(self):
            self.calls.append("prepare")

        def setup(self, stage):
            self.calls.append(f"setup {stage} {self.trainer}")

        def teardown(self, stage):
            self.calls.append(f"teardown {stage}")

    around = AroundData(Noted())
    around.trainer = "the trainer"
    around.prepare_data()
    around.setup("fit")
    around.teardown("fit")
    assert around.data.calls == ["prepare", "setup fit the trainer", "teardown fit"]


def test_data_is_not_read_before_it_is_asked_for(tmp_path):
    AroundData(MNIST(root=tmp_path, download=False))


def test_a_datamodule_without_real_images_is_refused_in_one_line():
    class Bare(LightningDataModule):
        num_classes = 10

    with pytest.raises(HastenError, match=r"data: expected a datamodule with .*got Bare without train_labels") as error:
        AroundData(Bare())
    assert "\n" not in str(error.value)
