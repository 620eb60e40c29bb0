"""What takes the place of stages that have not run: files of the right shape, of weights that have learned nothing."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, open_dict
from torch import nn

from hasten.callbacks import SaveTrajectory
from hasten.check import build
from hasten.errors import HastenError
from hasten.estimate.nodes import is_a, kept_epochs
from hasten.formats import write_json, write_trajectory
from hasten.nn import FlatModel
from hasten.run import built
from hasten.run_folders import result_of


def stood_in_for(configs: Sequence[DictConfig], scratch: Path) -> dict[str, str]:
    """Point every stage that is not complete to a folder of what it would leave; their names and their own folders.

    Args:
        configs: of the stages, each after those that it needs, and of the run.
    """
    missing = {}
    for i, stage in enumerate(configs[:-1]):
        if result_of(Path(stage.run_dir)).get("status") == "complete":
            continue
        folder = scratch / f"stand-in-{i}"
        folder.mkdir()
        with suppress(HastenError):  # what needs its folder says so, and says more
            _stand_in(stage, folder)
        missing[str(stage.experiment)] = str(stage.run_dir)
        for later in configs[i + 1 :]:
            if stage.experiment in later.stages:
                with open_dict(later):
                    later.stages[stage.experiment] = str(folder)
    return missing


def _stand_in(stage: DictConfig, folder: Path) -> None:
    """Checkpoints, or trajectories of experts, of the right shape; nothing where a stage leaves other things."""
    if stage.task is not None:
        return
    write_json(folder / "result.json", {"status": "complete", "metrics": {}})
    keeper = next((node for node in stage.callbacks.values() if node and is_a(node, (SaveTrajectory,))), None)
    with isolate_rng():
        if keeper is not None:
            epochs = kept_epochs(stage, keeper)
            _untrained_experts(folder / "experts", build(stage, "model"), stage.module.experts, epochs)
            return
        state = built(stage, "module", LightningModule).state_dict()
    (folder / "checkpoints").mkdir()
    torch.save({"state_dict": state}, folder / "checkpoints/best.ckpt")
    os.link(folder / "checkpoints/best.ckpt", folder / "checkpoints/last.ckpt")


def _untrained_experts(folder: Path, model: nn.Module, experts: int, epochs: int) -> None:
    """One trajectory by the names of all: each reads it for itself, as it would its own."""
    form = FlatModel(model)
    theta = form.drawn(0)
    rows = theta + 0.01 * torch.arange(epochs + 1)[:, None] * torch.randn_like(theta)
    unknown = [math.nan] * len(rows)
    about = {"names": form.names, "shapes": form.shapes, "recipe": {"imported": "a stand-in"}}
    folder.mkdir()
    write_trajectory(folder / "expert_0000.safetensors", rows, train_acc=unknown, val_acc=unknown, **about)
    for number in range(1, experts):
        os.link(folder / "expert_0000.safetensors", folder / f"expert_{number:04d}.safetensors")
