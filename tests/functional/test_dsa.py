"""Each operation pixel by pixel against slow restatements, its numbers, and what the gradients need."""

import math

import pytest
import torch

from hasten.functional.dsa import DSA_OPS, Draw, dsa, dsa_draw


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=3, channels=2, size=6, seed=1):
    return torch.randn(batch, channels, size, size, generator=generator(seed), dtype=torch.float64)


def drawn(op, batch=3, size=6, seed=0, share="sample"):
    return dsa_draw([op], batch, size, share=share, generator=generator(seed))


def pixel(image, row, column):
    """0 outside of the image (H, W)."""
    inside = 0 <= row < image.shape[0] and 0 <= column < image.shape[1]
    return float(image[row, column]) if inside else 0.0


def bilinear(image, y, x):
    """Of an image (H, W) at y, x in [-1, 1], the centres of the outer pixels."""
    row, column = (y + 1) / 2 * (image.shape[0] - 1), (x + 1) / 2 * (image.shape[1] - 1)
    up, left = math.floor(row), math.floor(column)
    return sum(
        pixel(image, up + i, left + j) * (1 - abs(row - up - i)) * (1 - abs(column - left - j))
        for i in (0, 1)
        for j in (0, 1)
    )


def slowly(before, draw):
    """What ``draw`` makes of the images, by loops."""
    after = before.clone()
    batch, channels, height, width = before.shape
    for b in range(batch):
        values = [float(value[b if len(value) > 1 else 0]) for value in draw.values]
        where = [(c, i, j) for c in range(channels) for i in range(height) for j in range(width)]
        if draw.op == "color":
            brightness, saturation, contrast = values
            after[b] += brightness
            for i, j in {(i, j) for _, i, j in where}:
                grey = sum(float(after[b, c, i, j]) for c in range(channels)) / channels
                for c in range(channels):
                    after[b, c, i, j] = grey + saturation * (after[b, c, i, j] - grey)
            mean = sum(float(after[b, c, i, j]) for c, i, j in where) / len(where)
            after[b] = mean + contrast * (after[b] - mean)
            continue
        for c, i, j in where:
            y, x = 2 * i / (height - 1) - 1, 2 * j / (width - 1) - 1
            if draw.op == "crop":
                after[b, c, i, j] = pixel(before[b, c], i + int(values[0]), j + int(values[1]))
            elif draw.op == "cutout":
                side = int(height / 2 + 0.5)
                top, left = (int(centre) - side // 2 for centre in values)
                if top <= i < top + side and left <= j < left + side:
                    after[b, c, i, j] = 0
            elif draw.op == "flip" and values[0]:
                after[b, c, i, j] = before[b, c, i, width - 1 - j]
            elif draw.op == "scale":
                after[b, c, i, j] = bilinear(before[b, c], y * values[1], x * values[0])
            elif draw.op == "rotate":
                cos, sin = math.cos(math.radians(values[0])), math.sin(math.radians(values[0]))
                after[b, c, i, j] = bilinear(before[b, c], sin * x + cos * y, cos * x - sin * y)
    return after


@pytest.mark.parametrize("share", ["sample", "batch"])
@pytest.mark.parametrize("size", [5, 6, 8])
@pytest.mark.parametrize("op", DSA_OPS)
def test_an_operation_is_what_loops_over_the_pixels_say(op, size, share):
    before = images(size=size)
    for seed in range(5):
        draw = drawn(op, size=size, seed=seed, share=share)
        torch.testing.assert_close(dsa(before, draw), slowly(before, draw), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("op", "size", "ranges"),
    [
        ("color", 8, [(-0.5, 0.5), (0, 2), (0.5, 1.5)]),
        ("crop", 8, [{-2, -1, 0, 1, 2}] * 2),
        ("crop", 10, [{-3, -2, -1, 0, 1, 2, 3}] * 2),  # int(2.5 + 0.5)
        ("cutout", 8, [set(range(9))] * 2),
        ("cutout", 5, [set(range(5))] * 2),  # a square of 3, whose centre is a pixel
        ("flip", 8, [{False, True}]),
        ("scale", 8, [(1 / 1.2, 1.2)] * 2),
        ("rotate", 8, [(-15, 15)]),
    ],
)
def test_numbers_fill_their_range_evenly(op, size, ranges):
    draw = drawn(op, batch=4000, size=size)
    assert len(draw.values) == len(ranges)
    for values, wanted in zip(draw.values, ranges, strict=True):
        if isinstance(wanted, set):
            assert set(values.tolist()) == wanted
            shares = [(values == value).float().mean().item() * len(wanted) for value in wanted]
            assert all(0.8 < share < 1.2 for share in shares)
            continue
        low, high = wanted
        assert values.min() >= low and values.max() < high + 1e-6
        assert values.min() < low + 0.01 * (high - low) and values.max() > high - 0.01 * (high - low)
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)


def test_numbers_of_one_operation_do_not_hang_together():
    for op in ("color", "crop", "cutout", "scale"):
        values = torch.stack([value.double() for value in drawn(op, batch=4000).values])
        assert (torch.corrcoef(values) - torch.eye(len(values))).abs().max() < 0.06


def test_every_operation_is_as_likely():
    draws, stream = 3000, generator()
    names = [dsa_draw(DSA_OPS, 1, 8, generator=stream).op for _ in range(draws)]
    assert all(0.85 < names.count(op) * len(DSA_OPS) / draws < 1.15 for op in DSA_OPS)
    assert {dsa_draw(["crop", "color"], 1, 8, generator=stream).op for _ in range(40)} == {"crop", "color"}


@pytest.mark.parametrize("op", DSA_OPS)
def test_a_draw_is_a_value_and_the_global_generator_is_left_alone(op):
    state = torch.get_rng_state()
    draw, again, other = drawn(op, batch=8), drawn(op, batch=8), drawn(op, batch=8, seed=7)
    before = images(batch=8)
    assert torch.equal(dsa(before, draw), dsa(before, draw)) and torch.equal(dsa(before, draw), dsa(before, again))
    assert not torch.equal(dsa(before, draw), dsa(before, other))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("op", DSA_OPS)
def test_a_shared_draw_does_the_same_to_any_number_of_images(op):
    draw = drawn(op, batch=99, share="batch")
    one = images(batch=1)
    torch.testing.assert_close(dsa(one.expand(4, -1, -1, -1), draw), dsa(one, draw).expand(4, -1, -1, -1))


@pytest.mark.parametrize("op", DSA_OPS)
def test_gradients_flow_twice_through_every_operation(op):
    draw, before = drawn(op, batch=2, size=4), images(batch=2, size=4).requires_grad_()

    def cubed(images):
        return dsa(images, draw) ** 3

    assert torch.autograd.gradcheck(cubed, before)
    assert torch.autograd.gradgradcheck(cubed, before)


def test_nothing_is_clamped():
    bright = dsa(torch.full((1, 1, 4, 4), 5.0), Draw("color", tuple(torch.tensor([v]) for v in (0.4, 1.0, 1.0))))
    torch.testing.assert_close(bright, torch.full((1, 1, 4, 4), 5.4))


@pytest.mark.parametrize("op", DSA_OPS)
def test_single_precision_stays_so(op):
    assert dsa(images().float(), drawn(op)).dtype == torch.float32


@pytest.mark.parametrize(
    ("ops", "share", "message"),
    [
        ([], "sample", "ops: expected at least one of color, crop, cutout, flip, scale, rotate, got none"),
        (["crop", "colour"], "sample", "ops: expected names of operations, got 'colour'; did you mean 'color'?"),
        (["crop"], "all", "share: expected 'sample' or 'batch', got 'all'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(ops, share, message):
    with pytest.raises(ValueError) as caught:
        dsa_draw(ops, 2, 8, share=share, generator=generator())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_draw_for_other_images_is_refused():
    with pytest.raises(ValueError, match="expected the 3 images that the draw is for, got 4"):
        dsa(images(batch=4), drawn("crop", batch=3))
