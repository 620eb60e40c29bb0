"""``hasten show EXPERIMENT [key=value ...]``: its composed config, where each value comes from, its cost, its files."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from hydra import initialize_config_module
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from hasten.check import check_first, check_read
from hasten.commands import _words
from hasten.errors import HastenError
from hasten.estimate import as_text, estimate
from hasten.run import compose, folder_of, stages_of

_COLUMN = 60  # where the comments begin, but behind longer lines
_OF_THE_RUN = {"experiment", "overrides"}
"""Written by the run, not by a config."""


def main(words: Sequence[str]) -> int:
    """Print what ``words`` compose, value by value with the file that set it last, and what the run would cost here."""
    parser = _words.parser("show", "The composed config, where its values come from, its cost.")
    parser.add_argument("words", nargs="*", metavar="EXPERIMENT [key=value ...]", help="as for python train.py")
    parser.add_argument("--no-cost", action="store_true", help="the config alone; no steps are timed")
    asked = _words.parsed(parser, words)
    if asked is None:
        return 0
    overrides = _overrides(asked.words)
    cfg = compose(overrides)
    check_read(cfg, overrides)
    check_first(cfg)
    say = rank_zero_only(Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print)
    say(f"# python train.py {' '.join(overrides)}", style="dim")
    for line, comment in _lines(cfg, _as_in_a_run(cfg), value_sources(overrides)):
        text = Text(f"{line:<{_COLUMN}}" if comment else line)
        say(text.append(f"  # {comment}", style="dim") if comment else text)
    if not asked.no_cost:
        costs = as_text(estimate(cfg))
        say(f"\n{costs}")
    return 0


def value_sources(overrides: Sequence[str]) -> dict[str, str]:
    """Dotted key -> the config file that set its value last, or "command line"; a list is one value.

    Example:
        >>> value_sources(["experiment=speed_digits", "seed=3"])["trainer.max_steps"]
        'experiment/speed_digits.yaml'
    """
    sources: dict[str, str] = {}
    with initialize_config_module("hasten.configs", version_base="1.3"):
        # as Hydra composes: every file in its order, then the words
        loader: Any = GlobalHydra.instance().config_loader()
        words, files = loader._parse_overrides_and_create_caching_repo("train", list(overrides))
        order = create_defaults_list(files, "train", words, prepend_hydra=True, skip_missing=False)
        for default in order.defaults:
            loaded = files.load_config(default.config_path)
            if loaded is not None and loaded.provider != "hydra":
                keys = _leaves(loaded.config, default.package or "")
                sources |= {key: f"{default.config_path}.yaml" for key in keys if not key.startswith("hydra.")}
        for word in order.config_overrides:
            if not word.is_delete():
                value = OmegaConf.create({"value": word.value()})._get_node("value")
                sources |= dict.fromkeys(_leaves(value, word.key_or_group), "command line")
    return sources


def _overrides(words: Sequence[str]) -> list[str]:
    """The words of a run, from those of this command: an experiment's name stands alone."""
    names = [word for word in words if "=" not in word and not word.startswith("~")]
    if len(names) > 1:
        raise HastenError(f"show: expected one experiment, then key=value, got {' '.join(names)!r}")
    if not names and not any(word.startswith("experiment=") for word in words):
        raise HastenError("show: expected an experiment, got none; hasten list names them: hasten show speed_digits")
    return [*(f"experiment={name}" for name in names), *(word for word in words if word not in names)]


def _as_in_a_run(cfg: DictConfig) -> DictConfig:
    """With the folders that interpolations ask for."""
    there = cfg.copy()
    if there.run_dir is None:
        there.run_dir = str(folder_of(cfg))
    stages_of(there)
    return there


def _leaves(node: Any, key: str) -> Iterator[str]:
    """The keys of all values at and below ``node``, which stands at ``key``."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation() and len(node):
        for name in node:
            yield from _leaves(node._get_node(name), f"{key}.{name}" if key else str(name))
    else:
        yield key


def _lines(
    node: DictConfig, there: DictConfig, sources: dict[str, str], above: str = "", indent: str = ""
) -> Iterator[tuple[str, str]]:
    """Line of YAML and comment of every key, in the order of the config.

    Args:
        there: the whole config of a run, for what interpolations stand for.
        above: the key that ``node`` stands at, with a dot.
    """
    for name in node:
        key, value = f"{above}{name}", node._get_node(name)
        if key in _OF_THE_RUN:
            continue
        if isinstance(value, DictConfig) and list(_leaves(value, key)) != [key]:
            yield f"{indent}{name}:", ""
            yield from _lines(value, there, sources, f"{key}.", f"{indent}  ")
        else:
            yield f"{indent}{name}: {_plain(value)}", sources.get(key, "") + _stands_for(value, there, key)


def _plain(value: Any) -> str:
    """A leaf as YAML on one line; interpolations as they are written."""
    container = isinstance(value, (DictConfig, ListConfig))
    found = OmegaConf.to_container(value) if container and not value._is_interpolation() else value._value()
    return yaml.safe_dump(found, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def _stands_for(value: Any, there: DictConfig, key: str) -> str:
    """What a whole interpolation is worth, where that is a single value."""
    if not value._is_interpolation():
        return ""
    try:
        found = OmegaConf.select(there, key)
    except OmegaConfBaseException:  # of what is yet to be given
        return ""
    return "" if OmegaConf.is_config(found) else f": {found}"
