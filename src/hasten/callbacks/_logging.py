"""What callbacks hand to loggers that take more than numbers: Weights & Biases and TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from hasten.nn.protocols import KeepsFiles


def log_image(trainer: Trainer, name: str, image: Tensor, step: int) -> None:
    """Log (3, height, width) in [0, 1] as ``pictures/<name>`` where the logger takes images."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            # as bytes: of a float tensor wandb would stretch the contrast
            pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
            logger.log_image(f"pictures/{name}", [pixels], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(f"pictures/{name}", image, step)


def log_files(trainer: Trainer, kind: str, files: Mapping[str, Path]) -> None:
    """Log name -> file or folder together as the ``kind`` of the run, where the logger keeps files; on rank zero."""
    for logger in trainer.loggers:
        if isinstance(logger, KeepsFiles):
            logger.log_files(kind, files)
