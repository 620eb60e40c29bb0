import pickle

import pytest
import torch
from PIL import Image

from hasten.datamodules import ImageNetSubset, imagenet_indices
from hasten.errors import HastenError

COMP_DD = [
    f"{category}_{difficulty}"
    for category in ("birds", "cars", "dogs", "fish", "snake", "insect", "round", "music")
    for difficulty in ("easy", "hard")
]
TEN = ["imagenette", "imagewoof", "imagemeow", "imagesquawk", "imagefruit", "imageyellow", "in1k_cifar10"]


@pytest.fixture(scope="module")
def known():
    """ImageNet-1k's own order of classes, as timm has it."""
    from timm.data import ImageNetInfo

    return ImageNetInfo()


def folders(root, names, images=4, val=1):
    """An ImageNet of small pictures: the folder numbered k has the colour k."""
    for part, count in (("train", images), ("val", val)):
        for number, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for image in range(count):
                Image.new("RGB", (12, 6), (20 * number, image, 0)).save(root / part / name / f"{image}.png")
    return root


def empty(root, names):
    for name in names:
        (root / "train" / name).mkdir(parents=True)
    return root


def refusal(call):
    try:
        call()
    except HastenError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@pytest.fixture
def nette(tmp_path, known):
    """Imagenette, and two classes that are not in it."""
    indices = [701, 0, 217, 482, 491, 497, 566, 569, 571, 574, 1, 2]
    return folders(tmp_path, [known.index_to_label_name(index) for index in indices])


# ---------------------------------------------------------------------- the lists


def test_a_name_that_is_none_is_answered_with_sixteen_subsets_of_comp_dd_and_seven_more():
    message = refusal(lambda: imagenet_indices("zebra"))
    listed = message.partition("choose one of: ")[2].removesuffix(", or list wnids").split(", ")
    assert sorted(listed) == sorted(COMP_DD + TEN)


@pytest.mark.parametrize("name", COMP_DD + TEN)
def test_a_subset_has_the_classes_that_its_indices_name(name, tmp_path, known):
    wanted = {index: known.index_to_label_name(index) for index in range(1000)}
    data = ImageNetSubset(empty(tmp_path, wanted.values()), name)
    assert data.wnids == [wanted[index] for index in data.imagenet_indices]
    assert data.num_classes == len(set(data.imagenet_indices)) == (9 if name == "music_hard" else 10)
    assert list(dict.fromkeys(data.released_indices)) == data.imagenet_indices
    assert len(data.class_names) == data.num_classes and all(data.class_names)


def test_the_subsets_of_comp_dd_share_no_class():
    indices = [index for name in COMP_DD for index in imagenet_indices(name)]
    assert len(indices) == len(set(indices)) == 159


def test_music_hard_names_banjo_twice_and_has_it_once(tmp_path, known):
    data = ImageNetSubset(empty(tmp_path, known.label_names()), "music_hard")
    assert data.released_indices.count(420) == 2 and len(data.released_indices) == 10
    assert data.class_names.count("banjo") == 1


def test_a_net_of_imagenet_is_asked_for_the_right_class(nette):
    data = ImageNetSubset(nette, "imagenette")
    assert data.imagenet_indices == imagenet_indices("imagenette")
    asked = dict(zip(data.class_names, data.imagenet_indices, strict=True))
    assert asked["tench"] == 0 and asked["parachute"] == 701


@pytest.mark.parametrize("singular", ["bird_hard", "car_easy", "dog_hard"])
def test_categories_may_be_named_in_the_singular(singular):
    category, difficulty = singular.split("_")
    assert imagenet_indices(singular) == imagenet_indices(f"{category}s_{difficulty}")


def test_a_list_of_ones_own_is_of_wnids_and_indices_in_its_order(nette):
    data = ImageNetSubset(nette, ["n03888257", 0, 217])
    assert data.imagenet_indices == data.released_indices == [701, 0, 217]
    assert data.class_names == ["parachute", "tench", "English springer"]


def test_without_a_list_every_folder_is_a_class(tmp_path):
    data = ImageNetSubset(folders(tmp_path, ["n01440764", "n02102040"]), None)
    assert data.wnids == ["n01440764", "n02102040"] and data.imagenet_indices == [0, 217]
    other = ImageNetSubset(folders(tmp_path / "mine", ["cat", "dog"]), None)
    assert other.class_names == ["cat", "dog"] and other.num_classes == 2
    assert "'cat'" in refusal(lambda: other.imagenet_indices)


# ---------------------------------------------------------------------- the images


@pytest.mark.parametrize("in_memory", [True, False])
def test_labels_are_places_in_the_list_in_every_split(nette, in_memory):
    data = ImageNetSubset(nette, "imagenette", image_size=8, val=10, in_memory=in_memory, mean=0.0, std=1.0)
    colours = torch.tensor([20.0 * number for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 0)]) / 255  # parachute came first
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    for loader, count in zip(loaders, (30, 10, 10), strict=True):
        images, labels = next(iter(loader))
        assert images.shape == (count, 3, 8, 8) and labels.bincount().tolist() == [count // 10] * 10
        torch.testing.assert_close(images[:, 0, 0, 0], colours[labels])


def test_the_holdout_is_of_the_training_images_and_the_test_of_imagenets_validation_images(nette):
    data = ImageNetSubset(nette, "imagenette", image_size=6, val=0.25, in_memory=False)
    train, val, test = ({path for path, _ in part.files} for part in vars(data.splits).values())
    assert len(train) == 30 and len(val) == 10 and not train & val
    assert all("train" in path for path in train | val) and all("/val/" in path for path in test)
    again = ImageNetSubset(nette, "imagenette", image_size=6, val=0.25, in_memory=False, seed=5)
    assert {path for path, _ in again.splits.val.files} == val


def test_images_in_memory_are_those_in_files(nette):
    held, read = (ImageNetSubset(nette, "imagenette", image_size=5, in_memory=kept) for kept in (True, False))
    for one, other in zip(held.train_dataloader(), read.train_dataloader(), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(held.train_images([3, 1]), read.train_images([3, 1]))
    assert torch.equal(held.train_labels, read.train_labels)
    assert held.description() == read.description()


def test_squash_keeps_the_whole_image_and_crop_its_proportions(tmp_path):
    for name in ("n01440764", "n02102040"):
        wide = Image.new("RGB", (40, 20), (0, 0, 0))
        wide.paste((255, 255, 255), (10, 0, 30, 20))
        (tmp_path / "train" / name).mkdir(parents=True)
        wide.save(tmp_path / "train" / name / "wide.png")
    of = {
        fit: ImageNetSubset(tmp_path, [0, 217], image_size=20, fit=fit, val=0, mean=0.0, std=1.0).train_images([0])
        for fit in ("squash", "crop")
    }
    assert (of["crop"][..., 1:-1] > 0.9).all()
    columns = of["squash"][0, 0, 10]
    assert (columns[:4] < 0.1).all() and (columns[6:14] > 0.9).all() and (columns[16:] < 0.1).all()


def test_pixels_are_normalised_by_imagenets_statistics(nette):
    data = ImageNetSubset(nette, "imagenette", image_size=4)
    black = data.normalize(torch.zeros(3, 1, 1)).flatten()
    torch.testing.assert_close(black, -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))
    images = data.train_images([0, 5])
    torch.testing.assert_close(data.normalize(data.denormalize(images)), images)


def test_pixels_can_be_whitened(nette):
    data = ImageNetSubset(nette, "imagenette", image_size=4, zca=True)
    images = data.train_images(torch.arange(36))
    torch.testing.assert_close(images.mean(0), torch.zeros(3, 4, 4), atol=1e-4, rtol=0)
    assert data.description()["transform"] == "zca"


@pytest.mark.parametrize("form", ["{}", "{:03d}", "{:04d}"])
def test_folders_may_be_named_by_index(tmp_path, form):
    root = folders(tmp_path, [form.format(index) for index in (0, 217)])
    data = ImageNetSubset(root, ["n02102040", "n01440764"], image_size=4, val=0, mean=0.0, std=1.0)
    red = data.train_images(torch.arange(8))[:, 0, 0, 0] * 255
    assert data.wnids == ["n02102040", "n01440764"]
    torch.testing.assert_close(red, 20.0 * (1 - data.train_labels))  # 217 comes second on disk, first in the list


def test_without_validation_folders_there_is_no_test(tmp_path):
    data = ImageNetSubset(folders(tmp_path, ["0", "217"], val=0), [0, 217], image_size=4)
    for name in ("0", "217"):
        (tmp_path / "val" / name).rmdir()
    (tmp_path / "val").rmdir()
    assert data.test_dataloader() == []


def test_workers_can_be_sent_the_images(nette):
    data = ImageNetSubset(nette, "imagenette", image_size=4, in_memory=False)
    images, _ = pickle.loads(pickle.dumps(data.splits.train))[0]
    assert images.shape == (3, 4, 4)


# ---------------------------------------------------------------------- what cannot work


def test_an_unknown_subset_is_answered_with_the_nearest(tmp_path):
    assert "did you mean 'imagewoof'" in refusal(lambda: ImageNetSubset(tmp_path, "imagewoff"))


def test_the_first_missing_class_and_the_folder_looked_in_are_named(nette):
    for image in (nette / "train" / "n02979186").iterdir():
        image.unlink()
    (nette / "train" / "n02979186").rmdir()
    message = refusal(lambda: ImageNetSubset(nette, "imagenette"))
    for part in ("n02979186", "'482'", "cassette player", str(nette / "train"), "1 of the 10 classes"):
        assert part in message
    assert "\n" not in message


def test_validation_images_without_folders_are_refused(nette):
    import shutil

    shutil.rmtree(nette / "val")
    (nette / "val").mkdir()
    Image.new("RGB", (4, 4)).save(nette / "val" / "ILSVRC2012_val_00000001.JPEG")
    message = refusal(lambda: ImageNetSubset(nette, "imagenette"))
    assert str(nette / "val") in message and "10 of the 10" in message


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        (["n01440764", 0], ["n01440764", "twice"]),
        ([0], ["two", "1"]),
        ([0, 1000], ["1000", "0..999"]),
        ([0, "n99999999"], ["n99999999"]),
    ],
)
def test_a_list_that_cannot_be_is_refused(tmp_path, subset, words):
    message = refusal(lambda: ImageNetSubset(tmp_path, subset))
    assert all(word in message for word in words)


def test_no_such_folder_and_an_unknown_fit_are_refused(tmp_path, nette):
    assert "no such folder" in refusal(lambda: ImageNetSubset(tmp_path / "nowhere", "imagenette"))
    assert "did you mean 'squash'" in refusal(lambda: ImageNetSubset(nette, "imagenette", fit="squish"))


def test_an_image_that_cannot_be_read_is_named(nette):
    broken = next((nette / "train" / "n03888257").iterdir())
    broken.write_bytes(b"no image")
    message = refusal(lambda: ImageNetSubset(nette, "imagenette", image_size=4).train_labels)
    assert str(broken) in message
