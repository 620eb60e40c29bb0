"""The nodes of a config as an estimate sees them: part of a training step, a tool that looks at it, or housekeeping."""

from typing import Any

from hydra.utils import get_object
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from omegaconf import DictConfig

from hasten.callbacks import (
    ClassConsistency,
    EvaluateDistilled,
    ExportDistilled,
    ImageGrid,
    MagnitudeProbe,
    SampleDistance,
    Throughput,
)
from hasten.checkpoints import Interruptible
from hasten.run import built

HOUSEKEEPING = (Checkpoint, Interruptible, ProgressBar, Throughput)
_TOOLS = (ClassConsistency, EvaluateDistilled, ExportDistilled, ImageGrid, MagnitudeProbe, SampleDistance)
"""What looks at a training without taking part in it: left out here. All other callbacks are part of a step."""


def is_a(node: Any, kinds: tuple[type, ...]) -> bool:
    """Whether what ``node`` describes is one of ``kinds``."""
    target = get_object(node._target_)
    return isinstance(target, type) and issubclass(target, kinds)


def callbacks_of(cfg: DictConfig) -> tuple[list[Callback], dict[str, str]]:
    """Those that are part of a training step, built; and the tools that are left out, with when they work."""
    kept, tools = [], {}
    for name, node in (cfg.callbacks or {}).items():
        if node is None:
            continue
        if is_a(node, _TOOLS):
            every = node.get("every_n_steps") or node.get("every")
            tools[str(name)] = f"every {every} steps" if every else "at the end"
        elif not is_a(node, HOUSEKEEPING):
            kept.append(built(cfg, f"callbacks.{name}", Callback))
    return kept, tools


def kept_epochs(cfg: DictConfig, keeper: DictConfig) -> int:
    """How many epochs of each expert of ``cfg`` are kept by ``keeper``, a SaveTrajectory."""
    return min(keeper.last_epoch or cfg.module.epochs, cfg.module.epochs)
