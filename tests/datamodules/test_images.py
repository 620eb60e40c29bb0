import json
import pickle
from collections import Counter
from itertools import chain

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import Dataset

from hasten.datamodules import Digits, ImageDataModule
from hasten.datamodules.images import Augmented, PixelRange, Splits, TensorImages, stratified_order
from hasten.errors import HastenError
from hasten.formats import ZCA
from hasten.functional import zca_fit, zca_whiten


class Numbered(ImageDataModule):
    """30 grey images of 4x4, each filled with its own value in [0, 1]; 20 to train."""

    name = "numbered"

    def read(self):
        images = (torch.arange(30) / 30).view(-1, 1, 1, 1).expand(-1, *self.image_shape)
        parts = [
            TensorImages(images[part], torch.arange(30)[part], self.unwhitened)
            for part in self._carve(self.labels, 5, 5)
        ]
        return Splits(train=parts[2], val=parts[0], test=parts[1])

    labels = torch.arange(30) % 3


def numbered(**options):
    return Numbered((1, 4, 4), 3, **{"batch_size": 8} | options)


class Watching(LightningModule):
    """Notes the labels of the batches it is trained, validated and tested on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch):
        self.seen["train"].append(batch[1].tolist())
        return self.layer(batch[0].flatten(1)).mean()

    def validation_step(self, batch):
        self.seen["val"].append(batch[1].tolist())

    def test_step(self, batch):
        self.seen["test"].append(batch[1].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


# ------------------------------------------------------------------ splits


@pytest.mark.parametrize("counts", [[10, 10, 10], [30, 5, 1], [7, 7, 3]])
def test_every_beginning_of_a_stratified_order_has_each_class_in_its_share(counts):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    order = stratified_order(labels, seed=0)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for n in range(len(labels) + 1):
        found = Counter(labels[order[:n]].tolist())
        for label, count in enumerate(counts):
            assert abs(found[label] - n * count / len(labels)) <= 1


def test_a_stratified_order_is_a_function_of_the_seed():
    labels = torch.arange(40) % 4
    orders = [stratified_order(labels, seed=seed).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_the_splits_are_disjoint_and_follow_the_split_seed_alone():
    def split(**options):
        splits = numbered(**options).splits
        return [sorted(part.labels.tolist()) for part in (splits.train, splits.val, splits.test)]

    train, val, test = split()
    assert sorted(train + val + test) == list(range(30))
    assert (len(train), len(val), len(test)) == (20, 5, 5)
    assert split(seed=3, batch_size=2, num_workers=2) == [train, val, test]
    assert split(split_seed=1) != [train, val, test]


def test_splits_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(HastenError, match=r"numbered: expected some of 30 images left .* got 10 \+ 20 taken out"):
        numbered()._carve(Numbered.labels, 10, 20)


# ------------------------------------------------------------------ range


def test_the_default_range_is_minus_one_to_one():
    data = numbered()
    assert data.normalize(torch.tensor([0.0, 0.5, 1.0])[:, None, None]).flatten().tolist() == [-1, 0, 1]


def test_normalizing_uses_the_numbers_of_each_channel_and_can_be_undone():
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    data = ImageDataModule((3, 4, 4), 2, mean=mean, std=std)
    images = torch.rand(5, 3, 4, 4)
    expected = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(data.normalize(images), expected)
    torch.testing.assert_close(data.denormalize(data.normalize(images)), images)


def test_bytes_and_floats_become_the_same_batch():
    pixels = PixelRange(torch.tensor(0.5), torch.tensor(0.5))
    raw = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(6)
    by_bytes, by_floats = TensorImages(raw, labels, pixels), TensorImages(raw / 255, labels, pixels)
    images, chosen = by_bytes.batch([4, 1])
    assert images.dtype == torch.float32 and chosen.tolist() == [4, 1]
    torch.testing.assert_close(images, by_floats.batch([4, 1])[0])
    torch.testing.assert_close(images[0], raw[4].float() / 127.5 - 1)
    torch.testing.assert_close(by_bytes[4][0], images[0])


# ------------------------------------------------------------------ loaders


def test_batches_are_tuples_of_float_images_and_int_labels():
    for batches in (numbered().train_dataloader(), numbered(crop=1).train_dataloader(), numbered().val_dataloader()):
        batch = next(iter(batches))
        assert isinstance(batch, tuple)
        assert batch[0].dtype == torch.float32 and batch[0].shape[1:] == (1, 4, 4)
        assert batch[1].dtype == torch.int64 and batch[1].shape == batch[0].shape[:1]


def test_training_is_shuffled_and_evaluation_is_not():
    data = numbered()
    labels = [label for _, labels in data.train_dataloader() for label in labels.tolist()]
    assert sorted(labels) == data.splits.train.labels.sort().values.tolist() != labels
    for batches, part in ((data.val_dataloader(), data.splits.val), (data.test_dataloader(), data.splits.test)):
        assert torch.equal(torch.cat([labels for _, labels in batches]), part.labels)


def test_only_training_images_are_augmented():
    data = numbered(flip=True, crop=2)
    assert isinstance(data.train_dataloader().dataset, Augmented)
    assert data.val_dataloader().dataset is data.splits.val
    assert data.test_dataloader().dataset is data.splits.test


def test_cropping_moves_black_in_from_the_sides():
    data = ImageDataModule((3, 4, 4), 2, crop=1, mean=[0.2, 0.4, 0.6], std=[0.5, 0.5, 0.5])
    white = TensorImages(torch.ones(50, 3, 4, 4), torch.zeros(50, dtype=torch.int64), data.pixels)
    images = data.denormalize(torch.stack([data._augmented(white)[i][0] for i in range(50)]))
    torch.testing.assert_close(images, images.round())
    kinds = {tuple(image[0].sum(dim).tolist()) for image in images.round().int() for dim in (0, 1)}
    assert kinds == {(4, 4, 4, 4), (3, 3, 3, 3), (0, 4, 4, 4), (4, 4, 4, 0), (0, 3, 3, 3), (3, 3, 3, 0)}


def test_flipping_mirrors_some_images_left_to_right():
    data = numbered(flip=True)
    ramp = torch.arange(4.0).expand(1, 4, 4) / 4
    flipped = Augmented([(ramp, 0)] * 40, data._augmented(data.splits.train).transform)
    rows = {tuple(flipped[i][0][0, 0].tolist()) for i in range(40)}
    assert rows == {(0, 0.25, 0.5, 0.75), (0.75, 0.5, 0.25, 0)}


def test_augmentation_is_a_function_of_seed_and_epoch_with_and_without_workers():
    def epochs(**options):
        batches = Digits(val=0, test=1700, crop=2, flip=True, **options).train_dataloader()
        return [torch.cat([images for images, _ in batches]) for _ in range(2)]

    first, second = epochs()
    again = epochs(num_workers=2)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, epochs(seed=1)[0])


def test_the_datasets_can_be_sent_to_other_processes():
    dataset = numbered(flip=True, crop=1).train_dataloader().dataset
    assert len(pickle.loads(pickle.dumps(dataset))) == 20


# ------------------------------------------------------------------ under Lightning


def test_a_trainer_trains_validates_and_tests_on_the_right_images():
    data, module, runner = numbered(), Watching(), trainer(max_epochs=1)
    runner.fit(module, data)
    runner.test(module, data, verbose=False)
    for part, batches in module.seen.items():
        assert sorted(chain(*batches)) == sorted(getattr(data.splits, part).labels.tolist())


def test_empty_splits_are_skipped():
    class Trained(Numbered):
        def read(self):
            return Splits(train=super().read().train, val=(), test=())

    data, module, runner = Trained((1, 4, 4), 3, batch_size=8), Watching(), trainer(max_epochs=1)
    runner.fit(module, data)
    runner.test(module, data, verbose=False)
    assert len(module.seen["train"]) == 3 and not module.seen["val"] and not module.seen["test"]


def test_overfitting_sees_the_same_batches_every_epoch():
    module = Watching()
    trainer(max_epochs=3, overfit_batches=2).fit(module, numbered())
    epochs = [module.seen["train"][start : start + 2] for start in (0, 2, 4)]
    assert epochs[0] == epochs[1] == epochs[2]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_run_with_limited_batches_resumes_where_it_was(tmp_path, steps):
    def fit(max_steps, ckpt_path=None):
        module, runner = Watching(), trainer(max_steps=max_steps, limit_train_batches=2)
        runner.fit(module, numbered(), ckpt_path=ckpt_path, weights_only=True)
        runner.save_checkpoint(tmp_path / "last.ckpt")
        return module.seen["train"]

    expected = fit(6)
    assert fit(steps) + fit(6, tmp_path / "last.ckpt") == expected


def test_after_a_limited_run_a_pass_is_whole_again():
    data = numbered()
    trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(Watching(), data)
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 20


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an int >= 1, got 0"),
        ({"batch_size": "big"}, "batch_size: expected an int >= 1, got 'big'"),
        ({"batch_size": True}, "batch_size: expected an int >= 1, got True"),
        ({"num_workers": -1}, "num_workers: expected an int >= 0, got -1"),
        ({"seed": 0.5}, "seed: expected an int >= 0, got 0.5"),
        ({"split_seed": -1}, "split_seed: expected an int >= 0, got -1"),
        ({"crop": -1}, "crop: expected an int >= 0, got -1"),
        ({"crop": 4}, "crop: expected less than the 4 pixels of an image, got 4"),
        ({"mean": [0.1, 0.2]}, "mean: expected a number, or 1 for the channels, got [0.1, 0.2]"),
        ({"mean": "grey"}, "mean: expected a number, or 1 for the channels, got 'grey'"),
        ({"std": 0.0}, "std: expected > 0, got 0.0"),
    ],
)
def test_impossible_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(HastenError) as caught:
        numbered(**options)
    assert str(caught.value) == f"numbered: {message}"


# ------------------------------------------------------------------ the training images as they are


def test_training_images_come_by_index_in_their_range_and_never_augmented():
    data = numbered(flip=True, crop=2, mean=0.25, std=0.5)
    labels = data.splits.train.labels
    assert torch.equal(data.train_labels, labels) and len(labels) == 20
    for indices in ([3, 0, 3], torch.tensor([3, 0, 3])):
        images = data.train_images(indices)
        expected = (labels[[3, 0, 3]] / 30 - 0.25) / 0.5
        torch.testing.assert_close(images, expected.view(-1, 1, 1, 1).expand(-1, 1, 4, 4))


def test_labels_are_known_by_number_where_they_have_no_names():
    assert numbered().class_names == ["0", "1", "2"]


def test_a_description_is_the_same_twice_and_can_be_written_as_json():
    described = numbered().description()
    assert json.loads(json.dumps(described)) == described == numbered().description()
    assert described == numbered(num_workers=1).description()


class Retouched(Numbered):
    """One training image is different."""

    def read(self):
        splits = super().read()
        splits.train.images = splits.train.images.clone()
        splits.train.images[7] += 0.01
        return splits


@pytest.mark.parametrize(
    "other",
    [
        numbered(split_seed=1),
        numbered(mean=0.4),
        numbered(std=0.4),
        numbered(zca=True),
        numbered(flip=True),
        numbered(crop=1),
        numbered(batch_size=4),
        numbered(seed=1),
        Numbered((1, 2, 2), 3, batch_size=8),
        Numbered((1, 4, 4), 4, batch_size=8),
        Retouched((1, 4, 4), 3, batch_size=8),
    ],
)
def test_a_description_tells_apart_what_a_training_run_depends_on(other):
    assert other.description() != numbered().description()


def test_the_split_in_a_description_does_not_depend_on_the_range():
    hashes = {numbered(**options).description()["split"] for options in ({}, {"mean": 0.3, "std": 0.7}, {"zca": True})}
    assert len(hashes) == 1


def test_a_description_reads_a_few_images_only():
    class Counting(Dataset):
        labels, read = torch.arange(5000) % 3, 0

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            self.read += 1
            return torch.zeros(1, 4, 4), self.labels[index]

    class Many(ImageDataModule):
        images = Counting()

        def read(self):
            return Splits(self.images, (), ())

    Many((1, 4, 4), 3).description()
    assert 0 < Many.images.read < 100


# ------------------------------------------------------------------ whitening


def test_whitened_images_are_those_of_a_fit_on_the_training_images():
    plain, data = Digits(mean=0.0, std=1.0), Digits(zca=True)
    mean, matrix, _ = zca_fit([plain.splits.train.images])
    for part in ("train", "val", "test"):
        expected, found = getattr(plain.splits, part), getattr(data.splits, part)
        torch.testing.assert_close(found.images, zca_whiten(expected.images, mean, matrix), atol=1e-5, rtol=1e-5)
        assert torch.equal(found.labels, expected.labels)
    images, _ = next(iter(data.test_dataloader()))
    torch.testing.assert_close(images, data.splits.test.images[: len(images)])
    torch.testing.assert_close(data.train_images([5, 2]), data.splits.train.images[[5, 2]])


def test_the_range_of_whitened_images_goes_there_and_back():
    data = Digits(zca=True)
    assert isinstance(data.pixels, ZCA)  # asked before the splits
    images = Digits(mean=0.0, std=1.0).splits.val.images
    torch.testing.assert_close(data.normalize(images), data.splits.val.images)
    torch.testing.assert_close(data.denormalize(data.splits.val.images), images, atol=1e-5, rtol=0)


def test_whitened_splits_may_be_empty():
    data = Digits(zca=True, val=0)
    assert data.val_dataloader() == [] and len(data.splits.train) == 1397


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": True}, "zca: expected flip=false and crop=0, .* got flip=true and crop=0; augment by DSA"),
        ({"crop": 2}, "zca: expected flip=false and crop=0, .* got flip=false and crop=2; augment by DSA"),
        ({"mean": 0.3}, "zca: expected no mean and std beside it, got 0.3 and 0.5; leave them out"),
        ({"std": [0.3]}, r"zca: expected no mean and std beside it, got 0.5 and \[0.3\]; leave them out"),
    ],
)
def test_what_has_no_meaning_for_whitened_images_is_refused(options, message):
    with pytest.raises(HastenError, match=f"numbered: {message}"):
        numbered(zca=True, **options)
