import csv
import json

import pytest
import torch
from PIL import Image
from torch import nn

from hasten.datamodules import ImageFolder
from hasten.errors import HastenError
from hasten.functional import grad_cam
from hasten.tasks.complexity import complexity


class Bright(nn.Module):
    """Says class 0 of an image that is bright at all, and sees it where it is bright: its only map is the image."""

    def __init__(self):
        super().__init__()
        self.maps = nn.AvgPool2d(2)
        self.asked_in_training = []

    def forward(self, images):
        self.asked_in_training.append(self.training)
        bright = self.maps(images).mean(dim=(1, 2, 3))
        return torch.stack([bright, -bright - 1], dim=1)


@pytest.fixture
def data(tmp_path):
    """Three classes of grey 8x8 images, in which a corner of 2, 4 or 6 pixels is bright."""
    for name, sides in {"small": [2, 2], "large": [6, 6], "mixed": [4, 2, 4]}.items():
        folder = tmp_path / "data" / "train" / name
        folder.mkdir(parents=True)
        for number, side in enumerate(sides):
            image = Image.new("L", (8, 8), 0)
            image.paste(255, (0, 0, side, side))
            image.save(folder / f"{number}.png")
    return ImageFolder(tmp_path / "data", image_size=8, channels=1, val=0, mean=0.0, std=1.0)


def share(side):
    """Of 4 x 4 cells of 2 x 2 pixels, those that are not bright."""
    return 1 - (side // 2) ** 2 / 16


def test_a_class_has_the_mean_share_of_cells_that_do_not_show_it(data, tmp_path):
    metrics = complexity(tmp_path, data=data, net=Bright(), layer="maps", easy=1, hard=1, batch_size=2)
    small, large, mixed = share(2), share(6), (2 * share(4) + share(2)) / 3
    with (tmp_path / "complexity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["grade"]) for row in rows] == [("small", "hard"), ("mixed", ""), ("large", "easy")]
    assert [float(row["complexity"]) for row in rows] == pytest.approx([small, mixed, large], abs=1e-6)
    assert [(row["label"], row["images"]) for row in rows] == [("2", "2"), ("1", "3"), ("0", "2")]
    assert metrics == pytest.approx(
        {"complexity/mean": (small + large + mixed) / 3, "complexity/easy": large, "complexity/hard": small}
    )


def test_it_writes_the_same_as_json_and_a_chart(data, tmp_path):
    complexity(tmp_path, data=data, net=Bright(), layer="maps", easy=0, hard=2)
    rows = json.loads((tmp_path / "complexity.json").read_text())
    assert [row["grade"] for row in rows] == ["hard", "hard", ""]
    with Image.open(tmp_path / "complexity.png") as chart:
        assert min(chart.size) > 100


def test_the_map_is_of_the_class_that_the_network_itself_sees(data, tmp_path):
    asked = []

    def noting(model, layer, images, classes, *, generator=None):
        asked.extend(classes.tolist())
        return grad_cam(model, layer, images, classes)

    net = Bright()
    complexity(tmp_path, data=data, net=net.train(), layer="maps", saliency=noting, easy=1, hard=1)
    assert asked == [0] * 7  # the labels are 0 to 2
    assert not any(net.asked_in_training)


@pytest.mark.parametrize(("easy", "hard"), [(2, 2), (-1, 1), (0, 0)])
def test_more_grades_than_classes_are_refused(data, tmp_path, easy, hard):
    with pytest.raises(HastenError, match="1 to 3 classes"):
        complexity(tmp_path, data=data, net=Bright(), layer="maps", easy=easy, hard=hard)


def test_a_layer_that_is_not_there_is_refused_before_anything_is_written(data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(HastenError, match=r"'map'.*did you mean 'maps'"):
        complexity(folder, data=data, net=Bright(), layer="map", easy=1, hard=1)
    assert list(folder.iterdir()) == []
