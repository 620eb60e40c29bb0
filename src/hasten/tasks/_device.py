"""Where a task computes."""

import torch


def device_of(accelerator: str) -> torch.device:
    """The CPU for "cpu", or where there is no other; else the accelerator of this machine."""
    found = torch.accelerator.current_accelerator() if accelerator != "cpu" else None
    return found or torch.device("cpu")
