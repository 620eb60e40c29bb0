import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from hasten.datamodules import CIFAR10, CIFAR100
from hasten.errors import HastenError
from hasten.formats import ZCA

MODULES = {
    CIFAR10: (datasets.CIFAR10, "labels", ["data_batch_1", "data_batch_2"], "test_batch", "batches.meta", 10),
    CIFAR100: (datasets.CIFAR100, "fine_labels", ["train"], "test", "meta", 100),
}


@pytest.fixture(params=MODULES, ids=lambda module: module.__name__)
def small(request, tmp_path, monkeypatch):
    """A datamodule's class and a folder with 40 small files' worth of images, whose checksums torchvision is told."""
    source, key, train, test, meta, classes = MODULES[request.param]
    folder = tmp_path / source.base_folder
    folder.mkdir()

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def part(name, seed):
        draws = np.random.default_rng(seed)
        pixels = draws.integers(0, 256, (20, 3072), dtype=np.uint8)
        pixels[:, 0] = np.arange(20)  # the red of the first pixel is the image's number
        return [name, write(name, {"data": pixels, key: [i % classes for i in range(20)]})]

    monkeypatch.setattr(source, "train_list", [part(name, seed) for seed, name in enumerate(train)])
    monkeypatch.setattr(source, "test_list", [part(test, 9)])
    names = write(meta, {source.meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr(source, "meta", source.meta | {"md5": names})
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/images.tar.gz")
    return request.param, tmp_path, folder


def test_images_and_labels_come_out_as_they_were_written(small):
    module, root, _ = small
    data = module(root, val=0, batch_size=20)
    data.prepare_data()
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (20, 3, 32, 32) == (20, *data.image_shape)
    number = (data.denormalize(images)[:, 0, 0, 0] * 255).round().long()
    assert number.tolist() == list(range(20))
    assert labels.tolist() == [i % data.num_classes for i in range(20)]


def test_validation_images_are_taken_from_the_training_images(small):
    module, root, _ = small
    whole, data = module(root, val=0).splits, module(root, val=0.5).splits
    assert len(data.train) + len(data.val) == len(whole.train)
    assert len(data.test) == len(whole.test) == 20
    both = torch.cat([data.train.images, data.val.images]).flatten(1).sort(dim=0).values
    assert torch.equal(both, whole.train.images.flatten(1).sort(dim=0).values)


def test_classes_have_the_names_in_the_files(small):
    module, root, _ = small
    data = module(root)
    assert data.class_names == [str(i) for i in range(data.num_classes)]


def test_the_training_images_can_be_whitened(small):
    module, root, _ = small
    data, plain = module(root, val=10, zca=True, image_size=8), module(root, val=10, mean=0.0, std=1.0, image_size=8)
    assert torch.equal(data.train_labels, plain.train_labels)
    images = plain.train_images(range(len(plain.train_labels)))
    torch.testing.assert_close(data.denormalize(data.train_images([3, 1])), images[[3, 1]], atol=1e-5, rtol=0)
    assert torch.equal(data.pixels.mean, ZCA.fit([images]).mean)


def refusal(data):
    """What the HastenError of reading says, which is one line."""
    with pytest.raises(HastenError) as caught:  # noqa: PT012 - whichever of the two finds it
        data.prepare_data()
        data.train_dataloader()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_are_an_error_with_a_remedy(small):
    module, root, _ = small
    nowhere = root / "nowhere"
    assert refusal(module(nowhere)).endswith("connect to the network or put them there yourself")
    assert refusal(module(nowhere, download=False)).endswith("set download=true or put them there yourself")


def test_corrupted_files_are_an_error_with_a_remedy(small):
    module, root, folder = small
    for file in folder.iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        for data in (module(root), module(root, download=False)):
            message = refusal(data)
            assert f"in {str(folder)!r}, got no whole copy (" in message
            assert "delete what is broken there, then" in message
        file.write_bytes(whole)


def test_the_number_of_classes_is_known_before_anything_is_read(tmp_path):
    assert (CIFAR10(tmp_path / "nowhere").num_classes, CIFAR100(tmp_path / "nowhere").num_classes) == (10, 100)
