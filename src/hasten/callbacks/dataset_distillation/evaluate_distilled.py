"""EvaluateDistilled: what fresh nets learn from a set that is being distilled, and from what is to be had for free."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import rich
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from rich.markdown import Markdown

from hasten.callbacks._sampling import publish, sampling
from hasten.callbacks.dataset_distillation._synthetic import check_synthetic, few_images
from hasten.errors import HastenError
from hasten.formats.trajectories import check_seen, open_trajectories
from hasten.nn.dataset_distillation.comparison import (
    BASELINES,
    IMPORTED,
    FewImages,
    Jury,
    NetFactory,
    Recipe,
    check_protocol,
    check_split,
    described,
    labelling_student,
    rates,
    split_batches,
    table_of,
)
from hasten.nn.dataset_distillation.dsa import DSA
from hasten.nn.dataset_distillation.table import Table


class EvaluateDistilled(Callback):
    """Train fresh nets on the synthetic set of a module, keep the best set, and end the fit with a table of numbers.

    At the start and every ``every`` iterations ``seeds`` fresh nets of the first architecture are trained on the set as
    it is and measured on the validation split, the holdout, which alone says which set is ``best``. At the end of the
    fit all nets are trained on the final set, the best set and the baselines, and measured on the test split, which
    decides nothing. A learning rate that is not the set's own is chosen on the holdout, from that and 0.01 and 0.1, for
    each row by a net of its own. The training does not notice.

    Logs ``eval/acc``, the mean accuracy on the holdout, likewise as ``eval/<net>/acc`` with ``eval/<net>/std``. At the
    end, of the test split: ``eval/<net>/acc_final``, ``acc_best``, ``std_final`` and ``std_best``; of the first net
    ``eval/random/acc``, ``eval/random_soft/acc`` and ``eval/whole/acc``, and DD-Ranking's ``eval/hlr``, ``eval/ior``
    and ``eval/lrs`` of the best set, in fractions.

    Args:
        nets: name -> function that makes a fresh net; the first is the architecture that the set is distilled with.
        every: iterations between two evaluations, >= 1.
        seeds: nets a row, >= 1; five are usual.
        epochs: passes over the few images, >= 1.
        whole_epochs: passes over the whole training set; None: ``epochs``, which takes long.
        lr: of the first net on the set: "learned", its own step size; "holdout", as for the baselines; or a number.
        baselines: rows of real images: "random" with hard labels; "random_soft" with the experts' labels, without which
            no distillation says much; "whole", the whole training set with hard labels, in memory, needed for HLR.
        experts: the folder of their trajectories; None: those that the datamodule has.
        student: makes a net of theirs; None: the first of ``nets``.
        augment: of every batch; None: none.
        scores: HLR, IOR and LRS, as far as the baselines allow.
        folder: gets ``table.md``, ``table.csv`` and ``evaluation.json``; None: nothing is written.
        seed: of all that is drawn.

    Attributes:
        best: the set that was best on the holdout, so far; in the checkpoint.
        best_iteration: when that was; 0 is the set that the distillation began with.
        table: of the last fit's end.

    Raises:
        ValueError: for a number out of its range.
        HastenError: at the start of a fit, where the module has no synthetic set, the datamodule lacks a split or the
            real images, or there are no experts who could label them, or these were trained on others.

    Source: the protocol of arXiv:2006.05929 with a holdout; the scores of DD-Ranking, arXiv:2505.13300.

    Example:
        >>> from functools import partial
        >>> from hasten.nn import ConvNet
        >>> convnet = partial(ConvNet, 1, 8, 10, width=32, depth=2)
        >>> evaluate = EvaluateDistilled({"convnet": convnet}, every=200, epochs=300)
    """

    def __init__(
        self,
        nets: Mapping[str, NetFactory],
        *,
        every: int = 500,
        seeds: int = 5,
        epochs: int = 1000,
        whole_epochs: int | None = None,
        lr: float | str = "learned",
        baselines: Sequence[str] = ("random", "random_soft"),
        experts: str | Path | None = None,
        student: NetFactory | None = None,
        augment: DSA | None = DSA(),  # noqa: B008 - holds nothing that changes
        scores: bool = True,
        folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        whole_epochs = epochs if whole_epochs is None else whole_epochs
        for name, value in (("every", every), ("seeds", seeds), ("epochs", epochs), ("whole_epochs", whole_epochs)):
            if value < 1:
                raise ValueError(f"evaluate_distilled: {name}: expected >= 1, got {value}")
        if not nets:
            raise ValueError(
                "evaluate_distilled: nets: expected at least one, name -> function that makes it, got none"
            )
        try:
            check_protocol(lr, baselines)
        except ValueError as error:
            raise ValueError(f"evaluate_distilled: {error}") from None
        self.nets = dict(nets)
        self.every = every
        self.seeds = seeds
        self.epochs = epochs
        self.whole_epochs = whole_epochs
        self.lr = lr
        self.baselines = tuple(baselines)
        self.experts = experts
        self.student = student
        self.augment = augment
        self.scores = scores
        self.folder = None if folder is None else Path(folder)
        self.seed = seed
        self._forget()

    def _forget(self) -> None:
        self.best: FewImages | None = None
        self.best_iteration = 0
        self.table: Table | None = None
        self._history: list[tuple[int, float]] = []  # iteration and accuracy on the holdout
        self._recipe = Recipe(self.epochs, self.whole_epochs, self.augment, self.seed)
        self._holdout: list[Any] = []

    # ------------------------------------------------------------------ from set-up to teardown

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()  # the callback may have served another fit; a checkpoint is loaded after this

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in setup: by now the module has made what it makes there
        check_synthetic(pl_module, "evaluate_distilled", "EvaluateDistilled")
        data = trainer.datamodule  # type: ignore[attr-defined]
        try:
            with isolate_rng():
                self._holdout = split_batches(data, "val")
                check_split(data, "test")  # read at the end, but missed now
                self._recipe = self._with_baselines(data, few_images(pl_module).ipc)
        except ValueError as error:
            raise HastenError(f"evaluate_distilled: {error}") from error

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(trainer, pl_module)  # so that the best set is never worse than the one it began with

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module)
        self._conclude(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._holdout = []
        self._recipe = replace(self._recipe, data=None, student=None, experts=())

    def state_dict(self) -> dict[str, Any]:
        best = self.best and {name: getattr(self.best, name) for name in ("images", "label_logits", "classes", "lr")}
        return {"best": best, "best_iteration": self.best_iteration, "history": list(self._history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"] and FewImages(**state_dict["best"])
        self.best_iteration, self._history = state_dict["best_iteration"], list(state_dict["history"])

    def report(self) -> dict[str, Any]:
        """How and what it has measured so far, for JSON; ``evaluate_distilled`` repeats it from that."""
        augment = self.augment and {"ops": list(self.augment.ops), "share": self.augment.share}
        return {
            "protocol": {
                "nets": list(self.nets),
                "seeds": self.seeds,
                "epochs": self.epochs,
                "whole_epochs": self.whole_epochs,
                "lr": self.lr,
                "augment": augment,
                "seed": self.seed,
            },
            "best_iteration": self.best_iteration,
            "holdout": [list(pair) for pair in self._history],
            "table": self.table and self.table.to_json(),
        }

    def _with_baselines(self, data: Any, ipc: int) -> Recipe:
        """The recipe with what its random images come from."""
        if not self.baselines:
            return self._recipe
        if not callable(getattr(data, "train_images", None)):
            raise HastenError(
                f"evaluate_distilled: {type(data).__name__}: expected train_images(indices), and what else "
                "HasRealImages names, for the baselines, got none; use a datamodule of hasten, or set baselines to []"
            )
        counts = torch.bincount(data.train_labels, minlength=data.num_classes)
        if counts.min() < ipc:
            rarest = int(counts.argmin())
            raise HastenError(
                f"evaluate_distilled: baselines: expected at least ipc = {ipc} training images of each class, got "
                f"{int(counts[rarest])} of {data.class_names[rarest]!r}; lower ipc, or set baselines to []"
            )
        if "random_soft" not in self.baselines:
            return replace(self._recipe, data=data)
        experts = open_trajectories(self.experts) if self.experts else getattr(data, "experts", ())
        check_seen(experts, described(data), owner="evaluate_distilled")
        student = labelling_student(self.student or next(iter(self.nets.values())), experts)
        return replace(self._recipe, data=data, experts=experts, student=student)

    # ------------------------------------------------------------------ measuring

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train nets on the set as it is, measure them on the holdout, and keep the set if it is the best."""
        iteration = trainer.global_step
        if self._history and self._history[-1][0] == iteration:
            return  # a batch of an accumulated step, or the last step
        net, few = next(iter(self.nets)), few_images(pl_module)
        with self._jury(trainer, pl_module) as jury:
            arm = self._recipe.given("now", few.images, few.label_logits, rates(few, self.lr))
            lr = jury.chosen_lr(arm, net, self._holdout)
            accuracies = jury.accuracies(arm, net, lr, self._holdout)
        mean = statistics.fmean(accuracies)
        found = {"eval/acc": mean, f"eval/{net}/acc": mean}
        if self.seeds > 1:
            found[f"eval/{net}/std"] = statistics.stdev(accuracies)
        publish(trainer, found)
        if self.best is None or mean > max(accuracy for _, accuracy in self._history):
            self.best, self.best_iteration = few, iteration
        self._history.append((iteration, mean))
        best = "the best so far" if self.best_iteration == iteration else f"best at {self.best_iteration}"
        pl_module.print(f"step {iteration}   eval/acc {mean:.4f} on the holdout, {best}")

    def _conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The table of the test split."""
        best, final = cast(FewImages, self.best), few_images(pl_module)
        one = self.best_iteration == trainer.global_step
        with self._jury(trainer, pl_module) as jury:
            table = table_of(
                {"best": best} if one else {"final": final, "best": best},
                jury,
                self._recipe,
                self._holdout,
                split_batches(trainer.datamodule, "test"),  # type: ignore[attr-defined]
                baselines=self.baselines,
                lr=self.lr,
                with_scores=self.scores,
                say=pl_module.print,
            )
        accuracy = dict(self._history)[self.best_iteration]
        notes = [f"best: of iteration {self.best_iteration}, {accuracy:.4f} on the holdout, which chose it"]
        if one:  # the last set is the best one, and is not trained on twice
            pairs = [(replace(row, arm="final"), row) if row.arm == "best" else (row,) for row in table.rows]
            table = replace(table, rows=tuple(row for pair in pairs for row in pair))
        distilled_by = getattr(trainer.datamodule, "experts", ())  # type: ignore[attr-defined]
        if any(expert.is_imported for expert in (*distilled_by, *self._recipe.experts)):
            notes.append(IMPORTED)
        self.table = replace(table, notes=(*table.notes, *notes))
        publish(trainer, self._metrics(self.table))
        if trainer.is_global_zero:
            self._show(trainer, self.table)

    def _metrics(self, table: Table) -> dict[str, float]:
        found = {}
        for net in self.nets:
            for arm in ("final", "best"):
                row = table.row(arm, net)
                if row is not None:
                    found[f"eval/{net}/acc_{arm}"] = row.mean
                    found |= {} if row.std is None else {f"eval/{net}/std_{arm}": row.std}
        first = table.metrics(next(iter(self.nets)))
        found |= {f"eval/{arm}/acc": first[arm] for arm in BASELINES if arm in first}
        found |= {f"eval/{name}": value for name, value in table.scores.items()}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _show(self, trainer: Trainer, table: Table) -> None:
        rich.print(Markdown(table.markdown()))
        if self.folder is not None:
            table.write(self.folder, **self.report())
            rich.print(f"evaluation: {self.folder / 'table.md'}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = ["trained on", "net", "lr", "lr from", "epochs", "mean", "std"]
                data = [[r.arm, r.net, r.lr, r.lr_from, r.epochs, r.mean, r.std] for r in table.rows]
                logger.log_table("eval/table", columns=columns, data=data, step=trainer.global_step)

    @contextmanager
    def _jury(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Jury]:
        """Nets to be trained while the fit's own training stands still."""
        # every process trains the same nets; each has its share of the split
        pooled: Any = partial(trainer.strategy.reduce, reduce_op="sum") if trainer.world_size > 1 else None
        with (
            sampling(trainer, pl_module),
            torch.enable_grad(),
            torch.autocast(pl_module.device.type, enabled=False),  # numbers that compare, whatever the fit's precision
        ):
            yield Jury(self.nets, seeds=self.seeds, seed=self.seed, device=pl_module.device, pooled=pooled)
