"""Matching the trajectories of experts by training on synthetic images, and the gradients of what is learned.

A student starts at an expert's parameters theta_0, takes n steps of SGD on synthetic images, theta_{k+1} = theta_k -
lr g_k, and is compared with where the expert went. Letters: P parameters, as one vector; N synthetic images, of which
a step sees B; K classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

StepLoss = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""(theta (P,), images (B, C, H, W), label logits (B, K), draw) -> (): what a step of the student descends on."""

Mask = Callable[[Tensor, Tensor], Tensor]
"""(end (P,), target (P,)) -> keep (P,) bool: which parameters are matched."""


@dataclass(frozen=True, eq=False)
class InnerStep:
    """What one step of the student sees.

    Args:
        rows: of the synthetic images, (B,) int64, each once.
        draw: what the step loss needs beside them, such as the values of an augmentation; replayed as it is.

    Example:
        >>> InnerStep(torch.arange(4)).draw is None
        True
    """

    rows: Tensor
    draw: Any = None


@dataclass(frozen=True, eq=False)
class Matching:
    """A matching loss, and under the names of what was learned its gradients, without graph.

    Args:
        loss: ().
        images: its gradient for the images, (N, C, H, W).
        labels: for the label logits, (N, K).
        lr: for the step size, ().
        end: where the student arrived, (P,).
        kept_fraction: the share of parameters that were matched, ().

    Example:
        >>> loss = lambda theta, x, y, draw: ((x @ theta - y) ** 2).mean()
        >>> x, y, steps = torch.eye(2), torch.ones(2), [InnerStep(torch.arange(2))]
        >>> matching_gradients(loss, torch.zeros(2), torch.ones(2), x, y, torch.tensor(0.5), steps).loss
        tensor(0.2500)
    """

    loss: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor
    end: Tensor
    kept_fraction: Tensor


# ---------------------------------------------------------------------- the steps


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """-sum_k softmax(target)_k log_softmax(logits)_k, averaged over the batch, (B, K), (B, K) -> ().

    Target logits of 0 and -inf are a hard label, whose gradient is exactly 0.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]]))
        tensor(0.6931)
    """
    return F.cross_entropy(logits, target_logits.softmax(dim=1))


def hard_logits(labels: Tensor, num_classes: int) -> Tensor:
    """Labels as the target logits 0 and -inf of :func:`soft_cross_entropy`, (N,) int64 -> (N, K).

    Example:
        >>> hard_logits(torch.tensor([1, 0]), 2)
        tensor([[-inf, 0.], [0., -inf]])
    """
    logits = torch.full((len(labels), num_classes), -math.inf, device=labels.device)
    return logits.scatter(1, labels.unsqueeze(1), 0.0)


def inner_rows(n: int, *, steps: int, batch_size: int | None = None, generator: torch.Generator) -> list[Tensor]:
    """The rows of each step, a (B,) int64 each: permutations of n rows, cut into batches.

    Where ``batch_size`` does not divide n, the smaller batch is the first of each permutation.

    Args:
        n: synthetic images.
        steps: of the student, >= 1.
        batch_size: B, >= 1; None, or n and more: every step sees all of them, and nothing is drawn.
        generator: of the permutations; the rows are on its device.

    Raises:
        ValueError: for values outside these ranges.

    Example:
        >>> rows = inner_rows(5, steps=4, batch_size=2, generator=torch.Generator().manual_seed(0))
        >>> [len(r) for r in rows], torch.cat(rows[:3]).sort().values.tolist()
        ([1, 2, 2, 1], [0, 1, 2, 3, 4])
    """
    for name, value in {"n": n, "steps": steps, "batch_size": n if batch_size is None else batch_size}.items():
        if value < 1:
            raise ValueError(f"inner_rows: {name}: expected >= 1, got {value}")
    if batch_size is None or batch_size >= n:
        return [torch.arange(n, device=generator.device)] * steps
    rows: list[Tensor] = []
    while len(rows) < steps:
        permutation = torch.randperm(n, generator=generator, device=generator.device)
        # the authors of DATM pop the chunks from the end
        rows += reversed(permutation.split(batch_size))
    return rows[:steps]


def start_window(
    iteration: int, *, min_start: int, max_start: int, initial_max_start: int | None = None, expansion: int
) -> int:
    """The exclusive upper end of the epochs at which a student may start; it grows evenly, then stays.

    Args:
        iteration: from 0.
        min_start: the first epoch, >= 0.
        max_start: the upper end at last, > min_start.
        initial_max_start: the upper end at iteration 0, in (min_start, max_start]; None: ``max_start`` from the start.
        expansion: the iteration at which the window is whole, >= 1.

    Raises:
        ValueError: for values outside these ranges.

    Source: DATM, arXiv:2310.05773.

    Example:
        >>> [start_window(i, min_start=0, max_start=20, initial_max_start=10, expansion=1000) for i in (0, 500, 2000)]
        [10, 15, 20]
    """
    first = max_start if initial_max_start is None else initial_max_start
    if not 0 <= min_start < first <= max_start:
        raise ValueError(
            "start_window: expected 0 <= min_start < initial_max_start <= max_start, "
            f"got {min_start}, {first} and {max_start}"
        )
    if expansion < 1:
        raise ValueError(f"start_window: expansion: expected >= 1 iteration, got {expansion}")
    return min(max_start, first + int((max_start - first) * iteration / expansion))


# ---------------------------------------------------------------------- the loss


def trajectory_matching_loss(end: Tensor, target: Tensor, start: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """``|end - target|^2 / |start - target|^2`` over the parameters that are kept, (P,), (P,), (P,) -> ().

    1 for a student that did not move, 0 for one that arrived.

    Args:
        end: where the student arrived.
        target: where the expert went.
        start: where both began.
        keep: (P,) bool; None keeps all.

    Source: MTT, arXiv:2203.11932; with a mask EDF, arXiv:2410.17193.

    Example:
        >>> trajectory_matching_loss(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]), torch.zeros(2))
        tensor(0.2500)
    """
    errors, distances = (end - target).square(), (start - target).square()
    if keep is not None:
        # errors[keep] would wait for a GPU to say how many there are
        errors, distances = (torch.where(keep, x, 0) for x in (errors, distances))
    return errors.sum() / distances.sum()


def loss_quantile_keep(end: Tensor, target: Tensor, *, drop: float) -> Tensor:
    """All but the int(drop * P) parameters with the smallest error, (P,), (P,) -> (P,) bool.

    Args:
        end: where the student arrived.
        target: where the expert went.
        drop: in [0, 1); one quantile over all layers.

    Raises:
        ValueError: for another share.

    Source: common pattern dropout of EDF, arXiv:2410.17193.

    Example:
        >>> loss_quantile_keep(torch.tensor([1.0, 4.0, 2.0, 3.0]), torch.zeros(4), drop=0.5).tolist()
        [False, True, False, True]
    """
    _check_share("loss_quantile_keep", drop)
    errors = (end.detach() - target.detach()).square()
    keep = torch.ones_like(errors, dtype=torch.bool)
    keep[errors.topk(int(drop * errors.numel()), largest=False, sorted=False).indices] = False
    return keep


def depth_keep(shapes: Sequence[Sequence[int]], *, drop: float, by: str = "layer") -> Tensor:
    """All but the parameters of the first layers, (P,) bool.

    A layer begins at each parameter of two dimensions and more; the biases and norms behind it belong to it.

    Args:
        shapes: of the parameters, in their order in theta.
        drop: in [0, 1); the share is rounded down.
        by: the share is of the layers ("layer") or of the P numbers ("scalar"). The paper does not say which.

    Raises:
        ValueError: for other values.

    Source: PAD, arXiv:2408.03360.

    Example:
        >>> depth_keep([(2, 2), (2,), (1, 2), (1,)], drop=0.5).tolist()
        [False, False, False, False, False, False, True, True, True]
    """
    _check_share("depth_keep", drop)
    sizes = [math.prod(shape) for shape in shapes]
    if by == "scalar":
        dropped = int(drop * sum(sizes))
    elif by == "layer":
        starts = [i for i, shape in enumerate(shapes) if len(shape) > 1]
        layers = int(drop * len(starts))
        dropped = sum(sizes[: starts[layers]]) if layers else 0
    else:
        raise ValueError(f"depth_keep: by: expected layer or scalar, got {by!r}")
    return torch.arange(sum(sizes)) >= dropped


def mean_matching_loss(real: Tensor, synthetic: Tensor) -> Tensor:
    """The squared distance of the classes' mean features, summed over classes, (K, R, F), (K, IPC, F) -> ().

    Source: distribution matching, arXiv:2110.04181.

    Example:
        >>> mean_matching_loss(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[5.0]]]))
        tensor(9.)
    """
    return (real.mean(dim=1) - synthetic.mean(dim=1)).square().sum()


# ---------------------------------------------------------------------- the gradients


def unrolled_sgd(
    step_loss: StepLoss, start: Tensor, images: Tensor, labels: Tensor, lr: Tensor, steps: Sequence[InnerStep]
) -> Tensor:
    """Where n steps of SGD lead, (P,) -> (P,), differentiable in everything; the graph of all steps stays in memory.

    Args:
        step_loss: of a step.
        start: theta_0.
        images: (N, C, H, W).
        labels: logits, (N, K).
        lr: the step size, ().
        steps: n of them.

    Example:
        >>> loss = lambda theta, x, y, draw: ((x @ theta - y) ** 2).mean()
        >>> steps = [InnerStep(torch.arange(2))] * 3
        >>> unrolled_sgd(loss, torch.zeros(2), torch.eye(2), torch.ones(2), torch.tensor(0.5), steps)
        tensor([0.8750, 0.8750], grad_fn=<SubBackward0>)
    """
    theta = start if start.requires_grad else start.detach().requires_grad_()
    for step in steps:
        loss = step_loss(theta, images[step.rows], labels[step.rows], step.draw)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - lr * gradient
    return theta


def matching_gradients(
    step_loss: StepLoss,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[InnerStep],
    *,
    mask: Mask | None = None,
) -> Matching:
    """The loss of matching after n steps of SGD, and its exact gradients by a sweep back over the steps.

    One step's graph is in memory at a time, and every theta_k. With v_k the gradient at theta_k and H_k the step's
    Hessian, v_k = v_{k+1} - lr H_k v_{k+1}. What a step adds to the gradient of images and labels is -lr times that of
    <v_{k+1}, g_k>; to that of lr it adds -<v_{k+1}, g_k>.

    Args:
        step_loss: of a step; called a second time on the way back, with the same values.
        start: theta_0, (P,).
        target: where the expert went, (P,).
        images: (N, C, H, W).
        labels: logits, (N, K).
        lr: the step size, ().
        steps: n of them, n >= 1.
        mask: which parameters are matched; None: all.

    Example:
        >>> loss = lambda theta, x, y, draw: ((x @ theta - y) ** 2).mean()
        >>> x, y, steps = torch.eye(2), torch.ones(2), [InnerStep(torch.arange(2))]
        >>> found = matching_gradients(loss, torch.zeros(2), 2 * torch.ones(2), x, y, torch.tensor(0.5), steps)
        >>> found.loss, found.lr
        (tensor(0.5625), tensor(-0.7500))
    """
    images, labels, lr = images.detach(), labels.detach(), lr.detach()
    theta, passed = start.detach(), []
    for step in steps[:-1]:
        passed.append(theta)
        theta = theta - lr * _gradient(step_loss, theta, images, labels, step)
    # the way back begins with the last step's graph, so that one is built once
    opened = _open(step_loss, theta, images, labels, steps[-1])
    end = theta - lr * opened[0].detach()
    loss, v, kept_fraction = _ending(start, target, end, mask)
    x_bar, y_bar, lr_bar = torch.zeros_like(images), torch.zeros_like(labels), torch.zeros_like(lr)
    for step in reversed(steps):
        gradient, inputs = opened or _open(step_loss, passed.pop(), images, labels, step)
        h, dx, dy = torch.autograd.grad(gradient, inputs, v)
        # rows are distinct: not index_add_, whose order of summation varies on a GPU
        x_bar[step.rows] -= lr * dx
        y_bar[step.rows] -= lr * dy
        lr_bar -= v.dot(gradient.detach())
        v = v - lr * h
        opened = None
    return Matching(loss, x_bar, y_bar, lr_bar, end, kept_fraction)


def unrolled_matching_gradients(
    step_loss: StepLoss,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[InnerStep],
    *,
    mask: Mask | None = None,
) -> Matching:
    """What :func:`matching_gradients` finds, through the graph of all steps at once: n times the memory.

    Example:
        >>> loss = lambda theta, x, y, draw: ((x @ theta - y) ** 2).mean()
        >>> x, y, steps = torch.eye(2), torch.ones(2), [InnerStep(torch.arange(2))]
        >>> unrolled_matching_gradients(loss, torch.zeros(2), 2 * torch.ones(2), x, y, torch.tensor(0.5), steps).lr
        tensor(-0.7500)
    """
    images, labels, lr = (x.detach().requires_grad_() for x in (images, labels, lr))
    with torch.enable_grad():
        end = unrolled_sgd(step_loss, start.detach(), images, labels, lr, steps)
        keep = None if mask is None else mask(end.detach(), target)
        loss = trajectory_matching_loss(end, target, start.detach(), keep=keep)
    x_bar, y_bar, lr_bar = torch.autograd.grad(loss, (images, labels, lr))
    return Matching(loss.detach(), x_bar, y_bar, lr_bar, end.detach(), _fraction(keep, end))


def tesla_matching_gradients(
    step_loss: StepLoss,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    steps: Sequence[InnerStep],
    *,
    mask: Mask | None = None,
) -> Matching:
    """TESLA's gradients in place of those of :func:`matching_gradients`: biased, for comparison.

    Every theta_k is held constant, so v_k is the gradient at the end in all steps, and no theta_k has to be kept: a
    second pass of the same steps adds each step's share.

    Source: TESLA, arXiv:2211.10586.

    Example:
        >>> loss = lambda theta, x, y, draw: ((x @ theta - y) ** 2).mean()
        >>> x, y, steps = torch.eye(2), torch.ones(2), [InnerStep(torch.arange(2))]
        >>> tesla_matching_gradients(loss, torch.zeros(2), 2 * torch.ones(2), x, y, torch.tensor(0.5), steps).lr
        tensor(-0.7500)
    """
    images, labels, lr = images.detach(), labels.detach(), lr.detach()
    end = start.detach()
    for step in steps:
        end = end - lr * _gradient(step_loss, end, images, labels, step)
    loss, v, kept_fraction = _ending(start, target, end, mask)
    x_bar, y_bar, lr_bar = torch.zeros_like(images), torch.zeros_like(labels), torch.zeros_like(lr)
    theta = start.detach()
    for step in steps:
        gradient, (_, x, y) = _open(step_loss, theta, images, labels, step)
        dx, dy = torch.autograd.grad(gradient, (x, y), v)
        gradient = gradient.detach()
        x_bar[step.rows] -= lr * dx
        y_bar[step.rows] -= lr * dy
        lr_bar -= v.dot(gradient)
        theta = theta - lr * gradient
    return Matching(loss, x_bar, y_bar, lr_bar, end, kept_fraction)


def _gradient(step_loss: StepLoss, theta: Tensor, images: Tensor, labels: Tensor, step: InnerStep) -> Tensor:
    theta = theta.detach().requires_grad_()
    with torch.enable_grad():
        loss = step_loss(theta, images[step.rows], labels[step.rows], step.draw)
    return torch.autograd.grad(loss, theta)[0]


def _open(
    step_loss: StepLoss, theta: Tensor, images: Tensor, labels: Tensor, step: InnerStep
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """A step's gradient with its graph, and what the graph leads to: theta, images and labels of the step."""
    inputs = theta.detach(), images[step.rows], labels[step.rows]
    for x in inputs:
        x.requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(step_loss(*inputs, step.draw), inputs[0], create_graph=True)
    return gradient, inputs


def _ending(start: Tensor, target: Tensor, end: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor, Tensor]:
    """The matching loss, its gradient at the end with the kept parameters fixed, and their share."""
    keep = None if mask is None else mask(end, target)
    end = end.detach().requires_grad_()
    with torch.enable_grad():
        loss = trajectory_matching_loss(end, target, start.detach(), keep=keep)
    (v,) = torch.autograd.grad(loss, end)
    return loss.detach(), v, _fraction(keep, end)


def _fraction(keep: Tensor | None, end: Tensor) -> Tensor:
    return torch.ones((), device=end.device) if keep is None else keep.float().mean()


# ---------------------------------------------------------------------- the memory


def step_bytes(step_loss: StepLoss, theta: Tensor, images: Tensor, labels: Tensor, draw: Any) -> int:
    """The bytes that one step keeps for its second derivative; it runs the step once.

    Args:
        step_loss: of a step.
        theta: (P,).
        images: of the step, (B, C, H, W).
        labels: of the step, logits (B, K).
        draw: of the step.

    Example:
        >>> loss = lambda theta, x, y, draw: ((x @ theta - y) ** 2).mean()
        >>> step_bytes(loss, torch.zeros(2), torch.eye(2), torch.ones(2), None)
        48
    """
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _open(step_loss, theta, images, labels, InnerStep(torch.arange(len(images), device=images.device), draw))
    return sum(saved.values())


def estimated_bytes(gradients: Callable[..., Matching], *, saved: int, numel: int, steps: int) -> int:
    """About how many bytes a call of one of the three functions above takes at its peak, beyond its arguments.

    Args:
        gradients: matching_gradients, unrolled_matching_gradients or tesla_matching_gradients.
        saved: what :func:`step_bytes` says of the largest step.
        numel: P.
        steps: n.

    Raises:
        ValueError: for another function.

    Example:
        >>> estimated_bytes(matching_gradients, saved=2**20, numel=1000, steps=20) // 2**20
        18
    """
    # fitted to peaks of ConvNets on a CPU, 9 MiB to 6 GiB: a graph, its derivative and what the allocator holds back
    work, vector = 11 * saved // 4 + 16 * 2**20, 4 * numel
    if gradients is matching_gradients:
        return work + (steps + 4) * vector
    if gradients is tesla_matching_gradients:
        return work + 5 * vector
    if gradients is unrolled_matching_gradients:
        return work + steps * (saved + 4 * vector)
    raise ValueError(f"estimated_bytes: gradients: expected one of this file, got {gradients!r}")


def _check_share(function: str, drop: float) -> None:
    if not 0 <= drop < 1:
        raise ValueError(f"{function}: drop: expected a share in [0, 1), got {drop}; 0 drops nothing")
