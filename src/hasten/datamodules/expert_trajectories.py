"""What trajectory matching trains on: where a student starts and where an expert went from there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from hasten.datamodules.around import AroundData
from hasten.datamodules.iterations import check_length
from hasten.datamodules.loader import EpochLoader
from hasten.errors import HastenError
from hasten.formats import Trajectory, open_trajectories
from hasten.formats.trajectories import check_seen
from hasten.functional import start_window
from hasten.functional.draws import generator_of
from hasten.memory import free_bytes

Segment = dict[str, Tensor | int]
"""``start`` and ``target`` (P,) float32: an expert's parameters after ``epoch`` and ``epoch + expert_epochs`` epochs;
``expert``, and ``upper``, below which the start was drawn."""


class ExpertTrajectories(AroundData):
    """Segments of experts' trajectories, one a batch, and the real images they were trained on.

    Segment i is a function of (seed, i): the experts take turns in a new random order each time round, and the epoch is
    drawn evenly from ``min_start`` to the end of a window that grows, as ``start_window`` says. All segments are one
    epoch; ``trainer.max_steps`` says how many of them a run takes.

    Args:
        data: the datamodule of the real images.
        path: the folder of the experts, what ``SaveTrajectory`` wrote.
        iterations: segments, >= 1.
        expert_epochs: of an expert's training between start and target, >= 1.
        min_start: the first epoch at which a segment may start, >= 0.
        max_start: it starts before this one, > min_start.
        initial_max_start: likewise, at the first iteration; None: ``max_start`` from the beginning.
        expansion: iterations until the window has grown from the one to the other, >= 1.
        max_experts: take the first so many; None: all there are.
        preload: True reads all epochs that are needed into memory, False two of them a segment, from the files; "auto"
            reads them all where they fit in half of the memory that is free.
        seed: of the segments, >= 0.

    Attributes:
        experts: the trajectories, in the order of their numbers.

    Raises:
        HastenError: where numbers contradict each other or the experts, or experts are too few or not of one kind.

    Example:
        >>> import tempfile
        >>> from hasten.datamodules.digits import Digits
        >>> from hasten.formats import write_trajectory
        >>> path, acc = Path(tempfile.mkdtemp(), "expert_0000.safetensors"), [0.5] * 4
        >>> write_trajectory(path, torch.eye(4), train_acc=acc, val_acc=acc, names=["w"], shapes=[[4]], recipe={})
        >>> len(ExpertTrajectories(Digits(), path.parent, iterations=50, max_start=2).train_dataloader())
        50
    """

    def __init__(
        self,
        data: LightningDataModule,
        path: str | Path,
        *,
        iterations: int = 10_000,
        expert_epochs: int = 2,
        min_start: int = 0,
        max_start: int = 20,
        initial_max_start: int | None = None,
        expansion: int = 1000,
        max_experts: int | None = None,
        preload: Literal["auto"] | bool = "auto",
        seed: int = 0,
    ):
        super().__init__(data)
        _check("iterations", iterations, at_least=1)
        _check("expert_epochs", expert_epochs, at_least=1)
        _check("seed", seed, at_least=0)
        if preload not in ("auto", True, False):
            raise HastenError(f"expert_trajectories: preload: expected auto, true or false, got {preload!r}")
        window = {
            "min_start": min_start,
            "max_start": max_start,
            "initial_max_start": initial_max_start,
            "expansion": expansion,
        }
        try:
            start_window(0, **window)
        except ValueError as error:
            raise HastenError(f"expert_trajectories: {error}") from error
        self.experts = open_trajectories(path, max_experts=max_experts)
        last = max_start - 1 + expert_epochs
        for expert in self.experts:
            _check_long_enough(expert, last, expert_epochs, min_start)
        self.iterations = iterations
        self.seed = seed
        if preload is True or (preload == "auto" and _fits(self.experts, min_start, last)):
            rows = _resident(self.experts, min_start, last)
        else:
            rows = _on_disk(self.experts)
        self._segments = Segments(rows, len(self.experts), iterations, expert_epochs, window, seed)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            check_length(self.trainer, self.iterations, name="expert_trajectories")
            check_seen(self.experts, getattr(self.data, "description", dict)(), owner="expert_trajectories")

    def train_dataloader(self) -> EpochLoader:
        """One segment a batch, in the order of the iterations."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        self._segments.processes = 1 if self.trainer is None else self.trainer.world_size
        return EpochLoader(self._segments, 1, shuffle=False, pin_memory=on_gpu)


class Segments(Dataset[Any]):
    """Segment i of the trajectories, a function of (seed, i); several ``processes`` take as many an iteration.

    Args:
        rows: (expert, epochs) -> their parameters, a row an epoch.
        experts: their number.
        iterations: of segments.
        expert_epochs: between start and target.
        window: arguments of ``start_window``.
        seed: of the draws.
    """

    def __init__(
        self,
        rows: Callable[[int, int], Tensor],
        experts: int,
        iterations: int,
        expert_epochs: int,
        window: dict[str, Any],
        seed: int,
    ):
        self.rows = rows
        self.experts = experts
        self.iterations = iterations
        self.expert_epochs = expert_epochs
        self.window = window
        self.seed = seed
        self.processes = 1

    def __len__(self) -> int:
        return self.iterations * self.processes

    def batch(self, indices: list[int]) -> Segment:
        """The segment of the one index in ``indices``; those of all processes at an iteration follow each other."""
        (index,) = indices
        turn, place = divmod(index, self.experts)
        expert = int(torch.randperm(self.experts, generator=generator_of(self.seed, "turn", turn))[place])
        low, upper = self.window["min_start"], start_window(index // self.processes, **self.window)
        epoch = int(torch.randint(low, upper, (), generator=generator_of(self.seed, "start", index)))
        return {
            "start": self.rows(expert, epoch),
            "target": self.rows(expert, epoch + self.expert_epochs),
            "expert": expert,
            "epoch": epoch,
            "upper": upper,
        }


def _check(key: str, value: int, *, at_least: int) -> None:
    if value < at_least:
        raise HastenError(f"expert_trajectories: {key}: expected >= {at_least}, got {value}")


def _resident(experts: list[Trajectory], first: int, last: int) -> Callable[[int, int], Tensor]:
    """Epochs ``first`` to ``last`` of all experts, read now."""
    kept = [expert.between(first, last) for expert in experts]
    return lambda expert, epoch: kept[expert][epoch - first]


def _on_disk(experts: list[Trajectory]) -> Callable[[int, int], Tensor]:
    return lambda expert, epoch: experts[expert].at(epoch)


def _fits(experts: list[Trajectory], first: int, last: int) -> bool:
    """Whether all these epochs take at most half of the memory that is free."""
    return 4 * experts[0].numel * (last - first + 1) * len(experts) <= (free_bytes() or 0) / 2


def _check_long_enough(expert: Trajectory, last: int, expert_epochs: int, min_start: int) -> None:
    if expert.epochs < last:
        longest = expert.epochs + 1 - expert_epochs
        remedy = f"set datamodule.max_start={longest}, or " if longest > min_start else ""
        raise HastenError(
            f"expert_trajectories: needs epochs 0..{last}, {expert.path.stem} has 0..{expert.epochs}; "
            f"{remedy}train longer ones by experiment=EXPERTS module.epochs={last}, then add first=[] "
            "datamodule.path=FOLDER/experts"
        )
