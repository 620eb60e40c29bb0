"""What a run costs, as figures and as a person reads them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hasten.memory import as_size


@dataclass(frozen=True)
class Cost:
    """What one fit and its test cost here; times are of this machine, numbers of the whole run.

    Attributes:
        device: the kind it was measured on.
        parameters: of the module.
        trainable: of these.
        flops: of an optimizer step, on average, forward and backward, of matrix products, convolutions and what is
            registered; None where it could not be counted.
        memory_bytes: on CUDA the most that was allocated; on the CPU by how much the process grew; None where the
            system does not say.
        steps: optimizer steps; inf without an end.
        step_s: of one, on average, its data included.
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
        beside += ", without the tools named above" if any(each.cost and each.cost.tools for each in left) else ""
        blocks.append(f"all together  {_duration(known)}{beside}")
    return "\n\n".join(blocks)


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
        yield "memory", f"{as_size(cost.memory_bytes)} {of}"
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
