"""The control of a hypernetwork: as many plain networks as values."""

import pytest
import torch
from torch import nn

from hasten.nn import Choice, Range, ScaledUNet, SeparateModels


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def test_a_call_is_that_of_the_network_of_the_nearest_value():
    nets = SeparateModels(_net(), {"angle": (0, 180)}, n=3, base_init="kaiming")
    x = torch.randn(2, 1, 4, 4)
    for angle, index in [(0, 0), (44.0, 0), (torch.tensor(46.0), 1), (180, 2), (torch.tensor(500.0), 2)]:
        assert nets(x, angle=angle).equal(nets.models[index](x))
    assert not nets(x, angle=0).equal(nets(x, angle=180))


def test_values_are_even_as_the_range_spreads_them():
    nets = SeparateModels(_net(), {"strength": Range(1e-4, 1.0, log=True)}, n=3)
    torch.testing.assert_close(nets.values, torch.tensor([1e-4, 1e-2, 1.0]))
    x = torch.randn(1, 1, 4, 4)
    assert nets(x, strength=2e-3).equal(nets.models[1](x))


def test_draws_are_the_values_each_as_often():
    nets = SeparateModels(_net(), {"angle": (0, 180)}, n=3)
    drawn = nets.sample_inputs(3000, generator=torch.Generator().manual_seed(0))["angle"]
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == [0, 90, 180] and counts.min() > 900
    assert nets.sample_inputs()["angle"].shape == ()


def test_a_step_at_one_value_trains_its_network_alone():
    nets = SeparateModels(_net(), {"angle": (0, 180)}, n=3)
    nets(torch.randn(2, 1, 4, 4), angle=90).sum().backward()
    assert [any(p.grad is not None for p in net.parameters()) for net in nets.models] == [False, True, False]


def test_the_model_is_copied_and_kaiming_draws_each_copy_anew():
    net = _net()
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    same, drawn = (SeparateModels(net, {"a": (0, 1)}, n=2, base_init=init) for init in ("keep", "kaiming"))
    assert all(net.state_dict()[name].equal(value) for name, value in kept.items())
    assert same.models[0][0].weight.equal(same.models[1][0].weight)
    assert not drawn.models[0][0].weight.equal(drawn.models[1][0].weight)
    assert drawn.models[0][3].weight.equal(net[3].weight)  # the last layer is never generated


def test_an_input_of_the_model_reaches_it():
    nets = SeparateModels(ScaledUNet(1, 1, widths=(2, 2)), {"scale": (0.1, 0.5)}, n=2, model_inputs=["scale"])
    x = torch.randn(1, 1, 8, 8)
    assert nets(x, scale=torch.tensor(0.4)).equal(nets.models[1](x, 0.4))


@pytest.mark.parametrize("inputs", [{"a": (0, 1), "b": (0, 1)}, {"a": Choice(["x", "y"])}, {"a": Range(0, 1, dim=2)}])
def test_what_is_no_single_range_is_refused(inputs):
    with pytest.raises(ValueError, match=r"^separate_models: inputs: expected a single range of one number, got"):
        SeparateModels(_net(), inputs)


def test_bad_calls_are_one_line():
    with pytest.raises(ValueError, match="n: expected at least 2, got 1"):
        SeparateModels(_net(), {"a": (0, 1)}, n=1)
    nets, x = SeparateModels(_net(), {"a": (0, 1)}), torch.randn(2, 1, 4, 4)
    with pytest.raises(TypeError, match="inputs: expected a, got none"):
        nets(x)
    with pytest.raises(ValueError, match=r"a: expected one value for the batch, got \(2,\); use draw='batch'"):
        nets(x, a=torch.rand(2))
