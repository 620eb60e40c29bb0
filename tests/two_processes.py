"""Two gloo processes on the CPU that wait for the tests: what runs in both costs milliseconds after the first time.

Run as a script, this file is one of the two. To Lightning and to hasten they look like processes of torchrun.
"""

import contextlib
import faulthandler
import importlib.util
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from operator import attrgetter
from pathlib import Path
from typing import Any

_GRACE_S = 5
"""What one rank may still take once the other has failed: it may wait for it in a collective operation."""


class RankFailed(Exception):
    """A rank has raised, died, or not answered in time; says which, and where."""


class TwoProcesses:
    """``two_processes(function, *args)`` -> what ``function(*args)`` returns on rank 0 and on rank 1.

    The function is one of a test file's top level, which the processes load by its path; it may have its own working
    directory, environment and random state. Arguments and results are pickled. The processes start at the first call,
    and anew after a failure: what a rank that failed leaves in the group is anyone's guess.

    Raises:
        RankFailed: where a rank raises, dies, or does not answer in ``timeout_s``.
    """

    def __init__(self) -> None:
        self._ranks: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._folder = Path()

    def __call__(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
        call = pickle.dumps((function.__module__, function.__code__.co_filename, function.__qualname__, args))
        if not self._ranks:
            self._start()
        connections = [connection for _, connection in self._ranks]
        for connection in connections:
            with contextlib.suppress(BrokenPipeError):  # it has died meanwhile, and its end of file says so below
                connection.send_bytes(call)
        answers: dict[int, tuple[bool, Any]] = {}
        until = time.monotonic() + timeout_s
        while len(answers) < 2 and (left := until - time.monotonic()) > 0:
            for ready in wait([connections[rank] for rank in (0, 1) if rank not in answers], left):
                rank = connections.index(ready)  # type: ignore[arg-type] # of the connections alone
                answers[rank] = self._answer(rank)
                if not answers[rank][0]:
                    until = min(until, time.monotonic() + _GRACE_S)
        if len(answers) == 2 and all(worked for worked, _ in answers.values()):
            return [answers[rank][1] for rank in (0, 1)]
        said = [
            f"rank {rank}: {answers[rank][1] if rank in answers else self._where_it_hangs(rank)}"
            for rank in (0, 1)
            if rank not in answers or not answers[rank][0]
        ]
        self.stop()
        raise RankFailed("\n".join(said))

    def stop(self) -> None:
        """End the processes, whatever they do; the next call starts new ones."""
        for _, connection in self._ranks:
            connection.close()  # on which a process that waits for a call ends
        for process, _ in self._ranks:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._ranks:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._ranks = []

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="two_processes_"))
        for rank in (0, 1):
            ours, theirs = Pipe()
            of_torchrun = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
                "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            with (self._folder / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, str(rank), str(self._folder), str(theirs.fileno())],
                    env=os.environ | of_torchrun,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            theirs.close()
            self._ranks.append((process, ours))

    def _answer(self, rank: int) -> tuple[bool, Any]:
        process, connection = self._ranks[rank]
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return False, f"died with exit code {process.wait()}; its last lines:\n{self._last_lines(rank)}"

    def _where_it_hangs(self, rank: int) -> str:
        process, _ = self._ranks[rank]
        process.send_signal(signal.SIGUSR1)  # to faulthandler
        time.sleep(0.5)
        return f"has not answered; it stands in\n{self._last_lines(rank)}"

    def _last_lines(self, rank: int) -> str:
        return "\n".join((self._folder / f"{rank}.log").read_text(errors="replace").splitlines()[-30:])


# ------------------------------------------------------------------ in the processes


def _serve(rank: int, folder: Path, connection: Connection) -> None:
    """Answer calls until the tests are over."""
    import torch

    faulthandler.register(signal.SIGUSR1, all_threads=False)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    here, environment = Path.cwd(), dict(os.environ)
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            torch.distributed.destroy_process_group()
            os._exit(0)  # there is nothing to tidy up, and Python would take seconds to
        torch.manual_seed(0)
        try:
            module, file, name, args = pickle.loads(call)
            answer = pickle.dumps((True, attrgetter(name)(_loaded(module, file))(*args)))
        except Exception:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
        os.chdir(here)
        os.environ.clear()
        os.environ |= environment
        torch.set_num_threads(1)


def _loaded(name: str, file: str) -> Any:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type] # of a file that is there
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]), Connection(int(sys.argv[3])))
