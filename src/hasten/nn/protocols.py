"""Where modules and callbacks meet: what one side offers and the other asks for. Typing only, nothing runs here."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

LossTerm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images (B, C, H, W), outputs (B, K), targets) -> scalar to be added to the loss."""


class SupportsTimestepSampler(Protocol):
    """A diffusion module that draws its timesteps by ``t, w = self.timestep_sampler(n)``.

    ``t`` is (n,) int64 in [0, T), ``w`` (n,) float32: the module multiplies its per-sample loss by ``w``. Ask for a
    callable attribute: isinstance, from Python 3.12 on, does not see the children of an nn.Module.
    """

    timestep_sampler: Callable[[int], tuple[Tensor, Tensor]]


@runtime_checkable
class HasLossTerms(Protocol):
    """A module that adds every term of ``loss_terms`` to its training loss and logs each as ``train/<name>``."""

    loss_terms: dict[str, LossTerm]


@runtime_checkable
class HasPictures(Protocol):
    """A module that can show where it stands."""

    def pictures(self) -> Mapping[str, Tensor]:
        """Name -> a grid of images, (rows, columns, C, H, W) float in [0, 1]; the same latents at every call."""
        ...


@runtime_checkable
class GeneratesImages(Protocol):
    """A module that draws images."""

    def generate(
        self, n: int, labels: Tensor | None = None, steps: int | None = None, generator: Generator | None = None
    ) -> Tensor:
        """Draw n images in the module's own range, (n, C, H, W), [-1, 1] for pixels; ``labels`` is (n,) int64."""
        ...
