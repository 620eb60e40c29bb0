"""DSA as an object; the formulas are tested in tests/functional/test_dsa.py."""

import pytest
import torch

from hasten.functional.dsa import dsa, dsa_draw
from hasten.nn import DSA


def test_it_draws_and_applies_what_the_functions_do():
    images, ops = torch.rand(5, 3, 8, 8), ("crop", "scale", "rotate")
    augment = DSA(ops)
    for seed in range(5):
        draw = augment.draw(5, 8, torch.Generator().manual_seed(seed))
        expected = dsa_draw(ops, 5, 8, generator=torch.Generator().manual_seed(seed))
        assert draw.op == expected.op
        assert torch.equal(augment(images, draw), dsa(images, expected))


def test_a_shared_draw_serves_batches_of_any_size():
    augment = DSA(share="batch")
    draw = augment.draw(256, 8, torch.Generator().manual_seed(0))
    real, synthetic = torch.rand(7, 1, 8, 8), torch.rand(2, 1, 8, 8)
    together = augment(torch.cat([real, synthetic]), draw)
    torch.testing.assert_close(together, torch.cat([augment(real, draw), augment(synthetic, draw)]))


def test_its_repr_says_all_that_it_is_made_of():
    augment = DSA(["crop", "rotate"], share="batch")
    assert repr(augment) == repr(eval(repr(augment))) == "DSA(('crop', 'rotate'), share='batch')"


def test_wrong_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match="got 'cut'"):
        DSA(["cut"])
    with pytest.raises(ValueError, match="share"):
        DSA(share="none")
