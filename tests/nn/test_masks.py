import math

import pytest
import torch

from hasten.functional import depth_keep, loss_quantile_keep
from hasten.nn import ConvNet, DepthMask, FlatModel, LossQuantileMask


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.9])
def test_the_quantile_mask_is_its_formula(alpha):
    end, target = torch.randn(2, 101)
    assert LossQuantileMask(alpha)(end, target).equal(loss_quantile_keep(end, target, drop=alpha))


@pytest.mark.parametrize("alpha", [1.0, -0.25, math.nan])
def test_a_quantile_outside_of_its_range_is_refused_when_the_mask_is_made(alpha):
    with pytest.raises(ValueError, match=r"alpha: expected a share in \[0, 1\), got"):
        LossQuantileMask(alpha)


def test_the_depth_mask_drops_the_blocks_that_come_first():
    flat = FlatModel(ConvNet(1, 8, 3, width=4, depth=3))
    theta = torch.zeros(flat.numel)
    keep = DepthMask(0.5, flat.shapes)(theta, theta)
    dropped = {
        name
        for name, part in zip(flat.names, keep.split([math.prod(s) for s in flat.shapes]), strict=True)
        if not part.all()
    }
    assert dropped == {name for name in flat.names if name.startswith(("blocks.0.", "blocks.1."))}
    assert keep.equal(depth_keep(flat.shapes, drop=0.5))


def test_the_depth_mask_learns_its_shapes_later():
    mask = DepthMask(0.25, by="scalar")
    with pytest.raises(ValueError, match="DepthMask: shapes: expected those of the parameters, got none"):
        mask(torch.zeros(8), torch.zeros(8))
    mask.shapes = [(2, 2), (4,)]
    assert mask(torch.zeros(8), torch.zeros(8)).tolist() == [False] * 2 + [True] * 6


@pytest.mark.parametrize(("arguments", "said"), [({"ratio": 1.0}, "share"), ({"ratio": 0.5, "by": "width"}, "'width'")])
def test_a_depth_that_means_nothing_is_refused_when_the_mask_is_made(arguments, said):
    with pytest.raises(ValueError, match=said):
        DepthMask(**arguments)


def test_masks_say_what_they_are():
    assert repr(LossQuantileMask(0.375)) == "LossQuantileMask(alpha=0.375)"
    assert repr(DepthMask(0.5, [(2, 2)])) == "DepthMask(ratio=0.5, by='layer')"
