"""Where a formula must not be computed in the dtype of autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device_type: str) -> AbstractContextManager:
    """Keep products in the dtype of their arguments; on any device, also on "meta", which knows no autocast.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), no_autocast("cpu"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.float32
    """
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()
