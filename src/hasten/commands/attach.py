"""``hasten attach module:Class``: which of hasten's callbacks serve a LightningModule of yours, which refuse, and why.

There is no list of rules here: every public callback is made with its defaults, or as the example in its docstring
makes it, set up against the module on the CPU as at the start of a fit, and sent away again. Nothing is trained.
"""

import ast
import copy
import doctest
import importlib
import importlib.util
import inspect
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.commands import _words
from hasten.errors import HastenError, did_you_mean, on_one_line

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule
    from lightning.pytorch import Callback


@dataclass(frozen=True)
class Verdict:
    """What became of one way to attach."""

    name: str
    code: str
    """The expression that was tried."""
    before: tuple[str, ...] = ()
    """The lines it needs, beside the import of ``name``."""
    refusal: str = ""
    """Why not, in the words of what refuses; empty where it fits."""


def main(words: Sequence[str]) -> int:
    """Try every callback on the module that ``words`` name, and print a line for each."""
    parser = _words.parser(
        "attach",
        "Which of hasten's callbacks fit a LightningModule of yours, and how to attach them.",
        epilog="example: hasten attach train.py:Denoiser channels=3 widths=[32,64]",
    )
    parser.add_argument(
        "module", nargs="?", metavar="module:Class", help="or file.py:Class, or :function that makes one"
    )
    parser.add_argument("arguments", nargs="*", metavar="key=value", help="of its constructor, as in a run")
    asked = _words.parsed(parser, words)
    if asked is None:
        return 0
    if not asked.module:
        raise HastenError(
            "attach: expected module:Class or file.py:Class, got nothing; try: hasten attach train.py:Net"
        )
    module = made(asked.module, _arguments(asked.arguments))
    with _silenced():
        data = _stand_in()
        verdicts = [tried(name, module, data) for name in public_callbacks()]
        parts, ways = _held(module), _ways_of_nn(module)
    _print(module, parts, verdicts, ways)
    return 0


def made(name: str, arguments: dict[str, Any]) -> "LightningModule":
    """The module that ``module:Class``, ``file.py:Class`` or ``...:function`` describes.

    Raises:
        HastenError: where it cannot be imported or made, or is no LightningModule.
    """
    from lightning import LightningModule  # noqa: PLC0415 - seconds of import, after what can be said without

    source, _, attribute = name.rpartition(":")
    if not (source and attribute):
        raise HastenError(f"attach: expected module:Class or file.py:Class, got {name!r}")
    found: Any = _imported(source)
    for part in attribute.split("."):
        if not hasattr(found, part):
            offered = [key for key, value in vars(found).items() if _is_own(value, found)]
            raise HastenError(f"attach: {source} has no {attribute!r}{did_you_mean(part, offered)}")
        found = getattr(found, part)
    if isinstance(found, type) and not issubclass(found, LightningModule):
        raise HastenError(f"attach: {name}: expected a LightningModule, got {_described(found)}")
    if not callable(found):
        raise HastenError(f"attach: {name}: expected a class or a function, got {type(found).__name__}")
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        takes = ", ".join(map(str, inspect.signature(found).parameters.values())) or "nothing"
        raise HastenError(f"attach: {name}: {on_one_line(error)}; give key=value of: {takes}") from error
    try:
        module = found(**arguments)
    except Exception as error:  # whatever someone's constructor raises
        raise HastenError(f"attach: {name}: cannot be made: {type(error).__name__}: {on_one_line(error)}") from error
    if not isinstance(module, LightningModule):
        raise HastenError(
            f"attach: {name}: expected a LightningModule, got a {type(module).__name__}, {_described(type(module))}"
        )
    return module


def public_callbacks() -> dict[str, "type[Callback]"]:
    """Everything that hasten attaches, by name."""
    import hasten.callbacks  # noqa: PLC0415 - loads torch and Lightning

    return {name: getattr(hasten.callbacks, name) for name in hasten.callbacks.__all__}


def recipe(callback: "type[Callback]") -> tuple[str, tuple[str, ...]]:
    """The expression that makes a callback to try, with its defaults or else its own example's, and the lines before.

    Raises:
        HastenError: where an argument has no default, and the docstring no example that gives it.
    """
    parameters = inspect.signature(callback).parameters.values()
    if all(parameter.default is not parameter.empty for parameter in parameters):
        return f"{callback.__name__}()", ()
    lines: list[str] = []
    for example in doctest.DocTestParser().get_examples(inspect.getdoc(callback) or ""):
        line = example.source.strip()
        for node in ast.walk(ast.parse(line)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == callback.__name__:
                return str(ast.get_source_segment(line, node)), tuple(lines)
        lines.append(line)
    raise HastenError(
        f"attach: {callback.__name__}: expected an example in its docstring that makes one, got none; add it to "
        f"{Path(inspect.getfile(callback)).name}"
    )


def made_callback(callback: "type[Callback]") -> "Callback":
    """One of its kind, by its ``recipe``."""
    code, before = recipe(callback)
    scope = dict(vars(sys.modules[callback.__module__]))  # as a doctest has it
    for line in before:
        exec(line, scope)  # hasten's own docstrings, which the tests run too
    return eval(code, scope)


def tried(name: str, module: "LightningModule", data: "LightningDataModule") -> Verdict:
    """What the callback ``name`` says of ``module``, which is left as it was found.

    Args:
        name: of ``hasten.callbacks``.
        module: of anyone.
        data: what the fit would be given.
    """
    from lightning import Trainer  # noqa: PLC0415 - as above
    from lightning.pytorch.callbacks import ProgressBar  # noqa: PLC0415
    from lightning.pytorch.trainer.states import TrainerFn  # noqa: PLC0415

    kind = public_callbacks()[name]
    code, before = recipe(kind)
    callback = made_callback(kind)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=isinstance(callback, ProgressBar),
        callbacks=[callback],
    )
    # what Lightning does at the start of a fit, as far as callbacks see it
    trainer.state.fn, trainer.training = TrainerFn.FITTING, True
    trainer.strategy.connect(module)
    trainer.datamodule = data  # type: ignore[attr-defined]
    trainer_before, module.trainer = module._trainer, trainer
    refusal = ""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # examples name folders
        try:
            callback.setup(trainer, module, "fit")
            callback.on_fit_start(trainer, module)
        except Exception as error:  # a stranger's module may break anything
            callback.on_exception(trainer, module, error)
            kind_of_error = "" if isinstance(error, HastenError) else f"{type(error).__name__}: "
            refusal = kind_of_error + on_one_line(error)
        finally:
            callback.teardown(trainer, module, "fit")
            module.trainer = trainer_before
    return Verdict(name, code, before, refusal)


# ------------------------------------------------------------------ what was named


def _arguments(words: Sequence[str]) -> dict[str, Any]:
    """What key=value means in a run: Hydra's grammar, without its groups and sweeps."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: PLC0415 - help needs none
    from hydra.errors import HydraException  # noqa: PLC0415

    parser, arguments = OverridesParser.create(), {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key.isidentifier()):
            raise HastenError(f"attach: expected key=value, got {word!r}")
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            raise HastenError(f"attach: {key}: expected a value as in a run, got {text!r}") from error
        if override.is_sweep_override():
            raise HastenError(f"attach: {key}: expected one value, got {text!r}; write a list as {key}=[{text}]")
        arguments[key] = override.value()
    return arguments


def _imported(source: str) -> Any:
    """A module of Python's path, which the present folder is part of, or a file."""
    path = Path(source)
    if source.endswith(".py") and not path.is_file():
        raise HastenError(f"attach: there is no file {source!r} in {str(Path.cwd())!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        name = f"attached_{path.stem}"  # no other module's: a person may have a json.py
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError("no file of Python")
        sys.path.insert(0, str(path.resolve().parent))  # as where the file is run
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses, pickle and deepcopy look there
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # whatever stands at the top of someone's file
        said = on_one_line(error) or "it exits"
        raise HastenError(f"attach: cannot import {source!r}: {type(error).__name__}: {said}") from error


def _described(kind: type) -> str:
    """A class that is no LightningModule, by what it derives from; and the remedy where that is one of another name."""
    bases = ", ".join(f"{base.__module__}.{base.__name__}".removeprefix("builtins.") for base in kind.__bases__)
    others = any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in kind.__mro__)
    return f"a class derived from {bases}{'; import lightning, not pytorch_lightning' if others else ''}"


def _is_own(value: Any, module: Any) -> bool:
    """Whether a module or class has made ``value``, not imported it."""
    return callable(value) and getattr(value, "__module__", None) == getattr(module, "__name__", None)


# ------------------------------------------------------------------ what else it holds


def _stand_in() -> "LightningDataModule":
    """For the callbacks that ask what a fit is given."""
    from hasten.datamodules import Digits  # noqa: PLC0415 - loads torch

    return Digits()


def _held(module: "LightningModule") -> list[str]:
    """The parts that hasten knows: noise schedulers, and backbones that merge tokens."""
    from hasten.callbacks._timestep_adapter import schedulers  # noqa: PLC0415 - loads torch
    from hasten.nn.token_merging import find_backbone  # noqa: PLC0415

    parts = []
    for name, scheduler in schedulers(module).items():
        library = type(scheduler).__module__.partition(".")[0]
        parts.append(f"{name}: {type(scheduler).__name__} of {library}, {len(scheduler.betas)} timesteps")
    try:
        path, backbone = find_backbone(module)
    except ValueError:
        return parts
    library = type(backbone).__module__.partition(".")[0]
    return [*parts, f"{path}: {type(backbone).__name__} of {library}, which merges tokens"]


def _ways_of_nn(module: "LightningModule") -> list[Verdict]:
    """What hasten.nn does to a network without Lightning, tried on a copy without memory."""
    from hasten.nn import attach_token_merging, hypernetize  # noqa: PLC0415 - loads torch

    children = {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}
    name = "model" if "model" in children else next(iter(children), "")
    condition = {"condition": (0.0, 1.0)}

    def generated() -> None:
        if not name:
            raise ValueError("hypernetize: expected a network as a child of the module, got none")
        hypernetize(copy.deepcopy(children[name]).to("meta"), condition, head="lora")

    ways = {
        f'hypernetize(module.{name}, {condition}, head="lora")': generated,
        "attach_token_merging(module, r=8)": lambda: attach_token_merging(module, r=8).remove(),
    }
    verdicts = []
    for code, way in ways.items():
        refusal = ""
        try:
            way()
        except Exception as error:  # as above
            refusal = on_one_line(error)
        verdicts.append(Verdict(code.partition("(")[0], code, refusal=refusal))
    return verdicts


# ------------------------------------------------------------------ output


def _print(
    module: "LightningModule", parts: Sequence[str], callbacks: Sequence[Verdict], ways: Sequence[Verdict]
) -> None:
    size = sum(parameter.numel() for parameter in module.parameters())
    print(f"{type(module).__name__}: {size:,} parameters")
    for part in parts:
        print(f"  holds {part}")
    later = [name for name in ("setup", "configure_model") if _is_theirs(module, name)]
    if later:
        print(f"  was not asked for what it builds in {' and '.join(later)}: callbacks that look for it refuse here")
    _print_verdicts("hasten.callbacks, as far as their setup can tell: lightning.Trainer(callbacks=[...])", callbacks)
    _print_verdicts("hasten.nn: without Lightning", ways)
    print(
        "\nNothing was trained. What asks for data was shown scikit-learn's digits: give fit() a datamodule of yours.\n"
        "What fits may still refuse in the first batch, which shows what your step takes and gives; it says why."
    )


def _print_verdicts(title: str, verdicts: Sequence[Verdict]) -> None:
    print(f"\n{title}")
    width = max(len(verdict.name) for verdict in verdicts)
    for verdict in sorted(verdicts, key=lambda verdict: bool(verdict.refusal)):
        needs = "; ".join(line for line in verdict.before if not line.startswith("from lightning"))
        how = f"{verdict.code}{f'   # {needs}' if needs else ''}"
        said = f"refuses  {verdict.refusal}" if verdict.refusal else f"fits     {how}"
        print(f"  {verdict.name:<{width}}  {said}")


def _is_theirs(module: "LightningModule", name: str) -> bool:
    """Whether the module overrides a hook in a class that is neither Lightning's nor hasten's."""
    library = getattr(type(module), name).__module__.partition(".")[0]
    return library not in ("lightning", "pytorch_lightning", "hasten")


@contextmanager
def _silenced() -> Iterator[None]:
    """Without Lightning's lines on devices and tips, a set for each of the trainers."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
