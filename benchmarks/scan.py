"""The selective scan beside its peers, in one process: time, extra memory, and errors against float64.

    python benchmarks/scan.py                    # on the GPU if there is one, else one CPU core; two minutes
    python benchmarks/scan.py --device cpu

Every arm computes the whole operation (softplus of the steps, D, gate) on the same float32 inputs, and the gradients of
all eight. Arms take turns; the times are those of this process alone, in one thread, and the least of all rounds.

    chunked, native, triton, mamba_ssm, ref: selective_scan(backend=...)
    pscan           mambapy's parallel scan, over decays and inputs (B, L, D, N)
    unbind loop     one step after another under autograd, never a (B, L, D, N): the fair simple peer
    indexing loop   decays and inputs (B, L, D, N), read by x[:, t], as mamba_ssm's selective_scan_ref does: autograd
                    fills a whole gradient with zeros at each step. Timed twice only, as is ref, and not at L = 1024

Extra memory is the peak over the inputs of one forward and backward, outputs and gradients included: on a CPU of the
resident set, in a fresh process for each arm, on a GPU of what torch's allocator hands out. What is absent is said.

A scan by cumsums of log decays is not shipped: exp(-sum) leaves float32 where a chunk's decays sum up to -80. Its error
at steps around 8 is beside those of the others. On a GPU a copy gives the bandwidth, and a forward's share of it is by
the bytes that any scan has to move: u, delta, z, y, B and C, once each.

--check exits with 1 where, on a CPU at L = 197, chunked with its backward pass is not 4 times as fast as pscan or
slower than the unbind loop, takes more than a quarter of pscan's extra memory or a third of the unbind loop's; where
native is not 2.5 times as fast as both loops; or where a backend's error reaches 1e-5 anywhere.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from common import Results, argument_parser, command, markdown_table, result_path
from timing import Work, extra_memory, in_turns
from torch import Tensor

from hasten.functional import selective_scan

FORWARD, BOTH, MEMORY, COPY, HERE = "forward", "forward + backward", "extra memory", "copy", "runs here"
BACKENDS = ("chunked", "native", "triton", "mamba_ssm", "ref")
LOOPS = ("unbind loop", "indexing loop")
SLOW = ("ref", "indexing loop")
ERRORS = {"usual": "largest error, steps of 0.001 to 0.1", "large": "largest error, steps around 8"}
ERROR_TARGET = 1e-5
TINY = (2, 9, 8, 4)
COPIED = 2**29  # bytes, far beyond any cache

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sizes:
    """How much of everything; a shape is (B, L, D, N)."""

    shapes: tuple[Shape, ...] = ((8, 197, 384, 16), (8, 1024, 384, 16))
    dtypes: tuple[str, ...] = ("float32",)  # of u, z and y
    arms: tuple[str, ...] = ("chunked", "native", "ref", "pscan", *LOOPS)
    repeats: tuple[int, ...] = (15, 5)  # for each shape
    slow_repeats: int = 2
    error_shape: Shape = (8, 197, 384, 16)


GPU = Sizes(
    shapes=((128, 197, 384, 16), (128, 197, 768, 16), (64, 197, 1536, 16), (8, 1024, 384, 16)),
    dtypes=("float32", "bfloat16"),
    arms=("triton", "mamba_ssm", "chunked"),
    repeats=(30, 30, 30, 30),
)
DRY_RUN = Sizes(shapes=(TINY, (2, 17, 8, 4)), repeats=(2, 2), error_shape=TINY)


class Operands(NamedTuple):
    """What a scan takes: u, delta, z (B, L, D), A (D, N), B, C (B, L, N), D, delta_bias (D)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    delta_bias: Tensor


Scan = Callable[[Operands], Tensor]


def draw(shape: Shape, *, steps: str = "usual", dtype: str = "float32", device: str = "cpu") -> Operands:
    """Operands as a Mamba has them after its initialization, or with steps around 8; always the same."""
    batch, length, features, states = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    step = torch.full((features,), 8.0)
    if steps == "usual":
        step = torch.empty(features).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
    operands = Operands(
        u=normal(batch, length, features).to(getattr(torch, dtype)),
        delta=0.3 * normal(batch, length, features),
        A=-torch.arange(1.0, states + 1).repeat(features, 1),
        B=normal(batch, length, states),
        C=normal(batch, length, states),
        D=torch.ones(features),
        z=normal(batch, length, features).to(getattr(torch, dtype)),
        delta_bias=step.expm1().log(),  # the inverse of softplus
    )
    return Operands(*(x.to(device).requires_grad_() for x in operands))


# ---------------------------------------------------------------------- the arms


def backend(name: str, x: Operands) -> Tensor:
    """Ours."""
    inputs = x.u, x.delta, x.A, x.B, x.C, x.D, x.z
    return cast(Tensor, selective_scan(*inputs, delta_bias=x.delta_bias, delta_softplus=True, backend=name))


def pscan(x: Operands) -> Tensor:
    """The parallel scan of mambapy."""
    from mambapy.pscan import pscan as parallel_scan

    dt = F.softplus(x.delta + x.delta_bias)
    decays = torch.exp(dt.unsqueeze(-1) * x.A)
    states = parallel_scan(decays, (dt * x.u).unsqueeze(-1) * x.B.unsqueeze(2))
    return _gated((states @ x.C.unsqueeze(-1)).squeeze(-1), x)


def unbind_loop(x: Operands) -> Tensor:
    """States as (B, N, D): of the ways to write this loop the fastest that was found."""
    dt = F.softplus(x.delta + x.delta_bias)
    rates = x.A.mT.contiguous()
    state = x.A.new_zeros(len(x.u), *rates.shape)
    outputs = []
    for dt_t, u_t, b_t, c_t in zip(*(rows.unbind(1) for rows in (dt, dt * x.u, x.B, x.C)), strict=True):
        decay = torch.exp(dt_t.unsqueeze(1) * rates)
        state = torch.addcmul(decay * state, u_t.unsqueeze(1), b_t.unsqueeze(-1))
        outputs.append((state * c_t.unsqueeze(-1)).sum(1))
    return _gated(torch.stack(outputs, dim=1), x)


def indexing_loop(x: Operands) -> Tensor:
    """Everything that enters the states is laid out first, then read step by step."""
    dt = F.softplus(x.delta + x.delta_bias)
    decays = torch.exp(dt.unsqueeze(-1) * x.A)
    entering = (dt * x.u).unsqueeze(-1) * x.B.unsqueeze(2)
    state = x.A.new_zeros(len(x.u), *x.A.shape)
    outputs = []
    for t in range(x.u.shape[1]):
        state = decays[:, t] * state + entering[:, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, x.C[:, t]))
    return _gated(torch.stack(outputs, dim=1), x)


def log_space_cumsum(x: Operands, chunk: int = 16) -> Tensor:
    """h_t = exp(S_t) (h_0 + sum exp(-S_s) x_s) with S the running sum of dt A, chunk by chunk."""
    dt = F.softplus(x.delta + x.delta_bias)
    state = x.A.new_zeros(len(x.u), 1, *x.A.shape)
    outputs = []
    for dt_c, u_c, b_c, c_c in zip(*(rows.split(chunk, 1) for rows in (dt, dt * x.u, x.B, x.C)), strict=True):
        decays = (dt_c.unsqueeze(-1) * x.A).cumsum(1).clamp(min=-80)  # beyond, exp(-S) is inf, and inf times 0 NaN
        states = decays.exp() * (state + (u_c.unsqueeze(-1) * b_c.unsqueeze(2) * (-decays).exp()).cumsum(1))
        state = states[:, -1:]
        outputs.append((states @ c_c.unsqueeze(-1)).squeeze(-1))
    return _gated(torch.cat(outputs, dim=1), x)


def _gated(y: Tensor, x: Operands) -> Tensor:
    return (y + x.D * x.u) * F.silu(x.z)


ARMS: dict[str, Scan] = {
    **{name: partial(backend, name) for name in BACKENDS},
    "pscan": pscan,
    "unbind loop": unbind_loop,
    "indexing loop": indexing_loop,
}


@cache
def absence(arm: str, device: str) -> str | None:
    """Why an arm cannot run on this machine; None where it can."""
    try:
        forward_and_backward(ARMS[arm], draw(TINY, device=device))()
    except (ImportError, ValueError) as error:
        return str(error)
    return None


def forward_and_backward(scan: Scan, operands: Operands) -> Work:
    """The work of a training step, on a gradient of one at every output."""
    ones = torch.ones_like(operands.u)
    return lambda: torch.autograd.grad(scan(operands), operands, ones)


def build(arm: str, shape: Shape, dtype: str, device: str) -> Work:
    """The same, by names, as another process has to be told."""
    return forward_and_backward(ARMS[arm], draw(shape, dtype=dtype, device=device))


# ---------------------------------------------------------------------- measuring


def measure(shape: Shape, dtype: str, repeats: int, sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Times and memory of all arms at a shape."""
    operands = draw(shape, dtype=dtype, device=device.type)
    fast = [arm for arm in sizes.arms if absence(arm, device.type) is None and arm not in SLOW]
    slow = [arm for arm in sizes.arms if arm in SLOW and shape == sizes.shapes[0]]
    rows = []
    for what, work in ((FORWARD, partial), (BOTH, forward_and_backward)):
        works: dict[str, Work] = {arm: work(ARMS[arm], operands) for arm in fast}
        if device.type == "cuda":
            works[COPY] = _copy()
        times = in_turns(works, device, repeats=repeats)
        works = {arm: work(ARMS[arm], operands) for arm in slow}
        times |= in_turns(works, device, repeats=min(repeats, sizes.slow_repeats))
        rows += [{"claim": claim(what, shape, dtype), "arm": arm, **time.row()} for arm, time in times.items()]
        if device.type == "cuda" and what == FORWARD:
            add_shares(rows, shape, dtype)
    for arm in fast + slow:
        tiny = (arm, TINY, dtype, device.type)
        used = extra_memory(build, (arm, shape, dtype, device.type), warm_up=tiny, device=device)
        if used is not None:
            rows.append({"claim": claim(MEMORY, shape, dtype), "arm": arm, "value": used, "unit": "MB, peak"})
    return rows


def presence_rows(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """Which arms run on this machine, and why others do not."""
    reasons = {arm: absence(arm, device.type) for arm in sizes.arms}
    return [{"claim": HERE, "arm": arm, "value": why is None, "reason": why} for arm, why in reasons.items()]


def claim(what: str, shape: Shape, dtype: str) -> str:
    """What a row is about."""
    return f"{what}, {shape} {dtype}"


def _copy() -> Work:
    source = torch.zeros(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def add_shares(rows: list[dict[str, Any]], shape: Shape, dtype: str) -> None:
    """Add to each forward the share of a copy's bandwidth at which it moves what has to be moved."""
    batch, length, features, states = shape
    element = getattr(torch, dtype).itemsize
    moved = batch * length * (features * (3 * element + 4) + 2 * states * 4)
    copied = next(row["value"] for row in rows if row["arm"] == COPY)
    for row in rows:
        if row["arm"] != COPY:
            row["bandwidth_share"] = (moved / row["value"]) / (2 * COPIED / copied)


def error_rows(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """The largest error of the output and of all gradients, of each relative to its largest entry in float64."""
    rows = []
    for steps, name in ERRORS.items():
        operands = draw(sizes.error_shape, steps=steps, device=device.type)
        gradient = torch.randn(operands.u.shape, generator=torch.Generator().manual_seed(1)).to(device)
        doubles = Operands(*(x.detach().double().requires_grad_() for x in operands))
        exact = _with_gradients(ARMS["ref"], doubles, gradient)
        names = ("y", *(f"d{field}" for field in Operands._fields))
        for arm in sizes.arms:
            if absence(arm, device.type) is None:
                found = _with_gradients(ARMS[arm], operands, gradient)
                errors = {n: _error(x, e) for n, x, e in zip(names, found, exact, strict=True)}
                # not max(), which may pass over a NaN
                worst = torch.tensor(list(errors.values())).max().item()
                rows.append({"claim": name, "arm": arm, "value": worst, "unit": "relative error", "errors": errors})
        with torch.no_grad():
            value = _error(log_space_cumsum(operands), exact[0])
        rows.append({"claim": name, "arm": "log-space cumsum", "value": value, "unit": "relative error"})
        rows[-1]["largest"] = exact[0].abs().max().item()
    return rows


def _with_gradients(scan: Scan, operands: Operands, gradient: Tensor) -> list[Tensor]:
    y = scan(operands)
    return [y.detach(), *torch.autograd.grad(y, operands, gradient.to(y.dtype))]


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).abs().max() / exact.abs().max()).item()


# ---------------------------------------------------------------------- the report


def report(results: Results, sizes: Sizes, device: torch.device) -> str:
    """What was measured, as Markdown."""
    tables = []
    for shape in sizes.shapes:
        for dtype in sizes.dtypes:
            columns = [values(results, claim(what, shape, dtype)) for what in (FORWARD, BOTH, MEMORY)]
            header = [f"{shape}, {dtype}", f"{FORWARD}, ms", f"{BOTH}, ms", f"{MEMORY}, MB"]
            lines = [[arm, *(_cell(column.get(arm), ".4g") for column in columns)] for arm in columns[0]]
            if device.type == "cuda":
                header.append("of a copy's bandwidth")
                for line, row in zip(lines, results.select(claim=claim(FORWARD, shape, dtype)), strict=True):
                    line.append(_cell(row.get("bandwidth_share"), ".0%"))
            tables.append(markdown_table(header, lines))
    errors = [values(results, name) for name in ERRORS.values()]
    lines = [[arm, *(_cell(column.get(arm), ".1e") for column in errors)] for arm in errors[0]]
    tables.append(markdown_table(["", *ERRORS.values()], lines))
    return "\n\n".join([*tables, absent(results)]).rstrip()


def absent(results: Results) -> str:
    """The arms that could not run, and why, a line each."""
    return "\n".join(f"- {row['arm']}: {row['reason']}" for row in results.select(claim=HERE, value=False))


def values(results: Results, claim: str) -> dict[str, float]:
    """Arm -> number."""
    return {row["arm"]: row["value"] for row in results.select(claim=claim)}


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def failures(results: Results, shape: Shape) -> list[str]:
    """What the measurement at a shape fails to show, a line each."""
    times, memory = (values(results, claim(what, shape, "float32")) for what in (BOTH, MEMORY))
    wanted = [
        ("as fast as", times, "chunked", "pscan", 4.0),
        ("as fast as", times, "chunked", "unbind loop", 1.0),
        ("less memory than", memory, "chunked", "pscan", 4.0),
        ("less memory than", memory, "chunked", "unbind loop", 3.0),
        *(("as fast as", times, "native", loop, 2.5) for loop in LOOPS),
    ]
    found = []
    for what, column, ours, peer, factor in wanted:
        if ours not in column or peer not in column:
            found.append(f"{ours}, {what} {peer}: not measured")
        elif column[peer] < factor * column[ours]:
            found.append(f"{ours}: expected {factor:g} times {what} {peer}, got {column[peer] / column[ours]:.2f}")
    return found


def error_failures(results: Results) -> list[str]:
    """The backends that are not exact enough, a line each."""
    return [
        f"{arm}: expected an error below {ERROR_TARGET:g}, got {error:.1e} ({name})"
        for name in ERRORS.values()
        for arm, error in values(results, name).items()
        if arm in BACKENDS and not error < ERROR_TARGET
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, then report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() and not options.dry_run else "cpu"))
    torch.set_num_threads(1)
    sizes = DRY_RUN if options.dry_run else GPU if device.type == "cuda" else Sizes()
    protocol = {"device": device.type, "inputs": "float32 but for u and z; eight gradients", **asdict(sizes)}
    path = result_path(options, f"scan_{device.type}")
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)
    results.add(*presence_rows(sizes, device))
    for shape, repeats in zip(sizes.shapes, sizes.repeats, strict=True):
        for dtype in sizes.dtypes:
            results.add(*measure(shape, dtype, repeats, sizes, device))
    results.add(*error_rows(sizes, device))
    print(report(results, sizes, device))
    if options.check:
        failed = error_failures(results) + (failures(results, sizes.shapes[0]) if device.type == "cpu" else [])
        if failed:
            raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
