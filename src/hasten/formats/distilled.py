"""What data set distillation leaves behind: a few images, their labels, and what it takes to train on them."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hasten.errors import HastenError
from hasten.formats.files import whole_file, write_json
from hasten.formats.pictures import enlarged, range_within, stretched, tiled, write_png
from hasten.formats.pixels import ZCA, PixelRange, pixels_from_tensors
from hasten.formats.recipes import data_difference

TENSORS = "distilled.safetensors"
"""All of it; the other two files of the folder are for people."""
_OWN = ("images", "label_logits", "hard_labels", "syn_lr")
_SHOWN_CLASSES, _SHOWN_IPC, _CLIP_STD = 100, 20, 2.5


@dataclass(frozen=True, eq=False)
class Distilled:
    """N = K * ipc distilled images, class 0 first, with what a net needs to learn from them.

    Args:
        images: (N, C, H, W) float32 in the range of the model; finite, not clamped.
        label_logits: (N, K); a hard label is 0 at its class and -inf elsewhere.
        hard_labels: the class each image stands for, (N,) int64.
        syn_lr: the step size that was learned along with them, > 0.
        pixels: [0, 1] <-> the range of the model, as it was when they were distilled; never fitted anew.
        about: provenance, for JSON: ``classes`` (names), ``method``, ``config``, ``seed``, ``evaluation`` and the like.

    Raises:
        HastenError: where the tensors are not such a set.

    Example:
        >>> import tempfile
        >>> folder, plain = tempfile.mkdtemp(), PixelRange(torch.tensor(0.5), torch.tensor(0.5))
        >>> Distilled(torch.zeros(4, 1, 8, 8), torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), 0.02, plain).write(folder)
        >>> Distilled.read(folder).ipc
        2
    """

    images: Tensor
    label_logits: Tensor
    hard_labels: Tensor
    syn_lr: float
    pixels: PixelRange | ZCA
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.ndim != 4:
            raise HastenError(f"distilled: images: expected (N, C, H, W), got {tuple(self.images.shape)}")
        if self.label_logits.ndim != 2 or len(self.label_logits) != n:
            raise HastenError(f"distilled: label_logits: expected ({n}, K), got {tuple(self.label_logits.shape)}")
        if self.hard_labels.shape != (n,):
            raise HastenError(f"distilled: hard_labels: expected ({n},), got {tuple(self.hard_labels.shape)}")
        classes = self.num_classes
        if n == 0 or n % classes:
            raise HastenError(
                f"distilled: images: expected as many for each of {classes} classes, got {n} in all; give a whole set"
            )
        if not torch.equal(self.hard_labels.cpu(), torch.arange(classes).repeat_interleave(n // classes)):
            counts = torch.bincount(self.hard_labels.cpu().clamp(min=0), minlength=classes).tolist()
            raise HastenError(
                f"distilled: hard_labels: expected {n // classes} images of each class, class 0 first, got "
                f"{_shortened(counts)} of the {len(counts)} classes; sort images and labels by class"
            )
        if stray := int((~self.images.isfinite()).sum()):
            raise HastenError(
                f"distilled: images: expected finite pixels, got {stray} of {self.images.numel()} that are not"
            )
        if wrong := int((~self.label_logits.softmax(1).isfinite()).any(1).sum()):
            raise HastenError(
                f"distilled: label_logits: expected those of a distribution, got {wrong} rows without one"
            )
        if not 0 < self.syn_lr < float("inf"):
            raise HastenError(f"distilled: syn_lr: expected > 0, got {self.syn_lr}")

    @property
    def num_classes(self) -> int:
        """K."""
        return self.label_logits.shape[1]

    @property
    def ipc(self) -> int:
        """Images per class."""
        return len(self.images) // self.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def has_hard_labels(self) -> bool:
        """Whether every label is its class and nothing else."""
        one_hot = torch.nn.functional.one_hot(self.hard_labels, self.num_classes)
        return torch.equal(self.label_logits.softmax(1), one_hot.to(self.label_logits))

    def is_in_range(self, pixels: PixelRange | ZCA) -> bool:
        """Whether ``pixels`` is the range that its images are in, to the last bit."""
        own, other = self.pixels.to_tensors(), pixels.to_tensors()
        return own.keys() == other.keys() and all(own[key].squeeze().equal(other[key].squeeze()) for key in own)

    def check_made_of(self, data: Mapping[str, Any], *, owner: str) -> None:
        """Refuse to be of other images than ``data``, the ``description()`` of a datamodule, describes.

        Not in which range they are, as they can be brought into its own. A set from elsewhere does not say what it is
        made of.

        Raises:
            HastenError: where it is of others, among which may be those that it is to be tested on.
        """
        here = {key: value for key, value in data.items() if key != "transform"}
        if different := data_difference(here, self.about.get("data") or {}):
            raise HastenError(
                f"{owner}: expected the data and the split that the set was distilled on, they differ in {different}; "
                "set data as it was there, with its sizes of val and test and its split_seed"
            )

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``distilled.safetensors``, ``distilled.json`` and ``grid.png`` into ``folder``, each whole or not.

        The first holds everything, ``about`` too, so that a write which is cut off between two files mixes no two sets.
        """
        folder = Path(folder)
        tensors = {
            "images": self.images.detach().float().cpu().contiguous(),
            "label_logits": self.label_logits.detach().float().cpu().contiguous(),
            "hard_labels": self.hard_labels.cpu().contiguous(),
            "syn_lr": torch.tensor(self.syn_lr, dtype=torch.float64),
            **{name: tensor.contiguous() for name, tensor in self.pixels.to_tensors().items()},
        }
        with whole_file(folder / TENSORS) as unfinished:
            save_file(tensors, unfinished, metadata={"about": json.dumps(self.about)})
        write_json(folder / "distilled.json", self.facts() | self.about)
        write_png(self.grid(), folder / "grid.png")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Self:
        """What ``write`` left in ``folder``.

        Raises:
            HastenError: where that is no whole set.
        """
        path = Path(folder, TENSORS)
        if not path.is_file():
            inside = [name for name in ("best", "final") if Path(folder, name, TENSORS).is_file()]
            remedy = f"choose {Path(folder, inside[0])}" if inside else "ExportDistilled writes one"
            raise HastenError(f"distilled: {str(folder)!r}: expected a folder with {TENSORS}, found none; {remedy}")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
            images, label_logits, hard_labels, syn_lr = (tensors.pop(name) for name in _OWN)
            pixels = pixels_from_tensors(tensors)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise HastenError(
                f"distilled: {str(path)!r} is no whole distilled set ({type(error).__name__}: {error}); write it again"
            ) from error
        return cls(images, label_logits, hard_labels, float(syn_lr), pixels, about)

    def with_about(self, facts: Mapping[str, Any]) -> Self:
        """The same set with more provenance."""
        return replace(self, about=self.about | dict(facts))

    def facts(self) -> dict[str, Any]:
        """What its tensors say about it, for JSON."""
        return {
            "num_classes": self.num_classes,
            "ipc": self.ipc,
            "image_shape": list(self.image_shape),
            "value_space": "zca" if isinstance(self.pixels, ZCA) else "mean and std",
            "labels": "hard" if self.has_hard_labels else "soft",
            "syn_lr": self.syn_lr,
        }

    def grid(self) -> Tensor:
        """A row for each class as a picture, (3, height, width) in [0, 1]; of many classes or images the first ones.

        Pixels within 2.5 standard deviations of the mean fill [0, 1]: distilled ones stray far beyond it.
        """
        images = self.pixels.denormalize(self.images.detach().float().cpu())
        images = stretched(images, *range_within(images, _CLIP_STD))
        rows = images.unflatten(0, (self.num_classes, self.ipc))[:_SHOWN_CLASSES, :_SHOWN_IPC]
        return tiled(enlarged(rows))


def _shortened(counts: list[int]) -> str:
    return ", ".join(map(str, counts[:10])) + (", ..." if len(counts) > 10 else "")
