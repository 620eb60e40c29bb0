"""What a run costs on this machine, from a few timed steps, and what it will write; for the command line and notebooks.

``estimate`` goes the path of a run (compose -> stages -> check -> build -> fit) in a temporary folder and stops the fit
after a few steps. Stages that have not run are stood in for by weights that have learned nothing.
"""

import ctypes
import gc
import io
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from hydra.utils import get_object
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hasten.callbacks import (
    ClassConsistency,
    EvaluateDistilled,
    ExactResume,
    ExportDistilled,
    ImageGrid,
    MagnitudeProbe,
    SampleDistance,
    SaveTrajectory,
    Throughput,
)
from hasten.check import build, check, check_first
from hasten.checkpoints import Interruptible
from hasten.errors import HastenError, on_one_line
from hasten.formats import write_json, write_trajectory
from hasten.loggers import MetricsFile
from hasten.nn import FlatModel
from hasten.nn.protocols import TrainsExperts
from hasten.run import built, data_and_module, stages_of, threads_of
from hasten.run_folders import result_of

_HOUSEKEEPING = (Checkpoint, ExactResume, Interruptible, ProgressBar, Throughput)
_TOOLS = (ClassConsistency, EvaluateDistilled, ExportDistilled, ImageGrid, MagnitudeProbe, SampleDistance)
"""What looks at a training without taking part in it: left out here. All other callbacks are part of a step."""

_WARM_UP = 3  # batches, the first of which counts FLOPs
_TIMED = 20  # batches, or as many as _ENOUGH_S holds
_AT_LEAST = 3
_ENOUGH_S = 5.0
_TIMED_EVALUATION = 3  # batches of validation and of test, the first of which warms up


@dataclass(frozen=True)
class Cost:
    """What one fit and its test cost here; times are of this machine, numbers of the whole run.

    Attributes:
        device: the kind it was measured on.
        parameters: of the module.
        trainable: of these.
        flops: of an optimizer step, forward and backward, of matrix products, convolutions and what is registered;
            None where it could not be counted.
        memory_bytes: on CUDA the most that was allocated; on the CPU by how much the process grew; None where the
            system does not say.
        steps: optimizer steps; inf without an end.
        step_s: of one, its data included.
        validations: how often.
        validation_s: of one.
        test_s: of the test.
        experts: trained one after the other; 0 where the module trains none.
        tools: callback -> when it works, whose time is in none of these.
        checkpoint_bytes: of a checkpoint; None where nothing was trained.
    """

    device: str
    parameters: int
    trainable: int
    flops: int | None
    memory_bytes: int | None
    steps: float
    step_s: float
    validations: int
    validation_s: float
    test_s: float
    experts: int
    tools: Mapping[str, str]
    checkpoint_bytes: int | None

    @property
    def training_s(self) -> float:
        return self.steps * self.step_s if self.steps else 0.0

    @property
    def total_s(self) -> float:
        return self.training_s + self.validations * self.validation_s + self.test_s


@dataclass(frozen=True)
class Estimate:
    """One run, or a stage of it: its cost, or why there is none.

    Attributes:
        experiment: its name.
        cost: None where it cannot be known, or nothing is left to do.
        note: what goes with the cost, or why there is none.
        folder: where it will write.
        writes: file -> its size, or when it is written.
        complete: whether it has run already, as a stage may have.
    """

    experiment: str
    cost: Cost | None
    note: str
    folder: str
    writes: Mapping[str, str]
    complete: bool = False


def estimate(cfg: DictConfig) -> list[Estimate]:
    """What ``cfg`` costs, the stages that it needs first; nothing is left behind, nor drawn from the global generators.

    A run that continues is estimated from its beginning.

    Args:
        cfg: from ``hasten.run.compose``.

    Raises:
        HastenError: for what ``hasten.run.run`` would refuse before it trains.

    Example:
        >>> from hasten.run import compose
        >>> (found,) = estimate(compose(["experiment=classify_digits", "trainer.max_steps=4"]))
        >>> found.cost.steps
        4
    """
    cfg = cfg.copy()
    check_first(cfg)
    if cfg.run_dir is None:
        cfg.run_dir = str(Path("runs", cfg.experiment, f"<time>_{cfg.seed}"))
    stages = stages_of(cfg)
    for each in [*stages, cfg]:
        check(each)
    with tempfile.TemporaryDirectory(prefix="hasten-estimate-") as scratch, isolate_rng():
        missing = _stood_in_for([*stages, cfg], Path(scratch))
        # the run itself before its stages: memory that a process has had once, it does not grow by again
        found = _estimated(cfg, Path(scratch, "run"), missing)
        if int(os.environ.get("LOCAL_RANK", 0)):
            return [found]  # rank zero tells of the stages
        return [*(_stage(stage, Path(scratch, f"stage-{i}"), missing) for i, stage in enumerate(stages)), found]


def as_text(estimates: Sequence[Estimate]) -> str:
    """Estimates as a person reads them, a block each.

    Example:
        >>> print(as_text([Estimate("difficulty", None, "a task", "runs/difficulty", {})]))
        difficulty
          cost          a task
    """
    blocks = []
    for each in estimates:
        rows = _rows(each)
        writes = [("writes", each.folder)] if each.writes else []
        writes += [("", f"{name}  {said}".rstrip()) for name, said in each.writes.items()]
        blocks.append("\n".join([each.experiment, *(f"  {name:<12}  {said}" for name, said in [*rows, *writes])]))
    if len(estimates) > 1:
        left = [each for each in estimates if not each.complete]
        known = sum(each.cost.total_s for each in left if each.cost)
        unknown = [each.experiment for each in left if each.cost is None]
        beside = f", and {', '.join(unknown)}" if unknown else ""
        blocks.append(f"all together  {_duration(known)}{beside}")
    return "\n\n".join(blocks)


# ------------------------------------------------------------------ one run


def _stage(stage: DictConfig, scratch: Path, missing: Mapping[str, str]) -> Estimate:
    if result_of(Path(stage.run_dir)).get("status") == "complete":
        return Estimate(stage.experiment, None, "nothing: it is complete", stage.run_dir, {}, complete=True)
    gc.collect()  # a trainer and its module hold each other, and with them the memory of the estimate before
    return _estimated(stage, scratch, missing)


def _estimated(cfg: DictConfig, scratch: Path, missing: Mapping[str, str]) -> Estimate:
    """The cost of one config, in ``scratch``; ``missing`` are the stages that have not run, with their folders."""
    folder = str(cfg.run_dir)
    needs = [name for name in missing if name in cfg.stages]
    if cfg.task is not None:
        return Estimate(cfg.experiment, None, "a task, not a fit: known when it has run", folder, {})
    there = cfg.copy()
    there.run_dir, there.ckpt_path = str(scratch), None
    try:
        with threads_of(cfg), redirect_stdout(io.StringIO()):  # what is said of weights that mean nothing
            cost = _measured(there, untrained=bool(needs))
    except (HastenError, OSError) as error:
        if not needs:
            raise
        why = on_one_line(error)
        for name in needs:
            why = why.replace(str(cfg.stages[name]), missing[name])
        return Estimate(cfg.experiment, None, f"not known before {', '.join(needs)} has run: {why}", folder, {})
    note = f"before {', '.join(needs)} has run, with weights that have learned nothing" if needs else ""
    return Estimate(cfg.experiment, cost, note, folder, _writes(cfg, cost))


def _measured(cfg: DictConfig, *, untrained: bool) -> Cost:
    """Build what ``cfg`` says and fit, validate and test a few batches.

    Args:
        untrained: whether stand-ins take the place of experts, who are right about nothing.
    """
    if untrained and str(OmegaConf.select(cfg, "module.init._target_")).endswith(".correctly_predicted"):
        cfg.module.init._target_ = "hasten.nn.dataset_distillation.initial.real"
    memory = _Memory()
    datamodule, module = data_and_module(cfg)
    kept, tools = _callbacks(cfg)
    probe = _Probe(memory, count_flops=cfg.compile is False)
    every = cfg.trainer.get("check_val_every_n_epoch")
    trainer = built(
        cfg,
        "trainer",
        Trainer,
        callbacks=[*kept, probe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        min_steps=None,
        min_epochs=None,
        check_val_every_n_epoch=None if every is None else 1,  # where the fit is stopped, Lightning validates
    )
    trainer.fit(module, datamodule)
    if is_overridden("test_step", module):
        trainer.test(module, datamodule, verbose=False)
    parameters = list(module.parameters())
    return Cost(
        device=trainer.strategy.root_device.type,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        flops=None if probe.flops is None else probe.flops * probe.accumulated,
        memory_bytes=memory.peak_bytes(),
        steps=probe.steps,
        step_s=probe.batch_s * probe.accumulated,
        validations=_validations(cfg, probe),
        validation_s=probe.validation.total_s,
        test_s=probe.test.total_s,
        experts=module.experts if isinstance(module, TrainsExperts) else 0,
        tools=tools,
        checkpoint_bytes=probe.checkpoint_bytes,
    )


def _callbacks(cfg: DictConfig) -> tuple[list[Callback], dict[str, str]]:
    """Those that are part of a training step, built; and the tools that are left out, with when they work."""
    kept, tools = [], {}
    for name, node in (cfg.callbacks or {}).items():
        if node is None:
            continue
        if _is(node, _TOOLS):
            every = node.get("every_n_steps") or node.get("every")
            tools[str(name)] = f"every {every} steps" if every else "at the end"
        elif not _is(node, _HOUSEKEEPING):
            kept.append(built(cfg, f"callbacks.{name}", Callback))
    return kept, tools


def _is(node: Any, kinds: tuple[type, ...]) -> bool:
    """Whether what ``node`` describes is one of ``kinds``."""
    target = get_object(node._target_)
    return isinstance(target, type) and issubclass(target, kinds)


def _validations(cfg: DictConfig, probe: "_Probe") -> int:
    """How many validations the whole run has."""
    if not probe.validation.batches or not math.isfinite(probe.steps):
        return 0
    batches, an_epoch, between = round(probe.steps * probe.accumulated), probe.batches_an_epoch, probe.batches_between
    every = cfg.trainer.get("check_val_every_n_epoch")
    if every is None or an_epoch == math.inf:
        return int(batches // between)
    epochs, rest = divmod(batches, int(an_epoch))
    last = rest // between if (epochs + 1) % every == 0 else 0
    return int(epochs // every * (an_epoch // between) + last)


# ------------------------------------------------------------------ measuring


class _Evaluation:
    """A validation or a test, of which a few batches were timed."""

    def __init__(self) -> None:
        self.batches: float = 0
        self.times: list[float] = []
        self._mark = 0.0

    def begin(self, batches: Sequence[float], now: float) -> None:
        self.batches, self._mark = sum(batches), now

    def batch(self, now: float) -> None:
        self.times.append(now - self._mark)
        self._mark = now

    @property
    def total_s(self) -> float:
        """Of all its batches."""
        return self.batches * mean(self.times[1:] or self.times) if self.times else 0.0


class _Probe(Callback):
    """Times a few batches, counts the FLOPs of the first one, and ends the fit."""

    def __init__(self, memory: "_Memory", *, count_flops: bool) -> None:
        self.memory = memory
        self.count_flops = count_flops
        self.steps: float = 0
        self.accumulated = 1
        self.batches_an_epoch: float = 1
        self.batches_between: float = 1
        self.flops: int | None = None
        self.checkpoint_bytes: int | None = None
        self.validation, self.test = _Evaluation(), _Evaluation()
        self._times: list[float] = []
        self._mark = 0.0
        self._device = torch.device("cpu")
        self._counting = ExitStack()

    @property
    def batch_s(self) -> float:
        """The median; of a run of a few batches, without the first where there is another."""
        times = self._times[_WARM_UP:] or self._times[1:] or self._times
        return median(times) if times else 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        self.memory.begin(self._device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps = trainer.estimated_stepping_batches
        self.accumulated = trainer.accumulate_grad_batches
        self.batches_an_epoch = trainer.num_training_batches
        self.batches_between = trainer.val_check_batch or math.inf  # None: by the clock
        self._mark = self._now()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.count_flops and not self._times:
            counter = self._counting.enter_context(FlopCounterMode(display=False))
            self._counting.callback(lambda: setattr(self, "flops", counter.get_total_flops()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._times:
            self._counting.close()
        self._times.append(self._now() - self._mark)
        timed = self._times[_WARM_UP:]
        enough = len(timed) >= _TIMED or (len(timed) >= _AT_LEAST and sum(timed) >= _ENOUGH_S)
        # by one clock: a process that went on alone would wait for the others without end
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(enough, all=False)
        self._mark = self._now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self.checkpoint_bytes = sum(leaf.nbytes for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._counting.close()  # else it would count whatever comes next in this process

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation.begin(trainer.num_val_batches, self._now())

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._evaluated(self.validation)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = self._now()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.test.begin(trainer.num_test_batches, self._now())

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._evaluated(self.test)

    def _evaluated(self, evaluation: _Evaluation) -> None:
        evaluation.batch(self._now())
        if len(evaluation.times) >= _TIMED_EVALUATION:
            raise StopIteration  # Lightning's evaluation loop ends by it, as at the end of the data

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # kernels run behind the host's back
        return time.perf_counter()


class _Memory:
    """The most memory since it was made: allocated on CUDA, or by how much the process grew."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        with suppress(OSError, AttributeError):  # without glibc
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide how much this one takes
        self._before = _resident_bytes("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        except OSError:
            self._before = None  # not Linux

    def begin(self, device: torch.device) -> None:
        if device.type == "cuda" and device != self._device:
            torch.cuda.reset_peak_memory_stats(device)
        self._device = device

    def peak_bytes(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = _resident_bytes("VmHWM")
        return None if self._before is None or peak is None else max(0, peak - self._before)


def _resident_bytes(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


# ------------------------------------------------------------------ stages that have not run


def _stood_in_for(configs: Sequence[DictConfig], scratch: Path) -> dict[str, str]:
    """Point every stage that is not complete to a folder of what it would leave; their names and their own folders.

    Args:
        configs: of the stages, each after those that it needs, and of the run.
    """
    missing = {}
    for i, stage in enumerate(configs[:-1]):
        if result_of(Path(stage.run_dir)).get("status") == "complete":
            continue
        folder = scratch / f"stand-in-{i}"
        folder.mkdir()
        with suppress(HastenError):  # what needs its folder says so, and says more
            _stand_in(stage, folder)
        missing[str(stage.experiment)] = str(stage.run_dir)
        for later in configs[i + 1 :]:
            if stage.experiment in later.stages:
                with open_dict(later):
                    later.stages[stage.experiment] = str(folder)
    return missing


def _stand_in(stage: DictConfig, folder: Path) -> None:
    """Checkpoints, or trajectories of experts, of the right shape; nothing where a stage leaves other things."""
    if stage.task is not None:
        return
    write_json(folder / "result.json", {"status": "complete", "metrics": {}})
    keeper = next((node for node in stage.callbacks.values() if node and _is(node, (SaveTrajectory,))), None)
    with isolate_rng():
        if keeper is not None:
            epochs = min(keeper.last_epoch or stage.module.epochs, stage.module.epochs)
            _untrained_experts(folder / "experts", build(stage, "model"), stage.module.experts, epochs)
            return
        state = built(stage, "module", LightningModule).state_dict()
    (folder / "checkpoints").mkdir()
    torch.save({"state_dict": state}, folder / "checkpoints/best.ckpt")
    os.link(folder / "checkpoints/best.ckpt", folder / "checkpoints/last.ckpt")


def _untrained_experts(folder: Path, model: nn.Module, experts: int, epochs: int) -> None:
    """One trajectory by the names of all: each reads it for itself, as it would its own."""
    form = FlatModel(model)
    theta = form.drawn(0)
    rows = theta + 0.01 * torch.arange(epochs + 1)[:, None] * torch.randn_like(theta)
    unknown = [math.nan] * len(rows)
    about = {"names": form.names, "shapes": form.shapes, "recipe": {"imported": "a stand-in"}}
    folder.mkdir()
    write_trajectory(folder / "expert_0000.safetensors", rows, train_acc=unknown, val_acc=unknown, **about)
    for number in range(1, experts):
        os.link(folder / "expert_0000.safetensors", folder / f"expert_{number:04d}.safetensors")


# ------------------------------------------------------------------ what it writes


def _writes(cfg: DictConfig, cost: Cost) -> dict[str, str]:
    """File or folder, relative to the run's own -> its size, or who writes there and when."""
    writes: dict[str, list[str]] = {"config.yaml, result.json": []}
    for group in ("logger", "callbacks"):
        for name, node in (cfg.get(group) or {}).items():
            if node is not None:
                for path, said in _written_by(cfg, str(name), node, cost):
                    writes.setdefault(path, []).append(said)
    return {path: ", ".join(dict.fromkeys(said)) for path, said in writes.items()}


def _written_by(cfg: DictConfig, name: str, node: DictConfig, cost: Cost) -> Iterator[tuple[str, str]]:
    if _is(node, (Checkpoint,)):
        folder = Path(str(node.get("dirpath") or cfg.run_dir))
        filename = "last" if node.get("save_last") else node.get("filename") or "*"
        if cost.checkpoint_bytes is not None:
            yield _relative(folder / f"{filename}.ckpt", cfg), _size(cost.checkpoint_bytes)
    elif _is(node, (SaveTrajectory,)):
        epochs = min(node.last_epoch or cfg.module.epochs, cfg.module.epochs)
        size = _size(4 * (epochs + 1) * cost.parameters)  # float32
        yield _relative(Path(node.path, "expert_*.safetensors"), cfg), f"{cost.experts} files of {size}"
    elif _is(node, (MetricsFile,)):
        yield _relative(Path(node.folder, "metrics.csv"), cfg), f"a row every {cfg.trainer.log_every_n_steps} steps"
    elif not _is(node, _HOUSEKEEPING):
        for key in ("folder", "path", "save_dir"):
            if str(node.get(key) or "").startswith(str(cfg.run_dir)):
                when = cost.tools.get(name)
                yield f"{_relative(Path(str(node[key])), cfg)}/", f"{name} ({when})" if when else name


def _relative(path: Path, cfg: DictConfig) -> str:
    return path.relative_to(cfg.run_dir).as_posix() if path.is_relative_to(cfg.run_dir) else str(path)


# ------------------------------------------------------------------ words


def _rows(estimate: Estimate) -> Iterator[tuple[str, str]]:
    """Name and figure of everything that is known."""
    cost = estimate.cost
    if cost is None:
        yield "cost", estimate.note
        return
    if estimate.note:
        yield "measured", estimate.note
    frozen = cost.parameters - cost.trainable
    yield "parameters", f"{cost.parameters:,}" + (f", {cost.trainable:,} trainable" if frozen else "")
    if cost.steps:
        counted = "FLOPs not counted, as it is compiled"
        if cost.flops is not None:
            counted = f"{_short(cost.flops)}FLOP forward and backward"
        yield "a step", f"{_duration(cost.step_s)}, {counted}"
    if cost.memory_bytes is not None:
        of = "of the GPU" if cost.device == "cuda" else "beside Python and its libraries"
        yield "memory", f"{_size(cost.memory_bytes)} {of}"
    if not cost.steps:
        yield "training", "none"
    elif not math.isfinite(cost.steps):
        yield "training", "without an end: trainer.max_steps or trainer.max_epochs sets one"
    elif cost.experts:
        each = _duration(cost.training_s / cost.experts)
        yield "training", f"{_duration(cost.training_s)}: {cost.experts} experts, {each} each"
    else:
        yield "training", f"{_duration(cost.training_s)}: {cost.steps:,.0f} steps"
    if cost.validations:
        every = f"{_duration(cost.validation_s)} each"
        times = f"{cost.validations} times, {every}" if cost.validations > 1 else "once"
        yield "validation", f"{_duration(cost.validations * cost.validation_s)}: {times}"
    if cost.test_s:
        yield "test", _duration(cost.test_s)
    yield "together", _duration(cost.total_s)
    if cost.tools:
        yield "not in it", ", ".join(f"{name} ({when})" for name, when in cost.tools.items())


def _duration(seconds: float) -> str:
    """As a person says it: ``4.1 ms``, ``57 s``, ``12 min``, ``7.5 h``."""
    if not math.isfinite(seconds):
        return "without an end"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def _short(count: int) -> str:
    """With three digits and a prefix: ``12.3 G``."""
    power = min(max(int(math.log10(max(count, 1))) // 3, 0), 5)
    return f"{count / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}"


def _size(count: float) -> str:
    """Of bytes, as a person says it: ``170 MiB``, ``41.2 GiB``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"
