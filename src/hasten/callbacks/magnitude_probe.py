"""MagnitudeProbe: whether a hypernetwork's weights grow with its input, as numbers, as a plot, and as an alarm."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from hasten.callbacks._logging import log_image
from hasten.callbacks._sampling import publish, sampling
from hasten.errors import HastenError
from hasten.formats.pictures import drawn, new_figure, write_png
from hasten.nn import Choice, Range
from hasten.nn.protocols import GeneratesWeights

_LARGEST_RATIO = 10  # between the weights of two inputs, beyond which training them together is hard
_DEAD_PROBES = 2


class MagnitudeProbe(Callback):
    """Measure how large the weights are that a hypernetwork generates, over the range of each of its inputs.

    An ordinary hypernetwork starts with weights in proportion to its input, and trains slowly or not at all; with MIP
    they have one size (arXiv:2304.07645). The probe serves any module that holds a ``HyperModel``. It sweeps one input
    at a time, in all its dimensions together, the others in the middle of their ranges, and logs for what is generated,
    ``delta``, and for the weights with it, ``theta``:

    - ``mip/delta_norm@<input>``: the norm over all tensors, a mean over the sweep;
    - ``mip/delta_slope@<input>``: that of log norm over log input: 1 is proportional, 0 invariant;
    - ``mip/delta_r@<input>``: Pearson's correlation of norm and input;
    - ``mip/delta_ratio@<input>``: the largest norm divided by the smallest;
    - ``mip/grad_cv``: the standard deviation, divided by the mean, of the norms of the hypernetwork's gradient at the
      steps since the last probe, each of which had inputs of its own.

    Input means its place in the range, 0 to 1, as the hypernetwork is told it; a choice has neither slope nor
    correlation. What cannot be a number, the ratio to a norm of 0, is left out.

    Args:
        n_points: values of an input in a sweep, >= 2; a choice has all its own.
        every_n_steps: optimizer steps between two probes, >= 1; the first is before training, the last at its end.
        per_tensor: write and plot each tensor as well.
        alarm: warn where everything generated is exactly 0 at two successive probes after step 0, and where the weights
            at one end of a sweep are more than 10 times as large as at another.
        folder: gets ``magnitude.csv`` and ``magnitude_<input>.png``, norms before training and now, which also goes to
            Weights & Biases or TensorBoard where that logger is on; None: nothing is drawn.

    Raises:
        ValueError: for a number out of its range.
        HastenError: at the start of a fit, where the module holds no hypernetwork, or several.

    Source: the proportionality of hypernetworks, MIP, arXiv:2304.07645.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[MagnitudeProbe(every_n_steps=100)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        *,
        n_points: int = 20,
        every_n_steps: int = 200,
        per_tensor: bool = True,
        alarm: bool = True,
        folder: str | Path | None = None,
    ) -> None:
        for name, value, least in (("n_points", n_points, 2), ("every_n_steps", every_n_steps, 1)):
            if value < least:
                raise ValueError(f"magnitude_probe: {name}: expected >= {least}, got {value}")
        self.n_points = n_points
        self.every_n_steps = every_n_steps
        self.per_tensor = per_tensor
        self.alarm = alarm
        self.folder = None if folder is None else Path(folder)
        self._model: GeneratesWeights | None = None
        self._forget()

    def _forget(self) -> None:
        self._before: dict[str, dict[str, list[float]]] = {}  # the first probe: input -> delta or theta -> norms
        self._dead = 0  # successive probes that found nothing generated
        self._warned: set[str] = set()
        self._probed_at = -1
        self._gradients: list[Tensor] = []  # norms, one a step, since the last probe

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()  # the callback may have served another fit; a checkpoint is loaded after this

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model = _found(pl_module)  # not in setup: by now configure_model has built what it builds

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._model = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._model = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._before:
            self._probe(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for p in cast(GeneratesWeights, self._model).hyper.parameters() if p.grad is not None]
        if gradients:
            self._gradients.append(get_total_norm(gradients).detach())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._probe(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before, "dead": self._dead}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._dead = state_dict["before"], state_dict["dead"]

    # ------------------------------------------------------------------ one probe

    def _probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step == self._probed_at:
            return  # a batch of an accumulated step, or the last step
        self._probed_at = step
        # on every process, though one writes: a sharded model generates together or not at all
        # without autocast: what is measured is what the weights generate, not how bfloat16 rounds it
        with sampling(trainer, pl_module), torch.autocast(pl_module.device.type, enabled=False):
            sweeps = list(_sweeps(cast(GeneratesWeights, self._model), self.n_points))
        metrics = {name: value for sweep in sweeps for name, value in sweep.metrics().items()} | self._gradient_cv()
        publish(trainer, {name: value for name, value in metrics.items() if math.isfinite(value)})
        if self.alarm:
            self._watch(step, sweeps)
        begins = not self._before
        if begins:
            self._before = {sweep.name: {kind: sweep.norms(kind).tolist() for kind in _KINDS} for sweep in sweeps}
        if self.folder is not None and trainer.is_global_zero:
            self._write(self.folder / "magnitude.csv", step, sweeps, begins)
            for sweep in sweeps:
                picture = self._picture(step, sweep)
                write_png(picture, self.folder / f"magnitude_{sweep.name}.png")
                log_image(trainer, f"magnitude_{sweep.name}", picture, step)

    def _gradient_cv(self) -> dict[str, float]:
        norms, self._gradients = self._gradients, []
        if len(norms) < 2:
            return {}
        stacked = torch.stack(norms)
        return {"mip/grad_cv": float(stacked.std() / stacked.mean())}

    def _watch(self, step: int, sweeps: list["_Sweep"]) -> None:
        if step > 0:
            self._dead = self._dead + 1 if not any(sweep.norms("delta").any() for sweep in sweeps) else 0
        if self._dead >= _DEAD_PROBES:
            self._warn(
                "dead",
                f"magnitude_probe: the hypernetwork has generated exactly 0 up to step {step}; expected it to learn: "
                "look for two factors of a product that both start at 0, or for a learning rate of 0",
            )
        for sweep in sweeps:
            if (ratio := sweep.ratio("theta")) > _LARGEST_RATIO:
                self._warn(
                    sweep.name,
                    f"magnitude_probe: {sweep.name}: expected weights of about one size over its range, got the "
                    f"largest {ratio:.0f} times the smallest at step {step}; use encoding='cos_sin' and residual=True",
                )

    def _warn(self, about: str, line: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            rank_zero_warn(line)

    # ------------------------------------------------------------------ files

    def _write(self, path: Path, step: int, sweeps: list["_Sweep"], begins: bool) -> None:
        """Add a row for every value of every input, and for every tensor."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w" if begins else "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if begins:
                writer.writerow(["step", "input", "value", "tensor", "delta_norm", "theta_norm"])
            for sweep in sweeps:
                columns = {"all": (sweep.norms("delta"), sweep.norms("theta"))}
                if self.per_tensor:
                    columns |= {t: (sweep.delta[:, i], sweep.theta[:, i]) for i, t in enumerate(sweep.tensors)}
                for tensor, (delta, theta) in columns.items():
                    for label, d, t in zip(sweep.labels, delta.tolist(), theta.tolist(), strict=True):
                        writer.writerow([step, sweep.name, label, tensor, d, t])

    def _picture(self, step: int, sweep: "_Sweep") -> Tensor:
        """Norms over one input before training and now, and those of each tensor: (3, H, W) in [0, 1]."""
        figure = new_figure(4.2 * (2 + self.per_tensor), 3.6)
        panels = figure.subplots(1, 2 + self.per_tensor)
        for panel, kind, title in zip(panels, _KINDS, ("what is generated", "the weights with it"), strict=False):
            before = self._before.get(sweep.name, {}).get(kind)
            if before is not None and len(before) == len(sweep.place):
                panel.plot(sweep.place, before, "--", color="grey", label="before training")
            panel.plot(sweep.place, sweep.norms(kind), "-o", markersize=3, label=f"step {step}")
            panel.set_title(f"norm of {title}", fontsize=10)
            panel.legend(frameon=False, fontsize=8)
        if self.per_tensor:
            for i, tensor in enumerate(sweep.tensors):
                panels[2].plot(sweep.place, sweep.delta[:, i], label=tensor)
            panels[2].set_title("of what is generated, by tensor", fontsize=10)
            if len(sweep.tensors) <= 10:
                panels[2].legend(frameon=False, fontsize=8)
        few = range(0, len(sweep.labels), max(1, len(sweep.labels) // 5))
        for panel in panels:
            panel.set_ylim(bottom=0)
            panel.set_xlabel(sweep.name)
            panel.set_xticks([sweep.place[i] for i in few], [sweep.labels[i] for i in few])
        return drawn(figure)


# ------------------------------------------------------------------ a sweep

_KINDS = ("delta", "theta")


@dataclass(frozen=True)
class _Sweep:
    """The norms of T tensors at the n values of one input, the others in the middle of their ranges.

    Args:
        name: of the input.
        place: of each value in its range, in (0, 1); the position of a choice.
        labels: the values as a person reads them.
        ordered: whether one value is more than another.
        tensors: names.
        delta: (n, T).
        theta: (n, T).
    """

    name: str
    place: list[float]
    labels: list[str]
    ordered: bool
    tensors: list[str]
    delta: Tensor
    theta: Tensor

    def norms(self, kind: str) -> Tensor:
        """Over all tensors together, (n,)."""
        return (self.delta if kind == "delta" else self.theta).norm(dim=1)

    def ratio(self, kind: str) -> float:
        norms = self.norms(kind)
        return float(norms.max() / norms.min())

    def metrics(self) -> dict[str, float]:
        """Names as they are logged; NaN or infinite where there is no such number."""
        found = {}
        for kind in _KINDS:
            norms = self.norms(kind)
            found[f"mip/{kind}_norm@{self.name}"] = float(norms.mean())
            found[f"mip/{kind}_ratio@{self.name}"] = self.ratio(kind)
            if self.ordered:
                place = torch.tensor(self.place, dtype=norms.dtype)
                found[f"mip/{kind}_slope@{self.name}"] = _slope(place.log(), norms.log())
                found[f"mip/{kind}_r@{self.name}"] = float(torch.corrcoef(torch.stack([place, norms]))[0, 1])
        return found


def _slope(x: Tensor, y: Tensor) -> float:
    """Of the straight line through points (n,) with the least squared error."""
    centred = x - x.mean()
    return float(centred @ y / (centred @ centred))


def _sweeps(model: GeneratesWeights, n: int) -> Iterator[_Sweep]:
    inputs = model.encoding.inputs
    middle = {name: _at(given, 0.5) for name, given in inputs.items()}
    for name, given in inputs.items():
        if isinstance(given, Choice):
            place, values = list(map(float, range(len(given.values)))), list(torch.arange(len(given.values)))
            labels = list(map(str, given.values))
        else:
            # between the ends: at the lower one what is proportional is 0, whose logarithm is none
            place = [(k + 0.5) / n for k in range(n)]
            values = [_at(given, z) for z in place]
            labels = [f"{value.flatten()[0].item():.4g}" for value in values]
        delta, theta, tensors = [], [], []
        for value in values:
            at = middle | {name: value}
            deltas = model.delta(**at)
            tensors = list(deltas)
            delta.append(_norms(deltas))
            theta.append(_norms(model.generate(**at)))
        ordered = isinstance(given, Range)
        yield _Sweep(name, place, labels, ordered, tensors, torch.stack(delta).cpu(), torch.stack(theta).cpu())


def _at(given: Range | Choice, z: float) -> Tensor:
    """The value at z in [0, 1] of a range, in all its dimensions; of a choice the first."""
    if isinstance(given, Choice):
        return torch.tensor(0)
    return replace(given, sampler=lambda shape, _: torch.full(shape, z)).sample()


def _norms(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([tensor.double().norm() for tensor in tensors.values()])


def _found(pl_module: LightningModule) -> GeneratesWeights:
    """The one module in ``pl_module`` that generates weights."""
    found = {
        name: module
        for name, module in pl_module.named_modules()
        if not hasattr(module, "_orig_mod")  # torch.compile(model) answers for what it holds
        and all(callable(getattr(module, method, None)) for method in ("delta", "generate"))
        and all(hasattr(module, part) for part in ("encoding", "hyper"))
    }
    if len(found) != 1:
        raise HastenError(
            f"magnitude_probe: {type(pl_module).__name__}: expected one HyperModel in it, got "
            f"{', '.join(found) or 'none'}; make one with hasten.nn.hypernetize, or leave MagnitudeProbe out"
        )
    return cast(GeneratesWeights, next(iter(found.values())))
