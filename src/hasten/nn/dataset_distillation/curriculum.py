"""PAD's selection of what an expert sees: easy images first, the easiest ones left out later; and what is easy."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hasten.functional.matching import hard_logits, soft_cross_entropy
from hasten.nn.dataset_distillation.flat import FlatModel
from hasten.nn.protocols import HasRealImages


class EasyToHard:
    """Which training images an expert sees in an epoch, of each class the same share: (epoch, labels (n,)) -> (m,).

    The easiest ``initial`` of each class at first, more by and by until in epoch ``full_at`` all are seen, and after
    the epochs of ``removals`` no longer the easiest ones.

    Args:
        scores: difficulty of every training image, (n,); or the file that the task ``difficulty`` wrote.
        initial: share of each class in epoch 0, in (0, 1].
        full_at: the epoch from which all images are seen, >= 1.
        removals: (epoch, share) with growing epochs >= ``full_at``: after that epoch the easiest share, in [0, 1), of
            each class is left out.

    Raises:
        ValueError: for values outside these ranges, a file that cannot be read, and where the labels are not those of
            the images that were scored.

    Source: PAD, arXiv:2408.03360, filtering information extraction; epochs and shares are those of 100 epochs.

    Example:
        >>> seen = EasyToHard(torch.tensor([0.1, 0.4, 0.3, 0.2]), initial=0.5)
        >>> seen(0, torch.zeros(4, dtype=torch.int64)).tolist()
        [0, 3]
    """

    def __init__(
        self,
        scores: Tensor | str | Path,
        *,
        initial: float = 0.75,
        full_at: int = 20,
        removals: Sequence[tuple[int, float]] = ((40, 0.1), (60, 0.2)),
    ) -> None:
        self.scores, self._labels = (scores, None) if isinstance(scores, Tensor) else _read(Path(scores))
        if self.scores.ndim != 1 or not self.scores.isfinite().all():
            raise ValueError(f"curriculum: scores: expected finite numbers (n,), got {tuple(self.scores.shape)}")
        if not 0 < initial <= 1:
            raise ValueError(f"curriculum: initial: expected a share in (0, 1], got {initial}")
        if full_at < 1:
            raise ValueError(f"curriculum: full_at: expected >= 1, got {full_at}")
        self.removals = [(int(epoch), float(share)) for epoch, share in removals]
        epochs = [full_at, *(epoch for epoch, _ in self.removals)]
        if any(later < earlier for earlier, later in pairwise(epochs)):
            raise ValueError(f"curriculum: removals: expected growing epochs from {full_at} on, got {epochs[1:]}")
        if not all(0 <= share < 1 for _, share in self.removals):
            raise ValueError(f"curriculum: removals: expected shares in [0, 1), got {self.removals}")
        self.initial = initial
        self.full_at = full_at

    def __call__(self, epoch: int, labels: Tensor) -> Tensor:
        """Indices of the images seen in ``epoch``, which counts from 0; in the order of the data, (m,)."""
        if len(labels) != len(self.scores) or (self._labels is not None and not torch.equal(labels, self._labels)):
            raise ValueError(
                f"curriculum: expected the {len(self.scores)} training images that were scored, got {len(labels)} or "
                "others; score these"
            )
        first, last = self._shares(epoch)
        kept = []
        for label in labels.unique():
            members = (labels == label).nonzero().flatten()
            easy_first = members[self.scores[members].argsort(stable=True)]
            # at least one: of a class of two images, three quarters and a tenth are whole numbers too
            stop = max(1, int(last * len(members)))
            kept.append(easy_first[min(int(first * len(members)), stop - 1) : stop])
        return torch.cat(kept).sort().values

    def __repr__(self) -> str:
        scored = hashlib.sha256(self.scores.numpy().tobytes()).hexdigest()[:12]
        return f"EasyToHard({scored}, initial={self.initial}, full_at={self.full_at}, removals={self.removals})"

    def _shares(self, epoch: int) -> tuple[float, float]:
        """Where in a class, from the easiest at 0 to the hardest at 1, the images of an epoch begin and end."""
        left_out = [share for after, share in self.removals if epoch > after]
        return (left_out[-1] if left_out else 0.0), min(1.0, self.initial + (1 - self.initial) * epoch / self.full_at)


def grand(
    model: FlatModel,
    thetas: Iterable[Tensor],
    data: HasRealImages,
    *,
    batch_size: int = 64,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """GraNd, how far each training image alone would move a network: mean norm of its gradient over networks, (n,).

    Args:
        model: what ``thetas`` are weights of.
        thetas: of each network its parameters (P,), best after a few epochs of training; the images go to their device.
        data: the real images and labels.
        batch_size: images at once, each with a gradient of P numbers.
        progress: called after every batch.

    Raises:
        ValueError: where there is no network.

    Source: Deep Learning on a Data Diet, arXiv:2107.07075.

    Example:
        >>> from types import SimpleNamespace
        >>> images, labels = torch.randn(4, 1, 8, 8), torch.arange(4) % 2
        >>> data = SimpleNamespace(train_images=images.__getitem__, train_labels=labels, num_classes=2)
        >>> model = FlatModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)))
        >>> grand(model, [model.drawn(seed=0)], data).shape
        torch.Size([4])
    """

    def loss(theta: Tensor, image: Tensor, target_logits: Tensor) -> Tensor:
        return soft_cross_entropy(model(theta, image[None]), target_logits[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    labels = data.train_labels
    total, networks = torch.zeros(len(labels)), 0
    for theta in thetas:
        networks += 1
        for indices in torch.arange(len(labels)).split(batch_size):
            images = data.train_images(indices).to(theta.device)
            targets = hard_logits(labels[indices], data.num_classes).to(theta.device)
            total[indices] += gradients(theta, images, targets).norm(dim=1).cpu()
            if progress is not None:
                progress()
    if networks == 0:
        raise ValueError("grand: thetas: expected at least one network, got none; train experts first")
    return total / networks


def _read(path: Path) -> tuple[Tensor, Tensor]:
    try:
        found = load_file(path)
        return found["scores"], found["labels"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"curriculum: scores: expected what the task difficulty wrote, got {str(path)!r} ({error})"
        ) from error
