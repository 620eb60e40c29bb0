"""The selective scan in plain torch, CHUNK steps at a time: the backend that is always there, float64 included.

States lie as (..., G, N, P) with P = D / G, the features of a group, innermost: what is broadcast over the N states
then runs over contiguous features, and the sums over N and over P are batched matmuls (which on CUDA follow
torch.set_float32_matmul_precision). Buffers hold CHUNK steps of as many samples as fit into a core's cache and are
allocated once per call: a state of every step, (B, L, D, N), costs more in page faults than in arithmetic.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 8
"""Steps between two checkpoints."""

_BUFFER_BYTES = 2**21
_LOG2_E = 1 / math.log(2)


def available() -> str | None:
    """Why this backend cannot be used, None where it can: everywhere."""
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
    """Scan to y (B, L, D), last_state (B, D, N) and checkpoints (chunks, B, D, N), where (D, N) lies as (G, N, P)."""
    rates = _by_group(A, B.shape[2])
    spans = _spans(u.shape[1], reverse)
    y = torch.empty_like(u)
    checkpoints = rates.new_zeros(len(spans) + 1, len(u), *rates.shape)
    for rows in _tiles(u, rates):
        buffer = _buffer(rows, rates)
        for span, before, after in zip(spans, checkpoints[:-1, rows], checkpoints[1:, rows], strict=True):
            u_here = u[rows, span].to(rates.dtype)
            dt = _step_sizes(delta[rows, span], delta_bias, softplus=softplus)
            h = _decays(dt, rates, buffer)  # each step's decay becomes its state
            state = before
            for x_t, b_t, h_t in _steps(reverse, _per_feature(dt * u_here, rates), B[rows, span, :, :, None], h):
                state = h_t.mul_(state).addcmul_(x_t, b_t)
            after.copy_(state)
            out = _sum_states(C[rows, span], h)
            if D is not None:
                out.addcmul_(u_here, D)
            if z is not None:
                out.mul_(F.silu(z[rows, span].to(rates.dtype)))
            y[rows, span] = out
    return y, _by_feature(checkpoints[-1], A), checkpoints[:-1].view(len(spans), len(u), *A.shape)


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
    """The gradients of u, delta, A, B, C, D, z, delta_bias, chunk by chunk from the last, states rebuilt in each.

    With the decays a_t = exp(dt_t A), dy the gradient before the gate, g_t = dy_t C_t + a_{t+1} g_{t+1} what reaches
    the state h_t, and p_t = g_t a_t h_{t-1}: dC = sum_d dy h; dB = sum_d g dt u; du = dt sum_n g B + D dy;
    ddt = u sum_n g B + sum_n A p; dA = sum_t dt p.
    """
    rates = _by_group(A, B.shape[2])
    spans = _spans(u.shape[1], reverse)
    du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
    dz = None if z is None else torch.empty_like(z)
    dD = None if D is None else torch.zeros_like(D)
    dA = torch.zeros_like(rates)
    befores = checkpoints.view(len(spans), len(u), *rates.shape)
    for rows in _tiles(u, rates):
        for_decays, for_kept, for_states = (_buffer(rows, rates) for _ in range(3))
        carry = torch.zeros_like(befores[0, rows])  # a_{t+1} g_{t+1}
        if grad_last is not None:
            carry += grad_last[rows].view_as(carry.mT).mT
        dA_rows = torch.zeros_like(carry)
        for span, before in reversed(list(zip(spans, befores[:, rows], strict=True))):
            b, c = B[rows, span], C[rows, span]
            u_here = u[rows, span].to(rates.dtype)
            dy = grad_y[rows, span].to(rates.dtype)
            dt = _step_sizes(delta[rows, span], delta_bias, softplus=softplus)
            x = _per_feature(dt * u_here, rates)
            decays = _decays(dt, rates, for_decays)
            kept, h = (_states(dt, rates, buffer) for buffer in (for_kept, for_states))
            state = before
            # kept is what remains of the state before, a_t h_{t-1}
            for decay_t, kept_t, x_t, b_t, h_t in _steps(reverse, decays, kept, x, b.unsqueeze(-1), h):
                torch.mul(decay_t, state, out=kept_t)
                state = torch.addcmul(kept_t, x_t, b_t, out=h_t)

            if z is not None and dz is not None:
                out = _sum_states(c, h)
                if D is not None:
                    out.addcmul_(u_here, D)
                z_here = z[rows, span].to(rates.dtype)
                sigmoid, silu = z_here.sigmoid(), F.silu(z_here)
                dz[rows, span] = out.mul_(dy).mul_(sigmoid + silu * (1 - sigmoid))
                dy = dy * silu
            dC[rows, span] = _sum_features(dy, h)

            g = h  # overwrites the states, which have been used
            for dy_t, c_t, decay_t, g_t in _steps(not reverse, _per_feature(dy, rates), c.unsqueeze(-1), decays, g):
                torch.addcmul(carry, dy_t, c_t, out=g_t)
                torch.mul(decay_t, g_t, out=carry)
            dB[rows, span] = _sum_features(x, g)
            dx = _sum_states(b, g)
            p = kept.mul_(g)
            for dt_t, p_t in _steps(reverse, _per_feature(dt, rates), p):
                dA_rows.addcmul_(dt_t, p_t)
            ddt = p.mul_(rates).sum(-2).view_as(dt).addcmul_(u_here, dx)
            ddelta[rows, span] = ddt.mul_(-torch.expm1(-dt)) if softplus else ddt  # 1 - exp(-dt) is softplus'
            dx.mul_(dt)
            if D is not None and dD is not None:
                dx.addcmul_(dy, D)
                dD += (dy * u_here).sum((0, 1))
            du[rows, span] = dx
        dA += dA_rows.sum(0)
    dbias = None if delta_bias is None else ddelta.sum((0, 1))
    return du, ddelta, _by_feature(dA, A), dB, dC, dD, dz, dbias


def _by_group(A: Tensor, groups: int) -> Tensor:
    """(D, N) -> (G, N, P)."""
    return A.view(groups, -1, A.shape[1]).mT.contiguous()


def _by_feature(states: Tensor, A: Tensor) -> Tensor:
    """(..., G, N, P) -> (..., D, N), always a copy: what an operator returns must not share memory."""
    return states.mT.clone(memory_format=torch.contiguous_format).view(*states.shape[:-3], *A.shape)


def _spans(length: int, reverse: bool) -> list[slice]:
    """The chunks in scan order; the last may be short."""
    starts = range(0, length, CHUNK)
    if reverse:
        return [slice(max(length - start - CHUNK, 0), length - start) for start in starts]
    return [slice(start, min(start + CHUNK, length)) for start in starts]


def _tiles(u: Tensor, rates: Tensor) -> list[slice]:
    """The batch in pieces whose buffers stay in a CPU's cache; in one piece elsewhere, where launches cost more."""
    batch = len(u)
    sample_bytes = CHUNK * rates.numel() * rates.element_size()
    size = max(1, _BUFFER_BYTES // sample_bytes) if u.device.type == "cpu" else batch
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _steps(reverse: bool, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Step by step in scan order what (b, k, ...) hold."""
    steps = zip(*(tensor.unbind(1) for tensor in tensors), strict=True)
    return reversed(list(steps)) if reverse else steps


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, *, softplus: bool) -> Tensor:
    """dt, (b, k, D)."""
    biased = delta if delta_bias is None else delta + delta_bias
    return F.softplus(biased) if softplus else biased


def _decays(dt: Tensor, rates: Tensor, buffer: Tensor) -> Tensor:
    """exp(dt A), (b, k, G, N, P), in the buffer; by exp2, which takes a third of exp's time on some CPUs."""
    return torch.mul(_per_feature(dt * _LOG2_E, rates), rates, out=_states(dt, rates, buffer)).exp2_()


def _buffer(rows: slice, rates: Tensor) -> Tensor:
    """Room for the states of CHUNK steps of a tile."""
    return rates.new_empty((rows.stop - rows.start) * CHUNK * rates.numel())


def _states(dt: Tensor, rates: Tensor, buffer: Tensor) -> Tensor:
    """The part of a buffer that the steps of dt (b, k, D) need, contiguous: (b, k, G, N, P)."""
    return buffer[: len(dt) * dt.shape[1] * rates.numel()].view(*dt.shape[:2], *rates.shape)


def _per_feature(x: Tensor, rates: Tensor) -> Tensor:
    """(b, k, D) -> (b, k, G, 1, P)."""
    return x.view(*x.shape[:2], rates.shape[0], 1, rates.shape[2])


def _sum_states(weights: Tensor, h: Tensor) -> Tensor:
    """Weights (b, k, G, N) and h (b, k, G, N, P) -> their sum over N, (b, k, D)."""
    rows = weights.reshape(-1, 1, weights.shape[-1])
    return torch.bmm(rows, h.view(-1, *h.shape[-2:])).view(*h.shape[:2], -1)


def _sum_features(x: Tensor, h: Tensor) -> Tensor:
    """(b, k, D) and h (b, k, G, N, P) -> their sum over P, (b, k, G, N)."""
    rows = x.reshape(-1, 1, h.shape[-1])
    return torch.bmm(rows, h.view(-1, *h.shape[-2:]).mT).view(h.shape[:-1])
