"""Brings experts and distilled sets of the trajectory-matching authors' programs into our own files."""

import math
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import nn

from hasten.errors import HastenError
from hasten.formats.released import buffer_paths, read_buffer, read_released
from hasten.formats.trajectories import trajectory_paths, write_trajectory


def import_buffer(
    folder: Path, *, source: str | Path, path: str | Path | None, model: nn.Module, data: Any
) -> dict[str, float]:
    """Import the experts of ``replay_buffer_*.pt``, or the set of ``images_*.pt``, ``labels_*.pt`` and ``lr_*.pt``.

    No code in the files runs. Nothing is written before every file has been checked against the network, tensor by
    tensor. What experts have seen is not in their files: they may know the images of the holdout, and tables say so.

    Args:
        folder: of the run.
        source: a file ``replay_buffer_*.pt``, or the folder of such files, or of a distilled set.
        path: where our files go; None: ``experts`` or ``distilled`` in the run's folder.
        model: the network whose parameters the tensors are.
        data: the datamodule whose images a distilled set is made of, in the range that it was distilled in.

    Returns:
        ``import/experts`` and ``import/epochs``, or ``import/images``.

    Raises:
        HastenError: for files that hold anything else, or a ``path`` that holds experts already.

    Example:
        >>> from functools import partial
        >>> bring = partial(import_buffer, source="released/buffers", path="runs/experts")
    """
    source = Path(source)
    buffers = buffer_paths(source)
    if buffers:
        return _import_experts(buffers, Path(path or folder / "experts"), model)
    if any(source.glob("images_*.pt")):
        data.prepare_data()
        data.setup("fit")
        about = {"classes": list(data.class_names), "source": str(source)}
        found = read_released(source, pixels=data.pixels, num_classes=data.num_classes, about=about)
        if found.image_shape != tuple(data.image_shape):
            raise HastenError(
                f"import: {source}: expected images {tuple(data.image_shape)} as in data, got {found.image_shape}; set "
                "data and image.size to what was distilled"
            )
        found.write(path or folder / "distilled")
        return {"import/images": float(len(found.images))}
    raise HastenError(
        f"import: source: expected replay_buffer_*.pt, or images_*.pt with labels_*.pt and lr_*.pt, found none in "
        f"{str(source)!r}"
    )


def _import_experts(buffers: list[Path], path: Path, model: nn.Module) -> dict[str, float]:
    if trajectory_paths(path):
        raise HastenError(f"import: path: {str(path)!r} holds experts already; choose another folder or delete them")
    names = [name for name, _ in model.named_parameters()]
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    for buffer in buffers:
        read_buffer(buffer, names=names, shapes=shapes)  # checks: nothing is written for a folder with a wrong file
    recipe = {"imported": "replay_buffer", "names": names, "shapes": shapes}
    experts = epochs = 0
    for buffer in track(buffers, "experts", transient=True):
        for theta in read_buffer(buffer, names=names, shapes=shapes):
            unknown = [math.nan] * len(theta)
            write_trajectory(
                path / f"expert_{experts:04d}.safetensors",
                theta,
                train_acc=unknown,
                val_acc=unknown,
                names=names,
                shapes=shapes,
                recipe=recipe,
            )
            experts, epochs = experts + 1, len(theta) - 1
    return {"import/experts": float(experts), "import/epochs": float(epochs)}
