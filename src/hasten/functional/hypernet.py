"""Hypernetworks whose weights do not grow with their input: its encoding, the scale of the heads, their products.

z is an input normalised to [0, 1], one number a dimension; E its encoding; delta what is added to a weight.
"""

import math

import torch
from torch import Tensor


def magnitude_invariant_encoding(z: Tensor, *, norm: str = "unit") -> Tensor:
    """Put each dimension on a quarter circle, (..., D) in [0, 1] -> (..., 2D): all cosines, then all sines.

    Args:
        z: outside [0, 1] the encoding repeats with period 4.
        norm: of every result: "unit", 1, or "per_dim", sqrt(D), as in the paper. With sqrt(D) the generated weights
            grow with the number of dimensions; at D = 1 the two are the same.

    Raises:
        ValueError: for another norm.

    Source: MIP, arXiv:2304.07645; "unit" is ours.

    Example:
        >>> magnitude_invariant_encoding(torch.tensor([0.0, 1.0]), norm="per_dim").round().abs().tolist()
        [1.0, 0.0, 0.0, 1.0]
        >>> magnitude_invariant_encoding(torch.rand(5, 3)).norm(dim=-1).sum().round()
        tensor(5.)
    """
    if norm not in ("unit", "per_dim"):
        raise ValueError(f"magnitude_invariant_encoding: norm: expected one of unit, per_dim, got {norm!r}")
    angle = z * (math.pi / 2)
    encoded = torch.cat([angle.cos(), angle.sin()], dim=-1)
    return encoded if norm == "per_dim" else encoded / math.sqrt(z.shape[-1])


def complement_encoding(z: Tensor) -> Tensor:
    """Append what is missing to 1, (..., D) in [0, 1] -> (..., 2D): z, then 1 - z.

    Only the L1 norm is constant; the paper compares it with the quarter circle.

    Source: MIP, arXiv:2304.07645.

    Example:
        >>> complement_encoding(torch.tensor([0.25])).tolist()
        [0.25, 0.75]
    """
    return torch.cat([z, 1 - z], dim=-1)


def fan_out_std(numel: int, *, gain: float = math.sqrt(2)) -> float:
    """The standard deviation of a layer with ``numel`` outputs whose result has ``gain`` times the norm of its input.

    Example:
        >>> fan_out_std(8)
        0.5
    """
    return gain / math.sqrt(numel)


def basis_delta(c: Tensor, bank: Tensor) -> Tensor:
    """Mix K weight vectors, (..., K) coefficients and a bank (K, P) -> (..., P).

    Example:
        >>> basis_delta(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 2.0], [3.0, 3.0]])).tolist()
        [-2.0, -1.0]
    """
    return c @ bank


def lora_delta(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """A matrix U diag(s) V of rank r, (O, r), (..., r), (r, I) -> (..., O, I).

    Example:
        >>> lora_delta(torch.ones(2, 1), torch.tensor([3.0]), torch.tensor([[1.0, 2.0]])).tolist()
        [[3.0, 6.0], [3.0, 6.0]]
    """
    return (u * s.unsqueeze(-2)) @ v


def moment_matched_kl(samples: Tensor, *, std: float) -> Tensor:
    """KL(normal with the samples' mean and variance || normal(0, std^2)) in nats, (n, ...) -> (...), n >= 2.

    It grows without bound as the samples become one: what is penalised by it keeps its spread.

    Args:
        samples: of a number a place.
        std: of the prior, > 0.

    Raises:
        ValueError: for a single sample, or a std that is none.

    Example:
        >>> moment_matched_kl(torch.tensor([[-1.0, 0.0], [0.0, 2.0], [1.0, 4.0]]), std=1.0)
        tensor([0.0000, 2.8069])
    """
    if len(samples) < 2:
        raise ValueError(f"moment_matched_kl: samples: expected at least 2, got {len(samples)}")
    if not std > 0:
        raise ValueError(f"moment_matched_kl: std: expected > 0, got {std}")
    variance, mean = torch.var_mean(samples, dim=0)
    ratio = (variance / std**2).clamp(min=torch.finfo(samples.dtype).tiny)  # equal samples: large, not infinite
    return (ratio + (mean / std) ** 2 - 1 - ratio.log()) / 2
