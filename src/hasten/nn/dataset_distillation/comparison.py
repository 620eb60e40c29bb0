"""The table that a distilled set owes its reader: what fresh nets learn from it, and from what is to be had for free.

An arm is what nets are trained on: the distilled images, random real ones, the whole training set. Several fresh nets
measure each, and they begin alike in all arms. The holdout chooses learning rates; the test split chooses nothing.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import did_you_mean
from hasten.formats.trajectories import Trajectory
from hasten.functional.draws import digest_of
from hasten.functional.matching import hard_logits
from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.dataset_distillation.evaluation import (
    hits,
    train_on,
)
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.nn.dataset_distillation.initial import expert_logits, real_hard
from hasten.nn.dataset_distillation.table import Row, Table, scores
from hasten.nn.protocols import HasRealImages

NetFactory = Callable[[], nn.Module]
"""Makes a fresh net that maps images (B, C, H, W) to logits (B, K)."""
LRS = (0.01, 0.1)
"""What the holdout chooses from beside the learned step size."""
BASELINES = ("random", "random_soft", "whole")
"""Arms of real images."""
IMPORTED = "the experts are imported and may have seen the holdout"
"""The note under a table whose experts do not say on which images they were trained."""
_LINES_EVERY_S = 10
_STEP_IMAGES = 128
_RANDOM_TRIALS = 3
"""Nets that try each learning rate on random images: a few of these are so unlike others that one would say little."""


@dataclass(frozen=True, eq=False)
class Arm:
    """What nets are trained on.

    Args:
        name: of the row.
        draw: number of the net -> images (N, C, H, W), label logits (N, K); anew for every net, or always the same.
        size: N.
        epochs: passes over them.
        lrs: one learning rate, which is used, or several, of which the holdout chooses one.
        augment: of every batch.
        trials: nets that try each learning rate, where there are several; more where the draws differ much.
    """

    name: str
    draw: Callable[[int], tuple[Tensor, Tensor]]
    size: int
    epochs: int
    lrs: tuple[float, ...]
    augment: DSA | None
    trials: int = 1


@dataclass(frozen=True, eq=False)
class FewImages:
    """A distilled set as nets are trained on it.

    Args:
        images: (N, C, H, W).
        label_logits: (N, K).
        classes: (N,) int64.
        lr: the step size that was learned along with them.
    """

    images: Tensor
    label_logits: Tensor
    classes: Tensor
    lr: float

    @property
    def ipc(self) -> int:
        """Images per class."""
        return len(self.images) // self.label_logits.shape[1]

    @property
    def hard_logits(self) -> Tensor:
        """Of the classes alone."""
        return hard_logits(self.classes, self.label_logits.shape[1])

    @property
    def has_hard_labels(self) -> bool:
        """Whether the labels are the classes and nothing else."""
        return torch.equal(self.label_logits.softmax(1), self.hard_logits.softmax(1))


def check_protocol(lr: object, baselines: Sequence[str]) -> None:
    """Refuse a learning rate and baselines that there are none of.

    Raises:
        ValueError: where not.
    """
    if lr not in ("learned", "holdout") and not (isinstance(lr, (int, float)) and lr > 0):
        raise ValueError(f"lr: expected learned, holdout or a number > 0, got {lr!r}")
    if unknown := [name for name in baselines if name not in BASELINES]:
        raise ValueError(f"baselines: got {unknown[0]!r}{did_you_mean(unknown[0], BASELINES)}")


def table_of(
    sets: Mapping[str, FewImages],
    jury: "Jury",
    recipe: "Recipe",
    holdout: Sequence[Any],
    test: Sequence[Any],
    *,
    baselines: Sequence[str] = (),
    lr: float | str = "learned",
    with_scores: bool = True,
    unaugmented: bool = False,
    say: Callable[[str], None] | None = None,
) -> Table:
    """Measure distilled sets and the baselines on the test split.

    The first net is trained on each set as ``lr`` says; everything else has its learning rate from the holdout.

    Args:
        sets: name -> a set; the scores are those of the last one, on the first net.
        jury: the nets.
        recipe: how they are trained.
        holdout: batches of (images, labels) that choose learning rates.
        test: batches that are only measured on.
        baselines: of "random", "random_soft" and "whole"; the last on the first net only.
        lr: "learned", the set's own; "holdout", which chooses one; or a number.
        with_scores: HLR, IOR and LRS, as far as the baselines allow; HLR trains on the set with hard labels too.
        unaugmented: the set and its random peer once more without augmentation, for ARS.
        say: is told, every few seconds, how far this is.

    Raises:
        ValueError: for a class with fewer real images than the set has; names it.
    """
    first = next(iter(jury.nets))
    own, chosen = list(sets.items())[-1]
    hard = chosen.has_hard_labels
    arms: list[tuple[str, Arm]] = []
    for net in jury.nets:
        if "random" in baselines:
            arms.append((net, recipe.random(chosen.ipc, candidates(chosen.lr))))
        if "random_soft" in baselines:
            arms.append((net, recipe.random_soft(chosen.ipc, candidates(chosen.lr))))
        if "whole" in baselines and net == first:
            arms.append((net, recipe.whole(candidates(chosen.lr))))
        for name, few in sets.items():
            lrs = rates(few, lr) if net == first else candidates(few.lr)
            arms.append((net, recipe.given(name, few.images, few.label_logits, lrs)))
    if with_scores and "whole" in baselines and not hard:
        hard_arm = recipe.given(f"{own}, hard labels", chosen.images, chosen.hard_logits, candidates(chosen.lr))
        arms.append((first, hard_arm))
    if unaugmented:
        peer = "random" if hard else "random_soft"
        plain = [arm for net, arm in arms if net == first and arm.name in (own, peer)]
        arms += [(first, replace(arm, name=f"{arm.name}, no augmentation", augment=None)) for arm in plain]
    rows = jury.rows(arms, holdout, test, learned={name: few.lr for name, few in sets.items()}, say=say)
    found = Table(tuple(rows))
    scored = scores(found.metrics(first), own=own, hard_labels=hard) if with_scores else {}
    notes = [
        f"test split, fractions, mean ± standard deviation over {jury.seeds} fresh nets",
        "SGD, momentum 0.9, weight decay 0.0005, batch 128, lr / 10 from half of the epochs on, augmentation "
        f"{recipe.augment}",
        f"lr (holdout): of the set's own {chosen.lr:.4g}, {' and '.join(map(str, LRS))} the best there, by other nets",
    ]
    if missing := [name for name in ("random_soft", "whole") if name not in baselines]:
        unscored = [name for name in ("hlr", "ior", "lrs") if with_scores and name not in scored]
        without = f", and without them no {', '.join(name.upper() for name in unscored)}" if unscored else ""
        notes.append(f"not measured: {' and '.join(missing)}{without}; add them to baselines")
    if scored:
        notes.append(f"scores: {own} on {first}, against random images with {'hard' if hard else 'soft'} labels")
    return replace(found, scores=scored, notes=tuple(notes))


# ------------------------------------------------------------------ the arms


@dataclass(frozen=True, eq=False)
class Recipe:
    """How every arm is trained, and what its random images come from.

    Args:
        epochs: passes over the few images.
        whole_epochs: passes over the whole training set.
        augment: of every batch.
        seed: of nets, orders, augmentation and random images.
        data: the real images; None: there are no baselines.
        student: what the experts' vectors are weights of.
        experts: who label the random images of ``random_soft``.
    """

    epochs: int
    whole_epochs: int
    augment: DSA | None
    seed: int
    data: HasRealImages | None = None
    student: FlatModel | None = None
    experts: Sequence[Trajectory] = ()

    def given(self, name: str, images: Tensor, label_logits: Tensor, lrs: tuple[float, ...]) -> Arm:
        """Images and labels as they are."""
        return Arm(name, lambda number: (images, label_logits), len(images), self.epochs, lrs, self.augment)

    def random(self, ipc: int, lrs: tuple[float, ...]) -> Arm:
        """Random real images with hard labels, others for every net."""
        data = _needed(self.data)
        size = ipc * data.num_classes
        return Arm("random", lambda n: self._random(data, ipc, n), size, self.epochs, lrs, self.augment, _RANDOM_TRIALS)

    def random_soft(self, ipc: int, lrs: tuple[float, ...]) -> Arm:
        """The same images with the experts' labels: those of the experts that are right about an image."""
        data, student = _needed(self.data), _needed(self.student)
        classes = torch.arange(data.num_classes).repeat_interleave(ipc)

        def draw(number: int) -> tuple[Tensor, Tensor]:
            images, _ = self._random(data, ipc, number)
            # random images are what they are: one that no expert is right about has the mean of all
            return images, expert_logits(student, self.experts, images, classes, fall_back=True)

        return Arm("random_soft", draw, len(classes), self.epochs, lrs, self.augment, _RANDOM_TRIALS)

    def whole(self, lrs: tuple[float, ...]) -> Arm:
        """All training images with hard labels, in memory."""
        data = _needed(self.data)
        labels = data.train_labels
        images: list[Tensor] = []

        def draw(number: int) -> tuple[Tensor, Tensor]:
            if not images:  # read once, and not before the arm is due
                images.append(torch.cat([data.train_images(part) for part in torch.arange(len(labels)).split(1024)]))
            return images[0], hard_logits(labels, data.num_classes)

        return Arm("whole", draw, len(labels), self.whole_epochs, lrs, self.augment)

    def _random(self, data: HasRealImages, ipc: int, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, "random images", number))
        unused: Any = None  # hard labels ask no expert
        return real_hard(data, unused, (), ipc=ipc, generator=generator)


def labelling_student(make: NetFactory, experts: Sequence[Trajectory]) -> FlatModel:
    """The net that the experts' vectors are weights of.

    Raises:
        ValueError: where there are no experts, or it is another net; names the first tensor that differs.
    """
    if not experts:
        raise ValueError(
            "experts: expected those who label the images of random_soft, got none; set experts to their folder, or "
            "leave random_soft out of baselines"
        )
    student = FlatModel(make())
    if (difference := student.first_difference(experts[0].names, experts[0].shapes)) is not None:
        i, own, expert = difference
        raise ValueError(
            f"experts: parameter {i} of the first net: expected {expert} as in {experts[0].path.name}, got {own}; give "
            "it their width and depth"
        )
    return student


def split_batches(data: Any, split: str) -> list[tuple[Tensor, Tensor]]:
    """All of a split of real images, in memory: dozens of nets are measured on it.

    Raises:
        ValueError: where there is none.
    """
    check_split(data, split)
    return [(batch[0], batch[1]) for batch in getattr(data, f"{split}_dataloader")()]


def described(data: Any) -> dict[str, Any]:
    """What a datamodule says of its real images, or the one that it is built around; nothing where it is a stranger."""
    around = getattr(data, "data", None) or getattr(data, "test", None)  # of ExpertTrajectories; of DistilledSet
    real = data if hasattr(data, "description") else around
    return getattr(real, "description", dict)()


def check_split(data: Any, split: str) -> None:
    """Refuse data without images to measure on; one batch is read.

    Raises:
        ValueError: where it has none.
    """
    loader = getattr(data, f"{split}_dataloader", lambda: None)()
    if next(iter(loader or ()), None) is None:
        remedy = "set data.val, 0.1 is usual" if split == "val" else "give it images to test on"
        raise ValueError(f"{type(data).__name__}: expected a {split} split, got none; {remedy}")


def rates(few: FewImages, lr: float | str) -> tuple[float, ...]:
    """What "learned", "holdout" or a number means for a set: one learning rate, or several for the holdout."""
    if lr == "holdout":
        return candidates(few.lr)
    return (few.lr if lr == "learned" else float(lr),)


def candidates(lr: float) -> tuple[float, ...]:
    """The learned step size and the usual ones, each once."""
    return tuple(dict.fromkeys((lr, *LRS)))


# ------------------------------------------------------------------ measuring


class Jury:
    """Fresh nets, always the same ones, that are trained on an arm and measured on a split.

    Args:
        nets: name -> factory; the first is the architecture that the images were distilled with.
        seeds: nets a row, >= 1.
        seed: of their weights and of their training.
        device: where they are trained.
        pooled: sums a tensor over the processes, each of which sees its share of the split; None: there is one process.
    """

    def __init__(
        self,
        nets: Mapping[str, NetFactory],
        *,
        seeds: int,
        seed: int,
        device: torch.device,
        pooled: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if seeds < 1:
            raise ValueError(f"seeds: expected >= 1, got {seeds}")
        self.nets = nets
        self.seeds = seeds
        self.seed = seed
        self.device = device
        self.pooled = pooled

    def accuracies(
        self, arm: Arm, net: str, lr: float, batches: Sequence[Any], tell: Callable[[], None] | None = None
    ) -> tuple[float, ...]:
        """Of ``seeds`` nets on real images, batches of (images, labels)."""
        return tuple(self._measured(arm, net, lr, batches, number, tell) for number in range(self.seeds))

    def chosen_lr(self, arm: Arm, net: str, holdout: Sequence[Any], tell: Callable[[], None] | None = None) -> float:
        """Of the arm's learning rates the one whose nets, some of their own for this, do best on the holdout."""
        if len(arm.lrs) == 1:
            return arm.lrs[0]
        trials = range(-arm.trials, 0)
        found = [statistics.fmean(self._measured(arm, net, lr, holdout, n, tell) for n in trials) for lr in arm.lrs]
        return arm.lrs[found.index(max(found))]

    def rows(
        self,
        arms: Iterable[tuple[str, Arm]],
        holdout: Sequence[Any],
        test: Sequence[Any],
        *,
        learned: Mapping[str, float],
        say: Callable[[str], None] | None = None,
    ) -> list[Row]:
        """A row for each (net, arm).

        Args:
            arms: with the name of the net.
            holdout: batches that choose learning rates.
            test: batches that are only measured on.
            learned: arm -> step size that was learned along with it, to be named so in the table.
            say: is told, every few seconds, how far this is.
        """
        arms = list(arms)
        trained = [(arm.trials * len(arm.lrs) if len(arm.lrs) > 1 else 0) + self.seeds for _, arm in arms]
        progress = Progress(sum(n * _steps(arm) for n, (_, arm) in zip(trained, arms, strict=True)), say)
        found = []
        for net, arm in arms:
            tell = progress.part(f"{arm.name} on {net}", _steps(arm) // arm.epochs)
            lr = self.chosen_lr(arm, net, holdout, tell)
            accuracies = self.accuracies(arm, net, lr, test, tell)
            lr_from = "holdout" if len(arm.lrs) > 1 else "learned" if learned.get(arm.name) == lr else "given"
            found.append(Row(arm.name, net, lr, lr_from, arm.epochs, accuracies))
        return found

    def _measured(
        self, arm: Arm, net: str, lr: float, batches: Sequence[Any], number: int, tell: Callable[[], None] | None
    ) -> float:
        """Of the net of that number, which begins and draws alike whatever else was trained before."""
        images, label_logits = arm.draw(number)
        with _seeded(mixed_seed(self.seed, net, number), self.device):
            fresh = self.nets[net]().to(self.device, torch.float32)
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, "training", number))
            if len(images) <= _STEP_IMAGES:
                images = images.to(self.device)
            train_on(
                fresh,
                images,
                label_logits,
                lr=lr,
                epochs=arm.epochs,
                augment=arm.augment,
                generator=generator,
                progress=tell,
            )
        counts = torch.tensor(hits(fresh, batches), dtype=torch.float64)
        right, total = counts if self.pooled is None else self.pooled(counts.to(self.device))
        return float(right / total)


class Progress:
    """Says how far work of so many steps is, in a line now and then.

    Args:
        steps: of all.
        say: is given the line; None: nobody.
    """

    def __init__(self, steps: int, say: Callable[[str], None] | None) -> None:
        self.steps = steps
        self.say = say
        self._done = 0
        self._began_s = self._said_s = time.monotonic()

    def part(self, name: str, steps: int) -> Callable[[], None]:
        """What counts ``steps`` more of the part of that name."""

        def tell() -> None:
            self._done += steps
            now = time.monotonic()
            if self.say is not None and now - self._said_s > _LINES_EVERY_S:
                self._said_s = now
                left_s = (now - self._began_s) * (self.steps - self._done) / self._done
                self.say(f"evaluation: {self._done / self.steps:.0%}, {name}, about {left_s:.0f} s left")

        return tell


def mixed_seed(*parts: str | int) -> int:
    """A 63-bit seed of several parts; near parts give seeds that are not."""
    return digest_of(*parts) >> 1


def _steps(arm: Arm) -> int:
    return arm.epochs * -(-arm.size // _STEP_IMAGES)


def _needed(value: Any) -> Any:
    if value is None:
        raise ValueError("baselines: expected real images, and for random_soft the experts' net, got none")
    return value


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's own generators as seeded, for layers that draw from them, and afterwards as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
