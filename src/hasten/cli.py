"""The command line: ``hasten`` and ``python train.py`` are this one entry.

A first word without "=" is a command (list, ...); everything else is a run, composed by Hydra. Nothing here imports
torch or Lightning before a run starts, so that help and lists answer at once.
"""

import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hasten import __version__, registry
from hasten.errors import HastenError, did_you_mean, on_one_line
from hasten.interruption import Stopped, stopped_by_sigterm

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from hasten.run import Result

_USAGE = """\
hasten {version}: published methods that make training cheaper, for PyTorch Lightning

  python train.py                        train the default experiment, speed_digits
  python train.py experiment=NAME        train another; key=value changes anything in its config
  python train.py -m seed=0,1,2 ...      one run for each combination
  python train.py --cfg job ...          print the composed config instead of running it
  python train.py ckpt_path=last ...     continue the newest unfinished run of the experiment, in its folder
  python train.py ckpt_path=auto run_dir=FOLDER ...  continue the run there, or begin it: for jobs that are put back
  python train.py estimate=true ...      print parameters, memory and time of the run instead of running it
  hasten list [WORD]                     methods, experiments and data; or all that has to do with a word
  hasten show EXPERIMENT                 its config, where each value comes from, and what the run would cost here
  hasten compare DIR...                  a table of runs, mean ± sd over seeds, and their curves
  hasten attach module:Class [KEY=VALUE] which callbacks fit a LightningModule of yours, which refuse, and why
  hasten export RUN [--out FOLDER]       its weights, config and card, in a form that timm or diffusers loads
  hasten new METHOD [--family FAMILY]    in a clone: the files of a new method, and what is owed in each
  (`python train.py` and `hasten` take the same words)

Often changed: seed=1  trainer=gpu  trainer.max_steps=200  logger=wandb  data.batch_size=128  ckpt_path=PATH

Experiments:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code; errors are one line each."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except BrokenPipeError:  # `hasten list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Stopped) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT, "; no run had begun")
        print(f"hasten: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except SystemExit as error:  # how Hydra's own flags end, such as --hydra-help
        return error.code if isinstance(error.code, int) else 0
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        _report(error)
        return 1


def _dispatch(words: list[str]) -> int:
    if words and not words[0].startswith("-") and "=" not in words[0]:
        if words[0] == "help":
            return _help(words[1:])
        if words[0] in _COMMANDS:
            return _command(words[0], words[1:])
        if not words[0].startswith(("+", "~")):
            nearest = did_you_mean(words[0], ["help", *_COMMANDS])
            raise HastenError(f"{words[0]!r}: expected a command or key=value{nearest}")
    if "--help" in words or "-h" in words:
        return _help([])
    if "--version" in words:
        print(f"hasten {__version__}")
        return 0
    with stopped_by_sigterm():
        _train(words)
    return 0


# ------------------------------------------------------------------ commands


def _help(words: list[str]) -> int:
    if words:
        raise HastenError(f"help: expected no further words, got {' '.join(words)!r}")
    from hasten.commands.list import lines_of

    print(_USAGE.format(version=__version__), end="")
    print("\n".join(lines_of(registry.group("experiment"))))
    return 0


def _command(name: str, words: list[str]) -> int:
    """What ``hasten.commands.<name>`` does, whose file is imported only now."""
    _quiet()
    try:
        return import_module(f"hasten.commands.{name}").main(words)
    except HastenError:
        raise
    except Exception as error:  # Hydra's own, of words that name an experiment or change its config
        composed = [word if re.search("[=~]", word) else f"experiment={word}" for word in words]
        raise _in_one_line(error, composed) from error


_COMMANDS = ("list", "show", "compare", "attach", "export", "new")


# ------------------------------------------------------------------ runs


def _train(words: list[str]) -> None:
    """Compose, check and run through Hydra: one job, or a sweep that goes on where a job fails."""
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra

    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign] # argparse prints its usage and exits with 2
    parsed = parser.parse_intermixed_args(words)
    sweep = parsed.multirun
    _check_words(parsed.overrides)
    swept = _swept(parsed.overrides)
    overrides = _continued(parsed.overrides, sweep=sweep)
    # Hydra wants the overrides in one piece, and --info before none of them
    words = [*overrides, *(word for word in words if word not in parsed.overrides)]
    wanted = os.environ.get("HYDRA_FULL_ERROR")
    failures: list[Exception] = []

    def task(cfg: "DictConfig") -> float | None:
        try:
            with _full_error(wanted):  # processes that the job starts inherit it
                return _job(cfg, swept)
        except Exception as error:  # Hydra would print a line of its own and, in a sweep, raise only the first
            failures.append(error)
            if sweep:
                _report(error)
            return None

    entry = hydra.main(config_path="pkg://hasten.configs", config_name="train", version_base="1.3")(task)
    with _argv(words), _full_error("1"):
        try:
            entry()
        except SystemExit as error:
            if error.code != 2:  # argparse's
                raise
            raise HastenError(f"cannot read {' '.join(words)!r}; see --help") from error
        except Exception as error:
            GlobalHydra.instance().clear()  # what could not be composed would stand in the way of its explanation
            raise _in_one_line(error, words) from error
    if failures and sweep:
        raise HastenError(f"{len(failures)} of the sweep's jobs failed; their lines stand above")
    if failures:
        raise failures[0]


def _swept(overrides: list[str]) -> set[str]:
    """What tells the jobs of a sweep apart: the keys with several values (a,b), a choice or a range."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True)
    return {word.partition("=")[0] for word, override in parsed if override.is_sweep_override()}


def _continued(overrides: list[str], *, sweep: bool) -> list[str]:
    """The words of a run: where they say ``ckpt_path=last``, those of the newest unfinished one, then the new ones."""
    given = {word.partition("=")[0]: word.partition("=")[2].strip("'\"") for word in overrides}
    if given.get("ckpt_path") != "last":
        return overrides
    # imported here: help and lists need no file locks
    from hasten.run_folders import LAST, newest_unfinished, result_of, started_processes

    if sweep:
        raise HastenError("ckpt_path: last: expected one run, got a sweep (--multirun); continue its jobs one by one")
    if "run_dir" in given:
        folder = Path(given["run_dir"])
    elif started_processes() > 1:
        raise HastenError("run_dir: required with ckpt_path=last under torchrun and SLURM, got nothing")
    else:
        folder = newest_unfinished(given.get("experiment") or _default_experiment())
    result = result_of(folder)
    if result.get("status", "complete") == "complete":
        found = "one that is complete; to train it for longer give ckpt_path=FILE" if result else "none"
        raise HastenError(f"ckpt_path: last: expected an unfinished run in {str(folder)!r}, found {found}")
    print(f"continuing {folder}")
    quoted = str(folder).replace("'", "\\'")
    replaced = {*given, "run_dir", "ckpt_path"}
    before = [word for word in result.get("overrides", []) if word.partition("=")[0] not in replaced]
    new = [word for word in overrides if word.partition("=")[0] not in ("run_dir", "ckpt_path")]
    last = [f"ckpt_path='{quoted}/{LAST.as_posix()}'"] if (folder / LAST).exists() else []
    return [*before, *new, f"run_dir='{quoted}'", *last]


def _default_experiment() -> str:
    from importlib.resources import files

    import yaml

    train = yaml.safe_load(files("hasten").joinpath("configs/train.yaml").read_text(encoding="utf-8"))
    return next(entry["experiment"] for entry in train["defaults"] if "experiment" in entry)


def _job(cfg: "DictConfig", swept: set[str]) -> float | None:
    """One job of Hydra's: run it, print what it gave, and return its objective for a sweeper."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from hasten.check import check_read
    from hasten.run import named, run

    # as they were typed: list() would interpolate them
    words: list[str] = OmegaConf.to_container(HydraConfig.get().overrides.task)  # type: ignore[assignment]
    check_read(cfg, words)
    _quiet()
    hydra_cfg = HydraConfig.get()
    paths = [word for word in hydra_cfg.overrides.hydra if word.startswith("hydra.searchpath=")]
    sweep = ""
    if hydra_cfg.mode == RunMode.MULTIRUN:
        told = [word for word in words if word.partition("=")[0] in swept - {"experiment", "seed"}]
        # no "=" and no ",": the folder's name will stand in an override, ckpt_path=...
        sweep = re.sub(r"[^A-Za-z0-9_.]+", "-", ",".join(told))[:80]
        trainer = cfg.trainer
        devices = trainer.devices
        if trainer.strategy != "auto" or (len(devices) != 1 if OmegaConf.is_list(devices) else str(devices) != "1"):
            raise HastenError(
                "--multirun: expected one process a job, got several (trainer.strategy or trainer.devices); "
                "start the jobs one by one"
            )
        varied = ", ".join(word for word in words if word.partition("=")[0] in swept)
        print(f"job {hydra_cfg.job.num}: {varied}")
        logger = OmegaConf.select(cfg, "logger.wandb") or {}
        for key, value in {"group": Path(hydra_cfg.sweep.dir).name, "name": varied}.items():
            if key in logger and logger[key] is None:
                logger[key] = value
    cfg = named(cfg, hydra_cfg.runtime.choices.get("experiment"), [*paths, *words])
    if cfg.get("estimate"):
        _print_estimate(cfg)
        return None
    try:
        with _own_log():
            result = run(cfg, sweep=sweep)
    finally:
        if wandb := sys.modules.get("wandb"):
            wandb.teardown()  # its service writes to the folder of the run that it was started for
    if result.trainer is None or result.trainer.is_global_zero:
        _print_result(result)
        for card in registry.methods_used(OmegaConf.to_container(cfg), cfg.experiment):
            print(f"  cite: {card.paper_of(cfg.experiment)}")
    return result.metrics.get(cfg.objective.metric)


def _quiet() -> None:
    """Leave out what libraries say of themselves or of what is as it should be."""
    # Lightning's INFO lines tell of devices and tips, not of the run
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # newer releases of torch deprecate what Lightning 2.6 asks of them at every batch
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval")  # of short runs: as it should be
    warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")  # of a run that goes on
    # data sets are distilled without Lightning's own validation, and checkpoints are written between two iterations
    warnings.filterwarnings("ignore", message=".*`val_dataloader` but have no `validation_step`")
    warnings.filterwarnings("ignore", message=".*ModelCheckpoint.* with manual optimization")


def _print_estimate(cfg: "DictConfig") -> None:
    from lightning.pytorch.utilities import rank_zero_only

    from hasten.estimate import as_text, estimate

    costs = as_text(estimate(cfg))
    rank_zero_only(print)(f"{costs}\n\nnothing has run; the same words without estimate=true run it")


@contextmanager
def _own_log() -> Iterator[None]:
    """Print what hasten notes of a run: which weights it loaded, which kernel scans."""
    from rich.logging import RichHandler

    log, handler = logging.getLogger("hasten"), RichHandler(show_time=False, show_level=False, show_path=False)
    level = log.level
    log.addHandler(handler)  # rich's, which goes well with a live bar
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _print_result(result: "Result") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table("metric", "value", title="final metrics", title_justify="left")
    table.columns[1].justify = "right"
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    folder = result.folder
    written = ["result.json", "metrics.csv", "config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"]
    pictures = sorted(path.relative_to(folder).as_posix() for path in folder.glob("pictures/*.png"))
    newest = [name for name in pictures if not re.search(r"_\d+\.png$", name)]
    for name in [*newest, *written]:
        if (folder / name).exists():
            console.print(f"  {folder / name}", highlight=False)


@contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    """``words`` as the process's own, where Hydra and the processes that DDP starts read them."""
    argv = sys.argv
    sys.argv = [argv[0], *words]
    try:
        yield
    finally:
        sys.argv = argv


@contextmanager
def _full_error(value: str | None) -> Iterator[None]:
    """HYDRA_FULL_ERROR as ``value``: "1" makes Hydra raise, where else it prints and exits."""
    before = os.environ.pop("HYDRA_FULL_ERROR", None)
    if value is not None:
        os.environ["HYDRA_FULL_ERROR"] = value
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


# ------------------------------------------------------------------ errors


def _report(error: Exception) -> None:
    """Print an error as one line for each problem it names."""
    if isinstance(error, HastenError):
        lines = str(error).splitlines()
    else:
        lines = [f"{type(error).__name__}: {on_one_line(error)} (HYDRA_FULL_ERROR=1 shows where)"]
    for line in lines:
        short = line if len(line) <= 1000 else f"{line[:700]} ... {line[-200:]}"  # of what was typed, say
        print(f"hasten: {short}", file=sys.stderr)


def _refuse(message: str) -> NoReturn:
    raise HastenError(f"{message}; see --help")


def _check_words(words: list[str]) -> None:
    """Refuse words that Hydra cannot read; the HastenError names them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser, lines = OverridesParser.create(), []
    for word in words:
        shown = word if word.isprintable() else repr(word)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        try:
            if not parser.parse_override(word).key_or_group:
                lines.append(f"{shown}: expected key=value, got no key")
        except Exception as error:  # of the grammar's many parts
            said = on_one_line(str(error).splitlines()[0] if str(error) else type(error).__name__)
            quoted = "" if word.isascii() else "; quote what is not ASCII: \"key='value'\""
            lines.append(f"{shown}: expected key=value, cannot read it: {said[:160]}{quoted}")
    if lines:
        raise HastenError("\n".join(lines))


def _in_one_line(error: Exception, words: list[str]) -> Exception:
    """Hydra's own errors in hasten's wording; any other error as it is."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    said = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = error.options or (registry.group(group) if group in registry.groups() else [])
        return HastenError(f"{group}: there is no {name!r}{did_you_mean(name, options)}")
    if match := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", said):
        key, value = match[1], match[2]
        return HastenError(
            f"{key}: expected one value, got {value!r}; add -m to try each, or write a list as {key}=[{value}]"
        )
    if match := re.match(r"Could not delete.*?'([^']*)'", said):
        return HastenError(f"~{match[1]}: expected a key that has a value, or a group, got neither; leave it out")
    if match := re.match(r"Multiple values for (\S+)\.|(\S+) appears more than once", said):
        group = match[1] or match[2]
        return HastenError(f"{group}: expected one option, got several; write {group}=NAME without the +")
    if "Config group override must be a string" in said:
        word = next((word for word in words if word.endswith("=null")), words[-1])
        group = word.partition("=")[0]
        options = registry.group(group) if group in registry.groups() else []
        return HastenError(f"{word}: expected an option{did_you_mean('', options)}")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return HastenError(f"{max(words, key=len)[:80]}...: expected the name of an option, too long for one")
    if match := re.search(r"Could not override '([^']+)'", said):
        return HastenError(_no_such_key(match[1].lstrip("+~"), words))
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        cause = error.__cause__ or error
        key = getattr(cause, "full_key", None)
        return HastenError(f"{key}: {str(cause).splitlines()[0]}" if key else on_one_line(cause))
    return error


def _no_such_key(key: str, words: list[str]) -> str:
    """The line for a key that the config does not have: how to add it where its owner would take it, or the nearest."""
    import inspect

    from hydra.utils import get_object
    from omegaconf import DictConfig, OmegaConf

    from hasten.run import compose

    def below(node: Any, prefix: str) -> Iterator[str]:
        for name in node:
            if not str(name).startswith("_"):
                yield f"{prefix}{name}"
                if isinstance(node._get_node(name), DictConfig):
                    yield from below(node._get_node(name), f"{prefix}{name}.")

    try:
        chosen = [word for word in words if word.partition("=")[0] in registry.groups() and "," not in word]
        cfg = compose(chosen)
    except Exception:  # the experiment is what is wrong: there is nothing to compare with
        return f"{key}: there is no such key"
    parent, _, name = key.rpartition(".")
    owner = OmegaConf.select(cfg, parent) if parent else None
    target = owner.get("_target_") if isinstance(owner, DictConfig) else None
    if target and name in inspect.signature(get_object(target)).parameters:
        return f"{key}: not in this config, but {target} takes it; add it with +{key}=VALUE"
    return f"{key}: there is no such key{did_you_mean(key, below(cfg, ''))}"
