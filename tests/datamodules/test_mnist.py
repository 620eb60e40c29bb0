import pytest
import torch
from torchvision import datasets

from hasten.datamodules import MNIST
from hasten.errors import HastenError

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def refusal(data):
    """What the HastenError of reading says, which is one line."""
    with pytest.raises(HastenError) as caught:  # noqa: PT012 - whichever of the two finds it
        data.prepare_data()
        data.train_dataloader()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def idx(array):
    """The bytes of an unsigned array in the format of MNIST's files."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.numpy().tobytes()


@pytest.fixture
def files(tmp_path):
    """A folder with 40 and 20 small "digits"; label l comes with images of the value 20 l."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        labels = (torch.arange(count) % 10).to(torch.uint8)
        images = (labels * 20).view(-1, 1, 1).expand(-1, 28, 28).contiguous()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


def test_files_that_are_there_are_read_without_a_network(files):
    data = MNIST(files, val=10, batch_size=8)
    data.prepare_data()
    assert [len(part) for part in (data.splits.train, data.splits.val, data.splits.test)] == [30, 10, 20]
    assert data.splits.val.labels.sort().values.tolist() == list(range(10))
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 1, 28, 28) == (8, *data.image_shape)
    torch.testing.assert_close(images[:, 0, 5, 5], labels * 20 / 127.5 - 1)
    assert data.num_classes == 10


def test_reading_writes_nothing(files):
    before = sorted(files.rglob("*"))
    data = MNIST(files, val=10)
    data.prepare_data()
    next(iter(data.test_dataloader()))
    assert sorted(files.rglob("*")) == before


def test_the_test_images_are_those_of_the_test_files(files):
    labels = torch.cat([labels for _, labels in MNIST(files, val=10).test_dataloader()])
    assert labels.tolist() == [i % 10 for i in range(20)]


def test_images_are_resized(files):
    images, _ = next(iter(MNIST(files, val=0.25, image_size=32).train_dataloader()))
    assert images.shape == (30, 1, 32, 32)


def test_without_a_network_the_error_says_in_one_line_what_to_put_where(tmp_path):
    message = refusal(MNIST(tmp_path))
    assert message.startswith(
        f"mnist: expected the four unpacked *-ubyte files in '{tmp_path}/MNIST/raw', got no whole"
    )
    assert "Connection refused" in message
    assert message.endswith("then connect to the network or put them there yourself")


def test_without_download_missing_files_are_an_error_with_a_remedy(tmp_path):
    data = MNIST(tmp_path / "nowhere", download=False)
    data.prepare_data()
    with pytest.raises(HastenError, match=r"^mnist: expected the four .* set download=true or put them there"):
        data.train_dataloader()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 6, 100])
def test_a_truncated_file_is_an_error_in_one_line(files, name, kept):
    file = files / "MNIST" / "raw" / name
    file.write_bytes(file.read_bytes()[: kept if "images" in name else min(kept, 20)])
    for data in (MNIST(files, val=10), MNIST(files, val=10, download=False)):
        message = refusal(data)
        assert message.startswith("mnist: expected the four unpacked *-ubyte files in ")
        assert "got no whole copy (" in message
        assert ("set download=true" in message) != data.download


def test_labels_that_do_not_match_the_images_are_refused(files):
    (files / "MNIST" / "raw" / FILES[1]).write_bytes(idx(torch.zeros(39, dtype=torch.uint8)))
    with pytest.raises(HastenError, match="40 images and 39 labels"):
        MNIST(files, download=False).train_dataloader()


def test_impossible_arguments_are_refused(files):
    with pytest.raises(HastenError, match="mnist: val: expected an int >= 0, got -1"):
        MNIST(files, val=-1)
    with pytest.raises(HastenError, match="mnist: expected some of 40 images left for training, got 40 taken out"):
        MNIST(files, val=40).train_dataloader()
