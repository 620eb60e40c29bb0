"""The native scan against a slow float64 loop under autograd, and what happens where it cannot be compiled."""

import platform
import stat
import subprocess
import sys
import tempfile

import pytest
import torch
import torch.nn.functional as F

from hasten.kernels import scan_native

CHUNK = scan_native.CHUNK
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")

works = pytest.mark.skipif(scan_native.available() is not None, reason=str(scan_native.available()))


def operands(batch=2, length=CHUNK + 5, channels=20, states=16, groups=1, seed=0, **replaced):
    """What the kernel takes, in the order of NAMES, with step sizes around 0.05 as at the start of a training."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    given = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels),
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1) * (1 + normal(channels, states).abs()),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "delta_bias": normal(channels) - 3,
    }
    return tuple((given | replaced).values())


def loop(u, delta, A, B, C, D, z, delta_bias, *, softplus, reverse):
    """The recurrence as the paper writes it, a step at a time: (y, the state before each step and after the last)."""
    batch, length, channels = u.shape
    dt = delta if delta_bias is None else delta + delta_bias
    if softplus:
        dt = dt.clamp(min=0) + (-dt.abs()).exp().log1p()
    B, C = (x.repeat_interleave(channels // x.shape[2], dim=2) for x in (B, C))
    states = [u.new_zeros(batch, *A.shape)]
    y = [torch.empty(0)] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay = (dt[:, t, :, None] * A).exp()
        states.append(decay * states[-1] + (dt[:, t] * u[:, t])[..., None] * B[:, t])
        y[t] = (states[-1] * C[:, t]).sum(-1)
    y = torch.stack(y, 1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y, states


def off_by(got, wanted):
    return ((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def check(given, *, softplus=True, reverse=False, tolerance=1e-6):
    """y, last state, checkpoints and all gradients against the loop in float64."""
    exact = [None if x is None else x.double().requires_grad_() for x in given]
    y, states = loop(*exact, softplus=softplus, reverse=reverse)
    draw = torch.Generator().manual_seed(1)
    grad_y, grad_last = torch.randn(y.shape, generator=draw), torch.randn(states[-1].shape, generator=draw)
    wanted = iter(
        torch.autograd.grad((y, states[-1]), [x for x in exact if x is not None], (grad_y.double(), grad_last.double()))
    )

    got_y, last, checkpoints = scan_native.forward(*given, softplus=softplus, reverse=reverse)
    gradients = scan_native.backward(
        grad_y.to(given[0].dtype), grad_last, *given, checkpoints, softplus=softplus, reverse=reverse
    )

    assert got_y.dtype == given[0].dtype and off_by(got_y, y) < tolerance
    assert off_by(last, states[-1]) < tolerance
    assert off_by(checkpoints, torch.stack(states[:-1:CHUNK])) < tolerance
    for name, x, gradient in zip(NAMES, given, gradients, strict=True):
        if x is None:
            assert gradient is None, name
        else:
            assert gradient.dtype == x.dtype and gradient.shape == x.shape, name
            assert off_by(gradient, next(wanted)) < tolerance, name


# the scan


@works
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 197])
def test_the_scan_and_its_gradients_are_those_of_the_loop_at_any_length(length, reverse):
    check(operands(length=length), reverse=reverse)


@works
@pytest.mark.parametrize("states", [1, 3, 8, 16, 64])
def test_any_number_of_states(states):
    check(operands(states=states))


@works
@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (4, 1), (16, 1), (17, 1), (128, 1), (129, 1), (300, 1), (6, 2), (40, 2), (300, 2), (6, 6)],
)
def test_any_number_of_channels_and_groups(channels, groups):
    check(operands(batch=1, channels=channels, states=4, groups=groups))


@works
@pytest.mark.parametrize("missing", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_skip_gate_and_bias_may_be_missing(missing):
    check(operands(**dict.fromkeys(missing)))


@works
def test_step_sizes_without_softplus():
    check(operands(delta=torch.rand(2, CHUNK + 5, 20), delta_bias=None), softplus=False)


@works
@pytest.mark.parametrize("step", [1e-4, 8.0, 100.0])
def test_small_and_large_steps_are_exact(step):
    given = operands(delta=step * (0.5 + torch.rand(2, CHUNK + 5, 20)), delta_bias=None)
    check(given, softplus=False, tolerance=1e-5)  # exp(x) multiplies the rounding of x = dt A by x


@works
def test_a_rate_of_zero_keeps_the_state_to_the_last_bit():
    pulse = torch.zeros(1, 1000, 3)
    pulse[0, 0] = torch.tensor([0.1, -3.7, 1e20])
    ones = torch.ones(1, 1000, 1, 1)
    step, A = torch.ones_like(pulse), torch.zeros(3, 1)
    y, _, _ = scan_native.forward(pulse, step, A, ones, ones, None, None, None, softplus=False, reverse=False)
    assert torch.equal(y, pulse[:, :1].expand_as(y))


@works
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_costs_one_rounding(dtype, tolerance):
    u, z = operands()[0].to(dtype), operands()[6].to(dtype)
    check(operands(u=u, z=z), tolerance=tolerance)


@works
def test_the_number_of_threads_changes_no_bit():
    given = operands(batch=3, channels=300, groups=2)
    grad_y = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            forward = scan_native.forward(*given, softplus=True, reverse=False)
            results.append(
                forward + scan_native.backward(grad_y, None, *given, forward[2], softplus=True, reverse=False)
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@works
def test_without_a_gradient_of_the_last_state_it_counts_as_zero():
    given = operands()
    grad_y = torch.ones_like(given[0])
    _, last, checkpoints = scan_native.forward(*given, softplus=True, reverse=False)
    none, zero = (
        scan_native.backward(grad_y, grad_last, *given, checkpoints, softplus=True, reverse=False)
        for grad_last in (None, torch.zeros_like(last))
    )
    assert all(torch.equal(x, y) for x, y in zip(none, zero, strict=True))


# the elementary functions, seen through scans of one and two steps


@works
def test_the_exponential_is_exact_to_float32_and_ends_in_zero_and_infinity():
    x = torch.cat([torch.linspace(-87, 88, 20_000), torch.tensor([-90.0, -1e30, 90.0, 1e30])])
    delta = torch.stack([torch.ones_like(x), x])[None]
    u = torch.tensor([1.0, 0.0])[None, :, None].expand_as(delta).contiguous()
    A, ones = torch.ones(len(x), 1), torch.ones(1, 2, 1, 1)
    # the first step brings the state to 1, the second multiplies it by exp(x)
    _, last, _ = scan_native.forward(u, delta, A, ones, ones, None, None, None, softplus=False, reverse=False)
    got, wanted = last.flatten()[:-4], x.double().exp()[:-4]
    assert ((got - wanted).abs() / wanted).max() < 2e-7
    assert last.flatten()[-4:].tolist() == [0.0, 0.0, torch.inf, torch.inf]


@works
def test_softplus_keeps_its_relative_accuracy_on_both_sides():
    x = torch.linspace(-80, 80, 20_001)
    one = torch.ones(1, 1, len(x))
    A, B = torch.zeros(len(x), 1), torch.ones(1, 1, 1, 1)
    dt = scan_native.forward(one, x[None, None], A, B, B, None, None, None, softplus=True, reverse=False)[0][0, 0]
    wanted = x.double().clamp(min=0) + (-x.double().abs()).exp().log1p()
    assert ((dt - wanted).abs() / wanted).max() < 3e-7


@works
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [0x7FC00000, -0x3FFEAB, 0x7F800000], ids=["nan", "negative nan with a payload", "inf"])
def test_nan_and_inf_come_through_from_any_input(name, bits):
    given = dict(zip(NAMES, operands(batch=1, channels=3), strict=True))
    given[name].view(torch.int32).flatten()[0] = bits
    wanted, _ = loop(*given.values(), softplus=True, reverse=False)
    y, _, checkpoints = scan_native.forward(*given.values(), softplus=True, reverse=False)
    gradients = scan_native.backward(
        torch.ones_like(y), None, *given.values(), checkpoints, softplus=True, reverse=False
    )
    assert not wanted.isfinite().all() and torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert not all(gradient.isfinite().all() for gradient in gradients)


# what C would misread


@works
@pytest.mark.parametrize("wrong", [lambda x: x.double(), lambda x: x.mT.contiguous().mT, lambda x: x.to("meta")])
def test_what_is_not_contiguous_float32_on_the_cpu_is_refused_in_one_line(wrong):
    given = operands()
    with pytest.raises(TypeError, match="contiguous float32 tensors on the CPU, got torch") as error:
        scan_native.forward(given[0], wrong(given[1]), *given[2:], softplus=True, reverse=False)
    assert "\n" not in str(error.value)


# compiling


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not compiled anything, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(scan_native, "_FLAGS", [flag.replace("-O3", "-O0") for flag in scan_native._FLAGS])  # for time
    scan_native._library.cache_clear()
    yield tmp_path
    scan_native._library.cache_clear()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def libraries(folder):
    return sorted(path.name for path in (folder / "cache" / "hasten").iterdir())


def test_a_compiler_that_is_not_there_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent -O1")
    reason = scan_native.available()
    assert "got CC=/nonexistent, not a program; correct or unset CC" in reason and "\n" not in reason
    with pytest.raises(RuntimeError, match="got CC=/nonexistent"):
        scan_native.forward(*operands(), softplus=True, reverse=False)


def test_no_compiler_at_all_is_said(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    assert "got none of cc, gcc, clang; install one or set CC" in scan_native.available()


def test_a_failing_compiler_is_quoted_once_and_not_asked_again(fresh, monkeypatch):
    asked = fresh / "asked"
    broken = f'echo asked >> {asked}; echo "In file included"; echo "x.c:1: error: no such luck" >&2; exit 1'
    monkeypatch.setenv("CC", script(fresh / "cc", broken))
    reason = scan_native.available()
    assert "got 'x.c:1: error: no such luck'; set CC to another" in reason and "\n" not in reason
    times = len(asked.read_text().split())
    assert scan_native.available() == reason and len(asked.read_text().split()) == times
    assert libraries(fresh) == []


def test_a_compiler_that_says_nothing_is_quoted_by_its_exit_status(fresh, monkeypatch):
    monkeypatch.setenv("CC", script(fresh / "cc", "exit 3"))
    assert "got 'exit status 3'" in scan_native.available()


def test_a_compiler_that_cannot_be_run_is_no_crash(fresh, monkeypatch):
    (fresh / "cc").write_bytes(b"\x00not a program")
    (fresh / "cc").chmod(0o700)
    monkeypatch.setenv("CC", str(fresh / "cc"))
    assert "needs a C compiler that runs" in scan_native.available()


def test_a_compiler_that_writes_no_library_is_no_crash(fresh, monkeypatch):
    write_garbage = 'for last; do :; done; case "$last" in *.so) echo garbage > "$last";; esac'
    monkeypatch.setenv("CC", script(fresh / "cc", write_garbage))
    reason = scan_native.available()
    assert "needs a folder to load a library from" in reason and "\n" not in reason


@works
def test_the_library_is_kept_in_a_folder_of_ones_own(fresh):
    assert scan_native.available() is None
    (library,) = libraries(fresh)
    assert stat.S_IMODE((fresh / "cache" / "hasten").stat().st_mode) == 0o700
    written = (fresh / "cache" / "hasten" / library).stat().st_mtime_ns
    scan_native._library.cache_clear()
    assert scan_native.available() is None
    assert libraries(fresh) == [library]
    assert (fresh / "cache" / "hasten" / library).stat().st_mtime_ns == written


@works
def test_another_processor_or_compiler_gets_a_library_of_its_own(fresh, monkeypatch):
    assert scan_native.available() is None
    scan_native._library.cache_clear()
    monkeypatch.setattr(scan_native, "_processor", lambda: "another")
    assert scan_native.available() is None
    assert len(libraries(fresh)) == 2


@works
def test_a_cache_folder_that_is_a_file_is_passed_over(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert scan_native.available() is None
    check(operands())


@works
def test_a_cache_folder_into_which_others_write_is_not_trusted(fresh):
    folder = fresh / "cache" / "hasten"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert scan_native.available() is None
    assert libraries(fresh) == []


@works
def test_no_folder_at_all_is_said(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(fresh / "file"))
    assert "needs a folder to load a library from" in scan_native.available()


@works
def test_a_compiler_without_openmp_will_do(fresh, monkeypatch):
    monkeypatch.setenv("CC", script(fresh / "cc", 'case "$*" in *-fopenmp*) exit 1;; esac; exec cc "$@"'))
    assert scan_native.available() is None
    check(operands())


@works
def test_loading_the_library_leaves_denormals_to_the_process():
    assert scan_native.available() is None
    assert torch.tensor(1e-30).mul(1e-10).item() > 0


@works
@pytest.mark.slow
def test_processes_that_compile_at_once_all_get_a_whole_library(fresh):
    code = "from hasten.kernels import scan_native; print(scan_native.available())"
    racing = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in racing] == ["None", "None"]
    assert len(libraries(fresh)) == 1


@works
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the lanes of x86")
@pytest.mark.parametrize("target", ["-march=x86-64", "-march=x86-64-v3"])
def test_older_processors_get_the_same_numbers(fresh, monkeypatch, target):
    monkeypatch.setattr(scan_native, "_TUNINGS", [[target]])
    monkeypatch.setenv("CC", script(fresh / "cc", 'case "$*" in *-march=native*) exit 1;; esac; exec cc "$@"'))
    assert scan_native.available() is None
    check(operands(channels=20, states=5))
