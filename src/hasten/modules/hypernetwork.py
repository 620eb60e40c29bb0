"""HyperNetwork: trains one network for a range of inputs, and evaluates it over a fixed grid of them."""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerConfig, OptimizerLRSchedulerConfig
from torch import Generator, Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import Metric

from hasten.errors import HastenError
from hasten.functional.draws import seed_of
from hasten.modules._hypernet_plots import plotted_curve, plotted_trade_off
from hasten.nn import Choice, HyperModel, Range, SeparateModels
from hasten.optim import configure_optimizers, parameter_groups
from hasten.optim.build import OptimizerFactory, SchedulerFactory

_SPLITS = ("val", "test")
_SCATTERED = 16  # points of the grid where the inputs have more than two dimensions


class HyperNetwork(LightningModule):
    """Train a hypernetwork on inputs drawn anew at every step; validate and test it at inputs that never change.

    A step draws the inputs, lets them act on the batch, ``x, target = transform(batch, **inputs)``, on the weights,
    ``output = model(x, **inputs)``, and on the objective, ``loss(output, target, **inputs)``. What is drawn is a
    function of (seed, rank, step): a resumed run goes on with the same inputs, and no two processes share theirs. Of
    the inputs a function is passed those that it names, or all if it takes ``**inputs``.

    The grid is ``grid`` values of each input, every one with every other; 16 seeded points where the inputs have more
    than two dimensions. Logs ``train/loss``, ``train/penalty``, and for the splits val and test ``val/loss``, the mean
    over the grid, ``val/loss_worst``, and ``val/loss@<input>=<value>``, the mean over all points with that value; and
    each metric likewise. ``pictures()`` draws these curves.

    Args:
        model: from ``hasten.nn.hypernetize``; or a ``SeparateModels``, its control.
        loss: ``(output, target, **inputs)`` -> a scalar or a number a sample.
        optimizer: called with parameter groups; hypernetwork, vectors and what the network names carry no weight decay.
            Needed to train.
        scheduler: called with the optimizer, and with ``total_steps`` where it takes that; stepped every step.
        transform: ``(batch, **inputs)`` -> (x, target); None: batches are such pairs.
        penalty: ``(model, **inputs)`` -> a scalar that is added to the training loss alone.
        draw: "batch", one value of each input for all its samples, or "sample", a value and weights for each.
        grid: values of each input, at least 2; a Choice has all of its own.
        metrics: name -> a torchmetrics metric of (output, target); its ``higher_is_better`` says what is the worst.
        ensemble: name -> a torchmetrics metric of (the outputs at all K points of the grid, (K, B, ...), target), for
            targets that do not depend on the inputs; logged as ``val/<name>``.
        flops: log ``val/mflops`` as well: millions of floating-point operations a sample, generation included.
        trade_offs: score -> another, such as {"tv": "mse"}: pictures of the second over the first along the grid.
        dots: the folder of a finished run whose scores are drawn beside the curves, such as that of separate models.
        seed: of the inputs drawn.

    Raises:
        HastenError: for another model, word, number, metric, score or folder.

    Source: MIP, arXiv:2304.07645.

    Example:
        >>> from hasten.nn import hypernetize
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> module = HyperNetwork(hypernetize(net, {"strength": (0, 1)}), nn.functional.mse_loss)
        >>> module(torch.zeros(2, 4), strength=0.5).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        model: HyperModel | SeparateModels,
        loss: Callable[..., Tensor],
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        *,
        transform: Callable[..., tuple[Any, Any]] | None = None,
        penalty: Callable[..., Tensor] | None = None,
        draw: str = "batch",
        grid: int = 9,
        metrics: Mapping[str, Metric] | None = None,
        ensemble: Mapping[str, Metric] | None = None,
        flops: bool = False,
        trade_offs: Mapping[str, str] | None = None,
        dots: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, (HyperModel, SeparateModels)):
            raise HastenError(
                f"hypernetwork: model: expected a HyperModel, got {type(model).__name__}; make one with "
                "hasten.nn.hypernetize(model, inputs)"
            )
        if draw not in ("batch", "sample"):
            raise HastenError(f"hypernetwork: draw: expected batch or sample, got {draw!r}")
        if grid < 2:
            raise HastenError(f"hypernetwork: grid: expected at least 2 values of each input, got {grid}")
        for name, metric in (metrics or {}).items():
            if not isinstance(metric, Metric) or metric.higher_is_better is None:
                raise HastenError(
                    f"hypernetwork: metrics.{name}: expected a torchmetrics metric that is better higher or lower, got "
                    f"{type(metric).__name__}"
                )
        self._higher_is_better = {"loss": False} | {n: bool(m.higher_is_better) for n, m in (metrics or {}).items()}
        if flops:
            self._higher_is_better["mflops"] = False
        for score in (name for pair in (trade_offs or {}).items() for name in pair):
            if score not in self._higher_is_better:
                raise HastenError(
                    f"hypernetwork: trade_offs: expected pairs of {', '.join(self._higher_is_better)}, got {score!r}"
                )
        inputs = model.encoding.inputs
        self.model = model
        self.loss = _Taking(loss, inputs)
        self.transform = None if transform is None else _Taking(transform, inputs)
        self.penalty = None if penalty is None else _Taking(penalty, inputs)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.draw = draw
        self.seed = seed
        self.flops = flops
        self.trade_offs = dict(trade_offs or {})
        self._dots = {} if dots is None else _scores_of_run(Path(dots))
        self._points, self._curves = _grid(inputs, grid, seed)
        # a metric for each point: what torchmetrics gathers is not always a mean over samples
        self._metrics = nn.ModuleDict(
            {
                split: nn.ModuleList(nn.ModuleDict(deepcopy(dict(metrics or {}))) for _ in self._points)
                for split in _SPLITS
            }
        )
        self._ensemble = nn.ModuleDict({split: nn.ModuleDict(deepcopy(dict(ensemble or {}))) for split in _SPLITS})
        self._validated: dict[str, Tensor] = {}  # score -> its value at every point, of the last validation

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return self.model(*args, **inputs)

    def setup(self, stage: str) -> None:
        processes = self.trainer.world_size
        if stage == "fit" and processes > 1 and isinstance(self.model, SeparateModels):
            raise HastenError(
                f"hypernetwork: model: expected one process for SeparateModels, got {processes}, of which each would "
                "train another model at a step; use trainer=cpu or trainer=gpu"
            )

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            _shard(self.model, self.device_mesh)

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        generator = Generator().manual_seed(self._step_seed(batch_idx))
        inputs = self.model.sample_inputs(_rows(batch) if self.draw == "sample" else None, generator=generator)
        output, target = self._output_and_target(batch, inputs)
        loss = self.loss(inputs, output, target).mean()
        if self.penalty is not None:
            penalty = self.penalty(inputs, self.model)
            self.log("train/penalty", penalty)
            loss = loss + penalty
        self.log("train/loss", loss)
        return loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer is built over; for learning rates of their own return ``self.model.param_groups(...)``."""
        return parameter_groups(self.model)

    def configure_optimizers(self) -> OptimizerConfig | OptimizerLRSchedulerConfig:
        if self.optimizer is None:
            raise HastenError("hypernetwork: optimizer: required to train, got None; pass a function of groups")
        return configure_optimizers(
            self.parameter_groups(),
            self.optimizer,
            self.scheduler,
            total_steps=lambda: cast(int, self.trainer.estimated_stepping_batches),
        )

    def _step_seed(self, batch_idx: int) -> int:
        """A seed for this rank at this batch; a plain sum would give rank 1 that of rank 0 a step later."""
        # the batch as well: those of an accumulated step share the number of the step
        return seed_of(self.seed, self.global_rank, self.global_step, batch_idx)

    def _output_and_target(self, batch: Any, inputs: Mapping[str, Tensor]) -> tuple[Any, Any]:
        pair = batch if self.transform is None else self.transform(inputs, batch)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            whose = "batch" if self.transform is None else "transform"
            raise HastenError(f"hypernetwork: {whose}: expected (x, target), got {type(pair).__name__}")
        x, target = pair
        return self.model(x, **inputs), target

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        self._start_grid("val")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._add_to_grid("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._validated = self._log_grid("val")

    def on_test_epoch_start(self) -> None:
        self._start_grid("test")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._add_to_grid("test", batch)

    def on_test_epoch_end(self) -> None:
        self._log_grid("test")

    def pictures(self) -> dict[str, Tensor]:
        """Every score of the last validation over every input, (1, 1, 3, H, W) in [0, 1]; nothing before the first."""
        if not self._validated:
            return {}
        pictures = {
            f"{score}_over_{name}": plotted_curve(
                self._along(curve, score), curve.labels, score, name, self._dotted(curve, score, name)
            )
            for score in self._validated
            for name, curve in self._curves.items()
        }
        pictures |= {
            f"{y}_over_{x}_along_{name}": plotted_trade_off(
                (self._along(curve, x), self._along(curve, y)),
                curve.labels,
                (x, y, name),
                (self._dotted(curve, x, name), self._dotted(curve, y, name)),
            )
            for x, y in self.trade_offs.items()
            for name, curve in self._curves.items()
        }
        return {name: picture[None, None] for name, picture in pictures.items()}

    def _along(self, curve: "_Curve", score: str) -> list[float]:
        """A score of the last validation at each value of a curve."""
        return [float(self._validated[score][points].mean()) for points in curve.points]

    def _dotted(self, curve: "_Curve", score: str, name: str) -> list[float | None]:
        """The other run's score at each value of a curve, where it has one."""
        return [self._dots.get(f"val/{score}@{name}={label}") for label in curve.labels]

    def _start_grid(self, split: str) -> None:
        self._sums = torch.zeros(len(self._points), device=self.device)
        self._samples = torch.zeros((), device=self.device)
        self._mflops: list[float] = []
        for metrics in self._at_points(split):
            for metric in metrics.values():
                metric.reset()
        for metric in self._of_ensemble(split).values():
            metric.reset()

    def _add_to_grid(self, split: str, batch: Any) -> None:
        samples = _rows(batch)
        self._samples += samples
        count = self.flops and not self._mflops
        outputs, target = [], None
        for k, (point, metrics) in enumerate(zip(self._points, self._at_points(split), strict=True)):
            inputs = {name: value.to(self.device) for name, value in point.items()}
            output, target = self._output_and_target(batch, inputs)
            if count:
                self._mflops.append(self._counted(batch, inputs) / samples / 1e6)
            self._sums[k] += samples * self.loss(inputs, output, target).mean()
            for metric in metrics.values():
                metric.update(output, target)
            if self._of_ensemble(split):
                outputs.append(output)
        for metric in self._of_ensemble(split).values():
            metric.update(torch.stack(outputs), target)

    def _counted(self, batch: Any, inputs: Mapping[str, Tensor]) -> int:
        """Floating-point operations of a batch, two for a multiplication with addition."""
        # the counter hooks tensors that want a gradient, which inference mode cannot give
        with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._output_and_target(batch, inputs)
        return counter.get_total_flops()

    def _log_grid(self, split: str) -> dict[str, Tensor]:
        """Log all scores; score -> its value at every point."""
        reduce = self.trainer.strategy.reduce
        sums, samples = (cast(Tensor, reduce(count, reduce_op="sum")) for count in (self._sums, self._samples))
        scores = {"loss": sums / samples}
        at_points = self._at_points(split)
        for name in at_points[0]:
            scores[name] = torch.stack([metrics[name].compute() for metrics in at_points])
        if self.flops:
            scores["mflops"] = torch.tensor(self._mflops, device=self.device)
        for name, values in scores.items():
            worst = values.min() if self._higher_is_better[name] else values.max()
            logged = {f"{split}/{name}": values.mean(), f"{split}/{name}_worst": worst}
            for axis, curve in self._curves.items():
                for label, points in zip(curve.labels, curve.points, strict=True):
                    logged[f"{split}/{name}@{axis}={label}"] = values[points].mean()
            self.log_dict(logged, sync_dist=True)
        for name, metric in self._of_ensemble(split).items():
            self.log(f"{split}/{name}", metric.compute(), sync_dist=True)
        return {name: values.detach().cpu() for name, values in scores.items()}

    def _at_points(self, split: str) -> list[dict[str, Metric]]:
        """The metrics of every point, by name."""
        return [dict(cast(nn.ModuleDict, at_point).items()) for at_point in self._metrics[split]]  # type: ignore[misc]

    def _of_ensemble(self, split: str) -> dict[str, Metric]:
        """The metrics of all points together, by name."""
        return dict(cast(nn.ModuleDict, self._ensemble[split]).items())  # type: ignore[misc]


class _Taking(nn.Module):
    """A function that is passed, of the inputs, those it names, or all if it takes any keyword."""

    def __init__(self, function: Callable[..., Any], inputs: Iterable[str]) -> None:
        super().__init__()
        self.function = function  # a module, a weighted loss say, moves to the device with this one
        # the signature of an nn.Module's call says nothing
        of = function.forward if isinstance(function, nn.Module) else function
        parameters = inspect.signature(of).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.names = tuple(name for name in inputs if takes_any or name in parameters)

    def forward(self, inputs: Mapping[str, Tensor], *args: Any) -> Any:
        return self.function(*args, **{name: inputs[name] for name in self.names})


# ------------------------------------------------------------------ the grid


@dataclass(frozen=True)
class _Curve:
    """The values of one dimension of the grid, as names of metrics end, and for each the points that have it."""

    labels: tuple[str, ...]
    points: tuple[list[int], ...]


def _grid(
    inputs: Mapping[str, Range | Choice], grid: int, seed: int
) -> tuple[list[dict[str, Tensor]], dict[str, _Curve]]:
    """The points of evaluation, a value of each input, and the curve of each dimension where there are up to two."""
    dims = {name: given.dim if isinstance(given, Range) else 1 for name, given in inputs.items()}
    if sum(dims.values()) > 2:
        generator = Generator().manual_seed(seed)
        drawn = {name: given.sample(_SCATTERED, generator) for name, given in inputs.items()}
        return [{name: values[k] for name, values in drawn.items()} for k in range(_SCATTERED)], {}
    axes = {}
    for name, given in inputs.items():
        values = _spread(given, grid)
        labels = _labels(list(given.values) if isinstance(given, Choice) else values.tolist())
        for i in range(dims[name]):
            axes[name if dims[name] == 1 else f"{name}[{i}]"] = (values, labels)
    indices = list(product(*(range(len(values)) for values, _ in axes.values())))
    columns = {axis: values[[index[i] for index in indices]] for i, (axis, (values, _)) in enumerate(axes.items())}
    curves = {
        axis: _Curve(
            tuple(labels),
            tuple([k for k, index in enumerate(indices) if index[i] == v] for v in range(len(values))),
        )
        for i, (axis, (values, labels)) in enumerate(axes.items())
    }
    of = {
        name: columns[name] if dims[name] == 1 else torch.stack([columns[f"{name}[{i}]"] for i in range(dims[name])], 1)
        for name in inputs
    }
    return [{name: values[k] for name, values in of.items()} for k in range(len(indices))], curves


def _spread(given: Range | Choice, n: int) -> Tensor:
    """N numbers from low to high as the encoding sees them, evenly; all positions of a choice."""
    if isinstance(given, Choice):
        return torch.arange(len(given.values))
    return replace(given, dim=1, sampler=lambda shape, _: torch.linspace(0, 1, n)).sample(n)


def _labels(values: list[Any]) -> list[str]:
    """Values as metrics are named by them: as short as tells them apart."""
    short = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    return short if len(set(short)) == len(short) else [repr(value) for value in values]


def _rows(batch: Any) -> int:
    tensor = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if tensor is None:
        raise HastenError(f"hypernetwork: batch: expected tensors with a row a sample, got {type(batch).__name__}")
    return len(tensor)


def _scores_of_run(folder: Path) -> dict[str, float]:
    """The metrics that a finished run has left."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError) as error:
        raise HastenError(
            f"hypernetwork: dots: expected the folder of a finished run, found no result.json in {str(folder)!r}"
        ) from error


# ------------------------------------------------------------------ sharding


def _shard(model: HyperModel | SeparateModels, mesh: Any) -> None:
    """Shard over all ranks of ``mesh``: the generating network as one unit, all the rest as another.

    Not block by block as ``hasten.nn.sharding`` does: the weights are made from the whole of the model's own before any
    of its blocks runs, and blocks are called with weights that no block holds.
    """
    if isinstance(model, SeparateModels):
        raise HastenError("hypernetwork: model: expected a HyperModel to shard, got SeparateModels; use one process")
    if isinstance(model, FSDPModule):
        return  # Lightning configures the model again before each of fit, validate and test
    ranks = init_device_mesh(mesh.device_type, (math.prod(mesh.shape),))  # see hasten.nn.sharding.shard
    fully_shard(model.hyper, mesh=ranks)
    fully_shard(model, mesh=ranks, reshard_after_forward=True)  # by default the outermost stays whole from then on
    for method in ("delta", "generate"):  # for penalties and probes, which call them and not the model
        register_fsdp_forward_method(model, method)
