import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torchvision.io import read_image

from hasten.errors import HastenError
from hasten.formats import Distilled
from hasten.formats.pixels import ZCA, PixelRange

PLAIN = PixelRange(torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.1]).view(3, 1, 1))


def distilled(pixels=PLAIN, **changes):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 3, 4, 4, generator=generator), torch.randn(6, 3, generator=generator)
    given = {"images": images, "label_logits": labels, "hard_labels": torch.arange(3).repeat_interleave(2)}
    about = {"classes": ["a", "b", "c"], "seed": 3}
    return Distilled(**(given | {"syn_lr": 0.1, "pixels": pixels, "about": about} | changes))


def test_what_is_read_is_what_was_written(tmp_path):
    written = distilled()
    written.write(tmp_path)
    read = Distilled.read(tmp_path)
    for name in ("images", "label_logits", "hard_labels"):
        assert torch.equal(getattr(read, name), getattr(written, name))
    assert (read.syn_lr, read.about) == (written.syn_lr, written.about)
    assert torch.equal(read.pixels.mean, PLAIN.mean)
    assert torch.equal(read.pixels.std, PLAIN.std)
    assert (read.num_classes, read.ipc, read.image_shape) == (3, 2, (3, 4, 4))


def test_a_whitening_travels_along(tmp_path):
    pixels = ZCA.fit([torch.rand(100, 3, 4, 4)])
    written = distilled(pixels)
    written.write(tmp_path)
    read = Distilled.read(tmp_path)
    assert torch.equal(read.pixels.denormalize(read.images), pixels.denormalize(written.images))
    assert json.loads((tmp_path / "distilled.json").read_text())["value_space"] == "zca"


def test_the_step_size_is_kept_to_the_last_digit(tmp_path):
    distilled(syn_lr=0.1 + 1e-12).write(tmp_path)
    assert Distilled.read(tmp_path).syn_lr == 0.1 + 1e-12


def test_hard_labels_survive_as_0_and_minus_infinity(tmp_path):
    hard = torch.full((6, 3), -math.inf).scatter(1, torch.arange(3).repeat_interleave(2)[:, None], 0.0)
    assert distilled(label_logits=hard).has_hard_labels
    assert not distilled().has_hard_labels
    distilled(label_logits=hard).write(tmp_path)
    assert torch.equal(Distilled.read(tmp_path).label_logits, hard)


def test_people_can_read_what_is_in_it(tmp_path):
    distilled().write(tmp_path)
    facts = json.loads((tmp_path / "distilled.json").read_text())
    assert (facts["classes"], facts["ipc"], facts["labels"], facts["seed"]) == (["a", "b", "c"], 2, "soft", 3)
    rows, columns, cell = 3, 2, 48 + 2
    assert read_image(tmp_path / "grid.png").shape == (3, rows * cell + 2, columns * cell + 2)


def test_the_picture_of_equal_pixels_is_no_nan():
    assert distilled(images=torch.zeros(6, 3, 4, 4)).grid().isfinite().all()


def test_the_picture_shows_the_pixels_of_the_data():
    set_ = distilled(images=PLAIN.normalize(torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 3, 4, 4)))
    first_of_each_row = set_.grid()[0, 2::50, 2][:3]
    assert (first_of_each_row.diff() > 0).all()


def test_a_set_that_was_written_over_is_the_newer_one_as_a_whole(tmp_path):
    distilled(about={"seed": 1}).write(tmp_path)
    distilled(about={"seed": 2}, syn_lr=0.5).write(tmp_path)
    assert (Distilled.read(tmp_path).about["seed"], Distilled.read(tmp_path).syn_lr) == (2, 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["distilled.json", "distilled.safetensors", "grid.png"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": torch.zeros(6, 4, 4)}, r"images: expected \(N, C, H, W\), got \(6, 4, 4\)"),
        ({"label_logits": torch.zeros(5, 3)}, r"label_logits: expected \(6, K\), got \(5, 3\)"),
        ({"hard_labels": torch.zeros(5, dtype=torch.int64)}, r"hard_labels: expected \(6,\), got \(5,\)"),
        ({"label_logits": torch.zeros(6, 4)}, r"as many for each of 4 classes, got 6 in all"),
        ({"hard_labels": torch.arange(6) % 3}, r"class 0 first, got 2, 2, 2 of the 3 classes"),
        ({"hard_labels": torch.tensor([0, 0, 0, 1, 2, 2])}, r"2 images of each class, class 0 first, got 3, 1, 2"),
        ({"images": torch.full((6, 3, 4, 4), math.nan)}, r"finite pixels, got 288 of 288 that are not"),
        ({"label_logits": torch.full((6, 3), -math.inf)}, r"those of a distribution, got 6 rows without one"),
        ({"syn_lr": -0.1}, r"syn_lr: expected > 0, got -0.1"),
        ({"syn_lr": math.nan}, r"syn_lr: expected > 0, got nan"),
    ],
)
def test_what_is_no_distilled_set_is_refused_in_one_line(changes, says):
    with pytest.raises(HastenError, match=rf"^distilled: .*{says}") as caught:
        distilled(**changes)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_set_is_refused_and_a_near_one_named(tmp_path):
    with pytest.raises(HastenError, match=r"expected a folder with distilled.safetensors, found none; Export"):
        Distilled.read(tmp_path)
    distilled().write(tmp_path / "final")
    with pytest.raises(HastenError, match=r"found none; choose .*final$"):
        Distilled.read(tmp_path)


def test_half_a_file_or_another_programs_is_refused_in_one_line(tmp_path):
    distilled().write(tmp_path)
    path = tmp_path / "distilled.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(HastenError, match=r"is no whole distilled set \(SafetensorError.*write it again$"):
        Distilled.read(tmp_path)
    save_file({"images": torch.zeros(1)}, path)
    with pytest.raises(HastenError, match="is no whole distilled set"):
        Distilled.read(tmp_path)
