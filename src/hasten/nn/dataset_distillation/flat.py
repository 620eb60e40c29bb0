"""FlatModel: a network as a function of one flat vector of its parameters."""

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class FlatModel:
    """A stateless network, (P,) and (B, C, H, W) -> (B, K), all of whose parameters are one vector theta.

    The P parameters stand in theta in the order of ``named_parameters()``, a tied one once. The network is a copy of
    ``model`` without memory (on the meta device) and in eval mode. Not an nn.Module, so no optimizer finds it.

    Args:
        model: the network that is copied; its weights are of no account.

    Attributes:
        names: of the parameters.
        shapes: of the parameters.
        numel: P.

    Raises:
        ValueError: for batch norm and for buffers, which theta could not carry from step to step.

    Example:
        >>> flat = FlatModel(nn.Linear(3, 2))
        >>> flat.names, flat.numel
        (('weight', 'bias'), 8)
        >>> flat(torch.zeros(8), torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(self, model: nn.Module) -> None:
        _refuse_state(model)
        named = dict(model.named_parameters())
        self.names: tuple[str, ...] = tuple(named)
        self.shapes: tuple[torch.Size, ...] = tuple(parameter.shape for parameter in named.values())
        self._sizes = [math.prod(shape) for shape in self.shapes]
        self.numel: int = sum(self._sizes)
        self._template = _copy(model, {name: torch.empty_like(p, device="meta") for name, p in named.items()})

    def __call__(self, theta: Tensor, images: Tensor) -> Tensor:
        """The logits of these parameters; differentiable in both, twice."""
        return torch.func.functional_call(self._template, self._parts(theta), (images,))

    def flatten(self, model: nn.Module) -> Tensor:
        """The parameters of a network of this form as one new vector, (P,).

        Raises:
            ValueError: where a name or a shape differs; names the first.
        """
        named = dict(model.named_parameters())
        if (difference := self.first_difference(named, [parameter.shape for parameter in named.values()])) is not None:
            i, here, there = difference
            raise ValueError(f"flatten: parameter {i}: expected {here}, got {there}; build the same network twice")
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def first_difference(self, names: Iterable[str], shapes: Iterable[Sequence[int]]) -> tuple[int, str, str] | None:
        """The place of the first parameter that is another here and there, and which it is here and there."""
        wanted = map(_described, self.names, self.shapes)
        found = map(_described, names, shapes)
        for i, (here, there) in enumerate(zip_longest(wanted, found, fillvalue="none")):
            if here != there:
                return i, here, there
        return None

    def filled(self, theta: Tensor) -> nn.Module:
        """A new network in eval mode with these parameters; it shares no memory with theta."""
        return _copy(self._template, {name: part.detach().clone() for name, part in self._parts(theta).items()})

    def drawn(self, seed: int) -> Tensor:
        """Initial parameters as the layers draw them, (P,), on the CPU; a function of ``seed``.

        Raises:
            ValueError: for a layer with parameters and without ``reset_parameters``.
        """
        self.check_drawable()
        net = _copy(
            self._template, {name: torch.empty(shape) for name, shape in zip(self.names, self.shapes, strict=True)}
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
            for layer in net.modules():
                if callable(reset := getattr(layer, "reset_parameters", None)):
                    reset()
        return self.flatten(net)

    def check_drawable(self) -> None:
        """Refuse a network with a layer that cannot draw its own parameters, as ``drawn`` has to."""
        for name, layer in self._template.named_modules():
            if next(layer.parameters(recurse=False), None) is not None and not hasattr(layer, "reset_parameters"):
                raise ValueError(
                    "FlatModel: expected layers with reset_parameters, which draws them anew, got "
                    f"{type(layer).__name__} at {name!r} without"
                )

    def _parts(self, theta: Tensor) -> dict[str, Tensor]:
        if theta.shape != (self.numel,):
            raise ValueError(
                f"theta: expected one vector of {self.numel} parameters, got {tuple(theta.shape)}; "
                "use a trajectory of this network"
            )
        # one split: its backward is one cat, where a slice each would add P zeros a parameter
        parts = theta.split(self._sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}


def _copy(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """A copy in eval mode that holds other parameters; what is tied stays so, and no weight is copied."""
    replaced = {id(old): nn.Parameter(parameters[name]) for name, old in model.named_parameters()}
    return copy.deepcopy(model, replaced).eval()


def _refuse_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"FlatModel: expected a network without batch norm, got {type(module).__name__} at {name!r}; "
                "use norm=instance"
            )
    for name, _ in model.named_buffers():
        raise ValueError(
            f"FlatModel: expected a network without buffers, got {name!r}; a trajectory has parameters only"
        )


def _described(name: str, shape: Sequence[int]) -> str:
    return f"{name} {tuple(shape)}"
