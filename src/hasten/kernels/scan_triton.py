"""The selective scan as two Triton kernels, forward and backward, which ``functional.scan`` calls on CUDA.

A program owns BLOCK_D channels of one sample and walks L in scan order, its state (BLOCK_D, BLOCK_N) in registers. A
block never crosses a group, so one row of B and of C, (N,), serves it at each step. BLOCK_N is N up to a power of two;
channels and states that do not exist are masked. Offsets are int64, made from the int64 program number.

Letters: B batch, L sequence, D features, N states, G groups of B and C. In the kernels ``b`` is the sample, ``d`` and
``n`` number its channels and states, ``row`` is b * L + t, and ``x_ptr`` is the first element of x.
"""

# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# (kernels are Triton's language, which only looks like Python)

from __future__ import annotations  # the kernels' annotations name triton, which may be absent

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has no wheel of it
    _INSTALLED = False
else:
    _INSTALLED = True


def _jit(kernel: Any) -> Any:
    # one kernel serves every batch and every L, of which token merging makes many: knowing them gains nothing
    return triton.jit(do_not_specialize=["batch", "L"])(kernel) if _INSTALLED else kernel


CHUNK = 16
"""Steps between two checkpoints of the state."""


def available() -> str | None:
    """Tell why the kernels cannot run here, one line, or None where they can: on CUDA and in Triton's interpreter."""
    if not _INSTALLED:
        return "triton is not installed"
    if isinstance(_forward_kernel, triton.JITFunction) and not torch.cuda.is_available():
        return "no CUDA device, and TRITON_INTERPRET=1 was not set when triton was imported"
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
    """Scan (B, L, D) -> y (B, L, D), last state (B, D, N), checkpoints (ceil(L / CHUNK), B, D, N).

    Args:
        u: (B, L, D), as z: float32, bfloat16 or float16. All else is float32, and all is contiguous.
        delta: (B, L, D).
        A: (D, N).
        B: (B, L, G, N), G a divisor of D.
        C: (B, L, G, N).
        D: (D,).
        z: the gate, (B, L, D).
        delta_bias: (D,).
        softplus: the step is softplus(delta + delta_bias), not the sum itself.
        reverse: from t = L - 1 down to 0. Checkpoints are in scan order: each the state before its chunk.
    """
    batch, length, features = u.shape
    states = A.shape[1]
    y = torch.empty_like(u)
    last = delta.new_empty(batch, features, states)
    checkpoints = delta.new_empty(-(-length // CHUNK), batch, features, states)
    blocks, sizes, options = _launch(u, B)
    if batch:
        with torch.cuda.device_of(u):
            _forward_kernel[(batch * blocks,)](
                u, delta, A, B, C, D, z, delta_bias, y, last, checkpoints,
                *sizes, SOFTPLUS=softplus, REVERSE=reverse, **options,
            )  # fmt: skip
    return y, last, checkpoints


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
    """Gradients of u, delta, A, B, C, D, z and delta_bias, each shaped and typed as its input, None for a None.

    Args:
        grad_y: (B, L, D), in u's dtype.
        grad_last: of the last state, (B, D, N), or None.
        checkpoints: what :func:`forward` returned for the inputs and switches given here again.
    """
    batch, _, features = u.shape
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dz = None if z is None else torch.empty_like(z)
    # what several programs add to has a row for each, summed by torch: atomics would add in another order every time
    dA = delta.new_empty(batch, *A.shape)
    blocks, sizes, options = _launch(u, B)
    dB, dC = delta.new_empty(2, blocks // B.shape[2], *B.shape)
    dD = None if D is None else delta.new_empty(batch, features)
    dbias = None if delta_bias is None else delta.new_empty(batch, features)
    if batch:
        scratch = delta.new_empty(batch * blocks, CHUNK, options["BLOCK_D"], options["BLOCK_N"])
        with torch.cuda.device_of(u):
            _backward_kernel[(batch * blocks,)](
                grad_y, grad_last, u, delta, A, B, C, D, z, delta_bias, checkpoints,
                du, ddelta, dA, dB, dC, dD, dz, dbias, scratch,
                *sizes, SOFTPLUS=softplus, REVERSE=reverse, **options,
            )  # fmt: skip
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), _sum(dD), dz, _sum(dbias)


def _sum(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.sum(0)


def _launch(u: Tensor, B: Tensor) -> tuple[int, tuple[int, ...], dict[str, int]]:
    """Programs per sample, and what both kernels take behind their tensors: sizes in order, options by name."""
    batch, length, features = u.shape
    groups, states = B.shape[2:]
    width = features // groups
    # 16 states a lane: compiled for sm_80 and sm_90 the backward takes at most 241 registers, and twice as many spill
    block_d = min(32, triton.next_power_of_2(width))
    block_n = triton.next_power_of_2(states)
    options = {
        "N": states,
        "CHUNK": CHUNK,
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "num_warps": min(8, max(1, block_n // 16)),
        "enable_fp_fusion": True,  # Triton's default up to 3.9, no longer after it
    }
    return groups * triton.cdiv(width, block_d), (batch, length, groups, width), options


@_jit
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
    y_ptr, last_ptr, checkpoints_ptr,
    batch, L, groups, width,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    features = groups * width
    b, group, _block, d, in_d = _place(groups, width, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_n = n < N
    in_state = in_d[:, None] & in_n[None, :]
    state = d[:, None] * N + n[None, :]

    A = tl.load(A_ptr + state, mask=in_state, other=0.0)
    bias = 0.0 if bias_ptr is None else tl.load(bias_ptr + d, mask=in_d, other=0.0)
    if D_ptr is not None:
        D = tl.load(D_ptr + d, mask=in_d, other=0.0)
    h = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for chunk in range(tl.cdiv(L, CHUNK)):
        tl.store(checkpoints_ptr + (chunk * batch + b) * features * N + state, h, mask=in_state)
        # staged: the rows of two steps ahead are on their way while one is computed
        for step in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, L), num_stages=3):
            row = b * L + (L - 1 - step if REVERSE else step)
            at = row * features + d
            dt = _step_size(tl.load(delta_ptr + at, mask=in_d, other=0.0) + bias, SOFTPLUS)
            u = tl.load(u_ptr + at, mask=in_d, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + (row * groups + group) * N + n, mask=in_n, other=0.0)
            C = tl.load(C_ptr + (row * groups + group) * N + n, mask=in_n, other=0.0)
            h = tl.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B[None, :]
            y = tl.sum(h * C[None, :], 1)
            if D_ptr is not None:
                y += D * u
            if z_ptr is not None:
                z = tl.load(z_ptr + at, mask=in_d, other=0.0).to(tl.float32)
                y *= z * tl.sigmoid(z)
            tl.store(y_ptr + at, y, mask=in_d)
    tl.store(last_ptr + b * features * N + state, h, mask=in_state)


@_jit
def _backward_kernel(
    dy_ptr, dlast_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, checkpoints_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, scratch_ptr,
    batch, L, groups, width,
    N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    features = groups * width
    b, group, block, d, in_d = _place(groups, width, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_n = n < N
    in_state = in_d[:, None] & in_n[None, :]
    state = d[:, None] * N + n[None, :]
    # the states before each step of one chunk, (CHUNK, BLOCK_D, BLOCK_N), this program's alone
    scratch_ptr += tl.program_id(0).to(tl.int64) * (CHUNK * BLOCK_D * BLOCK_N)
    scratch = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]

    A = tl.load(A_ptr + state, mask=in_state, other=0.0)
    bias = 0.0 if bias_ptr is None else tl.load(bias_ptr + d, mask=in_d, other=0.0)
    if D_ptr is not None:
        D = tl.load(D_ptr + d, mask=in_d, other=0.0)
    dA = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dD = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    # the gradient of the state after a step, from the steps that follow it
    dh = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    if dlast_ptr is not None:
        dh = tl.load(dlast_ptr + b * features * N + state, mask=in_state, other=0.0)
    chunks = tl.cdiv(L, CHUNK)
    for chunks_done in range(chunks):
        chunk = chunks - 1 - chunks_done
        first = chunk * CHUNK
        steps = tl.minimum(L - first, CHUNK)

        h = tl.load(checkpoints_ptr + (chunk * batch + b) * features * N + state, mask=in_state, other=0.0)
        for k in tl.range(0, steps, num_stages=3):
            tl.store(scratch_ptr + k * (BLOCK_D * BLOCK_N) + scratch, h)
            row = b * L + (L - 1 - first - k if REVERSE else first + k)
            at = row * features + d
            dt = _step_size(tl.load(delta_ptr + at, mask=in_d, other=0.0) + bias, SOFTPLUS)
            u = tl.load(u_ptr + at, mask=in_d, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + (row * groups + group) * N + n, mask=in_n, other=0.0)
            h = tl.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B[None, :]
        tl.debug_barrier()  # what a thread reads back another may have written: layouts are the compiler's

        # not staged: a copy that runs ahead of its thread must not read what plain stores have just written
        for steps_done in range(steps):
            k = steps - 1 - steps_done
            row = b * L + (L - 1 - first - k if REVERSE else first + k)
            at = row * features + d
            raw = tl.load(delta_ptr + at, mask=in_d, other=0.0) + bias
            dt = _step_size(raw, SOFTPLUS)
            u = tl.load(u_ptr + at, mask=in_d, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at, mask=in_d, other=0.0).to(tl.float32)
            B = tl.load(B_ptr + (row * groups + group) * N + n, mask=in_n, other=0.0)
            C = tl.load(C_ptr + (row * groups + group) * N + n, mask=in_n, other=0.0)
            before = tl.load(scratch_ptr + k * (BLOCK_D * BLOCK_N) + scratch)
            a = tl.exp(dt[:, None] * A)
            h = a * before + (dt * u)[:, None] * B[None, :]

            if z_ptr is not None:
                y = tl.sum(h * C[None, :], 1)
                if D_ptr is not None:
                    y += D * u
                z = tl.load(z_ptr + at, mask=in_d, other=0.0).to(tl.float32)
                s = tl.sigmoid(z)
                tl.store(dz_ptr + at, dy * y * s * (1.0 + z * (1.0 - s)), mask=in_d)
                dy *= z * s

            dh += dy[:, None] * C[None, :]
            partial = ((block * batch * L + row) * groups + group) * N + n
            tl.store(dC_ptr + partial, tl.sum(dy[:, None] * h, 0), mask=in_n)
            tl.store(dB_ptr + partial, tl.sum(dh * (dt * u)[:, None], 0), mask=in_n)

            along_B = tl.sum(dh * B[None, :], 1)
            dh *= a
            decayed = dh * before
            dA += dt[:, None] * decayed
            ddelta = u * along_B + tl.sum(A * decayed, 1)
            du = dt * along_B
            if D_ptr is not None:
                du += D * dy
                dD += dy * u
            if SOFTPLUS:
                ddelta *= tl.sigmoid(raw)
            dbias += ddelta
            tl.store(du_ptr + at, du, mask=in_d)
            tl.store(ddelta_ptr + at, ddelta, mask=in_d)
        tl.debug_barrier()  # the next chunk writes where this one still reads

    tl.store(dA_ptr + b * features * N + state, dA, mask=in_state)
    if D_ptr is not None:
        tl.store(dD_ptr + b * features + d, dD, mask=in_d)
    if bias_ptr is not None:
        tl.store(dbias_ptr + b * features + d, dbias, mask=in_d)


@_jit
def _place(groups, width, BLOCK_D: tl.constexpr):
    """Where this program works: sample, group, block within it, channels (BLOCK_D) and which of them exist."""
    blocks = tl.cdiv(width, BLOCK_D)
    # int64, and with it every offset: B * L * D may exceed 2^31
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    group = program // blocks % groups
    channel = block * BLOCK_D + tl.arange(0, BLOCK_D)
    return program // (blocks * groups), group, block, group * width + channel, channel < width


@_jit
def _step_size(raw, SOFTPLUS: tl.constexpr):
    """The step that delta and its bias ask for, (BLOCK_D) -> (BLOCK_D): raw or its softplus."""
    dt = raw
    if SOFTPLUS:
        # max(raw, 0) + log(1 + w); the quotient gives back what rounding 1 + w lost, all of w where w is tiny
        w = tl.exp(-tl.abs(raw))
        above = 1.0 + w
        dt = tl.maximum(raw, 0.0) + (tl.log(above) - ((above - 1.0) - w) / above)
    return dt
