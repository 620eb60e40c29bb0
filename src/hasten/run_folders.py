"""What a run folder tells of its run: finished or not, alive or not, and which words made it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from hasten.errors import HastenError, did_you_mean

LAST = Path("checkpoints", "last.ckpt")
"""What a run continues from."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold ``folder`` while its run lives; a process that dies, however it dies, lets go.

    Raises:
        HastenError: where another process holds it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with claimed(folder):
        ...     is_alive(folder)
        True
        >>> is_alive(folder)
        False
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise HastenError(f"run_dir: {str(folder)!r} is of a run that is alive; wait for it or stop it") from None
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()


def is_alive(folder: Path) -> bool:
    """Whether a process holds ``folder``; one that was killed does not, though its result.json says "running"."""
    if not (folder / ".lock").exists():
        return False
    try:
        with claimed(folder):
            return False
    except (HastenError, OSError):  # in a folder that may not be written to, nobody can tell: leave it alone
        return True


def result_of(folder: Path) -> dict[str, Any]:
    """What result.json holds; nothing where there is none, or no readable one.

    Example:
        >>> result_of(Path("no such folder"))
        {}
    """
    return read_json(folder / "result.json")


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of names and values holds; nothing where there is none, or no readable one.

    Example:
        >>> read_json(Path("no such file"))
        {}
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def config_of(folder: Path) -> dict[str, Any]:
    """What config.yaml holds; nothing where there is none, or no readable one."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def resumes_by_files(config: Any) -> bool:
    """Whether a run of this config keeps no checkpoint to continue from: begun again, it passes over what is done."""
    callbacks = config.get("callbacks") or {}
    return config.get("task") is not None or callbacks.get("last") is None


def newest_unfinished(experiment: str) -> Path:
    """The folder under ``runs`` of the run of ``experiment`` that began last of those that can be continued.

    Raises:
        HastenError: where there is none.
    """
    runs = Path("runs")
    for folder in sorted((runs / experiment).glob("*/"), reverse=True):
        result = result_of(folder)
        can_continue = (folder / LAST).exists() or resumes_by_files(config_of(folder))
        if result.get("status", "complete") != "complete" and can_continue and not is_alive(folder):
            return folder
    others = [path.name for path in runs.glob("*/") if path.name not in ("stages", "sweeps")]
    meant = "" if experiment in others else did_you_mean(experiment, others)
    raise HastenError(
        f"ckpt_path: last: expected an unfinished run of {experiment!r} with a checkpoint in "
        f"{str(runs / experiment)!r}, found none{meant or '; leave ckpt_path out to begin anew'}"
    )


def started_processes() -> int:
    """How many processes torchrun or srun has started of this run; 1 without them.

    Each begins at the first line, without knowing of the others: what they must agree on has to be in their words.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    # the shell of an allocation has the number of tasks too, but is none of them; nor is one of srun's for people
    by_srun = "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return int(os.environ.get("SLURM_NTASKS", 1)) if by_srun else 1
