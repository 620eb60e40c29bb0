"""Where modules and callbacks meet: what one side offers and the other asks for. Typing only, nothing runs here."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Generator, Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

    from hasten.formats.pixels import ZCA, PixelRange
    from hasten.nn.dataset_distillation.flat import FlatModel
    from hasten.nn.dataset_distillation.synthetic import SyntheticSet
    from hasten.nn.hypernet.inputs import InputEncoding
    from hasten.nn.token_merging import Merging

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


@runtime_checkable
class SupportsTokenMerging(Protocol):
    """A backbone that merges tokens between its blocks, as told and without a trace in its state_dict."""

    depth: int
    """Blocks, so many entries has ``Merging.r``."""
    num_tokens: int
    """Tokens that enter the first block, prefix tokens included."""
    num_prefix_tokens: int
    """Class and register tokens, which are never merged."""
    prefix_indices: tuple[int, ...]
    """Where they stand among the tokens that enter the first block: in front, or in the middle of a Vim."""
    token_source: Tensor | None
    """(B, N', N) 0/1 of the last batch where ``Merging.trace_source``: which of N tokens each of N' is made of."""

    def set_token_merging(self, merging: "Merging | None") -> None:
        """Merge from the next forward on, or None: not at all.

        Raises:
            ValueError: for a metric the backbone does not have, or an r that leaves too few tokens; names the block.
        """
        ...


class GeneratesWeights(Protocol):
    """A module whose parameters, or some of them, depend on named inputs; a hypernetwork.

    Ask for callable ``delta`` and ``generate``: isinstance, from Python 3.12 on, does not see the children of an
    nn.Module.
    """

    encoding: "InputEncoding"
    """Its ``inputs`` say what may be asked for: name -> Range or Choice."""
    hyper: nn.Module
    """The network that generates."""

    def delta(self, **inputs: Any) -> dict[str, Tensor]:
        """What is added to the parameters, by name, for one value of each input."""
        ...

    def generate(self, **inputs: Any) -> dict[str, Tensor]:
        """The parameters themselves, likewise."""
        ...


@runtime_checkable
class KeepsFiles(Protocol):
    """A logger that keeps files of a run beside its numbers."""

    def log_files(self, kind: str, files: "Mapping[str, Path]") -> None:
        """Keep name -> file or folder, as they are now, together as the ``kind`` of the run."""
        ...


class HasRealImages(Protocol):
    """A datamodule that hands out its training images, whole and as they are.

    Ask for a callable ``train_images``: isinstance, before Python 3.12, reads the properties, and so the data.
    """

    num_classes: int
    """K; labels are 0 to K - 1."""
    image_shape: tuple[int, int, int]
    """(C, H, W)."""

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels."""
        ...

    @property
    def pixels(self) -> "PixelRange | ZCA":
        """[0, 1] <-> the range of the model."""
        ...

    @property
    def train_labels(self) -> Tensor:
        """Of the training images, (n,) int64; no image is read for it."""
        ...

    def train_images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Training images without augmentation in the range of the model, (B,) -> (B, C, H, W)."""
        ...

    def normalize(self, images: Tensor) -> Tensor:
        """From [0, 1] to the range of the model, (..., C, H, W)."""
        ...

    def denormalize(self, images: Tensor) -> Tensor:
        """From the range of the model to [0, 1], (..., C, H, W)."""
        ...


class HasSynthetic(Protocol):
    """A module that distils a data set.

    Ask whether ``synthetic`` is a ``SyntheticSet``: isinstance, from Python 3.12 on, does not see the children of an
    nn.Module.
    """

    synthetic: "SyntheticSet"


@runtime_checkable
class ExplainsSkips(Protocol):
    """A module that leaves out updates it does not trust: it steps its optimizer with every gradient None."""

    def skip_report(self, losses: Sequence[float]) -> str:
        """Where it stands after updates of these losses were left out in a row, and which number to change."""
        ...


@runtime_checkable
class TrainsExperts(Protocol):
    """A module that trains networks of one form, one after the other, in a single fit.

    A callback's ``setup`` comes before the module's, and may say there which of the experts are left to train.
    """

    experts: int
    """How many there are to be, numbered from 0."""
    epochs: int
    """For how long each is trained."""
    expert: int
    """The number of the one in training, from the module's ``on_train_epoch_start`` on."""
    epoch: int
    """How many epochs that one has behind it, likewise."""
    form: "FlatModel"
    """The names and shapes of an expert's parameters."""

    def recipe(self) -> dict[str, Any]:
        """What decides, with its number, what an expert is, for JSON; needs the trainer and its datamodule."""
        ...

    def train_only(self, experts: Sequence[int], *, epochs: int) -> None:
        """Train only these, each for so many epochs, in the fit that is being set up; none of them ends it at once."""
        ...

    def theta(self) -> Tensor:
        """A copy of the parameters of the expert in training, (P,), on the CPU."""
        ...

    def load_theta(self, theta: Tensor) -> None:
        """Put the network where an expert was, (P,)."""
        ...
