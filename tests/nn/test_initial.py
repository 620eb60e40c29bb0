from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hasten.formats.trajectories import Trajectory, write_trajectory
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.nn.dataset_distillation.initial import correctly_predicted, expert_logits, real, real_hard

CLASSES = 3


class Pixels:
    """Images of one pixel that is their number; image i is of class i % 3."""

    num_classes, class_names = CLASSES, ["ant", "bee", "cat"]

    def __init__(self, n=60):
        self.train_labels = torch.arange(n) % CLASSES

    def train_images(self, indices):
        return torch.as_tensor(indices).view(-1, 1, 1, 1).float()


class Table(nn.Module):
    """Logits looked up by the number in the pixel."""

    def __init__(self, n=60):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n, CLASSES))

    def forward(self, images):
        return self.logits[images.flatten().long()]


@pytest.fixture
def experts(tmp_path):
    """Three experts: each is right about a class only where its number divides the image's place in the class."""

    def made(*tables):
        student, found = FlatModel(Table()), []
        for i, logits in enumerate(tables):
            path = tmp_path / f"expert_{i:04d}.safetensors"
            theta = torch.stack([torch.zeros(student.numel), logits.flatten()])
            acc = {"train_acc": [0.0, 1.0], "val_acc": [0.0, 1.0]}
            write_trajectory(path, theta, names=student.names, shapes=student.shapes, recipe={}, **acc)
            found.append(Trajectory(path))
        return student, found

    return made


def _right_about(images, scale=1.0):
    """Logits (60, 3) of an expert that is right about these images and takes the next class for all others."""
    labels = torch.arange(60) % CLASSES
    predicted = torch.where(torch.isin(torch.arange(60), torch.as_tensor(images)), labels, (labels + 1) % CLASSES)
    return scale * nn.functional.one_hot(predicted, CLASSES).float() + torch.rand(60, CLASSES) * 0.1


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_images_are_those_the_first_expert_is_right_about_and_then_the_next(experts):
    first, second = range(0, 12), range(6, 60)  # of each class four, and those from its third on
    student, found = experts(_right_about(first), _right_about(second))
    images, labels = correctly_predicted(Pixels(), student, found, ipc=6, generator=_generator())
    numbers = images.flatten().long().view(CLASSES, 6)
    for label, of_class in enumerate(numbers):
        assert set(of_class.tolist()) <= set(range(label, 60, CLASSES))
        assert len(set(of_class.tolist())) == 6
        assert set(of_class[:4].tolist()) == set(range(label, 12, CLASSES))
        assert set(of_class[4:].tolist()) <= set(second) - set(first)
    assert labels.equal(expert_logits(student, found, images, torch.arange(CLASSES).repeat_interleave(6)))


def test_the_order_is_random_and_a_function_of_the_generator(experts):
    student, found = experts(_right_about(range(60)))
    one, same, other = (
        correctly_predicted(Pixels(), student, found, ipc=3, generator=_generator(seed))[0].flatten().tolist()
        for seed in (0, 0, 1)
    )
    assert one == same != other
    assert one != sorted(one)


def test_what_an_expert_is_wrong_about_does_not_change_what_the_next_class_draws(experts):
    picked = []
    for right in (range(60), [i for i in range(60) if i % CLASSES or i > 20]):
        student, found = experts(_right_about(right))
        picked.append(correctly_predicted(Pixels(), student, found, ipc=2, generator=_generator())[0].flatten())
    assert picked[0][2:].equal(picked[1][2:]) and not picked[0][:2].equal(picked[1][:2])


def test_soft_labels_are_the_mean_over_the_experts_that_are_right(experts):
    tables = [_right_about(right, scale) for right, scale in ((range(40), 1.0), (range(20, 60), 3.0), ([], 9.0))]
    student, found = experts(*tables)
    numbers = torch.tensor([0, 25, 59])
    images, classes = Pixels().train_images(numbers), numbers % CLASSES
    slow = torch.stack([tables[0][0], (tables[0][25] + tables[1][25]) / 2, tables[1][59]])
    torch.testing.assert_close(expert_logits(student, found, images, classes), slow)


def test_an_image_that_no_expert_is_right_about_is_refused_or_takes_the_mean_of_all(experts):
    tables = [_right_about(range(10)), _right_about(range(20))]
    student, found = experts(*tables)
    images, classes = Pixels().train_images([5, 30]), torch.tensor([2, 0])
    with pytest.raises(ValueError, match=r"^initial: expected at least one of 2 experts .* got none for 1 of 2; "):
        expert_logits(student, found, images, classes)
    labels = expert_logits(student, found, images, classes, fall_back=True)
    torch.testing.assert_close(labels, torch.stack([(tables[0][i] + tables[1][i]) / 2 for i in (5, 30)]))


def test_real_images_come_with_the_first_experts_logits_or_with_hard_labels(experts):
    table = torch.randn(60, CLASSES)
    student, found = experts(table, torch.randn(60, CLASSES))
    images, labels = real(Pixels(), student, found, ipc=4, generator=_generator())
    numbers = images.flatten().long()
    assert (numbers % CLASSES).tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(set(numbers.tolist())) == 12
    assert labels.equal(table[numbers])
    same, hard = real_hard(Pixels(), student, found, ipc=4, generator=_generator())
    assert same.equal(images)
    assert hard.softmax(1).equal(nn.functional.one_hot(numbers % CLASSES, CLASSES).float())


def test_a_class_with_too_few_images_that_an_expert_is_right_about_is_named(experts):
    student, found = experts(_right_about([0, 1, 2, 3, 5, 6]), _right_about([0, 3, 4, 5]))
    line = r"^initial: class 'cat': expected 3 images .* got 2 of 20 over all 2 experts; .* lower ipc, or .* init=real$"
    with pytest.raises(ValueError, match="class 'bee': expected 3"):
        correctly_predicted(Pixels(), student, found, ipc=3, generator=_generator())
    student, found = experts(_right_about([0, 1, 2, 3, 4, 5, 6]), _right_about([7, 0, 5]))
    with pytest.raises(ValueError, match=line):
        correctly_predicted(Pixels(), student, found, ipc=3, generator=_generator())


@pytest.mark.parametrize("beginning", [correctly_predicted, real, real_hard])
def test_a_class_with_fewer_images_than_wanted_is_named(beginning, experts):
    data = SimpleNamespace(num_classes=2, class_names=["ant", "bee"], train_labels=torch.tensor([0, 0, 1]))
    student, found = experts(_right_about(range(60)))
    with pytest.raises(ValueError, match=r"^initial: class 'bee': expected at least ipc = 2 .* got 1; lower ipc$"):
        beginning(data, student, found, ipc=2, generator=_generator())
