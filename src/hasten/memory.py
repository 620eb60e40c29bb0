"""Memory of this machine: how much is free, and sizes as a person says them."""

from pathlib import Path

import torch

_CPU = torch.device("cpu")


def free_bytes(device: torch.device = _CPU) -> int | None:
    """What could be allocated now on a GPU, or in the machine's own memory; None where the system does not say.

    Example:
        >>> free = free_bytes()
        >>> free is None or free > 2**20
        True
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def as_size(count: float) -> str:
    """Bytes in words.

    Example:
        >>> as_size(4.4e9), as_size(178257920), as_size(12)
        ('4.1 GiB', '170 MiB', '12 B')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"
