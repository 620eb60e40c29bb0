"""The Triton kernels against a slow float64 loop: on the GPU where there is one, else in Triton's interpreter.

Triton decides at its import whether kernels are interpreted, so the interpreter gets a process of its own:
``test_kernels_are_right_in_the_interpreter`` runs this file's kernel tests there. Where there is no GPU they skip here.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hasten.kernels import scan_triton
from hasten.kernels.scan_triton import CHUNK

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")
# not `available()`: were it to refuse in the interpreter, everything would skip and pass
kernel = pytest.mark.skipif(
    not TRITON or not (INTERPRETED or torch.cuda.is_available()), reason="runs on CUDA or in Triton's interpreter"
)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def _operands(batch, length, features, states, *, groups=1, dtype=torch.float32, without=()):
    operands = {
        "u": torch.randn(batch, length, features).to(dtype),
        "delta": torch.randn(batch, length, features) - 1,
        "A": -4 * torch.rand(features, states),
        "B": torch.randn(batch, length, groups, states),
        "C": torch.randn(batch, length, groups, states),
        "D": torch.randn(features),
        "z": torch.randn(batch, length, features).to(dtype),
        "delta_bias": torch.randn(features),
    }
    return [None if name in without else x.to(DEVICE) for name, x in operands.items()]


def _slow_scan(u, delta, A, B, C, D, z, delta_bias, *, softplus, reverse):
    """y (B, L, D) and the last state (B, D, N), one channel group, one step at a time."""
    width = u.shape[2] // B.shape[2]
    dt = delta if delta_bias is None else delta + delta_bias
    dt = F.softplus(dt) if softplus else dt
    state = u.new_zeros(len(u), *A.shape)
    y = [torch.zeros_like(u[:, 0])] * u.shape[1]
    for t in range(u.shape[1])[:: -1 if reverse else 1]:
        b, c = (torch.cat([x[:, t, g, None].expand(-1, width, -1) for g in range(x.shape[2])], 1) for x in (B, C))
        state = torch.exp(dt[:, t, :, None] * A) * state + (dt * u)[:, t, :, None] * b
        y[t] = (state * c).sum(-1)
    y = torch.stack(y, 1)
    y = y if D is None else y + D * u
    return y if z is None else y * F.silu(z), state


def _assert_matches_the_slow_scan(operands, *, softplus=True, reverse=False, grad_last=True):
    y, last, checkpoints = scan_triton.forward(*operands, softplus=softplus, reverse=reverse)
    grad_y = torch.randn(y.shape, device=DEVICE).to(y.dtype)
    grad_last = torch.randn(last.shape, device=DEVICE) if grad_last else None
    gradients = scan_triton.backward(grad_y, grad_last, *operands, checkpoints, softplus=softplus, reverse=reverse)

    exact = [None if x is None else x.double().requires_grad_() for x in operands]
    exact_y, exact_last = _slow_scan(*exact, softplus=softplus, reverse=reverse)
    loss = (exact_y * grad_y).sum() + (0 if grad_last is None else (exact_last * grad_last).sum())
    loss.backward()

    _assert_close("y", y, exact_y, operands[0])
    _assert_close("last_state", last, exact_last, operands[1])
    for name, gradient, operand, x in zip(NAMES, gradients, operands, exact, strict=True):
        if operand is None:
            assert gradient is None, name
        else:
            _assert_close(f"d{name}", gradient, x.grad, operand)


def _assert_close(name, got, exact, like):
    assert got.dtype == like.dtype, name
    assert got.shape == exact.shape, name
    # float32 inside: a narrow output is the exact one rounded once
    tolerance = 1e-5 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
    error, scale = (got.double() - exact).abs().max(), exact.abs().max()
    assert error <= tolerance * scale, f"{name} is off by {error:.1e} where it reaches {scale:.1e}"


@kernel
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 3, 12, 3), 2),  # N is no power of two
        ((1, 2, 35, 2), 1),  # two blocks add up to dB and dC, the second not full
        ((1, 2, 70, 2), 2),  # in each of two groups
        ((1, 2, 4, 1), 4),  # B and C of its own for each channel
        ((1, 1, 5, 4), 1),
        ((1, CHUNK, 8, 4), 1),
        ((2, CHUNK + 1, 12, 4), 1),
    ],
)
def test_outputs_and_gradients_equal_the_slow_scan(shape, groups, reverse):
    _assert_matches_the_slow_scan(_operands(*shape, groups=groups), reverse=reverse)


@kernel
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_what_is_left_out_is_left_out(without):
    _assert_matches_the_slow_scan(_operands(1, 3, 8, 4, without=without), grad_last=False)


@kernel
def test_without_softplus_the_step_is_delta_and_its_bias():
    operands = _operands(1, 3, 8, 4)
    operands[1], operands[7] = operands[1].abs() / 4, operands[7].abs() / 4  # no state grows
    _assert_matches_the_slow_scan(operands, softplus=False)


@kernel
@pytest.mark.parametrize("shift", [-20.0, 8.0, 30.0])
def test_tiny_and_huge_steps_stay_exact(shift):
    operands = _operands(1, 5, 8, 4, without=("D",))
    operands[1] += shift
    _assert_matches_the_slow_scan(operands)


@kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_narrow_inputs_are_scanned_in_float32(dtype, reverse):
    _assert_matches_the_slow_scan(_operands(1, 5, 8, 4, dtype=dtype), reverse=reverse)


@kernel
@pytest.mark.parametrize("reverse", [False, True])
def test_checkpoints_are_the_states_before_each_chunk(reverse):
    operands = _operands(1, CHUNK + 3, 8, 4)
    _, _, checkpoints = scan_triton.forward(*operands, softplus=True, reverse=reverse)
    assert checkpoints.shape == (2, 1, 8, 4)
    assert not checkpoints[0].any()
    part = slice(-CHUNK, None) if reverse else slice(CHUNK)
    first = [x if x is None or x.dim() < 3 else x[:, part].contiguous() for x in operands]
    _, state, _ = scan_triton.forward(*first, softplus=True, reverse=reverse)
    torch.testing.assert_close(checkpoints[1], state)


@kernel
@pytest.mark.parametrize("shape", [(0, 3, 8, 4), (2, 0, 8, 4)])
def test_an_empty_scan_has_empty_outputs_and_zero_gradients(shape):
    operands = _operands(*shape)
    y, last, checkpoints = scan_triton.forward(*operands, softplus=True, reverse=False)
    assert y.shape == operands[0].shape
    assert last.shape == (shape[0], 8, 4) and not last.any()
    gradients = scan_triton.backward(y, None, *operands, checkpoints, softplus=True, reverse=False)
    for gradient, operand in zip(gradients, operands, strict=True):
        assert gradient.shape == operand.shape and not gradient.any()


@kernel
def test_nan_reaches_what_follows_it_in_its_channel_and_nothing_else():
    operands = _operands(1, 5, 8, 3)
    operands[0][0, 2, 1] = float("nan")
    y, _, _ = scan_triton.forward(*operands, softplus=True, reverse=False)
    expected = torch.zeros(1, 5, 8, dtype=torch.bool)
    expected[0, 2:, 1] = True
    assert torch.equal(y.isnan().cpu(), expected)


@kernel
def test_tensors_that_start_off_alignment_are_read_right():
    def shifted(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    _assert_matches_the_slow_scan([shifted(x) for x in _operands(1, 3, 32, 4)])


@pytest.mark.skipif(not torch.cuda.is_available() or not TRITON or INTERPRETED, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_gpu_scans_a_real_size_and_twice_the_same(dtype, reverse):
    operands = _operands(2, 197, 64, 16, dtype=dtype)
    _assert_matches_the_slow_scan(operands, reverse=reverse)

    def everything():
        y, last, checkpoints = scan_triton.forward(*operands, softplus=True, reverse=reverse)
        gradients = scan_triton.backward(y, last, *operands, checkpoints, softplus=True, reverse=reverse)
        return (y, last, checkpoints, *gradients)

    for once, again in zip(everything(), everything(), strict=True):
        assert torch.equal(once, again)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_kernels_are_right_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "only 0-dimensional arrays can be converted" in result.stdout:
        pytest.skip("this Triton's interpreter cannot loop under this NumPy (Triton 3.6 under NumPy 2.4)")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@needs_triton
def test_availability_is_none_or_one_line():
    reason = scan_triton.available()
    if INTERPRETED or torch.cuda.is_available():
        assert reason is None
    else:
        assert reason.startswith("no CUDA device") and "\n" not in reason


def test_without_triton_the_module_imports_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("scan_without_triton", scan_triton.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.available() == "triton is not installed"


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels do not compile")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize(("states", "everything"), [(16, True), (16, False), (128, True)])
def test_kernels_compile_without_spilling(name, dtype, arch, everything, states, tmp_path, monkeypatch):
    """For a GPU that need not be here; the interpreter checks neither types that change in a loop nor registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(scan_triton, name)
    _, _, options = scan_triton._launch(torch.empty(2, 197, 384), torch.empty(2, 197, 1, states))
    constants = {key: value for key, value in options.items() if key in function.arg_names}
    constants |= {"SOFTPLUS": everything, "REVERSE": everything, "groups": 1}
    if not everything:
        optional = {"D_ptr", "z_ptr", "bias_ptr", "dlast_ptr", "dD_ptr", "dz_ptr", "dbias_ptr"}
        constants |= dict.fromkeys(optional.intersection(function.arg_names))
    signature = {}
    for key in function.arg_names:
        if key in constants:
            signature[key] = "constexpr"
        elif key.endswith("_ptr"):
            signature[key] = f"*{dtype}" if key.removesuffix("_ptr") in {"u", "z", "y", "du", "dz", "dy"} else "*fp32"
        else:
            signature[key] = "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, key in enumerate(function.arg_names)
        if signature[key].startswith("*") or key == "width"
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={key: value for key, value in options.items() if key not in function.arg_names},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
