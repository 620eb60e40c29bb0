import pytest
import torch
from PIL import Image

from hasten.datamodules import ImageFolder
from hasten.errors import HastenError


def save(path, color, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def root(tmp_path):
    """Ten red cats and ten blue dogs to train on, two of each to test on."""
    for part, count in (("train", 10), ("test", 2)):
        for number in range(count):
            save(tmp_path / part / "cat" / f"{number}.png", (255, 0, number))
            save(tmp_path / part / "dog" / f"{number}.png", (0, 0, 255 - number))
    return tmp_path


def refusal(call):
    """What the HastenError of a call says."""
    try:
        call()
    except HastenError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def labels_of(batches):
    return torch.cat([labels for _, labels in batches]).tolist()


def test_classes_are_numbered_by_name_and_images_come_with_theirs(root):
    data = ImageFolder(root, image_size=8, val=0)
    assert data.classes == ["cat", "dog"] and data.num_classes == 2 and data.image_shape == (3, 8, 8)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (20, 3, 8, 8) and labels.dtype == torch.int64
    assert torch.equal(images[:, 0, 0, 0], 1.0 - 2 * labels)
    assert labels_of(data.test_dataloader()) == [0, 0, 1, 1]


def test_validation_images_are_taken_from_training_where_there_is_no_folder_for_them(root):
    data = ImageFolder(root, image_size=8, val=0.2)
    train, val = ({path for path, _ in part.files} for part in (data.splits.train, data.splits.val))
    assert not train & val and len(train | val) == 20
    assert sorted(labels_of(data.val_dataloader())) == [0, 0, 1, 1]
    assert data.splits.val.files == ImageFolder(root, image_size=8, val=4, seed=5).splits.val.files
    assert data.splits.val.files != ImageFolder(root, image_size=8, val=4, split_seed=5).splits.val.files


def test_a_folder_for_validation_is_used_as_it_is(root):
    save(root / "val" / "dog" / "only.png", 0)
    data = ImageFolder(root, image_size=8)
    assert labels_of(data.val_dataloader()) == [1]
    assert len(data.splits.train) == 20


def test_without_a_test_folder_there_is_no_test(tmp_path):
    save(tmp_path / "train" / "cat" / "1.png", 0)
    assert ImageFolder(tmp_path, image_size=8, val=0).test_dataloader() == []


def test_validation_images_can_serve_as_test_images(root):
    save(root / "val" / "dog" / "only.png", 0)
    data = ImageFolder(root, image_size=8, test="val")
    assert labels_of(data.test_dataloader()) == [1]


def test_images_are_made_square_by_resizing_and_cutting_at_the_centre(tmp_path):
    wide = Image.new("RGB", (40, 20), (0, 0, 0))
    wide.paste((255, 255, 255), (10, 0, 30, 20))
    (tmp_path / "train" / "bar").mkdir(parents=True)
    wide.save(tmp_path / "train" / "bar" / "wide.png")
    wide.rotate(90, expand=True).save(tmp_path / "train" / "bar" / "high.png")
    images, _ = next(iter(ImageFolder(tmp_path, image_size=10, val=0).train_dataloader()))
    assert images.shape == (2, 3, 10, 10)
    assert (images[..., 1:-1, 1:-1] == 1).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("mode", "color"), [("RGB", (90, 90, 90)), ("L", 90), ("RGBA", (90, 90, 90, 255)), ("1", 1)])
def test_grey_and_colour_files_serve_grey_and_colour_models(tmp_path, channels, mode, color):
    save(tmp_path / "train" / "a" / "1.png", color, mode=mode)
    images, _ = next(iter(ImageFolder(tmp_path, image_size=8, channels=channels, val=0).train_dataloader()))
    value = 1.0 if mode == "1" else 90 / 127.5 - 1
    torch.testing.assert_close(images, torch.full((1, channels, 8, 8), value))


def test_workers_read_the_same_images(root):
    plain = list(ImageFolder(root, image_size=8, flip=True, crop=2).train_dataloader())
    workers = list(ImageFolder(root, image_size=8, flip=True, crop=2, num_workers=2).train_dataloader())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, workers, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kept", [0, 20, 1000])
def test_an_unreadable_image_is_named_in_one_line(root, workers, kept):
    noise = Image.effect_noise((64, 64), 50)
    broken = root / "test" / "cat" / "0.png"
    noise.save(broken)
    broken.write_bytes(broken.read_bytes()[:kept])
    message = refusal(lambda: next(iter(ImageFolder(root, image_size=8, num_workers=workers).test_dataloader())))
    assert message.startswith(f"image_folder: cannot read {str(broken)!r} (")
    assert message.endswith("); replace or delete it")
    assert "\n" not in message


def test_hidden_folders_and_other_files_are_no_classes_and_no_images(root):
    (root / "train" / ".cache").mkdir()
    (root / "train" / "notes.txt").write_text("")
    (root / "train" / "cat" / "notes.txt").write_text("")
    data = ImageFolder(root, image_size=8, val=0)
    assert data.classes == ["cat", "dog"] and len(data.splits.train) == 20


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(
        HastenError, match=r"^image_folder: root: expected a folder per class in '.*train', got no such"
    ):
        ImageFolder(tmp_path, image_size=8)


def test_a_folder_without_classes_is_an_error(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(HastenError, match=r"expected a folder per class in '.*train', got none"):
        ImageFolder(tmp_path, image_size=8)


def test_a_class_without_images_is_an_error_that_names_it(root):
    (root / "train" / "emu").mkdir()
    with pytest.raises(
        HastenError, match=r"^image_folder: expected images in '.*/train/emu', got none that end in .jpg"
    ):
        ImageFolder(root, image_size=8).train_dataloader()


@pytest.mark.parametrize("part", ["val", "test"])
def test_other_classes_than_those_of_training_are_refused(root, part):
    save(root / part / "emu" / "1.png", 0)
    with pytest.raises(
        HastenError, match=rf"^image_folder: expected only classes of 'train' in '.*/{part}', got 'emu'"
    ):
        ImageFolder(root, image_size=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_folder: image_size: expected an int >= 1, got 0"),
        ({"image_size": 8, "channels": 2}, "image_folder: channels: expected 1 for grey or 3 for colour, got 2"),
        ({"image_size": 8, "val": "some"}, "image_folder: val: expected an int >= 0, got 'some'"),
    ],
)
def test_impossible_arguments_are_refused(root, options, message):
    with pytest.raises(HastenError, match=message):
        ImageFolder(root, **options)


def test_too_many_validation_images_are_refused(root):
    with pytest.raises(
        HastenError, match="image_folder: expected some of 20 images left for training, got 20 taken out"
    ):
        ImageFolder(root, image_size=8, val=20).train_dataloader()


def test_transforms_of_ones_own_replace_resizing_and_normalizing(root):
    def shade(image):
        return torch.full((3, 4, 4), float(image.size[0]))

    data = ImageFolder(root, image_size=4, val=0.2, train_transform=shade, eval_transform=lambda image: -shade(image))
    assert data.train_dataloader().dataset.files == data.splits.train.files
    assert {float(images.unique()) for images, _ in data.train_dataloader()} == {8.0}
    for part in (data.val_dataloader(), data.test_dataloader()):
        assert {float(images.unique()) for images, _ in part} == {-8.0}


def test_what_a_transform_of_timm_draws_is_a_function_of_seed_and_epoch(root):
    from timm.data import create_transform

    def batch(seed, epoch, workers=0):
        recipe = create_transform(
            8, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, re_mode="pixel"
        )
        loader = ImageFolder(
            root, image_size=8, val=0, train_transform=recipe, seed=seed, num_workers=workers
        ).train_dataloader()
        loader.load_state_dict(loader.state_dict() | {"epoch": epoch})
        return next(iter(loader))[0]

    assert torch.equal(batch(0, 0), batch(0, 0, workers=1))
    assert not torch.equal(batch(0, 0), batch(0, 1)) and not torch.equal(batch(0, 0), batch(1, 0))


# ------------------------------------------------------------------ the training images as they are


def test_labels_and_names_of_classes_are_known_without_reading_an_image(root):
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"")
    data = ImageFolder(root, image_size=8, val=4)
    assert data.class_names == ["cat", "dog"]
    assert data.train_labels.dtype == torch.int64 and sorted(data.train_labels.tolist()) == [0] * 8 + [1] * 8


def test_training_images_come_by_index_through_the_transform_of_evaluation(root):
    def recipe(image):
        raise AssertionError("augments")

    plain = ImageFolder(root, image_size=8, val=0)
    other = ImageFolder(root, image_size=8, val=0, train_transform=recipe)
    expected = torch.stack([plain.splits.train[i][0] for i in (11, 2)])
    assert torch.equal(plain.train_images([11, 2]), expected)
    assert torch.equal(other.train_images(torch.tensor([11, 2])), expected)


def test_a_description_holds_the_transform_of_training_and_no_address(root):
    def described(**options):
        return ImageFolder(root, image_size=8, val=0, **options).description()

    def shade(image):
        return torch.zeros(3, 8, 8)

    assert described() == described() != described(train_transform=shade)
    assert " at 0x" not in repr(described(train_transform=shade))


def test_images_in_files_can_be_whitened_and_then_stay_in_memory(root):
    data = ImageFolder(root, image_size=8, val=4, zca=True)
    plain = ImageFolder(root, image_size=8, val=4, mean=0.0, std=1.0)
    expected = data.pixels.normalize(plain.train_images(range(16)))
    torch.testing.assert_close(data.splits.train.images, expected, atol=1e-5, rtol=1e-5)
    assert len(data.splits.val) == len(data.splits.test) == 4
    assert torch.equal(data.train_labels, plain.train_labels)


def test_whitening_beside_transforms_of_ones_own_is_refused(root):
    with pytest.raises(HastenError, match="image_folder: zca: expected no train_transform and eval_transform"):
        ImageFolder(root, image_size=8, zca=True, eval_transform=lambda image: image)
