"""DistributionMatching: learns images whose features under random networks have the class means of real ones."""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from lightning import LightningModule
from torch import Generator, Tensor, nn

from hasten.errors import HastenError
from hasten.functional.draws import generator_of
from hasten.functional.matching import mean_matching_loss
from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.nn.dataset_distillation.initial import real_hard
from hasten.nn.dataset_distillation.synthetic import SyntheticSet

_COLUMNS = 10  # images of a class in a picture


class DistributionMatching(LightningModule):
    """Distil a data set by distribution matching: no expert and no inner loop, a network that nobody trained compares.

    An iteration draws a network anew. It embeds real images of every class and the synthetic ones, both under one
    augmentation a class, and SGD takes the synthetic images down the discrepancy of the two. Labels and the step size
    stay what they were. Everything drawn is a function of (seed, rank, iteration).

    The fit's datamodule hands out real images by class, (K, R, C, H, W), and knows all of them: ``ClassBatches``. A fit
    from the beginning fills the synthetic set by ``init``; a resumed one goes on.

    Logs ``train/matching_loss`` and ``train/grad_norm_images``.

    Args:
        model: the network whose form is drawn anew; embeds by ``features``, (B, C, H, W) -> (B, F).
        synthetic: what is learned.
        init: ``(data, network, experts, *, ipc, generator, device)`` -> images and label logits to start from; see
            ``hasten.nn.dataset_distillation.initial``.
        discrepancy: (real (K, R, F), synthetic (K, ipc, F)) -> ().
        augment: with ``share="batch"``, which treats real and synthetic images alike; None for none.
        lr_img: of the images, > 0.
        momentum: in [0, 1).
        seed: of all that is drawn.

    Attributes:
        iteration: how many iterations are done, () int64; in the checkpoint.
        initial: what the first images of each class were, (K, at most 10, C, H, W); in the checkpoint.

    Raises:
        HastenError: for a number out of its range, a network without ``features`` or with layers that cannot be drawn
            anew; at the start of a fit for data that cannot fill the set.

    Source: DM, arXiv:2110.04181.

    Example:
        >>> from hasten.nn import ConvNet
        >>> module = DistributionMatching(ConvNet(1, 8, 10, width=4, depth=2), SyntheticSet(10, 1, (1, 8, 8)))
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
        init: Callable[..., tuple[Tensor, Tensor]] = real_hard,
        discrepancy: Callable[[Tensor, Tensor], Tensor] = mean_matching_loss,
        augment: DSA | None = None,
        lr_img: float = 1.0,
        momentum: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not lr_img > 0:
            raise HastenError(f"distribution_matching: lr_img: expected > 0, got {lr_img}")
        if not 0 <= momentum < 1:
            raise HastenError(f"distribution_matching: momentum: expected in [0, 1), got {momentum}")
        if augment is not None and augment.share != "batch":
            raise HastenError(
                "distribution_matching: augment: expected share='batch', which treats real and synthetic images alike, "
                f"got share={augment.share!r}"
            )
        if not callable(getattr(model, "features", None)):
            raise HastenError(
                "distribution_matching: model: expected a method features, (B, C, H, W) -> (B, F), got "
                f"{type(model).__name__} without; ConvNet has it"
            )
        # no child: what it holds is drawn at every iteration, and belongs in no checkpoint
        self._flat = FlatModel(model)
        try:
            self._flat.check_drawable()
        except ValueError as error:
            raise HastenError(f"distribution_matching: model: {error}") from error
        # what is not learned asks for no gradient, so that no process waits for one
        self.synthetic = synthetic
        self.synthetic.labels.requires_grad_(False)
        self.synthetic.lr.requires_grad_(False)
        self.init = init
        self.discrepancy = discrepancy
        self.augment = augment
        self.lr_img = lr_img
        self.momentum = momentum
        self.seed = seed
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self.register_buffer("initial", torch.zeros_like(self._by_class(synthetic.images)))

    # ------------------------------------------------------------------ an iteration

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        draws = Random(f"{self.seed} {self.global_rank} {int(self.iteration)}")
        theta = self._flat.drawn(draws.getrandbits(63)).to(self.device)
        net: Any = self._flat.filled(theta).requires_grad_(False)
        generator = Generator().manual_seed(draws.getrandbits(63))
        real, synthetic = [], []
        for of_class, images in zip(batch, self.synthetic.by_class(self.synthetic.images), strict=True):
            if self.augment is not None:
                draw = self.augment.draw(1, images.size(-1), generator)
                of_class, images = self.augment(of_class, draw), self.augment(images, draw)
            with torch.no_grad():  # a class at a time: the activations of all real images would take gigabytes
                real.append(net.features(of_class).flatten(1))
            synthetic.append(images)
        features = self.synthetic.by_class(net.features(torch.cat(synthetic)).flatten(1))
        loss = self.discrepancy(torch.stack(real), features)
        self.iteration += 1
        self.log("train/matching_loss", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.synthetic.images.grad is not None:
            self.log("train/grad_norm_images", self.synthetic.images.grad.norm())

    def configure_optimizers(self) -> torch.optim.SGD:
        return torch.optim.SGD([self.synthetic.images], lr=self.lr_img, momentum=self.momentum)

    # ------------------------------------------------------------------ the start of a fit

    def on_fit_start(self) -> None:
        """Check, and fill the set: not in ``setup``, where nothing is restored yet nor on its device."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not (hasattr(data, "per_class") and hasattr(data, "train_images")):
            raise HastenError(
                "distribution_matching: datamodule: expected real images by class, got "
                f"{type(data).__name__}; put hasten.datamodules.ClassBatches around it"
            )
        try:
            self.synthetic.check_data(data.num_classes, data.image_shape)
            if self.iteration == 0:
                self._fill(data)
        except ValueError as error:
            raise HastenError(f"distribution_matching: {error}") from error

    def _fill(self, data: Any) -> None:
        images, labels = self.init(
            data,
            self._flat,
            data.experts,
            ipc=self.synthetic.ipc,
            generator=generator_of(self.seed, "init"),
            device=self.device,
        )
        self.synthetic.fill(images, labels)
        self.initial.copy_(self._by_class(self.synthetic.images.detach()))

    # ------------------------------------------------------------------ what it shows

    def pictures(self) -> dict[str, Tensor]:
        """The set now and before the first step, a row a class, up to ten images each; [0, 1] is black to white."""
        denormalize = self.trainer.datamodule.denormalize  # type: ignore[attr-defined]
        images = self._by_class(self.synthetic.images.detach())
        return {"synthetic": denormalize(images), "initial": denormalize(self.initial)}

    def skip_report(self, losses: Sequence[float]) -> str:
        """What to change when the last updates changed nothing."""
        return f"lower lr_img ({self.lr_img:g})"

    def _by_class(self, tensor: Tensor) -> Tensor:
        """The first of each class, (N, ...) -> (K, at most 10, ...)."""
        return self.synthetic.by_class(tensor)[:, :_COLUMNS]
