"""TrajectoryMatching: learn a few images, their labels and a step size, such that training on them follows experts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Generator, Tensor, nn

from hasten.errors import HastenError
from hasten.formats.trajectories import Trajectory
from hasten.functional.draws import generator_of
from hasten.functional.matching import (
    InnerStep,
    Mask,
    Matching,
    estimated_bytes,
    inner_rows,
    matching_gradients,
    soft_cross_entropy,
    step_bytes,
    unrolled_matching_gradients,
)
from hasten.memory import as_size, free_bytes
from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.nn.dataset_distillation.guide import DiscriminativeArea
from hasten.nn.dataset_distillation.initial import correctly_predicted
from hasten.nn.dataset_distillation.masks import DepthMask
from hasten.nn.dataset_distillation.synthetic import SyntheticSet
from hasten.nn.protocols import HasRealImages

_MOMENTUM_LR = 0.5
_DIVERGED = 3  # times max_loss: so far off, a student has lost its way, and a larger max_loss would not bring it back
_COLUMNS = 10  # images of a class in a picture
_PROBED = 8  # images of the inner step that is measured for the estimate of memory

Segment = Mapping[str, Any]
"""``start`` and ``target``, an expert's parameters (P,) a few epochs apart, and ``epoch``, where the first stand."""


class TrajectoryMatching(LightningModule):
    """Distil a data set by trajectory matching; MTT, FTD, DATM, PAD, EDF and TESLA are settings of this module.

    An iteration, one training step, lets a student take ``syn_steps`` steps of SGD on the synthetic set from where an
    expert stood, measures how far that is from where the expert went, and steps images, labels and step size along the
    gradients of this loss. The order is that of EDF: gradients, the guide's weight on those of the images, the test
    whether loss and gradients are finite and the loss is at most ``max_loss``, the step. An iteration that fails the
    test changes nothing, momentum included, but counts.

    The fit's datamodule hands out segments of the experts and knows the real images: ``ExpertTrajectories``. A fit from
    the beginning fills the synthetic set by ``init``; a resumed one goes on. Everything drawn is a function of (seed,
    rank, iteration). Several processes match a segment each and step by the mean of their losses and gradients.

    Logs ``train/matching_loss``, ``train/start_epoch``, ``train/syn_lr``, ``train/kept_fraction``,
    ``train/grad_norm_images`` and, with a guide, ``train/guide_mean``.

    Args:
        model: the student, of the experts' architecture; its weights are of no account.
        synthetic: what is learned.
        init: ``(data, student, experts, *, ipc, generator, device)`` -> images and label logits to start from; see
            ``hasten.nn.dataset_distillation.initial``.
        syn_steps: inner steps, >= 1.
        batch_syn: synthetic images in each; None: all.
        gradients: of the loss for what is learned; ``matching_gradients`` sweeps back over the inner steps.
        augment: of the images in every inner step.
        mask: (end, target) -> which parameters are matched; None: all.
        guide: scales the images' gradient up where they matter; without a net of its own it takes the first expert's
            last weights.
        max_loss: of an iteration that counts, > 0; infinite for all that are finite.
        lr_img: of the images, >= 0, as the next two.
        lr_label: of the label logits.
        lr_lr: of the inner step size.
        momentum_img: in [0, 1).
        momentum_label: likewise; that of the inner step size is 0.5.
        seed: of all that is drawn.

    Attributes:
        iteration: how many iterations are done, () int64; in the checkpoint.
        initial: what the first images of each class were, (K, at most 10, C, H, W); in the checkpoint.

    Raises:
        HastenError: for a number out of its range; at the start of a fit for experts of another network, for data that
            cannot fill the set, and for too little memory.

    Source: MTT, arXiv:2203.11932; DATM, arXiv:2310.05773; EDF, arXiv:2410.17193.

    Example:
        >>> from hasten.nn import ConvNet
        >>> module = TrajectoryMatching(ConvNet(1, 8, 10, width=4, depth=2), SyntheticSet(10, 1, (1, 8, 8)))
        >>> list(module.state_dict())
        ['iteration', 'initial', 'synthetic.images', 'synthetic.labels', 'synthetic.lr', 'synthetic.classes']
    """

    iteration: Tensor
    initial: Tensor

    def __init__(
        self,
        model: nn.Module,
        synthetic: SyntheticSet,
        *,
        init: Callable[..., tuple[Tensor, Tensor]] = correctly_predicted,
        syn_steps: int = 40,
        batch_syn: int | None = None,
        gradients: Callable[..., Matching] = matching_gradients,
        augment: DSA | None = None,
        mask: Mask | None = None,
        guide: DiscriminativeArea | None = None,
        max_loss: float = 1.5,
        lr_img: float = 1000.0,
        lr_label: float = 2.0,
        lr_lr: float = 1e-5,
        momentum_img: float = 0.5,
        momentum_label: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("syn_steps", syn_steps), ("batch_syn", batch_syn)):
            if value is not None and value < 1:
                raise HastenError(f"trajectory_matching: {name}: expected >= 1, got {value}")
        if not max_loss > 0:
            raise HastenError(f"trajectory_matching: max_loss: expected > 0, got {max_loss}; 1 to 2.5 is usual")
        for name, value in (("lr_img", lr_img), ("lr_label", lr_label), ("lr_lr", lr_lr)):
            if not 0 <= value < math.inf:
                raise HastenError(f"trajectory_matching: {name}: expected >= 0, got {value}")
        for name, value in (("momentum_img", momentum_img), ("momentum_label", momentum_label)):
            if not 0 <= value < 1:
                raise HastenError(f"trajectory_matching: {name}: expected in [0, 1), got {value}")
        self.automatic_optimization = False
        self.student = FlatModel(model)  # no nn.Module: in no state_dict and no optimizer
        self.synthetic = synthetic
        self.init = init
        self.syn_steps = syn_steps
        self.batch_syn = batch_syn
        self.gradients = gradients
        self.augment = augment
        self.mask = mask
        self.guide = guide
        self.max_loss = max_loss
        self.lr_img = lr_img
        self.lr_label = lr_label
        self.lr_lr = lr_lr
        self.momentum_img = momentum_img
        self.momentum_label = momentum_label
        self.seed = seed
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initial", torch.zeros_like(self._by_class(synthetic.images)))
        self._guide_weight: Tensor | None = None  # of the last iteration, for the pictures
        if isinstance(mask, DepthMask) and mask.shapes is None:
            mask.shapes = self.student.shapes

    # ------------------------------------------------------------------ an iteration

    def training_step(self, batch: Segment, batch_idx: int) -> Tensor:
        iteration, synthetic = int(self.iteration), self.synthetic
        matching = self.gradients(
            self._step_loss,
            batch["start"],
            batch["target"],
            synthetic.images,
            synthetic.labels,
            synthetic.lr,
            self._inner_steps(iteration),
            mask=self.mask,
        )
        images_gradient = matching.images
        if self.guide is not None:
            # before the momentum, and before the mean over processes: so their images stay the same to the last bit
            # even where their maps do not
            weight = self._weight(self.guide, iteration)
            images_gradient = weight * images_gradient
            self.log("train/guide_mean", weight.mean())
        loss, *gradients = (
            cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op="mean"))
            for tensor in (matching.loss, images_gradient, matching.labels, matching.lr)
        )
        finite = all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients))
        counts = finite and bool(loss <= self.max_loss)
        for parameter, gradient in zip((synthetic.images, synthetic.labels, synthetic.lr), gradients, strict=True):
            parameter.grad = gradient if counts and parameter.requires_grad else None
        cast(LightningOptimizer, self.optimizers()).step()  # every time: global_step is the iteration
        synthetic.clamp_lr_()
        self.iteration += 1
        self.log("train/matching_loss", loss, prog_bar=True)
        self.log("train/syn_lr", synthetic.lr.detach().clone(), prog_bar=True)
        self.log("train/start_epoch", float(batch["epoch"]))
        self.log("train/kept_fraction", matching.kept_fraction)
        self.log("train/grad_norm_images", gradients[0].norm())
        # to who watches the loss, a gradient that is not finite is such a loss
        return loss if finite else torch.full_like(loss, math.nan)

    def configure_optimizers(self) -> torch.optim.SGD:
        return torch.optim.SGD(self._groups())

    def on_train_start(self) -> None:
        """Step as told now: what is restored is what the checkpoint was written with, and may be why it stopped."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        for group, told in zip(optimizer.param_groups, self._groups(), strict=True):
            group["lr"], group["momentum"] = told["lr"], told["momentum"]

    def _groups(self) -> list[dict[str, Any]]:
        synthetic = self.synthetic
        return [
            {"params": [synthetic.images], "lr": self.lr_img, "momentum": self.momentum_img},
            {"params": [synthetic.labels], "lr": self.lr_label, "momentum": self.momentum_label},
            {"params": [synthetic.lr], "lr": self.lr_lr, "momentum": _MOMENTUM_LR},
        ]

    def _step_loss(self, theta: Tensor, images: Tensor, labels: Tensor, draw: Any) -> Tensor:
        if self.augment is not None:
            images = self.augment(images, draw)
        return soft_cross_entropy(self.student(theta, images), labels)

    def _inner_steps(self, iteration: int) -> list[InnerStep]:
        generator = self._generator("steps", self.global_rank, iteration)
        rows = inner_rows(
            len(self.synthetic.images), steps=self.syn_steps, batch_size=self.batch_syn, generator=generator
        )
        return [InnerStep(rows_of_step, self._draw(len(rows_of_step), generator)) for rows_of_step in rows]

    def _draw(self, batch: int, generator: Generator) -> Any:
        return None if self.augment is None else self.augment.draw(batch, self.synthetic.images.size(-1), generator)

    def _weight(self, guide: DiscriminativeArea, iteration: int) -> Tensor:
        """What the guide makes of the images' gradient, (N, 1, H, W)."""
        images, classes = self.synthetic.images.detach(), self.synthetic.classes
        generator = self._generator("guide", iteration)  # without the rank: one map for all
        self._guide_weight = guide.weight(images, classes, iteration=iteration, generator=generator).to(images)
        return self._guide_weight

    def _generator(self, *purpose: str | int) -> Generator:
        return generator_of(self.seed, *purpose)

    # ------------------------------------------------------------------ the start of a fit

    def on_fit_start(self) -> None:
        """Check, and fill the set: not in ``setup``, where nothing is restored yet nor on its device."""
        data, experts = self._data_and_experts()
        self._check_fit(experts)
        try:
            self.synthetic.check_data(data.num_classes, data.image_shape)
            if self.guide is not None and self.guide.net is None:
                self.guide.net = self.student.filled(experts[0].at(-1))
            if self.iteration == 0:
                self._fill(data, experts)
        except ValueError as error:
            raise HastenError(f"trajectory_matching: {error}") from error
        self._check_memory(experts[0].at(0).to(self.device))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.guide is not None:
            checkpoint["guide"] = self.guide.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.guide is not None and "guide" in checkpoint:
            self.guide.load_state_dict(checkpoint["guide"])

    def _data_and_experts(self) -> tuple[HasRealImages, Sequence[Trajectory]]:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not (hasattr(datamodule, "experts") and hasattr(datamodule, "train_images")):
            raise HastenError(
                "trajectory_matching: datamodule: expected one with experts and the real images, got "
                f"{type(datamodule).__name__}; put hasten.datamodules.ExpertTrajectories around it"
            )
        return datamodule, datamodule.experts

    def _check_fit(self, experts: Sequence[Trajectory]) -> None:
        if self.trainer.precision != "32-true":
            # an inner step moves a parameter by about 1e-4 of itself; under autocast, which rounds what the network
            # sees of it, the images' gradient after ten steps was 8 to 12 % off
            raise HastenError(
                f"trajectory_matching: precision: expected 32-true, got {self.trainer.precision}, which does not "
                "resolve an inner step"
            )
        if (difference := self.student.first_difference(experts[0].names, experts[0].shapes)) is not None:
            i, here, there = difference
            raise HastenError(
                f"trajectory_matching: model: parameter {i}: expected {there} as in {experts[0].path.name}, got "
                f"{here}; set model to theirs, or train experts of this one by experiment=EXPERTS and add first=[] "
                "datamodule.path=FOLDER/experts"
            )

    def _fill(self, data: HasRealImages, experts: Sequence[Trajectory]) -> None:
        generator = self._generator("init")
        images, labels = self.init(
            data, self.student, experts, ipc=self.synthetic.ipc, generator=generator, device=self.device
        )
        self.synthetic.fill(images, labels)
        self.initial.copy_(self._by_class(self.synthetic.images.detach()))
        if self.guide is not None:
            self._weight(self.guide, 0)  # a guide that cannot serve says so now

    def _check_memory(self, theta: Tensor) -> None:
        """Print what an iteration takes, and refuse one that cannot be had.

        Raises:
            HastenError: where it does not fit; names the ``batch_syn`` that would.
        """
        n = len(self.synthetic.images)
        batch = min(self.batch_syn or n, n)
        probed = min(batch, _PROBED)
        images, labels = self.synthetic.images.detach()[:probed], self.synthetic.labels.detach()[:probed]
        saved = step_bytes(self._step_loss, theta, images, labels, self._draw(probed, self._generator("memory")))

        def needed(gradients: Callable[..., Matching], images_at_once: int) -> int:
            # what a step saves is linear in its images; one with all of them might not fit itself
            here = math.ceil(saved * images_at_once / probed)
            return estimated_bytes(gradients, saved=here, numel=self.student.numel, steps=self.syn_steps)

        gradients = getattr(self.gradients, "func", self.gradients)  # of a partial, as configs make them
        try:
            needs = needed(gradients, batch)
        except ValueError:
            return  # someone's own gradients
        free = free_bytes(self.device)
        whole = needed(unrolled_matching_gradients, batch)
        self.print(
            f"trajectory matching: {self.syn_steps} steps on {batch} images need about {as_size(needs)} (a full unroll "
            f"{as_size(whole)}), {'unknown' if free is None else as_size(free)} free"
        )
        if free is None or needs <= free:
            return
        fitting = batch
        while fitting > 1 and needed(gradients, fitting) > free:
            fitting //= 2
        remedy = f"lower batch_syn from {batch} to {fitting}"
        if needed(gradients, fitting) > free:
            remedy = f"lower syn_steps from {self.syn_steps}, or take a smaller net"
        raise HastenError(f"trajectory_matching: needs about {as_size(needs)}, {as_size(free)} free; {remedy}")

    # ------------------------------------------------------------------ what it shows

    def pictures(self) -> dict[str, Tensor]:
        """The set now and before the first step, a row a class, up to ten images each; the guide's map and weight.

        Pixels are those of the data, where [0, 1] is black to white; learned ones stray beyond. In ``cam`` each image,
        under the guide's map from black over red and yellow to white, is followed by the weight of its gradient.
        """
        denormalize = self.trainer.datamodule.denormalize  # type: ignore[attr-defined]
        images = denormalize(self._by_class(self.synthetic.images.detach()))
        found = {"synthetic": images, "initial": denormalize(self.initial)}
        cam = None if self.guide is None else self.guide.cam
        if cam is not None and self._guide_weight is not None:
            heat = _heat(self._by_class(cam.to(images))[:, : _COLUMNS // 2])
            weight = self._by_class(self._guide_weight)[:, : _COLUMNS // 2].expand_as(heat)
            under = images[:, : _COLUMNS // 2].clamp(0, 1).expand_as(heat)
            found["cam"] = torch.stack([(under + heat) / 2, weight / weight.max()], dim=2).flatten(1, 2)
        return found

    def skip_report(self, losses: Sequence[float]) -> str:
        """What stood when all of ``losses``, the last ones, changed nothing, and which number to change."""
        epoch, lr = int(self.trainer.callback_metrics["train/start_epoch"]), self.synthetic.lr.item()
        where = f"start epoch {epoch}, syn_lr {lr:.2g}"
        finite = [loss for loss in losses if math.isfinite(loss)]
        if finite and min(finite) > self.max_loss:
            where += f", losses {min(finite):.3g} to {max(finite):.3g}"
            if min(finite) <= _DIVERGED * self.max_loss:
                return f"{where}; raise max_loss ({self.max_loss:g})"
        return f"{where}; lower lr_img ({self.lr_img:g}) or lr_lr ({self.lr_lr:g}), or train the experts longer"

    def _by_class(self, tensor: Tensor) -> Tensor:
        """The first of each class, (N, ...) -> (K, at most 10, ...)."""
        return self.synthetic.by_class(tensor)[:, :_COLUMNS]


def _heat(cam: Tensor) -> Tensor:
    """A map in [0, 1] as colours from black over red and yellow to white, (..., H, W) -> (..., 3, H, W)."""
    return (3 * cam.unsqueeze(-3) - torch.arange(3).to(cam).view(3, 1, 1)).clamp(0, 1)
