"""What the benchmarks of speed share: works timed in turns, and the memory that a work takes beyond its inputs."""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Of one work, in seconds."""

    minimum: float
    median: float
    repeats: int

    def row(self) -> dict[str, Any]:
        """What a result row says: the minimum, in ms, which other programs disturb least."""
        ms = {"value": 1e3 * self.minimum, "unit": "ms, minimum", "median": 1e3 * self.median}
        return {**ms, "repeats": self.repeats}


def in_turns(
    works: Mapping[str, Work],
    device: torch.device,
    *,
    repeats: int,
    before: Callable[[str], object] | None = None,
) -> dict[str, Times]:
    """The times of works that are run in turns, so that a machine that slows down slows all of them.

    On a CPU that is the time this process was running, on a GPU that between two events; launches are not counted
    there, as they are not where a model keeps the GPU busy.

    Args:
        works: each runs once to warm up, then ``repeats`` times.
        device: where they run.
        repeats: rounds.
        before: called with the name of the work about to run; not counted.
    """
    clock = _gpu_clock() if device.type == "cuda" else _cpu_seconds
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            if before is not None:
                before(name)
            seconds[name].append(clock(work))
    return {name: Times(min(s[1:]), statistics.median(s[1:]), repeats) for name, s in seconds.items()}


def _cpu_seconds(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _gpu_clock() -> Callable[[Work], float]:
    # a few GiB to be written keep the GPU busy while the host launches the work, and leave nothing of it in the caches
    buffer = torch.empty(2**30, dtype=torch.uint8, device="cuda")

    def seconds(work: Work) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(4):
            buffer.zero_()
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    return seconds


def extra_memory(build: Callable[..., Work], arguments: tuple, *, warm_up: tuple, device: torch.device) -> float | None:
    """How many MB (10^6 bytes) a work takes at its peak beyond what was there before it; None where that is unknown.

    On a CPU it is the growth of the resident set, read from Linux's /proc in a process of its own, in which nothing
    but the warm-up has run before; on a GPU it is what torch's allocator has handed out.

    Args:
        build: a function of a module, which makes inputs and returns the work on them.
        arguments: of ``build``, for the work that is measured; plain data.
        warm_up: the same for a tiny one, which loads what is loaded once.
        device: where the work runs.
    """
    if device.type == "cuda":
        return _growth(build, arguments, warm_up, device)
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = get_context("forkserver")
    context.set_forkserver_preload(["hasten.functional", "torchmetrics.image.fid"])  # what takes seconds, once for all
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        return fresh.submit(_growth, build, arguments, warm_up, device).result()


def _growth(build: Callable[..., Work], arguments: tuple, warm_up: tuple, device: torch.device) -> float:
    if device.type == "cpu":
        torch.set_num_threads(1)
    build(*warm_up)()
    work = build(*arguments)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = _resident_kb("VmRSS")
    work()
    return (_resident_kb("VmHWM") - before) * 1024 / 1e6


def _resident_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
