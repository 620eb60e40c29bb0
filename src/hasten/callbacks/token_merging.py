"""TokenMerging: merge tokens in anyone's ViT or Vision Mamba, while it trains, while it is evaluated, or both.

What merges is a ``MergeHandle`` (``hasten/nn/token_merging.py``), attached from ``setup`` to ``teardown``. When it
merges is said here, at the start of every epoch and of every validation, test and prediction. What it brings is
measured on the first batch that merges, and on ``probe_batches`` of the validation data.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import rich
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hasten.callbacks._logging import log_image
from hasten.callbacks._sampling import publish, sampling, unit_range
from hasten.errors import HastenError, on_one_line
from hasten.formats.pictures import enlarged, tiled, write_png
from hasten.functional import merged_image
from hasten.nn import MergeHandle, MergeOptions, Merging, attach_token_merging

_WHEN = ("train", "eval", "both")
_PICTURES = 8


class TokenMerging(Callback):
    """Merge similar tokens inside a timm ViT (ToMe) or a Vision Mamba (R-MeeTo), which makes it faster.

    On trained weights it is a choice between speed and accuracy, with no training at all. Trained with merging on, the
    weights make up for most of what it costs; ``Distillation`` beside it lets the unmerged model teach. The model keeps
    its classes, weights and state_dict, and is after the fit, or an exception, as it was found.

    At the first batch that merges it prints the tokens, the FLOPs and the measured speed of the backbone with and
    without merging, and logs ``token_merge/ratio`` (tokens per block, merged / unmerged), ``token_merge/tokens_last``,
    ``token_merge/flops_ratio`` and ``token_merge/speedup``.

    Args:
        r: tokens to remove at each merge, or another form that ``hasten.nn.MergeOptions`` takes; the arguments of the
            same name are described there.
        target: where in the module the backbone is, a dotted path; None: the only one it holds.
        when: "train", "eval" (validation, test, prediction) or "both".
        start_epoch: the epoch of a fit at whose start merging begins, >= 0.
        ramp_epochs: over so many epochs r grows from 0, >= 0; not with a compiled model.
        probe_batches: so many validation batches (images, labels) are classified when merging begins and when the fit
            ends: without merging, merged, merged out of order (Vim) and pruned. Logs ``token_merge/probe_<arm>``, the
            accuracy, and prints a table with the share of images on which an arm and the unmerged model agree.
        report: measure and print at the first batch that merges.
        folder: with ``trace_source``, where pictures of the merged tokens go, at each validation; None: nowhere.

    Raises:
        ValueError: for an unknown word or a number out of range.
        TypeError: for an r of another type.
        HastenError: at set-up, where no backbone is found or the arguments do not fit it.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[TokenMerging(r=8, when="eval")], accelerator="cpu", logger=False)
    """

    attach = staticmethod(attach_token_merging)
    """The same without Lightning: ``with TokenMerging.attach(model, r=8): ...``."""

    def __init__(
        self,
        r: float | Sequence[float] = 8,
        *,
        method: str = "auto",
        layers: Sequence[int] | None = None,
        interval: int | None = None,
        metric: str = "auto",
        distance: str = "cosine",
        preserve_order: bool | str = "auto",
        prop_attn: bool | str = "auto",
        reduce: str = "merge",
        target: str | None = None,
        when: str = "both",
        start_epoch: int = 0,
        ramp_epochs: int = 0,
        cls_rule: str = "proportional",
        trace_source: bool = False,
        probe_batches: int = 0,
        report: bool = True,
        folder: str | Path | None = None,
    ) -> None:
        if when not in _WHEN:
            raise ValueError(f"token_merging: when: expected one of {', '.join(_WHEN)}, got {when!r}")
        numbers = {"start_epoch": start_epoch, "ramp_epochs": ramp_epochs, "probe_batches": probe_batches}
        for name, value in numbers.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"token_merging: {name}: expected an int >= 0, got {value!r}")
        if folder is not None and not trace_source:
            raise ValueError(
                "token_merging: folder: expected none without trace_source, got one; say trace_source=True"
            )
        self.options = MergeOptions(
            r=r,
            method=method,
            layers=layers,
            interval=interval,
            metric=metric,
            distance=distance,
            preserve_order=preserve_order,
            prop_attn=prop_attn,
            reduce=reduce,
            cls_rule=cls_rule,
            trace_source=trace_source,
        )
        self.target = target
        self.when = when
        self.start_epoch = start_epoch
        self.ramp_epochs = ramp_epochs
        self.probe_batches = probe_batches
        self.report = report
        self.folder = None if folder is None else Path(folder)
        self._handle: MergeHandle | None = None
        self._module: weakref.ref[LightningModule] | None = None  # the last one served
        self._trained = False  # whether its weights have been trained with merging on
        self._record: dict[str, Any] = {}  # what a checkpoint says of this fit; outlives the handle
        self._resumed: Mapping[str, Any] | None = None
        self._reported = False
        self._probed: dict[str, _Probe] = {}  # optimizer step -> what was found there
        self._traced: tuple[Tensor, Tensor] | None = None  # images and sources of this validation's first batch

    # ------------------------------------------------------------------ attaching

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" or self._module is None or self._module() is not pl_module:
            self._trained, self._resumed, self._record = False, None, {}
            self._reported, self._probed = False, {}
            self._module = weakref.ref(pl_module)
        if stage == "fit":
            # a backbone that configure_model builds is not there yet; _attached complains if it never comes
            with suppress(ValueError):
                self._attach(pl_module, retrained=self.when != "eval")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _attach(self, pl_module: LightningModule, *, retrained: bool) -> None:
        if self._handle is None:
            self._handle = MergeHandle(pl_module, self.options, target=self.target, retrained=retrained)
            self._handle.set(None)

    def _attached(self, trainer: Trainer, pl_module: LightningModule) -> MergeHandle:
        """The handle, whose backbone must be there by now."""
        # weights that were, or are now, trained with merging on are evaluated as they were trained: outside of a fit
        # only now, when the state of a checkpoint has been read
        retrained = self.when != "eval" if trainer.state.fn == "fit" else self._trained
        try:
            self._attach(pl_module, retrained=retrained)
        except ValueError as error:
            raise HastenError(str(error)) from error
        return cast(MergeHandle, self._handle)

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._traced = None

    # ------------------------------------------------------------------ when it merges

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        handle = self._attached(trainer, pl_module)
        if self.ramp_epochs and any(map(_is_compiled, pl_module.modules())):
            # torch.compile gives up on a function after eight graphs, and each r takes two to four
            raise HastenError(
                f"token_merging: ramp_epochs: expected 0 with a compiled model, which is compiled anew for each r, got "
                f"{self.ramp_epochs}; leave one of the two"
            )
        self._record = _plain(handle.merging) | {
            "when": self.when,
            "start_epoch": self.start_epoch,
            "ramp_epochs": self.ramp_epochs,
        }
        for name, here in self._record.items():
            saved = here if self._resumed is None else self._resumed.get(name)
            if saved != here:
                raise HastenError(
                    f"token_merging: {name}: expected {saved} as in the checkpoint, got {here}; resume as the run "
                    "began, or start a new one from its weights"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set(trainer, training=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set(trainer, training=True)
        if self.probe_batches and not self._probed and trainer.current_epoch >= self.start_epoch:
            self._probe(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if cast(MergeHandle, self._handle).active is not None:
            self._trained = True
            self._measure(trainer, pl_module, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._probed:
            self._probe(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attached(trainer, pl_module)
        self._set(trainer, training=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)
        self._set(trainer, training=trainer.state.fn == "fit")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attached(trainer, pl_module)
        self._set(trainer, training=False)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attached(trainer, pl_module)
        self._set(trainer, training=False)

    def _set(self, trainer: Trainer, *, training: bool) -> None:
        handle = cast(MergeHandle, self._handle)
        wanted = self.when in ("train" if training else "eval", "both")
        handle.set(self._now(trainer, handle.merging) if wanted else None)

    def _now(self, trainer: Trainer, merging: Merging) -> Merging | None:
        """What merges in this epoch of a fit, and in full beyond a fit."""
        epochs = trainer.current_epoch - self.start_epoch
        if trainer.state.fn == "fit" and epochs < self.ramp_epochs:
            share = max(epochs, 0), self.ramp_epochs or 1
            merging = replace(merging, r=tuple(n * share[0] // share[1] for n in merging.r))
        return merging if merging.removed else None

    # ------------------------------------------------------------------ what it brings

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._measure(trainer, pl_module, batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._measure(trainer, pl_module, batch)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._measure(trainer, pl_module, batch)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Once: FLOPs and speed of the backbone with and without merging, on the images of this batch."""
        handle = cast(MergeHandle, self._handle)
        if self._reported or not self.report or handle.active is None:
            return
        self._reported = True
        table = handle.table()
        ratio = sum(row.after for row in table) / (len(table) * table[0].before)
        metrics = {"token_merge/ratio": ratio, "token_merge/tokens_last": float(table[-1].after)}
        images, obstacle = _images(batch), "the batch holds no images (B, C, H, W)"
        if images is not None:
            # on every process, though one prints: a sharded module runs together or not at all
            with sampling(trainer, pl_module), torch.compiler.set_stance("force_eager"):
                try:
                    (plain, merged), (slow, fast) = handle.flops(images), handle.throughput(images, repeats=3)
                    metrics |= {"token_merge/flops_ratio": merged / plain, "token_merge/speedup": fast / slow}
                except Exception as error:  # what the module does to a batch before its backbone is not known here
                    obstacle = f"the backbone does not take the images of the batch: {on_one_line(error)}"
        publish(trainer, metrics)
        if trainer.is_global_zero:
            rich.print(f"token merging in {type(handle.module).__name__}", _tokens_table(handle))
            rich.get_console().print(_summary(handle, metrics, images, obstacle), soft_wrap=True)

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Classify the same validation batches with every arm, publish the accuracies and print all probes so far."""
        handle = cast(MergeHandle, self._handle)
        if getattr(handle.module, "num_classes", None) == 0:
            raise HastenError(
                f"token_merging: probe_batches: expected a {type(handle.module).__name__} that classifies, got one "
                "without a head; say probe_batches=0"
            )
        arms = _arms(handle.merging)
        right_and_agreed = torch.zeros(len(arms), 2, device=pl_module.device)
        seen = torch.zeros((), device=pl_module.device)
        # without compilation: its graphs would count against those of the training
        with sampling(trainer, pl_module), torch.compiler.set_stance("force_eager"):
            for images, labels in self._labelled(trainer):
                seen += len(labels)
                unmerged = None
                for row, merging in zip(right_and_agreed, arms.values(), strict=True):
                    with handle.using(merging):
                        answers = _classes(handle.module(images), labels)
                    unmerged = answers if unmerged is None else unmerged  # the first arm
                    row += torch.stack([(answers == labels).sum(), (answers == unmerged).sum()])
        right_and_agreed, seen = (
            cast(Tensor, trainer.strategy.reduce(count, reduce_op="sum")) for count in (right_and_agreed, seen)
        )
        shares = (right_and_agreed / seen).tolist()
        publish(trainer, {f"token_merge/probe_{name}": acc for name, (acc, _) in zip(arms, shares, strict=True)})
        self._probed[f"step {trainer.global_step}"] = dict(zip(arms, shares, strict=True))
        if trainer.is_global_zero:
            rich.print(f"accuracy (agreement with the unmerged model) on {int(seen)} validation images")
            rich.print(_probe_table(self._probed))

    def _labelled(self, trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
        """``probe_batches`` batches of the first validation data on the device, ready for the backbone."""
        if trainer.val_dataloaders is None:  # read later where the first validation is not in this epoch
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        loaders = [] if trainer.val_dataloaders is None else tree_leaves(trainer.val_dataloaders)
        if not loaders:
            raise HastenError(
                "token_merging: probe_batches: expected validation batches, got none; say probe_batches=0, or allow "
                "for validation"
            )
        for batch in islice(loaders[0], self.probe_batches):
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
                raise HastenError(
                    f"token_merging: probe_batches: expected validation batches (images, labels), got "
                    f"{type(batch).__name__}; say probe_batches=0"
                )
            yield batch[0], batch[1]

    # ------------------------------------------------------------------ pictures

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        source = cast(MergeHandle, self._handle).backbone.token_source
        images = _images(batch)
        if self.folder is not None and self._traced is None and None not in (source, images):
            self._traced = cast(Tensor, images)[:_PICTURES].cpu(), cast(Tensor, source)[:_PICTURES].cpu()

    def _draw(self, trainer: Trainer) -> None:
        """The first images of this validation, and below each what the last block sees of it."""
        traced, self._traced = self._traced, None
        if traced is None or self.folder is None or not trainer.is_global_zero:
            return
        images, source = enlarged(unit_range(trainer)(traced[0]), min_cell_px=112), traced[1]
        prefix = cast(MergeHandle, self._handle).backbone.prefix_indices
        picture = tiled(torch.stack([images, merged_image(images, source, prefix_indices=prefix, border=0.5)]))
        write_png(picture, self.folder / f"merged_tokens_{trainer.global_step:06d}.png")
        write_png(picture, self.folder / "merged_tokens.png")
        log_image(trainer, "merged_tokens", picture, trainer.global_step)

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """How this fit merges, to tell a resumed run that merges otherwise; and whether the weights are used to it."""
        return {"merging": self._record, "trained": self._trained} if self._record else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trained = state_dict.get("trained", False)
        self._resumed = state_dict.get("merging")


_Probe = dict[str, list[float]]
"""Arm -> accuracy and agreement with the unmerged model."""


def _plain(merging: Merging) -> dict[str, Any]:
    """What decides the weights, in types that a checkpoint may hold."""
    fields = asdict(merging)
    del fields["trace_source"]
    return fields | {"r": list(merging.r)}


def _arms(merging: Merging) -> dict[str, Merging | None]:
    """What a probe compares, the unmerged model first."""
    arms: dict[str, Merging | None] = {"unmerged": None, "merged": replace(merging, prune=False)}
    if merging.preserve_order and merging.cls_rule != "exact":
        arms["unordered"] = replace(merging, prune=False, preserve_order=False)
    return arms | {"pruned": replace(merging, prune=True, prop_attn=False)}


def _images(batch: Any) -> Tensor | None:
    """The images of a batch, (B, C, H, W), if they can be told."""
    leaves = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return next((leaf for leaf in leaves if leaf.ndim == 4 and leaf.is_floating_point()), None)


def _tokens_table(handle: MergeHandle) -> Table:
    table = Table()
    for name in ("block", "tokens before", "after"):
        table.add_column(name, justify="right")
    for row in handle.table():
        if row.before != row.after:
            table.add_row(*map(str, row))
    return table


def _summary(handle: MergeHandle, metrics: Mapping[str, float], images: Tensor | None, obstacle: str) -> str:
    attention = ", proportional attention" if handle.merging.prop_attn else ""
    line = f"tokens per block x {metrics['token_merge/ratio']:.3f}{attention}"
    if images is None or "token_merge/speedup" not in metrics:
        return f"{line}; speed not measured, {obstacle}"
    flops = metrics["token_merge/flops_ratio"]
    return (
        f"{line}, FLOPs x {flops:.3f} (a speed-up of {1 / flops:.2f} by arithmetic), measured "
        f"{metrics['token_merge/speedup']:.2f}: forward, batch {len(images)}, {images.device.type}"
    )


def _probe_table(probed: Mapping[str, _Probe]) -> Table:
    """A row an arm, a column a probe."""
    table = Table("tokens")
    for step in probed:
        table.add_column(step, justify="right")
    for arm in next(iter(probed.values())):
        cells = (probe[arm] for probe in probed.values())
        table.add_row(arm, *(f"{100 * accuracy:.1f} % ({100 * agreed:.0f} %)" for accuracy, agreed in cells))
    return table


def _classes(logits: Any, labels: Tensor) -> Tensor:
    """The class that each image is given, (B, K) -> (B,)."""
    if not (isinstance(logits, Tensor) and logits.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point()):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise HastenError(
            f"token_merging: probe_batches: expected logits (B, K) of the backbone and labels (B,), got {shape} and "
            f"{tuple(labels.shape)}; say probe_batches=0"
        )
    return logits.argmax(-1)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules
