"""Free memory is a number that can be, and sizes are said in few digits."""

import pytest

from hasten.memory import as_size, free_bytes


def test_free_memory_is_a_plausible_number_or_unknown():
    free = free_bytes()
    assert free is None or 0 < free < 2**50


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (20 * 2**20, "20 MiB"), (2**40, "1024 GiB")]
)
def test_a_size_has_the_largest_unit_that_it_fills(count, said):
    assert as_size(count) == said
