"""One run, from a composed config to a finished run folder; for the command line, for tests and for notebooks.

The path of a run: compose -> folder -> stages named by ``first`` -> check -> build -> fit -> test -> result.json; a
``task`` takes the place of fit and test.
"""

import os
import platform
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import lightning
import torch
from filelock import FileLock
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.utils import get_object
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from hasten.check import build, check, check_first
from hasten.checkpoints import Interruptible, read_checkpoint
from hasten.errors import HastenError, did_you_mean, on_one_line
from hasten.formats import recipe_hash, whole_file, write_json
from hasten.interruption import Stopped
from hasten.run_folders import LAST, claimed, result_of, resumes_by_files, started_processes

T = TypeVar("T")
_RANK_FOLDER = "HASTEN_RUN_DIR"
"""How the processes that DDP starts learn which folder rank zero chose."""


@dataclass(frozen=True)
class Result:
    """What a run leaves behind: final metrics by name, its folder, and what was fitted, for whoever goes on with it."""

    metrics: dict[str, float]
    folder: Path
    trainer: Trainer | None = None
    module: LightningModule | None = None
    datamodule: LightningDataModule | None = None


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The config that the command line would compose from the same words.

    Example:
        >>> compose(["experiment=speed_digits", "seed=3"]).seed
        3
    """
    # inside a job of the command line Hydra stands already, with the search path that its words asked for
    standing = GlobalHydra().is_initialized()
    ready = nullcontext() if standing else initialize_config_module("hasten.configs", version_base="1.3")
    with ready:
        cfg = hydra_compose("train", list(overrides), return_hydra_config=True)
    return named(cfg, cfg.hydra.runtime.choices.get("experiment"), overrides)


def named(cfg: DictConfig, experiment: str | None, overrides: Sequence[str]) -> DictConfig:
    """The config as a run reads it: without Hydra's own part, with the experiment's name and the words that made it."""
    if "experiment" in cfg and isinstance(cfg.experiment, DictConfig):
        raise HastenError(
            f"experiment: {experiment!r} sets keys below 'experiment'; its first line must be: # @package _global_"
        )
    with open_dict(cfg):
        cfg.pop("hydra", None)
        cfg.experiment = experiment or "run"
        cfg.overrides = [word.replace("${", "\\${") for word in overrides]  # words, to be read as they are
    return cfg


def run(cfg: DictConfig, *, sweep: str = "") -> Result:
    """Train and test what ``cfg`` describes, in a folder of its own.

    Args:
        cfg: from ``compose``.
        sweep: the words that tell this job of a sweep from its siblings; the end of the folder's name.

    Raises:
        HastenError: everything that is wrong with the config, a line each, before anything expensive.
        Stopped: where SIGTERM, or Ctrl-C, has asked the run to end.
    """
    if cfg.get("estimate"):
        raise HastenError("estimate: true: expected a command line, or hasten.estimate.estimate(cfg); run() trains")
    cfg = cfg.copy()
    check_first(cfg)
    with _claimed_folder(cfg, sweep) as folder:
        cfg.run_dir = str(folder)
        if cfg.ckpt_path == "auto":
            cfg.ckpt_path = _go_on_or_begin(cfg, folder)
        stages = stages_of(cfg)
        for config in (cfg, *stages):
            check(config)
        check_sharding(cfg)
        _rehearse(cfg, [stage.run_dir for stage in stages])
        for stage in stages:
            _complete(stage)
        with _stopped_in_our_words(cfg, folder, f"run_dir={folder} ckpt_path=last continues it"):
            return _run(cfg, folder)


def _run(cfg: DictConfig, folder: Path) -> Result:
    with threads_of(cfg):
        return _fit_and_test(cfg, folder) if cfg.task is None else _task(cfg, folder)


def _fit_and_test(cfg: DictConfig, folder: Path) -> Result:
    datamodule, module = data_and_module(cfg)
    ckpt_path = checkpoint_of(cfg.ckpt_path, module)
    callbacks, loggers = _all_built(cfg, "callbacks", Callback), _all_built(cfg, "logger", Logger)
    trainer = built(cfg, "trainer", Trainer, callbacks=callbacks, logger=loggers)
    with _recorded(cfg, folder, trainer.loggers if trainer.is_global_zero else None) as result:
        for logger in trainer.loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        with _in_our_words(cfg, trainer):
            trainer.fit(module, datamodule, ckpt_path=ckpt_path, weights_only=True)
            result["metrics"] = _numbers(trainer)
            best = getattr(trainer.checkpoint_callback, "best_model_path", "")
            if is_overridden("test_step", module):
                result["tested"] = "best" if best else "last"  # last: a run too short for a validation
                trainer.test(module, datamodule, ckpt_path=best or None, weights_only=True, verbose=False)
                result["metrics"] |= _numbers(trainer)
        if trainer.is_global_zero:
            _summarize(cfg, trainer, result["metrics"])
    return Result(result["metrics"], folder, trainer, module, datamodule)


def _summarize(cfg: DictConfig, trainer: Trainer, metrics: dict[str, float]) -> None:
    """Show in W&B what result.json holds, and the best value of the objective; of itself it shows what came last."""
    best = getattr(trainer.checkpoint_callback, "best_model_score", None)
    found = {} if best is None else {f"{cfg.objective.metric}_best": float(best)}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(metrics | found)


def _compile(cfg: DictConfig, module: LightningModule) -> None:
    """The network of a module, in place: the state_dict keeps its keys, and what calls parts of it stays as it was."""
    network = getattr(module, "model", None)
    if not isinstance(network, nn.Module):
        raise HastenError(
            f"compile: expected a network as {type(module).__name__}.model, which has none; leave compile out"
        )
    arguments = {} if cfg.compile is True else cast(dict[str, Any], OmegaConf.to_container(cfg.compile, resolve=True))
    network.compile(**arguments)


def _task(cfg: DictConfig, folder: Path) -> Result:
    """What a run does in place of a fit: a function of its folder that returns metrics."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    task = build(cfg, "task")
    if not callable(task):
        raise HastenError(
            f"task: expected a function of the run's folder, got {type(task).__name__}; add _partial_: true"
        )
    with _recorded(cfg, folder, []) as result:
        metrics: dict[str, float] = cast(Any, task)(folder)
        if not isinstance(metrics, dict):
            raise HastenError(f"task: expected a function that returns numbers by name, got {type(metrics).__name__}")
        result["metrics"] = metrics
    return Result(metrics, folder)


@contextmanager
def threads_of(cfg: DictConfig) -> Iterator[None]:
    """As many CPU threads as the run asks for; what runs next in this process asks for its own."""
    threads = torch.get_num_threads()
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def data_and_module(cfg: DictConfig) -> tuple[LightningDataModule, LightningModule]:
    """What a run fits on, and what it fits; from its seed on."""
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = built(cfg, "data" if cfg.datamodule is None else "datamodule", LightningDataModule)
    _check_image(cfg, datamodule)
    module = built(cfg, "module", LightningModule)
    if cfg.compile is not False:
        _compile(cfg, module)
    return datamodule, module


def built(cfg: DictConfig, key: str, kind: type[T], **extra: Any) -> T:
    """What the node at ``key`` describes, which must be a ``kind``."""
    made = build(cfg, key, **extra)
    if not isinstance(made, kind):
        raise HastenError(f"{key}: expected a {kind.__name__}, got {type(made).__name__}; see {key}._target_")
    return made


def _all_built(cfg: DictConfig, group: str, kind: type[T]) -> list[T]:
    """Everything in a group of named nodes; those set to null are left out."""
    nodes = cfg.get(group) or {}
    return [built(cfg, f"{group}.{name}", kind) for name in nodes if nodes[name] is not None]


def _check_image(cfg: DictConfig, datamodule: LightningDataModule) -> None:
    """Refuse an ``image``, which models are built by, that is not what the data holds; a stranger's need not tell."""
    channels, size, _ = getattr(datamodule, "image_shape", (None, None, None))
    classes = getattr(datamodule, "num_classes", None)
    for key, found in {"channels": channels, "size": size, "num_classes": classes}.items():
        given = OmegaConf.select(cfg, f"image.{key}")
        if found is not None and given is not None and given != found:
            raise HastenError(
                f"image.{key}: expected {found}, as in {type(datamodule).__name__}, got {given}; set it to {found}"
            )


def check_sharding(cfg: DictConfig) -> None:
    """Refuse a module that does not shard itself where the trainer asks for that."""
    strategy, module = cfg.trainer.strategy, cfg.module
    if not OmegaConf.is_dict(strategy) or get_object(strategy._target_) is not ModelParallelStrategy or module is None:
        return
    kind = get_object(module._target_)
    if getattr(kind, "configure_model", None) is LightningModule.configure_model:
        raise HastenError(
            f"trainer.strategy: expected a module that shards in configure_model, got {kind.__name__}, which every "
            "process holds whole; use trainer=ddp, or one process"
        )


# ------------------------------------------------------------------ folders


@contextmanager
def _claimed_folder(cfg: DictConfig, sweep: str) -> Iterator[Path]:
    """The run's own folder: the one asked for, rank zero's, or a new one; gone again if nothing was written there."""
    if int(os.environ.get("LOCAL_RANK", 0)) and _RANK_FOLDER in os.environ:
        yield Path(os.environ[_RANK_FOLDER])
        return
    if cfg.run_dir is None and started_processes() > 1:
        raise HastenError(
            "run_dir: required under torchrun and SLURM, got null; add run_dir=FOLDER, the same for all processes"
        )
    if cfg.run_dir is None and cfg.ckpt_path == "auto":
        raise HastenError("run_dir: required with ckpt_path=auto, got null; add run_dir=FOLDER, the same every time")
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield Path(str(cfg.run_dir))
        return
    folder = _new_folder(cfg, sweep) if cfg.run_dir is None else Path(cfg.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HastenError(f"run_dir: cannot make {str(folder)!r}: {error.strerror}; choose another folder") from error
    try:
        with claimed(folder):
            _check_free(cfg, folder)
            yield folder
    finally:
        for empty in (folder, folder.parent):
            with suppress(OSError):
                empty.rmdir()


def _check_free(cfg: DictConfig, folder: Path) -> None:
    """Refuse a ``folder`` that is another run's: only one that goes on there may write to it, or the first."""
    goes_on = cfg.ckpt_path is not None or (resumes_by_files(cfg) and result_of(folder).get("status") != "complete")
    if (folder / "result.json").exists() and not goes_on:
        raise HastenError(f"run_dir: {str(folder)!r} holds a run already; choose another folder or delete it")


def _go_on_or_begin(cfg: DictConfig, folder: Path) -> str | None:
    """What ``ckpt_path=auto`` means at this start of a job: the last checkpoint, or None where there is none yet."""
    if result_of(folder).get("status") == "complete":
        raise HastenError(f"ckpt_path: auto: {str(folder)!r} is complete; to train it for longer give ckpt_path=FILE")
    if (folder / LAST).exists():
        return str(folder / LAST)
    if getattr(rank_zero_only, "rank", 0) == 0 and not resumes_by_files(cfg):
        (folder / "metrics.csv").unlink(missing_ok=True)  # of a start that did not come to a checkpoint
    return None


def folder_of(cfg: DictConfig, time: str = "<time>", sweep: str = "") -> Path:
    """Where a run goes that is given no ``run_dir``: ``runs/<experiment>/<time>_<seed>[_<sweep>]``."""
    return Path("runs", cfg.experiment, "_".join(filter(None, [time, str(cfg.seed), sweep])))


def _new_folder(cfg: DictConfig, sweep: str) -> Path:
    """``folder_of`` a run that begins now, made at once: another may start in the same second."""
    wanted = folder = folder_of(cfg, f"{datetime.now():%Y-%m-%d_%H-%M-%S}", sweep)
    twin = 2
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder, twin = wanted.with_name(f"{wanted.name}-{twin}"), twin + 1


@contextmanager
def _recorded(cfg: DictConfig, folder: Path, loggers: Sequence[Logger] | None) -> Iterator[dict[str, Any]]:
    """config.yaml and result.json of a run: written at its start, completed at its end, honest about how it ended.

    Args:
        loggers: of the run, to be closed with it; None on a process that does not write.
    """
    started = time.monotonic() - result_of(folder).get("duration_s", 0.0)  # of a run that goes on
    result: dict[str, Any] = {
        "status": "running",
        "metrics": {},
        "tested": None,
        "experiment": cfg.experiment,
        "seed": cfg.seed,
        "overrides": list(cfg.overrides),
        "versions": _versions(),
    }

    def write(status: str) -> None:
        result["status"] = status
        result["duration_s"] = round(time.monotonic() - started, 1)
        if loggers is not None:
            write_json(folder / "result.json", result)

    if loggers is not None:
        os.environ[_RANK_FOLDER] = str(folder)
        with whole_file(folder / "config.yaml") as unfinished:
            OmegaConf.save(cfg, unfinished, resolve=True)
        (folder / "traceback.txt").unlink(missing_ok=True)  # of the same run, before it went on
        for unfinished in folder.glob("checkpoints/.*.ckpt"):
            unfinished.unlink()  # what a process was writing when it was killed
    write("running")
    try:
        yield result
    except (KeyboardInterrupt, SystemExit, Stopped):
        with suppress(OSError):
            write("interrupted")
        raise
    except BaseException as error:
        with suppress(OSError):  # a full disk is what may have failed
            write("failed")
            (folder / "traceback.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        raise
    finally:
        os.environ.pop(_RANK_FOLDER, None)
        for logger in loggers or ():
            if isinstance(logger, WandbLogger) and logger._experiment is not None:
                logger._experiment.finish(exit_code=0 if result["status"] == "running" else 1)
    write("complete")


@contextmanager
def _in_our_words(cfg: DictConfig, trainer: Trainer) -> Iterator[None]:
    """Lightning's complaints about a set-up as HastenError, and its ways to end when asked to as Stopped."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]

    def asked() -> int | None:
        return next((c.asked for c in callbacks if isinstance(c, Interruptible) and c.asked), None)

    try:
        yield
    except SIGTERMException as error:
        if not trainer.is_global_zero:
            raise SystemExit(0) from error  # Lightning kills a main process whose others end with anything else
        raise Stopped(asked() or signal.SIGTERM) from error
    except SystemExit as error:
        if error.code == 1:  # Lightning, after Ctrl-C: it has closed everything and would leave without a word
            raise KeyboardInterrupt from error
        raise
    except MisconfigurationException as error:
        if "monitored key" in str(error):
            logged = did_you_mean(cfg.objective.metric, trainer.callback_metrics)
            raise HastenError(f"objective.metric: nothing logs {cfg.objective.metric!r}{logged}") from error
        raise HastenError(f"trainer: {on_one_line(error)}") from error
    except Exception as error:
        if signum := asked():  # as where the workers of a loader were asked to end too
            raise Stopped(signum) from error
        raise


@contextmanager
def _stopped_in_our_words(cfg: DictConfig, folder: Path, go_on: str) -> Iterator[None]:
    """Name the folder, and how to go on, where a run is asked to end."""
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
        if (folder / LAST).exists():
            then = f"; {folder} holds its last checkpoint: {go_on}"
        elif resumes_by_files(cfg):
            then = f"; {folder} holds what is done: {go_on}"
        else:
            then = f" before there was a checkpoint; {folder} can be deleted"
        raise Stopped(signum, then) from error


def _versions() -> dict[str, str]:
    packages = ["hasten", "torch", "torchvision", "lightning", "timm", "diffusers"]
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _numbers(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}


# ------------------------------------------------------------------ stages


def stages_of(cfg: DictConfig, below: tuple[str, ...] = ()) -> list[DictConfig]:
    """The configs of everything ``cfg.first`` names, deepest first; writes their folders into ``cfg.stages``.

    A stage is its experiment as it stands (``name``) or in its tiny form (``name:tiny``), with the seed, the data and
    the accelerator of the run that needs it. Its folder is named by a hash of that recipe, so a stage that is complete
    is found again.
    """
    stages: list[DictConfig] = []
    for entry in cfg.first:
        name, _, form = entry.partition(":")
        if name in below:
            raise HastenError(f"first: {' -> '.join([*below, name])}: an experiment cannot wait for itself")
        if form not in ("", "tiny"):
            raise HastenError(f"first: {entry}: expected {name}, or {name}:tiny, its form for tests")
        words = [f"experiment={name}", *(word for word in cfg.overrides if "hydra.searchpath=" in word)]
        try:
            stage = compose(words)
            if form == "tiny":
                stage = compose([*words, *stage.tiny])
        except (MissingConfigException, OverrideParseException) as error:
            options = getattr(error, "options", None) or []
            raise HastenError(f"first: there is no experiment {name!r}{did_you_mean(name, options)}") from error
        stage.seed, stage.data, stage.image = cfg.seed, cfg.data, cfg.image
        stage.trainer.accelerator = cfg.trainer.accelerator
        stages += stages_of(stage, (*below, name))
        stage.run_dir = str(Path("runs", "stages", f"{name}-{_recipe_hash(stage)}"))
        with open_dict(cfg):
            cfg.stages[name] = stage.run_dir
        stages.append(stage)
    return stages


def _recipe_hash(stage: DictConfig) -> str:
    apart = ("overrides", "logger", "estimate")
    recipe = OmegaConf.masked_copy(stage, [key for key in map(str, stage) if key not in apart])
    return recipe_hash(cast(dict[str, Any], OmegaConf.to_container(recipe)))


def _rehearse(cfg: DictConfig, folders: Sequence[str]) -> None:
    """Build what waits for no stage: a value that a constructor refuses is said before the stages have run."""
    if not folders:
        return
    nodes = {"module": LightningModule} | {f"callbacks.{name}": Callback for name in cfg.callbacks or {}}
    for key, kind in nodes.items():
        node = OmegaConf.select(cfg, key)
        if node is not None and not any(
            folder in str(OmegaConf.to_container(node, resolve=True)) for folder in folders
        ):
            built(cfg, key, kind)


def _complete(stage: DictConfig) -> None:
    """Run a stage, or the rest of it, unless its folder says that it is complete; one process at a time."""
    folder = Path(stage.run_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if getattr(rank_zero_only, "rank", 0) != 0:  # rank zero runs it; whoever has started us ends us if that fails
        while result_of(folder).get("status") != "complete":
            time.sleep(0.5)
        return
    with FileLock(f"{folder}.lock"):
        if result_of(folder).get("status") == "complete":
            return
        if (folder / LAST).exists():
            stage.ckpt_path = str(folder / LAST)  # of the same recipe: the folder is named by it
        with _stopped_in_our_words(stage, folder, "the same words continue it"):
            _run(stage, folder)


# ------------------------------------------------------------------ checkpoints


def checkpoint_of(path: str | None, module: LightningModule) -> str | None:
    """``path`` if it is a checkpoint of ``module``; a HastenError in one line if it is anything else."""
    if path is None:
        return None
    if Path(path, "meta.pt").is_file():
        return path  # a sharded one, a folder: read by the strategy that wrote it
    if not Path(path).is_file():
        raise HastenError(f"ckpt_path: expected a checkpoint, there is no file {path!r}")
    found, wanted = map(_shapes, (read_checkpoint(path, owner="ckpt_path")["state_dict"], module.state_dict()))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            sizes = f"expected {wanted.get(name, 'nothing')}, got {found.get(name, 'nothing')}"
            raise HastenError(f"ckpt_path: {path!r} is of another model: {name}: {sizes}; use the config that wrote it")
    return path


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}  # extra state may be anything
