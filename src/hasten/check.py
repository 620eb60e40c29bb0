"""Everything wrong with a config, said at once and before anything expensive; and building from it."""

import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, Union, cast

import torch
from hydra._internal.utils import _locate  # hydra.utils.get_object logs, in several lines, what it raises
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hasten.errors import HastenError, did_you_mean, on_one_line
from hasten.optim import configure_optimizers

# not 16-true: there Adam's eps of 1e-8 is 0, and the weights become NaN without a word
_PRECISIONS = Literal["32-true", "32", "16-mixed", "bf16-mixed", "bf16-true", "64-true", 16, 32, 64]
_FRAME: dict[str, Any] = {
    "seed": int,
    "run_dir": str | None,
    "ckpt_path": str | None,
    "first": list[str],
    "compile": bool | dict,
    "estimate": bool,
    "threads": int | None,
    "precision": _PRECISIONS,
    "objective": dict,
    "tiny": list[str],
}
_COMPILE: dict[str, Any] = {
    "backend": str,
    "fullgraph": bool,
    "dynamic": bool | None,
    "mode": str | None,
    "options": dict | None,
}
_SECTIONS = ("image", "objective", "stages", "data", "module", "trainer")
"""What the run reads keys of."""

_READ = {*_FRAME, *_SECTIONS, "callbacks", "logger", "datamodule", "task"}
_READ |= {"experiment", "overrides"}
_READ |= {f"image.{key}" for key in ("channels", "size", "num_classes", "mean_square")}
"""What a run reads, though nothing in its config may interpolate it."""

_KINDS = {"data": LightningDataModule, "datamodule": LightningDataModule, "module": LightningModule, "trainer": Trainer}
_MEMBERS = {"callbacks": Callback, "logger": Logger}
"""What a node must make; of a group, each of its nodes."""

Problem = tuple[str, str]
"""The key of a config and what is wrong there."""

_DIRECTIVES: dict[str, Any] = {
    "_target_": str,
    "_partial_": bool,
    "_args_": list,
    "_convert_": Literal["none", "partial", "object", "all"],
    "_recursive_": bool,
}


def check(cfg: DictConfig) -> None:
    """Raise one HastenError with a line for everything that is wrong with ``cfg``; return where nothing is."""
    lines: dict[str, str] = {}
    for key, problem in _problems(cfg):
        lines.setdefault(key, problem)  # a key that two arguments take from is said once
    if lines:
        raise HastenError("\n".join(f"{key}: {problem}" for key, problem in lines.items()))


def check_first(cfg: DictConfig) -> None:
    """As ``check``, for what is needed before all else: a whole frame, and the keys that name folders and stages."""
    needed = {*_FRAME, *_SECTIONS, "task", "datamodule"} - {"tiny", "estimate"}
    if missing := sorted(key for key in needed if key not in cfg):
        raise HastenError("\n".join(f"{key}: required, got nothing; leave out ~{key}" for key in missing))
    plain = {}
    for key in ("run_dir", "first", "seed"):
        try:
            plain[key] = OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
        except OmegaConfBaseException as error:
            raise HastenError(f"{key}: {str(error).splitlines()[0]}") from error
    check(OmegaConf.create(plain))


def check_read(cfg: DictConfig, words: Sequence[str]) -> None:
    """Raise a HastenError for keys at the top, or of ``image``, that nothing reads, as misspelled ones are not.

    Args:
        cfg: as composed, before its interpolations are resolved.
        words: that composed it; what no module needs, such as an optimizer, is refused only where they ask for it.
    """
    keys = [str(key) for key in cfg]
    if isinstance(cfg.get("image"), DictConfig):
        keys += [f"image.{key}" for key in cfg.image]
    paths = re.findall(r"\$\{([^.}:][^}:]*)", OmegaConf.to_yaml(cfg))  # of interpolations
    read = {path[: end.start()] for path in paths for end in re.finditer(r"[.\[]|$", path)}
    asked = {re.split(r"[.=]", word.lstrip("+"))[0] for word in words}
    needed = _READ | ({"model", "optimizer", "scheduler"} - asked)
    unread = [key for key in keys if key not in needed and key not in read]
    if unread:
        lines = [f"{key}: nothing here reads this key{did_you_mean(key, needed - {key})}" for key in unread]
        raise HastenError("\n".join(lines))


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
    found = list(_section_problems(cfg))
    yield from found
    if found:
        return  # half of the config interpolates these
    missing = _missing(cfg)
    yield from ((key, f"required, got nothing; add {key}=VALUE") for key in missing)
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        if not missing:  # else what interpolates them
            yield str(error.full_key or "config"), _interpolation_problem(error)
        return
    if not isinstance(plain, dict):
        return
    for key, annotation in _FRAME.items():
        if key in plain and not _fits(plain[key], annotation):
            yield key, f"expected {_name(annotation)}, got {plain[key]!r}"
    if isinstance(threads := plain.get("threads"), int) and threads < 1:
        yield "threads", f"expected >= 1, got {threads}; null leaves torch's own choice"
    if isinstance(threads, int) and threads > 1024:  # OpenMP ends the process where it cannot start them
        yield "threads", f"expected <= 1024, got {threads}"
    if plain.get("run_dir") == "":
        yield "run_dir", "expected a folder, got ''; null makes a new one"
    if isinstance(seed := plain.get("seed"), int) and not 0 <= seed < 2**32:
        yield "seed", f"expected 0 <= seed < 2**32, got {seed}"
    if isinstance(objective := plain.get("objective"), dict):
        yield from _objective_problems(objective)
    if isinstance(compiled := plain.get("compile"), dict):
        yield from _compile_problems(compiled)
    typed = partial(_typed_key, cfg)
    yield from ((typed(key), problem) for key, problem in _trainer_problems(plain))
    for key in map(str, plain):
        if _stands_here(cfg, key):
            yield from _node_problems(key, cfg[key], typed)


def _missing(node: Any, prefix: str = "") -> list[str]:
    """The keys whose value is ``???``; what interpolates them is not one of them."""
    if not isinstance(node, DictConfig):
        return []
    found = [f"{prefix}{key}" for key in map(str, node) if OmegaConf.is_missing(node, key)]
    for key in map(str, node):
        if _stands_here(node, key):
            found += _missing(node[key], f"{prefix}{key}.")
    return sorted(found)


def _section_problems(cfg: DictConfig) -> Iterator[Problem]:
    """Single values where the run, or another key, reads keys; and members of a group that say nothing to build."""
    for key in _SECTIONS:
        if key in cfg and _stands_here(cfg, key) and not isinstance(cfg[key], DictConfig):
            yield key, f"expected keys below it, got {cfg[key]!r}"
    for key in ("task", "datamodule"):
        if key in cfg and _stands_here(cfg, key) and not isinstance(cfg[key], (DictConfig, type(None))):
            yield key, f"expected _target_ and its arguments, or null, got {cfg[key]!r}"
    for group in _MEMBERS:
        members = cfg.get(group)
        if not isinstance(members, (DictConfig, type(None))):
            yield group, f"expected named nodes, got {members!r}"
        for name in map(str, members if isinstance(members, DictConfig) else ()):
            node = members[name] if _stands_here(members, name) else None  # type: ignore[arg-type,index]
            if node is not None and not isinstance(node, DictConfig):
                yield f"{group}.{name}", f"expected _target_ and its arguments, or null, got {node!r}"


def _interpolation_problem(error: OmegaConfBaseException) -> str:
    """Why an interpolation has no value."""
    said = str(error).splitlines()[0]
    if stage := re.search(r"'stages\.([^'.]+)'", said):
        return f"expected {stage[1]!r} in first, whose folder this takes, got none; add it there or set this key"
    return said


def _node_problems(key: str, node: Any, typed: Callable[[str], str]) -> Iterator[Problem]:
    """What is wrong at ``key`` and below it; what is interpolated is checked where it stands.

    Args:
        typed: the key that a person would type for a value.
    """
    if isinstance(node, float) and math.isnan(node):
        yield key, "expected a number, got nan"
    if isinstance(node, ListConfig):
        for index in range(len(node)):
            if _stands_here(node, index):
                yield from _node_problems(f"{key}[{index}]", node[index], typed)
    if not isinstance(node, DictConfig):
        return
    for name in map(str, node):
        if name not in _DIRECTIVES and _stands_here(node, name):
            yield from _node_problems(f"{key}.{name}", node[name], typed)
    if "_target_" in node:
        value = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)
        yield from _target_problems(key, cast(dict[str, Any], value), typed)


def _stands_here(node: DictConfig | ListConfig, key: str | int) -> bool:
    """Whether ``node[key]`` is written here: neither missing nor taken from elsewhere, where it is checked anyway."""
    return not (OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key))


def _target_problems(key: str, value: dict[str, Any], typed: Callable[[str], str]) -> Iterator[Problem]:
    """What is wrong with one ``_target_`` and its arguments."""
    for name, annotation in _DIRECTIVES.items():
        if name in value and not _fits(value[name], annotation):
            yield f"{key}.{name}", f"expected {_name(annotation)}, got {value[name]!r}"
    if not isinstance(value["_target_"], str):
        return
    try:
        target = _locate(value["_target_"])
    except Exception as error:  # whatever the import of a stranger's module raises
        yield f"{key}._target_", f"cannot import {value['_target_']!r}: {_one_line(error.__cause__ or error)}"
        return
    if value["_target_"].startswith("hydra.utils.get_"):
        try:
            _locate(value["path"])
        except Exception as error:
            yield f"{key}.path", f"cannot import {value.get('path')!r}: {_one_line(error.__cause__ or error)}"
        return
    group, _, name = key.partition(".")
    kind = _KINDS.get(key) or (None if "." in name else _MEMBERS.get(group))
    if kind and inspect.isclass(target) and not issubclass(target, kind):
        yield f"{key}._target_", f"expected a {kind.__name__}, got {target.__name__}"
        return
    if kind and value.get("_partial_") is True:
        yield f"{key}._partial_", f"expected a {kind.__name__}, got a function that would make it; set it to false"
        return
    found = list(_argument_problems(key, value, target, typed))
    yield from found
    if not found and value.get("_partial_") is True:
        yield from _factory_problems(key, value, target)


def _argument_problems(
    key: str, value: dict[str, Any], target: Callable[..., Any], typed: Callable[[str], str] = str
) -> Iterator[Problem]:
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
                meant = did_you_mean(str(name), names)
                stop = "" if meant.endswith("?") else ";"
                yield f"{key}.{name}", f"{_short(value)} takes no {name!r}{meant}{stop} ~{key}.{name} leaves it out"
        elif argument != "???" and not _fits(argument, hints.get(name, Any)):
            yield typed(f"{key}.{name}"), f"expected {_name(hints[name])}, got {_got(argument)}"
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
            for name, argument in value.items():
                if isinstance(argument, float) and math.isinf(argument):  # torch takes it, and the weights are nan
                    yield f"{key}.{name}", f"expected a finite number, got {argument}"
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
    for key in objective.keys() - {"metric", "mode"}:
        yield f"objective.{key}", f"there is no such key{did_you_mean(str(key), ['metric', 'mode'])}"


def _compile_problems(arguments: Mapping[Any, Any]) -> Iterator[Problem]:
    fitting = {key: value for key, value in arguments.items() if key in _COMPILE and _fits(value, _COMPILE[key])}
    for key, value in arguments.items():
        if key not in _COMPILE:
            yield f"compile.{key}", f"torch.compile takes no {key!r}{did_you_mean(str(key), _COMPILE)}"
        elif key not in fitting:
            yield f"compile.{key}", f"expected {_name(_COMPILE[key])}, got {value!r}"
    try:
        torch.compile(lambda: None, **fitting)  # of nothing: it looks at its arguments alone
    except Exception as error:  # torch's own words, of half a dozen classes; some list hundreds of options
        yield "compile", shorten(_one_line(error), 200, placeholder=" ...")


def _trainer_problems(plain: Mapping[Any, Any]) -> Iterator[Problem]:
    """What Lightning finds out late, or never."""
    trainer = plain.get("trainer")
    if not isinstance(trainer, dict):
        return
    for key in _MEMBERS:
        if key in trainer:
            yield f"trainer.{key}", f"expected in {key!r} at the top, got it here; change that"
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if isinstance(value := trainer.get(key), int) and value < 1:
            yield f"trainer.{key}", f"expected >= 1, got {value}"
    for key in ("gradient_clip_val", "log_every_n_steps"):
        if isinstance(value := trainer.get(key), (int, float)) and value < 0:
            yield f"trainer.{key}", f"expected >= 0, got {value}"
    for key in ("limit_train_batches", "val_check_interval", "max_steps"):
        if isinstance(value := trainer.get(key), (int, float)) and value == 0:
            yield f"trainer.{key}", "expected some to train for, got 0"
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
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, dict) and "_target_" in value and value.get("_partial_") is not True:
        return True  # to be built: its own arguments are checked, its result is not
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
    if isinstance(value, dict) and "_target_" in value:  # a function that would make it
        return not issubclass(kind, (torch.nn.Module, str, int, float))
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


def _got(value: Any) -> str:
    """A value as an error quotes it; of what is to be built, its name."""
    if isinstance(value, dict) and "_target_" in value:
        return f"a function that would make a {_short(value)}; leave _partial_ out"
    return repr(value)


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
    said = (HastenError, ValueError, TypeError, MisconfigurationException)
    return text if isinstance(error, said) else f"{type(error).__name__}: {text}"
