import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from hasten.datamodules import Digits
from hasten.errors import HastenError
from hasten.formats import write_trajectory
from hasten.nn import ConvNet, EasyToHard, FlatModel
from hasten.tasks.difficulty import difficulty


@pytest.fixture(scope="module")
def data():
    return Digits(val=1200, test=400)


@pytest.fixture
def experts(tmp_path):
    """Two experts of three points each."""
    model = FlatModel(_net(0))
    for expert in range(2):
        theta = torch.stack([model.flatten(_net(10 * expert + epoch)) for epoch in range(3)])
        write_trajectory(
            tmp_path / "experts" / f"expert_{expert:04d}.safetensors", theta, train_acc=[0.1] * 3, val_acc=[0.1] * 3,
            names=model.names, shapes=model.shapes, recipe={},
        )  # fmt: skip
    return tmp_path / "experts"


def _net(seed):
    torch.manual_seed(seed)
    return ConvNet(1, 8, 10, width=4, depth=2)


def test_images_are_scored_at_the_epoch_asked_for_and_a_curriculum_can_read_it(data, experts, tmp_path):
    metrics = difficulty(tmp_path, data=data, model=_net(0), experts=experts, epoch=1, batch_size=50)
    found = load_file(tmp_path / "difficulty.safetensors")
    scores, labels = found["scores"], found["labels"]
    assert torch.equal(labels, data.train_labels)
    for index in (0, 123):
        norms = []
        for net in (_net(1), _net(11)):
            F.cross_entropy(net(data.train_images([index])), labels[index : index + 1]).backward()
            norms.append(nn.utils.parameters_to_vector(p.grad for p in net.parameters()).norm())
        torch.testing.assert_close(scores[index], sum(norms) / 2)
    assert metrics == pytest.approx({"difficulty/mean": scores.mean().item(), "difficulty/std": scores.std().item()})
    seen = EasyToHard(tmp_path / "difficulty.safetensors")(0, labels)
    assert scores[seen].mean() < scores.mean()
    with Image.open(tmp_path / "difficulty.png") as picture:
        assert picture.size == (10 * 50 + 2, 10 * 50 + 2)  # ten classes, ten images each


def test_experts_beyond_the_number_asked_for_have_no_say(data, experts, tmp_path):
    difficulty(tmp_path, data=data, model=_net(0), experts=experts, epoch=2, max_experts=1)
    scores = load_file(tmp_path / "difficulty.safetensors")["scores"]
    net = _net(2)
    F.cross_entropy(net(data.train_images([5])), data.train_labels[5:6]).backward()
    torch.testing.assert_close(scores[5], nn.utils.parameters_to_vector(p.grad for p in net.parameters()).norm())


def test_an_epoch_beyond_the_training_is_refused(data, experts, tmp_path):
    with pytest.raises(HastenError, match=r"epoch: expected 0 to 2.*got 3"):
        difficulty(tmp_path, data=data, model=_net(0), experts=experts, epoch=3)


def test_experts_of_other_images_are_refused(data, tmp_path):
    model, recipe = FlatModel(_net(0)), {"data": Digits().description()}
    about = {"names": model.names, "shapes": model.shapes, "train_acc": [0.1] * 2, "val_acc": [0.1] * 2}
    theta = model.flatten(_net(0)).expand(2, -1)
    write_trajectory(tmp_path / "expert_0000.safetensors", theta, recipe=recipe, **about)
    with pytest.raises(HastenError, match=r"^difficulty: expected data as .*they differ in split"):
        difficulty(tmp_path, data=data, model=_net(0), experts=tmp_path, epoch=1)


def test_experts_of_another_network_are_refused(data, experts, tmp_path):
    with pytest.raises(HastenError, match="parameters"):
        difficulty(tmp_path, data=data, model=ConvNet(1, 8, 10, width=8, depth=2), experts=experts, epoch=0)
