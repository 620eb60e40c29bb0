import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hasten.functional.matching import hard_logits
from hasten.nn import ConvNet
from hasten.nn.dataset_distillation.comparison import (
    FewImages,
    Jury,
    Progress,
    Recipe,
    candidates,
    mixed_seed,
    table_of,
)
from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.dataset_distillation.evaluation import (
    accuracy,
    augmentation_robust_score,
    hard_label_recovery,
    hits,
    improvement_over_random,
    label_robust_score,
    train_on,
)
from hasten.nn.dataset_distillation.table import Row, Table, scores


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def few(n=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 4, 4, generator=generator), torch.randn(n, 3, generator=generator)


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_training_is_the_recipe_written_out_step_by_step(epochs):
    net, (images, labels) = linear(), few()
    expected = copy.deepcopy(net)
    train_on(net, images, labels, lr=0.2, epochs=epochs, batch_size=4, augment=None, generator=seeded(7))
    generator, momenta = seeded(7), [torch.zeros_like(parameter) for parameter in expected.parameters()]
    for epoch in range(epochs):
        lr = 0.2 if epoch < max(1, epochs // 2) else 0.02
        order = torch.randperm(6, generator=generator)
        for rows in (order[:4], order[4:]):
            logs = F.log_softmax(expected(images[rows]), dim=1)
            loss = -(labels[rows].softmax(1) * logs).sum(1).mean()
            gradients = torch.autograd.grad(loss, list(expected.parameters()))
            with torch.no_grad():
                for parameter, gradient, momentum in zip(expected.parameters(), gradients, momenta, strict=True):
                    momentum.mul_(0.9).add_(gradient + 5e-4 * parameter)
                    parameter -= lr * momentum
    for found, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_hard_labels_train_as_class_numbers_do():
    net, images = linear(), few()[0]
    other, classes = copy.deepcopy(net), torch.arange(6) % 3
    train_on(net, images, hard_logits(classes, 3), lr=0.2, epochs=3, augment=None, generator=seeded(0))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.2 if epoch < 1 else 0.02
        optimizer.zero_grad()
        F.cross_entropy(other(images), classes).backward()
        optimizer.step()
    torch.testing.assert_close(net.state_dict(), other.state_dict())


def test_the_same_generator_gives_the_same_net_and_torchs_own_is_left_alone():
    images, labels = few()
    net = partial(ConvNet, 1, 4, 3, width=4, depth=1)
    torch.manual_seed(5)
    nets = [net() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    before = torch.get_rng_state()
    for model in nets:
        train_on(model, images, labels, lr=0.1, epochs=4, batch_size=4, augment=DSA(), generator=seeded(1))
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)


def test_the_images_neither_change_nor_collect_gradients():
    images, labels = (tensor.requires_grad_() for tensor in few())
    before = images.detach().clone()
    train_on(linear(), images, labels, lr=0.1, epochs=2, augment=DSA(), generator=seeded(0))
    assert torch.equal(images, before)
    assert images.grad is None
    assert labels.grad is None


def test_progress_is_told_after_every_epoch():
    told = []
    images, labels = few()
    train_on(
        linear(), images, labels, lr=0.1, epochs=3, augment=None, generator=seeded(0), progress=lambda: told.append(1)
    )
    assert len(told) == 3


def test_accuracy_is_the_share_that_is_right_over_all_batches():
    batches = [(torch.eye(3).view(3, 1, 1, 3), torch.tensor([0, 1, 1])), (torch.eye(3)[:1], torch.tensor([0]))]
    assert hits(nn.Flatten(), batches) == (3, 4)
    assert accuracy(nn.Flatten(), batches) == 0.75


def test_accuracy_is_of_evaluation_mode_and_puts_the_mode_back():
    net = nn.Sequential(nn.Dropout(1.0), nn.Flatten())
    assert accuracy(net, [(torch.eye(3), torch.arange(3))]) == 1
    assert net.training


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"lr": 0.0}, {"lr": math.nan}, {"batch_size": 0}])
def test_numbers_out_of_range_are_refused(changes):
    images, labels = few()
    with pytest.raises(ValueError, match=r"^train_on: "):
        train_on(linear(), images, labels, **({"lr": 0.1, "epochs": 1} | changes), augment=None, generator=seeded(0))


def test_what_holds_no_images_is_refused():
    images, labels = few()
    with pytest.raises(ValueError, match="as many labels as images"):
        train_on(linear(), images, labels[:2], lr=0.1, epochs=1, augment=None, generator=seeded(0))
    with pytest.raises(ValueError, match="expected at least one image"):
        accuracy(linear(), [])


# ------------------------------------------------------------------ scores


def test_scores_are_in_fractions_and_lie_where_they_should():
    assert hard_label_recovery(0.9, 0.5) == pytest.approx(0.4)
    assert improvement_over_random(0.7, 0.5) == pytest.approx(0.2)
    a = 0.5 * 0.2 - 0.5 * 0.4
    assert label_robust_score(0.4, 0.2) == pytest.approx((math.exp(a) - math.exp(-1)) / (math.e - math.exp(-1)))
    assert (label_robust_score(-1, 1), label_robust_score(1, -1)) == (pytest.approx(1), pytest.approx(0))
    assert augmentation_robust_score(0.3, 0.1) == pytest.approx(label_robust_score(0, 0.4))
    assert label_robust_score(0.9, 0.2, weight=1) == pytest.approx(augmentation_robust_score(0.2, 0, weight=1))


@pytest.mark.parametrize("score", [hard_label_recovery, improvement_over_random, label_robust_score])
def test_percentage_points_are_refused(score):
    with pytest.raises(ValueError, match="divide percentage points by 100"):
        score(50.0, 0.5)


def test_ior_is_against_random_images_with_labels_of_the_same_kind():
    table = {"random": 0.5, "random_soft": 0.6, "whole": 0.9, "best": 0.8, "best, hard labels": 0.7}
    soft, hard = (scores(table, own="best", hard_labels=kind) for kind in (False, True))
    assert (soft["ior"], soft["hlr"]) == (pytest.approx(0.2), pytest.approx(0.2))
    assert (hard["ior"], hard["hlr"]) == (pytest.approx(0.3), pytest.approx(0.1))
    assert scores({"best": 0.8}, own="best", hard_labels=False) == {}


# ------------------------------------------------------------------ the table


def jury(**changes):
    return Jury({"linear": linear}, **({"seeds": 2, "seed": 0, "device": torch.device("cpu")} | changes))


def arm_of(recipe, lrs=(0.1,)):
    return recipe.given("few", *few(), lrs)


RECIPE = Recipe(epochs=5, whole_epochs=5, augment=None, seed=0)
BATCHES = [(few(60)[0], torch.arange(60) % 3)]


def test_a_jury_gives_the_same_numbers_whatever_was_drawn_before():
    one = jury().accuracies(arm_of(RECIPE), "linear", 0.1, BATCHES)
    torch.rand(100)
    before = torch.get_rng_state()
    assert jury().accuracies(arm_of(RECIPE), "linear", 0.1, BATCHES) == one
    assert torch.equal(torch.get_rng_state(), before)
    assert jury(seed=1).accuracies(arm_of(RECIPE), "linear", 0.1, BATCHES) != one
    assert one[0] != one[1]


def test_the_holdout_chooses_the_learning_rate():
    images = torch.eye(3).repeat(1, 1)[:, None, None, :]
    recipe = Recipe(epochs=3, whole_epochs=1, augment=None, seed=0)
    arm = recipe.given("few", images, 9 * torch.eye(3), (1e-9, 1.0))
    juror = jury()
    juror.nets = {"linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 3))}
    assert juror.chosen_lr(arm, "linear", [(images, torch.arange(3))]) == 1.0
    assert juror.chosen_lr(arm_of(RECIPE, (0.3,)), "linear", []) == 0.3


def test_several_processes_pool_what_they_count():
    pooled = []

    def pool(counts):
        pooled.append(counts)
        return counts + torch.tensor([0.0, 60.0])

    alone = jury().accuracies(arm_of(RECIPE), "linear", 0.1, BATCHES)
    together = jury(pooled=pool).accuracies(arm_of(RECIPE), "linear", 0.1, BATCHES)
    assert together == pytest.approx([share / 2 for share in alone])
    assert len(pooled) == 2


class Real:
    """Three classes of 4, 4 and 4 real images."""

    num_classes = 3
    image_shape = (1, 4, 4)
    class_names = ["a", "b", "c"]
    train_labels = torch.arange(12) % 3

    def train_images(self, indices):
        return few(12)[0][torch.as_tensor(indices)]


def test_random_images_are_of_the_right_class_and_others_for_every_net():
    recipe = Recipe(epochs=1, whole_epochs=1, augment=None, seed=0, data=Real())
    arm = recipe.random(2, (0.1,))
    drawn = [arm.draw(number) for number in range(3)]
    for images, labels in drawn:
        indices = [(few(12)[0] == image).all((1, 2, 3)).nonzero().item() for image in images]
        assert [i % 3 for i in indices] == [0, 0, 1, 1, 2, 2] == labels.argmax(1).tolist()
        assert len(set(indices)) == 6
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(arm.draw(0)[0], drawn[0][0])


def test_a_class_with_too_few_images_is_named():
    recipe = Recipe(epochs=1, whole_epochs=1, augment=None, seed=0, data=Real())
    with pytest.raises(ValueError, match=r"class 'a': expected at least ipc = 5 images to start from, got 4"):
        recipe.random(5, (0.1,)).draw(0)


def test_a_table_can_be_read_by_people_and_programs():
    distilled = FewImages(*few(), torch.arange(3).repeat_interleave(2), lr=0.05)
    recipe = Recipe(epochs=2, whole_epochs=3, augment=None, seed=0, data=Real())
    table = table_of(
        {"distilled": distilled}, jury(), recipe, BATCHES, BATCHES, baselines=("random", "whole"), say=None
    )
    assert [(row.arm, row.lr_from, row.epochs) for row in table.rows] == [
        ("random", "holdout", 2), ("whole", "holdout", 3), ("distilled", "learned", 2),
        ("distilled, hard labels", "holdout", 2),
    ]  # fmt: skip
    row = table.row("distilled", "linear")
    assert f"| distilled | linear | 0.05 (learned) | 2 | {row.mean:.4f} ± {row.std:.4f} | 2 |" in table.markdown()
    assert table.to_json()["rows"][2]["accuracies"] == row.accuracies
    assert table.csv().splitlines()[3].startswith("distilled,linear,0.05,learned,2,2,")


def test_one_net_has_no_standard_deviation():
    row = Row("few", "linear", 0.1, "given", 5, (0.5,))
    assert (row.std, row.reading) == (None, "0.5000")
    assert Table((row,)).csv().splitlines()[1] == "few,linear,0.1,given,5,1,0.5,"


def test_the_learned_step_size_is_tried_once():
    assert candidates(0.05) == (0.05, 0.01, 0.1)
    assert candidates(0.01) == (0.01, 0.1)


def test_progress_says_little_and_how_long_it_will_take(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    tell = Progress(100, lines.append).part("random on convnet", 10)
    for _ in range(5):
        now[0] += 4
        tell()
    assert lines == ["evaluation: 30%, random on convnet, about 28 s left"]


def test_seeds_of_near_numbers_are_far_apart():
    seeds = {mixed_seed(0, "net", number) for number in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
