"""hypernetize with one value of each input: equal to the formulas, the model untouched, and what is refused."""

import copy
import io
import logging
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from hasten.nn import Basis, Choice, Chunked, Dense, HyperModel, LoRA, Range, head_sizes, hypernetize

ANGLE = {"angle": (0, 180)}
HEADS = [Dense(), Basis(4), LoRA(4), Chunked(64)]


class Net(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.norm = nn.GroupNorm(2, 8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv2(self.norm(self.conv1(x)).relu()).relu().mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))  # at the root
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x @ self.weight).tanh())


class Scaled(nn.Module):
    """A model that sees the input too, as a factor."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, *, factor):
        return self.norm(self.fc(x) * factor)


class Told(nn.Module):
    """A model that notes what it is told of the input."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.told = []

    def forward(self, x, factor):
        self.told.append(factor)
        return self.fc(x)


def images(n=2, dtype=torch.float32):
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(5)).to(dtype)


def net(dtype=torch.float32, norm=True):
    torch.manual_seed(1)
    return Net(norm).to(dtype)


# against the formulas


def slow_theta(theta0, trunk, rows, angle, noise):
    """Section 3 and 4 of MIP for two inputs, a linear and a logarithmic one, with loops where there are matrices."""
    z = [angle / 180, math.log(noise / 0.01) / math.log(1 / 0.01)]
    h = [math.cos(math.pi * v / 2) for v in z] + [math.sin(math.pi * v / 2) for v in z]
    h = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in h])
    for weight, bias in trunk:
        h = torch.stack([(weight[i] * h).sum() + bias[i] for i in range(len(weight))])
        h = torch.where(h > 0, h, 0.01 * h)
    return {name: own + (rows[name] * h).sum(-1).view(own.shape) for name, own in theta0.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_five_steps_equal_those_of_a_slow_hypernetwork(optimizer):
    names = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    inputs = {"angle": (0, 180), "noise": Range(0.01, 1, log=True)}
    fast = hypernetize(net(torch.float64), inputs, norm="per_dim", hidden=(5, 7))
    assert fast.names == tuple(names)
    slow = net(torch.float64)
    trunk = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in fast.hyper.trunk[::2]]
    sizes = [slow.get_parameter(name).numel() for name in names]
    rows = dict(zip(names, fast.hyper.head.weight.detach().clone().split(sizes), strict=True))
    own = dict(slow.named_parameters())
    of_slow = [*own.values(), *(t.requires_grad_() for pair in trunk for t in pair), *rows.values()]
    rows = {name: each.requires_grad_() for name, each in rows.items()}
    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    }[optimizer]
    steps = made(fast.parameters()), made(of_slow)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(4, 1, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (4,), generator=generator)
        angle, noise = (torch.rand(2, generator=generator, dtype=torch.float64) * torch.tensor([180, 0.9])).tolist()
        noise += 0.05
        theta = slow_theta({name: own[name] for name in names}, trunk, rows, angle, noise)
        logits = fast(x, angle=angle, noise=noise), torch.func.functional_call(slow, theta, x)
        assert (logits[0] - logits[1]).abs().max() <= 1e-12
        for step, output in zip(steps, logits, strict=True):
            step.zero_grad()
            nn.functional.cross_entropy(output, y).backward()
        for name in own:
            assert (fast.model.get_parameter(name).grad - own[name].grad).abs().max() <= 1e-12
        found = [each for layer in fast.hyper.trunk[::2] for each in (layer.weight.grad, layer.bias.grad)]
        found.append(fast.hyper.head.weight.grad)
        wanted = [each.grad for pair in trunk for each in pair] + [torch.cat([rows[name].grad for name in names])]
        assert max((a - b).abs().max() for a, b in zip(found, wanted, strict=True)) <= 1e-12
        for step in steps:
            step.step()
    # Adam divides rounding errors by gradients that may be as small
    for name in own:
        torch.testing.assert_close(fast.model.get_parameter(name), own[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_five_steps_equal_hyperlights(optimizer, dtype, tolerance):
    hl = pytest.importorskip("hyperlight")
    inputs = {"a": (0, 1), "b": (0, 1)}  # hyperlight sorts names
    ours = hypernetize(net(dtype), inputs, norm="per_dim")
    target = net(dtype)
    layers = [target.conv1, target.conv2]
    target, values = hl.hypernetize(target, modules=layers, return_values=True)
    shapes = target.external_shapes()
    theirs = hl.HyperNet(input_shapes={"a": (1,), "b": (1,)}, output_shapes=shapes, hidden_sizes=[16, 64, 128])
    theirs.to(dtype)
    sizes = [ours.model.get_parameter(name).numel() for name in ours.names]
    rows = dict(zip(ours.names, ours.hyper.head.weight.detach().split(sizes), strict=True))
    with torch.no_grad():
        for i, layer in enumerate(ours.hyper.trunk[::2]):
            getattr(theirs.backbone, f"block{i}_lin").load_state_dict(layer.state_dict())
        theirs.backbone.output.weight.copy_(torch.cat([rows[name] for name in shapes]))
        theirs.backbone.output.bias.copy_(torch.cat([values[name].flatten() for name in shapes]))
    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, lr=2e-3),
    }[optimizer]
    steps = made(ours.parameters()), made([*target.parameters(), *theirs.parameters()])
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(4, 1, 6, 6, generator=generator).to(dtype)
        y = torch.randint(3, (4,), generator=generator)
        a, b = torch.rand(2, generator=generator).to(dtype)
        with target.using_externals(theirs(a=a.view(1, 1), b=b.view(1, 1))):
            expected = target(x)
        logits = ours(x, a=a, b=b)
        assert (logits - expected).abs().max() <= tolerance
        for step, output in zip(steps, (logits, expected), strict=True):
            step.zero_grad()
            nn.functional.cross_entropy(output, y).backward()
        of_theirs = theirs.backbone.output.bias.grad.split([math.prod(shape) for shape in shapes.values()])
        for name, gradient in zip(shapes, of_theirs, strict=True):
            assert (ours.model.get_parameter(name).grad.flatten() - gradient).abs().max() <= tolerance
        for step in steps:
            step.step()
    for name, own in theirs.get_independent_weights().items():
        assert (ours.model.get_parameter(name) - own).abs().max() <= tolerance


def slope(**options):
    """Of log |theta| over log input, mean over 20 starts: 1 is proportional, 0 invariant."""
    slopes = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        hyper = hypernetize(net(torch.float64), {"a": (0, 1)}, generator=generator, **options)
        low, high = (torch.cat([w.flatten() for w in hyper.generate(a=a).values()]).norm() for a in (0.01, 1))
        slopes.append((high / low).log().item() / math.log(100))
    return sum(slopes) / len(slopes)


def test_generated_weights_are_proportional_to_a_raw_input_and_not_to_an_encoded_one():
    assert slope(encoding=None, residual=False) == pytest.approx(1, abs=1e-9)
    assert abs(slope(residual=False)) < 0.1
    assert abs(slope()) < 0.05


def test_theta_is_the_models_own_value_plus_delta():
    hyper = hypernetize(net(), ANGLE)
    theta, delta = hyper.generate(angle=20), hyper.delta(angle=20)
    for name in hyper.names:
        assert theta[name].equal(hyper.model.get_parameter(name) + delta[name])
        assert delta[name].any()


# the model stays as it is


def test_the_model_keeps_its_identity_class_keys_values_and_hooks():
    model = net()
    modules, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    hyper = hypernetize(model, ANGLE)
    hyper(images(), angle=3)
    hyper.materialize(angle=3)
    assert hyper.model is model and type(model) is Net
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == before.keys()
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(type(own) is nn.Parameter and own.is_leaf for own in model.parameters())


def test_a_state_dict_is_the_models_own_keys_and_hyper():
    hyper = hypernetize(net(), ANGLE | {"kind": Choice("abc", dim=4)})
    assert {key for key in hyper.state_dict() if key.startswith("model.")} == {
        f"model.{key}" for key in net().state_dict()
    }
    assert all(key.startswith(("model.", "hyper.")) for key in hyper.state_dict())


def test_pretrained_timm_weights_load_after_and_before():
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    pretrained = timm.create_model("test_vit", num_classes=3).eval()
    hyper = hypernetize(timm.create_model("test_vit", num_classes=3).eval(), ANGLE, params="norm", init="zero")
    hyper.model.load_state_dict(pretrained.state_dict())
    x = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(hyper(x, angle=5), pretrained(x))
    assert hyper.model.get_parameter("blocks.0.norm1.weight").equal(torch.ones(64))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.MultiheadAttention(4, 2, batch_first=True), lambda: (torch.randn(2, 3, 4),) * 3),
        (nn.LSTM(4, 5, num_layers=2, batch_first=True), lambda: (torch.randn(2, 3, 4),)),
        (nn.LayerNorm(4), lambda: (torch.randn(2, 3, 4),)),
    ],
)
def test_layers_that_pack_their_weights_get_theta_and_keep_their_own_start(layer, x):
    before = copy.deepcopy(layer.state_dict())
    hyper = hypernetize(layer, ANGLE, params="all")
    assert all(before[name].equal(value) for name, value in layer.state_dict().items())
    written = copy.deepcopy(layer)
    written.load_state_dict(hyper.generate(angle=50))
    args = x()
    found, expected = hyper(*args, angle=50), written(*args)
    found, expected = (out[0] if isinstance(out, tuple) else out for out in (found, expected))
    torch.testing.assert_close(found, expected)


def test_tied_weights_get_one_delta_and_stay_tied():
    model = Tied()
    hyper = hypernetize(model, ANGLE, params=["weight", "two.weight"])
    assert hyper.names == ("weight", "one.weight")
    x, theta = torch.randn(3, 4), hyper.generate(angle=60)
    slow = ((x @ theta["weight"]) @ theta["one.weight"].T + model.one.bias).tanh() @ theta["one.weight"].T
    torch.testing.assert_close(hyper(x, angle=60), slow)
    hyper(x, angle=60).sum().backward()
    found = model.one.weight.grad.clone()
    (expected,) = torch.autograd.grad(slow.sum(), model.one.weight)
    torch.testing.assert_close(found, expected)
    written = hyper.materialize(angle=60)
    assert written.two.weight is written.one.weight
    torch.testing.assert_close(written(x), slow)


def test_a_models_padding_and_repr_are_its_own():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Conv2d(2, 2, 3))
    hyper = hypernetize(model, ANGLE, init="zero")
    assert hyper(images(), angle=3).equal(model(images()))
    assert "padding_mode=circular" in repr(hyper)


def test_an_exception_in_forward_leaves_the_model_usable():
    hyper = hypernetize(net(), ANGLE)
    before, expected = copy.deepcopy(hyper.model.state_dict()), hyper(images(), angle=9)
    with pytest.raises(RuntimeError):
        hyper(torch.randn(2, 5, 6, 6), angle=9)
    assert all(before[name].equal(value) for name, value in hyper.model.state_dict().items())
    assert hyper(images(), angle=9).equal(expected)


# what is generated


def test_auto_is_every_convolution_and_linear_layer_but_the_last():
    assert hypernetize(net(), ANGLE).names == ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("norm", ["norm.weight", "norm.bias"]),
        ("*.weight", ["conv1.weight", "norm.weight", "conv2.weight", "fc.weight"]),
        (nn.Linear, ["fc.weight", "fc.bias"]),
        (lambda name, own, owner: own.ndim == 4, ["conv1.weight", "conv2.weight"]),
    ],
)
def test_params_are_chosen_by_word_glob_class_and_predicate(params, names):
    hyper = hypernetize(net(), ANGLE, params=params)
    assert list(hyper.names) == names
    hyper(images(), angle=1).sum().backward()
    assert hyper.hyper.head.weight.grad.any()


def test_what_is_generated_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="hasten"):
        hyper = hypernetize(net(), ANGLE, params="norm")
        hyper(images(), angle=1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "parameters of Dense() from angle: norm.weight (8,), norm.bias (8,)" in line


def test_the_log_counts_the_parameters_of_the_hypernetwork(caplog):
    with caplog.at_level(logging.INFO, logger="hasten"):
        hyper = hypernetize(net(), ANGLE)
    assert f"hypernetize: {sum(own.numel() for own in hyper.hyper.parameters()):,} parameters of" in caplog.text


# the start


def test_kaiming_draws_kernels_and_matrices_anew_and_keeps_the_rest():
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.GroupNorm(4, 64), nn.Conv2d(64, 8, 3))
    nn.init.constant_(model[1].weight, 3.0)
    untouched = model[2].weight.clone()
    hypernetize(model, ANGLE, params=["0.*", "1.*"], base_init="kaiming", generator=torch.Generator().manual_seed(0))
    assert model[0].weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.05)
    assert not model[0].bias.any()
    assert model[1].weight.eq(3).all() and model[2].weight.equal(untouched)
    again = copy.deepcopy(model)
    hypernetize(again, ANGLE, params=["0.*", "1.*"], base_init="kaiming", generator=torch.Generator().manual_seed(0))
    assert again[0].weight.equal(model[0].weight)


def test_without_residual_the_chosen_parameters_are_zero_and_it_says_so(caplog):
    model = net()
    fc = model.fc.weight.clone()
    hyper = hypernetize(model, ANGLE, residual=False)
    assert not any(model.get_parameter(name).any() for name in hyper.names)
    assert model.fc.weight.equal(fc)
    assert "residual=False: 4 parameters of the model were set to 0 in place" in caplog.text


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_a_zero_start_is_the_model_and_everything_learns_by_the_second_step(head):
    hyper = hypernetize(net(), ANGLE, head=head, init="zero", params="all")
    x = images(8)
    assert hyper(x, angle=7).equal(hyper.model(x))
    optimizer = torch.optim.SGD(hyper.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(hyper(x, angle=7), torch.arange(8) % 3).backward()
        optimizer.step()
    assert [name for name, own in hyper.named_parameters() if not own.grad.any()] == []


def test_a_frozen_base_trains_the_hypernetwork_alone():
    hyper = hypernetize(net(), ANGLE, freeze_base=True)
    before = copy.deepcopy(hyper.state_dict())
    optimizer = torch.optim.SGD(hyper.parameters(), lr=0.1)
    hyper(images(), angle=7).sum().backward()
    optimizer.step()
    changed = {name.partition(".")[0] for name, value in hyper.state_dict().items() if not value.equal(before[name])}
    assert changed == {"hyper"}
    assert [group["name"] for group in hyper.param_groups(base_lr=1, hyper_lr=1)] == ["hyper"]


def test_the_hypernetwork_has_the_models_dtype():
    hyper = hypernetize(net(torch.bfloat16), ANGLE)
    assert {own.dtype for own in hyper.parameters()} == {torch.bfloat16}
    assert hyper(images(dtype=torch.bfloat16), angle=7).dtype == torch.bfloat16
    hyper.double()
    assert hyper(images(dtype=torch.float64), angle=7).dtype == torch.float64


def test_what_is_generated_has_the_dtype_of_each_parameter():
    model = net()
    model.conv2.bfloat16()
    hyper = hypernetize(model, ANGLE)
    wanted = {name: model.get_parameter(name).dtype for name in hyper.names}
    assert set(wanted.values()) == {torch.float32, torch.bfloat16}
    for generated in [hyper.delta(angle=7), hyper.generate(angle=7), hyper.generate(angle=torch.tensor([7.0, 8.0]))]:
        assert {name: weights.dtype for name, weights in generated.items()} == wanted


def test_the_hypernetwork_and_what_is_drawn_for_it_are_on_the_models_device():
    hyper = hypernetize(net().to("meta"), ANGLE | {"kind": Choice("ab")})
    held = [*hyper.parameters(), *hyper.buffers(), *hyper.sample_inputs().values(), *hyper.sample_inputs(3).values()]
    assert {each.device.type for each in held} == {"meta"}


def test_by_default_the_encoding_has_norm_one_and_a_dense_head_fifty_million_parameters_at_most():
    assert hypernetize(net(), {"a": (0, 1), "b": (0, 1)}).encoding.bound == 1
    with pytest.raises(ValueError, match=r"at most 50,000,000 parameters for a dense head, got Dense\(\) 50\.08M"):
        hypernetize(nn.Sequential(nn.Linear(625, 625), nn.Linear(625, 1)), ANGLE)


# around it


def test_a_forward_draws_nothing_and_repeats():
    hyper = hypernetize(net(), ANGLE)
    state = torch.get_rng_state()
    assert hyper(images(), angle=7).equal(hyper(images(), angle=7))
    assert torch.get_rng_state().equal(state)


def test_param_groups_hold_each_parameter_once_and_decay_only_the_models_matrices():
    model = Tied()
    model.no_weight_decay = lambda: {"weight"}
    hyper = hypernetize(model, ANGLE, params="all")
    groups = {group["name"]: group for group in hyper.param_groups(base_lr=0.1, hyper_lr=0.2, weight_decay=0.3)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "base": (0.1, 0.3),
        "base_no_decay": (0.1, 0.0),
        "hyper": (0.2, 0.0),
    }
    held = [id(own) for group in groups.values() for own in group["params"]]
    assert sorted(held) == sorted(map(id, hyper.parameters()))
    assert [id(own) for own in groups["base"]["params"]] == [id(model.one.weight)]
    torch.optim.AdamW(groups.values())


def test_sampled_inputs_are_what_a_call_takes():
    inputs = ANGLE | {"noise": Range(0.1, 1, log=True, dim=3), "kind": Choice(["x", "y"])}
    hyper = hypernetize(net(), inputs)
    assert hyper(images(5), **hyper.sample_inputs()).shape == (5, 3)
    assert hyper(images(5), **hyper.sample_inputs(5)).shape == (5, 3)
    one, two = (hyper.sample_inputs(4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(one[name].equal(two[name]) for name in inputs)


def test_materialize_is_the_call_as_a_plain_module():
    hyper = hypernetize(net(), ANGLE).eval()
    written = hyper.materialize(angle=torch.tensor(77.0))
    assert type(written) is Net and written is not hyper.model
    torch.testing.assert_close(written(images()), hyper(images(), angle=77))
    assert not any(written.get_parameter(name).equal(hyper.model.get_parameter(name)) for name in hyper.names)
    written(images()).sum().backward()
    exported = torch.export.export(written.eval(), (images(),))
    torch.testing.assert_close(exported.module()(images()), written(images()))


def test_materialize_estimates_batch_statistics_anew_for_its_input():
    with pytest.warns(UserWarning, match="norm: running statistics of batch norms will mix all inputs; .*recalibrate"):
        hyper = hypernetize(Scaled(), {"factor": (1, 5)}, params="fc.*", model_inputs=["factor"])
    x = torch.randn(64, 4)
    for factor in [1, 5]:
        hyper(x, factor=factor)
    mixed = hyper.materialize(factor=5)
    assert mixed.norm.running_mean.equal(hyper.model.norm.running_mean)
    written = hyper.materialize(factor=5, recalibrate=[(x[:32], None), x[32:]])
    seen = (written.fc(x) * 5).view(2, 32, 4)
    torch.testing.assert_close(written.norm.running_mean, seen.mean(1).mean(0))
    torch.testing.assert_close(written.norm.running_var, seen.var(1).mean(0))
    assert not written._forward_pre_hooks


def test_an_input_that_the_model_takes_too_reaches_it_as_it_was_given():
    with pytest.warns(UserWarning, match="running statistics"):
        hyper = hypernetize(Scaled(), {"factor": (1, 5)}, params="fc.*", model_inputs=["factor"]).eval()
    x = torch.randn(3, 4)
    theta = hyper.generate(factor=2.0)
    expected = hyper.model.norm((x @ theta["fc.weight"].T + theta["fc.bias"]) * 2.0)
    torch.testing.assert_close(hyper(x, factor=2.0), expected)
    torch.testing.assert_close(hyper(x, factor=torch.tensor(2.0)), expected)


def test_materialize_keeps_the_mode_when_it_estimates_batch_statistics_anew():
    with pytest.warns(UserWarning, match="running statistics"):
        hyper = hypernetize(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), ANGLE)
    for training in [True, False]:
        written = hyper.train(training).materialize(angle=3, recalibrate=[torch.randn(5, 4)])
        assert {module.training for module in written.modules()} == {training}


def test_the_model_is_told_a_number_as_a_number_and_a_list_a_sample_at_a_time():
    hyper = hypernetize(Told(), {"factor": (0, 9)}, params="all", model_inputs=["factor"], per_sample="loop")
    hyper(torch.randn(3, 4), factor=3.5)
    (number,) = hyper.model.told
    assert type(number) is float and number == 3.5
    hyper.model.told.clear()
    hyper(torch.randn(3, 4), factor=[1, 2, 3])
    assert [told.tolist() for told in hyper.model.told] == [[1], [2], [3]]


def test_the_warning_of_batch_norms_points_at_the_caller():
    with pytest.warns(UserWarning, match="running statistics") as caught:
        hypernetize(Scaled(), ANGLE, params="fc.*")
    assert caught[0].filename == __file__


def test_a_batch_norm_that_keeps_no_statistics_is_no_warning():
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyper = hypernetize(nn.Sequential(*layers), ANGLE)
    assert hyper(torch.randn(3, 4), angle=7).shape == (3, 2)


# carried about


def test_it_pickles_copies_and_saves():
    hyper = hypernetize(net(), ANGLE | {"kind": Choice("ab", dim=3)}, params=lambda name, own, owner: own.ndim > 1)
    expected = hyper(images(), angle=7, kind="b")
    buffer = io.BytesIO()
    torch.save(hyper, buffer)
    buffer.seek(0)
    for twin in [pickle.loads(pickle.dumps(hyper)), copy.deepcopy(hyper), torch.load(buffer, weights_only=False)]:
        assert twin(images(), angle=7, kind="b").equal(expected)
        assert twin.names == hyper.names
        nn.init.zeros_(twin.model.fc.weight)
    assert hyper(images(), angle=7, kind="b").equal(expected)


def test_a_state_dict_carries_everything():
    one, two = (hypernetize(Net(), ANGLE | {"kind": Choice("ab", dim=3)}, head="chunked") for _ in range(2))
    two.load_state_dict(one.state_dict())
    assert two(images(), angle=7, kind="b").equal(one(images(), angle=7, kind="b"))


@pytest.mark.parametrize("head", HEADS, ids=repr)
def test_one_graph_serves_every_input(head):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    hyper = hypernetize(net(), ANGLE | {"kind": Choice("abc", dim=4)}, head=head)
    compiled = torch.compile(hyper, backend=counter, fullgraph=True)
    for angle, kind in [(3.0, 0), (90.0, 2), (180.0, 1)]:
        inputs = {"angle": torch.tensor(angle), "kind": torch.tensor(kind)}
        torch.testing.assert_close(compiled(images(), **inputs), hyper(images(), **inputs))
    assert counter.frame_count == 1


def test_it_runs_under_autocast():
    hyper = hypernetize(net(), ANGLE)
    with torch.autocast("cpu", torch.bfloat16):
        found = hyper(images(), angle=7)
    found.float().sum().backward()
    torch.testing.assert_close(found.float(), hyper(images(), angle=7), rtol=0.1, atol=0.05)
    assert hyper.hyper.head.weight.grad.any()


def _rank():
    rank = dist.get_rank()
    hyper = hypernetize(net(), ANGLE, generator=torch.Generator().manual_seed(0))
    angles, x = torch.tensor([10.0, 100.0, 50.0, 170.0]), images(4)
    alone = copy.deepcopy(hyper)
    alone(x, angle=angles).square().mean().backward()
    joined = nn.parallel.DistributedDataParallel(hyper)
    joined(x[rank::2], angle=angles[rank::2]).square().mean().backward()
    for name, own in alone.named_parameters():
        torch.testing.assert_close(hyper.get_parameter(name).grad, own.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_the_joined_batch(two_processes):
    two_processes(_rank)


# sizes


def test_the_size_table_has_a_row_a_head_and_one_for_the_norms():
    rows = head_sizes(net(), hidden=(16, 128))
    weights = 8 * 9 + 8 + 4 * 72 + 4
    assert [row["head"] for row in rows] == [
        "Dense()",
        "Basis(k=8)",
        "LoRA(r=8)",
        "Chunked(size=1024, embedding=8)",
        "Dense()",
    ]
    assert [row["params"] for row in rows] == ["auto"] * 4 + ["norm"]
    assert [row["weights"] for row in rows] == [weights] * 4 + [16]
    assert rows[0]["parameters"] == 128 * weights
    assert rows[0]["adam_gib"] == 16 * 128 * weights / 2**30
    assert len(head_sizes(net(norm=False))) == 4


def test_a_dense_head_above_the_budget_names_the_others_and_other_heads_pass():
    with pytest.raises(
        ValueError, match=r"expected at most 1,000 parameters .* use Basis\(k=8\) .*params='norm' with"
    ) as e:
        hypernetize(net(), ANGLE, max_dense_params=1000)
    assert "\n" not in str(e.value)
    assert isinstance(hypernetize(net(), ANGLE, head="basis", max_dense_params=1000), HyperModel)


def test_a_size_table_of_the_norms_has_them_once():
    assert [row["params"] for row in head_sizes(net(), params="norm")] == ["norm"] * 4


# what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": {}}, "inputs: expected at least one, got none"),
        ({"inputs": {"angle": (180, 0)}}, "range: expected finite low < high, got 180 and 0"),
        (
            {"inputs": {"x": (0, 1)}},
            "expected a name that Net.forward does not take, got 'x'; rename it, or list it in",
        ),
        ({"model_inputs": ["angle"]}, "model_inputs: expected arguments of Net.forward, got 'angle'"),
        ({"model_inputs": ["x"]}, "model_inputs: expected names of inputs, got 'x'"),
        ({"hidden": ()}, r"hidden: expected at least one width, each at least 1, got \(\)"),
        ({"hidden": (16, 0)}, r"hidden: expected at least one width, each at least 1, got \(16, 0\)"),
        ({"activation": "swish"}, "activation: expected one of leaky_relu, .*, got 'swish'"),
        ({"head": "low"}, "head: expected one of dense, basis, lora, chunked, got 'low'"),
        ({"norm": "l2"}, "norm: expected one of unit, per_dim, got 'l2'"),
        ({"encoding": "fourier"}, "encoding: expected one of cos_sin, complement, None, got 'fourier'"),
        ({"init": "normal"}, "init: expected one of fan_out, zero, got 'normal'"),
        ({"base_init": "xavier"}, "base_init: expected one of keep, kaiming, got 'xavier'"),
        ({"per_sample": "map"}, "per_sample: expected one of auto, vmap, loop, unique, got 'map'"),
        ({"out_of_range": "wrap"}, "out_of_range: expected one of clamp, error, ignore, got 'wrap'"),
        ({"params": "conv1.wieght"}, "got 'conv1.wieght' without a match; did you mean 'conv1.weight'"),
        ({"params": "conv1"}, r"got the module 'conv1'; use 'conv1.\*'"),
    ],
)
def test_arguments_that_do_not_fit_are_named_and_the_model_stays_as_it_was(arguments, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        hypernetize(model, **{"inputs": ANGLE, "base_init": "kaiming", "freeze_base": True} | arguments)
    assert "\n" not in str(error.value)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert all(own.requires_grad for own in model.parameters())


def test_auto_needs_two_layers():
    with pytest.raises(
        ValueError, match=r"params: expected at least two .* for 'auto', which leaves out the last, got 1"
    ):
        hypernetize(nn.Linear(2, 2), ANGLE)


def test_a_hypermodel_is_not_hypernetized_again():
    with pytest.raises(ValueError, match=r"model: expected a plain module, got a HyperModel; pass its \.model"):
        hypernetize(hypernetize(net(), ANGLE), ANGLE)


def test_parameters_that_cannot_be_added_to_are_named_with_the_remedy(tmp_path):
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"0.weight: expected a shape, got a lazy parameter; run the model once before"):
        hypernetize(lazy, ANGLE)
    whole = net()
    whole.conv1.bias = nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"conv1\.bias: expected floating point, got torch.int8; leave it out of params"
    ):
        hypernetize(whole, ANGLE)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        sharded = net()
        sharded.conv1.weight = nn.Parameter(distribute_tensor(sharded.conv1.weight, init_device_mesh("cpu", (1,))))
        with pytest.raises(
            TypeError, match=r"conv1\.weight: expected a whole parameter, got a sharded one; hypernetize,"
        ):
            hypernetize(sharded, ANGLE)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, TypeError, "inputs: expected angle, got none"),
        ({"angel": 3}, TypeError, "inputs: expected angle, got angel; did you mean 'angle'"),
        ({"angle": 3, "noise": 1}, TypeError, "inputs: expected angle, got noise"),
        ({"angle": 181}, ValueError, "angle: expected 0 to 180, got 181"),
        ({"angle": math.nan}, ValueError, "angle: expected 0 to 180, got nan"),
        ({"angle": torch.zeros(2, 1)}, ValueError, r"angle: expected shape \(\) or \(B\), got \(2, 1\)"),
        ({"angle": torch.zeros(3)}, ValueError, r"got 3 and arguments of shape \(2, 1, 6, 6\); pass one value for the"),
    ],
)
def test_a_call_that_does_not_fit_says_what_was_wanted(kwargs, error, message):
    with pytest.raises(error, match=message):
        hypernetize(net(), ANGLE)(images(2), **kwargs)


def test_a_tensor_out_of_range_is_clamped_or_refused_as_told():
    hyper = hypernetize(net(), ANGLE)
    assert hyper(images(), angle=torch.tensor(999.0)).equal(hyper(images(), angle=180))
    with pytest.raises(ValueError, match="angle: expected 0 to 180, got 999"):
        hypernetize(net(), ANGLE, out_of_range="error")(images(), angle=torch.tensor(999.0))


def test_generate_and_materialize_know_their_inputs_too():
    hyper = hypernetize(net(), ANGLE)
    with pytest.raises(TypeError, match="inputs: expected angle, got angle, noise"):
        hyper.generate(angle=3, noise=1)
    with pytest.raises(ValueError, match="materialize: expected one value of each input, got 4"):
        hyper.materialize(angle=torch.zeros(4))
