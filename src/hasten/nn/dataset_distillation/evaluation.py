"""What a few images are worth: train a fresh net on them alone, measure it on real ones, compare with what is free."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.modes import evaluating


def train_on(
    net: nn.Module,
    images: Tensor,
    label_logits: Tensor,
    *,
    lr: float,
    epochs: int,
    batch_size: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    augment: DSA | None,
    generator: Generator,
    progress: Callable[[], None] | None = None,
) -> None:
    """Train ``net`` in place on images (N, C, H, W) with label logits (N, K), by the field's recipe.

    SGD on the cross-entropy against softmax(label_logits), lr / 10 from half of the epochs on. The authors make a new
    optimizer there, which forgets the momentum, and count one epoch more; here the momentum goes on.

    Args:
        net: a fresh one, which says by its parameters on which device it is trained.
        images: anywhere; a batch moves where the net is.
        label_logits: a hard label is 0 at its class and -inf elsewhere.
        lr: step size, > 0.
        epochs: passes over the images, >= 1.
        batch_size: images a step, >= 1.
        momentum: of SGD.
        weight_decay: of SGD.
        augment: of every batch; None: images as they are.
        generator: on the CPU; of the order and the augmentation. Layers that draw for themselves use torch's own.
        progress: called after every epoch.

    Raises:
        ValueError: for numbers out of these ranges, or another number of labels than images.

    Source: the protocol of dataset condensation, arXiv:2006.05929, as trajectory matching uses it, arXiv:2203.11932.

    Example:
        >>> net, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.eye(4).view(4, 1, 2, 2)
        >>> labels = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
        >>> train_on(net, images, labels, lr=0.1, epochs=50, augment=None, generator=torch.Generator())
        >>> accuracy(net, [(images, torch.tensor([0, 0, 1, 1]))])
        1.0
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"train_on: {name}: expected >= 1, got {value}")
    if not lr > 0:
        raise ValueError(f"train_on: lr: expected > 0, got {lr}")
    n = len(images)
    if n == 0 or len(label_logits) != n:
        raise ValueError(f"train_on: expected as many labels as images, >= 1, got {len(label_logits)} and {n}")
    device = next(net.parameters()).device
    targets = label_logits.detach().softmax(dim=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, epochs // 2)], gamma=0.1)
    whole = (images.detach().to(device), targets.to(device)) if n <= batch_size else None
    net.train()
    for _ in range(epochs):
        # a batch of all needs no order
        order = [] if whole else torch.randperm(n, generator=generator).split(batch_size)
        for x, y in [whole] if whole else ((images[i].detach().to(device), targets[i].to(device)) for i in order):
            if augment is not None:
                x = augment(x, augment.draw(len(x), x.shape[-1], generator))
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        schedule.step()
        if progress is not None:
            progress()


def accuracy(net: nn.Module, batches: Iterable[Any]) -> float:
    """The share of real images whose class ``net`` finds, in evaluation mode; batches are (images, labels (B,)).

    Raises:
        ValueError: where there is no image.

    Example:
        >>> accuracy(nn.Flatten(), [(torch.eye(3).view(3, 1, 1, 3), torch.tensor([0, 1, 1]))])
        0.6666666666666666
    """
    right, total = hits(net, batches)
    return right / total


@torch.no_grad()
def hits(net: nn.Module, batches: Iterable[Any]) -> tuple[int, int]:
    """How many real images ``net`` gets right, and of how many.

    Raises:
        ValueError: where there is no image.

    Example:
        >>> hits(nn.Flatten(), [(torch.eye(3).view(3, 1, 1, 3), torch.tensor([0, 1, 1]))])
        (2, 3)
    """
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    right = total = 0
    with evaluating(net):
        for images, labels in batches:
            right += int((net(images.to(device)).argmax(1) == labels.to(device)).sum())
            total += len(labels)
    if total == 0:
        raise ValueError("accuracy: expected at least one image, got none; give the datamodule a val or test split")
    return right, total


# ------------------------------------------------------------------ scores, all in fractions


def hard_label_recovery(whole: float, hard: float) -> float:
    """HLR, what hard labels on the few images leave to be recovered: accuracy of the whole set minus theirs.

    Lower is better.

    Args:
        whole: of a net trained on the whole training set, in [0, 1].
        hard: of one trained on the distilled images with hard labels, in [0, 1].

    Raises:
        ValueError: for percentage points.

    Source: DD-Ranking, arXiv:2505.13300.

    Example:
        >>> hard_label_recovery(0.95, 0.75)
        0.2
    """
    return round(_fraction("whole", whole) - _fraction("hard", hard), 12)


def improvement_over_random(distilled: float, random: float) -> float:
    """IOR, what the distilled images add to random real ones with labels and a recipe of the same kind.

    Args:
        distilled: accuracy, in [0, 1].
        random: likewise.

    Raises:
        ValueError: for percentage points.

    Source: DD-Ranking, arXiv:2505.13300.

    Example:
        >>> improvement_over_random(0.875, 0.75)
        0.125
    """
    return round(_fraction("distilled", distilled) - _fraction("random", random), 12)


def label_robust_score(hlr: float, ior: float, *, weight: float = 0.5) -> float:
    """LRS, both in one number in [0, 1]: (e^a - e^-1) / (e - e^-1) of a = weight * IOR - (1 - weight) * HLR.

    In fractions. The released code of its authors exponentiates percentage points, so never compare with its numbers.

    Raises:
        ValueError: for percentage points.

    Source: DD-Ranking, arXiv:2505.13300.

    Example:
        >>> round(label_robust_score(0.2, 0.125), 4)
        0.2533
    """
    return _score(weight * _fraction("ior", ior, -1) - (1 - weight) * _fraction("hlr", hlr, -1))


def augmentation_robust_score(augmented: float, plain: float, *, weight: float = 0.5) -> float:
    """ARS, the same map of the IOR with augmentation and without: b = weight * augmented + (1 - weight) * plain.

    Raises:
        ValueError: for percentage points.

    Source: DD-Ranking, arXiv:2505.13300.

    Example:
        >>> round(augmentation_robust_score(0.0, 0.0), 4)
        0.2689
    """
    return _score(weight * _fraction("augmented", augmented, -1) + (1 - weight) * _fraction("plain", plain, -1))


def _score(a: float) -> float:
    return (math.exp(a) - math.exp(-1)) / (math.e - math.exp(-1))


def _fraction(name: str, value: float, least: int = 0) -> float:
    if not least <= value <= 1:
        raise ValueError(f"{name}: expected a fraction in [{least}, 1], got {value}; divide percentage points by 100")
    return value
