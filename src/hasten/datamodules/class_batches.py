"""Real images by class: what distribution matching compares its synthetic images with."""

from functools import cached_property
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Generator, Tensor
from torch.utils.data import Dataset

from hasten.datamodules.around import AroundData
from hasten.datamodules.iterations import check_length
from hasten.datamodules.loader import EpochLoader
from hasten.errors import HastenError
from hasten.formats.trajectories import Trajectory, check_seen, open_trajectories
from hasten.functional.draws import generator_of


class ClassBatches(AroundData):
    """One batch an iteration: ``per_class`` real images of every class, (K, per_class, C, H, W), without augmentation.

    What a batch holds is a function of (seed, iteration, process). The images of a class are drawn without replacement;
    a class that has fewer gives all of them, and then again. Validation and test are those of ``data``.

    Args:
        data: the datamodule of the real images.
        per_class: images, >= 1.
        iterations: batches of the one epoch, >= 1.
        experts: a folder of trained networks, for an initialisation that asks for their opinion; None: there are none.
        seed: of the draws, >= 0.

    Raises:
        HastenError: for a number out of its range, for a class without images, for experts of other images, and for a
            fit of more iterations.

    Example:
        >>> from hasten.datamodules import Digits
        >>> batches = ClassBatches(Digits(), per_class=20, iterations=100)
        >>> next(iter(batches.train_dataloader())).shape
        torch.Size([10, 20, 1, 8, 8])
    """

    def __init__(
        self,
        data: LightningDataModule,
        *,
        per_class: int = 256,
        iterations: int = 20_000,
        experts: str | Path | None = None,
        seed: int = 0,
    ):
        super().__init__(data)
        for name, value, least in (("per_class", per_class, 1), ("iterations", iterations, 1), ("seed", seed, 0)):
            if value < least:
                raise HastenError(f"class_batches: {name}: expected an int >= {least}, got {value}")
        self.per_class = per_class
        self.iterations = iterations
        self.folder = experts
        self.seed = seed

    @cached_property
    def experts(self) -> list[Trajectory]:
        """The trained networks, opened at first use."""
        experts = [] if self.folder is None else open_trajectories(self.folder)
        if experts:
            check_seen(experts, getattr(self.data, "description", dict)(), owner="class_batches")
        return experts

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            check_length(self.trainer, self.iterations, name="class_batches")

    def train_dataloader(self) -> EpochLoader:
        """An epoch of ``iterations`` batches for each process."""
        processes = 1 if self.trainer is None else self.trainer.world_size
        return EpochLoader(_OfEveryClass(self, processes), 1, shuffle=False, seed=self.seed)


class _OfEveryClass(Dataset[Tensor]):
    """Item i: real images of every class, (K, R, C, H, W); those of all processes at an iteration follow each other."""

    def __init__(self, batches: ClassBatches, processes: int):
        self.batches = batches
        self.processes = processes
        labels = batches.train_labels
        self.members = [(labels == label).nonzero().flatten() for label in range(batches.num_classes)]
        for name, members in zip(batches.class_names, self.members, strict=True):
            if len(members) == 0:
                raise HastenError(f"class_batches: expected training images of every class, got none of {name!r}")

    def __len__(self) -> int:
        return self.batches.iterations * self.processes

    def batch(self, indices: list[int]) -> Tensor:
        (index,) = indices
        generator = generator_of(self.batches.seed, index)
        rows = [_drawn(members, self.batches.per_class, generator) for members in self.members]
        return self.batches.train_images(torch.cat(rows)).unflatten(0, (len(rows), -1))


def _drawn(members: Tensor, n: int, generator: Generator) -> Tensor:
    """So many of ``members``, each as often as any other to within once."""
    passes = -(-n // len(members))
    return torch.cat([members[torch.randperm(len(members), generator=generator)] for _ in range(passes)])[:n]
