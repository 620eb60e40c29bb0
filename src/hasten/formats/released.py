"""The files of the trajectory-matching authors' programs, read without running anything in them, and written for them.

``replay_buffer_*.pt`` are lists of experts, of epochs, of parameter tensors in the order of ``parameters()``.
``images_<tag>.pt``, ``labels_<tag>.pt`` and ``lr_<tag>.pt`` are a distilled set.
"""

import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from hasten.errors import HastenError
from hasten.formats.distilled import Distilled
from hasten.formats.files import whole_file
from hasten.formats.pixels import ZCA, PixelRange
from hasten.formats.trajectories import Trajectory
from hasten.functional.matching import hard_logits

# ------------------------------------------------------------------ experts


def buffer_paths(source: str | os.PathLike[str]) -> list[Path]:
    """The file ``source``, or the files ``replay_buffer_*.pt`` of that folder in the order of their numbers.

    Example:
        >>> buffer_paths("nowhere")
        []
    """
    source = Path(source)
    if source.is_file():
        return [source]
    return sorted(source.glob("replay_buffer_*.pt"), key=lambda path: _number(path.stem))


def read_buffer(
    path: str | os.PathLike[str], *, names: Sequence[str], shapes: Sequence[Sequence[int]]
) -> Iterator[Tensor]:
    """The experts of a ``replay_buffer_*.pt``, one after the other, each theta (E + 1, P) float32.

    All of them are checked before the first is handed out; the file is mapped, not read as a whole.

    Args:
        path: of the file; no code in it runs.
        names: of the network's parameters, for the errors.
        shapes: of the network's parameters, which every epoch of every expert must have.

    Raises:
        HastenError: for anything else than tensors of these shapes, and for epochs that are all the same.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "replay_buffer_0.pt")
        >>> torch.save([[[torch.zeros(2, 3)], [torch.ones(2, 3)]]], path)
        >>> [theta.shape for theta in read_buffer(path, names=["weight"], shapes=[(2, 3)])]
        [torch.Size([2, 6])]
    """
    path = Path(path)
    experts = _load(path)
    if not (isinstance(experts, list) and experts and all(isinstance(expert, list) and expert for expert in experts)):
        raise HastenError(f"import: {path}: expected a list of experts of lists of epochs, got {_kind(experts)}")
    for number, expert in enumerate(experts):
        for epoch, tensors in enumerate(expert):
            _check_epoch(tensors, names, shapes, where=f"{path}, expert {number}, epoch {epoch}")
        if len(expert) < 2 or all(torch.equal(*pair) for pair in zip(expert[0], expert[-1], strict=True)):
            raise HastenError(
                f"import: {path}, expert {number}: expected epochs that differ, the first of {len(expert)} equals the "
                "last; it was saved without copying, train it again"
            )
    return (
        torch.stack([torch.cat([tensor.float().flatten() for tensor in tensors]) for tensors in expert])
        for expert in experts
    )


def write_buffer(path: str | os.PathLike[str], experts: Sequence[Trajectory]) -> None:
    """Write experts as one ``replay_buffer_*.pt`` for the authors' programs; all of them are in memory meanwhile.

    Example:
        >>> import tempfile
        >>> from hasten.formats.trajectories import write_trajectory
        >>> folder, acc = Path(tempfile.mkdtemp()), [0.1, 0.5]
        >>> about = dict(train_acc=acc, val_acc=acc, names=["bias"], shapes=[[3]], recipe={})
        >>> write_trajectory(folder / "expert_0000.safetensors", torch.eye(2, 3), **about)
        >>> write_buffer(folder / "replay_buffer_0.pt", [Trajectory(folder / "expert_0000.safetensors")])
    """
    content = []
    for expert in experts:
        sizes = [int(torch.Size(shape).numel()) for shape in expert.shapes]
        rows = expert.between(0, expert.epochs)
        # a copy each: of a view, torch.save would write all that it is a view of
        content.append(
            [
                [part.reshape(shape).clone() for part, shape in zip(row.split(sizes), expert.shapes, strict=True)]
                for row in rows
            ]
        )
    with whole_file(path) as unfinished:
        torch.save(content, unfinished)


# ------------------------------------------------------------------ distilled sets


def released_tags(folder: str | os.PathLike[str]) -> list[str]:
    """The tags of the sets ``images_<tag>.pt`` in a folder: "best" first, then the highest iteration.

    Example:
        >>> released_tags("nowhere")
        []
    """
    tags = [path.stem.removeprefix("images_") for path in Path(folder).glob("images_*.pt")]
    tags = [tag for tag in tags if "zca" not in tag]  # the same images again, mapped back to [0, 1]
    return sorted(tags, key=lambda tag: (tag != "best", -_number(tag)))


def read_released(
    folder: str | os.PathLike[str],
    *,
    pixels: PixelRange | ZCA,
    num_classes: int,
    tag: str | None = None,
    about: dict[str, Any] | None = None,
) -> Distilled:
    """The distilled set of ``images_<tag>.pt``, ``labels_<tag>.pt`` and ``lr_<tag>.pt``; no code in them runs.

    Float labels (N, K) are logits and their images stand class by class; integers (N,) are hard labels.

    Args:
        folder: of the three files.
        pixels: the range that the images are in, which the files do not say; a ZCA that is fitted anew is another one.
        num_classes: K.
        tag: None: "best", or else the highest iteration.
        about: provenance that is known.

    Raises:
        HastenError: for anything else than tensors that make a set.

    Example:
        >>> import tempfile
        >>> folder, plain = tempfile.mkdtemp(), PixelRange(torch.tensor(0.5), torch.tensor(0.5))
        >>> made = Distilled(torch.zeros(4, 1, 8, 8), torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), 0.02, plain)
        >>> write_released(folder, made)
        >>> read_released(folder, pixels=plain, num_classes=2).ipc
        2
    """
    folder = Path(folder)
    tags = released_tags(folder)
    if tag is None and not tags:
        raise HastenError(f"import: {str(folder)!r}: expected images_best.pt or images_<iteration>.pt, found none")
    tag = tags[0] if tag is None else tag
    images, labels, lr = (_tensor(folder / f"{name}_{tag}.pt") for name in ("images", "labels", "lr"))
    n = len(images) if images.ndim else 0
    if len(labels.shape) == 0 or len(labels) != n:
        raise HastenError(
            f"import: {folder / f'labels_{tag}.pt'}: expected {n} labels as there are images, got {tuple(labels.shape)}"
        )
    if lr.numel() != 1:
        raise HastenError(f"import: {folder / f'lr_{tag}.pt'}: expected one number, got {tuple(lr.shape)}")
    if labels.is_floating_point():
        if labels.shape != (n, num_classes):
            raise HastenError(
                f"import: {folder / f'labels_{tag}.pt'}: expected logits ({n}, {num_classes}), got "
                f"{tuple(labels.shape)}; set the data they are of"
            )
        if n == 0 or n % num_classes:
            raise HastenError(
                f"import: {folder / f'images_{tag}.pt'}: expected as many images for each of {num_classes} classes, "
                f"got {n} in all; give a whole set"
            )
        classes, logits = torch.arange(num_classes).repeat_interleave(n // num_classes), labels.float()
    else:
        if labels.ndim != 1 or n == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise HastenError(
                f"import: {folder / f'labels_{tag}.pt'}: expected ({n},) classes below {num_classes}, got "
                f"{tuple(labels.shape)}; set the data they are of"
            )
        classes, order = labels.long().sort(stable=True)
        images, logits = images[order], hard_logits(classes, num_classes)
    about = {"imported": f"images_{tag}.pt"} | (about or {})
    return Distilled(images.float(), logits, classes, lr.item(), pixels, about)


def write_released(folder: str | os.PathLike[str], distilled: Distilled, *, tag: str = "best") -> None:
    """Write the three files for the authors' programs and DD-Ranking; hard labels as integers.

    Example:
        >>> import tempfile
        >>> folder, plain = tempfile.mkdtemp(), PixelRange(torch.tensor(0.5), torch.tensor(0.5))
        >>> made = Distilled(torch.zeros(4, 1, 8, 8), torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), 0.02, plain)
        >>> write_released(folder, made, tag="500")
        >>> released_tags(folder)
        ['500']
    """
    contents = {
        "labels": distilled.hard_labels if distilled.has_hard_labels else distilled.label_logits,
        "lr": torch.tensor(distilled.syn_lr),
        "images": distilled.images,  # last: by this one the set is found
    }
    for name, tensor in contents.items():
        with whole_file(Path(folder, f"{name}_{tag}.pt")) as unfinished:
            torch.save(tensor.detach().cpu().clone(), unfinished)


# ------------------------------------------------------------------ files


def _load(path: Path) -> Any:
    """What torch.save wrote, if that is tensors in plain containers; nothing in it is run."""
    if not path.is_file():
        raise HastenError(f"import: expected a file {str(path)!r}, there is none")
    try:
        # mapped where it can be: files of torch before 1.6 are no archives
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class) ([\w.]+)", str(error))
        raise HastenError(
            f"import: {path}: expected tensors in lists, found a pickled object"
            f"{f' ({found[1]})' if found else ''}, which could run code; save tensors alone, where you trust the file"
        ) from error
    except Exception as error:  # half a file fails in any way
        raise HastenError(
            f"import: {path} is no whole file of torch ({type(error).__name__}); copy it again"
        ) from error


def _tensor(path: Path) -> Tensor:
    found = _load(path)
    if isinstance(found, (int, float)):
        return torch.tensor(found)
    if not isinstance(found, Tensor):
        raise HastenError(f"import: {path}: expected one tensor, got {_kind(found)}")
    return found.detach()


def _check_epoch(tensors: Any, names: Sequence[str], shapes: Sequence[Sequence[int]], *, where: str) -> None:
    if not (isinstance(tensors, (list, tuple)) and all(isinstance(tensor, Tensor) for tensor in tensors)):
        raise HastenError(f"import: {where}: expected a list of tensors, got {_kind(tensors)}")
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        found = tuple(tensors[i].shape) if i < len(tensors) else "nothing"
        if found != tuple(shape):
            raise HastenError(
                f"import: {where}, tensor {i} ({name}): expected {tuple(shape)}, got {found}; set the model's width, "
                "depth and classes to the experts'"
            )
    if len(tensors) > len(names):
        raise HastenError(f"import: {where}: expected {len(names)} tensors, got {len(tensors)}; set the model's depth")


def _number(text: str) -> int:
    digits = re.findall(r"\d+", text)
    return int(digits[-1]) if digits else 0


def _kind(found: Any) -> str:
    return f"{type(found).__name__} of {len(found)}" if isinstance(found, (list, tuple, dict)) else type(found).__name__
