"""Ranges and choices: drawing, reading, encoding, and what they refuse."""

import math

import pytest
import torch

from hasten.nn import Choice, Range
from hasten.nn.hypernet.inputs import InputEncoding

LIKE = torch.zeros((), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoding(inputs, kind="cos_sin", norm="unit", out_of_range="clamp"):
    return InputEncoding(inputs, kind=kind, norm=norm, out_of_range=out_of_range)


def to_the_top(shape, generator):
    return torch.ones(shape)


# drawing


def test_a_range_draws_uniformly():
    drawn = Range(-2, 6).sample(20_000, seeded())
    assert drawn.shape == (20_000,)
    assert drawn.histc(8, -2, 6).div(2500).sub(1).abs().max() < 0.1


def test_a_log_range_draws_every_decade_alike():
    drawn = Range(1e-3, 1, log=True).sample(20_000, seeded())
    assert drawn.min() >= 1e-3 and drawn.max() <= 1
    assert drawn.log10().histc(3, -3, 0).div(20_000 / 3).sub(1).abs().max() < 0.1


@pytest.mark.parametrize("log", [False, True])
def test_endpoint_sampling_draws_the_bounds_with_probability_p_and_evenly(log):
    given = Range(1, 8, sampler="endpoint", endpoint_p=0.4, log=log)
    drawn = given.sample(20_000, seeded())
    low, high = (drawn == 1).float().mean(), (drawn == 8).float().mean()
    assert (low.item(), high.item()) == pytest.approx((0.2, 0.2), abs=0.01)
    between = given.normalized(drawn[(drawn > 1) & (drawn < 8)])
    assert between.histc(4, 0, 1).div(len(between) / 4).sub(1).abs().max() < 0.1


def test_a_sampler_of_ones_own_says_where_between_the_bounds():
    assert Range(1, 100, log=True, sampler=to_the_top).sample(3).tolist() == [100.0] * 3
    assert Range(1, 100, dim=2, sampler=to_the_top).sample().tolist() == [100.0] * 2


def test_draws_have_the_shape_of_a_value_and_repeat_with_the_generator():
    inputs = {"one": Range(0, 1), "three": Range(0, 1, dim=3), "kind": Choice("abc")}
    drawn = encoding(inputs).sample(None, seeded(1))
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {"one": (), "three": (3,), "kind": ()}
    drawn = encoding(inputs).sample(5, seeded(1))
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {"one": (5,), "three": (5, 3), "kind": (5,)}
    again = encoding(inputs).sample(5, seeded(1))
    assert all(drawn[name].equal(again[name]) for name in inputs)
    state = torch.get_rng_state()
    encoding(inputs).sample(5, seeded(1))
    assert torch.get_rng_state().equal(state)


def test_a_choice_draws_each_value():
    assert Choice("abc").sample(100, seeded()).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("log", [False, True])
def test_rounding_draws_nothing_beyond_the_bounds(log):
    drawn = Range(0.18, 3.07, log=log, sampler=to_the_top).sample()  # without a clamp 2.4e-7 more
    assert drawn == torch.tensor(3.07)


def test_endpoint_sampling_is_at_the_bounds_in_two_draws_of_five():
    drawn = Range(1, 8, sampler="endpoint").sample(20_000, seeded())
    assert ((drawn == 1) | (drawn == 8)).float().mean().item() == pytest.approx(0.4, abs=0.01)


# encoding


def test_the_encoding_is_cosines_then_sines_in_the_order_of_the_inputs():
    inputs = {"noise": Range(1e-2, 1, log=True), "angle": (0, 180), "shift": Range(-1, 1, dim=2)}
    found = encoding(inputs, norm="per_dim")({"angle": 45, "noise": 0.1, "shift": [-1, 0]}, LIKE)
    z = [0.5, 0.25, 0.0, 0.5]
    expected = [math.cos(math.pi * v / 2) for v in z] + [math.sin(math.pi * v / 2) for v in z]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    unit = encoding(inputs)({"angle": 45, "noise": 0.1, "shift": [-1, 0]}, LIKE)
    torch.testing.assert_close(unit, found / 2, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("norm", "length"), [("unit", 1.0), ("per_dim", math.sqrt(5))])
@pytest.mark.parametrize("dim", [None, 7])
def test_a_choice_counts_as_one_dimension_of_the_norm(norm, length, dim):
    inputs = {"kind": Choice("abc", dim=dim), "angle": (0, 180), "shift": Range(-1, 1, dim=3)}
    encode = encoding(inputs, norm=norm).double()
    found = encode(encode.sample(50, seeded()), LIKE)
    assert found.shape == (50, encode.out_features) == (50, 8 + (dim or 3))
    assert found.norm(dim=-1).sub(length).abs().max() <= 1e-7  # the draws are float32
    assert encode.bound == length


def test_choices_alone_are_encoded_too():
    assert encoding({"kind": Choice("abc")})({"kind": "b"}, LIKE).tolist() == [0.0, 1.0, 0.0]


def test_the_other_encodings_are_for_comparison():
    assert encoding({"a": (0, 4)}, kind="complement")({"a": 1.0}, LIKE).tolist() == [0.25, 0.75]
    assert encoding({"a": (0, 4)}, kind=None)({"a": 1.0}, LIKE).tolist() == [0.25]


def test_a_value_for_all_goes_with_values_per_sample():
    encode = encoding({"a": (0, 1), "b": Range(0, 1, dim=2), "kind": Choice("abc")})
    together = encode({"a": torch.tensor([0.1, 0.9]), "b": [0.2, 0.3], "kind": "c"}, LIKE)
    for row, a in zip(together, [0.1, 0.9], strict=True):
        torch.testing.assert_close(row, encode({"a": a, "b": [0.2, 0.3], "kind": "c"}, LIKE), rtol=1e-7, atol=1e-7)


def test_a_choice_is_read_by_value_by_list_and_by_position():
    encode = encoding({"kind": Choice([90, "x", (1, 2)], dim=4)}).double()
    rows = encode.inputs["kind"].rows()
    for position, value in enumerate([90, "x", (1, 2)]):
        assert encode({"kind": value}, LIKE).equal(rows[position])
        assert encode({"kind": torch.tensor(position)}, LIKE).equal(rows[position])
    assert encode({"kind": ["x", 90]}, LIKE).equal(rows[[1, 0]])
    assert encode({"kind": torch.tensor([1, 0])}, LIKE).equal(rows[[1, 0]])


def test_the_rows_of_a_choice_are_frozen_the_same_everywhere_and_in_no_state_dict():
    rows = Choice(range(5), dim=16).rows()
    assert rows.norm(dim=-1).sub(1).abs().max() <= 1e-12
    torch.manual_seed(99)
    assert Choice(range(5), dim=16).rows().equal(rows)
    encode = encoding({"kind": Choice(range(5), dim=16)})
    assert encode.state_dict() == {} and list(encode.parameters()) == []


def test_the_encoding_has_the_dtype_of_the_weights_and_keeps_the_precision_of_the_value():
    encode = encoding({"a": (0, 1)})
    value = torch.tensor(1 / 3, dtype=torch.float64)
    assert encode({"a": value}, torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert encode({"a": value.float()}, LIKE).dtype == torch.float64
    assert encode({"a": torch.tensor(1)}, torch.zeros(1)).dtype == torch.float32
    assert encode({"a": value}, LIKE)[1].item() == pytest.approx(math.sin(math.pi / 6), abs=1e-15)


def test_a_tensor_that_asks_for_a_gradient_gets_it():
    value = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    encode = encoding({"a": Range(0.1, 1, log=True)})
    assert torch.autograd.gradcheck(lambda a: encode({"a": a}, LIKE), value)


def test_the_complements_stand_behind_all_values_and_are_not_divided():
    encode = encoding({"a": (0, 1), "b": (0, 1)}, kind="complement")
    assert encode({"a": 0.25, "b": 1.0}, LIKE).tolist() == [0.25, 1.0, 0.75, 0.0]


def test_the_rows_of_a_choice_are_those_of_older_checkpoints():
    wanted = [[0.5739808, -0.1092946, -0.8115422], [0.3057951, -0.5834332, -0.7523929]]
    torch.testing.assert_close(Choice("ab", dim=3).rows(), torch.tensor(wanted).double(), rtol=0, atol=1e-6)


def test_a_tensor_is_encoded_in_the_wider_of_its_precision_and_the_weights():
    encode, narrow, wide = encoding({"a": (0, 1000)}), torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    value = torch.tensor(999.0)  # 1000 in bfloat16
    assert encode({"a": value}, narrow).equal(encode({"a": value}, wide).bfloat16())
    value = torch.tensor(333.0).bfloat16()
    assert encode({"a": value}, wide).equal(encode({"a": value.float()}, wide))


# out of range


def test_a_tensor_out_of_range_is_clamped():
    encode = encoding({"a": Range(1, 10, log=True)})
    inside = encode({"a": torch.tensor([1.0, 10.0])}, LIKE)
    assert encode({"a": torch.tensor([-3.0, 99.0])}, LIKE).equal(inside)


@pytest.mark.parametrize("out_of_range", ["clamp", "error", "ignore"])
def test_positions_out_of_range_are_refused_on_the_cpu(out_of_range):
    kind = encoding({"kind": Choice([0, 90, 180])}, out_of_range=out_of_range)
    with pytest.raises(ValueError, match="kind: expected positions 0 to 2, got 90 to 90; a value itself is given as a"):
        kind({"kind": torch.tensor(90)}, LIKE)


def test_a_tensor_out_of_range_is_refused_where_asked():
    encode = encoding({"a": (0, 1), "kind": Choice("abc")}, out_of_range="error")
    with pytest.raises(ValueError, match=r"hypernet: a: expected 0 to 1, got 1\.5"):
        encode({"a": torch.tensor([0.5, 1.5]), "kind": "a"}, LIKE)
    with pytest.raises(ValueError, match="hypernet: a: expected 0 to 1, got nan"):
        encode({"a": torch.tensor(math.nan), "kind": "a"}, LIKE)
    with pytest.raises(ValueError, match="hypernet: kind: expected positions 0 to 2, got 0 to 3"):
        encode({"a": torch.tensor(0.5), "kind": torch.tensor([0, 3])}, LIKE)
    assert encode({"a": torch.tensor([0.0, 1.0]), "kind": torch.tensor(2)}, LIKE).shape == (2, 5)
    narrow = encoding({"a": (0.1, 0.3)}, out_of_range="error")
    narrow({"a": torch.tensor([0.1, 0.3])}, LIKE)  # float32's 0.1 and 0.3 are not those of Python


def test_ignoring_the_range_lets_the_encoding_repeat():
    encode = encoding({"a": (0, 1)}, out_of_range="ignore")
    values = torch.tensor([0.25, 4.25, 1.25], dtype=torch.float64)
    found = encode({"a": values}, LIKE)
    torch.testing.assert_close(found[1], found[0])
    assert not torch.allclose(found[2], found[0])


@pytest.mark.parametrize("out_of_range", ["clamp", "error", "ignore"])
def test_positions_do_not_count_from_the_end(out_of_range):
    with pytest.raises(ValueError, match="hypernet: kind: expected positions 0 to 1, got -1 to 0"):
        encoding({"kind": Choice("ab")}, out_of_range=out_of_range)({"kind": torch.tensor([0, -1])}, LIKE)


@pytest.mark.parametrize("out_of_range", ["clamp", "error", "ignore"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(-0.1, "expected 0 to 1, got -0.1"), (math.nan, "got nan"), ([0.5, 2.0], "expected 0 to 1, got 2")],
)
def test_numbers_are_always_checked(out_of_range, value, message):
    with pytest.raises(ValueError, match=f"hypernet: a: .*{message}"):
        encoding({"a": (0, 1)}, out_of_range=out_of_range)({"a": value}, LIKE)


def test_a_value_that_is_no_choice_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="kind: expected one of 2 values, got 'dogg'; did you mean 'dog'"):
        encoding({"kind": Choice(["cat", "dog"])})({"kind": "dogg"}, LIKE)
    with pytest.raises(TypeError, match=r"kind: expected positions in the choice's values, got torch\.float32"):
        encoding({"kind": Choice(["cat", "dog"])})({"kind": torch.tensor(0.0)}, LIKE)


# what does not fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1, "high": 1}, "range: expected finite low < high, got 1 and 1"),
        ({"low": 0, "high": math.nan}, "low < high, got 0 and nan"),
        ({"low": 0, "high": math.inf}, "low < high, got 0 and inf"),
        ({"low": 0, "high": 1, "log": True}, "low: expected a positive number for log=True, got 0"),
        ({"low": 0, "high": 1, "dim": 0}, "dim: expected at least 1, got 0"),
        ({"low": 0, "high": 1, "sampler": "gauss"}, "sampler: expected uniform, endpoint or a callable, got 'gauss'"),
        ({"low": 0, "high": 1, "endpoint_p": 1.5}, "endpoint_p: expected a probability, got 1.5"),
    ],
)
def test_what_is_no_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Range(**arguments)


@pytest.mark.parametrize("values", [[], ["a", "a"]])
def test_a_choice_has_values_and_each_once(values):
    with pytest.raises(ValueError, match="choice: values: expected at least one and each once"):
        Choice(values)


def test_a_choices_rows_have_a_length():
    with pytest.raises(ValueError, match="choice: dim: expected at least 1 or None, got 0"):
        Choice("ab", dim=0)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"a": 0.5}, TypeError, "inputs: expected a, b, got a"),
        ({}, TypeError, "inputs: expected a, b, got none"),
        ({"a": 0.5, "b": [0, 0], "c": 1}, TypeError, "inputs: expected a, b, got a, b, c"),
        ({"a": torch.zeros(2, 2), "b": [0, 0]}, ValueError, r"a: expected shape \(\) or \(B\), got \(2, 2\)"),
        ({"a": 0.5, "b": 0.5}, ValueError, r"b: expected shape \(2\) or \(B, 2\), got \(\)"),
        ({"a": 0.5, "b": torch.zeros(4, 3)}, ValueError, r"b: expected shape \(2\) or \(B, 2\), got \(4, 3\)"),
        (
            {"a": torch.zeros(3), "b": torch.zeros(4, 2)},
            ValueError,
            r"inputs: expected one batch size, got a \(3,\), b \(4, 2\)",
        ),
    ],
)
def test_values_that_do_not_fit_say_what_was_wanted(values, error, message):
    with pytest.raises(error, match=message):
        encoding({"a": (0, 1), "b": Range(0, 1, dim=2)})(values, LIKE)


def test_what_is_no_input_is_refused():
    with pytest.raises(ValueError, match="inputs: expected at least one, got none"):
        encoding({})
    with pytest.raises(TypeError, match=r"inputs: a: expected a Range, a Choice or \(low, high\), got 3"):
        encoding({"a": 3})
    for argument in ["kind", "norm", "out_of_range"]:
        with pytest.raises(ValueError, match=r"expected one of .*, got 'other'"):
            encoding({"a": (0, 1)}, **{argument: "other"})
