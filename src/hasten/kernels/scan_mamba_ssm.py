"""The selective scan by mamba_ssm's CUDA kernels, where that package is installed with its extension.

Its tensors are (B, D, L) and (B, G, N, L): they are transposed at this door, flipped for a reverse scan, and nothing of
it leaves here. It takes float32 as everything else here does. Untested without CUDA: `selective_scan` compares it once
with plain torch before it chooses it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**31
"""Steps between two checkpoints: all are one chunk, because the backward pass scans once more instead."""


def available() -> str | None:
    """Why mamba_ssm's scan cannot be used, in one line; None where it can."""
    try:
        # not mamba_ssm, which also imports where its extension was not built, and fails at the first call
        import selective_scan_cuda  # noqa: F401, PLC0415 - optional, and only with CUDA  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return f"selective_scan_cuda does not import: {error}"
    return None


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan to y (B, L, D), last_state (B, D, N) and checkpoints (1, B, D, N), the zeros it starts from."""
    inward = _inward(u, delta, A, B, C, D, delta_bias, reverse)
    ungated, prefixes = _scan(inward, softplus)
    y = _outward(ungated, reverse)
    if z is not None:
        y = y * F.silu(z.float())
    last_state = prefixes[:, :, -1, 1::2].contiguous()  # pairs (product of decays, state) after each of its chunks
    return y.to(u.dtype), last_state, torch.zeros_like(last_state)[None]


def backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    checkpoints: Tensor,
    *,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of u, delta, A, B, C, D, z and delta_bias, each as its input; None for a None.

    Raises:
        ValueError: for a gradient of the last state, which the kernel does not take.
    """
    import selective_scan_cuda  # noqa: PLC0415 - optional, and only with CUDA  # pyright: ignore[reportMissingImports]

    if grad_last is not None:
        raise ValueError(
            "selective_scan: last_state: expected no gradient of it with backend 'mamba_ssm', got one; use 'triton'"
        )
    inward = _inward(u, delta, A, B, C, D, delta_bias, reverse)
    ungated, prefixes = _scan(inward, softplus)
    dy, dz = grad_y.float(), None
    if z is not None:
        gate = z.float()
        opening = gate.sigmoid()
        dz = (dy * _outward(ungated, reverse) * opening * (1 + gate * (1 - opening))).to(z.dtype)
        dy = dy * gate * opening
    u_, delta_, A_, B_, C_, D_, bias_ = inward
    du, ddelta, dA, dB, dC, dD, dbias, *_ = selective_scan_cuda.bwd(
        u_, delta_, A_, B_, C_, D_, None, bias_, _steps_last(dy, reverse), prefixes, None, None, softplus, False
    )
    du, ddelta, dB, dC = (_outward(x, reverse) for x in (du, ddelta, dB, dC))
    return du.to(u.dtype), ddelta, dA, dB, dC, None if D is None else dD, dz, None if delta_bias is None else dbias


def _scan(inward: tuple, softplus: bool) -> tuple[Tensor, Tensor]:
    """The scan without its gate, (B, D, L), and what its backward pass needs, (B, D, chunks, 2 N)."""
    import selective_scan_cuda  # noqa: PLC0415 - optional, and only with CUDA  # pyright: ignore[reportMissingImports]

    u, delta, A, B, C, D, delta_bias = inward
    ungated, prefixes, *_ = selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, softplus)
    return ungated, prefixes


def _inward(u, delta, A, B, C, D, delta_bias, reverse: bool) -> tuple:
    u, delta, B, C = (_steps_last(x, reverse) for x in (u.float(), delta, B, C))
    return u, delta, A, B, C, D, delta_bias


def _steps_last(x: Tensor, reverse: bool) -> Tensor:
    """(B, L, ...) -> (B, ..., L), from the last step to the first if reverse."""
    x = x.flip(1) if reverse else x
    return x.movedim(1, -1).contiguous()


def _outward(x: Tensor, reverse: bool) -> Tensor:
    """(B, ..., L) -> (B, L, ...), the inverse of `_steps_last`."""
    x = x.movedim(-1, 1).contiguous()
    return x.flip(1) if reverse else x
