"""The selective scan and its gradients on the CPU, in C: `scan_native.c`, compiled at first use and loaded by ctypes.

The library stands in the user's cache folder, under a name that says what it was made from, by which compiler and for
which processor. Where it cannot be made, `available` says why and nothing else breaks. A gcc makes it use as many cores
as torch does, other compilers one. Groups of fewer channels than a vector has lanes (16 at most) leave lanes idle.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

CHUNK = 16
"""Steps between two checkpoints: the backward pass rebuilds so many states at a time, 16 KiB at N = 16."""

_BLOCK = 128  # channels of a task: few enough to share among threads; many make the sums over lanes and tasks cheap
_SOURCE = Path(__file__).with_suffix(".c")
_COMPILE_TIMEOUT_S = 120

# No -ffast-math: NaN must come through, and a library linked with it makes the whole process flush denormals to zero.
_FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fPIC", "-shared", f"-DCHUNK={CHUNK}", f"-DBLOCK={_BLOCK}"]
# The first that compiles is taken; some compilers for ARM know the processor by -mcpu alone.
_TUNINGS = [["-march=native"], ["-mcpu=native"], []]


def available() -> str | None:
    """Why the native scan cannot be used, in one line; None where it can. The very first call compiles, in a second."""
    library = _library()
    return library if isinstance(library, str) else None


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
    """Scan u (B, L, D) to y (B, L, D), the last state (B, D, N) and that before each chunk (ceil(L / CHUNK), B, D, N).

    delta (B, L, D), A (D, N), B and C (B, L, G, N), D and delta_bias (D) are contiguous float32 on the CPU; u and z,
    both (B, L, D), may be in half precision. RuntimeError where `available` has a reason.
    """
    library = _loaded()
    (batch, length, channels), states = u.shape, A.shape[1]
    inputs = (_single(u), delta, A, B, C, D, _single(z), delta_bias)
    scan = _Scan(batch, length, channels, states, B.shape[2], softplus, reverse, *map(_address, inputs))
    outputs = (
        y := torch.empty_like(delta),
        last := delta.new_empty(batch, channels, states),
        checkpoints := delta.new_empty(-(-length // CHUNK), batch, channels, states),
    )
    threads = torch.get_num_threads()
    scratch = delta.new_empty(threads, library.scan_scratch_floats(states))  # aligned, as all memory of torch
    library.scan_forward(scan, threads, _address(scratch), *map(_address, outputs))
    return y.to(u.dtype), last, checkpoints


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
    """Differentiate `forward` by u, delta, A, B, C, D, z and delta_bias: each like its input, None for a None.

    grad_y (B, L, D) is in the dtype of u, grad_last (B, D, N) in float32; checkpoints are what `forward` gave.
    """
    library = _loaded()
    (batch, length, channels), (_, _, groups, states) = u.shape, B.shape
    inputs = (_single(u), delta, A, B, C, D, _single(z), delta_bias)
    scan = _Scan(batch, length, channels, states, groups, softplus, reverse, *map(_address, inputs))
    given = (_single(grad_y), grad_last, checkpoints)
    outputs = (
        du := torch.empty_like(delta),
        ddelta := torch.empty_like(delta),
        dz := None if z is None else torch.empty_like(delta),
        dA := delta.new_empty(batch, channels, states),
        dD := delta.new_empty(batch, channels),
        dbias := delta.new_empty(batch, channels),
        dB := delta.new_empty(library.scan_blocks(scan), batch, length, groups, states),
        dC := torch.empty_like(dB),
    )
    threads = torch.get_num_threads()
    scratch = delta.new_empty(threads, library.scan_scratch_floats(states))  # aligned, as all memory of torch
    library.scan_backward(scan, threads, _address(scratch), _Gradients(*map(_address, given + outputs)))
    return (
        du.to(u.dtype),
        ddelta,
        dA.sum(0),
        dB.sum(0),
        dC.sum(0),
        None if D is None else dD.sum(0),
        None if dz is None else dz.to(u.dtype),
        None if delta_bias is None else dbias.sum(0),
    )


class _Scan(ctypes.Structure):
    """`Scan` of the C file."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch", "length", "channels", "states", "groups")],
        *[(name, ctypes.c_int32) for name in ("softplus", "reverse")],
        *[(name, ctypes.c_void_p) for name in ("u", "delta", "A", "B", "C", "D", "z", "bias")],
    ]


class _Gradients(ctypes.Structure):
    """`Gradients` of the C file."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("y", "last", "checkpoints", "u", "delta", "z", "A", "D", "bias", "B", "C")
    ]


def _single(x: Tensor | None) -> Tensor | None:
    """Half precision as float32, all that the C file knows."""
    return x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x


def _address(x: Tensor | None) -> int | None:
    """Where C finds the numbers of x; it would read anything else than this as if it were this."""
    if x is None:
        return None
    if x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous():
        raise TypeError(
            f"the native scan takes contiguous float32 tensors on the CPU, got {x.dtype} on {x.device} "
            f"with shape {tuple(x.shape)} and strides {x.stride()}; call it through selective_scan"
        )
    return x.data_ptr()


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@functools.cache  # a failure too: nobody waits for the same compiler error twice
def _library() -> ctypes.CDLL | str:
    """The library, or in one line why there is none."""
    try:
        library = _open()
    except _Unavailable as error:
        return str(error)
    library.scan_blocks.argtypes = [ctypes.POINTER(_Scan)]
    library.scan_blocks.restype = ctypes.c_int64
    library.scan_scratch_floats.argtypes = [ctypes.c_int64]
    library.scan_scratch_floats.restype = ctypes.c_int64
    library.scan_forward.argtypes = [ctypes.POINTER(_Scan), ctypes.c_int, *[ctypes.c_void_p] * 4]
    library.scan_forward.restype = None
    library.scan_backward.argtypes = [ctypes.POINTER(_Scan), ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Gradients)]
    library.scan_backward.restype = None
    return library


class _Unavailable(Exception):
    """There is no native scan on this machine; the message is one line."""


def _open() -> ctypes.CDLL:
    """From the cache, or compiled into it; where that folder is no use, from a temporary one for this process."""
    if os.name == "nt":  # gcc misaligns vectors on the stack there, and MSVC has no such vectors
        raise _Unavailable("the native scan is for Linux and macOS, got Windows; use backend='chunked'")
    compiler = _compiler()
    version = _run([*compiler, "--version"]).stdout
    # gcc's OpenMP alone: torch ships the same, and the process shares it. Two runtimes can abort each other.
    tunings = [*([["-march=native", "-fopenmp"]] if "Free Software Foundation" in version else []), *_TUNINGS]
    commands = [[*compiler, *_FLAGS, *tuning] for tuning in tunings]
    made_from = _SOURCE.read_text() + version + _processor()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hasten"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
            raise PermissionError(f"others may write into {folder}")
        return _load(folder, commands, made_from)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="hasten") as temporary:  # a loaded library outlives its file
            return _load(Path(temporary), commands, made_from)
    except OSError as error:
        reason = f"the native scan needs a folder to load a library from, got {error}; set XDG_CACHE_HOME"
        raise _Unavailable(reason) from error


def _load(folder: Path, commands: list[list[str]], made_from: str) -> ctypes.CDLL:
    """The library of the first command that compiles; OSError where the folder cannot hold it."""
    error = ""
    for command in commands:
        digest = hashlib.sha256("\n".join([made_from, *command]).encode()).hexdigest()[:16]
        path = folder / f"scan_{digest}.so"
        if path.exists():
            return ctypes.CDLL(str(path))
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside) / path.name
            answer = _run([*command, str(_SOURCE), "-o", str(made)])
            error = _first_error(answer)
            if answer.returncode == 0:
                made.replace(path)  # there as a whole or not at all, also for a process that does the same now
                return ctypes.CDLL(str(path))
    raise _Unavailable(f"the native scan needs a C compiler that takes it, got {error!r}; set CC to another")


def _compiler() -> list[str]:
    named = os.environ.get("CC", "").split()
    if named and shutil.which(named[0]) is None:
        raise _Unavailable(f"the native scan needs a C compiler, got CC={named[0]}, not a program; correct or unset CC")
    found = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
    if not named and not found:
        raise _Unavailable("the native scan needs a C compiler, got none of cc, gcc, clang; install one or set CC")
    return named or found[:1]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_COMPILE_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},  # `_open` and `_first_error` read English
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"the native scan needs a C compiler that runs, got {error}; set CC to another") from error


def _first_error(answer: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else f"exit status {answer.returncode}")


def _processor() -> str:
    """What -march=native looks at: home folders are shared by machines with other processors."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return " ".join(platform.uname())
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))
