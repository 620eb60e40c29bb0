"""Choosing modules and parameters of a model by name, glob, type or predicate; choosing nothing is an error."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hasten.errors import did_you_mean

Classes = type[nn.Module] | tuple[type[nn.Module], ...]

ModuleChoice = str | Sequence[str] | Classes | Callable[[str, nn.Module], bool]
"""A glob over names, or several; a class, or several; or (name, module) -> bool."""

ParameterChoice = str | Sequence[str] | Classes | Callable[[str, nn.Parameter, nn.Module], bool]
"""A glob or one of the words all, norm, bias, or several; a class of owners; or (name, parameter, owner) -> bool."""

# (name, what may be chosen, the module that it is or that owns it)
_Candidates = list[tuple[str, Any, nn.Module]]
_Test = Callable[[str, Any, nn.Module], bool]

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # _NormBase: batch and instance norm


def select_modules(model: nn.Module, which: ModuleChoice) -> dict[str, nn.Module]:
    """The modules of ``model`` that ``which`` means, by name; one with several names once, under the first.

    Args:
        model: is itself among them, under the name "".
        which: names or globs ("*" matches dots too), of which each must match; classes, with their subclasses; or a
            predicate.

    Raises:
        ValueError: where nothing matches; names the nearest.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        >>> list(select_modules(model, nn.Conv2d)), list(select_modules(model, "[01]"))
        (['0', '2'], ['0', '1'])
    """
    candidates = [(name, module, module) for name, module in model.named_modules(remove_duplicate=False)]
    return _chosen("modules", candidates, _tests("modules", which, lambda name, module, _: which(name, module)))  # type: ignore[operator]


def select_parameters(model: nn.Module, which: ParameterChoice) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that ``which`` means, by name; a tied one once, under its first name.

    Args:
        model: any module.
        which: names or globs ("*" matches dots too), of which each must match; "all"; "norm", the weights and biases
            of norm layers; "bias", every 1-D bias; classes, for the parameters that their instances own directly; or
            a predicate.

    Raises:
        ValueError: where nothing matches, names the nearest; or where a name is that of a module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(1, 4))
        >>> list(select_parameters(model, ["norm", "0.b*"])), list(select_parameters(model, nn.Conv2d))
        (['0.bias', '1.weight', '1.bias'], ['0.weight', '0.bias'])
    """
    candidates = [
        (f"{module_name}.{name}" if module_name else name, parameter, owner)
        for module_name, owner in model.named_modules(remove_duplicate=False)
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
    ]
    modules = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    return _chosen("params", candidates, _tests("params", which, which, _WORDS), modules)  # type: ignore[arg-type]


def _chosen(
    thing: str, candidates: _Candidates, tests: dict[str, _Test], containers: Iterable[str] = ()
) -> dict[str, Any]:
    """What passes any of the tests, in the model's order; each test must find something.

    Args:
        thing: the argument, as errors call it.
        candidates: an object may stand here several times.
        tests: by what a person wrote.
        containers: names a person may have meant all members of.
    """
    found: set[int] = set()
    for wanted, test in tests.items():
        hits = {id(member) for name, member, owner in candidates if test(name, member, owner)}
        if not hits and wanted in containers:
            raise ValueError(f"{thing}: expected names of parameters, got the module {wanted!r}; use '{wanted}.*'")
        if not hits:
            nearest = did_you_mean(wanted, (name for name, _, _ in candidates))
            raise ValueError(
                f"{thing}: expected one of {len(candidates)} names, got {wanted!r} without a match{nearest}"
            )
        found |= hits
    first: dict[int, str] = {}
    for name, member, _ in candidates:
        first.setdefault(id(member), name)
    members = {id(member): member for _, member, _ in candidates}
    return {name: members[key] for key, name in first.items() if key in found}


def _tests(thing: str, which: Any, predicate: Any, words: dict[str, _Test] | None = None) -> dict[str, _Test]:
    """The tests that ``which`` means, by what an error calls them; ``words`` stand for themselves."""
    patterns = [which] if isinstance(which, str) else list(which) if isinstance(which, Sequence) else None
    if patterns == []:
        raise ValueError(f"{thing}: expected at least one name, class or predicate, got none")
    if patterns and all(isinstance(pattern, str) for pattern in patterns):
        return {pattern: (words or {}).get(pattern) or _glob(pattern) for pattern in patterns}
    classes: tuple[Any, ...] = tuple(patterns or [which])
    if all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in classes):
        return {", ".join(kind.__name__ for kind in classes): lambda _name, _member, owner: isinstance(owner, classes)}
    if callable(which) and not isinstance(which, type):
        return {getattr(which, "__name__", repr(which)): predicate}
    raise TypeError(f"{thing}: expected globs, module classes or a predicate, got {which!r}")


def _glob(pattern: str) -> _Test:
    return lambda name, _member, _owner: name == pattern or fnmatchcase(name, pattern)


def _of_a_norm(_name: str, _parameter: nn.Parameter, owner: nn.Module) -> bool:
    # other libraries' norms do not share a class, but they share the word
    return isinstance(owner, _NORMS) or "norm" in type(owner).__name__.lower()


def _a_bias(name: str, parameter: nn.Parameter, _owner: nn.Module) -> bool:
    return "bias" in name.rpartition(".")[2] and parameter.ndim == 1  # in_proj_bias and bias_ih_l0 too, no bias tables


_WORDS: dict[str, _Test] = {"all": lambda _name, _parameter, _owner: True, "norm": _of_a_norm, "bias": _a_bias}
