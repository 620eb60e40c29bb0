"""Scores how difficult every training image is: what PAD's curriculum goes by."""

from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

from hasten.errors import HastenError
from hasten.formats import open_trajectories, whole_file
from hasten.formats.pictures import enlarged, tiled, write_png
from hasten.formats.trajectories import check_seen
from hasten.nn import FlatModel, grand
from hasten.tasks._device import device_of

_COLUMNS = 5  # images of a class at either end of the picture


def difficulty(
    folder: Path,
    *,
    data: Any,
    model: nn.Module,
    experts: str | Path,
    epoch: int = 10,
    max_experts: int = 10,
    batch_size: int = 64,
    accelerator: str = "cpu",
) -> dict[str, float]:
    """Score every training image by GraNd under experts that have just begun to learn.

    Writes ``difficulty.safetensors``, ``scores`` and ``labels`` (n,), which ``EasyToHard`` reads, and
    ``difficulty.png``: of each class, a row, the five easiest images and the five most difficult.

    Args:
        folder: of the run.
        data: the datamodule of the images.
        model: of the experts' architecture.
        experts: the folder of the trajectories.
        epoch: the epoch at which the experts are asked, >= 0; early, while images still differ.
        max_experts: how many are asked, >= 1.
        batch_size: images at once, each with a gradient of all parameters, >= 1.
        accelerator: "cpu", or anything else for the accelerator of this machine.

    Returns:
        ``difficulty/mean`` and ``difficulty/std``.

    Raises:
        HastenError: where experts do not fit the model or the data, or have no such epoch.

    Source: GraNd, arXiv:2107.07075, as PAD uses it, arXiv:2408.03360.

    Example:
        >>> from functools import partial
        >>> score = partial(difficulty, epoch=5)
    """
    data.prepare_data()
    data.setup("fit")
    asked = open_trajectories(experts)[:max_experts]
    check_seen(asked, getattr(data, "description", dict)(), owner="difficulty")
    if not 0 <= epoch <= asked[0].epochs:
        raise HastenError(f"difficulty: epoch: expected 0 to {asked[0].epochs}, as long as experts train, got {epoch}")
    device = device_of(accelerator)
    batches = len(asked) * -(-len(data.train_labels) // batch_size)
    with Progress(transient=True) as bar:
        task = bar.add_task("images", total=batches)
        thetas = (expert.at(epoch).to(device) for expert in asked)
        try:
            scores = grand(FlatModel(model), thetas, data, batch_size=batch_size, progress=lambda: bar.advance(task))
        except ValueError as error:
            raise HastenError(f"difficulty: {error}") from error
    with whole_file(folder / "difficulty.safetensors") as unfinished:
        save_file({"scores": scores, "labels": data.train_labels}, unfinished)
    write_png(_ends(data, scores), folder / "difficulty.png")
    return {"difficulty/mean": float(scores.mean()), "difficulty/std": float(scores.std())}


def _ends(data: Any, scores: torch.Tensor) -> torch.Tensor:
    """Of each class the easiest images and the most difficult, (3, height, width) in [0, 1]."""
    rows = []
    for label in range(data.num_classes):
        members = (data.train_labels == label).nonzero().flatten()
        easy_first = members[scores[members].argsort(stable=True)]
        # of a small class an image may stand at both ends
        rows.append(torch.cat([easy_first[:_COLUMNS], easy_first[-_COLUMNS:]]))
    images = data.denormalize(data.train_images(torch.cat(rows))).clamp(0, 1)
    return tiled(enlarged(images).unflatten(0, (len(rows), -1)))
