"""SaveTrajectory: keeps what every expert was after every epoch of its training, a file an expert."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor

from hasten.errors import HastenError
from hasten.formats import Trajectory, recipe_hash, write_trajectory
from hasten.formats.recipes import recipe_difference
from hasten.formats.trajectories import trajectory_paths
from hasten.nn.protocols import TrainsExperts


class SaveTrajectory(Callback):
    """Write ``expert_0000.safetensors`` and so on under ``path``, each when its expert is done.

    Experts that are there already are not trained again, if they are of the same recipe: a run that was broken off goes
    on with the expert it was at, from that one's beginning, when it is run again with the same ``path``. Where all are
    there, the fit ends at once, with the weights of the last one.

    Accuracies are those that the module logs as ``train/acc`` and ``val/acc``; NaN after an epoch without validation.

    Args:
        path: the folder; it may hold experts of this recipe only.
        last_epoch: train and keep each expert so far only, >= 1; None: all its epochs. Matching never reads beyond
            ``max_start - 1 + expert_epochs``.

    Raises:
        HastenError: at the start of a fit, for a module that trains no experts, and for a folder with experts of
            another recipe.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[SaveTrajectory("experts", last_epoch=41)], accelerator="cpu", logger=False)
    """

    def __init__(self, path: str | Path, *, last_epoch: int | None = None) -> None:
        if last_epoch is not None and last_epoch < 1:
            raise HastenError(f"save_trajectory: last_epoch: expected >= 1 or null, got {last_epoch}")
        self.path = Path(path)
        self.last_epoch = last_epoch
        self._epochs = 0
        self._recipe: dict[str, Any] = {}
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, TrainsExperts):
            raise HastenError(
                f"save_trajectory: expected a module that trains experts, got {type(pl_module).__name__}; use "
                "ExpertTraining or offer what hasten.nn.protocols.TrainsExperts says"
            )
        self._forget()
        self._recipe = pl_module.recipe()
        self._epochs = pl_module.epochs if self.last_epoch is None else min(self.last_epoch, pl_module.epochs)
        for unfinished in self.path.glob(".expert_*.safetensors"):
            unfinished.unlink()  # what a process that was killed had begun to write
        there = {expert.path: expert for expert in map(Trajectory, trajectory_paths(self.path))}
        for expert in there.values():
            self._check_recipe(expert)
        complete = {path for path, expert in there.items() if expert.epochs >= self._epochs}
        left = [number for number in range(pl_module.experts) if self._file(number) not in complete]
        pl_module.train_only(left, epochs=self._epochs)
        if not left:
            pl_module.load_theta(there[self._file(pl_module.experts - 1)].at(self._epochs))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # the first moment at which the module has drawn the expert's weights, and none of its batches is through
        if batch_idx == 0 and pl_module.epoch == 0:
            self._forget()
            self._keep(pl_module, math.nan)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._val_acc = float(trainer.callback_metrics.get("val/acc", math.nan))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._keep(pl_module, float(trainer.callback_metrics.get("train/acc", math.nan)))
        if pl_module.epoch + 1 == self._epochs:
            write_trajectory(
                self._file(pl_module.expert),
                torch.stack(self._theta),
                train_acc=self._train_accs,
                val_acc=self._val_accs,
                names=pl_module.form.names,
                shapes=pl_module.form.shapes,
                recipe=self._recipe,
            )
            self._forget()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    def _keep(self, pl_module: TrainsExperts, train_acc: float) -> None:
        """Where the expert stands, beside where it stood before."""
        self._theta.append(pl_module.theta())
        self._train_accs.append(train_acc)
        self._val_accs.append(self._val_acc)
        self._val_acc = math.nan

    def _forget(self) -> None:
        self._theta: list[Tensor] = []
        self._train_accs: list[float] = []
        self._val_accs: list[float] = []
        self._val_acc = math.nan

    def _file(self, number: int) -> Path:
        return self.path / f"expert_{number:04d}.safetensors"

    def _check_recipe(self, expert: Trajectory) -> None:
        if expert.recipe_hash != recipe_hash(self._recipe):
            raise HastenError(
                f"save_trajectory: path: {expert.path} and this run differ in "
                f"{recipe_difference(expert.recipe, self._recipe)}; choose another folder or delete its experts"
            )
