import math

import pytest
import torch

from hasten.optim import cosine


def _rates(total_steps, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = cosine(optimizer, total_steps, **kwargs)
    rates = []
    for _ in range(total_steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 5])
def test_the_rate_follows_the_formula(warmup_steps):
    wanted = []
    for step in range(21):
        if step < warmup_steps:
            wanted.append(0.5 * (step + 1) / warmup_steps)
        else:
            share = (step - warmup_steps) / (20 - warmup_steps)
            wanted.append(0.1 + 0.4 * (1 + math.cos(math.pi * share)) / 2)
    assert _rates(20, warmup_steps=warmup_steps, min_lr=0.1) == pytest.approx(wanted, abs=1e-9)


def test_a_warm_up_that_does_not_fit_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^scheduler: warmup_steps: expected 0 <= warmup_steps < 5 .* got 5"):
        _rates(5, warmup_steps=5)
