"""Everything wrong with a config, said at once and before anything expensive; and building from it."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, cast

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hasten.errors import HastenError, did_you_mean, on_one_line
from hasten.optim import configure_optimizers

_PRECISIONS = Literal["32-true", "32", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", 16, 32, 64]
_FRAME: dict[str, Any] = {
    "seed": int,
    "run_dir": str | None,
    "ckpt_path": str | None,
    "first": list[str],
    "compile": bool,
    "threads": int | None,
    "precision": _PRECISIONS,
    "objective": dict,
    "tiny": list[str],
}
Problem = tuple[str, str]
"""The key of a config and what is wrong there."""

_DIRECTIVES = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}


def check(cfg: DictConfig) -> None:
    """Raise one HastenError with a line for everything that is wrong with ``cfg``; return where nothing is."""
    lines: dict[str, str] = {}
    for key, problem in _problems(cfg):
        lines.setdefault(key, problem)  # a key that two arguments take from is said once
    if lines:
        raise HastenError("\n".join(f"{key}: {problem}" for key, problem in lines.items()))


def check_first(cfg: DictConfig) -> None:
    """As ``check``, for the keys that are needed before all else."""
    check(OmegaConf.masked_copy(cfg, ["run_dir", "first"]))


def build(cfg: DictConfig, key: str, **extra: Any) -> Any:
    """What the node at ``key`` describes, given plain lists and dicts; a constructor's error names its config key.

    Args:
        extra: arguments that no config can hold, such as callbacks that are built already.

    Example:
        >>> cfg = OmegaConf.create({"optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}})
        >>> build(cfg, "optimizer").keywords
        {'lr': 0.1}
    """
    try:
        return instantiate(OmegaConf.select(cfg, key), **extra, _convert_="all")
    except InstantiationException as error:
        raise HastenError(f"{_typed_key(cfg, _full_key(error) or key)}: {_one_line(error)}") from error


def _problems(cfg: DictConfig) -> Iterator[Problem]:
    missing = _missing(cfg)
    yield from ((key, f"required, got nothing; add {key}=VALUE") for key in missing)
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        if not missing:  # else what interpolates them
            yield str(error.full_key or "config"), str(error).splitlines()[0]
        return
    if not isinstance(plain, dict):
        return
    for key, annotation in _FRAME.items():
        if key in plain and not _fits(plain[key], annotation):
            yield key, f"expected {_name(annotation)}, got {plain[key]!r}"
    if isinstance(threads := plain.get("threads"), int) and threads < 1:
        yield "threads", f"expected >= 1, got {threads}; null leaves torch's own choice"
    if isinstance(seed := plain.get("seed"), int) and not 0 <= seed < 2**32:
        yield "seed", f"expected 0 <= seed < 2**32, got {seed}"
    if isinstance(objective := plain.get("objective"), dict):
        yield from _objective_problems(objective)
    yield from _trainer_problems(plain)
    for key in map(str, plain):
        if _stands_here(cfg, key):
            yield from ((_typed_key(cfg, where), problem) for where, problem in _node_problems(key, cfg[key]))


def _missing(node: Any, prefix: str = "") -> list[str]:
    """The keys whose value is ``???``; what interpolates them is not one of them."""
    if not isinstance(node, DictConfig):
        return []
    found = [f"{prefix}{key}" for key in map(str, node) if OmegaConf.is_missing(node, key)]
    for key in map(str, node):
        if _stands_here(node, key):
            found += _missing(node[key], f"{prefix}{key}.")
    return sorted(found)


def _node_problems(key: str, node: Any) -> Iterator[Problem]:
    """What is wrong at ``key`` and below it; what is interpolated is checked where it stands."""
    if isinstance(node, ListConfig):
        for index in range(len(node)):
            if _stands_here(node, index):
                yield from _node_problems(f"{key}[{index}]", node[index])
    if not isinstance(node, DictConfig):
        return
    for name in map(str, node):
        if name not in _DIRECTIVES and _stands_here(node, name):
            yield from _node_problems(f"{key}.{name}", node[name])
    if "_target_" in node:
        value = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
        yield from _target_problems(key, cast(dict[str, Any], value))


def _stands_here(node: DictConfig | ListConfig, key: str | int) -> bool:
    """Whether ``node[key]`` is written here: neither missing nor taken from elsewhere, where it is checked anyway."""
    return not (OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key))


def _target_problems(key: str, value: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with one ``_target_`` and its arguments."""
    try:
        target = get_object(value["_target_"])
    except Exception as error:  # whatever the import of a stranger's module raises
        yield f"{key}._target_", f"cannot import {value['_target_']!r}: {_one_line(error)}"
        return
    if value["_target_"].startswith("hydra.utils.get_"):
        try:
            get_object(value["path"])
        except Exception as error:
            yield f"{key}.path", f"cannot import {value.get('path')!r}: {_one_line(error)}"
        return
    found = list(_argument_problems(key, value, target))
    yield from found
    if not found and value.get("_partial_"):
        yield from _factory_problems(key, value, target)


def _argument_problems(key: str, value: dict[str, Any], target: Callable[..., Any]) -> Iterator[Problem]:
    """Names that the target does not take, values of another type, and required arguments that nobody gives."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return  # a builtin without a signature
    hints = _annotations(target)
    swallows = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [name for name, parameter in parameters.items() if parameter.kind in (1, 3)]
    for name, argument in value.items():
        if name in _DIRECTIVES:
            continue
        if name not in names:
            if not swallows:
                yield f"{key}.{name}", f"{_short(value)} takes no {name!r}{did_you_mean(str(name), names)}"
        elif argument != "???" and not _fits(argument, hints.get(name, Any)):
            yield f"{key}.{name}", f"expected {_name(hints[name])}, got {argument!r}"
    if value.get("_partial_") or value.get("_args_"):
        return
    for name in names:
        if name not in value and parameters[name].default is inspect.Parameter.empty:
            yield f"{key}.{name}", f"required by {_short(value)}, got nothing; add {key}.{name}=VALUE"


def _factory_problems(key: str, value: dict[str, Any], target: Callable[..., Any]) -> Iterator[Problem]:
    """What an optimizer or a schedule says of its arguments, tried on one dummy parameter."""
    optimizer, scheduler = partial(torch.optim.SGD, lr=1.0), None
    try:
        if inspect.isclass(target) and issubclass(target, torch.optim.Optimizer):
            optimizer = instantiate(value, _convert_="all")
        elif next(iter(inspect.signature(target).parameters), None) == "optimizer":
            scheduler = instantiate(value, _convert_="all")
        else:
            return
        dummy = [{"params": [torch.zeros(1, requires_grad=True)]}]
        configure_optimizers(dummy, optimizer, scheduler, total_steps=lambda: 2**31)
    except Exception as error:  # the constructor's own words, whatever their class
        yield key, _one_line(error.__cause__ or error)


def _objective_problems(objective: Mapping[Any, Any]) -> Iterator[Problem]:
    for key, annotation in {"metric": str, "mode": Literal["min", "max"]}.items():
        if not _fits(value := objective.get(key), annotation):
            yield f"objective.{key}", f"expected {_name(annotation)}, got {value!r}"


def _trainer_problems(plain: Mapping[Any, Any]) -> Iterator[Problem]:
    """What Lightning finds out late, or never."""
    trainer = plain.get("trainer")
    if not isinstance(trainer, dict):
        return
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if isinstance(value := trainer.get(key), int) and value < 1:
            yield f"trainer.{key}", f"expected >= 1, got {value}"
    wanted = trainer.get("accelerator")
    if wanted in ("gpu", "cuda") and not torch.accelerator.is_available():
        yield "trainer.accelerator", f"expected a GPU for {wanted!r}, this machine has none; use trainer=cpu"


# ------------------------------------------------------------------ types


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    try:
        return typing.get_type_hints(function)
    except Exception:  # a name that exists only under TYPE_CHECKING: without hints there is nothing to compare
        return {}


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value out of a config could serve an argument annotated so; what cannot be told fits."""
    if isinstance(value, dict) and "_target_" in value:
        return True  # to be built: its own arguments are checked, its result is not
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, (str, typing.TypeVar)):
        return True
    if annotation is None or annotation is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is Literal:
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in inner)
    if origin is typing.Annotated:
        return _fits(value, inner[0])
    kind = origin or annotation
    if not inspect.isclass(kind):
        return True
    if isinstance(value, bool):
        return kind in (bool, object)
    if kind is float:
        return isinstance(value, (int, float))
    if isinstance(value, str) and issubclass(Path, kind):
        return True
    if isinstance(value, list):
        if not (issubclass(list, kind) or kind in (tuple, set)):
            return False
        fixed = kind is tuple and inner and inner[-1] is not Ellipsis
        items = inner if fixed else [inner[0] if inner else Any] * len(value)
        return len(items) == len(value) and all(map(_fits, value, items))
    if isinstance(value, dict):
        item = inner[1] if len(inner) == 2 else Any
        return issubclass(dict, kind) and all(_fits(entry, item) for entry in value.values())
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol that cannot be asked at run time
        return True


def _name(annotation: Any) -> str:
    """An annotation as a person would say it: ``int or None``."""
    if annotation is None or annotation is type(None):
        return "null"
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_name(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) is not None:
        return str(annotation).replace("typing.", "").replace("collections.abc.", "")
    return getattr(annotation, "__name__", str(annotation))


# ------------------------------------------------------------------ words


def _short(value: Mapping[str, Any]) -> str:
    return str(value["_target_"]).rpartition(".")[2]


def _full_key(error: BaseException) -> str:
    """The config key of the innermost node that failed, as Hydra's message carries it."""
    key = ""
    cause: BaseException | None = error
    while isinstance(cause, InstantiationException):
        key = next((line.split(": ", 1)[1] for line in str(cause).splitlines() if line.startswith("full_key: ")), key)
        cause = cause.__cause__
    return key


def _typed_key(cfg: DictConfig, key: str) -> str:
    """The key that a person would type for ``key``: where ``module.model`` is ``${model}``, that is ``model``."""
    parts = key.split(".")
    for depth in range(len(parts)):
        parent = OmegaConf.select(cfg, ".".join(parts[:depth])) if depth else cfg
        known = isinstance(parent, DictConfig) and parts[depth] in parent
        if known and OmegaConf.is_interpolation(parent, parts[depth]):
            source = str(OmegaConf.to_container(parent, resolve=False)[parts[depth]])  # type: ignore[index,call-overload]
            if match := re.fullmatch(r"\$\{([\w.]+)\}", source):
                return _typed_key(cfg, ".".join([match[1], *parts[depth + 1 :]]))
    return key


def _one_line(error: BaseException) -> str:
    """What an exception says, as one line, without the frames that wrap it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    text = on_one_line(error) or type(error).__name__
    return text if isinstance(error, (HastenError, ValueError, TypeError)) else f"{type(error).__name__}: {text}"
