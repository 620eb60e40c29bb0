"""Files that are written whole or not at all: a temporary one beside them, then a rename."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well and vanishes when it does not.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with whole_file(folder / "note.txt") as unfinished:
        ...     _ = unfinished.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays: writers such as matplotlib choose the format by it
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        unfinished.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        _to_disk(unfinished)  # before the rename: else, after a loss of power, the name may stand without the content
        os.replace(unfinished, path)
        _to_disk(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "result.json"
        >>> write_json(path, {"val/acc": 0.5})
        >>> json.loads(path.read_text())
        {'val/acc': 0.5}
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _to_disk(path: Path) -> None:
    if os.name != "posix":  # Windows opens no folders, and syncs only what is open for writing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
