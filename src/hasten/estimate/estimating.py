"""From a config to its estimate: the path of a run, in a temporary folder."""

import gc
import io
import math
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf

from hasten.check import check, check_first
from hasten.errors import HastenError, on_one_line
from hasten.estimate.cost import Cost, Estimate
from hasten.estimate.nodes import callbacks_of
from hasten.estimate.probe import Memory, Probe
from hasten.estimate.stand_ins import stood_in_for
from hasten.estimate.writes import writes_of
from hasten.nn.protocols import TrainsExperts
from hasten.run import built, check_sharding, checkpoint_of, data_and_module, folder_of, stages_of, threads_of
from hasten.run_folders import LAST, result_of


def estimate(cfg: DictConfig) -> list[Estimate]:
    """What ``cfg`` costs, the stages that it needs first; nothing is left behind, nor drawn from the global generators.

    A run that continues is estimated from its beginning.

    Args:
        cfg: from ``hasten.run.compose``.

    Raises:
        HastenError: for what ``hasten.run.run`` would refuse before it trains, but for a folder that is taken.

    Example:
        >>> from hasten.run import compose
        >>> (found,) = estimate(compose(["experiment=classify_digits", "trainer.max_steps=4"]))
        >>> found.cost.steps
        4
    """
    cfg = cfg.copy()
    check_first(cfg)
    if cfg.run_dir is None:
        cfg.run_dir = str(folder_of(cfg))
    stages = stages_of(cfg)
    for each in [*stages, cfg]:
        check(each)
    check_sharding(cfg)
    with tempfile.TemporaryDirectory(prefix="hasten-estimate-") as scratch, isolate_rng():
        missing = stood_in_for([*stages, cfg], Path(scratch))
        # the run itself before its stages: memory that a process has had once, it does not grow by again
        found = _estimated(cfg, Path(scratch, "run"), missing)
        if getattr(rank_zero_only, "rank", 0) != 0:
            return [found]  # rank zero tells of the stages
        return [*(_stage(stage, Path(scratch, f"stage-{i}"), missing) for i, stage in enumerate(stages)), found]


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
    there.run_dir = str(scratch)
    if cfg.ckpt_path == "auto":
        there.ckpt_path = str(Path(folder, LAST)) if Path(folder, LAST).exists() else None
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
    notes = [f"before {', '.join(needs)} has run, with weights that have learned nothing"] if needs else []
    notes += ["from its beginning"] if there.ckpt_path else []
    return Estimate(cfg.experiment, cost, ", ".join(notes), folder, writes_of(cfg, cost))


def _measured(cfg: DictConfig, *, untrained: bool) -> Cost:
    """Build what ``cfg`` says and fit, validate and test a few batches.

    Args:
        untrained: whether stand-ins take the place of experts, who are right about nothing.
    """
    if untrained and str(OmegaConf.select(cfg, "module.init._target_")).endswith(".correctly_predicted"):
        cfg.module.init._target_ = "hasten.nn.dataset_distillation.initial.real"
    memory = Memory()
    datamodule, module = data_and_module(cfg)
    checkpoint_of(cfg.ckpt_path, module)  # refused if it is none of this run's; its weights take as long as others
    kept, tools = callbacks_of(cfg)
    probe = Probe(memory, count_flops=cfg.compile is False)
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
        flops=None if probe.flops is None else round(probe.flops * probe.batches_a_step),
        memory_bytes=memory.peak_bytes(),
        steps=probe.steps,
        step_s=probe.batch_s * probe.batches_a_step,
        validations=_validations(cfg, probe),
        validation_s=probe.validation.total_s,
        test_s=probe.test.total_s,
        experts=module.experts if isinstance(module, TrainsExperts) else 0,
        tools=tools,
        checkpoint_bytes=probe.checkpoint_bytes,
    )


def _validations(cfg: DictConfig, probe: Probe) -> int:
    """How many validations the whole run has."""
    if not probe.validation.batches or not math.isfinite(probe.steps):
        return 0
    batches = round(probe.steps * probe.batches_a_step)
    an_epoch, between = probe.batches_an_epoch, probe.batches_between
    every = cfg.trainer.get("check_val_every_n_epoch")
    if every is None or an_epoch == math.inf:
        return int(batches // between)
    epochs, rest = divmod(batches, int(an_epoch))
    last = rest // between if (epochs + 1) % every == 0 else 0
    return int(epochs // every * (an_epoch // between) + last)
