"""The generating part of a hypernetwork: an MLP over the encoded input, and the four heads that make weights of it.

A head is chosen by a small frozen object, which knows how many parameters it takes and builds the network from
E, (e,) or (B, e), to the deltas of all tensors in one row, (P,) or (B, P): each flat, one after the other. At the start
every delta has about the same norm, sqrt(2) |E|, however large its tensor is. H is the width of the MLP's last layer.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import skip_init

from hasten.functional import basis_delta, fan_out_std, lora_delta

log = logging.getLogger(__name__)

Shapes = Sequence[tuple[int, ...]]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class Plan:
    """What any head is built from.

    Args:
        shapes: of the tensors to be generated.
        in_features: e.
        bound: the largest norm of E.
        hidden: widths of the MLP; the last is H.
        activation: a key of ACTIVATIONS.
        zero: every delta is 0 at the start.
        generator: of the initial weights.
    """

    shapes: Shapes
    in_features: int
    bound: float
    hidden: Sequence[int]
    activation: str
    zero: bool
    generator: Generator | None


@dataclass(frozen=True)
class Dense:
    """One linear layer from H to every weight: the paper's head, exact and large.

    Example:
        >>> Dense().num_parameters([(64, 64, 3, 3), (64,)], 128)
        4726784
    """

    def num_parameters(self, shapes: Shapes, width: int) -> int:
        """Of a head for tensors of these shapes behind an MLP that ends in H = ``width``."""
        return width * _numel(shapes)

    def build(self, plan: Plan) -> nn.Module:
        """The network, E -> deltas, (..., e) -> (..., P)."""
        return _DenseNetwork(plan)


@dataclass(frozen=True)
class Basis:
    """K weight vectors for the whole model, and a linear layer from H to their K coefficients.

    Args:
        k: K, at least 1.

    Example:
        >>> Basis(8).num_parameters([(64, 64, 3, 3), (64,)], 128)
        296448
    """

    k: int = 8

    def __post_init__(self) -> None:
        _at_least_one("basis: k", self.k)

    def num_parameters(self, shapes: Shapes, width: int) -> int:
        """Of a head for tensors of these shapes behind an MLP that ends in H = ``width``."""
        return self.k * (width + _numel(shapes))

    def build(self, plan: Plan) -> nn.Module:
        """The network, E -> deltas, (..., e) -> (..., P)."""
        return _BasisNetwork(plan, self.k)


@dataclass(frozen=True)
class LoRA:
    """U diag(s) V for each matrix, a convolution as (C_out, C_in k k); only the r numbers s depend on the input.

    Vectors and scalars get a dense head. V starts at 0, so every matrix starts without a delta.

    Args:
        r: the rank, at least 1; less where a matrix has less.

    Example:
        >>> LoRA(8).num_parameters([(64, 64, 3, 3), (64,)], 128)
        14336
    """

    r: int = 8

    def __post_init__(self) -> None:
        _at_least_one("lora: r", self.r)

    def num_parameters(self, shapes: Shapes, width: int) -> int:
        """Of a head for tensors of these shapes behind an MLP that ends in H = ``width``."""
        factors = sum(_rank(shape, self.r) * sum(_as_matrix(shape)) for shape in shapes if len(shape) > 1)
        return factors + width * sum(_lora_outputs(shape, self.r) for shape in shapes)

    def build(self, plan: Plan) -> nn.Module:
        """The network, E -> deltas, (..., e) -> (..., P)."""
        return _LoRANetwork(plan, self.r)


@dataclass(frozen=True)
class Chunked:
    """The weights in chunks, all from one MLP, which sees E beside a learned embedding of the chunk.

    Args:
        size: weights in a chunk, at least 1; less where there are fewer in all.
        embedding: length of a chunk's embedding, at least 1.

    Example:
        >>> Chunked(1024).num_parameters([(64, 64, 3, 3), (64,)], 128)
        131368
    """

    size: int = 1024
    embedding: int = 8

    def __post_init__(self) -> None:
        _at_least_one("chunked: size", self.size)
        _at_least_one("chunked: embedding", self.embedding)

    def num_parameters(self, shapes: Shapes, width: int) -> int:
        """Of a head for tensors of these shapes behind an MLP that ends in H = ``width``."""
        size = min(self.size, _numel(shapes))
        return width * size + self.embedding * math.ceil(_numel(shapes) / size)

    def build(self, plan: Plan) -> nn.Module:
        """The network, E -> deltas, (..., e) -> (..., P)."""
        return _ChunkedNetwork(plan, self.size, self.embedding)


Head = Dense | Basis | LoRA | Chunked

_ADAM_BYTES = 16  # a float32 weight, its gradient and two moments


def size_of(head: Head, shapes: Shapes, width: int) -> dict[str, Any]:
    """What a head costs for tensors of these shapes behind an MLP that ends in H = ``width``.

    Example:
        >>> size_of(Dense(), [(10, 10)], 128)["parameters"]
        12800
    """
    parameters = head.num_parameters(shapes, width)
    adam_gib = parameters * _ADAM_BYTES / 2**30
    return {"head": repr(head), "weights": _numel(shapes), "parameters": parameters, "adam_gib": adam_gib}


def within_budget(head: str | Head, shapes: Shapes, width: int, budget: int, norms: Shapes) -> Head:
    """The head that is meant; a dense one above the budget is refused, another is logged.

    Args:
        head: a word or a head.
        shapes: of the tensors to be generated.
        width: H.
        budget: parameters.
        norms: shapes in the model's norm layers, for the remedies.
    """
    if isinstance(head, str) and head not in HEADS:
        raise ValueError(f"hypernetize: head: expected one of {', '.join(HEADS)}, got {head!r}")
    head = HEADS[head] if isinstance(head, str) else head
    if not isinstance(head, Head):
        raise TypeError(f"hypernetize: head: expected a word, Dense, Basis, LoRA or Chunked, got {head!r}")
    if head.num_parameters(shapes, width) <= budget:
        return head
    cost = _described(head, shapes, width)
    if not isinstance(head, Dense):
        log.warning("hypernetize: head: %s is above the %s of max_dense_params", cost, f"{budget:,}")
        return head
    others = [_described(other, shapes, width) for other in HEADS.values() if not isinstance(other, Dense)]
    if norms:
        others.append(f"params='norm' with {_described(head, norms, width)}")
    raise ValueError(
        f"hypernetize: head: expected at most {budget:,} parameters for a dense head, got {cost}; use "
        f"{', '.join(others)}, or raise max_dense_params"
    )


def _described(head: Head, shapes: Shapes, width: int) -> str:
    cost = size_of(head, shapes, width)
    return f"{cost['head']} {cost['parameters'] / 1e6:,.2f}M (Adam {cost['adam_gib']:.2f} GiB)"


class _DenseNetwork(nn.Module):
    def __init__(self, plan: Plan):
        super().__init__()
        self.trunk = _mlp(plan.in_features, plan)
        # the rows of each tensor are initialised as a layer of their own: one fan-out for all would let large tensors
        # set the scale of small ones
        self.head = _linear(plan, [(n, 0.0 if plan.zero else fan_out_std(n)) for n in map(math.prod, plan.shapes)])

    def forward(self, encoded: Tensor) -> Tensor:
        return self.head(self.trunk(encoded))


class _BasisNetwork(nn.Module):
    def __init__(self, plan: Plan, k: int):
        super().__init__()
        self.trunk = _mlp(plan.in_features, plan)
        # zero coefficients, and not a zero bank as well: a product of two zeros has no gradient and stays 0 for ever
        self.head = _linear(plan, [(k, 0.0 if plan.zero else fan_out_std(k, gain=1.0))])
        bank = [_normal((k, n), fan_out_std(n), plan) for n in map(math.prod, plan.shapes)]
        self.bank = nn.Parameter(torch.cat(bank, dim=1))

    def forward(self, encoded: Tensor) -> Tensor:
        return basis_delta(self.head(self.trunk(encoded)), self.bank)


class _LoRANetwork(nn.Module):
    def __init__(self, plan: Plan, r: int):
        super().__init__()
        self.shapes = plan.shapes
        self.outputs = [_lora_outputs(shape, r) for shape in plan.shapes]
        self.trunk = _mlp(plan.in_features, plan)
        matrices = [shape for shape in plan.shapes if len(shape) > 1]
        stds = [
            0.0 if plan.zero and len(shape) < 2 else fan_out_std(n)
            for shape, n in zip(plan.shapes, self.outputs, strict=True)
        ]
        self.head = _linear(plan, list(zip(self.outputs, stds, strict=True)))
        ranks = [_rank(shape, r) for shape in matrices]
        self.u = nn.ParameterList(
            _normal((_as_matrix(shape)[0], rank), fan_out_std(rank), plan)
            for shape, rank in zip(matrices, ranks, strict=True)
        )
        self.v = nn.ParameterList(
            torch.zeros(rank, _as_matrix(shape)[1]) for shape, rank in zip(matrices, ranks, strict=True)
        )

    def forward(self, encoded: Tensor) -> Tensor:
        parts = self.head(self.trunk(encoded)).split(self.outputs, dim=-1)
        factors = zip(self.u, self.v, strict=True)
        deltas = []
        for part, shape in zip(parts, self.shapes, strict=True):
            if len(shape) > 1:
                u, v = next(factors)
                part = lora_delta(u, part, v).flatten(-2)
            deltas.append(part)
        return torch.cat(deltas, dim=-1)


class _ChunkedNetwork(nn.Module):
    def __init__(self, plan: Plan, size: int, embedding: int):
        super().__init__()
        self.bound, self.numel = plan.bound, _numel(plan.shapes)
        size = min(size, self.numel)
        # a chunk may span tensors: its rows have one scale, and each tensor is brought to its own
        scales = [torch.full((n,), math.sqrt(size / n)) for n in map(math.prod, plan.shapes)]
        self.register_buffer("scales", torch.cat(scales), persistent=False)
        self.trunk = _mlp(plan.in_features + embedding, plan)
        self.head = _linear(plan, [(size, 0.0 if plan.zero else fan_out_std(size))])
        self.embedding = nn.Parameter(_normal((math.ceil(self.numel / size), embedding), 1.0, plan))

    def forward(self, encoded: Tensor) -> Tensor:
        lead, chunks = encoded.shape[:-1], len(self.embedding)
        # a learned embedding has a norm of its own, which would leak into every weight as a raw input does; E is
        # divided by a constant, so that encodings without constant norm keep what they say by it
        sides = [
            (encoded / self.bound).unsqueeze(-2).expand(*lead, chunks, -1),
            normalize(self.embedding, dim=-1).expand(*lead, chunks, -1),
        ]
        chunks_of = self.head(self.trunk(torch.cat(sides, dim=-1) / math.sqrt(2)))
        return chunks_of.flatten(-2)[..., : self.numel] * self.scales


def _mlp(in_features: int, plan: Plan) -> nn.Sequential:
    """Linear and activation by turns, (..., in_features) -> (..., H), norm kept for ReLU-like activations."""
    layers: list[nn.Module] = []
    for width in plan.hidden:
        layer = _uninitialized(in_features, width)
        nn.init.normal_(layer.weight, std=fan_out_std(width), generator=plan.generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, ACTIVATIONS[plan.activation]()]
        in_features = width
    return nn.Sequential(*layers)


def _linear(plan: Plan, groups: Iterable[tuple[int, float]]) -> nn.Linear:
    """A layer from H without bias, which the model's own weights are; rows in groups of (number, std)."""
    groups = list(groups)
    layer = _uninitialized(plan.hidden[-1], sum(n for n, _ in groups), bias=False)
    with torch.no_grad():
        for rows, (_, std) in zip(layer.weight.split([n for n, _ in groups]), groups, strict=True):
            rows.normal_(std=std, generator=plan.generator)
    return layer


def _uninitialized(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    # torch's own initialisation of a large head takes seconds, and is thrown away
    return cast(nn.Linear, skip_init(nn.Linear, in_features, out_features, bias=bias))


def _normal(shape: tuple[int, ...], std: float, plan: Plan) -> Tensor:
    return torch.randn(shape, generator=plan.generator) * std


def _numel(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _rank(shape: tuple[int, ...], r: int) -> int:
    return min(r, *_as_matrix(shape))


def _lora_outputs(shape: tuple[int, ...], r: int) -> int:
    """What the head has to give for one tensor: s of a matrix, all of a vector."""
    return _rank(shape, r) if len(shape) > 1 else math.prod(shape)


def _at_least_one(argument: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{argument}: expected at least 1, got {value}")


HEADS: dict[str, Head] = {"dense": Dense(), "basis": Basis(), "lora": LoRA(), "chunked": Chunked()}
