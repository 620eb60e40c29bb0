"""What check says of a config: every problem, one line each, before anything is built."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from omegaconf import OmegaConf

from hasten.check import build, check
from hasten.errors import HastenError


class Target:
    """A constructor with one argument of each kind that configs hold."""

    def __init__(
        self,
        size: int = 1,
        rate: float = 0.1,
        name: str | None = None,
        mode: Literal["a", "b"] = "a",
        betas: tuple[float, float] = (0.9, 0.99),
        sizes: Sequence[int] = (),
        folder: str | Path = "",
        flag: bool = False,
    ):
        if size > 100:
            raise ValueError("target: size: expected <= 100, got 101")


class Needy:
    def __init__(self, size: int, **rest: int):
        self.size = size


def _target(name: str = "Target") -> str:
    return f"{__name__}.{name}"


def _complaints(node: dict) -> list[str]:
    try:
        check(OmegaConf.create(node))
    except HastenError as error:
        return str(error).splitlines()
    return []


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__(__name__))


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 3, "rate": 1, "name": None, "mode": "b", "betas": [0.9, 0.95], "sizes": [1, 2], "flag": True},
        {"folder": "runs", "name": "x", "rate": 1e-3},
        {"sizes": []},
    ],
)
def test_values_that_fit_their_annotation_pass(arguments):
    assert _complaints({"x": {"_target_": _target(), **arguments}}) == []


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("size", "big", "int"),
        ("size", True, "int"),
        ("size", 1.5, "int"),
        ("rate", "high", "float"),
        ("rate", None, "float"),
        ("name", 3, "str or null"),
        ("mode", "c", "one of a, b"),
        ("betas", [0.9], "tuple[float, float]"),
        ("betas", 0.9, "tuple[float, float]"),
        ("sizes", [1, "x"], "Sequence[int]"),
        ("sizes", 3, "Sequence[int]"),
        ("flag", "yes", "bool"),
        ("flag", 1, "bool"),
    ],
)
def test_a_value_of_another_type_is_named_with_its_key(name, value, wanted):
    assert _complaints({"x": {"_target_": _target(), name: value}}) == [f"x.{name}: expected {wanted}, got {value!r}"]


def test_all_problems_are_said_at_once():
    node = {"a": {"_target_": _target(), "size": "big"}, "b": {"_target_": _target(), "sise": 1}, "c": "???"}
    assert _complaints(node) == [
        "c: required, got nothing; add c=VALUE",
        "a.size: expected int, got 'big'",
        "b.sise: Target takes no 'sise'; did you mean 'size'? ~b.sise leaves it out",
    ]


def test_a_missing_argument_is_named_unless_the_node_is_a_factory():
    assert _complaints({"x": {"_target_": _target("Needy")}}) == [
        "x.size: required by Needy, got nothing; add x.size=VALUE"
    ]
    assert _complaints({"x": {"_target_": _target("Needy"), "_partial_": True}}) == []


def test_problems_inside_lists_and_nested_nodes_carry_their_path():
    node = {"x": {"parts": [{"_target_": _target(), "rate": "high"}]}}
    assert _complaints(node) == ["x.parts[0].rate: expected float, got 'high'"]


def test_a_target_that_cannot_be_imported_is_named():
    (line,) = _complaints({"x": {"_target_": "torch.nn.Linar"}})
    assert line.startswith("x._target_: cannot import 'torch.nn.Linar'")


def test_an_interpolation_to_nowhere_is_named():
    (line,) = _complaints({"x": "${image.channels}"})
    assert line.startswith("x: ") and "image.channels" in line


@pytest.mark.parametrize(
    ("node", "part"),
    [
        ({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": -1.0}, "Invalid learning rate"),
        ({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": "high"}, "expected float or Tensor, got 'high'"),
        ({"_target_": "hasten.optim.cosine", "_partial_": True, "warmup_steps": -1}, "warmup_steps: expected"),
    ],
)
def test_factories_of_optimizers_and_schedules_are_tried_on_a_dummy_parameter(node, part):
    (line,) = _complaints({"x": node})
    assert part in line


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("seed", "a", "seed: expected int, got 'a'"),
        ("seed", -1, "seed: expected 0 <= seed < 2**32, got -1"),
        ("threads", 0, "threads: expected >= 1, got 0; null leaves torch's own choice"),
        ("compile", "yes", "compile: expected bool or dict, got 'yes'"),
        ("compile", {"mod": "default"}, "compile.mod: torch.compile takes no 'mod'; did you mean 'mode'?"),
        ("compile", {"fullgraph": 1}, "compile.fullgraph: expected bool, got 1"),
        ("first", "experts", "first: expected list[str], got 'experts'"),
    ],
)
def test_the_keys_of_the_frame_are_checked_too(key, value, line):
    assert _complaints({key: value}) == [line]


def test_what_torch_says_of_arguments_to_compile_is_one_line():
    for wrong in ({"backend": "nope"}, {"options": {"nope": 1}}, {"mode": "default", "options": {}}):
        (line,) = _complaints({"compile": wrong})
        assert line.startswith("compile: ") and len(line) < 220
    assert not _complaints({"compile": {"backend": "aot_eager", "fullgraph": True, "dynamic": None}})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said_with_the_remedy():
    assert _complaints({"trainer": {"accelerator": "gpu"}}) == [
        "trainer.accelerator: expected a GPU for 'gpu', this machine has none; use trainer=cpu"
    ]


def test_a_constructors_error_names_the_key_of_the_innermost_node():
    cfg = OmegaConf.create({"outer": {"_target_": _target("Needy"), "size": {"_target_": _target(), "size": 101}}})
    with pytest.raises(HastenError, match=r"^outer.size: target: size: expected <= 100, got 101$"):
        build(cfg, "outer")


def test_built_objects_get_plain_lists_and_dicts():
    cfg = OmegaConf.create({"x": {"_target_": "builtins.dict", "items": [1, {"a": 2}]}})
    built = build(cfg, "x")
    assert type(built["items"]) is list and type(built["items"][1]) is dict
