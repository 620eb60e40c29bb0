"""The control of a hypernetwork: a plain network for each of a few values of its input, called in the same way."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from hasten.nn.hypernet.heads import Basis
from hasten.nn.hypernet.inputs import Range
from hasten.nn.hypernet.model import Inputs, hypernetize


class SeparateModels(nn.Module):
    """N copies of a model, one for each of n values of an input, evenly over its range: the sweep as one module.

    A call runs the copy whose value is nearest, and draws are these values, each as often: with n times the steps every
    copy is trained as long as a hypernetwork. One value a batch.

    Attributes:
        models: the copies, by value.
        values: (n,).
        encoding: its ``inputs`` say what is called for, as a HyperModel's.

    Args:
        model: any module; it is copied and stays as it is.
        inputs: the name of the input -> a Range or (low, high) of one number.
        n: copies, >= 2.
        base_init: "keep", all begin alike; or "kaiming", each drawn anew; see :func:`hypernetize`.
        model_inputs: inputs that the model takes as well, under the same name.

    Raises:
        ValueError: for several inputs, a Choice, several dimensions, or too few copies.

    Example:
        >>> nets = SeparateModels(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), {"angle": (0, 180)}, n=3)
        >>> nets(torch.randn(4, 2), angle=80.0).shape, nets.values
        (torch.Size([4, 1]), tensor([  0.,  90., 180.]))
    """

    values: Tensor

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        n: int = 5,
        base_init: str = "keep",
        model_inputs: Sequence[str] = (),
    ):
        super().__init__()
        if n < 2:
            raise ValueError(f"separate_models: n: expected at least 2, got {n}")
        # a hypernetwork of its own, thrown away: what is wrong is named, and theta0 drawn, as for the one compared with
        made = [
            hypernetize(
                copy.deepcopy(model), inputs, base_init=base_init, model_inputs=model_inputs, hidden=(1,), head=Basis(1)
            )
            for _ in range(n)
        ]
        self.encoding = made[0].encoding
        self.name, given = next(iter(self.encoding.inputs.items()))
        if len(self.encoding.inputs) > 1 or not isinstance(given, Range) or given.shape:
            raise ValueError(
                f"separate_models: inputs: expected a single range of one number, got {self.encoding.inputs}"
            )
        self.range = given
        self.models = nn.ModuleList(each.model for each in made)
        self.model_inputs = tuple(model_inputs)
        values = replace(given, sampler=lambda shape, _: torch.linspace(0, 1, n)).sample(n)
        self.register_buffer("values", values, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network of the nearest value; a value on a GPU has to be waited for."""
        if self.name not in kwargs:
            raise TypeError(f"separate_models: inputs: expected {self.name}, got {', '.join(kwargs) or 'none'}")
        value = kwargs.pop(self.name)
        place = self.range.normalized(self.range.read(self.name, value, "clamp", self.values))
        if place.ndim:
            raise ValueError(
                f"separate_models: {self.name}: expected one value for the batch, got {tuple(place.shape)}; "
                "use draw='batch'"
            )
        if self.model_inputs:
            kwargs[self.name] = value
        return self.models[round(place.item() * (len(self.models) - 1))](*args, **kwargs)

    def sample_inputs(self, n: int | None = None, *, generator: Generator | None = None) -> dict[str, Tensor]:
        """Draw one of the values, (), or n of them, (n,); on this module's device."""
        device = None if generator is None else generator.device
        index = torch.randint(len(self.values), () if n is None else (n,), generator=generator, device=device)
        return {self.name: self.values[index.to(self.values.device)]}
