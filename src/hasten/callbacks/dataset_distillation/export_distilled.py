"""ExportDistilled: the distilled set as files that any program can train on, the final one and the best one."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback

from hasten import __version__
from hasten.callbacks._logging import log_files
from hasten.callbacks.dataset_distillation._synthetic import check_synthetic, few_images
from hasten.callbacks.dataset_distillation.evaluate_distilled import EvaluateDistilled
from hasten.errors import HastenError
from hasten.formats.distilled import Distilled
from hasten.formats import Trajectory, recipe_hash
from hasten.nn.dataset_distillation.comparison import FewImages, described


class ExportDistilled(Callback):
    """Write the synthetic set of a module, with all it takes to train on it, at the end of the fit.

    ``<path>/final`` is the set as the fit left it, also where that ended with an error. Beside an ``EvaluateDistilled``
    there is ``<path>/best``, written anew whenever that has found a better one, and both get its table. The callbacks
    may stand in any order. With ``hasten.loggers.wandb`` they are an artifact "distilled" of its run.

    Args:
        path: the folder.
        config: the run's config.yaml, which goes into the provenance; None, or no such file: it has none.

    Raises:
        HastenError: at the start of a fit, where the module has no synthetic set, or the datamodule does not say in
            which range its images are.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ExportDistilled("distilled")], accelerator="cpu", logger=False)
    """

    def __init__(self, path: str | Path, *, config: str | Path | None = None) -> None:
        self.path = Path(path)
        self.config = None if config is None else Path(config)
        self._begun = False
        self._best_iteration: int | None = None  # of what is on disk

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begun, self._best_iteration = False, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_synthetic(pl_module, "export_distilled", "ExportDistilled")
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "pixels"):
            raise HastenError(
                f"export_distilled: {type(data).__name__}: expected pixels, the range of its images, got none; use a "
                "datamodule of hasten, or give yours an attribute pixels with a hasten.formats.PixelRange"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = True  # before, the set may not be filled

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # a batch later where EvaluateDistilled comes after this callback, and again at the end
        self._write_best(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not on_train_end: by now every other callback has said its last word
        self._write_all(trainer, pl_module)
        sets = {name: self.path / name for name in ("final", "best") if (self.path / name).is_dir()}
        pl_module.print(f"distilled set: {' and '.join(map(str, sets.values()))}")
        if trainer.is_global_zero:
            log_files(trainer, "distilled", sets)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._begun:
            self._write_all(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._begun = False

    def _write_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = False  # an error after this one finds all written
        self._best_iteration = None  # its table is new
        self._write_best(trainer, pl_module)
        self._write(trainer, pl_module, "final", few_images(pl_module), trainer.global_step)

    def _write_best(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluation = _evaluation(trainer)
        if evaluation is None or evaluation.best is None or evaluation.best_iteration == self._best_iteration:
            return
        self._best_iteration = evaluation.best_iteration
        self._write(trainer, pl_module, "best", evaluation.best, evaluation.best_iteration)

    def _write(self, trainer: Trainer, pl_module: LightningModule, name: str, few: FewImages, iteration: int) -> None:
        if not trainer.is_global_zero:
            return
        pixels = trainer.datamodule.pixels  # type: ignore[attr-defined]
        about = self._about(trainer, pl_module) | {"set": name, "iteration": iteration}
        distilled = Distilled(few.images, few.label_logits, few.classes, few.lr, pixels, about)
        distilled.write(self.path / name)

    def _about(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        data, evaluation = trainer.datamodule, _evaluation(trainer)  # type: ignore[attr-defined]
        config = None
        if self.config is not None and self.config.is_file():
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        experts = getattr(data, "experts", ())
        return {
            "method": type(pl_module).__name__,
            "classes": list(getattr(data, "class_names", ())),
            "seed": getattr(pl_module, "seed", None),
            "config": config,
            "recipe_hash": None if config is None else recipe_hash(config),
            "data": described(data) or None,
            "experts": _about_experts(experts) if experts else None,
            "evaluation": evaluation and evaluation.report(),
            "hasten": __version__,
            "commit": _commit(),
        }


def _about_experts(experts: Sequence[Trajectory]) -> dict[str, Any]:
    first = experts[0]
    return {"recipe_hash": first.recipe_hash, "number": len(experts), "imported": first.is_imported}


def _evaluation(trainer: Trainer) -> EvaluateDistilled | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, EvaluateDistilled)), None)


def _commit() -> str | None:
    """Of the clone that hasten is imported from, if it is one."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
