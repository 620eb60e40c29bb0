"""ExpertTraining: trains many networks of one form, one after the other in one fit, for others to match."""

import copy
import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from hasten.errors import HastenError
from hasten.functional.draws import generator_of, seed_of
from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.optim import configure_optimizers, parameter_groups
from hasten.optim.build import OptimizerFactory

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) float32 and labels (B,) int64."""

Curriculum = Callable[[int, Tensor], Tensor]
"""(epoch, train labels (n,)) -> indices (m,) of the training images that an expert sees in that epoch."""


class ExpertTraining(LightningModule):
    """Train ``experts`` networks from scratch by cross-entropy, ``epochs`` epochs each.

    The callback ``SaveTrajectory`` keeps what they were after every epoch. How many epochs the fit has follows from
    what is left to train, whatever ``trainer.max_epochs`` says. An expert is a function of
    (seed, its number): its first weights, what the augmentation draws, and with ``EpochLoader`` the order of its images
    do not depend on which experts were trained before it. An expert that was broken off starts again.

    Logs ``train/loss``, ``train/acc`` (over the epoch, on augmented images), ``val/loss``, ``val/acc``, ``test/loss``
    and ``test/acc`` of the expert in training, whose number is ``expert``.

    Args:
        model: the form of the experts; without batch norm and buffers, which no trajectory holds, and of layers with
            ``reset_parameters``. Its weights are of no account.
        optimizer: called with parameter groups; vectors carry no weight decay. Needed to train.
        experts: how many, >= 1.
        epochs: of each, >= 1.
        augment: of the training images; None for none.
        curriculum: (epoch, train labels) -> indices of the images seen in that epoch, for a datamodule with
            ``train_subset``; None: all.
        seed: of weights and augmentation.

    Attributes:
        form: names and shapes of the parameters.
        expert: the number of the one in training.
        epoch: how many epochs that one had behind it when this one began.

    Raises:
        HastenError: for a number out of its range and a model that cannot be drawn anew; at the start of a fit for
            several processes, accumulated gradients, or a checkpoint to resume from.

    Source: MTT, arXiv:2203.11932; FTD, arXiv:2211.11004.

    Example:
        >>> from hasten.nn import ConvNet
        >>> module = ExpertTraining(ConvNet(1, 8, 10, width=4, depth=2), experts=4, epochs=20)
        >>> module.theta().shape
        torch.Size([374])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory | None = None,
        *,
        experts: int = 100,
        epochs: int = 100,
        augment: DSA | None = None,
        curriculum: Curriculum | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("experts", experts), ("epochs", epochs)):
            if value < 1:
                raise HastenError(f"expert_training: {name}: expected >= 1, got {value}")
        self.form = FlatModel(model)
        try:
            self.form.check_drawable()
        except ValueError as error:
            raise HastenError(f"expert_training: model: {error}") from error
        self.model = model
        self.optimizer = optimizer
        self.experts = experts
        self.epochs = epochs
        self.augment = augment
        self.curriculum = curriculum
        self.seed = seed
        self.expert = 0
        self.epoch = 0
        self._asked: tuple[Sequence[int], int] | None = None
        self._left: Sequence[int] = range(experts)
        self._epochs_each = epochs
        self._first_pass = True
        self._new_optimizer: dict[str, Any] = {}

    # ------------------------------------------------------------------ what experts are

    def recipe(self) -> dict[str, Any]:
        """What decides, with its number, what an expert is, for JSON; needs the trainer and its datamodule."""
        data: Any = getattr(self.trainer, "datamodule", None)
        described = data.description() if hasattr(data, "description") else {"name": type(data).__name__}
        return {
            "model": {
                "name": type(self.model).__name__,
                "layers": {
                    name: repr(layer) for name, layer in self.model.named_modules() if not any(layer.children())
                },
                "parameters": dict(zip(self.form.names, map(list, self.form.shapes), strict=True)),
            },
            "data": described,
            "optimizer": _described_optimizer(self._optimizer()),
            "augmentation": _described(self.augment),
            "curriculum": _described(self.curriculum),
            "epochs": self.epochs,
            "seed": self.seed,
            "precision": self.trainer.precision,
            "limit_train_batches": self.trainer.limit_train_batches,
            "gradient_clip_val": self.trainer.gradient_clip_val,
        }

    def theta(self) -> Tensor:
        """A copy of the parameters of the expert in training, (P,), on the CPU."""
        return self.form.flatten(self.model).cpu()

    def load_theta(self, theta: Tensor) -> None:
        """Put the network where an expert was, (P,)."""
        self.model.load_state_dict(self.form.filled(theta).state_dict())

    # ------------------------------------------------------------------ which, and for how long

    def train_only(self, experts: Sequence[int], *, epochs: int) -> None:
        """Train only these, each for so many epochs, in the fit that is being set up; none of them ends it at once."""
        self._asked = experts, epochs

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        trainer: Any = self.trainer
        if trainer.world_size > 1:
            raise HastenError(
                f"expert_training: expected one process, got {trainer.world_size}; experts are small networks, use "
                "trainer=cpu or trainer=gpu"
            )
        if trainer.accumulate_grad_batches != 1:
            raise HastenError(
                f"expert_training: trainer.accumulate_grad_batches: expected 1, got {trainer.accumulate_grad_batches}; "
                "raise data.batch_size instead"
            )
        self._left, self._epochs_each = self._asked or (range(self.experts), self.epochs)
        self._asked = None
        trainer.fit_loop.max_epochs = len(self._left) * self._epochs_each
        if self.curriculum is not None:
            if not hasattr(trainer.datamodule, "train_subset"):
                raise HastenError(
                    "expert_training: curriculum: expected a datamodule with train_subset, got "
                    f"{type(trainer.datamodule).__name__}; use one of hasten's"
                )
            trainer.datamodule.train_subset = self._subset
            trainer.reload_dataloaders_every_n_epochs = 1  # Lightning asks for the loader, and so for its subset, anew

    def teardown(self, stage: str) -> None:
        trainer: Any = self.trainer
        if stage == "fit" and self.curriculum is not None:
            trainer.datamodule.train_subset = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self._trainer.state.fn == "fit":
            raise HastenError(
                "expert_training: ckpt_path: experts do not resume from a checkpoint; run it again with run_dir=FOLDER "
                "of the run that was broken off: the experts that are complete there are kept"
            )

    # ------------------------------------------------------------------ training

    def configure_optimizers(self) -> Any:
        return {"optimizer": self._optimizer()}

    def on_train_start(self) -> None:
        self._new_optimizer = copy.deepcopy(self.trainer.optimizers[0].state_dict())

    def on_train_epoch_start(self) -> None:
        place, self.epoch = self._place()
        self.expert = self._left[place]
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "epoch") and hasattr(loader, "position"):  # an EpochLoader's order follows its own epoch
            loader.epoch, loader.position = self.expert * self.epochs + self.epoch, 0
        if self.epoch == 0:
            self.load_theta(self.form.drawn(seed_of(self.seed, "weights", self.expert)))
            self.trainer.optimizers[0].load_state_dict(self._new_optimizer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._first_pass = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        if self.augment is not None:
            # a function of the batch: an optimizer such as GSAM comes here twice, and must see the same images
            generator = generator_of(self.seed, "augment", self.expert, self.epoch, batch_idx)
            images = self.augment(images, self.augment.draw(len(images), images.shape[-1], generator))
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        if self._first_pass:  # the second one is elsewhere
            self._first_pass = False
            self.log("expert", float(self.expert), prog_bar=True)
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/acc", _accuracy(logits, labels), on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        images, labels = batch
        logits = self.model(images)
        self.log(f"{split}/loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{split}/acc", _accuracy(logits, labels), batch_size=len(labels))

    def _place(self) -> tuple[int, int]:
        """Which of the experts that are left this epoch of the fit is for, and which epoch of that one it is."""
        return divmod(self.trainer.current_epoch, self._epochs_each)

    def _subset(self) -> Tensor:
        """The training images of this epoch, (m,)."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return self.curriculum(self._place()[1], data.train_labels)  # type: ignore[misc]

    def _optimizer(self) -> Optimizer:
        if self.optimizer is None:
            raise HastenError("expert_training: optimizer: required to train, got none; pass a function of groups")
        made = configure_optimizers(parameter_groups(self.model), self.optimizer, None, total_steps=lambda: 0)
        return made["optimizer"]


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


# ---------------------------------------------------------------------- the recipe


def _described_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Its class, that of the one it wraps, and every number of its groups that is not off."""
    groups = [
        {key: value for key, value in group.items() if key != "params" and value not in (None, False)}
        for group in optimizer.param_groups
    ]
    base = getattr(optimizer, "base", None)
    names = [type(each).__name__ for each in (optimizer, base) if each is not None]
    return {"name": " of ".join(names), "groups": {str(place): group for place, group in enumerate(groups)}}


def _described(value: Any) -> Any:
    """Whatever takes part, for JSON: equal where it does the same, and without addresses of memory."""
    if isinstance(value, partial):
        return {"function": _described(value.func), "args": [*map(_described, value.args)]} | {
            name: _described(argument) for name, argument in value.keywords.items()
        }
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest()[:12]}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return (
        value if value is None or isinstance(value, (bool, int, float)) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    )
