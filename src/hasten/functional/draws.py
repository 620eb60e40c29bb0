"""Random numbers as a function of what they are for: a run that resumes needs no saved state."""

from random import Random

import torch


def seed_of(*purpose: str | int) -> int:
    """63 bits that are a function of ``purpose``; near purposes, such as (seed, step), give seeds that are not near.

    Example:
        >>> seed_of(0, "init") == seed_of(0, "init"), seed_of(0, 1) == seed_of(1, 0)
        (True, False)
    """
    return Random(" ".join(map(str, purpose))).getrandbits(63)


def generator_of(*purpose: str | int) -> torch.Generator:
    """A generator on the CPU that begins with ``seed_of(*purpose)``.

    Example:
        >>> one, other = (torch.rand(2, generator=generator_of(0, "init")) for _ in range(2))
        >>> torch.equal(one, other)
        True
    """
    return torch.Generator().manual_seed(seed_of(*purpose))
