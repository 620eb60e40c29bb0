"""Random numbers as a function of what they are for: a run that resumes needs no saved state."""

from hashlib import blake2b
from random import Random

import torch


def digest_of(*purpose: str | int) -> int:
    """64 bits that are a function of ``purpose``, in a few microseconds: for what is seeded at every sample.

    ``seed_of`` came first for runs and their steps; two functions, as another one would change every batch.

    Example:
        >>> digest_of(0, 1, 2) == digest_of(0, 1, 2), digest_of(0, 1) == digest_of(1, 0)
        (True, False)
    """
    return int.from_bytes(blake2b(" ".join(map(str, purpose)).encode(), digest_size=8).digest(), "big")


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
