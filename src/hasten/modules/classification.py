"""Classification: the plain recipe that methods attach to, images (B, C, H, W) -> class logits (B, K)."""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from hasten.nn import timm_model
from hasten.nn.protocols import LossTerm
from hasten.nn.sharding import shard
from hasten.optim import configure_optimizers, parameter_groups
from hasten.optim.build import OptimizerFactory, SchedulerFactory

if TYPE_CHECKING:
    from timm.data.mixup import Mixup

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) float32 and labels (B,) int64."""


class Classification(LightningModule):
    """Cross-entropy training of any classifier, with mixup, cutmix and further loss terms where asked for.

    Logs ``train/loss``, ``val/loss``, ``val/acc``, ``test/loss`` and ``test/acc`` (top-1, a fraction).

    Args:
        model: any nn.Module that maps images to logits, or the name of a timm model.
        optimizer: called with parameter groups; vectors carry no weight decay. Needed to train.
        scheduler: called with the optimizer, and with ``total_steps`` where it takes that; stepped every step.
        num_classes: K, at least 2.
        label_smoothing: in [0, 1).
        mixup: alpha of its Beta distribution, 0 for none.
        cutmix: likewise; where both are on, each batch takes one of them with even chance.

    Attributes:
        loss_terms: name -> function of (images, logits, targets) whose scalar is added to the training loss.
            Distillation enters here.

    Raises:
        ValueError: for a number out of its range.

    Example:
        >>> import torch
        >>> module = Classification(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), num_classes=10)
        >>> module(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model: nn.Module | str,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"classification: num_classes: expected >= 2, got {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"classification: label_smoothing: expected in [0, 1), got {label_smoothing}")
        if min(mixup, cutmix) < 0:
            raise ValueError(f"classification: mixup and cutmix: expected >= 0, got {mixup} and {cutmix}")
        self.model = timm_model(model, num_classes=num_classes) if isinstance(model, str) else model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.label_smoothing = label_smoothing
        self.mix = _mix(mixup, cutmix, label_smoothing, num_classes)
        self.loss_terms: dict[str, LossTerm] = {}
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mix is None:
            targets, smoothing = labels, self.label_smoothing
        else:
            images, targets = self._mixed(images, labels)
            smoothing = 0.0  # the mixed targets are smoothed already
        logits = self(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        for name, term in self.loss_terms.items():
            value = term(images, logits, targets)
            self.log(f"train/{name}", value)
            loss = loss + value
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", self.test_acc, batch)

    def parameter_groups(self) -> list[dict]:
        """What the optimizer is built over: weights with decay, vectors without."""
        return parameter_groups(self.model)

    def configure_optimizers(self) -> OptimizerConfig | OptimizerLRSchedulerConfig:
        if self.optimizer is None:
            raise ValueError("classification: optimizer: required to train, got None; pass a function of groups")
        return configure_optimizers(
            self.parameter_groups(),
            self.optimizer,
            self.scheduler,
            total_steps=lambda: cast(int, self.trainer.estimated_stepping_batches),
        )

    def _mixed(self, images: Tensor, labels: Tensor) -> Batch:
        """Mixed images and their soft targets (B, K); timm mixes pairs, so the last image of an odd batch stays."""
        from timm.data.mixup import mixup_target  # noqa: PLC0415 - imported with the Mixup that is used here

        mix = cast("Mixup", self.mix)
        pairs = len(labels) // 2 * 2
        # timm mixes in place: the loader may hold on to its images
        mixed, targets = mix(images[:pairs].clone(), labels[:pairs])
        if pairs == len(labels):
            return mixed, targets
        last = mixup_target(labels[pairs:], mix.num_classes, smoothing=self.label_smoothing)
        return torch.cat([mixed, images[pairs:]]), torch.cat([targets, last])

    def _evaluate(self, split: str, accuracy: MulticlassAccuracy, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        size = len(labels)
        self.log(f"{split}/loss", F.cross_entropy(logits, labels), batch_size=size, sync_dist=True)
        self.log(f"{split}/acc", accuracy, on_epoch=True, batch_size=size)


def _mix(mixup: float, cutmix: float, label_smoothing: float, num_classes: int):
    if mixup == cutmix == 0:
        return None
    from timm.data.mixup import Mixup  # noqa: PLC0415 - seconds of import for those who mix only

    return Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
