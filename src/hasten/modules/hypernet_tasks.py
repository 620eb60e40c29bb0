"""What an input of a hypernetwork acts on: transforms, losses, penalties and metrics, chosen in configs by their path.

A transform makes (x, target) of a batch. One that draws is a module, so that it knows training from evaluation.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Generator, Tensor, nn
from torchmetrics import Metric

from hasten.functional import moment_matched_kl
from hasten.nn import HyperModel

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and targets (B, ...)."""


def rotated(batch: Batch, angle: Tensor, *, fill: float = -1.0) -> Batch:
    """Turn the images of a batch about their centres, counter-clockwise; the targets stay.

    Args:
        batch: images and targets.
        angle: in degrees, () or (B,).
        fill: what comes in at the corners; -1 is black to hasten's datamodules.

    Example:
        >>> images = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> rotated((images, torch.zeros(1)), torch.tensor(90.0))[0].round().tolist()
        [[[[2.0, 4.0], [1.0, 3.0]]]]
    """
    images, targets = batch
    height, width = images.shape[-2:]
    radians = angle.to(images).deg2rad().expand(len(images))
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    # from where each pixel is taken: coordinates go from -1 to 1 along both sides, y downwards
    rows = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=-1)
    places = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images - fill, places, align_corners=False) + fill, targets


# ------------------------------------------------------------------ a trade-off of losses


class Noisy(nn.Module):
    """Add Gaussian noise; the clean images are the target. In evaluation it is always the same noise.

    Args:
        std: of the noise, on images in [-1, 1].

    Example:
        >>> noisy, clean = Noisy(0.4)((torch.zeros(2, 1, 8, 8), torch.zeros(2)))
        >>> noisy.shape, clean.abs().max()
        (torch.Size([2, 1, 8, 8]), tensor(0.))
    """

    def __init__(self, std: float):
        super().__init__()
        self.std = std

    def forward(self, batch: Batch) -> Batch:
        images, _ = batch
        noise = torch.randn(images.shape, generator=_generator(self, images), device=images.device)
        return images + self.std * noise, images


def fidelity_and_smoothness(
    output: Tensor, target: Tensor, smoothness: Tensor, *, total_variation_weight: float
) -> Tensor:
    """(1 - smoothness) MSE + smoothness * weight * total variation, a number an image, (B,).

    Args:
        output: images (B, C, H, W).
        target: images.
        smoothness: in [0, 1], () or (B,).
        total_variation_weight: brings the two to one size.

    Example:
        >>> output, target = torch.tensor([[[[0.0, 1.0]]]]), torch.ones(1, 1, 1, 2)
        >>> fidelity_and_smoothness(output, target, torch.tensor(0.25), total_variation_weight=2.0)
        tensor([0.8750])
    """
    fidelity = (output - target).square().flatten(1).mean(1)
    return (1 - smoothness) * fidelity + smoothness * total_variation_weight * total_variation(output)


def total_variation(images: Tensor, target: Tensor | None = None) -> Tensor:
    """The mean absolute difference of neighbours, below and beside each other, (B, C, H, W) -> (B,).

    Args:
        images: two pixels at least.
        target: ignored; a metric is given it.

    Example:
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
        tensor([0.5000])
    """
    differences = [(images.diff(dim=dim)).abs().flatten(1) for dim in (-2, -1)]
    return torch.cat(differences, dim=1).mean(1)


# ------------------------------------------------------------------ a distribution of networks


class AmortisedPrior(nn.Module):
    """A penalty that keeps what is generated near a normal prior, spread included: an approximate Bayesian network.

    It draws inputs, generates, and compares each generated number's mean and variance over the draws with
    normal(0, std^2). Nothing else in a loss asks the weights to differ over an input that is noise.

    Args:
        weight: of the KL, a mean over the generated numbers; with their number divided by that of the training samples
            the loss is the evidence lower bound, and far less is usual.
        std: of the prior.
        draws: inputs, >= 2.

    Source: ours; the paper has no such term.

    Example:
        >>> from hasten.nn import Range, hypernetize
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> AmortisedPrior(weight=1.0, std=0.1)(hypernetize(net, {"noise": Range(0, 1, dim=16)})) > 0
        tensor(True)
    """

    def __init__(self, weight: float, std: float, *, draws: int = 8):
        super().__init__()
        self.weight = weight
        self.std = std
        self.draws = draws

    def forward(self, model: HyperModel) -> Tensor:
        deltas = model.delta(**model.sample_inputs(self.draws)).values()
        return (
            self.weight * moment_matched_kl(torch.cat([delta.flatten(1) for delta in deltas], 1), std=self.std).mean()
        )


def mixture(logits: Tensor) -> Tensor:
    """The mean prediction of K networks, logits (K, B, C) -> probabilities (B, C).

    Example:
        >>> mixture(torch.tensor([[[0.0, 0.0]], [[100.0, 0.0]]]))
        tensor([[0.7500, 0.2500]])
    """
    return logits.softmax(-1).mean(0)


def mixture_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative log likelihood of the mean prediction of K networks, (K, B, C) and (B,) -> (B,) nats.

    Example:
        >>> mixture_nll(torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([1]))
        tensor([0.6931])
    """
    return F.nll_loss(logits.log_softmax(-1).logsumexp(0) - math.log(len(logits)), labels, reduction="none")


class MeanOf(Metric):
    """A metric out of a function: the mean over samples of function(output, target), (B,); lower is better.

    Args:
        function: a number a sample.

    Example:
        >>> metric = MeanOf(total_variation)
        >>> metric.update(torch.zeros(2, 1, 4, 4), torch.zeros(2))
        >>> metric.compute()
        tensor(0.)
    """

    full_state_update = False
    higher_is_better = False
    total: Tensor
    samples: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.function = function
        for state in ("total", "samples"):
            self.add_state(state, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        values = self.function(output, target)
        self.total += values.sum()
        self.samples += len(values)

    def compute(self) -> Tensor:
        return self.total / self.samples


class Disagreement(MeanOf):
    """How much K networks differ: the mutual information of prediction and network, in nats, of logits (K, B, C).

    It is the entropy of the mean prediction less the mean entropy: 0 where all predict the same, at most log K. Below
    ``least`` it warns that the network ignores its input.

    Args:
        least: nats.

    Example:
        >>> metric = Disagreement()
        >>> metric.update(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.6931)
    """

    higher_is_better = True

    def __init__(self, *, least: float = 1e-3):
        super().__init__(_mutual_information)
        self.least = least

    def compute(self) -> Tensor:
        nats = super().compute()
        if nats < self.least:
            rank_zero_warn(
                f"hypernet_tasks: disagreement: expected networks that differ over the input, got {nats:.1e} nats; the "
                "network ignores its input: raise the weight of what asks for a spread"
            )
        return nats


def _mutual_information(logits: Tensor, labels: Tensor) -> Tensor:
    probabilities = logits.softmax(-1)
    return torch.special.entr(probabilities.mean(0)).sum(-1) - torch.special.entr(probabilities).sum(-1).mean(0)


# ------------------------------------------------------------------ segmentation


class Scattered(nn.Module):
    """A segmentation task out of grey digits: find the digit beside a thing of the same strokes, and under noise.

    Each canvas has a digit in one half and, in the other, the next sample's digit with its quarters exchanged, at any
    height and half as wide as the canvas. The target is the ink of the digit, (B, 1, size, size) of 0 and 1. In
    evaluation a batch is always scattered in the same way.

    Args:
        size: of the canvas.
        noise: its standard deviation, on ink in [0, 1].

    Example:
        >>> images, masks = Scattered(32)((torch.ones(4, 1, 8, 8), torch.zeros(4)))
        >>> images.shape, masks.shape, masks.unique()
        (torch.Size([4, 1, 32, 32]), torch.Size([4, 1, 32, 32]), tensor([0, 1]))
    """

    def __init__(self, size: int, *, noise: float = 0.3):
        super().__init__()
        self.size = size
        self.noise = noise

    def forward(self, batch: Batch) -> Batch:
        ink = (batch[0] + 1) / 2
        other = ink.roll(1, 0).roll((ink.shape[-2] // 2, ink.shape[-1] // 2), (-2, -1))
        generator, device = _generator(self, ink), ink.device
        side = torch.randint(2, (len(ink),), generator=generator, device=device) - 0.5  # the centre of a half
        heights = torch.rand(2, len(ink), generator=generator, device=device) - 0.5
        digit = _placed(ink, side, heights[0], self.size)
        image = torch.maximum(digit, _placed(other, -side, heights[1], self.size))
        image = image + self.noise * torch.randn(image.shape, generator=generator, device=device)
        return 2 * image - 1, (digit > 0.5).long()


def _placed(ink: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Images (B, 1, H, W) at half the width of a canvas (B, 1, size, size), their centres at x, y (B,) in [-1, 1]."""
    zero, two = torch.zeros_like(x), torch.full_like(x, 2)
    rows = torch.stack([two, zero, -2 * x, zero, two, -2 * y], dim=-1).view(-1, 2, 3)
    places = F.affine_grid(rows, [len(ink), 1, size, size], align_corners=False)
    return F.grid_sample(ink, places, align_corners=False)


def dice_and_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy plus 1 - Dice of the probabilities, logits and 0 or 1 (B, ...) -> (B,).

    Example:
        >>> dice_and_cross_entropy(torch.tensor([[100.0, -100.0]]), torch.tensor([[1, 0]]))
        tensor([0.])
    """
    target = target.to(output)
    found = output.sigmoid().flatten(1)
    wanted = target.flatten(1)
    dice = (2 * (found * wanted).sum(1) + 1) / (found.sum(1) + wanted.sum(1) + 1)  # 1: where there is nothing
    return F.binary_cross_entropy_with_logits(output, target, reduction="none").flatten(1).mean(1) + 1 - dice


def _generator(module: nn.Module, like: Tensor) -> Generator | None:
    """The global one in training; in evaluation one that always begins alike."""
    return None if module.training else Generator(like.device).manual_seed(0)
