"""Measures a distilled set on as many architectures as asked for, beside random real images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rich
from rich.markdown import Markdown

from hasten.errors import HastenError
from hasten.formats.distilled import Distilled
from hasten.formats.trajectories import Trajectory, check_seen, open_trajectories
from hasten.nn.dataset_distillation.comparison import (
    BASELINES,
    IMPORTED,
    FewImages,
    Jury,
    Recipe,
    check_protocol,
    described,
    labelling_student,
    split_batches,
    table_of,
)
from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.dataset_distillation.peers import named_nets
from hasten.nn.dataset_distillation.table import Table
from hasten.tasks._device import device_of

_USUAL: dict[str, Any] = {"epochs": 1000, "whole_epochs": None, "lr": "learned", "seed": 0, "augment": {}}
"""The protocol for a set that does not say how it was evaluated."""


def evaluate_distilled(
    folder: Path,
    *,
    distilled: str | Path,
    data: Any,
    nets: Sequence[str] = ("convnet",),
    seeds: int = 5,
    epochs: int | None = None,
    whole_epochs: int | None = None,
    lr: float | str | None = None,
    convnet: Mapping[str, Any] | None = None,
    augment: DSA | None = None,
    baselines: Sequence[str] = ("random",),
    experts: str | Path | None = None,
    accelerator: str = "cpu",
    seed: int | None = None,
) -> dict[str, float]:
    """Train fresh nets on a distilled set and on random real images, and measure them on the test split.

    What is None is as it was when the set was distilled, so that its number is found again. Writes ``table.md``,
    ``table.csv`` and ``evaluation.json``, and prints the first.

    Args:
        folder: of the run.
        distilled: the folder of the set, what ``ExportDistilled`` wrote.
        data: the real images in the range of the set: ``DistilledSet(distilled, test=DATAMODULE)``.
        nets: names as in ``hasten.nn.dataset_distillation.peers``; the first is the one the set was distilled with.
        seeds: nets a row, >= 1.
        epochs: passes over the set, >= 1.
        whole_epochs: passes over the whole training set, where that is one of the baselines.
        lr: "learned", the set's own step size; "holdout"; or a number. Of the first net: others ask the holdout.
        convnet: ``width``, ``depth`` and the like of ConvNet.
        augment: of every batch.
        baselines: of random, random_soft and whole.
        experts: the folder of the trajectories that label the images of random_soft.
        accelerator: "cpu", or anything else for the accelerator of this machine.
        seed: of all that is drawn.

    Returns:
        ``eval/<net>/acc`` and ``eval/<net>/std``; of the first net ``eval/random/acc``, ``eval/random_soft/acc``,
        ``eval/whole/acc``, ``eval/hlr``, ``eval/ior``, ``eval/lrs`` and ``eval/ars``, as far as the baselines allow.

    Raises:
        HastenError: for a set, data or nets that do not fit together.

    Example:
        >>> from functools import partial
        >>> evaluate = partial(evaluate_distilled, distilled="runs/x/distilled/best", nets=["convnet", "resnet18"])
    """
    few = Distilled.read(distilled)
    recorded: dict[str, Any] = (few.about.get("evaluation") or {}).get("protocol") or {}
    given = {"epochs": epochs, "whole_epochs": whole_epochs, "lr": lr, "seed": seed}
    protocol = _USUAL | recorded | {name: value for name, value in given.items() if value is not None}
    augment = _augment(protocol["augment"]) if augment is None else augment
    data.prepare_data()
    data.setup("test")
    if not few.is_in_range(data.pixels):
        raise HastenError(
            f"evaluate_distilled: data: expected images in the range of {distilled}, got {type(data).__name__}; put "
            "hasten.datamodules.DistilledSet around it"
        )
    about_data = described(data)
    few.check_made_of(about_data, owner="evaluate_distilled")
    try:
        check_protocol(protocol["lr"], baselines)
        made = named_nets(
            nets,
            few.image_shape[0],
            few.image_shape[1],
            few.num_classes,
            convnet=_recorded_convnet(few) if convnet is None else convnet,
        )
        of_whole = protocol["whole_epochs"] or protocol["epochs"]
        recipe = Recipe(protocol["epochs"], of_whole, augment, protocol["seed"], data=data)
        if "random_soft" in baselines:
            found = open_trajectories(experts) if experts else ()
            check_seen(found, few.about.get("data") or about_data, owner="evaluate_distilled")
            student = labelling_student(made[nets[0]], found)
            recipe = replace(recipe, experts=found, student=student)
        table = table_of(
            {"distilled": FewImages(few.images, few.label_logits, few.hard_labels, few.syn_lr)},
            Jury(made, seeds=seeds, seed=protocol["seed"], device=device_of(accelerator)),
            recipe,
            split_batches(data, "val"),
            split_batches(data, "test"),
            baselines=baselines,
            lr=protocol["lr"],
            unaugmented=augment is not None and "random_soft" in baselines,
            say=rich.print,
        )
    except ValueError as error:
        raise HastenError(f"evaluate_distilled: {error}") from error
    table = replace(table, notes=(*table.notes, *_doubts(few, recipe.experts)))
    rich.print(Markdown(table.markdown()))
    table.write(folder, distilled=str(distilled))
    return _metrics(table, list(made))


def _augment(augment: Mapping[str, Any] | None) -> DSA | None:
    return None if augment is None else DSA(**augment)


def _doubts(few: Distilled, experts: Sequence[Trajectory]) -> list[str]:
    """What a reader must know of images that the set, or the experts, may have seen."""
    doubts = []
    if not few.about.get("data"):
        doubts.append("the set does not say of which images it is made, the test split may be among them")
    if (few.about.get("experts") or {}).get("imported") or any(expert.is_imported for expert in experts):
        doubts.append(IMPORTED)
    return doubts


def _recorded_convnet(few: Distilled) -> dict[str, Any] | None:
    """Width, depth and the like of the net that the set was distilled with, if its config says so."""
    model = (few.about.get("config") or {}).get("model") or {}
    if not str(model.get("_target_", "")).endswith(".ConvNet"):
        return None
    return {key: model[key] for key in ("width", "depth", "pad_to") if key in model}


def _metrics(table: Table, nets: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for net in nets:
        row = table.row("distilled", net)
        if row is not None:
            found[f"eval/{net}/acc"] = row.mean
            found |= {} if row.std is None else {f"eval/{net}/std": row.std}
    first = table.metrics(nets[0])
    found |= {f"eval/{arm}/acc": first[arm] for arm in BASELINES if arm in first}
    return found | {f"eval/{name}": value for name, value in table.scores.items()}
