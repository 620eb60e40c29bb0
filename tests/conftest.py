"""One thread, no network, no window: what every test may rely on."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_and_the_same_draws():
    """Two contended threads run many times slower than one; a test that draws draws the same each time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
