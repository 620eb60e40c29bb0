"""Pictures: small images are enlarged by whole factors, stray pixels are clipped, figures become pixels."""

import pytest
import torch

from hasten.formats.pictures import drawn, enlarged, labelled, new_figure, range_within, stretched, tiled


@pytest.mark.parametrize(("width", "factor"), [(8, 6), (28, 2), (48, 1), (64, 1), (1, 48)])
def test_images_are_enlarged_by_the_least_whole_factor_that_makes_them_wide_enough(width, factor):
    images = torch.rand(2, 3, 5, width)
    large = enlarged(images, 48)
    assert large.shape == (2, 3, 5 * factor, width * factor)
    assert large[..., ::factor, ::factor].equal(images) and large[..., factor - 1 :: factor, ::factor].equal(images)


def test_cells_stand_row_by_row():
    shades = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).view(2, 3, 1, 1, 1).expand(2, 3, 1, 4, 4)
    picture = tiled(shades)
    assert picture.shape == (3, 2 * 6 + 2, 3 * 6 + 2)
    assert torch.equal(picture[0, [4, 4, 4, 10, 10, 10], [4, 10, 16, 4, 10, 16]], shades[:, :, 0, 0, 0].flatten())
    assert (picture[:, :2] == 1).all()


def test_what_lies_within_so_many_deviations_fills_the_range_and_the_rest_is_clipped():
    pixels = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    low, high = range_within(pixels, 2.0)
    assert float(low) == pytest.approx(-5, abs=0.2) and float(high) == pytest.approx(7, abs=0.2)
    shown = stretched(pixels, low, high)
    assert shown.min() == 0 and shown.max() == 1
    inside = (pixels > low) & (pixels < high)
    torch.testing.assert_close(shown[inside] * (high - low) + low, pixels[inside], atol=1e-5, rtol=0)


def test_equal_pixels_are_no_nan():
    pixels = torch.full((4,), 0.5)
    assert stretched(pixels, *range_within(pixels, 2.5)).isfinite().all()


def test_names_stand_left_of_the_picture_and_leave_it_as_it_is():
    picture = torch.rand(3, 90, 40)
    named = labelled(picture, ["a", "a much longer name", "c"])
    assert named[:, :, -40:].equal(picture) and named.size(1) == 90
    strip = named[:, :, :-40]
    assert all((rows < 0.5).any() for rows in strip.chunk(3, dim=1))  # ink beside every row


def test_a_figure_has_a_hundred_pixels_an_inch():
    figure = new_figure(3, 2)
    figure.add_subplot().plot([0, 1])
    pixels = drawn(figure)
    assert pixels.shape == (3, 200, 300) and pixels.min() < 0.5 and pixels.max() == 1
