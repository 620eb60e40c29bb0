import math

import pytest
import torch

from hasten.nn import SyntheticSet


def test_images_stand_by_class_and_all_is_learned():
    synthetic = SyntheticSet(3, 2, (1, 4, 4), lr=0.05)
    assert {name: tuple(p.shape) for name, p in synthetic.named_parameters()} == {
        "images": (6, 1, 4, 4), "labels": (6, 3), "lr": ()}  # fmt: skip
    assert all(parameter.requires_grad for parameter in synthetic.parameters())
    assert synthetic.classes.tolist() == [0, 0, 1, 1, 2, 2]
    assert synthetic.lr.item() == pytest.approx(0.05)


def test_labels_and_step_size_stay_where_they_are_not_to_be_learned():
    synthetic = SyntheticSet(3, 1, (1, 4, 4), learn_labels=False, learn_lr=False)
    assert [name for name, parameter in synthetic.named_parameters() if parameter.requires_grad] == ["images"]


def test_what_it_is_filled_with_is_copied_and_comes_back_from_its_state():
    synthetic, images, labels = SyntheticSet(2, 2, (1, 3, 3)), torch.randn(4, 1, 3, 3), torch.randn(4, 2)
    synthetic.fill(images, labels, lr=0.3)
    again = SyntheticSet(2, 2, (1, 3, 3))
    again.load_state_dict(synthetic.state_dict())
    images_before = images.clone()
    images.zero_()
    assert again.images.equal(images_before) and synthetic.images.equal(images_before)
    assert again.labels.equal(labels) and again.lr.item() == pytest.approx(0.3)


def test_hard_labels_are_labels():
    SyntheticSet(2, 1, (1, 1, 1)).fill(torch.zeros(2, 1, 1, 1), torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]]))


def test_the_step_size_is_lifted_to_its_floor_and_not_lowered():
    synthetic = SyntheticSet(2, 1, (1, 1, 1), lr=0.1, lr_floor=1e-3)
    for before, after in ((-0.2, 1e-3), (0.5, 0.5)):
        synthetic.fill(torch.zeros(2, 1, 1, 1), torch.zeros(2, 2), lr=before)
        synthetic.clamp_lr_()
        assert synthetic.lr.item() == pytest.approx(after)


@pytest.mark.parametrize(
    ("images", "labels", "line"),
    [
        (torch.zeros(3, 1, 2, 2), torch.zeros(4, 2), r"images: expected \(4, 1, 2, 2\), got \(3, 1, 2, 2\)"),
        (torch.zeros(4, 1, 2, 2), torch.zeros(4), r"labels: expected \(4, 2\), got \(4,\)"),
        (torch.full((4, 1, 2, 2), math.nan), torch.zeros(4, 2), "images: expected finite pixels, got 16 that are not"),
        (torch.zeros(4, 1, 2, 2), torch.full((4, 2), -math.inf), "labels: expected logits .*, got 4 rows"),
    ],
)
def test_what_cannot_fill_it_is_refused_and_changes_nothing(images, labels, line):
    synthetic = SyntheticSet(2, 2, (1, 2, 2))
    with pytest.raises(ValueError, match=f"^synthetic: {line}"):
        synthetic.fill(images, labels)
    assert not synthetic.images.any() and not synthetic.labels.any()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"num_classes": 1}, "num_classes: expected >= 2, got 1"),
        ({"ipc": 0}, "ipc: expected >= 1, got 0"),
        ({"lr": -0.1}, "lr: expected >= lr_floor = 1e-06, got -0.1"),
        ({"lr": math.nan}, "lr: expected"),
        ({"lr_floor": 0.0}, "lr_floor: expected > 0, got 0.0"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, line):
    with pytest.raises(ValueError, match=f"^synthetic: {line}"):
        SyntheticSet(**({"num_classes": 2, "ipc": 1, "image_shape": (1, 2, 2)} | arguments))
