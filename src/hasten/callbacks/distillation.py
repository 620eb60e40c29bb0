"""Distillation: a frozen teacher beside anyone's classifier, and what the student's logits lose against its own.

Who teaches: ``_built`` at set-up, a copy of the student at ``start_epoch``, or in a resumed run what ``_resume`` finds.
How the term gets into the loss: a module with ``loss_terms`` adds it itself (``_add_term``), the training step of any
other is wrapped (``_wrap_training_step``).
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from hasten.errors import HastenError, did_you_mean
from hasten.formats import whole_file
from hasten.functional import distillation_loss
from hasten.nn.protocols import HasLossTerms
from hasten.nn.token_merging import unmerged_copy
from hasten.nn.weights import check_fit, read_weights, weight_hash

_Call = tuple[tuple, dict[str, Any], Any]  # args, kwargs, output


class Distillation(Callback):
    """Add ``weight`` times T^2 KL(teacher || student) on the same inputs to the loss of any classifier.

    The teacher stands in eval mode, frozen, beside the module and never inside it: no checkpoint, optimizer, average
    or wrapper of the module knows of it. It runs without gradients in the training step, under its autocast.

    **A module with** ``loss_terms`` (``hasten.nn.protocols.HasLossTerms``) gets the term "distill", and the teacher
    the images after mixing. **Any other** keeps its own loss: ``training_step`` is wrapped, and must call ``target``
    once a step; the teacher is called as ``target`` was. Both log ``train/distill``, the weighted term. After the fit,
    or an exception, the module is as it was found.

    A checkpoint holds the hash of the teacher's weights, not the weights, and a resumed run must teach with the same.
    So for "self" from epoch 0 build the module from the weights it began with, as the first run did, and let
    ``ckpt_path`` restore the student over them; or name their file as ``teacher``.

    Args:
        teacher: "self", the student's network as it is at set-up, or as it enters ``start_epoch``, with all its tokens
            where it merges some; the path of a checkpoint, of Lightning or a plain state_dict, for a network like the
            student's; an nn.Module, which is frozen and moved as it stands; or a function that makes one.
        weight: of the term, >= 0.
        temperature: T > 0.
        target: the attribute of the module that maps inputs to logits (B, K), dots allowed; None: ``model``, or else
            the only child with parameters.
        start_epoch: the first epoch that is taught, >= 0. "self" is then copied, and written beside the checkpoints.
        teacher_dtype: what the teacher's weights and inputs are converted to, such as "bfloat16"; None: as the
            trainer's ``precision`` converts the student's.

    Raises:
        ValueError: for a number out of its range, TypeError for another kind of teacher.
        HastenError: at set-up and in the first batch, where teacher and module do not fit; says what would help.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Distillation(temperature=2.0)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        teacher: str | os.PathLike[str] | nn.Module | Callable[[], nn.Module] = "self",
        *,
        weight: float = 0.5,
        temperature: float = 1.0,
        target: str | None = None,
        start_epoch: int = 0,
        teacher_dtype: torch.dtype | str | None = None,
    ) -> None:
        if not (isinstance(teacher, str | os.PathLike) or callable(teacher)):
            raise TypeError(
                f"distillation: teacher: expected 'self', a path, an nn.Module or a function, got "
                f"{type(teacher).__name__}"
            )
        if not 0 <= weight < math.inf:
            raise ValueError(f"distillation: weight: expected >= 0, got {weight}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"distillation: temperature: expected > 0, got {temperature}")
        if start_epoch < 0:
            raise ValueError(f"distillation: start_epoch: expected >= 0, got {start_epoch}")
        dtype = getattr(torch, teacher_dtype, None) if isinstance(teacher_dtype, str) else teacher_dtype
        if teacher_dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"distillation: teacher_dtype: expected float32, bfloat16, float16 or float64, got {teacher_dtype!r}"
            )
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature
        self.target = target
        self.start_epoch = start_epoch
        self.teacher_dtype = dtype
        self._teacher: nn.Module | None = None  # in use
        self._record: dict[str, str] = {}  # what a checkpoint says of it; outlives the fit, for what is saved after it
        self._resumed: Mapping[str, str] | None = None
        self._restored = False  # whether this fit goes on from a checkpoint, be it one without a record
        self._undo: ExitStack | None = None  # what takes the term out of the loss again
        self._taught = False  # whether the present batch was

    # ------------------------------------------------------------------ from set-up to teardown

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._record, self._resumed, self._restored = {}, None, False
        if not (pl_module.automatic_optimization or isinstance(pl_module, HasLossTerms)):
            raise HastenError(
                f"distillation: {type(pl_module).__name__}: expected automatic optimization, got manual, which returns "
                "no loss to add to; give it a dict loss_terms and let it add them"
            )
        if self.teacher != "self" or self.start_epoch == 0:
            self._adopt(self._built(pl_module), pl_module)
        elif isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise HastenError(
                f"distillation: start_epoch: expected 0 under {type(trainer.strategy).__name__}, which shards the "
                f"weights that 'self' would copy, got {self.start_epoch}; name a checkpoint as teacher"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume and begin: only now are weights, precision, device and epoch all settled."""
        self._resume(pl_module)
        self._begin_when_due(trainer, pl_module)  # no epoch starts where a run resumes in the middle of one

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_when_due(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._taught = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        skipped = pl_module.automatic_optimization and not outputs  # training_step returned None
        if self._undo is not None and not (self._taught or skipped):
            raise HastenError(
                f"distillation: loss_terms: expected {type(pl_module).__name__}.training_step to call them, got no "
                "call; add term(images, logits, targets) of each to the loss"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _begin_when_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._undo is not None or trainer.current_epoch < self.start_epoch:
            return
        if self._teacher is None:
            teacher = _copy(_find_target(pl_module, self.target)[1])
            self._adopt(teacher, pl_module)
            self._record["snapshot"] = _write_snapshot(teacher, trainer)
        teacher = cast(nn.Module, self._teacher)
        if self.teacher_dtype is None:
            teacher = trainer.precision_plugin.convert_module(teacher)
        self._teacher = teacher.to(trainer.strategy.root_device, self.teacher_dtype)
        _sync(self._teacher)
        with ExitStack() as undo:
            if isinstance(pl_module, HasLossTerms):
                _add_term(pl_module, self._term, undo)
            else:
                _wrap_training_step(pl_module, _find_target(pl_module, self.target)[1], self._term, undo)
            self._undo = undo.pop_all()

    def _end(self) -> None:
        if self._undo is not None:
            self._undo.close()
        self._undo = self._teacher = None

    # ------------------------------------------------------------------ the teacher

    def _built(self, pl_module: LightningModule) -> nn.Module:
        if isinstance(self.teacher, nn.Module):
            return self.teacher
        if isinstance(self.teacher, (str, os.PathLike)):
            name, target = _find_target(pl_module, self.target)
            teacher = _copy(target)
            if self.teacher != "self":
                _load(teacher, Path(self.teacher), prefix=f"{name}.")
            return teacher
        with isolate_rng(include_cuda=False):  # the student draws what it would without a teacher
            teacher = self.teacher()
        if not isinstance(teacher, nn.Module):
            raise HastenError(
                f"distillation: teacher: expected a function that returns an nn.Module, got {type(teacher).__name__}"
            )
        return teacher

    def _adopt(self, teacher: nn.Module, pl_module: LightningModule) -> None:
        students = {id(parameter) for parameter in pl_module.parameters()}
        if any(id(parameter) in students for parameter in teacher.parameters()):
            raise HastenError(
                f"distillation: teacher: expected weights of its own, got some of {type(pl_module).__name__}, which "
                "would be frozen; pass 'self' for a frozen copy, and keep any other teacher out of the module"
            )
        self._teacher = teacher.eval().requires_grad_(False)
        self._record = {"weights": weight_hash(teacher)}

    def _term(self, logits: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What ``logits`` lose against the teacher's on the same inputs, weighted."""
        if not (isinstance(logits, Tensor) and logits.ndim == 2 and logits.size(1) > 1 and logits.requires_grad):
            raise HastenError(
                f"distillation: student: expected logits (B, K), K > 1, with a gradient, got {_described(logits)}; "
                "where the module has no loss_terms, name by target= what maps inputs to logits"
            )
        if self.teacher_dtype is not None:
            args, kwargs = tree_map(functools.partial(_converted, dtype=self.teacher_dtype), (args, kwargs))
        with torch.no_grad():
            taught = cast(nn.Module, self._teacher)(*args, **kwargs)
        if not (isinstance(taught, Tensor) and taught.shape == logits.shape):
            raise HastenError(
                f"distillation: teacher: expected logits {tuple(logits.shape)} like the student's, got "
                f"{_described(taught)}; choose one of the same classes"
            )
        self._taught = True
        return self.weight * distillation_loss(logits, taught, temperature=self.temperature)

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, str]:
        return dict(self._record)

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        self._resumed = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = True

    def _resume(self, pl_module: LightningModule) -> None:
        """Take up the teacher that the checkpoint knows, or refuse to teach by another."""
        if self._resumed is None:
            if self._restored and self.teacher == "self" and self.start_epoch == 0:
                raise HastenError(
                    "distillation: teacher: expected a checkpoint of a run with Distillation, got one without, which "
                    "was loaded after 'self' had been copied; name that checkpoint as teacher"
                )
            return
        snapshot = self._resumed.get("snapshot")
        if snapshot is not None and self.teacher == "self":
            name, target = _find_target(pl_module, self.target)
            teacher = _copy(target)
            _load(teacher, Path(snapshot), prefix=f"{name}.")
            self._adopt(teacher, pl_module)
            self._record["snapshot"] = snapshot
        wanted, got = self._resumed["weights"], self._record.get("weights", "none yet")
        if got != wanted:
            raise HastenError(
                f"distillation: teacher: expected weights of hash {wanted} as in the checkpoint, got {got}; for "
                "'self', build the module from the weights the first run began with, or name their file as teacher"
            )


# ------------------------------------------------------------------ the loss


def _add_term(pl_module: HasLossTerms, term: Callable[..., Tensor], undo: ExitStack) -> None:
    if "distill" in pl_module.loss_terms:
        raise HastenError("distillation: loss_terms: expected no 'distill', got the module's own; rename that")
    # a function: with a bound method, deep copies of the module would copy the callback and its teacher
    pl_module.loss_terms["distill"] = lambda images, logits, targets: term(logits, images)
    undo.callback(pl_module.loss_terms.pop, "distill", None)


def _wrap_training_step(
    pl_module: LightningModule, target: nn.Module, term: Callable[..., Tensor], undo: ExitStack
) -> None:
    original, attributes = pl_module.training_step, vars(pl_module)
    own = {name: value for name, value in attributes.items() if name == "training_step"}
    listening = _listen(target, undo)

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        with listening() as calls:
            output = original(*args, **kwargs)
        if output is None:
            return None
        if len(calls) != 1:
            raise HastenError(
                f"distillation: target: expected training_step to call {type(target).__name__} once, got {len(calls)} "
                "calls that its hooks see (not .forward, not inside a compiled one); name another by target=, or give "
                "the module loss_terms"
            )
        inputs, keywords, logits = calls[0]
        value = term(logits, *inputs, **keywords)
        pl_module.log("train/distill", value)
        return {**output, "loss": output["loss"] + value} if isinstance(output, Mapping) else output + value

    attributes["training_step"] = training_step

    def unwrap() -> None:
        del attributes["training_step"]
        attributes.update(own)

    undo.callback(unwrap)


def _listen(module: nn.Module, undo: ExitStack) -> Callable[[], AbstractContextManager[list[_Call]]]:
    """What hears the calls of ``module`` while it is entered.

    One hook for the whole fit: a training step that is compiled keeps the hook it was traced with.
    """
    calls: list[_Call] | None = None

    @torch.compiler.disable(reason="what the teacher is to be called with is noted here")
    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if calls is not None:
            calls.append((args, kwargs, output))

    @contextmanager
    def listening() -> Iterator[list[_Call]]:
        nonlocal calls
        calls = []
        try:
            yield calls
        finally:
            calls = None

    compiled = vars(module).get("_compiled_call_impl")
    if compiled is None:
        undo.callback(module.register_forward_hook(note, with_kwargs=True).remove)
    else:  # module.compile(): its hooks would be part of the graph

        def noted(*args: Any, **kwargs: Any) -> Any:
            output = compiled(*args, **kwargs)
            note(module, args, kwargs, output)
            return output

        vars(module)["_compiled_call_impl"] = noted
        undo.callback(setattr, module, "_compiled_call_impl", compiled)
    return listening


# ------------------------------------------------------------------ networks and files


def _find_target(pl_module: LightningModule, name: str | None) -> tuple[str, nn.Module]:
    """The name and the module that maps inputs to logits: as told, or ``model``, or the only child with parameters."""
    owner = type(pl_module).__name__
    children = {
        child: module for child, module in pl_module.named_children() if next(module.parameters(), None) is not None
    }
    if name is None:
        if "model" not in children and len(children) != 1:
            raise HastenError(
                f"distillation: target: expected one child of {owner} with parameters, got "
                f"{', '.join(children) or 'none'}; name by target= what maps inputs to logits, and make it in __init__"
            )
        name = "model" if "model" in children else next(iter(children))
    modules = dict(pl_module.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise HastenError(
            f"distillation: target: expected a module of {owner}, got {name!r}{did_you_mean(name, children)}"
        )
    return name, modules[name]


def _copy(target: nn.Module) -> nn.Module:
    network = getattr(target, "_orig_mod", target)  # of torch.compile(network)
    if any(parameter.is_meta or isinstance(parameter, DTensor) for parameter in network.parameters()):
        raise HastenError(
            "distillation: teacher: expected whole weights in the student, got some that are on the meta device or "
            "sharded; pass an nn.Module as teacher, or a function that makes one"
        )
    return unmerged_copy(network)


def _sync(teacher: nn.Module) -> None:
    """Have the weights of rank zero on every rank: running statistics differ, and so does what is drawn unseeded."""
    if dist.is_available() and dist.is_initialized():
        for tensor in teacher.state_dict().values():
            sent = tensor.contiguous()  # itself, or a copy of one that is laid out otherwise
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def _load(network: nn.Module, path: Path, *, prefix: str) -> None:
    """Fill ``network`` from Lightning's checkpoint, where its keys begin with ``prefix``, or its own state_dict."""
    wanted = network.state_dict()
    try:
        wrappers = (prefix, "module.", "_orig_mod.")
        state, _ = read_weights(path, wanted, owner="distillation: teacher", wrappers=wrappers)
        check_fit(state, wanted, owner="distillation: teacher", path=path)
    except ValueError as error:
        raise HastenError(str(error)) from error
    network.load_state_dict(state)


def _write_snapshot(teacher: nn.Module, trainer: Trainer) -> str:
    """Write the teacher's weights where the checkpoints are, and say where that is."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    path = Path(folder).absolute() / "teacher.pt"
    if trainer.is_global_zero:
        with whole_file(path) as unfinished:
            torch.save(teacher.state_dict(), unfinished)
    return str(path)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _described(output: Any) -> str:
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
