"""DiscriminativeArea: when the maps are renewed, whom they ask for what, and that a resumed run has the same ones."""

import pytest
import torch
import torch.nn.functional as F

from hasten.functional import discriminative_weight, grad_cam, smooth_grad_cam_pp
from hasten.nn import ConvNet, DiscriminativeArea

LABELS = torch.arange(4)


def net():
    torch.manual_seed(0)
    return ConvNet(1, 8, 6, width=6, depth=2).eval()


def images(seed=0):
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_weight_is_that_of_the_maps_in_the_size_of_the_images():
    model = net()
    guide = DiscriminativeArea(model, beta=2.0, threshold=0.4)
    found = guide.weight(images(), LABELS, iteration=0, generator=draws())
    maps = smooth_grad_cam_pp(model, "blocks.1.2", images(), LABELS, generator=draws())
    cam = F.interpolate(maps[:, None], size=(8, 8), mode="bilinear")[:, 0]
    torch.testing.assert_close(guide.cam, cam)
    torch.testing.assert_close(found, discriminative_weight(cam, beta=2.0, threshold=0.4)[:, None])
    assert found.shape == (4, 1, 8, 8) and not found.requires_grad


def test_many_images_are_asked_for_in_parts_and_give_the_same_maps():
    many, labels = torch.randn(130, 1, 8, 8, generator=draws()), torch.arange(130) % 6
    model = net()
    guide = DiscriminativeArea(model, "blocks.1.2", saliency=grad_cam)
    guide.weight(many, labels, iteration=0, generator=draws())
    maps = grad_cam(model, "blocks.1.2", many, labels)
    torch.testing.assert_close(guide.cam, F.interpolate(maps[:, None], size=(8, 8), mode="bilinear")[:, 0])


def renewals(asked, every):
    """At which of the iterations ``asked`` the maps are new."""
    guide, seen = DiscriminativeArea(net(), saliency=grad_cam, every=every), []
    for iteration in asked:
        before = guide.cam
        guide.weight(images(iteration), LABELS, iteration=iteration, generator=draws())
        if guide.cam is not before:
            seen.append(iteration)
    return seen


def test_maps_are_renewed_every_so_many_iterations_and_stale_between():
    assert renewals(range(10), every=3) == [0, 3, 6, 9]
    assert renewals(range(3), every=1) == [0, 1, 2]


def test_an_iteration_that_was_skipped_puts_no_renewal_off():
    assert renewals([0, 1, 2, 4, 5, 6, 7], every=3) == [0, 4, 6]


def test_classes_say_which_logit_each_label_asks_for():
    model = net()
    guide = DiscriminativeArea(model, saliency=grad_cam, classes=[5, 3, 1, 0])
    guide.weight(images(), LABELS, iteration=0, generator=draws())
    other = DiscriminativeArea(model, saliency=grad_cam)
    other.weight(images(), torch.tensor([5, 3, 1, 0]), iteration=0, generator=draws())
    assert torch.equal(guide.cam, other.cam)


def test_a_resumed_guide_goes_on_with_the_stale_maps():
    def weights(guide, iterations):
        return [
            guide.weight(images(iteration), LABELS, iteration=iteration, generator=draws(iteration))
            for iteration in iterations
        ]

    whole = weights(DiscriminativeArea(net(), every=4), range(10))
    first, second = DiscriminativeArea(net(), every=4), DiscriminativeArea(net(), every=4)
    begun = weights(first, range(6))
    second.load_state_dict(first.state_dict())
    for found, expected in zip(begun + weights(second, range(6, 10)), whole, strict=True):
        assert torch.equal(found, expected)


def test_the_net_may_be_set_later():
    guide = DiscriminativeArea()
    with pytest.raises(ValueError, match=r"guide: net: expected a network .* got None; set guide.net"):
        guide.weight(images(), LABELS, iteration=0, generator=draws())
    guide.net = net()
    assert guide.weight(images(), LABELS, iteration=0, generator=draws()).shape == (4, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "guide: every: expected >= 1 iteration, got 0"),
        ({"beta": -0.5}, "guide: beta: expected >= 0, got -0.5"),
    ],
)
def test_impossible_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        DiscriminativeArea(net(), **options)


def test_a_class_map_of_another_length_is_refused():
    guide = DiscriminativeArea(net(), classes=[5, 3, 1])
    with pytest.raises(ValueError, match="classes: expected an index for each of 4 labels, got 3"):
        guide.weight(images(), LABELS, iteration=0, generator=draws())


def test_a_net_without_a_layer_for_maps_needs_its_name():
    guide = DiscriminativeArea(torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3)))
    with pytest.raises(ValueError, match="layer: expected the name of a layer, as Sequential has no saliency_layer"):
        guide.weight(images(), LABELS, iteration=0, generator=draws())
