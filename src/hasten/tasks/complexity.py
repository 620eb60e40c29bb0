"""Grades the classes of a data set into easy and hard, by how little of an image shows its class."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from hasten.errors import HastenError
from hasten.formats import whole_file, write_json
from hasten.formats.pictures import drawn, new_figure, write_png
from hasten.functional import cam_complexity, grad_cam
from hasten.tasks._device import device_of


def complexity(
    folder: Path,
    *,
    data: Any,
    net: nn.Module,
    layer: str,
    saliency: Callable[..., Tensor] = grad_cam,
    easy: int = 10,
    hard: int = 10,
    batch_size: int = 64,
    accelerator: str = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """Measure the complexity of every class of the training images, and grade the classes by it.

    An image's complexity is the share of cells of its class activation map, at the size of the layer, that are not over
    0.5; the map is of the class that the network itself sees. A class has the mean over its images. Writes
    ``complexity.csv``, a row a class and the hardest first, ``complexity.json`` with the same, and ``complexity.png``.

    Args:
        folder: of the run.
        data: a datamodule with ``train_labels``, ``train_images`` and ``class_names``, in the range of the network.
        net: a trained classifier, of whatever classes.
        layer: the name of the layer whose maps are read, ``layer4`` of a ResNet.
        saliency: of the form of ``hasten.functional.grad_cam``.
        easy: so many classes of the lowest complexity are easy, >= 0.
        hard: so many of the highest are hard, >= 0; what is left is neither.
        batch_size: images at once, >= 1.
        accelerator: "cpu", or anything else for the accelerator of this machine.
        seed: of the noise of a saliency that has some.

    Returns:
        The mean complexity of all classes, ``complexity/mean``, of the easy and of the hard ones.

    Raises:
        HastenError: for more easy and hard classes than there are, and where network, layer and images do not fit.

    Source: Comp-DD, in EDF, arXiv:2410.17193.

    Example:
        >>> from functools import partial
        >>> grade = partial(complexity, easy=5, hard=5)
    """
    data.prepare_data()
    data.setup("fit")
    classes = data.num_classes
    if not (easy >= 0 and hard >= 0 and 1 <= easy + hard <= classes):
        raise HastenError(
            f"complexity: easy and hard: expected together 1 to {classes} classes, the number there is, got {easy} and "
            f"{hard}"
        )
    measured = _measured(data, net, layer, saliency, batch_size, device_of(accelerator), seed)
    counts = data.train_labels.bincount(minlength=classes)
    means = torch.zeros(classes).index_add(0, data.train_labels, measured) / counts
    order = means.argsort(descending=True, stable=True).tolist()
    grades = ["hard"] * hard + [""] * (classes - hard - easy) + ["easy"] * easy
    rows = [
        {
            "class": data.class_names[label],
            "label": label,
            "images": int(counts[label]),
            "complexity": round(float(means[label]), 6),
            "grade": grade,
        }
        for label, grade in zip(order, grades, strict=True)
    ]
    _write(folder, rows)
    metrics = {"complexity/mean": float(means.mean())}
    for grade, labels in (("easy", order[classes - easy :]), ("hard", order[:hard])):
        if labels:
            metrics[f"complexity/{grade}"] = float(means[labels].mean())
    return metrics


def _measured(
    data: Any,
    net: nn.Module,
    layer: str,
    saliency: Callable[..., Tensor],
    batch_size: int,
    device: torch.device,
    seed: int,
) -> Tensor:
    """The complexity of every training image, (n,)."""
    net = net.to(device).eval()
    generator = Generator().manual_seed(seed)
    indices: Any = range(len(data.train_labels))
    workers = getattr(data, "num_workers", 0)
    loader = DataLoader(indices, batch_size, num_workers=workers, collate_fn=data.train_images)
    found = []
    for images in track(loader, "images", transient=True):
        images = images.to(device)
        try:
            with torch.no_grad():
                seen = net(images).argmax(1)
            found.append(cam_complexity(saliency(net, layer, images, seen, generator=generator)).cpu())
        except (ValueError, RuntimeError) as error:
            raise HastenError(f"complexity: {error}") from error
    return torch.cat(found)


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with (
        whole_file(folder / "complexity.csv") as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    write_json(folder / "complexity.json", rows)
    _chart(folder / "complexity.png", rows)


def _chart(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    colors = {"hard": "tab:red", "easy": "tab:green", "": "lightgrey"}
    figure = new_figure(6, min(1 + 0.2 * len(rows), 100))
    axes = figure.add_subplot()
    for grade, color in colors.items():
        places = [place for place, row in enumerate(rows) if row["grade"] == grade]
        axes.barh(places, [rows[place]["complexity"] for place in places], color=color, label=grade)
    axes.set_yticks(range(len(rows)), [row["class"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("complexity")
    axes.legend([grade for grade in colors if grade])
    write_png(drawn(figure), path)
