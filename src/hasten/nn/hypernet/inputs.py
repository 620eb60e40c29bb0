"""What a hypernetwork is told: ranges and choices, how they are drawn, and their encoding of constant norm.

A value is one for the whole batch, () or (D,), or one per sample, (B,) or (B, D).
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import embedding, normalize

from hasten.errors import did_you_mean
from hasten.functional import complement_encoding, magnitude_invariant_encoding

Sampler = Callable[[tuple[int, ...], Generator | None], Tensor]
"""(shape, generator) -> where between low and high, in [0, 1]."""


@dataclass(frozen=True)
class Range:
    """Numbers between ``low`` and ``high``, and how training draws them.

    Args:
        low: what the encoding calls 0.
        high: what it calls 1.
        log: spread by the logarithm, for ranges over decades; ``low`` must be positive.
        dim: D, so many numbers with the same bounds; a value of one number has shape () or (B,), else (D,) or (B, D).
        sampler: "uniform"; "endpoint", one of the bounds with probability ``endpoint_p`` and else uniform; or
            (shape, generator) -> where between low and high, in [0, 1].
        endpoint_p: read by "endpoint".

    Raises:
        ValueError: for bounds that are no range.

    Source: endpoint sampling as in HyperMorph, arXiv:2101.01035.

    Example:
        >>> Range(1e-4, 1.0, log=True).normalized(torch.tensor([1e-4, 1e-2, 1.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    low: float
    high: float
    _: KW_ONLY
    log: bool = False
    dim: int = 1
    sampler: str | Sampler = "uniform"
    endpoint_p: float = 0.4

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"range: expected finite low < high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"range: low: expected a positive number for log=True, got {self.low}")
        if self.dim < 1:
            raise ValueError(f"range: dim: expected at least 1, got {self.dim}")
        if not callable(self.sampler) and self.sampler not in ("uniform", "endpoint"):
            raise ValueError(f"range: sampler: expected uniform, endpoint or a callable, got {self.sampler!r}")
        if not 0 <= self.endpoint_p <= 1:
            raise ValueError(f"range: endpoint_p: expected a probability, got {self.endpoint_p}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one value: () or (D,)."""
        return () if self.dim == 1 else (self.dim,)

    def sample(self, n: int | None = None, generator: Generator | None = None) -> Tensor:
        """Draw one value, () or (D,), or n of them, (n,) or (n, D), on the generator's device."""
        shape = self.shape if n is None else (n, *self.shape)
        if callable(self.sampler):
            z = self.sampler(shape, generator)
        else:
            device = None if generator is None else generator.device
            z = torch.rand(shape, generator=generator, device=device)
            if self.sampler == "endpoint":
                at_an_end = torch.rand(shape, generator=generator, device=device) < self.endpoint_p
                z = torch.where(at_an_end, z.round(), z)
        values = self.low * (self.high / self.low) ** z if self.log else self.low + (self.high - self.low) * z
        return values.clamp(self.low, self.high)  # rounding may overshoot

    def normalized(self, values: Tensor) -> Tensor:
        """Where values lie between low, 0, and high, 1: any shape -> same shape."""
        if self.log:
            return (values / self.low).log() / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def read(self, name: str, value: Any, out_of_range: str, like: Tensor) -> Tensor:
        """A number, a list or a tensor as floats at least as wide as ``like``, where ``like`` is.

        Args:
            name: as errors call it.
            value: numbers and lists must be in the range, as far as float32 knows it.
            out_of_range: what a tensor may be; "error" waits for the device.
            like: any tensor.
        """
        if isinstance(value, Real):
            if not self._is_inside(value):
                raise ValueError(f"hypernet: {name}: expected {self.low} to {self.high}, got {value}")
            # at least float32 up to E: bfloat16 has no 999, and float16 nothing above 65504
            wide = torch.promote_types(like.dtype, torch.float32)
            inside = min(max(float(value), self.low), self.high)
            return torch.full((), inside, dtype=wide, device=like.device)
        if not isinstance(value, Tensor):
            try:
                value, out_of_range = torch.as_tensor(value, dtype=torch.float64), "error"
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"hypernet: {name}: expected a number, a list or a tensor, got {value!r}") from error
        if out_of_range == "error":
            if (outside := value[~self._is_inside(value)]).numel():
                raise ValueError(f"hypernet: {name}: expected {self.low} to {self.high}, got {outside[0].item():g}")
            out_of_range = "clamp"
        value = value.to(like.device, torch.promote_types(value.dtype, like.dtype))
        return value.clamp(self.low, self.high) if out_of_range == "clamp" else value

    def _is_inside(self, value: Any) -> Any:
        """Whether numbers are in the range, or beyond it by no more than its ends change as float32."""
        slack = max(abs(self.low), abs(self.high)) * torch.finfo(torch.float32).eps
        return (value >= self.low - slack) & (value <= self.high + slack)


@dataclass(frozen=True)
class Choice:
    """One of a few values, each encoded as a frozen row of norm 1.

    A call names a value, lists one per sample, or gives positions in ``values`` as an integer tensor.

    Args:
        values: at least one, each once.
        dim: length of the rows, which are then random directions, the same in every process; None: one-hot.

    Raises:
        ValueError: for no values, one that stands there twice, or a ``dim`` in which two would have one row.

    Example:
        >>> Choice(["cat", "dog"]).rows().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    values: Sequence[Hashable]
    _: KW_ONLY
    dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values or len(set(self.values)) < len(self.values):
            raise ValueError(f"choice: values: expected at least one and each once, got {list(self.values)}")
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"choice: dim: expected at least 1 or None, got {self.dim}")
        if self.dim is not None and len(self.rows().unique(dim=0)) < len(self.values):
            raise ValueError(f"choice: dim: expected enough for {len(self.values)} different rows, got {self.dim}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one value: ()."""
        return ()

    def rows(self) -> Tensor:
        """The code of each value, (number of values, dim) float64."""
        if self.dim is None:
            return torch.eye(len(self.values), dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        return normalize(torch.randn(len(self.values), self.dim, generator=generator, dtype=torch.float64), dim=-1)

    def sample(self, n: int | None = None, generator: Generator | None = None) -> Tensor:
        """Draw one position in ``values``, (), or n, (n,), on the generator's device."""
        device = None if generator is None else generator.device
        return torch.randint(len(self.values), () if n is None else (n,), generator=generator, device=device)

    def read(self, name: str, value: Any, out_of_range: str, like: Tensor) -> Tensor:
        """A value, a list of values or a tensor of positions as positions, () or (B,).

        Positions out of range are refused where looking costs nothing, on the CPU; elsewhere ``out_of_range`` decides.
        """
        if not isinstance(value, Tensor):
            listed = isinstance(value, (list, tuple)) and value not in self.values
            positions = [self._position(name, each) for each in value] if listed else self._position(name, value)
            return torch.tensor(positions, device=like.device)
        if value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"hypernet: {name}: expected positions in the choice's values, got {value.dtype}")
        last = len(self.values) - 1
        looks = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if (looks or out_of_range == "error") and bool(((value < 0) | (value > last)).any()):
            raise ValueError(
                f"hypernet: {name}: expected positions 0 to {last}, got {value.min()} to {value.max()}; a value itself "
                "is given as a number or word, not as a tensor"
            )
        return (value.clamp(0, last) if out_of_range == "clamp" else value).to(like.device)

    def _position(self, name: str, value: Any) -> int:
        if value not in self.values:
            nearest = did_you_mean(str(value), map(str, self.values))
            raise ValueError(f"hypernet: {name}: expected one of {len(self.values)} values, got {value!r}{nearest}")
        return self.values.index(value)


class InputEncoding(nn.Module):
    """From a value of each input to the vector E that a hypernetwork sees: (e,), or (B, e) where one is per sample.

    All cosines, then all sines, dimensions in the order of the inputs, then the rows of the choices. A choice counts as
    one of the D dimensions, since its row has norm 1 as a cosine and its sine have. Nothing here enters a state_dict.

    Attributes:
        inputs: name -> Range or Choice.
        out_features: e.
        bound: the largest norm of E; with "cos_sin" the only one.

    Args:
        inputs: a pair of numbers is a Range.
        kind: "cos_sin", "complement", or None: the values normalised to [0, 1] as they are.
        norm: of "cos_sin": "unit", 1, or "per_dim", sqrt(D).
        out_of_range: for tensors: "clamp", "error" (waits for the device) or "ignore". Numbers are always checked.
    """

    def __init__(
        self,
        inputs: Mapping[str, Range | Choice | tuple[float, float]],
        *,
        kind: str | None,
        norm: str,
        out_of_range: str,
    ):
        super().__init__()
        if not isinstance(inputs, Mapping):
            raise TypeError(f"hypernetize: inputs: expected name -> range, got {inputs!r}; e.g. {{'angle': (0, 180)}}")
        if not inputs:
            raise ValueError("hypernetize: inputs: expected at least one, got none; e.g. {'angle': (0, 180)}")
        for name in inputs:
            if not (isinstance(name, str) and name.isidentifier()) or name in _TAKEN:
                raise ValueError(
                    f"hypernetize: inputs: expected names that can be keywords, and none of {', '.join(_TAKEN)}, got "
                    f"{name!r}"
                )
        for argument, given, allowed in [
            ("encoding", kind, tuple(_ENCODINGS)),
            ("norm", norm, ("unit", "per_dim")),
            ("out_of_range", out_of_range, ("clamp", "error", "ignore")),
        ]:
            if given not in allowed:
                raise ValueError(
                    f"hypernetize: {argument}: expected one of {', '.join(map(str, allowed))}, got {given!r}"
                )
        self.inputs = {name: _as_input(name, given) for name, given in inputs.items()}
        self.kind, self.out_of_range = kind, out_of_range
        numbers = sum(given.dim for given in self.inputs.values() if isinstance(given, Range))
        self.out_features = numbers if kind is None else 2 * numbers
        for name, given in self.inputs.items():
            if isinstance(given, Choice):
                self.register_buffer(f"rows_{name}", given.rows(), persistent=False)
                self.out_features += given.rows().shape[1]
        self.bound = math.sqrt(numbers + sum(isinstance(given, Choice) for given in self.inputs.values()))
        self._divisor = 1.0
        if kind == "cos_sin" and norm == "unit":
            self.bound, self._divisor = 1.0, self.bound

    def forward(self, values: Mapping[str, Any], like: Tensor) -> Tensor:
        """Encode.

        Args:
            values: of every input, by name.
            like: E has its dtype and device.

        Raises:
            TypeError: for a name that is missing or unknown.
            ValueError: for a shape, a batch size or a number that does not fit.
        """
        if values.keys() != self.inputs.keys():
            raise TypeError(f"hypernet: inputs: expected {', '.join(self.inputs)}, got {', '.join(values) or 'none'}")
        read = {name: given.read(name, values[name], self.out_of_range, like) for name, given in self.inputs.items()}
        lead = self._lead(read)
        z, rows = [], []
        for name, given in self.inputs.items():
            if isinstance(given, Choice):
                row = embedding(read[name], getattr(self, f"rows_{name}"))  # indexing would wait for the position
                rows.append(row.expand(*lead, -1))
            else:
                number = given.normalized(read[name])
                z.append((number if given.shape else number.unsqueeze(-1)).expand(*lead, -1))
        encoded = [_ENCODINGS[self.kind](torch.cat(z, dim=-1))] if z else []
        return torch.cat(encoded + rows, dim=-1).div(self._divisor).to(like.dtype)

    def sample(self, n: int | None, generator: Generator | None) -> dict[str, Tensor]:
        """Draw a value of each input, or n of each, on the generator's device."""
        return {name: given.sample(n, generator) for name, given in self.inputs.items()}

    def _lead(self, read: Mapping[str, Tensor]) -> tuple[int, ...]:
        """() or (B,): what stands before one value's shape; values without it are shared by the batch."""
        leads: dict[str, tuple[int, ...]] = {}
        for name, value in read.items():
            one = self.inputs[name].shape
            lead = tuple(value.shape[: value.ndim - len(one)])
            if tuple(value.shape[len(lead) :]) != one or len(lead) > 1:
                wanted = f"({', '.join(map(str, one))}) or ({', '.join(['B', *map(str, one)])})"
                raise ValueError(f"hypernet: {name}: expected shape {wanted}, got {tuple(value.shape)}")
            if lead:
                leads[name] = lead
        if len(set(leads.values())) > 1:
            shapes = ", ".join(f"{name} {tuple(read[name].shape)}" for name in leads)
            raise ValueError(f"hypernet: inputs: expected one batch size, got {shapes}")
        return next(iter(leads.values()), ())


_TAKEN = ("self", "recalibrate")
"""Keywords of HyperModel's own methods."""

_ENCODINGS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "cos_sin": partial(magnitude_invariant_encoding, norm="per_dim"),
    "complement": complement_encoding,
    None: lambda z: z,
}


def _as_input(name: str, given: Any) -> Range | Choice:
    if isinstance(given, (Range, Choice)):
        return given
    if isinstance(given, Sequence) and len(given) == 2 and all(isinstance(bound, Real) for bound in given):
        return Range(*given)
    raise TypeError(f"hypernetize: inputs: {name}: expected a Range, a Choice or (low, high), got {given!r}")
