import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from hasten.nn import ConvNet, EasyToHard, FlatModel, grand


def seen_of(schedule, epoch, labels, scores):
    """The difficulty ranks that are seen in an epoch, for each class."""
    indices = schedule(epoch, labels)
    assert indices.tolist() == sorted(set(indices.tolist()))
    found = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        ranks = {
            int(index): rank for rank, index in enumerate(sorted(members.tolist(), key=lambda i: float(scores[i])))
        }
        found.append(sorted(ranks[int(index)] for index in indices if int(index) in ranks))
    return found


@pytest.fixture
def two_classes():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(140, generator=generator) < 0.3).long()
    return labels, torch.rand(140, generator=generator)


@pytest.mark.parametrize(
    ("epoch", "easiest_left_out", "up_to"),
    [
        (0, 0.0, 0.75),
        (10, 0.0, 0.875),
        (20, 0.0, 1.0),
        (21, 0.0, 1.0),
        (40, 0.0, 1.0),
        (41, 0.1, 1.0),
        (60, 0.1, 1.0),
        (61, 0.2, 1.0),
        (99, 0.2, 1.0),
    ],
)
def test_experts_see_easy_images_first_and_leave_the_easiest_out_later(two_classes, epoch, easiest_left_out, up_to):
    labels, scores = two_classes
    for ranks, size in zip(seen_of(EasyToHard(scores), epoch, labels, scores), labels.bincount(), strict=True):
        assert ranks == list(range(int(easiest_left_out * size), int(up_to * size)))


def test_no_class_is_ever_empty():
    labels, scores = torch.tensor([0, 0, 1]), torch.tensor([0.2, 0.1, 0.3])
    schedule = EasyToHard(scores, initial=0.1, full_at=2, removals=[(3, 0.9), (4, 0.99)])
    for epoch in range(6):
        assert labels[schedule(epoch, labels)].unique().tolist() == [0, 1]


def test_epochs_and_shares_are_free(two_classes):
    labels, scores = two_classes
    schedule = EasyToHard(scores, initial=0.5, full_at=4, removals=[(8, 0.25)])
    sizes = labels.bincount()
    assert [len(ranks) for ranks in seen_of(schedule, 2, labels, scores)] == [int(0.75 * size) for size in sizes]
    assert [ranks[0] for ranks in seen_of(schedule, 9, labels, scores)] == [int(0.25 * size) for size in sizes]


def test_its_words_tell_scores_and_schedules_apart():
    scores = torch.arange(4.0)
    words = {repr(EasyToHard(*each)) for each in ((scores,), (scores.clone(),), (scores + 1,))}
    assert len(words) == 2
    assert repr(EasyToHard(scores, initial=0.5)) not in words


def test_scores_are_read_from_the_file_of_the_task(tmp_path):
    labels = torch.tensor([0, 1, 0, 1])
    save_file({"scores": torch.tensor([0.4, 0.3, 0.2, 0.1]), "labels": labels}, tmp_path / "difficulty.safetensors")
    schedule = EasyToHard(tmp_path / "difficulty.safetensors", initial=0.5)
    assert schedule(0, labels).tolist() == [2, 3]
    with pytest.raises(ValueError, match="scored"):
        schedule(0, labels.flip(0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"initial": 0.0}, "initial.*0.0"),
        ({"full_at": 0}, "full_at.*0"),
        ({"removals": [(60, 0.1), (40, 0.2)]}, "growing"),
        ({"removals": [(10, 0.1)]}, "from 20 on"),
        ({"removals": [(40, 1.0)]}, "shares"),
        ({"scores": torch.tensor([0.1, float("nan")])}, "finite"),
        ({"scores": "nowhere.safetensors"}, "nowhere"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        EasyToHard(**({"scores": torch.rand(4)} | options))


def test_other_images_than_were_scored_are_refused():
    with pytest.raises(ValueError, match="4 training images"):
        EasyToHard(torch.rand(4))(0, torch.zeros(5, dtype=torch.int64))


class Real:
    """Eleven images of three classes."""

    num_classes = 3

    def __init__(self):
        self.train_labels = torch.arange(11) % 3
        self.images = torch.randn(11, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def train_images(self, indices):
        return self.images[indices]


def test_grand_is_the_mean_norm_of_the_gradient_of_each_image_alone():
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(ConvNet(1, 8, 3, width=4, depth=2))
    data, model, calls = Real(), FlatModel(nets[0]), []
    found = grand(model, [model.flatten(net) for net in nets], data, batch_size=4, progress=lambda: calls.append(1))
    assert len(calls) == 6
    for index in range(11):
        norms = []
        for net in nets:
            net.zero_grad()
            F.cross_entropy(net(data.images[index : index + 1]), data.train_labels[index : index + 1]).backward()
            norms.append(nn.utils.parameters_to_vector(p.grad for p in net.parameters()).norm())
        torch.testing.assert_close(found[index], torch.stack(norms).mean())


def test_an_image_that_a_network_knows_moves_it_less():
    torch.manual_seed(0)
    data, net = Real(), ConvNet(1, 8, 3, width=8, depth=2)
    known, sgd = torch.arange(6), torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(100):
        sgd.zero_grad()
        F.cross_entropy(net(data.images[known]), data.train_labels[known]).backward()
        sgd.step()
    scores = grand(FlatModel(net), [FlatModel(net).flatten(net)], data)
    assert scores[:6].max() < scores[6:].mean()


def test_without_networks_there_is_no_score():
    with pytest.raises(ValueError, match="at least one network"):
        grand(FlatModel(ConvNet(1, 8, 3, width=4, depth=2)), [], Real())
