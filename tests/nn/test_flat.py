import math

import pytest
import torch
from torch import nn

from hasten.functional import InnerStep, matching_gradients, soft_cross_entropy, unrolled_matching_gradients
from hasten.nn import ConvNet, FlatModel


def convnet(width=4):
    return ConvNet(1, 8, 3, width=width, depth=2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.last = nn.Linear(3, 3, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.first(x))


def test_it_is_the_network_of_these_parameters():
    nets, images = [convnet(), convnet()], torch.randn(5, 1, 8, 8)
    flat = FlatModel(convnet())
    for net in nets:
        assert flat(flat.flatten(net), images).equal(net(images))


def test_names_and_shapes_are_those_of_named_parameters():
    net = convnet()
    flat = FlatModel(net)
    assert list(flat.names) == [name for name, _ in net.named_parameters()]
    assert list(flat.shapes) == [parameter.shape for parameter in net.parameters()]
    assert flat.numel == sum(parameter.numel() for parameter in net.parameters())


def test_theta_gets_the_gradient_of_the_network():
    net, images = convnet(), torch.randn(5, 1, 8, 8)
    flat = FlatModel(net)
    theta = flat.flatten(net).requires_grad_()
    (found,) = torch.autograd.grad(flat(theta, images).square().mean(), theta)
    net(images).square().mean().backward()
    torch.testing.assert_close(found, torch.cat([p.grad.flatten() for p in net.parameters()]))


def test_the_sweep_through_a_convnet_is_the_full_unroll():
    net = convnet().double()
    flat = FlatModel(net)
    start = flat.flatten(net)
    images, labels = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    steps = [InnerStep(torch.arange(6)), InnerStep(torch.tensor([4, 1]))] * 3
    arguments = start, start + 0.01, images, labels, torch.tensor(0.05, dtype=torch.float64), steps
    found, expected = (
        gradients(lambda theta, x, y, draw: soft_cross_entropy(flat(theta, x), y), *arguments)
        for gradients in (matching_gradients, unrolled_matching_gradients)
    )
    for name in ("images", "labels", "lr"):
        a, b = getattr(found, name), getattr(expected, name)
        assert b.abs().max() > 0
        assert (a - b).abs().max() < 1e-9 * b.abs().max()


def test_flatten_copies_and_filled_shares_no_memory():
    net = convnet()
    flat = FlatModel(net)
    theta = flat.flatten(net)
    before = theta.clone()
    with torch.no_grad():
        net.classifier.weight.add_(1)
        for parameter in (filled := flat.filled(theta)).parameters():
            parameter.zero_()
    assert theta.equal(before) and not theta.requires_grad
    assert not flat.flatten(filled).any()


def test_filled_is_a_new_network_with_these_weights_in_eval_mode():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    flat = FlatModel(net)
    one, other = flat.filled(flat.flatten(net)), flat.filled(torch.zeros(flat.numel))
    assert not one.training and not one[1].training and net.training
    assert all(a.equal(b) for a, b in zip(one.parameters(), net.parameters(), strict=True))
    assert all(p.requires_grad for p in one.parameters()) and not any(p.any() for p in other.parameters())
    x = torch.randn(2, 3)
    assert one(x).equal(net[0](x)) and flat(flat.flatten(net), x).equal(net[0](x))


def test_the_model_it_was_made_of_stays_as_it_was():
    net = convnet()
    parameters, values = list(net.parameters()), [p.detach().clone() for p in net.parameters()]
    flat = FlatModel(net)
    flat(torch.zeros(flat.numel), torch.zeros(1, 1, 8, 8))
    assert net.training
    assert all(a is b and a.equal(v) for a, b, v in zip(net.parameters(), parameters, values, strict=True))


def test_it_holds_no_memory_of_its_own():
    flat = FlatModel(convnet())
    assert all(p.is_meta for p in flat._template.parameters())


def test_tied_parameters_stand_in_theta_once_and_stay_tied():
    net, x = Tied(), torch.randn(2, 3)
    flat = FlatModel(net)
    theta = flat.flatten(net)
    assert flat.names == ("first.weight", "first.bias") and flat.numel == 12
    assert flat(theta, x).equal(net(x))
    filled = flat.filled(theta)
    assert filled.last.weight is filled.first.weight and filled(x).equal(net(x))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)])
def test_batch_norm_is_refused_by_name(norm):
    with pytest.raises(ValueError, match=r"without batch norm, got BatchNorm2d at '0.1'; use norm=instance"):
        FlatModel(nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), norm)))


def test_buffers_are_refused_by_name():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_buffer("scale", torch.ones(()), persistent=False)
    with pytest.raises(ValueError, match=r"without buffers, got '0.scale'"):
        FlatModel(net)


def test_another_network_is_refused_by_its_first_difference():
    flat = FlatModel(convnet())
    with pytest.raises(ValueError, match=r"expected blocks.0.0.weight \(4, 1, 3, 3\), got blocks.0.0.weight \(5, 1,"):
        flat.flatten(convnet(width=5))
    with pytest.raises(ValueError, match=r"parameter 1: expected bias \(2,\), got none"):
        FlatModel(nn.Linear(3, 2)).flatten(nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match=r"parameter 1: expected none, got bias \(2,\)"):
        FlatModel(nn.Linear(3, 2, bias=False)).flatten(nn.Linear(3, 2))


@pytest.mark.parametrize("use", [lambda flat, theta: flat(theta, torch.ones(1, 3)), FlatModel.filled])
def test_a_theta_of_another_size_is_refused(use):
    with pytest.raises(ValueError, match=r"theta: expected one vector of 8 parameters, got \(9,\)"):
        use(FlatModel(nn.Linear(3, 2)), torch.zeros(9))


def test_drawn_parameters_are_a_layers_own_and_the_global_generator_is_left_alone():
    flat, before = FlatModel(ConvNet(1, 8, 10, width=4, depth=2)), torch.get_rng_state()
    one, other, again = flat.drawn(5), flat.drawn(6), flat.drawn(5)
    assert torch.get_rng_state().equal(before)
    assert torch.equal(one, again) and not torch.equal(one, other)
    weight = flat.filled(one).classifier.weight
    bound = 1 / math.sqrt(weight.shape[1])  # a linear layer's own initialisation
    assert 0.9 * bound < weight.abs().max() <= bound
    assert torch.equal(flat.filled(one).blocks[0][1].weight, torch.ones(4))  # a norm's


def test_a_layer_that_cannot_draw_its_parameters_is_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.scale * x

    flat = FlatModel(nn.Sequential(nn.Linear(3, 3), Scaled()))
    with pytest.raises(ValueError, match="got Scaled at '1' without"):
        flat.drawn(0)
