"""The loader of every datamodule: batches that are a function of (seed, epoch), resumable between any two of them."""

import random
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from itertools import pairwise
from math import ceil
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, default_collate

from hasten.errors import HastenError
from hasten.functional.draws import digest_of


class EpochLoader:
    """Batches of a dataset in an order that is a function of (seed, epoch), whatever the number of workers.

    A pass over the loader is one epoch and the next pass is the next epoch, even where the last one was left early.
    The loader knows where it stands: ``state_dict`` can be read between any two batches, and after ``load_state_dict``
    the next pass goes on with the very next batch. Lightning saves and restores this by itself, except under
    ``max_epochs`` where a schedule asks for ``estimated_stepping_batches``: then it takes ``ExactResume``.

    What ``dataset[index]`` draws at random from Python, NumPy or torch is a function of (seed, epoch, index): their
    global generators are seeded for each sample and put back afterwards. A dataset with a method
    ``batch(indices: list[int])`` is asked for whole batches instead, which is fast, and must draw nothing.

    Under ``torch.distributed`` each process sees its share: no sample twice, as many batches as every other process,
    and the i-th batches of all together are the i-th batch of a single process that takes as many samples. Without
    ``drop_last`` no sample is left out, so at the end of an epoch the processes' batches may differ by a sample.

    Args:
        dataset: has a length and ``dataset[index]`` or ``batch(indices)``.
        batch_size: samples per batch and process, >= 1.
        shuffle: a new order each epoch; else the dataset's own.
        drop_last: leave out what does not fill a batch of every process.
        subset: indices of the samples to be seen, (m,) int64; None: all.
        seed: of the order and of the samples' draws.
        num_workers: processes that load ahead, >= 0; they stay from epoch to epoch.
        pin_memory: page-locked batches, for a GPU.
        steps_per_epoch: asked at the beginning of an epoch after how many batches it ends, as under Lightning's
            ``limit_train_batches``; default: all.

    Raises:
        HastenError: where there is no batch for every process.

    Example:
        >>> loader = EpochLoader(range(10), 4)
        >>> batches = iter(loader)
        >>> first, stand = next(batches), loader.state_dict()
        >>> rest = [batch.tolist() for batch in batches]
        >>> loader.load_state_dict(stand)
        >>> rest == [batch.tolist() for batch in loader]
        True
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        subset: Tensor | None = None,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        steps_per_epoch: Callable[[], int | float] | None = None,
    ):
        if batch_size < 1:
            raise HastenError(f"loader: batch_size: expected >= 1, got {batch_size}")
        if num_workers < 0:
            raise HastenError(f"loader: num_workers: expected >= 0, got {num_workers}; 0 loads in the main process")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._samples = torch.arange(len(dataset)) if subset is None else subset
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._steps_per_epoch = steps_per_epoch
        self._resumed = False
        self._restored_to_start = False
        self._asked = False
        self._passes = 0
        self._plan: list[tuple[int, list[int]]] = []
        self._loader = DataLoader(
            _Batches(dataset, seed),
            batch_size=None,
            sampler=self._plan,
            collate_fn=_unchanged,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # without one, every pass would draw from the global generator
        )

    def __len__(self) -> int:
        """Batches per epoch of this process."""
        return len(self._bounds(*_rank_and_world_size())) - 1

    def __iter__(self) -> Iterator[Any]:
        self._asked = True
        return self._pass()

    def _pass(self) -> Iterator[Any]:
        # A generator's body runs from the first `next` on, and it must: Lightning asks for an iterator twice before it
        # restores the position or says which epoch begins.
        steps = len(self) if self._steps_per_epoch is None else int(min(len(self), self._steps_per_epoch()))
        if self.position >= (steps if self._resumed else 1):
            self.epoch, self.position = self.epoch + 1, 0
        self._restored_to_start = self._resumed and self.position == 0
        self._resumed = self._asked = False
        self._passes += 1
        this_pass, epoch, start = self._passes, self.epoch, self.position
        self._plan[:] = [(epoch, indices) for indices in self._order(epoch)[start:steps]]
        for position, batch in enumerate(self._loader, start=start + 1):
            if isinstance(batch, HastenError):
                raise HastenError(*batch.args)  # a new one: this frame holds the other, its traceback holds this frame
            # before the batch is used, because a checkpoint written after that must not repeat it
            self.epoch, self.position = (epoch, position) if position < steps else (epoch + 1, 0)
            yield batch
            if self._passes != this_pass:
                raise RuntimeError("loader: expected one pass at a time, a newer one has begun; use two loaders")

    def state_dict(self) -> dict[str, int]:
        """The epoch and position of the next batch, and the settings without which that would be another batch."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "samples": len(self._samples),
            "samples_per_step": self.batch_size * _rank_and_world_size()[1],
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from where ``state_dict`` was read.

        Raises:
            HastenError: where the rest of the epoch would be other batches.
        """
        here = self.state_dict()
        for name in ("seed", "samples", "samples_per_step") if state_dict["position"] else ():
            if state_dict[name] != here[name]:
                raise HastenError(
                    f"loader: {name.replace('_', ' ')}: expected {state_dict[name]} as in the checkpoint, which was "
                    f"written within an epoch, got {here[name]}; resume with its data, batch size, processes and seed"
                )
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]
        self._resumed = True

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for a ``set_epoch``; a ``sampler`` of the loader itself it would try to replace."""
        # made anew each time: held by the loader it would be a cycle, and workers freed by the garbage collector linger
        return SimpleNamespace(sampler=SimpleNamespace(set_epoch=self._begin_with))

    def _begin_with(self, epoch: int) -> None:
        """Hear from Lightning that an epoch begins; its number counts only where the loader has none of its own."""
        if self._asked and not self._resumed:
            # A fit begins: before later epochs the last request for an iterator was followed by batches. Lightning may
            # restore no loader from a checkpoint of the end of an epoch, but here it says which epoch is next.
            self.epoch, self.position = epoch, 0
        elif self._restored_to_start and self.position == 1:
            # Lightning 2.6, resumed with `max_steps` after an epoch that ended without validation, draws one batch
            # before it sees that this epoch was over. The epoch that batch belongs to goes on.
            self._resumed = True

    @property
    def _iterator(self) -> Any:
        """The workers; Lightning looks for them here at the end of a fit, and ends them."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def _order(self, epoch: int) -> list[list[int]]:
        """The indices of all batches of ``epoch`` for this process."""
        rank, world_size = _rank_and_world_size()
        order = self._samples
        if self.shuffle:
            generator = torch.Generator().manual_seed(digest_of(self.seed, epoch))
            order = order[torch.randperm(len(order), generator=generator)]
        share = order[rank::world_size].tolist()
        return [share[start:stop] for start, stop in pairwise(self._bounds(rank, world_size))]

    def _bounds(self, rank: int, world_size: int) -> list[int]:
        """Where the batches of a process begin in its share of the samples, and where the last one ends."""
        samples, step = len(self._samples), self.batch_size * world_size
        if self.drop_last:
            batches = samples // step
            bounds = [i * self.batch_size for i in range(batches + 1)]
        else:
            # As many batches for a share that is a sample short: it keeps back a sample for each batch to come. With
            # one batch less, its process would leave the others waiting in their next collective operation.
            share = len(range(rank, samples, world_size))
            batches = min(ceil(samples / step), samples // world_size)
            bounds = [min(i * self.batch_size, share - (batches - i)) for i in range(batches)] + [share]
        if batches == 0:
            raise HastenError(
                f"loader: expected at least {step if self.drop_last else world_size} samples for a batch in each "
                f"process, got {samples}; lower batch_size or the number of processes"
            )
        return bounds


class _Batches(Dataset[Any]):
    """(epoch, indices) -> a batch; the part of the loader that runs in its workers."""

    def __init__(self, dataset: Any, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, list[int]]) -> Any:
        epoch, indices = key
        try:
            if hasattr(self.dataset, "batch"):
                return self.dataset.batch(indices)
            samples = []
            with _random_state_put_back():
                for index in indices:
                    _seed_global_generators(digest_of(self.seed, epoch, index))
                    samples.append(self.dataset[index])
        except HastenError as error:
            return error  # the loader raises it: from a worker, it would arrive as a page of traceback
        batch = default_collate(samples)
        return tuple(batch) if isinstance(batch, list) else batch


def _unchanged(batch: Any) -> Any:
    return batch


def _rank_and_world_size() -> tuple[int, int]:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _seed_global_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well


@contextmanager
def _random_state_put_back() -> Iterator[None]:
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
