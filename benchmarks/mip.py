"""MIP beside ordinary hypernetworks: one classifier for every rotation of images, by momentum SGD and by Adam.

    python benchmarks/mip.py                     # all variants, two rates an optimizer, ten seeds; no download
    python benchmarks/mip.py --data FOLDER       # images with train/ and test/, e.g. CIFAR-10, at 16x16; three seeds
    python benchmarks/mip.py --variants mip,default --seeds 0

A step trains on 64 images, all turned by one angle drawn from 0 to 180 degrees, which the hypernetwork is told; now and
then the held-out images are classified at nine angles: digits of 8x8 for 500 steps, photographs for 1,000. All variants
of a seed share the network's initial weights, the images and the angles, which are functions of (seed, step); those
without a theta0 set the network's weights to 0. The variants:

    default          no encoding, no theta0: weights in proportion to the angle
    encoding_only    E of constant norm, no theta0
    residual_only    theta0, no encoding
    mip              both
    torch_init       the default with torch's own initialisation, in which the head's bias is a theta0 by chance
    mip_basis8       mip with the basis head, K = 8
    plain            the network alone, which is never told the angle

The last table sets the variants beside mip seed by seed: the mean difference of their losses and its 95 % interval, by
Student's t of the paired differences. Where that holds 0, the two are not told apart.

About half an hour on two idle cores: two runs at a time, a process and a thread each (--workers). A run is written as
soon as it is finished, and the same command goes on from there (--fresh begins anew).

--check exits with 1 where one of the two claims that hold at both rates of an optimizer is not shown by every seed:
momentum SGD leaves the default at chance while mip trains; Adam trains both, and mip's mean loss is the lower. On the
digits mip must be at 50 % by step 260 under SGD 0.03, and at 85 % in the end under Adam 2e-3. Nothing is asserted of
encoding_only, residual_only and mip among each other: the table says what can be.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    Images,
    Results,
    argument_parser,
    command,
    data_name,
    load_images,
    markdown_table,
    progress_bar,
    result_path,
    to_float,
)
from scipy.stats import ttest_rel
from torch import Generator, Tensor, nn

from hasten.formats import whole_file
from hasten.modules.hypernet_tasks import rotated
from hasten.nn import hypernetize

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"encoding": None, "residual": False},
    "encoding_only": {"residual": False},
    "residual_only": {"encoding": None},
    "mip": {},
    "torch_init": {"encoding": None, "residual": False},
    "mip_basis8": {"head": "basis"},
    "plain": {},
}
OPTIMIZERS: dict[str, tuple[str, float]] = {
    "SGD 0.03": ("sgd", 0.03),
    "SGD 0.1": ("sgd", 0.1),
    "Adam 2e-3": ("adam", 2e-3),
    "Adam 5e-3": ("adam", 5e-3),
}
CLAIM = "cross-entropy, mean over nine angles"
CHANCE = math.log(10)
ANGLES = torch.linspace(0, 180, 9)


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        side: H = W of the images.
        steps: of training, ``batch`` images each.
        every: steps between two evaluations.
        held_out: images that are classified.
        widths: of the network's convolutions.
        target: the accuracy, a mean over the angles, to which steps are counted.
        trained: the accuracy at which ``--check`` calls a network trained.
    """

    side: int
    steps: int
    batch: int
    every: int
    held_out: int
    widths: tuple[int, int, int]
    target: float
    trained: float


DIGITS = Sizes(8, steps=500, batch=64, every=20, held_out=400, widths=(16, 32, 32), target=0.8, trained=0.5)
FOLDER = Sizes(16, steps=1000, batch=64, every=50, held_out=1000, widths=(16, 32, 32), target=0.3, trained=0.25)
ACCEPTED = {"digits": (260, 0.85)}
"""By which step mip under SGD 0.03 must be trained, and its last accuracy under Adam 2e-3, where that was agreed."""
DRY_RUN = Sizes(8, steps=4, batch=8, every=2, held_out=8, widths=(4, 4, 4), target=0.8, trained=0.5)


# ---------------------------------------------------------------------- measuring


def network(seed: int, channels: int, widths: tuple[int, int, int]) -> nn.Sequential:
    """The classifier, (B, C, H, W) -> (B, 10), with kernels drawn by Kaiming's rule, fan-in."""
    first, second, third = widths
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(second, third, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(third, 10),
        )
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return net


def build(variant: str, seed: int, channels: int, widths: tuple[int, int, int]) -> nn.Module:
    """What is trained; the hypernetworks take the angle by name."""
    net = network(seed, channels, widths)
    if variant == "plain":
        return _Deaf(net)
    generator = Generator().manual_seed(seed)
    hyper = hypernetize(net, {"angle": (0, 180)}, generator=generator, **VARIANTS[variant])
    if variant == "torch_init":
        _initialize_as_torch_does(hyper, seed)
    return hyper


class _Deaf(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, angle: Tensor) -> Tensor:
        return self.net(images)


@torch.no_grad()
def _initialize_as_torch_does(hyper: Any, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in hyper.hyper.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        bound = 1 / math.sqrt(hyper.hyper.head.in_features)  # of the bias that torch's head would have
        for name in hyper.names:
            hyper.model.get_parameter(name).uniform_(-bound, bound)


def optimizer_for(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """The optimizer of this name in OPTIMIZERS, without weight decay."""
    kind, lr = OPTIMIZERS[name]
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr)
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True)


@lru_cache(maxsize=1)
def images_of(data: str, side: int) -> Images:
    """Read once a process: photographs take half a minute."""
    return load_images(data, side)


def train(variant: str, optimizer: str, seed: int, data: str, sizes: Sizes) -> dict[str, Any]:
    """One run: its row, with the accuracy after every so many steps and the loss at each angle."""
    torch.set_num_threads(1)
    loaded = images_of(data, sizes.side)
    images, labels = loaded.train, loaded.train_labels
    held_out = to_float(loaded.held_out[: sizes.held_out]), loaded.held_out_labels[: sizes.held_out]
    model = build(variant, seed, loaded.shape[0], sizes.widths)
    stepped = optimizer_for(model, optimizer)
    generator = Generator()
    curve: list[tuple[int, float]] = []
    losses = torch.full_like(ANGLES, CHANCE)
    for step in range(1, sizes.steps + 1):
        generator.manual_seed(1_000_003 * seed + step)
        index = torch.randint(len(images), (sizes.batch,), generator=generator)
        angle = 180 * torch.rand((), generator=generator)
        x, y = rotated((to_float(images[index]), labels[index]), angle)
        loss = F.cross_entropy(model(x, angle=angle), y)
        stepped.zero_grad()
        loss.backward()
        stepped.step()
        if step % sizes.every == 0:
            losses, accuracy = evaluate(model, held_out)
            curve.append((step, accuracy))
    value = float(losses.mean())
    return {
        "claim": CLAIM,
        "arm": f"{variant}, {optimizer}",
        "seed": seed,
        "value": value if math.isfinite(value) else None,
        "unit": "nats",
        "variant": variant,
        "optimizer": optimizer,
        "accuracy": curve[-1][1],
        "steps_to_target": next((step for step, accuracy in curve if accuracy >= sizes.target), None),
        "by_angle": [loss if math.isfinite(loss) else None for loss in losses.tolist()],
        "curve": curve,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


@torch.no_grad()
def evaluate(model: nn.Module, held_out: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    """The cross-entropy at each of ANGLES, and the accuracy over all of them."""
    losses, right = [], []
    for angle in ANGLES:
        x, y = rotated(held_out, angle)
        logits = model(x, angle=angle)
        losses.append(F.cross_entropy(logits, y))
        right.append((logits.argmax(1) == y).float().mean())
    return torch.stack(losses), float(torch.stack(right).mean())


# ---------------------------------------------------------------------- the report


def runs(results: Results, variant: str, optimizer: str) -> list[dict[str, Any]]:
    """The rows of a variant by seed."""
    return sorted(results.select(claim=CLAIM, variant=variant, optimizer=optimizer), key=lambda row: row["seed"])


def variants_of(results: Results) -> list[str]:
    """The variants that were measured, in the order of VARIANTS."""
    found = {row["variant"] for row in results.rows}
    return [variant for variant in VARIANTS if variant in found]


def report(results: Results) -> str:
    """All that was measured, as Markdown: losses, accuracies, steps to the target, what is told apart from mip."""
    tables = []
    target = results.protocol["sizes"]["target"]
    for title, cell in (
        (CLAIM, lambda rows: _every([row["value"] for row in rows], ".2f")),
        ("accuracy, mean over nine angles", lambda rows: _every([row["accuracy"] for row in rows], ".2f")),
        (f"steps to {target:.0%}", lambda rows: ", ".join(str(row["steps_to_target"] or "never") for row in rows)),
    ):
        lines = [
            [variant, *(cell(runs(results, variant, optimizer)) for optimizer in OPTIMIZERS)]
            for variant in variants_of(results)
        ]
        tables.append(markdown_table([title, *OPTIMIZERS], lines))
    lines = [
        [variant, *(_beside_mip(results, variant, optimizer) for optimizer in OPTIMIZERS)]
        for variant in variants_of(results)
        if variant != "mip"
    ]
    tables.append(markdown_table([f"{CLAIM}, less mip's", *OPTIMIZERS], lines))
    return "\n\n".join(
        [*tables, f"Means, in brackets every seed, or the 95 % interval of the mean. Chance: {CHANCE:.2f} and 0.10."]
    )


def _beside_mip(results: Results, variant: str, optimizer: str) -> str:
    """The mean of a variant's loss less mip's of the same seed, and its 95 % interval; above 0, mip is better."""
    of_variant, of_mip = (
        {row["seed"]: row["value"] for row in runs(results, v, optimizer) if row["value"] is not None}
        for v in (variant, "mip")
    )
    seeds = sorted(of_variant.keys() & of_mip.keys())
    if len(seeds) < 2:
        return ""
    mine, mips = ([values[seed] for seed in seeds] for values in (of_variant, of_mip))
    low, high = ttest_rel(mine, mips).confidence_interval()
    return f"{statistics.fmean(mine) - statistics.fmean(mips):+.3f} ({low:+.3f} to {high:+.3f}, n = {len(seeds)})"


def _every(values: Sequence[float | None], form: str) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "diverged" if values else ""
    mean = format(statistics.fmean(numbers), form) if len(numbers) == len(values) else "diverged"
    each = ", ".join("-" if value is None else format(value, form) for value in values)
    return f"{mean} ({each})" if len(values) > 1 else mean


def failures(results: Results) -> list[str]:
    """What the measurement fails to show, a line each."""
    found = []
    trained = results.protocol["sizes"]["trained"]
    by_step, accuracy = ACCEPTED.get(results.protocol["data"], (None, 0.0))
    for optimizer, (kind, _) in OPTIMIZERS.items():
        pairs = {v: {row["seed"]: row for row in runs(results, v, optimizer)} for v in ("default", "mip")}
        seeds = sorted(pairs["default"].keys() & pairs["mip"].keys())
        if not seeds:
            return [f"check: expected the variants default and mip with {optimizer}; run them first"]
        for seed in seeds:
            default, mip = pairs["default"][seed], pairs["mip"][seed]
            where = f"{optimizer}, seed {seed}"
            if kind == "sgd" and not (default["accuracy"] <= 0.15 and mip["accuracy"] >= trained):
                found.append(
                    f"{where}: expected accuracies of at most 0.15 for default and at least {trained} for mip, got "
                    f"{default['accuracy']:.2f} and {mip['accuracy']:.2f}"
                )
            reached = next((step for step, share in mip["curve"] if share >= trained), math.inf)
            if optimizer == "SGD 0.03" and by_step is not None and reached > by_step:
                found.append(f"{where}: expected mip at {trained} by step {by_step}, got it by step {reached}")
            if optimizer == "Adam 2e-3" and mip["accuracy"] < accuracy:
                found.append(f"{where}: expected an accuracy of {accuracy} for mip, got {mip['accuracy']:.2f}")
            if kind == "adam" and min(default["accuracy"], mip["accuracy"]) < trained:
                found.append(
                    f"{where}: expected default and mip to train, got accuracies of {default['accuracy']:.2f} and "
                    f"{mip['accuracy']:.2f}"
                )
        if kind == "adam" and not _mean_loss(pairs["mip"], seeds) < _mean_loss(pairs["default"], seeds):
            found.append(
                f"{optimizer}: expected a lower mean loss for mip than for default, got "
                f"{_mean_loss(pairs['mip'], seeds):.2f} and {_mean_loss(pairs['default'], seeds):.2f}"
            )
    return found


def _mean_loss(rows: dict[int, dict[str, Any]], seeds: Sequence[int]) -> float:
    return statistics.fmean(math.inf if rows[seed]["value"] is None else rows[seed]["value"] for seed in seeds)


def plot(results: Results, title: str, path: Path) -> None:
    """Show the accuracy over the steps, a panel an optimizer and rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(OPTIMIZERS), figsize=(16, 4.2), sharey=True, layout="constrained")
    for axes, optimizer in zip(panels, OPTIMIZERS, strict=True):
        for i, variant in enumerate(variants_of(results)):
            curves = [row["curve"] for row in runs(results, variant, optimizer)]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=f"C{i}", alpha=0.3, linewidth=0.8)
            if curves:
                steps = [step for step, _ in curves[0]]
                means = [statistics.fmean(a for _, a in points) for points in zip(*curves, strict=True)]
                axes.plot(steps, means, color=f"C{i}", linewidth=2, label=variant)
        axes.axhline(0.1, color="grey", linestyle=":", linewidth=1)
        axes.set_title(optimizer, fontsize=10)
        axes.set_xlabel("steps")
    panels[0].set_ylabel("held-out accuracy, mean over nine angles")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{title} turned by 0 to 180 degrees (thin: seeds, bold: means)")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not in the result file yet, and print all of it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/ or val/")
    parser.add_argument("--variants", type=_names, default=list(VARIANTS), help="some of " + ", ".join(VARIANTS))
    parser.add_argument("--seeds", type=_numbers, help="default: 0 to 9; of a folder 0,1,2")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a process and a thread each")
    options = parser.parse_args(arguments)
    digits = options.data == "digits"
    sizes = DRY_RUN if options.dry_run else DIGITS if digits else FOLDER
    seeds: list[int] = options.seeds or list(range(10 if digits else 3))
    name = data_name(options.data)
    protocol = {"data": name, "sizes": asdict(sizes), "angles": ANGLES.tolist()}
    path = result_path(options, f"mip_convergence_{name}")
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)
    done = {(row["variant"], row["optimizer"], row["seed"]) for row in results.rows}
    # seed by seed: what is finished first can be compared
    variants: list[str] = options.variants
    wanted = [(variant, optimizer, seed) for seed in seeds for optimizer in OPTIMIZERS for variant in variants]
    missing = [run for run in wanted if run not in done]
    with progress_bar() as progress:
        task = progress.add_task("runs", total=len(missing))
        for row in _measured(missing, options.data, sizes, options.workers):
            results.add(row)
            progress.advance(task)
    print(report(results))
    plot(results, f"{name} at {sizes.side}x{sizes.side}", path.with_suffix(".png"))
    if options.check and (failed := failures(results)):
        raise SystemExit("\n".join(failed))


def _measured(
    missing: Iterable[tuple[str, str, int]], data: str, sizes: Sizes, workers: int
) -> Iterator[dict[str, Any]]:
    if workers == 1:
        yield from (train(*run, data, sizes) for run in missing)
        return
    # processes: a step of so small a network is mostly Python, of which a process runs one thread at a time
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train, *run, data, sizes) for run in missing]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
