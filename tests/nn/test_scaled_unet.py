"""The U-Net that is told by which factor its levels shrink."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from hasten.nn import ScaledUNet


def _sides(net, x, scale):
    sides = []
    hooks = [block.register_forward_hook(lambda _, __, out: sides.append(tuple(out.shape[-2:]))) for block in net.down]
    y = net(x, scale)
    for hook in hooks:
        hook.remove()
    return sides, y


@pytest.mark.parametrize(
    ("scale", "sides"),
    [
        (0.5, [(16, 9), (8, 4), (4, 2)]),
        (0.3, [(16, 9), (5, 3), (2, 1)]),
        (1.0, [(16, 9)] * 3),
        (0.01, [(16, 9), (1, 1), (1, 1)]),
    ],
)
def test_each_level_shrinks_by_the_factor_and_never_to_nothing(scale, sides):
    found, y = _sides(ScaledUNet(2, 3, widths=(4, 4, 4)), torch.randn(1, 2, 16, 9), torch.tensor(scale))
    assert found == sides and y.shape == (1, 3, 16, 9)


def test_at_a_half_it_is_a_plain_unet():
    net, x = ScaledUNet(1, 2, widths=(4, 6)), torch.randn(2, 1, 8, 8)
    top = net.down[0](x)
    low = interpolate(net.down[1](avg_pool2d(top, 2)), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(net(x), net.head(net.up[0](torch.cat([top, low], 1))))


def test_a_single_level_needs_no_factor():
    net, x = ScaledUNet(1, 2, widths=(4,)), torch.randn(1, 1, 8, 8)
    assert net(x, 0.1).equal(net(x, 0.5))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5, float("nan")])
def test_a_factor_that_shrinks_nothing_or_everything_is_refused(scale):
    with pytest.raises(ValueError, match=r"^scaled_unet: scale: expected a number in \(0, 1\], got"):
        ScaledUNet(1, 1)(torch.zeros(1, 1, 8, 8), scale)


@pytest.mark.parametrize("widths", [(), (4, 0)])
def test_widths_are_at_least_one_and_positive(widths):
    with pytest.raises(ValueError, match="widths: expected at least one, each at least 1"):
        ScaledUNet(1, 1, widths=widths)
