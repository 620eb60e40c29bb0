"""The selective scan: every backend that runs here against the loop in float64, the loop against two loops."""

import importlib.util
import itertools
import logging
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hasten.functional import _scan_chunked, scan, selective_scan
from hasten.kernels import scan_mamba_ssm

BACKENDS = [name for name in scan._MODULES if scan._obstacle(name, "cpu", torch.float32) is None]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def problem(batch=2, length=19, features=8, states=4, *, groups=None, without=(), large=False, dtype=torch.float64):
    """Leaves by name; B and C, or a pair of them, (B, L, N), (B, L, groups, N) or (D, N) if "constant"."""
    shapes = {None: (batch, length, states), "constant": (features, states)}
    of_b, of_c = groups if isinstance(groups, tuple) else (groups, groups)
    # large is dt of about 8, where exp(sum dt A) leaves every floating point range
    drawn = {
        "u": torch.randn(batch, length, features),
        "delta": torch.randn(batch, length, features) + (8 if large else 0),
        "A": -torch.arange(1.0, states + 1).repeat(features, 1) * torch.rand(features, 1).add(0.5),
        "B": torch.randn(shapes.get(of_b) or (batch, length, of_b, states)),
        "C": torch.randn(shapes.get(of_c) or (batch, length, of_c, states)),
        "D": torch.randn(features),
        "z": torch.randn(batch, length, features),
        "delta_bias": torch.randn(features) * 0.1,
    }
    return {name: x.to(dtype).requires_grad_() for name, x in drawn.items() if name not in without}


def outcome(inputs, *, dtype, backend, weights=None, **options):
    """y, last_state and the gradients of a random weighting of both."""
    inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    options = {"delta_softplus": True, **options}
    y, last_state = selective_scan(**inputs, return_last_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(dtype)).sum() for x in (y, last_state))
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {"y": y, "last_state": last_state, **dict(zip(inputs, gradients, strict=True))}


def assert_close(got, exact, tolerance=1e-5):
    assert got.keys() == exact.keys()
    for name, x in got.items():
        assert x.shape == exact[name].shape and x.is_contiguous(), name
        error = (x.double() - exact[name]).abs().max() / exact[name].abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


def two_loops(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, reverse=False):
    """One sample, one feature, one step at a time, in Python's numbers."""
    batch, length, features = u.shape
    y = torch.zeros(batch, length, features, dtype=torch.float64)
    last = torch.zeros(batch, features, A.shape[1], dtype=torch.float64)
    for i, d in itertools.product(range(batch), range(features)):

        def row(x, t, i=i, d=d):
            if x.dim() == 2:
                return x[d].tolist()
            return x[i, t].tolist() if x.dim() == 3 else x[i, t, d * x.shape[2] // features].tolist()

        h = [0.0] * A.shape[1]
        for t in reversed(range(length)) if reverse else range(length):
            raw = delta[i, t, d].item() + (0 if delta_bias is None else delta_bias[d].item())
            dt = math.log1p(math.exp(raw))
            a, b, c = A[d].tolist(), row(B, t), row(C, t)
            h = [math.exp(dt * a[n]) * h[n] + dt * u[i, t, d].item() * b[n] for n in range(len(h))]
            out = sum(c[n] * h[n] for n in range(len(h))) + (0 if D is None else D[d].item() * u[i, t, d].item())
            gate = 1 if z is None else z[i, t, d].item() / (1 + math.exp(-z[i, t, d].item()))
            y[i, t, d] = out * gate
        last[i, d] = torch.tensor(h)
    return y, last


VARIANTS = [
    {},
    {"reverse": True},
    {"groups": 1},
    {"groups": 2, "reverse": True},
    {"groups": "constant"},
    {"groups": ("constant", None), "reverse": True},
    {"groups": (2, 3), "features": 6},
    {"without": ("D",)},
    {"without": ("z",), "reverse": True},
    {"without": ("D", "z", "delta_bias"), "groups": 4},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_reference_is_what_two_loops_over_numbers_give(variant):
    variant = dict(variant)
    reverse = variant.pop("reverse", False)
    inputs = problem(length=5, **variant)
    y, last = selective_scan(**inputs, delta_softplus=True, reverse=reverse, return_last_state=True, backend="ref")
    expected_y, expected_last = two_loops(**inputs, reverse=reverse)
    torch.testing.assert_close(y.detach(), expected_y)
    torch.testing.assert_close(last.detach(), expected_last)


# every backend against the reference in float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_backend_is_the_reference_in_its_results_and_gradients(backend, variant):
    variant = dict(variant)
    options = {"reverse": variant.pop("reverse", False)}
    inputs = problem(**variant)
    exact = outcome(inputs, dtype=torch.float64, backend="ref", **options)
    assert_close(outcome(inputs, dtype=torch.float32, backend=backend, **options), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", ["one", "a step less", "a chunk", "a step more", "three and a step"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_backend_is_right_where_chunks_end(backend, offset, reverse):
    chunk = min(scan._usable(backend, "cpu", torch.float32).CHUNK, 64)
    lengths = {"one": 1, "a step less": chunk - 1, "a chunk": chunk, "a step more": chunk + 1}
    inputs = problem(length=lengths.get(offset, 3 * chunk + 1))
    exact = outcome(inputs, dtype=torch.float64, backend="ref", reverse=reverse)
    assert_close(outcome(inputs, dtype=torch.float32, backend=backend, reverse=reverse), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("large", [False, True])
def test_a_backend_is_right_over_the_tokens_of_an_image_also_at_large_steps(backend, large):
    inputs = problem(length=197, features=24, states=16, large=large)
    exact = outcome(inputs, dtype=torch.float64, backend="ref")
    assert_close(outcome(inputs, dtype=torch.float32, backend=backend), exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reverse_scan_is_flip_scan_flip(backend):
    inputs = problem(dtype=torch.float32)
    flipped = {name: x.flip(1) if x.dim() == 3 else x for name, x in inputs.items()}
    expected, expected_last = selective_scan(**flipped, return_last_state=True, backend=backend)
    y, last = selective_scan(**inputs, reverse=True, return_last_state=True, backend=backend)
    torch.testing.assert_close(y, expected.flip(1))
    torch.testing.assert_close(last, expected_last)


@pytest.mark.parametrize("backend", [*BACKENDS, "ref"])
@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)])
def test_nothing_to_scan_gives_nothing_of_the_right_shape(backend, sizes):
    inputs = problem(*sizes, dtype=torch.float32)
    y, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    assert y.shape == (*sizes, 8)
    assert torch.equal(last, torch.zeros(sizes[0], 8, 4))
    (y.sum() + last.sum()).backward()
    assert all(x.grad is None or not x.grad.any() for x in inputs.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_give_what_their_copies_give(backend):
    inputs = problem(dtype=torch.float32)
    views = {name: torch.stack([x, x], dim=-1)[..., 0].detach().requires_grad_() for name, x in inputs.items()}
    assert not views["u"].is_contiguous()
    (y, of_views) = (selective_scan(**of, delta_softplus=True, backend=backend) for of in (inputs, views))
    assert torch.equal(y, of_views)
    got, expected = (
        torch.autograd.grad(out.mT.square().sum(), list(of.values())) for out, of in ((y, inputs), (of_views, views))
    )
    for x, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(x, exact)


@pytest.mark.parametrize("backend", [*BACKENDS, "ref"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spreads_forward_in_its_own_sample(backend, value):
    inputs = {name: x.detach() for name, x in problem(length=12, without=("z",), dtype=torch.float32).items()}
    clean = selective_scan(**inputs, delta_softplus=True, backend=backend)
    inputs["u"][0, 5, 3] = value
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert not y[0, 5:, 3].isfinite().any()
    assert torch.equal(y[1], clean[1])
    assert torch.equal(y[0, :5], clean[0, :5])


@pytest.mark.parametrize("backend", [*BACKENDS, "ref"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_such_and_is_scanned_in_float32(backend, dtype):
    inputs = problem(dtype=torch.float32)
    halves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    y, last = selective_scan(**halves, delta_softplus=True, return_last_state=True, backend=backend)
    assert y.dtype == dtype and last.dtype == torch.float32
    exact = outcome(halves, dtype=torch.float64, backend="ref")
    assert (y - exact["y"]).abs().max() < torch.finfo(dtype).eps * exact["y"].abs().max()
    assert (last - exact["last_state"]).abs().max() < 1e-5 * exact["last_state"].abs().max()
    y.sum().backward()
    assert all(x.grad.dtype == dtype for x in halves.values())


@pytest.mark.parametrize("backend", [*BACKENDS, "ref"])
def test_autocast_changes_nothing(backend):
    inputs = problem(dtype=torch.float32)
    expected = outcome(inputs, dtype=torch.float32, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = outcome(inputs, dtype=torch.float32, backend=backend)
    assert all(torch.equal(got[name], x) for name, x in expected.items())


# the operators


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")], ids=str)
def test_chunked_passes_gradcheck(reverse, without):
    inputs = problem(2, 10, 4, 2, groups=2, without=without)

    def of(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, reverse=reverse, return_last_state=True, backend="chunked")

    assert torch.autograd.gradcheck(of, list(inputs.values()), fast_mode=True)


def test_the_reference_can_be_differentiated_twice():
    inputs = problem(1, 3, 2, 2)

    def of(*tensors):
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), delta_softplus=True, backend="ref")

    assert torch.autograd.gradgradcheck(of, list(inputs.values()), fast_mode=True)


def test_the_operator_says_that_it_cannot_be_differentiated_twice():
    inputs = problem(dtype=torch.float32)
    y = selective_scan(**inputs, backend="chunked")
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='ref'"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")], ids=str)
def test_both_operators_pass_opcheck(backend, without):
    inputs = problem(groups=2, without=without, dtype=torch.float32)
    operands = [inputs.get(name) for name in NAMES]
    torch.library.opcheck(scan._selective_scan, (*operands, True, True, backend))
    detached = [None if x is None else x.detach() for x in operands]
    y, last, checkpoints = scan._selective_scan(*detached, True, True, backend)
    torch.library.opcheck(scan._selective_scan_backward, (y, last, *detached, checkpoints, True, True, backend))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_the_scan_compiles_into_one_graph_with_its_gradients(backend):
    inputs = problem(dtype=torch.float32)
    expected = outcome(inputs, dtype=torch.float32, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    y, last = compiled(**inputs, delta_softplus=True, return_last_state=True, backend=backend)
    assert torch.equal(y, expected["y"]) and torch.equal(last, expected["last_state"])
    y.sum().backward()
    assert all(x.grad is not None for x in inputs.values())


@pytest.mark.usefixtures("_afresh")  # auto's look at native happens among fake tensors then
@pytest.mark.parametrize("backend", [*BACKENDS, "ref", "auto"])
def test_fake_tensors_pass_through(backend):
    with FakeTensorMode():
        inputs = problem(dtype=torch.float32)
        y, last = selective_scan(**inputs, return_last_state=True, backend=backend)
        y.sum().backward()
    assert y.shape == (2, 19, 8) and last.shape == (2, 8, 4)
    assert inputs["B"].grad.shape == (2, 19, 4)
    assert backend != "auto" or chosen() == ("native" if "native" in BACKENDS else "chunked")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("without", [(), ("D", "z")], ids=str)
def test_flop_counters_see_the_scan(backend, without):
    inputs = problem(without=without, dtype=torch.float32)
    forward = 2 * 19 * 8 * (9 * 4 + 2 - len(without))
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**inputs, backend=backend)
        assert counter.get_total_flops() == forward
        y.sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_a_batch_is_scanned_in_tiles_as_in_one_piece(monkeypatch):
    inputs = problem(batch=5, dtype=torch.float32)
    whole = outcome(inputs, dtype=torch.float32, backend="chunked")
    monkeypatch.setattr(_scan_chunked, "_BUFFER_BYTES", 2 * _scan_chunked.CHUNK * 8 * 4 * 4)  # two samples
    assert_close(outcome(inputs, dtype=torch.float32, backend="chunked"), whole, tolerance=1e-6)


# the choice of a backend


@pytest.fixture
def _afresh(monkeypatch):
    monkeypatch.delenv("HASTEN_SCAN_BACKEND", raising=False)
    for cached in (scan._backend, scan._fastest, scan._fault):
        cached.cache_clear()
    yield
    for cached in (scan._backend, scan._fastest, scan._fault):
        cached.cache_clear()


def chosen():
    return scan._auto("cpu", torch.float32, False)


@pytest.mark.usefixtures("_afresh")
def test_auto_takes_native_where_it_works_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="hasten"):
        names = {chosen() for _ in range(3)}
    assert names == {"native" if "native" in BACKENDS else "chunked"}
    assert len(caplog.messages) == 1 and f"backend {names.pop()} on cpu" in caplog.messages[0]


@pytest.mark.usefixtures("_afresh")
def test_auto_goes_on_without_a_backend_that_fails_or_is_wrong(monkeypatch, tmp_path, caplog):
    right = "from hasten.functional._scan_chunked import *\nfrom hasten.functional import _scan_chunked as right\n"
    broken = {
        "absent": "import no_such_module",
        "unavailable": right + "def available(): return 'there is no compiler'",
        "crashing": right + "def forward(*args, **options): raise OSError('cannot load')",
        "wrong": right
        + "def forward(*args, **options): y, *rest = right.forward(*args, **options); return y + 1, *rest",
        "not a number": right
        + "def backward(*args, **options): return [x * float('nan') for x in right.backward(*args, **options)]",
    }
    monkeypatch.syspath_prepend(tmp_path)
    said = {
        "absent": "No module named 'no_such_module'",
        "unavailable": "there is no compiler",
        "crashing": "cannot load",
        "wrong": "it is off by",
        "not a number": "it is off by nan",
    }
    for index, (fault, source) in enumerate(broken.items()):
        (tmp_path / f"broken_scan_{index}.py").write_text(source)
        monkeypatch.setitem(scan._MODULES, "native", f"broken_scan_{index}")
        for cached in (scan._backend, scan._fastest, scan._fault):
            cached.cache_clear()
        with caplog.at_level(logging.INFO, logger="hasten"):
            assert chosen() == "chunked"
        assert f"not native: {said[fault]}" in caplog.messages[-1]


@pytest.mark.usefixtures("_afresh")
def test_auto_in_float64_is_chunked():
    assert scan._auto("cpu", torch.float64, False) == "chunked"


@pytest.mark.usefixtures("_afresh")
def test_the_environment_names_the_backend_of_auto(monkeypatch):
    monkeypatch.setenv("HASTEN_SCAN_BACKEND", "ref")
    assert chosen() == "ref"
    monkeypatch.setenv("HASTEN_SCAN_BACKEND", "quick")
    with pytest.raises(ValueError, match=r"expected one of auto, chunked, .*, ref, got 'quick'"):
        selective_scan(**problem(dtype=torch.float32))


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("triton", torch.float32, "it needs tensors on cuda"),
        ("mamba_ssm", torch.float32, "it needs tensors on cuda"),
        ("native", torch.float64, "it does not compute in float64"),
    ],
)
def test_a_backend_that_cannot_run_here_is_refused_with_the_reason(backend, dtype, reason):
    with pytest.raises(ValueError, match=f"got '{backend}': {reason}; use backend='auto'"):
        selective_scan(**problem(dtype=dtype), backend=backend)


# mamba_ssm, by a stand-in for its extension


def extension():
    """What `selective_scan_cuda` offers, with its shapes: u (B, D, L), B and C (B, G, N, L), no gate."""

    def scanned(u, delta, A, B, C, D, delta_bias):
        dt = F.softplus(delta + delta_bias[:, None])
        B, C = (x.repeat_interleave(len(A) // x.shape[1], dim=1) for x in (B, C))
        h, out = torch.zeros(len(u), *A.shape), []
        for t in range(u.shape[2]):
            h = torch.exp(dt[..., t, None] * A) * h + (dt * u)[..., t, None] * B[..., t]
            out.append((h * C[..., t]).sum(-1) + D * u[..., t])
        return torch.stack(out, dim=-1), h

    def fwd(u, delta, A, B, C, D, z, delta_bias, softplus):
        assert z is None and softplus and all(x.is_contiguous() for x in (u, delta, B, C))
        out, last = scanned(u, delta, A, B, C, D, delta_bias)
        return [out, torch.stack([torch.zeros_like(last), last], dim=-1).flatten(-2)[:, :, None]]

    def bwd(u, delta, A, B, C, D, z, delta_bias, dout, x, out, dz, softplus, recompute_out_z):
        assert z is None and softplus and dout.is_contiguous()
        leaves = [leaf.detach().requires_grad_() for leaf in (u, delta, A, B, C, D, delta_bias)]
        with torch.enable_grad():
            return list(torch.autograd.grad(scanned(*leaves)[0], leaves, dout))

    module = types.ModuleType("selective_scan_cuda")
    module.fwd, module.bwd = fwd, bwd
    return module


@pytest.mark.parametrize("reverse", [False, True])
def test_the_door_to_mamba_ssm_transposes_flips_and_gates(monkeypatch, reverse):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", extension())
    assert scan_mamba_ssm.available() is None
    inputs = problem(groups=2, dtype=torch.float32)
    operands = [inputs[name].detach() for name in NAMES]
    grad_y = torch.randn(2, 19, 8)
    results = []
    for backend in (scan_mamba_ssm, _scan_chunked):
        y, last, checkpoints = backend.forward(*operands, softplus=True, reverse=reverse)
        gradients = backend.backward(grad_y, None, *operands, checkpoints, softplus=True, reverse=reverse)
        results.append([y, last, *gradients])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
        assert got.is_contiguous()


@pytest.mark.skipif(importlib.util.find_spec("selective_scan_cuda") is not None, reason="mamba_ssm is installed")
def test_mamba_ssm_says_that_it_is_not_installed():
    assert "selective_scan_cuda does not import" in scan_mamba_ssm.available()


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 8)}, r"u and A: expected \(B, L, D\) and \(D, N\)"),
        ({"A": torch.zeros(7, 4)}, r"got \(2, 19, 8\) and \(7, 4\)"),
        ({"A": torch.zeros(8, 0)}, "N >= 1"),
        ({"delta": torch.zeros(2, 19, 1)}, r"delta: expected \(2, 19, 8\)"),
        ({"z": torch.zeros(2, 18, 8)}, r"z: expected \(2, 19, 8\) .* got \(2, 18, 8\)"),
        ({"D": torch.zeros(1)}, r"D: expected \(8,\)"),
        ({"delta_bias": torch.zeros(8, 1)}, r"delta_bias: expected \(8,\)"),
        ({"B": torch.zeros(2, 4, 19)}, r"B: expected \(2, 19, 4\), .* or \(8, 4\), got \(2, 4, 19\)"),
        ({"C": torch.zeros(2, 19, 3, 4)}, "C: expected .* with G dividing 8"),
        ({"C": torch.zeros(2, 19, 0, 4)}, "C: expected .* with G dividing 8"),
        ({"u": torch.zeros(2, 19, 8, dtype=torch.int64)}, "u: expected a floating dtype, got torch.int64"),
        ({"A": torch.zeros(8, 4, dtype=torch.complex64)}, "A: expected a floating dtype"),
        ({"z": torch.zeros(2, 19, 8, device="meta")}, "z: expected it on cpu as u, got meta"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_any_kernel(change, message):
    with pytest.raises(ValueError, match=message) as error:
        selective_scan(**problem(dtype=torch.float32) | change)
    assert "\n" not in str(error.value)
