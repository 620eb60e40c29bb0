"""The selective scan of Mamba in the layout Linear emits, (B, L, D): one operator in front of all its backends.

B batch, L steps, D features, N states of a feature, G groups of features that share B and C. A backend is a module:

    CHUNK: steps between two checkpoints
    available() -> why it cannot be used on this machine, in one line; None where it can
    forward(u, delta, A, B, C, D, z, delta_bias, *, softplus, reverse) -> (y, last_state, checkpoints)
    backward(grad_y, grad_last, u, delta, A, B, C, D, z, delta_bias, checkpoints, *, softplus, reverse)
        -> (du, ddelta, dA, dB, dC, dD, dz, ddelta_bias)

It gets contiguous tensors, none empty: u, z, grad_y (B, L, D) of one dtype; delta (B, L, D), A (D, N), B and C
(B, L, G, N), D and delta_bias (D), grad_last (B, D, N) in float32. D, z, delta_bias and grad_last may be None; so is
then the gradient. `last_state` is (B, D, N). `checkpoints` is (ceil(L / CHUNK), B, D, N), the states before each chunk
in scan order (if reverse, the first chunk ends at t = L - 1): only its own backward reads them, so it may lay out
(D, N) as it likes. Chunked also takes float64 throughout.
"""

import contextlib
import functools
import importlib
import logging
import math
import os
import threading
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_log = logging.getLogger("hasten")

# by name, not by import: each is loaded when it is first asked for, and triton stays in kernels
_MODULES = {
    "chunked": "hasten.functional._scan_chunked",
    "native": "hasten.kernels.scan_native",
    "triton": "hasten.kernels.scan_triton",
    "mamba_ssm": "hasten.kernels.scan_mamba_ssm",
}
_DEVICE = {"native": "cpu", "triton": "cuda", "mamba_ssm": "cuda"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's recurrence along L, (B, L, D) -> (B, L, D): h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, from h = 0.

    y_t = (sum_n C_t h_t + D u_t) * SiLU(z_t), with dt = delta + delta_bias, through softplus if asked. Everything is
    computed in float32, also under autocast, or in float64 if u is; y comes back in u's dtype.

    Args:
        u: (B, L, D).
        delta: step sizes, (B, L, D).
        A: rates, (D, N); negative where a state shall fade.
        B: what enters the states: (B, L, N), (B, L, G, N) with G dividing D, or (D, N), the same at every step.
        C: how the states are read, in one of B's shapes.
        D: what of u passes by the states, (D); None: nothing.
        z: the gate, (B, L, D); None: no gate.
        delta_bias: (D); None: zero.
        delta_softplus: whether dt = softplus(delta + delta_bias).
        reverse: run from t = L - 1 down to 0, which equals flip, scan, flip.
        return_last_state: return (y, last_state) with the state after the last step, (B, D, N), in the dtype computed
            in; if reverse it belongs to t = 0.
        backend: "chunked" (plain torch, everywhere), "native" (CPU), "triton" or "mamba_ssm" (CUDA);
            "ref", a plain loop that can be differentiated twice; "auto": HASTEN_SCAN_BACKEND if that is set, else the
            fastest that works here.

    Raises:
        ValueError: for shapes that do not fit, devices that differ, a dtype that is not floating, or a backend asked
            for that cannot be used here.

    Source: Mamba, arXiv:2312.00752, section 3.

    Example:
        >>> u = delta = B = C = torch.ones(1, 3, 1)
        >>> A = -torch.full((1, 1), 2.0).log()  # halves the state at every step
        >>> selective_scan(u, delta, A, B, C).flatten().tolist()
        [1.0, 1.5, 1.75]
        >>> selective_scan(u, delta, A, B, C, reverse=True).flatten().tolist()
        [1.75, 1.5, 1.0]
    """
    _check(u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    if backend == "auto":
        backend = _auto(str(u.device), u.dtype, return_last_state)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    delta, A = (x.to(dtype).contiguous() for x in (delta, A))
    D, delta_bias = (None if x is None else x.to(dtype).contiguous() for x in (D, delta_bias))
    B, C = _each_step(B.to(dtype), C.to(dtype), u)
    if backend == "ref":
        y, last_state = _reference(u, delta, A, B, C, D, z, delta_bias, softplus=delta_softplus, reverse=reverse)
    else:
        z = None if z is None else z.to(u.dtype).contiguous()
        operands = (u.contiguous(), delta, A, B, C, D, z, delta_bias)
        y, last_state, _ = _selective_scan(*operands, delta_softplus, reverse, backend)
    return (y, last_state) if return_last_state else y


def _check(u: Tensor, *, A: Tensor, B: Tensor, C: Tensor, **others: Tensor | None) -> None:
    if u.dim() != 3 or A.dim() != 2 or u.shape[2] != A.shape[0] or not A.numel():
        raise ValueError(
            "selective_scan: u and A: expected (B, L, D) and (D, N) with D, N >= 1, "
            f"got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    (batch, length, features), states = u.shape, A.shape[1]
    shapes = {"delta": (batch, length, features), "z": (batch, length, features)}
    for name, x in others.items():
        shape = shapes.get(name, (features,))
        if x is not None and x.shape != shape:
            raise ValueError(f"selective_scan: {name}: expected {shape} for u {tuple(u.shape)}, got {tuple(x.shape)}")
    for name, x in (("B", B), ("C", C)):
        groups = x.shape[2] if x.dim() == 4 else 1
        fitting = (batch, length, states), (features, states), (batch, length, groups, states)
        if x.shape not in fitting or groups < 1 or features % groups:
            raise ValueError(
                f"selective_scan: {name}: expected {(batch, length, states)}, {(batch, length, 'G', states)} with G "
                f"dividing {features}, or {(features, states)}, got {tuple(x.shape)}"
            )
    for name, x in {"u": u, "A": A, "B": B, "C": C, **others}.items():
        if x is not None and x.dtype not in _DTYPES:
            raise ValueError(f"selective_scan: {name}: expected a floating dtype, got {x.dtype}; pass {name}.float()")
        if x is not None and x.device != u.device:
            raise ValueError(f"selective_scan: {name}: expected it on {u.device} as u, got {x.device}")


def _each_step(B: Tensor, C: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """B and C in any of their shapes -> both (B, L, G, N) with one G; what is constant has G = D."""
    wide = [x.expand(*u.shape[:2], *x.shape) if x.dim() == 2 else x.unsqueeze(2) if x.dim() == 3 else x for x in (B, C)]
    groups = math.lcm(*(x.shape[2] for x in wide))
    B, C = (x.contiguous() if x.shape[2] == groups else x.repeat_interleave(groups // x.shape[2], dim=2) for x in wide)
    return B, C


def _reference(
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
) -> tuple[Tensor, Tensor]:
    """The loop over t that autograd can follow to any order; only elementwise products, which autocast leaves alone."""
    dt = delta if delta_bias is None else delta + delta_bias
    if softplus:
        dt = F.softplus(dt)
    features = u.shape[2]
    wide = u.to(dt.dtype)
    x = dt * wide
    y = torch.zeros_like(wide) if D is None else wide * D
    state = A.new_zeros(len(u), *A.shape)
    outputs: list[Tensor] = []
    steps = range(u.shape[1])
    for t in reversed(steps) if reverse else steps:
        b, c = (rows[:, t].repeat_interleave(features // rows.shape[2], dim=1) for rows in (B, C))  # (B, D, N)
        state = torch.exp(dt[:, t, :, None] * A) * state + x[:, t, :, None] * b
        outputs.append((state * c).sum(-1))
    if outputs:
        y = y + torch.stack(outputs[::-1] if reverse else outputs, dim=1)
    if z is not None:
        y = y * F.silu(z.to(dt.dtype))
    return y.to(u.dtype), state


# the choice of a backend


@functools.cache
def _backend(name: str) -> ModuleType | str:
    """A backend's module, or why there is none."""
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as error:
        return str(error)
    return module.available() or module


def _obstacle(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot scan tensors of this device type and dtype; None where it can."""
    if device not in (_DEVICE.get(name, device), "meta"):
        return f"it needs tensors on {_DEVICE[name]}"
    if dtype == torch.float64 and name != "chunked":
        return "it does not compute in float64"
    backend = _backend(name)
    return backend if isinstance(backend, str) else None


def _usable(name: str, device: str, dtype: torch.dtype) -> ModuleType:
    """The module of a backend that was asked for by name."""
    if name not in _MODULES:
        names = ", ".join(("auto", *_MODULES, "ref"))
        raise ValueError(f"selective_scan: backend: expected one of {names}, got {name!r}")
    backend = _obstacle(name, device, dtype) or _backend(name)
    if isinstance(backend, str):
        raise ValueError(
            f"selective_scan: backend: expected one that takes {dtype} on {device} here, got {name!r}: {backend}; "
            "use backend='auto'"
        )
    return backend


@torch.compiler.assume_constant_result
def _auto(device: str, dtype: torch.dtype, return_last_state: bool) -> str:
    """The name of the backend: what the environment says, else the fastest that works."""
    named = os.environ.get("HASTEN_SCAN_BACKEND") or "auto"
    if named != "auto":
        return named
    # the gradient of the last state is beyond mamba_ssm's kernel
    cuda = ("triton",) if return_last_state else ("mamba_ssm", "triton")
    return _fastest({"cpu": ("native",), "cuda": cuda}.get(torch.device(device).type, ()), device, dtype)


@functools.cache
def _fastest(names: tuple[str, ...], device: str, dtype: torch.dtype) -> str:
    """The first of them that is right on a small scan, chunked where none is; one log line says which, and why."""
    chosen, passed_over = "chunked", ""
    for name in names:
        fault = _fault(name, device, dtype)
        if fault is None:
            chosen = name
            break
        passed_over += f"; not {name}: {fault}"
    _log.info("selective_scan: backend %s on %s, %s%s", chosen, device, dtype, passed_over)
    return chosen


@functools.cache
def _fault(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend is not to be used: it cannot be, it fails, or it is not chunked's equal on a small scan."""
    faults: list[str | None] = []

    def look() -> None:
        try:
            faults.append(_obstacle(name, torch.device(device).type, dtype) or _difference(name, device))
        except Exception as error:  # whatever a compiler, a driver or a wheel may throw: auto goes on without it
            faults.append(" ".join(str(error).split()) or type(error).__name__)

    # a thread of its own: FakeTensor, FLOP counters, autocast and default devices are the caller's, and stay there
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return faults[0]


def _difference(name: str, device: str) -> str | None:
    """How far a backend is from chunked, gradients included; None where no further than float32's rounding."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    u, delta, z, grad_y = (draw(2, 37, 32) for _ in range(4))
    operands = (u, delta, -16 * draw(32, 16).abs(), draw(2, 37, 2, 16), draw(2, 37, 2, 16), draw(32), z, draw(32))
    results = []
    for backend, where in ((name, device), ("chunked", "cpu")):  # on CUDA, chunked's matmuls may be TF32's
        gradient, *here = (x.to(where) for x in (grad_y, *operands))
        y, last_state, checkpoints = _selective_scan(*here, True, True, backend)
        gradients = _selective_scan_backward(gradient, None, *here, checkpoints, True, True, backend)
        results.append([x.cpu() for x in (y, last_state, *gradients)])
    errors = [(x - exact).abs().max() / exact.abs().max() for x, exact in zip(*results, strict=True)]
    worst = torch.stack(errors).max().item()  # NaN if there is one anywhere
    return None if worst < 1e-4 else f"it is off by {worst:.1e}"


# the operators


@torch.library.custom_op("hasten::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last_state, checkpoints) of the module's docstring."""
    if not u.numel():
        return _scan_shapes(u, delta, A, backend)
    module = _usable(backend, u.device.type, u.dtype)
    with _island(u):
        return module.forward(u, delta, A, B, C, D, z, delta_bias, softplus=softplus, reverse=reverse)


@torch.library.custom_op("hasten::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
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
    softplus: bool,
    reverse: bool,
    backend: str,
) -> list[Tensor]:
    """The eight gradients; for a missing operand an empty tensor, since an operator cannot return None."""
    operands = (u, delta, A, B, C, D, z, delta_bias)
    if not u.numel():
        return _gradient_shapes(u, *operands)
    module = _usable(backend, u.device.type, u.dtype)
    with _island(u):
        gradients = module.backward(grad_y, grad_last, *operands, checkpoints, softplus=softplus, reverse=reverse)
    return [u.new_empty(0) if x is None else x for x in gradients]


@contextlib.contextmanager
def _island(u: Tensor) -> Iterator[None]:
    """On u's device and without autocast, which reaches into operators it does not know."""
    with torch.cuda.device_of(u), torch.autocast(u.device.type, enabled=False):
        yield


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, backend):
    return _scan_shapes(u, delta, A, backend)


@_selective_scan_backward.register_fake
def _(grad_y, grad_last, u, delta, A, B, C, D, z, delta_bias, checkpoints, softplus, reverse, backend):
    return _gradient_shapes(u, u, delta, A, B, C, D, z, delta_bias)


def _scan_shapes(u: Tensor, delta: Tensor, A: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    chunk = _usable(backend, u.device.type, u.dtype).CHUNK
    chunks = (u.shape[1] + chunk - 1) // chunk
    return torch.empty_like(u), delta.new_zeros(len(u), *A.shape), delta.new_empty(chunks, len(u), *A.shape)


def _gradient_shapes(u: Tensor, *operands: Tensor | None) -> list[Tensor]:
    return [u.new_empty(0) if x is None else torch.zeros_like(x) for x in operands]


def _keep(ctx, inputs, output) -> None:
    *operands, ctx.softplus, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*operands, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_y, grad_last, grad_checkpoints):
    *operands, checkpoints = ctx.saved_tensors
    grad_y = torch.zeros_like(operands[0]) if grad_y is None else grad_y.contiguous()
    grad_last = None if grad_last is None else grad_last.contiguous()
    gradients = _selective_scan_backward(
        grad_y, grad_last, *operands, checkpoints, ctx.softplus, ctx.reverse, ctx.backend
    )
    present = (None if x is None else gradient for x, gradient in zip(operands, gradients, strict=True))
    return *present, None, None, None


def _refuse(ctx, *gradients):
    raise RuntimeError(
        "selective_scan: expected to be differentiated once, got a gradient of its gradient; use backend='ref'"
    )


_selective_scan.register_autograd(_differentiate, setup_context=_keep)
_selective_scan_backward.register_autograd(_refuse)


@register_flop_formula(torch.ops.hasten.selective_scan)
def _flops(u, delta, A, B, C, D, z, *others, out_shape=None, **kwargs) -> int:
    """9 a state and step, the count that papers on vision Mambas use, and one a feature and step each for D and z."""
    batch, length, features = u
    return batch * length * features * (9 * A[1] + (D is not None) + (z is not None))


@register_flop_formula(torch.ops.hasten.selective_scan_backward)
def _backward_flops(grad_y, grad_last, u, delta, A, B, C, D, z, *others, out_shape=None, **kwargs) -> int:
    """Twice the forward pass, as for a matmul: 18 a state and step, where 19 are done with the states rebuilt."""
    return 2 * _flops(u, delta, A, B, C, D, z)
