import pytest
import torch
from lightning import Trainer
from torch import nn

from hasten.datamodules import Digits, DistilledSet
from hasten.errors import HastenError
from hasten.formats import Distilled
from hasten.formats.pixels import ZCA, PixelRange
from hasten.functional.matching import hard_logits
from hasten.modules import Classification

OTHER = PixelRange(torch.tensor(0.25), torch.tensor(0.125))
HALF = PixelRange(torch.tensor([0.5]).view(1, 1, 1), torch.tensor([0.5]).view(1, 1, 1))


def write(folder, pixels=OTHER, classes=10, size=8, names=None):
    labels = torch.arange(classes)
    images, logits = torch.randn(classes, 1, size, size), torch.randn(classes, classes)
    Distilled(images, logits, labels, 0.05, pixels, {"classes": names}).write(folder)
    return folder


def test_training_batches_are_the_images_with_the_probabilities_of_their_labels(tmp_path):
    data = DistilledSet(write(tmp_path), batch_size=4)
    seen = torch.cat([images for images, _ in data.train_dataloader()])
    targets = torch.cat([labels for _, labels in DistilledSet(tmp_path, batch_size=4).train_dataloader()])
    order = [int((data.distilled.images == image).all((1, 2, 3)).nonzero()) for image in seen]
    assert sorted(order) == list(range(10)) != order
    torch.testing.assert_close(targets, data.distilled.label_logits.softmax(1)[order])


def test_hard_labels_are_class_numbers(tmp_path):
    Distilled(torch.zeros(4, 1, 8, 8), hard_logits(torch.arange(4), 4), torch.arange(4), 0.1, OTHER).write(tmp_path)
    _, targets = next(iter(DistilledSet(tmp_path).train_dataloader()))
    assert targets.dtype == torch.int64
    assert targets.sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pixels", [OTHER, ZCA.fit([torch.rand(100, 1, 8, 8)])])
def test_real_images_come_in_the_range_of_the_set(tmp_path, pixels):
    digits = Digits()
    data = DistilledSet(write(tmp_path, pixels), test=digits)
    for split in ("val_dataloader", "test_dataloader"):
        (images, labels), (real, same) = (next(iter(getattr(each, split)())) for each in (data, digits))
        torch.testing.assert_close(images, pixels.normalize(digits.denormalize(real)))
        assert torch.equal(labels, same)
    shown, real = (each.denormalize(each.train_images([3, 1])) for each in (data, digits))
    torch.testing.assert_close(shown, real, atol=1e-5, rtol=0)
    assert torch.equal(data.train_labels, digits.train_labels)


def test_in_the_same_range_real_images_are_the_same_to_the_last_bit(tmp_path):
    digits = Digits()
    data = DistilledSet(write(tmp_path, HALF), test=digits)
    assert torch.equal(next(iter(data.val_dataloader()))[0], next(iter(digits.val_dataloader()))[0])


@pytest.mark.parametrize(("settings", "key"), [({"split_seed": 1}, "split"), ({"test": 300}, "split")])
def test_real_images_of_another_split_are_refused_and_in_another_range_are_not(tmp_path, settings, key):
    set_ = Distilled.read(write(tmp_path)).with_about({"data": Digits().description()})
    set_.write(tmp_path)
    DistilledSet(tmp_path, test=Digits(std=0.25, batch_size=7)).setup("test")
    with pytest.raises(HastenError, match=rf"^distilled_set: expected .* differ in {key} .*split_seed$"):
        DistilledSet(tmp_path, test=Digits(**settings)).setup("test")


def test_without_real_images_there_is_nothing_to_validate_on(tmp_path):
    data = DistilledSet(write(tmp_path, classes=3))
    assert data.val_dataloader() == data.test_dataloader() == []
    assert (data.num_classes, data.image_shape, data.class_names) == (3, (1, 8, 8), ["0", "1", "2"])
    with pytest.raises(HastenError, match="expected the datamodule of the real images, got none"):
        data.train_images([0])


def test_any_classifier_trains_on_it(tmp_path):
    data = DistilledSet(write(tmp_path), test=Digits(batch_size=200))
    module = Classification(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        lambda groups: torch.optim.SGD(groups, lr=0.1),
        num_classes=10,
    )
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert {"train/loss", "val/acc"} <= trainer.callback_metrics.keys()


def test_other_real_images_are_refused_in_one_line(tmp_path):
    with pytest.raises(
        HastenError, match=r"^distilled_set: test: expected image_shape \(1, 9, 9\) as in .*, got \(1, 8"
    ):
        DistilledSet(write(tmp_path / "larger", size=9), test=Digits())
    with pytest.raises(HastenError, match=r"expected num_classes 3 as in .*, got 10"):
        DistilledSet(write(tmp_path / "fewer", classes=3), test=Digits())
    with pytest.raises(HastenError, match=r"expected the classes of .*, got '3' for 'three'"):
        DistilledSet(write(tmp_path / "named", names=[*"012", "three", *"456789"]), test=Digits())
