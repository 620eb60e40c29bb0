"""SkipGuard: no update by a gradient that is not finite, and an end to a fit that no longer learns."""

import math
from collections import deque
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer

from hasten.errors import HastenError
from hasten.nn.protocols import ExplainsSkips


class SkipGuard(Callback):
    """Leave out updates whose gradients are not finite, count the updates left out, and stop where nothing else comes.

    An update is left out where all gradients are None at the optimizer's step, by the module's own decision as when a
    loss is too large, or because one of them is not finite: then this callback drops them all, and the optimizer
    changes neither weights nor momentum. The fit stops after too many in a row, as early stopping would, so that the
    last good weights are saved, exported and evaluated; then comes the error. A fit that ends otherwise, with more
    than half of its updates left out, says so in a line. A module that ``ExplainsSkips`` adds to either where it stands
    and what to change.

    Logs ``train/skipped`` and ``train/non_finite``, counts since the beginning of the training.

    Args:
        patience: updates in a row whose loss or gradients are not finite, >= 1.
        skip_patience: updates in a row that are left out for whatever reason, >= 1.

    Raises:
        ValueError: for a number out of its range.
        HastenError: at the end of a fit that it stopped.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[SkipGuard(patience=5)], accelerator="cpu", logger=False)
    """

    def __init__(self, *, patience: int = 20, skip_patience: int = 500) -> None:
        for name, value in (("patience", patience), ("skip_patience", skip_patience)):
            if value < 1:
                raise ValueError(f"skip_guard: {name}: expected >= 1, got {value}")
        self.patience = patience
        self.skip_patience = skip_patience
        self._forget()

    def _forget(self) -> None:
        self._skipped = self._non_finite = 0
        self._losses: list[float] = []  # of the updates left out in a row; NaN for a gradient that is not finite
        self._recent: deque[float] = deque(maxlen=self.patience)  # the last left out, in a row or not
        self._updates: list[str] = []  # of this batch, what became of each optimizer's step
        self._verdict: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()  # the callback may have served another fit; a checkpoint is loaded after this

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._updates = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            self._updates.append("left out")
        elif torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
            self._updates.append("made")
        else:
            self._updates.append("non-finite")
            for parameter in parameters:
                parameter.grad = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._updates:  # none within an accumulated step
            self._count(_loss(outputs))
            for name, count in (("skipped", self._skipped), ("non_finite", self._non_finite)):
                pl_module.log(f"train/{name}", float(count), prog_bar=name == "skipped")
        if verdict := self._judged():
            # stopped as by early stopping: checkpoints, exports and evaluations of the end come before the error
            trainer.should_stop = True
            self._verdict = f"{verdict} at step {trainer.global_step}: {_advice(pl_module, self._losses)}"
            self._losses = []  # a fit that is resumed has its patience anew

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._verdict is not None:
            raise HastenError(f"skip_guard: {self._verdict}")
        if 2 * self._skipped > trainer.global_step:
            advice = _advice(pl_module, list(self._recent))
            pl_module.print(f"skip_guard: {self._skipped} of {trainer.global_step} updates were left out: {advice}")

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped, "non_finite": self._non_finite, "losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped, self._non_finite = state_dict["skipped"], state_dict["non_finite"]
        self._losses = list(state_dict["losses"])

    def _count(self, loss: float) -> None:
        if "made" in self._updates:
            self._losses = []
            return
        if "non-finite" in self._updates:
            loss = math.nan
        self._skipped += 1
        self._non_finite += not math.isfinite(loss)
        self._losses.append(loss)
        self._recent.append(loss)

    def _judged(self) -> str | None:
        """What is wrong if it has been so for too long."""
        non_finite = len(list(takewhile(lambda loss: not math.isfinite(loss), reversed(self._losses))))
        if non_finite >= self.patience:
            return f"loss or gradients were nan or infinite {non_finite} times in a row"
        if len(self._losses) >= self.skip_patience:
            return f"{len(self._losses)} updates in a row were left out"
        return None


def _advice(pl_module: LightningModule, losses: list[float]) -> str:
    """What to change where updates of these losses were left out."""
    return pl_module.skip_report(losses) if isinstance(pl_module, ExplainsSkips) else "lower the learning rate"


def _loss(outputs: Any) -> float:
    """What a training step returned; 0 where it said nothing of it."""
    loss = outputs.get("loss", 0.0) if isinstance(outputs, Mapping) else outputs
    return float(loss) if isinstance(loss, Tensor) else 0.0
