"""SampleDistance: how far drawn images are from real ones, in the features of a network that the number names."""

import copy
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from hasten.callbacks._sampling import draw, publish, sampling, unit_range
from hasten.errors import HastenError
from hasten.nn.protocols import GeneratesImages
from hasten.nn.weights import check_fit, read_weights, weight_hash


class SampleDistance(Callback):
    """Report the Frechet and the kernel distance between drawn and real images, in the features of a named net.

    Logs ``val/fd_<name>`` and ``val/kid_<name>`` at the end of the fit, and prints them with all that they depend on:
    net, hash of its weights, number of samples, solver, steps, reference. They compare only where all of that is
    equal, and never with a published FID, which is the Frechet distance in one particular Inception net. Under EMA
    the averaged weights draw.

    Args:
        feature_net: maps images (n, 3, H, W) in [0, 1] to features (n, D); used as it is, in evaluation mode.
            Grey images are repeated to three channels. ``feature_net()`` below makes one from a trained classifier.
        name: of the net, as in ``val/fd_cifar10_resnet18``.
        n: images drawn, >= 2. A distance falls with n: compare at equal n only.
        split: whose images of the datamodule are the reference, all of them.
        reference: batches of real images in the module's range instead, or tuples that begin with such.
        steps: sampling steps; None: the module's own number.
        every_n_validations: report after every so many validations as well; None: at the end alone.
        batch_size: images drawn at once, >= 1.
        seed: of the images drawn.

    Raises:
        ValueError: for a number out of its range.
        HastenError: at set-up, where the module has no ``generate()``, or nothing says what the reference is.

    Source: the Frechet distance of features, arXiv:1706.08500; the kernel distance, arXiv:1801.01401.

    Example:
        >>> from lightning import Trainer
        >>> distance = SampleDistance(nn.Flatten(), name="pixels", n=256)
        >>> trainer = Trainer(callbacks=[distance], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        feature_net: nn.Module,
        *,
        name: str,
        n: int = 1024,
        split: Literal["train", "val", "test"] = "val",
        reference: Iterable[Any] | None = None,
        steps: int | None = None,
        every_n_validations: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        if n < 2:
            raise ValueError(f"sample_distance: n: expected >= 2, got {n}; 1024 is little, 50000 is usual in papers")
        if batch_size < 1:
            raise ValueError(f"sample_distance: batch_size: expected >= 1, got {batch_size}")
        if split not in ("train", "val", "test"):
            raise ValueError(f"sample_distance: split: expected train, val or test, got {split!r}")
        if every_n_validations is not None and every_n_validations < 1:
            raise ValueError(f"sample_distance: every_n_validations: expected >= 1 or None, got {every_n_validations}")
        self.feature_net = feature_net
        self.name = name
        self.n = n
        self.split = split
        self.reference = reference
        self.steps = steps
        self.every_n_validations = every_n_validations
        self.batch_size = batch_size
        self.seed = seed
        self._validations = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, GeneratesImages):
            raise HastenError(
                f"sample_distance: {type(pl_module).__name__}: expected a method generate(n, ...) that draws images, "
                "got none; add it or leave SampleDistance out"
            )
        if self.reference is None and trainer.datamodule is None:  # type: ignore[attr-defined]
            raise HastenError(
                "sample_distance: reference: expected a datamodule or reference=LOADER of real images, got neither"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.every_n_validations is None:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            self._report(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not on_fit_end: by then Lightning has moved the module to the CPU
        self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = copy.deepcopy(self.feature_net).cpu().eval().requires_grad_(False)
        to_unit = unit_range(trainer)
        # each process draws its share; torchmetrics joins what they saw
        share = -(-self.n // trainer.world_size)
        seed = self.seed + trainer.global_rank
        with sampling(trainer, pl_module):
            batches = draw(pl_module, share, steps=self.steps, batch_size=self.batch_size, seed=seed)
            fake = [_three_channels(to_unit(images)) for images in batches]
            real = [_three_channels(to_unit(images)) for images in self._real(trainer)]
            with torch.autocast(pl_module.device.type, enabled=False):  # features in full precision
                frechet, kernel = _distances(net, real, fake, pl_module.device)
        counts = torch.tensor([sum(map(len, real)), sum(map(len, fake))], device=pl_module.device)
        n_real, n_fake = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        publish(trainer, {f"val/fd_{self.name}": frechet, f"val/kid_{self.name}": kernel})
        solver = getattr(pl_module, "solver", type(pl_module).__name__)
        steps = self.steps or getattr(pl_module, "sample_steps", "its own")
        reference = self.split if self.reference is None else "given"
        pl_module.print(
            f"val/fd_{self.name} {frechet:.4g}   val/kid_{self.name} {kernel:.4g}   (net {self.name} "
            f"{weight_hash(net)}, {n_fake} samples, {solver}, {steps} steps, reference {reference}: {n_real} images)"
        )

    def _real(self, trainer: Trainer) -> Iterator[Tensor]:
        loader = self.reference
        if loader is None:
            loader = getattr(trainer.datamodule, f"{self.split}_dataloader")()  # type: ignore[attr-defined]
        for batch in loader:
            yield batch[0] if isinstance(batch, (tuple, list)) else batch


def feature_net(
    model: nn.Module,
    checkpoint: str | Path,
    *,
    head: str | None = None,
    channels: int = 3,
    mean: float = 0.5,
    std: float = 0.5,
) -> nn.Module:
    """A trained classifier as a net for ``SampleDistance``: images (n, 3, H, W) in [0, 1] -> features (n, D).

    Args:
        model: the classifier, to be filled with the weights.
        checkpoint: written by ``hasten.modules.Classification`` (of a run with EMA, the average is taken), or a
            safetensors file of the model's own state_dict.
        head: dotted name of the last layer, left out so that its input are the features; None: the model's output.
        channels: 3, or 1 for a classifier of grey images.
        mean: of the normalisation (image - mean) / std the classifier was trained with.
        std: likewise; the defaults are those of hasten's datamodules.

    Raises:
        HastenError: where there is no such file, or it does not fit the model.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> path, model = tempfile.mkdtemp() + "/net.safetensors", nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> save_file(model.state_dict(), path)
        >>> feature_net(model, path, head="1", channels=1)(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 64])
    """
    _load(model, Path(checkpoint))
    if head is not None:
        parent, _, child = head.rpartition(".")
        try:
            model.get_submodule(head)
        except AttributeError:
            names = ", ".join(name for name, _ in model.named_children())
            raise HastenError(f"feature_net: head: expected a layer, got {head!r}; the model has {names}") from None
        setattr(model.get_submodule(parent), child, nn.Identity())
    return _FeatureNet(model, channels, mean, std)


class _FeatureNet(nn.Module):
    def __init__(self, model: nn.Module, channels: int, mean: float, std: float) -> None:
        super().__init__()
        self.model = model
        self.channels = channels
        self.mean = mean
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        if self.channels == 1:
            images = images.mean(1, keepdim=True)
        return self.model((images - self.mean) / self.std)


def _load(model: nn.Module, path: Path) -> None:
    try:
        # of a run with EMA the average stands there; what it is an average of is kept elsewhere
        state, _ = read_weights(path, model.state_dict(), owner="feature_net", kinds=("state_dict",))
        check_fit(state, model.state_dict(), owner="feature_net", path=path)
    except ValueError as error:
        raise HastenError(str(error)) from error
    model.load_state_dict(state)


def _three_channels(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def _distances(net: nn.Module, real: list[Tensor], fake: list[Tensor], device: torch.device) -> tuple[float, float]:
    """Frechet and kernel distance of two sets of images (n, 3, H, W) in [0, 1]."""
    # in a Sequential, or torchmetrics believes the `num_features` of a timm model, which may not be what it returns
    feature = nn.Sequential(net, nn.Flatten())
    _, channels, height, width = real[0].shape
    frechet = FrechetInceptionDistance(feature, normalize=True, input_img_size=(channels, height, width))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
        smaller = min(sum(map(len, real)), sum(map(len, fake)))
        kernel = KernelInceptionDistance(feature, subset_size=min(1000, smaller), normalize=True)
    for metric in (frechet.to(device), kernel.to(device)):
        for images in real:
            metric.update(images.to(device), real=True)
        for images in fake:
            metric.update(images.to(device), real=False)
    return frechet.compute().item(), kernel.compute()[0].item()
