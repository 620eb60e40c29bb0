"""What a synthetic set starts from: real images, and labels that hold what trained experts say of them.

All three beginnings take the same arguments, so that one word of a config swaps them.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from hasten.formats.trajectories import Trajectory
from hasten.functional.matching import hard_logits
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.nn.protocols import HasRealImages

_BATCH = 128  # images at once


def correctly_predicted(
    data: HasRealImages,
    model: FlatModel,
    experts: Sequence[Trajectory],
    *,
    ipc: int,
    generator: Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Random real images that an expert is right about, with the experts' logits: (N, C, H, W), (N, K).

    Of each class the first ``ipc`` images, in a random order, that the last weights of the first expert classify
    correctly; what is missing then comes from the second expert, and so on.

    Args:
        data: the real images.
        model: what the experts' vectors are weights of.
        experts: at least one.
        ipc: images per class, at least 1; N = K * ipc, and the images of a class stand together.
        generator: on the CPU.
        device: where the experts look at the images, and where the result is.

    Raises:
        ValueError: for a class in which the experts are right about fewer images; names it.

    Source: DATM, arXiv:2310.05773, and the code of EDF, arXiv:2410.17193.
    """
    chosen = []
    for label, order in enumerate(_orders(data, ipc, generator)):
        found = order[:0]
        for expert in experts:
            theta = expert.at(-1).to(device)
            for indices in order[~torch.isin(order, found)].split(_BATCH):
                predicted = _logits(model, theta, data.train_images(indices)).argmax(1).cpu()
                found = torch.cat([found, indices[predicted == label]])
                if len(found) >= ipc:
                    break
            if len(found) >= ipc:
                break
        if len(found) < ipc:
            raise ValueError(
                f"initial: class {data.class_names[label]!r}: expected {ipc} images that an expert classifies "
                f"correctly, got {len(found)} of {len(order)} over all {len(experts)} experts; train them longer, "
                "lower ipc, or start from init=real"
            )
        chosen.append(found[:ipc])
    images = data.train_images(torch.cat(chosen)).to(device)
    return images, expert_logits(model, experts, images, _classes(data, ipc).to(device))


def real(
    data: HasRealImages,
    model: FlatModel,
    experts: Sequence[Trajectory],
    *,
    ipc: int,
    generator: Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Random real images with the logits of the first expert: (N, C, H, W), (N, K); see ``correctly_predicted``."""
    images = _random(data, ipc, generator).to(device)
    return images, _logits(model, experts[0].at(-1).to(device), images)


def real_hard(
    data: HasRealImages,
    model: FlatModel,
    experts: Sequence[Trajectory],
    *,
    ipc: int,
    generator: Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Random real images with hard labels: (N, C, H, W), (N, K); see ``correctly_predicted``."""
    images = _random(data, ipc, generator).to(device)
    return images, hard_logits(_classes(data, ipc), data.num_classes).to(device)


def expert_logits(
    model: FlatModel, experts: Sequence[Trajectory], images: Tensor, classes: Tensor, *, fall_back: bool = False
) -> Tensor:
    """The mean, over the experts that are right about an image, of their logits: (N, C, H, W), (N,) -> (N, K).

    Args:
        model: what the experts' vectors are weights of.
        experts: at least one; their last weights count.
        images: in the range of the model.
        classes: int64.
        fall_back: give an image that no expert is right about the mean over all of them, instead of an error.

    Raises:
        ValueError: where no expert is right about an image.

    Source: DATM, arXiv:2310.05773.
    """
    total, right_total, right_count = 0.0, 0.0, torch.zeros_like(classes)
    for expert in experts:
        logits = _logits(model, expert.at(-1).to(images.device), images)
        right = logits.argmax(1) == classes
        total = total + logits
        right_total = right_total + torch.where(right[:, None], logits, 0.0)
        right_count += right
    nobody = right_count == 0
    if nobody.any() and not fall_back:
        raise ValueError(
            f"initial: expected at least one of {len(experts)} experts to be right about an image, got none for "
            f"{int(nobody.sum())} of {len(images)}; train the experts longer, or take other images"
        )
    mean = right_total / right_count.clamp(min=1)[:, None]
    return torch.where(nobody[:, None], total / len(experts), mean)


def _orders(data: HasRealImages, ipc: int, generator: Generator) -> list[Tensor]:
    """For each class the indices of its images in a random order."""
    orders = []
    for label in range(data.num_classes):
        members = (data.train_labels == label).nonzero().flatten()
        if len(members) < ipc:
            raise ValueError(
                f"initial: class {data.class_names[label]!r}: expected at least ipc = {ipc} images to start from, got "
                f"{len(members)}; lower ipc"
            )
        orders.append(members[torch.randperm(len(members), generator=generator)])
    return orders


def _random(data: HasRealImages, ipc: int, generator: Generator) -> Tensor:
    first = torch.cat([order[:ipc] for order in _orders(data, ipc, generator)])
    return data.train_images(first)


def _classes(data: HasRealImages, ipc: int) -> Tensor:
    return torch.arange(data.num_classes).repeat_interleave(ipc)


@torch.no_grad()
def _logits(model: FlatModel, theta: Tensor, images: Tensor) -> Tensor:
    """Of one expert, (N, C, H, W) -> (N, K), on the device of theta."""
    return torch.cat([model(theta, batch.to(theta.device)) for batch in images.split(_BATCH)])
