"""Choosing modules and parameters: what is found, under which name, and what choosing nothing says."""

import pytest
import torch
from torch import nn

from hasten.nn import select_modules, select_parameters


class Norm2d(nn.Module):
    """A norm of another library: its class shares a word with torch's, and nothing else."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 3))
        self.attention = nn.MultiheadAttention(4, 1)
        self.last = Norm2d()
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.attention.out_proj.weight
        self.scale = nn.Parameter(torch.ones(()))


NET = Net()
ATTENTION = ["attention.in_proj_", "attention.out_proj."]


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("encoder.0.*", ["encoder.0.weight", "encoder.0.bias"]),
        ("scale", ["scale"]),
        (["scale", "encoder.[12].weight"], ["scale", "encoder.1.weight", "encoder.2.weight"]),
        ("norm", ["encoder.1.weight", "encoder.1.bias", "last.gain"]),
        ("bias", [f"{name}bias" for name in ["encoder.0.", "encoder.1.", "encoder.2.", *ATTENTION]]),
        (nn.GroupNorm, ["encoder.1.weight", "encoder.1.bias"]),
        ((nn.GroupNorm, Norm2d), ["encoder.1.weight", "encoder.1.bias", "last.gain"]),
        (["norm", "scale"], ["scale", "encoder.1.weight", "encoder.1.bias", "last.gain"]),
        (
            lambda name, own, owner: own.ndim == 4 and isinstance(owner, nn.Conv2d),
            ["encoder.0.weight", "encoder.2.weight"],
        ),
    ],
)
def test_parameters_are_chosen_by_glob_word_class_and_predicate(which, names):
    found = select_parameters(NET, which)
    assert list(found) == names
    assert all(found[name] is NET.get_parameter(name) for name in names)


def test_all_means_each_parameter_once():
    assert list(select_parameters(NET, "all")) == [name for name, _ in NET.named_parameters()]


def test_a_tied_parameter_is_found_by_any_name_and_has_its_first():
    assert list(select_parameters(NET, "tied.weight")) == ["attention.out_proj.weight"]
    assert list(select_parameters(NET, ["tied.*", "attention.out_proj.weight"])) == ["attention.out_proj.weight"]


def test_a_parameter_with_two_names_in_one_module_is_found_by_either():
    module = nn.Module()
    module.first = module.second = nn.Parameter(torch.ones(2))
    assert list(select_parameters(module, "second")) == ["first"]


def test_a_name_with_brackets_means_itself():
    module = nn.Module()
    module.register_parameter("table[0]", nn.Parameter(torch.ones(2)))
    module.register_parameter("table0", nn.Parameter(torch.ones(2)))
    assert list(select_parameters(module, "table[0]")) == ["table[0]", "table0"]  # and as a glob


def test_a_table_of_biases_is_no_bias():
    module = nn.Module()
    module.bias, module.bias_table = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 3))
    assert list(select_parameters(module, "bias")) == ["bias"]


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("encoder.?", ["encoder.0", "encoder.1", "encoder.2"]),
        (nn.Conv2d, ["encoder.0", "encoder.2"]),
        ((nn.Conv2d, nn.GroupNorm), ["encoder.0", "encoder.1", "encoder.2"]),
        (nn.Linear, ["attention.out_proj", "tied"]),  # a subclass counts
        (lambda name, module: name.endswith("proj"), ["attention.out_proj"]),
        (Net, [""]),
    ],
)
def test_modules_are_chosen_by_glob_class_and_predicate(which, names):
    found = select_modules(NET, which)
    assert list(found) == names
    assert all(found[name] is NET.get_submodule(name) for name in names)


def test_a_module_that_stands_in_two_places_is_one():
    shared = nn.Linear(2, 2)
    assert list(select_modules(nn.Sequential(shared, nn.ReLU(), shared), "2")) == ["0"]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("encoder.0.wieght", "got 'encoder.0.wieght' without a match; did you mean 'encoder.0.weight'?"),
        (["scale", "decoder.*"], r"params: expected one of 13 names, got 'decoder.\*' without a match"),
        ("encoder", r"params: expected names of parameters, got the module 'encoder'; use 'encoder.\*'"),
        (nn.Conv3d, "got 'Conv3d' without a match"),
        (lambda name, parameter, owner: False, "without a match"),
        ([], "params: expected at least one name, class or predicate, got none"),
    ],
)
def test_choosing_no_parameter_says_so_in_one_line(which, message):
    with pytest.raises(ValueError, match=message) as error:
        select_parameters(NET, which)
    assert "\n" not in str(error.value)


def test_choosing_no_module_says_so():
    with pytest.raises(ValueError, match=r"modules: .* got 'encoder\.9' without a match; did you mean 'encoder\.2'"):
        select_modules(NET, "encoder.9")
    with pytest.raises(ValueError, match="got 'norm' without a match"):
        select_modules(NET, "norm")


@pytest.mark.parametrize("which", [3, [nn.Linear, "scale"], int])
def test_what_cannot_be_a_choice_is_refused(which):
    with pytest.raises(TypeError, match="params: expected globs, module classes or a predicate, got "):
        select_parameters(NET, which)
