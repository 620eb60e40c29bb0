"""What an expert was after every epoch of its training: one safetensors file an expert, read by rows."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten import __version__
from hasten.errors import HastenError
from hasten.formats.files import whole_file
from hasten.formats.recipes import data_difference, recipe_difference, recipe_hash

_WANTED = ("names", "shapes", "recipe", "recipe_hash")


def write_trajectory(
    path: str | os.PathLike[str],
    theta: Tensor,
    *,
    train_acc: Sequence[float],
    val_acc: Sequence[float],
    names: Sequence[str],
    shapes: Sequence[Sequence[int]],
    recipe: Mapping[str, Any],
) -> None:
    """Write the parameters theta (E + 1, P) float32 of one expert, whole or not at all even where the power fails.

    Args:
        path: ends in .safetensors.
        theta: row e are all parameters after e epochs, flat, in the order of ``names``.
        train_acc: E + 1 fractions; NaN where it was not measured.
        val_acc: likewise.
        names: of the parameters.
        shapes: likewise; their elements are the P of a row.
        recipe: whatever decides what the expert is, for JSON; experts of one folder have the same.

    Raises:
        ValueError: where the lengths do not fit.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "expert_0000.safetensors")
        >>> about = dict(names=["weight"], shapes=[[2, 3]], recipe={"lr": 0.01})
        >>> write_trajectory(path, torch.zeros(21, 6), train_acc=[0.5] * 21, val_acc=[0.5] * 21, **about)
        >>> Trajectory(path).epochs
        20
    """
    numel = sum(math.prod(shape) for shape in shapes)
    if theta.ndim != 2 or theta.shape[1] != numel or len(names) != len(shapes):
        raise ValueError(
            f"write_trajectory: theta: expected (E + 1, {numel}) for {len(names)} names and {len(shapes)} shapes, "
            f"got {tuple(theta.shape)}"
        )
    if not len(theta) == len(train_acc) == len(val_acc):
        raise ValueError(
            f"write_trajectory: train_acc and val_acc: expected {len(theta)} as rows of theta, "
            f"got {len(train_acc)} and {len(val_acc)}"
        )
    tensors = {
        "theta": theta.float().cpu().contiguous(),
        "train_acc": torch.tensor(train_acc, dtype=torch.float32),
        "val_acc": torch.tensor(val_acc, dtype=torch.float32),
    }
    about = {
        "names": json.dumps(list(names)),
        "shapes": json.dumps([list(shape) for shape in shapes]),
        "recipe": json.dumps(recipe),
        "recipe_hash": recipe_hash(recipe),
        "hasten": __version__,
    }
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata=about)


class Trajectory:
    """One expert's parameters after every epoch, read from its file row by row when they are asked for.

    Args:
        path: what ``write_trajectory`` wrote.

    Attributes:
        path: where it is.
        epochs: E; there are E + 1 rows, the first from before the training.
        numel: P, the elements of all parameters.
        names: of the parameters, in the order of a row.
        shapes: of the parameters, likewise.
        recipe: what decided what the expert is.
        recipe_hash: of that.
        train_acc: E + 1 fractions, NaN where it was not measured.
        val_acc: likewise.

    Raises:
        HastenError: where the file is no whole trajectory.

    Example:
        >>> import tempfile
        >>> path, theta = Path(tempfile.mkdtemp(), "expert_0000.safetensors"), torch.arange(6.0).view(3, 2)
        >>> acc = [0.1, 0.5, 0.7]
        >>> write_trajectory(path, theta, train_acc=acc, val_acc=acc, names=["bias"], shapes=[[2]], recipe={})
        >>> Trajectory(path).at(-1)
        tensor([4., 5.])
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                shape = file.get_slice("theta").get_shape()
                accuracies = [file.get_tensor(name).tolist() for name in ("train_acc", "val_acc")]
        except (OSError, SafetensorError) as error:
            raise HastenError(
                f"trajectory: {str(path)!r} cannot be read ({error}); delete it and train that expert again"
            ) from error
        if missing := [name for name in _WANTED if name not in about]:
            raise HastenError(
                f"trajectory: {str(path)!r}: expected {' and '.join(missing)} in its metadata, got none; "
                "it was written by another program, delete it"
            )
        self.epochs, self.numel = shape[0] - 1, shape[1]
        self.names: list[str] = json.loads(about["names"])
        self.shapes: list[tuple[int, ...]] = [tuple(shape) for shape in json.loads(about["shapes"])]
        self.recipe: dict[str, Any] = json.loads(about["recipe"])
        self.recipe_hash = about["recipe_hash"]
        self.train_acc: list[float] = accuracies[0]
        self.val_acc: list[float] = accuracies[1]

    @property
    def is_imported(self) -> bool:
        """Whether it comes from a program that does not say on which images it was trained."""
        return "imported" in self.recipe

    def at(self, epoch: int) -> Tensor:
        """The parameters after ``epoch`` epochs, (P,) float32; -1 are the last ones.

        Raises:
            IndexError: where there is no such epoch.
        """
        index = epoch + self.epochs + 1 if epoch < 0 else epoch
        return self.between(index, index)[0]

    def between(self, first: int, last: int) -> Tensor:
        """The parameters after ``first``, ..., ``last`` epochs, both included, (last - first + 1, P) float32.

        Raises:
            IndexError: where there are no such epochs.
        """
        if not 0 <= first <= last <= self.epochs:
            raise IndexError(f"trajectory: {self.path.stem} has epochs 0..{self.epochs}, got {first}..{last}")
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice("theta")[first : last + 1].clone()  # a view would hold on to the mapped file


def open_trajectories(folder: str | os.PathLike[str], *, max_experts: int | None = None) -> list[Trajectory]:
    """The experts of a folder in the order of their numbers, all of one recipe.

    Args:
        folder: of files ``expert_*.safetensors``.
        max_experts: so many of them, the first ones; None: all there are.

    Raises:
        HastenError: where there are too few, where one is broken, or where two are not of one kind.

    Example:
        >>> open_trajectories("nowhere")
        Traceback (most recent call last):
        hasten.errors.HastenError: trajectories: 'nowhere': expected at least 1 expert, found 0; ...
    """
    paths = trajectory_paths(folder)
    wanted = 1 if max_experts is None else max_experts
    if wanted < 1:
        raise HastenError(f"trajectories: max_experts: expected >= 1 or null, got {max_experts}")
    if len(paths) < wanted:
        raise HastenError(
            f"trajectories: {str(folder)!r}: expected at least {wanted} expert{'s' if wanted > 1 else ''}, found "
            f"{len(paths)}; train them: python train.py experiment=experts_digits, or experts_* of your data"
        )
    first, *others = experts = [Trajectory(path) for path in paths[:max_experts]]
    for expert in others:
        if expert.recipe_hash != first.recipe_hash:
            raise HastenError(
                f"trajectories: {str(folder)!r}: expected experts of one recipe, {expert.path.stem} and "
                f"{first.path.stem} differ in {recipe_difference(expert.recipe, first.recipe)}; delete one of the two"
            )
        if (expert.names, expert.shapes) != (first.names, first.shapes):
            raise HastenError(
                f"trajectories: {str(folder)!r}: expected experts of one network, {expert.path.stem} and "
                f"{first.path.stem} differ in names, order or shapes of their parameters; delete one of the two"
            )
    return experts


def trajectory_paths(folder: str | os.PathLike[str]) -> list[Path]:
    """The trajectory files of a folder in the order of their numbers; none where there is no such folder."""
    return sorted(Path(folder).glob("expert_*.safetensors"))


def check_seen(experts: Sequence[Trajectory], data: Mapping[str, Any], *, owner: str) -> None:
    """Refuse experts of other images than ``data`` describes; imported ones do not say what they have seen.

    Args:
        experts: of one recipe, as ``open_trajectories`` gives them.
        data: ``description()`` of the datamodule; what it does not say is not compared.
        owner: of the error.

    Raises:
        HastenError: where they have seen others, among which may be the held-out ones.

    Example:
        >>> check_seen([], {"name": "digits", "split": "1f"}, owner="difficulty")
    """
    trained_on = experts[0].recipe.get("data") if experts else None
    if trained_on is not None and (different := data_difference(data, trained_on)):
        raise HastenError(
            f"{owner}: expected data as {experts[0].path} was trained on, they differ in {different}; set data to "
            "that, or train experts on this"
        )
