"""Models as strangers write them: what a hypernetwork cannot serve it refuses, and what it serves it serves right."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from hasten.nn import Choice, Range, hypernetize

ANGLE = {"angle": (0, 180)}
WAYS = ["vmap", "loop", "unique"]


class Body(nn.Module):
    """Two layers; what a stranger adds to them is written below."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(x).tanh())


def stranger(forward, **attributes):
    """A model with this forward, in float64."""
    model = type("Stranger", (Body,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model.double()


def samples(n=3):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def angles(n=3):
    return torch.linspace(10, 170, n, dtype=torch.float64)


# ---------------------------------------------------------------------- recomputation


@pytest.mark.parametrize("flag", ["grad_checkpointing", "gradient_checkpointing", "use_checkpoint"])
def test_activation_checkpointing_inside_of_the_model_is_refused_before_and_after(flag):
    model = Body()
    hyper = hypernetize(model, ANGLE)
    setattr(model.first, flag, True)
    with pytest.raises(RuntimeError, match=f"^hypernet: first.{flag}: expected no activation checkpointing inside"):
        hypernetize(model, ANGLE)
    with pytest.raises(RuntimeError, match="turn it off, or recompute the whole call"):
        hyper.train()
    hyper.eval()  # nothing is run again there
    setattr(model.first, flag, False)
    hyper.train()


def test_activation_checkpointing_around_the_call_has_the_gradients_of_the_call():
    hyper = hypernetize(Body().double(), ANGLE)
    parameters = list(hyper.parameters())
    plain, recomputed = (
        torch.autograd.grad(output.square().sum(), parameters)
        for output in (
            hyper(samples(), angle=30.0),
            checkpoint(lambda x: hyper(x, angle=30.0), samples(), use_reentrant=False),
        )
    )
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------- outputs


@dataclass
class Wrapped:
    logits: Tensor


class Named(OrderedDict):
    pass


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrap", [Wrapped, lambda y: Named(logits=y)], ids=["dataclass", "subclass"])
def test_outputs_that_hide_their_tensors_are_refused(way, wrap):
    hyper = hypernetize(stranger(lambda self, x: wrap(Body.forward(self, x))), ANGLE, per_sample=way)
    assert isinstance(hyper(samples(), angle=30.0), Wrapped | Named)  # one input a batch: nothing is put together
    with pytest.raises(TypeError, match=r"^hypernet: outputs: expected tensors in tuples, lists and dicts, got"):
        hyper(samples(), angle=angles())


@pytest.mark.parametrize("way", WAYS)
def test_outputs_that_do_not_have_the_samples_first_are_refused(way):
    hyper = hypernetize(stranger(lambda self, x: Body.forward(self, x).mT), ANGLE, per_sample=way)
    with pytest.raises(
        ValueError, match=r"^hypernet: outputs: expected numbers, or a row for each of 1 samples in the"
    ):
        hyper(samples(), angle=angles())


def test_the_states_of_a_recurrent_layer_which_stand_second_are_refused():
    hyper = hypernetize(nn.LSTM(4, 5, num_layers=2, batch_first=True), ANGLE, params="all")
    with pytest.raises(ValueError, match=r"got shape \(2, 1, 5\); return the samples first"):
        hyper(torch.randn(3, 6, 4), angle=angles())


def test_numbers_that_differ_between_samples_are_refused():
    hyper = hypernetize(stranger(lambda self, x: (Body.forward(self, x), float(x.sum()))), ANGLE, per_sample="loop")
    with pytest.raises(
        TypeError, match=r"^hypernet: outputs: expected what is no tensor to be the same for every sample"
    ):
        hyper(samples(), angle=angles())


# ---------------------------------------------------------------------- arguments


def test_an_input_that_the_model_names_is_refused_also_where_it_takes_any_keyword():
    model = stranger(lambda self, x, scale=1.0, **others: scale * Body.forward(self, x))
    with pytest.raises(ValueError, match=r"expected a name that Stranger.forward does not take, got 'scale'"):
        hypernetize(model, {"scale": (0, 2)})
    hyper = hypernetize(model, {"scale": (0, 2)}, model_inputs=["scale"])
    torch.testing.assert_close(hyper(samples(), scale=2.0), 2 * model_at(hyper, samples(), scale=2.0))


def model_at(hyper, x, **inputs):
    """The body with the generated weights, without what the stranger adds."""
    body = Body().double()
    return functional_call(
        body, hyper.generate(**inputs) | dict(hyper.model.last.named_parameters(prefix="last")), (x,)
    )


def test_a_misspelt_input_is_named_also_where_the_model_takes_any_keyword():
    hyper = hypernetize(stranger(lambda self, x, **others: Body.forward(self, x)), ANGLE)
    with pytest.raises(TypeError, match=r"^hypernet: inputs: expected angle, got angel; did you mean 'angle'"):
        hyper(samples(), angel=30.0)
    assert hyper(samples(), angle=30.0, anything=1).shape == (3, 2)


@pytest.mark.parametrize("way", WAYS)
def test_a_choice_is_a_position_to_the_model_however_it_is_written(way):
    seen = []

    def forward(self, x, turn):
        seen.append(turn)
        return Body.forward(self, x)

    inputs = {"turn": Choice([0, 90, 180])} | ANGLE
    hyper = hypernetize(stranger(forward), inputs, model_inputs=["turn"], per_sample=way)
    for turn in (90, torch.tensor(1)):
        hyper(samples(), turn=turn, angle=30.0)
    assert [int(turn) for turn in seen] == [1, 1]
    if way == "loop":
        hyper(samples(), turn=[90, 180, 90], angle=30.0)
        assert [turn.tolist() for turn in seen[2:]] == [[1], [2], [1]]


@pytest.mark.parametrize("way", WAYS)
def test_a_vector_that_all_samples_share_is_not_taken_apart_where_it_is_as_long_as_the_batch(way):
    model = stranger(lambda self, x, shift: Body.forward(self, x) + shift.sum())
    inputs = {"shift": Range(0, 1, dim=3)} | ANGLE
    hyper = hypernetize(model, inputs, model_inputs=["shift"], per_sample=way)
    shift = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    one_by_one = [hyper(samples()[i : i + 1], shift=shift, angle=angles()[i]) for i in range(3)]
    torch.testing.assert_close(hyper(samples(), shift=shift, angle=angles()), torch.cat(one_by_one))


@pytest.mark.parametrize("way", ["loop", "unique"])
def test_an_empty_batch_is_refused_in_one_line_where_calls_are_made_sample_by_sample(way):
    hyper = hypernetize(Body().double(), ANGLE, per_sample=way)
    with pytest.raises(ValueError, match=f"^hypernet: inputs: expected at least one sample for '{way}', got none$"):
        hyper(samples(0), angle=angles(0))


def test_an_empty_batch_is_one_by_vmap():
    assert hypernetize(Body().double(), ANGLE)(samples(0), angle=angles(0)).shape == (0, 2)


# ---------------------------------------------------------------------- what vmap cannot do


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: Body.forward(self, x) if x.sum() > 0 else -Body.forward(self, x),
        lambda self, x: Body.forward(self, x) * x.mean().item(),
    ],
    ids=["branches", "item"],
)
def test_a_forward_that_vmap_cannot_map_names_the_loop_which_can(forward):
    hyper = hypernetize(stranger(forward), ANGLE)
    with pytest.raises(RuntimeError, match=r"^hypernet: per_sample: .*Stranger's, .*; use per_sample='loop'$") as error:
        hyper(samples(), angle=angles())
    assert "\n" not in str(error.value)
    hyper.per_sample = "loop"
    assert hyper(samples(), angle=angles()).shape == (3, 2)


def test_a_buffer_that_a_forward_replaces_is_refused_and_put_back():
    def forward(self, x):
        y = Body.forward(self, x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        return y

    model = stranger(forward)
    model.register_buffer("mean", torch.zeros(2, dtype=torch.float64))
    hyper, before = hypernetize(model, ANGLE), model.mean
    with pytest.raises(RuntimeError, match=r"^hypernet: mean: expected no buffer that a forward replaces, with"):
        hyper(samples(), angle=angles())
    assert model.mean is before
    assert hyper.eval()(samples(), angle=angles()).shape == (3, 2)
    hyper.train()(samples(), angle=30.0)
    assert model.mean.any()


# ---------------------------------------------------------------------- transforms and modes


def test_a_hypernetwork_can_be_called_as_a_function_of_its_parameters():
    hyper = hypernetize(Body().double(), ANGLE)
    parameters = {name: parameter.detach() for name, parameter in hyper.named_parameters()}

    def loss(parameters, x):
        return functional_call(hyper, parameters, (x.unsqueeze(0),), {"angle": 30.0}).square().sum()

    by_sample = vmap(grad(loss), (None, 0))(parameters, samples())
    hyper(samples(), angle=30.0).square().sum().backward()
    for name, parameter in hyper.named_parameters():
        torch.testing.assert_close(by_sample[name].sum(0), parameter.grad)


def test_recalibration_leaves_every_module_in_its_mode():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match="running statistics"):
        hyper = hypernetize(model, ANGLE)
    hyper.train()
    model[1].eval()
    found = hyper.materialize(angle=30.0, recalibrate=[torch.randn(16, 4)])
    assert [part.training for part in found] == [True, False, True, True]
    assert found[1].running_mean.any()


def test_the_gradient_of_equal_inputs_goes_to_all_of_them():
    hyper = hypernetize(Body().double(), ANGLE, per_sample="unique")
    given = torch.tensor([10.0, 10.0, 170.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(hyper(samples(), angle=given).square().sum(), given)
    hyper.per_sample = "vmap"
    (wanted,) = torch.autograd.grad(hyper(samples(), angle=given).square().sum(), given)
    torch.testing.assert_close(found[:2], wanted[:2].mean().expand(2))
    torch.testing.assert_close(found[2], wanted[2])


def test_the_kernel_of_a_transposed_convolution_is_drawn_by_its_fan_in():
    model = nn.Sequential(nn.ConvTranspose2d(64, 16, 3, groups=2), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 64, 2, 2))
    hypernetize(model, ANGLE, base_init="kaiming", head="basis", generator=torch.Generator().manual_seed(0))
    assert model[0].weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.03)


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_normalised_before_they_are_rounded(dtype):
    body = Body().to(dtype)
    hyper = hypernetize(body, {"t": Range(1, 1e6, log=True)})
    for t in (999.0, 1e5):
        encoded = hyper.encoding({"t": t}, torch.zeros((), dtype=dtype))
        exact = hyper.encoding({"t": torch.tensor(t, dtype=torch.float64)}, torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(encoded.double(), exact, atol=4e-3, rtol=0)


@pytest.mark.parametrize("out_of_range", ["clamp", "error"])
def test_a_value_that_was_drawn_may_be_given_as_a_number_and_in_a_list(out_of_range):
    ends = Range(0.1, 0.3, sampler="endpoint", endpoint_p=1.0)
    hyper = hypernetize(Body(), {"a": ends}, out_of_range=out_of_range)
    drawn = hyper.sample_inputs(8, generator=torch.Generator().manual_seed(0))["a"].tolist()
    assert max(drawn) > 0.3  # float32 has no 0.3
    x = samples(8).float()
    torch.testing.assert_close(hyper(x, a=drawn), hyper(x, a=torch.tensor(drawn)))
    assert hyper(x, a=max(drawn)).equal(hyper(x, a=0.3))
    with pytest.raises(ValueError, match=r"a: expected 0\.1 to 0\.3, got 0\.3001"):
        hyper(x, a=0.3001)


# ---------------------------------------------------------------------- arguments of hypernetize


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected an nn.Module, got int"),
        ({"model": nn.Sequential(hypernetize(Body(), ANGLE))}, ValueError, "model: expected a plain module, got a Hyp"),
        ({"inputs": [("angle", (0, 1))]}, TypeError, "inputs: expected name -> range, got [('angle', (0, 1))]"),
        ({"inputs": {"an angle": (0, 1)}}, ValueError, "inputs: expected names that can be keywords"),
        ({"inputs": {"recalibrate": (0, 1)}}, ValueError, "none of self, recalibrate, got 'recalibrate'"),
        ({"hidden": 64}, TypeError, "hidden: expected a list of widths, got 64"),
        ({"hidden": [16.0]}, TypeError, "hidden: expected a list of widths, got [16.0]"),
        ({"model_inputs": "angle"}, TypeError, "model_inputs: expected a list of names, got 'angle'"),
    ],
)
def test_arguments_of_another_kind_are_refused_in_one_line(change, error, message):
    with pytest.raises(error) as caught:
        hypernetize(**{"model": Body(), "inputs": ANGLE} | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("angle", ["0.5", None, 1j])
def test_values_that_are_no_numbers_are_refused_in_one_line(angle):
    with pytest.raises(TypeError, match=r"^hypernet: angle: expected a number, a list or a tensor, got "):
        hypernetize(Body(), ANGLE)(samples().float(), angle=angle)


def test_codes_too_short_to_tell_choices_apart_are_refused():
    with pytest.raises(ValueError, match=r"^choice: dim: expected enough for 4 different rows, got 1$"):
        Choice("abcd", dim=1)
    assert len(Choice("abcd", dim=2).rows()) == 4
