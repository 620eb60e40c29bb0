"""Three ways to the gradients of trajectory matching: time of an iteration, peak memory, rounding, and TESLA's bias.

    python benchmarks/unrolls.py                    # on the GPU if there is one, else one CPU core; 15 minutes
    python benchmarks/unrolls.py --device cpu

An iteration is 20 steps of SGD of a ConvNet-3 of width 128 on synthetic images of 32 x 32 and 10 classes, each under a
draw of DSA, the matching loss without the quarter of the parameters that is matched best, and its gradients for images,
label logits and step size. One or ten images a class, all of them in every step.

    sweep   matching_gradients, exact: each step's graph is built again on the way back
    full    unrolled_matching_gradients, exact: the graph of all steps at once
    tesla   tesla_matching_gradients: every step's parameters held constant

Arms take turns; the times are the medians of this process's, in one thread. Extra memory is the peak over the inputs of
one iteration: on a CPU of the resident set, in a fresh process for each arm, on a GPU of what torch's allocator hands
out. Beside it stands what estimated_bytes said before.

Errors and TESLA's bias are at one image a class, on an expert's way: digits enlarged to the same size, 20 steps of SGD
from the start to the target, labels the expert's logits. An error is relative to the full unroll in float64, by norms;
TF32 is off. In float32 sweep and full are off alike: by 1e-6 as long as no ReLU rounds to the other side of zero, by a
few percent of the images' gradient after some did. TESLA's gradients are compared by cosine for images and labels, and
by quotient for the step size.

--check exits with 1 where the sweep in float64 differs by 1e-9 from the full unroll; on a CPU also where, at one image
a class, the sweep's extra memory is more than 30% of the full unroll's or its time more than 1.4 times; and where an
estimate of memory is 40% off.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Results, argument_parser, command, load_images, markdown_table, result_path, to_float
from timing import Work, extra_memory, in_turns
from torch import Tensor

from hasten.functional import (
    InnerStep,
    Matching,
    estimated_bytes,
    loss_quantile_keep,
    matching_gradients,
    soft_cross_entropy,
    step_bytes,
    tesla_matching_gradients,
    unrolled_matching_gradients,
)
from hasten.functional.dsa import DSA_OPS, dsa, dsa_draw
from hasten.nn import ConvNet, FlatModel

GRADIENTS: dict[str, Callable[..., Matching]] = {
    "sweep": matching_gradients,
    "full": unrolled_matching_gradients,
    "tesla": tesla_matching_gradients,
}
TIME, MEMORY, ESTIMATE = "time", "extra memory", "estimated memory"
ERROR, BIAS = "error", "tesla against sweep"
LEARNED = ("images", "labels", "lr")
CLASSES, CHANNELS = 10, 3
DROP = 0.25
EXPERT_LR, EXPERT_BATCH = 0.01, 50
MEMORY_SHARE, TIME_RATIO, EXACT, ESTIMATE_OFF = 0.3, 1.4, 1e-9, 0.4


@dataclass(frozen=True)
class Setting:
    """An iteration: images a class, the student, its steps."""

    ipc: int
    image_size: int = 32
    depth: int = 3
    width: int = 128
    syn_steps: int = 20

    @property
    def name(self) -> str:
        return f"IPC {self.ipc}, ConvNet-{self.depth} w{self.width}, {self.image_size} px, {self.syn_steps} steps"


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    settings: tuple[Setting, ...] = (Setting(1), Setting(10))
    repeats: tuple[int, ...] = (7, 1)  # of each setting
    seeds: tuple[int, ...] = (0, 1, 2)
    expert_steps: int = 20


TINY = Setting(1, image_size=8, depth=1, width=4, syn_steps=2)
GPU = Sizes(settings=(Setting(1), Setting(10), Setting(1, image_size=128, depth=5)), repeats=(10, 5, 5))
DRY_RUN = Sizes(
    settings=(Setting(2, image_size=16, depth=2, width=16, syn_steps=4),), repeats=(1,), seeds=(0, 1), expert_steps=2
)


class Problem(NamedTuple):
    """What the three functions take."""

    step_loss: Callable[..., Tensor]
    start: Tensor
    target: Tensor
    images: Tensor
    labels: Tensor
    lr: Tensor
    steps: list[InnerStep]

    def double(self) -> "Problem":
        return self._replace(**{name: getattr(self, name).double() for name in self._fields[1:6]})


def draw(setting: Setting, device: str, seed: int = 0) -> Problem:
    """Noise for images, and a target near the start; always the same."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = ConvNet(CHANNELS, setting.image_size, CLASSES, width=setting.width, depth=setting.depth)
    flat = FlatModel(net)
    start = flat.flatten(net)
    n, size = CLASSES * setting.ipc, setting.image_size
    steps = [
        InnerStep(torch.arange(n, device=device), dsa_draw(DSA_OPS, n, size, generator=generator))
        for _ in range(setting.syn_steps)
    ]
    return Problem(
        partial(step_loss, flat),
        start.to(device),
        (start + 0.01 * torch.randn(start.shape, generator=generator)).to(device),
        torch.randn(n, CHANNELS, size, size, generator=generator).to(device),
        torch.randn(n, CLASSES, generator=generator).to(device),
        torch.tensor(0.01, device=device),
        steps,
    )


def step_loss(flat: FlatModel, theta: Tensor, images: Tensor, labels: Tensor, draw: Any) -> Tensor:
    """What the student descends on."""
    return soft_cross_entropy(flat(theta, dsa(images, draw)), labels)


def on_an_experts_way(setting: Setting, expert_steps: int, device: str, seed: int) -> Problem:
    """The same with digits, and with start, target and labels of an expert that is trained on them."""
    noise = draw(setting, device, seed)
    data = load_images("digits", setting.image_size).to(torch.device(device))
    real = F.interpolate(to_float(data.train).expand(-1, CHANNELS, -1, -1), size=setting.image_size, mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(real), generator=generator).to(device)
    chosen = torch.cat([order[data.train_labels[order] == k][: setting.ipc] for k in range(CLASSES)])
    flat = noise.step_loss.args[0]  # type: ignore[attr-defined]
    net = flat.filled(noise.start)
    optimizer = torch.optim.SGD(net.parameters(), EXPERT_LR)
    points = []
    for _ in range(2):  # what comes before the start, and from there to the target
        for _ in range(expert_steps):
            rows = torch.randint(len(real), (EXPERT_BATCH,), generator=generator).to(device)
            optimizer.zero_grad()
            F.cross_entropy(net(real[rows]), data.train_labels[rows]).backward()
            optimizer.step()
        points.append(flat.flatten(net))
    with torch.no_grad():
        labels = net(real[chosen])
    return noise._replace(start=points[0], target=points[1], images=real[chosen], labels=labels)


def build(arm: str, setting: Setting, device: str) -> Work:
    """The work of an iteration, by names, as another process has to be told."""
    return partial(_iteration, arm, draw(setting, device))


def _iteration(arm: str, problem: Problem) -> Matching:
    return GRADIENTS[arm](*problem, mask=partial(loss_quantile_keep, drop=DROP))


# ---------------------------------------------------------------------- measuring


def measure(setting: Setting, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Times, memory and its estimate of all arms at a setting."""
    problem = draw(setting, device.type)
    times = in_turns({arm: partial(_iteration, arm, problem) for arm in GRADIENTS}, device, repeats=repeats)
    rows = [{"claim": claim(TIME, setting), "arm": arm, **time.row()} for arm, time in times.items()]
    saved = step_bytes(problem.step_loss, problem.start, problem.images, problem.labels, problem.steps[0].draw)
    for arm, gradients in GRADIENTS.items():
        used = extra_memory(build, (arm, setting, device.type), warm_up=(arm, TINY, device.type), device=device)
        expected = estimated_bytes(gradients, saved=saved, numel=len(problem.start), steps=len(problem.steps)) / 1e6
        if used is not None:
            rows.append({"claim": claim(MEMORY, setting), "arm": arm, "value": used, "unit": "MB, peak"})
        rows.append({"claim": claim(ESTIMATE, setting), "arm": arm, "value": expected, "unit": "MB"})
    return rows


def accuracy(setting: Setting, expert_steps: int, device: torch.device, seed: int) -> list[dict[str, Any]]:
    """How far each arm's gradients are from the full unroll in float64, and where TESLA's point."""
    problem = on_an_experts_way(setting, expert_steps, device.type, seed)
    exact = _iteration("full", problem.double())
    found = {arm: _iteration(arm, problem) for arm in GRADIENTS}
    found["sweep, float64"] = _iteration("sweep", problem.double())
    rows = []
    for arm, matching in found.items():
        errors = {name: _error(getattr(matching, name), getattr(exact, name)) for name in LEARNED}
        row = {"claim": ERROR, "arm": arm, "seed": seed, "value": max(errors.values()), "unit": "relative error"}
        rows.append({**row, "errors": errors})
    for name in ("images", "labels"):
        ours, theirs = (getattr(m, name).double().flatten() for m in (exact, found["tesla"]))
        cosine = F.cosine_similarity(ours, theirs, dim=0).item()
        rows.append({"claim": BIAS, "arm": name, "seed": seed, "value": cosine, "unit": "cosine"})
    quotient = (found["tesla"].lr / exact.lr).item()
    rows.append({"claim": BIAS, "arm": "lr", "seed": seed, "value": quotient, "unit": "quotient"})
    return rows


def claim(what: str, setting: Setting) -> str:
    """What a row is about."""
    return f"{what}, {setting.name}"


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


# ---------------------------------------------------------------------- the report


def report(results: Results, sizes: Sizes) -> str:
    """What was measured, as Markdown."""
    tables = []
    for setting in sizes.settings:
        times = {row["arm"]: row["median"] / 1e3 for row in results.select(claim=claim(TIME, setting))}
        memory, estimates = (values(results, claim(what, setting)) for what in (MEMORY, ESTIMATE))
        lines = [
            [
                arm,
                f"{times[arm]:.3g}",
                f"{times[arm] / times['full']:.2f}",
                *([f"{memory[arm]:.0f}", f"{memory[arm] / memory['full']:.0%}"] if memory.get("full") else ["", ""]),
                f"{estimates[arm]:.0f}",
            ]
            for arm in times
        ]
        header = [setting.name, "time, s", "of full", "extra memory, MB", "of full", "estimated, MB"]
        tables.append(markdown_table(header, lines))
    for what in (ERROR, BIAS):
        rows = results.select(claim=what)
        arms = dict.fromkeys(row["arm"] for row in rows)
        lines = [[arm, *(f"{row['value']:.3g}" for row in rows if row["arm"] == arm)] for arm in arms]
        tables.append(markdown_table([what, *(f"seed {seed}" for seed in sizes.seeds)], lines))
    return "\n\n".join(tables)


def values(results: Results, claim: str) -> dict[str, float]:
    """Arm -> number."""
    return {row["arm"]: row["value"] for row in results.select(claim=claim)}


def failures(results: Results, sizes: Sizes, device: torch.device) -> list[str]:
    """What the measurement fails to show, a line each."""
    found = [
        f"sweep, float64: expected the full unroll's gradients within {EXACT:g}, got {row['value']:.1e}"
        for row in results.select(claim=ERROR, arm="sweep, float64")
        if not row["value"] < EXACT
    ]
    if device.type != "cpu":
        return found
    first = sizes.settings[0]
    times = {row["arm"]: row["median"] for row in results.select(claim=claim(TIME, first))}
    memory = values(results, claim(MEMORY, first))
    if times["sweep"] > TIME_RATIO * times["full"]:
        found.append(f"sweep: expected {TIME_RATIO:g} times full's time, got {times['sweep'] / times['full']:.2f}")
    if memory and memory["sweep"] > MEMORY_SHARE * memory["full"]:
        found.append(f"sweep: expected {MEMORY_SHARE:.0%} of full's memory, got {memory['sweep'] / memory['full']:.0%}")
    for setting in sizes.settings:
        memory, estimates = (values(results, claim(what, setting)) for what in (MEMORY, ESTIMATE))
        found += [
            f"{arm}, {setting.name}: expected an estimate {ESTIMATE_OFF:.0%} off, got {estimates[arm] / used - 1:.0%}"
            for arm, used in memory.items()
            if abs(estimates[arm] / used - 1) > ESTIMATE_OFF
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything, then report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    parser.add_argument("--ipc", type=int, help="only so many images a class; with 1 it takes 4 minutes on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() and not options.dry_run else "cpu"))
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    sizes = DRY_RUN if options.dry_run else GPU if device.type == "cuda" else Sizes()
    if options.ipc is not None:
        chosen = [pair for pair in zip(sizes.settings, sizes.repeats, strict=True) if pair[0].ipc == options.ipc]
        if not chosen:
            parser.error(f"--ipc: expected one of {sorted({each.ipc for each in sizes.settings})}, got {options.ipc}")
        settings, repeats = zip(*chosen, strict=True)
        sizes = replace(sizes, settings=settings, repeats=repeats)
    protocol = {
        "device": device.type,
        "net": f"ConvNet, {CHANNELS} channels, {CLASSES} classes; float32, DSA, {DROP:g} dropped",
        "expert": f"SGD, lr {EXPERT_LR:g}, batch {EXPERT_BATCH}, digits",
        **asdict(sizes),
    }
    path = result_path(options, f"unrolls_{device.type}")
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)
    for setting, repeats in zip(sizes.settings, sizes.repeats, strict=True):
        results.add(*measure(setting, repeats, device))
    for seed in sizes.seeds:
        results.add(*accuracy(sizes.settings[0], sizes.expert_steps, device, seed))
    print(report(results, sizes))
    if options.check and (failed := failures(results, sizes, device)):
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
