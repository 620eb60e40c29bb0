"""SpeeD beside uniform timestep sampling on a CPU: the error by noise level, a Frechet distance, and the cost.

    python benchmarks/speed.py                   # digits, no download; uniform and speed, seeds 0, 1, 2
    python benchmarks/speed.py --data FOLDER     # a folder of images with train/ and test/, e.g. CIFAR-10, at 8x8
    python benchmarks/speed.py --arms all        # also speed_paper, min_snr and p2
    python benchmarks/speed.py --plain           # also a pair without the linear skip, of the first seed

About eleven minutes on two idle cores of an AMD EPYC, at 0.09 s a step: two arms at a time, a thread each (--workers).
The arms of a seed share initial weights, data order and noise: these are functions of (seed, step), so that an arm may
run alone, or again, to the same numbers. Everything but timesteps and weights is equal. An arm is written as soon as it
is finished, and the same command goes on from there (--fresh begins anew).

--check exits with 1 where sampling and weights cost 1 % of a training step or more, or where the mean over the seeds
does not show SpeeD's signature, which is a lower error than uniform's at t <= 500 and a higher one at t >= 700. It
asserts nothing about the Frechet distance.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from common import (
    Images,
    Results,
    argument_parser,
    command,
    frechet_distance_to,
    held_out_accuracy,
    load_images,
    markdown_table,
    mirrored,
    progress_bar,
    reduced_precision,
    result_path,
    to_float,
    train_classifier,
)
from diffusers import DDPMScheduler
from torch import Tensor, nn

from hasten.callbacks import EMA
from hasten.formats import whole_file
from hasten.functional import noise_zones
from hasten.modules import Diffusion
from hasten.nn import (
    ConvNet,
    LinearSkip,
    MinSNRSampler,
    P2Sampler,
    SpeeDSampler,
    TimestepSampler,
    UniformSampler,
    alphas_cumprod,
    unet,
)
from hasten.nn.weights import weight_hash

SAMPLERS: dict[str, Callable[[Any], TimestepSampler]] = {
    "uniform": UniformSampler,
    "speed": SpeeDSampler,
    "speed_paper": partial(SpeeDSampler, mode="paper"),
    "min_snr": MinSNRSampler,
    "p2": P2Sampler,
}
PLAIN = "_plain"  # what the name of an arm without the linear skip ends with
GRID = list(range(25, 1000, 50))  # where the error is measured: the midpoints of 20 equal bins of 0..1000
LOW, HIGH = [t for t in GRID if t <= 500], [t for t in GRID if t >= 700]
COST = "sampling and weights / training step"
COST_TARGET = 0.01


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    steps: int = 2000
    batch: int = 64
    widths: tuple[int, ...] = (32, 64)
    held_out: int = 256  # images at every timestep of the grid
    samples: int = 1024
    sample_steps: int = 25
    net_steps: int = 1000
    cost_repetitions: int = 150


DRY_RUN = Sizes(
    steps=4, batch=16, widths=(8, 16), held_out=16, samples=16, sample_steps=2, net_steps=4, cost_repetitions=3
)


# ---------------------------------------------------------------------- measuring


class Denoiser:
    """A network in training, with its average; what a step draws is a function of (seed, step).

    Args:
        model: predicts noise from (x, t); may be compiled.
        sampler: the timesteps and weights under test.
        images: (N, C, H, W) uint8, on the model's device.
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: TimestepSampler,
        noise_scheduler: Any,
        images: Tensor,
        *,
        lr: float,
        batch: int,
        seed: int,
        flip: bool = False,
    ) -> None:
        self.device = images.device
        self.model = model
        self.sampler = sampler.to(self.device)
        self.noise_scheduler = noise_scheduler
        self.images = images
        self.batch = batch
        self.seed = seed
        self.flip = flip
        self.steps = 0
        self.generator = self.sampler.generator = torch.Generator(self.device)
        self.parameters: list[Tensor] = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr, weight_decay=0.0)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.decay_after = EMA().decay_after

    def step(self) -> None:
        self.generator.manual_seed(1_000_003 * self.seed + self.steps)
        index = torch.randint(len(self.images), (self.batch,), generator=self.generator, device=self.device)
        x = to_float(self.images[index])
        if self.flip:
            x = mirrored(x, self.generator)
        noise = torch.randn(x.shape, generator=self.generator, device=self.device)
        t, weight = self.sampler(self.batch)  # the last draw: what it takes from the generator moves nothing else
        loss = (weight * self._mse(x, noise, t)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        decay = self.decay_after(self.steps) if self.steps else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.steps += 1

    def mse_by_timestep(self, x: Tensor, noise: Tensor) -> list[float]:
        """The average's unweighted error at every timestep of GRID, for images (n, C, H, W) in [-1, 1].

        Args:
            x: the images.
            noise: of each timestep and image, (len(GRID), n, C, H, W).
        """
        with self._averaged():
            errors = [
                torch.cat(
                    [
                        self._mse(part, eps, torch.full((len(part),), t, device=self.device))
                        for part, eps in zip(x.split(self.batch), noise[i].split(self.batch), strict=True)
                    ]
                ).mean()
                for i, t in enumerate(GRID)
            ]
        return torch.stack(errors).tolist()

    def draw(self, n: int, steps: int) -> Tensor:
        """Draw n images with the average, by DDIM with trailing timesteps, (n, C, H, W) in [-1, 1]."""
        diffusion = Diffusion(self.model, self.noise_scheduler, image_shape=self.images.shape[1:], sample_steps=steps)
        diffusion.to(self.device)
        generator = torch.Generator().manual_seed(self.seed)
        with self._averaged(), reduced_precision(self.device):
            parts = [diffusion.generate(self.batch, generator=generator) for _ in range(0, n, self.batch)]
        return torch.cat(parts)[:n]

    def _mse(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        noisy = self.noise_scheduler.add_noise(x, noise, t)
        with reduced_precision(self.device):
            prediction = self.model(noisy, t)
        prediction = getattr(prediction, "sample", prediction).float()
        return F.mse_loss(prediction, noise, reduction="none").flatten(1).mean(1)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with torch.no_grad():
            trained = [parameter.clone() for parameter in self.parameters]
            torch._foreach_copy_(self.parameters, self.average)
            self.model.eval()
            yield
            self.model.train()
            torch._foreach_copy_(self.parameters, trained)


class Judge:
    """What all arms are measured by: held-out images with their noise, and a distance to real images.

    Args:
        data: on the device that trains.
        net: gives features.
        name: of the net, as in ``fd_<data>_<name>``.
        accuracy: that of the net when it still classified.
        held_out: number of images whose errors are measured.
        n: number of images whose distance is measured, or as many as there are to compare with.
    """

    def __init__(self, data: Images, net: nn.Module, *, name: str, accuracy: float, held_out: int, n: int) -> None:
        self.x = to_float(data.held_out[:held_out])
        noise = torch.randn(len(GRID), *self.x.shape, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(self.x.device)
        self.n, pool = reference(data, n)
        self._other = to_float(pool[self.n : 2 * self.n])
        self._one_at_a_time = threading.Lock()
        self._distance = frechet_distance_to(to_float(pool[: self.n]), net)
        self._row = {"claim": f"fd_{data.name}_{name}", "unit": "Frechet distance", "n": self.n}
        self._row |= {"net": weight_hash(net), "net_accuracy": accuracy}

    def distance_row(self, arm: str, seed: int | None, images: Tensor) -> dict[str, Any]:
        """The distance of an arm's n images, with what it depends on."""
        with self._one_at_a_time:
            return {**self._row, "arm": arm, "seed": seed, "value": self._distance(images)}

    def bound_rows(self, seed: int | None = None) -> list[dict[str, Any]]:
        """The distance of other real images, and that of noise, at the same n."""
        noise = torch.randn(self._other.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        images = {"real": self._other, "noise": noise.to(self._other.device)}
        return [self.distance_row(arm, seed, x) for arm, x in images.items()]

    def check(self, rows: Iterable[dict[str, Any]]) -> None:
        """Refuse to go on beside distances in the features of another net."""
        if any(row.get("net", self._row["net"]) != self._row["net"] for row in rows):
            raise SystemExit(
                f"{self._row['claim']}: found results of another feature net; pass --fresh or --out FOLDER"
            )


def reference(data: Images, n: int) -> tuple[int, Tensor]:
    """Real images to compare with, in random order, and the largest n up to ``n`` of which they hold two sets.

    Held-out ones where there are enough of them; else all there are.
    """
    pool = data.held_out
    if len(pool) < 2 * n:
        pool = torch.cat([data.train, data.held_out])
        pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).to(pool.device)]
    return min(n, len(pool) // 2), pool


def zone_means(mse: Sequence[float]) -> dict[str, float]:
    """Mean errors over all of GRID, over SpeeD's areas of the schedule, and over both sides of the signature."""
    zones = {name: range(*zone) for name, zone in noise_zones(alphas_cumprod(DDPMScheduler(1000))).items()}
    chosen = {"all": GRID, **zones, "t <= 500": LOW, "t >= 700": HIGH}
    return {
        name: statistics.fmean(error for t, error in zip(GRID, mse, strict=True) if t in ts)
        for name, ts in chosen.items()
    }


def run_arm(
    denoiser: Denoiser,
    judge: Judge,
    arm: str,
    *,
    steps: int,
    evaluations: Sequence[int],
    sample_steps: int,
    on_step: Callable[[], None],
) -> list[dict[str, Any]]:
    """Train for ``steps``: a row with the errors after each of ``evaluations``, and at last one with the distance."""
    rows = []
    for step in range(1, steps + 1):
        denoiser.step()
        on_step()
        if step in evaluations:
            mse = denoiser.mse_by_timestep(judge.x, judge.noise)
            zones = zone_means(mse)
            row = {"claim": "val/mse", "arm": arm, "seed": denoiser.seed, "value": zones.pop("all"), "unit": "MSE"}
            rows.append({**row, "step": step, "zones": zones})
            if step == steps:
                rows[-1]["by_timestep"] = mse  # at GRID
    return [*rows, judge.distance_row(arm, denoiser.seed, denoiser.draw(judge.n, sample_steps))]


def cost_rows(
    denoiser: Denoiser, samplers: dict[str, TimestepSampler], repetitions: int, *, seed: int | None = None
) -> list[dict[str, Any]]:
    """What drawing and weighing take of a training step: medians, the arms taking turns, each draw after a step."""
    loss = torch.ones(denoiser.batch, device=denoiser.device)
    steps: list[float] = []
    draws: dict[str, list[float]] = {arm: [] for arm in samplers}

    def draw_and_weigh(sampler: TimestepSampler) -> None:
        _, weight = sampler(denoiser.batch)
        (weight * loss).mean()

    for sampler in samplers.values():
        sampler.to(denoiser.device)
    for _ in range(repetitions):
        for arm, sampler in samplers.items():
            steps.append(seconds(denoiser.step, denoiser.device))  # leaves the caches as training does
            draws[arm].append(seconds(partial(draw_and_weigh, sampler), denoiser.device))
    step_s = statistics.median(steps)
    rows = []
    for arm, times in draws.items():
        draw_s = statistics.median(times)
        row = {"claim": COST, "arm": arm, "seed": seed, "value": draw_s / step_s, "unit": "ratio of medians"}
        rows.append({**row, "draw_us": 1e6 * draw_s, "step_ms": 1e3 * step_s, "repetitions": repetitions})
    return rows


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long it takes until all of it is done."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---------------------------------------------------------------------- the report


def fd_name(results: Results) -> str:
    """What the distance of these results is called."""
    return next(row["claim"] for row in results.rows if row["claim"].startswith("fd_"))


def arms_of(results: Results) -> list[str]:
    """The arms that were measured, in the order of SAMPLERS, those without the skip last."""
    found = {row["arm"] for row in results.select(claim="val/mse")}
    return [arm for suffix in ("", PLAIN) for arm in (name + suffix for name in SAMPLERS) if arm in found]


def error_rows(results: Results, arm: str, *, part: int = 1) -> dict[int, dict[str, Any]]:
    """The errors of an arm after 1 / ``part`` of its steps, by seed."""
    rows = results.select(claim="val/mse", arm=arm)
    last = {row["seed"]: row["step"] for row in rows if "by_timestep" in row}
    return {row["seed"]: row for row in rows if row["step"] == last[row["seed"]] // part}


def baseline(arm: str) -> str:
    """The arm of uniform sampling that an arm is compared with."""
    return "uniform" + PLAIN * arm.endswith(PLAIN)


def compared(results: Results) -> list[str]:
    """The arms that have a seed in common with their uniform arm, without those themselves."""
    return [arm for arm in arms_of(results) if arm != baseline(arm) and pairs(results, arm)]


def pairs(results: Results, arm: str, *, part: int = 1) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The errors of an arm and of uniform, for every seed that both have."""
    ours, theirs = (error_rows(results, name, part=part) for name in (arm, baseline(arm)))
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def differences(results: Results, arm: str, zone: str, *, part: int = 1) -> list[float]:
    """By how much an arm's error differs from uniform's, relative to it, for every seed that both have."""
    return [ours["zones"][zone] / theirs["zones"][zone] - 1 for ours, theirs in pairs(results, arm, part=part)]


def report(results: Results) -> str:
    """All that was measured, as Markdown: distances and cost, then errors by area."""
    fd = fd_name(results)
    arms = []
    for arm in arms_of(results):
        errors = {seed: row["value"] for seed, row in sorted(error_rows(results, arm).items())}
        distances = [row["value"] for row in results.select(claim=fd, arm=arm)]
        costs = [row["value"] for row in results.select(claim=COST, arm=arm)]
        cost = f"{statistics.median(costs):.2%}" if costs else ""
        arms.append(
            [label(arm), ", ".join(map(str, errors)), _mean(distances, ".3g"), _mean(errors.values(), ".4f"), cost]
        )
    zones = ["acceleration", "deceleration", "convergence", "t <= 500", "t >= 700"]
    areas = [
        [f"{label(arm)}, {pairs(results, arm, part=part)[0][0]['step']} steps"]
        + [_mean(differences(results, arm, zone, part=part), "+.1%") for zone in zones]
        for arm in compared(results)
        for part in (4, 2, 1)
    ]
    n = results.select(claim=fd)[0]["n"]
    low, high = (_mean([row["value"] for row in results.select(claim=fd, arm=arm)], ".3g") for arm in ("real", "noise"))
    note = (
        f"Means, in brackets every seed. `{fd}`: {n} samples of the EMA weights by DDIM, "
        f"{results.protocol['sample_steps']} trailing steps; for other real images it is {low}, for noise {high}."
    )
    tables = [
        markdown_table(["arm", "seeds", f"`{fd}`", "val MSE", "sampling and weights, of a step"], arms),
        markdown_table(["MSE beside uniform's", *zones], areas),
    ]
    return "\n\n".join([*tables, note])


def _mean(values: Collection[float], form: str) -> str:
    every = f" ({', '.join(format(value, form) for value in values)})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{every}"


def failures(results: Results) -> list[str]:
    """What the measurement fails to show, a line each."""
    costs = [row["value"] for row in results.select(claim=COST, arm="speed")]
    if not costs or "speed" not in compared(results):
        return ["check: expected the arms uniform and speed for one seed at least; run them first"]
    found = []
    if (cost := statistics.median(costs)) >= COST_TARGET:
        found.append(f"cost: expected below {COST_TARGET:.0%} of a training step, got {cost:.2%}")
    for zone, sign, wanted in (("t <= 500", -1, "lower"), ("t >= 700", 1, "higher")):
        mean = statistics.fmean(differences(results, "speed", zone))
        if mean * sign <= 0:
            found.append(f"signature: expected speed {wanted} than uniform at {zone}, got {mean:+.1%}")
    return found


def plot(results: Results, path: Path) -> None:
    """Show the errors beside uniform's, by area and by timestep, and the distances between their bounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (areas, curves, distances) = plt.subplots(
        1, 3, figsize=(15, 4.8), width_ratios=(1, 1.2, 1), layout="constrained"
    )
    _plot_areas(areas, results)
    _plot_curves(curves, results)
    _plot_distances(distances, results)
    size = "x".join(map(str, results.protocol["images"]["shape"][1:]))
    figure.suptitle(f"{results.protocol['data']}, {size}: {results.protocol['model']}")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
    plt.close(figure)


def _plot_areas(axes: Any, results: Results) -> None:
    areas = noise_zones(alphas_cumprod(DDPMScheduler(1000)))
    arms = compared(results)
    for i, arm in enumerate(arms):
        beside = 0.15 * (i - (len(arms) - 1) / 2)
        for x, area in enumerate(areas):
            values = [100 * difference for difference in differences(results, arm, area)]
            axes.plot([x + beside] * len(values), values, "o", alpha=0.5, **_look(arm))
            axes.plot(x + beside, statistics.fmean(values), "_", color=_colour(arm), markersize=16, markeredgewidth=2)
    axes.set_xticks(range(len(areas)), [f"{area}\n{start} to {stop - 1}" for area, (start, stop) in areas.items()])
    axes.set_xlim(-0.5, len(areas) - 0.5)
    axes.set_title("MSE beside uniform's, by area of t\n(dots: seeds, bars: means)", fontsize=10)
    _relative_scale(axes)


def _plot_curves(axes: Any, results: Results) -> None:
    for arm in compared(results):
        curves = [
            [100 * (a / b - 1) for a, b in zip(ours["by_timestep"], theirs["by_timestep"], strict=True)]
            for ours, theirs in pairs(results, arm)
        ]
        for curve in curves:
            axes.plot(GRID, curve, color=_colour(arm), alpha=0.4, linewidth=0.8)
        mean = [statistics.fmean(at_t) for at_t in zip(*curves, strict=True)]
        axes.plot(
            GRID,
            mean,
            "--o" if arm.endswith(PLAIN) else "-o",
            markersize=4,
            linewidth=2,
            label=label(arm),
            **_look(arm),
        )
    for start, _ in noise_zones(alphas_cumprod(DDPMScheduler(1000))).values():
        axes.axvline(start, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1000)
    axes.set_xlabel("t, larger is noisier")
    axes.set_title("MSE beside uniform's, by t\n(thin: seeds, bold: means)", fontsize=10)
    if compared(results):
        axes.legend(frameon=False)
    _relative_scale(axes)


def _plot_distances(axes: Any, results: Results) -> None:
    fd, arms = fd_name(results), arms_of(results)[::-1]
    for y, arm in enumerate(arms):
        values = [row["value"] for row in results.select(claim=fd, arm=arm)]
        axes.plot(values, [y] * len(values), "o", alpha=0.5, **_look(arm))
        mean = statistics.fmean(values)
        axes.plot(mean, y, "|", color=_colour(arm), markersize=16, markeredgewidth=2)
        axes.annotate(f"{mean:.3g}", (mean, y + 0.22), ha="center", fontsize=9, color=_colour(arm))
    for arm, name, side in (("real", "real images", "left"), ("noise", "noise", "right")):
        values = [row["value"] for row in results.select(claim=fd, arm=arm)]
        for value in values:
            axes.axvline(value, color="grey", linestyle="--", linewidth=0.8)
        axes.annotate(f" {name} ", (values[0], len(arms) - 0.7), ha=side, color="grey")
    axes.set_xscale("log")
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_yticks(range(len(arms)), [label(arm) for arm in arms])
    axes.set_xlabel(f"{fd}, lower is nearer to real images")
    axes.set_title("Frechet distance of samples\n(dots: seeds, bars: means)", fontsize=10)


def _colour(arm: str) -> str:
    return f"C{list(SAMPLERS).index(arm.removesuffix(PLAIN))}"


def _look(arm: str) -> dict[str, str]:
    return {"color": _colour(arm), "fillstyle": "none" if arm.endswith(PLAIN) else "full"}


def _relative_scale(axes: Any) -> None:
    """Per cent on an axis that shows both -1 % and +100 %."""
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=2)
    ticks = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500]
    axes.set_yticks([*(-tick for tick in ticks[:0:-1]), *ticks], minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g} %" if value else "0")
    low, high = axes.dataLim.intervaly
    axes.set_ylim(1.3 * min(low, -2), 1.3 * max(high, 2))


def label(arm: str) -> str:
    """An arm's name for people."""
    return arm.replace(PLAIN, ", no skip")


# ---------------------------------------------------------------------- the benchmark


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # networks this small lose by more, and by far where cores are busy
    sizes = DRY_RUN if options.dry_run else Sizes()
    if options.steps is not None:
        sizes = replace(sizes, steps=options.steps)
    data = load_images(options.data, 8)
    protocol = {
        "data": data.name,
        "images": {"shape": data.shape, "train": len(data.train), "held_out": len(data.held_out)},
        "model": "UNet2DModel in LinearSkip, noise prediction",
        "noise_scheduler": "DDPMScheduler(1000), linear",
        "optimizer": "AdamW, lr 1e-3, no weight decay; measured with EMA(0.9999) of the weights",
        "solver": "DDIM, trailing",
        "feature_net": "ConvNet(width=64) without its classifier, trained on the training images",
        "reference": "as many real images as samples: held-out ones if they make two such sets, else any",
        "grid": GRID,
        **asdict(sizes),
    }
    del protocol["cost_repetitions"]
    path = result_path(options, f"speed_cpu_{data.name}")
    results = Results(path, protocol, command(__file__, arguments), fresh=options.fresh)
    wanted = [(arm, seed) for seed in options.seeds for arm in options.arms]
    if options.plain:
        wanted += [(arm + PLAIN, options.seeds[0]) for arm in ("uniform", "speed")]
    missing = [pair for pair in wanted if not results.select(arm=pair[0], seed=pair[1])]
    if missing:
        print(f"{len(wanted) - len(missing)} of {len(wanted)} arms are in {path.name}; this run adds the others")
        run(missing, data, sizes, results, workers=options.workers)
    results.add(*cost_rows(build("uniform", 0, data, sizes), _samplers(options.arms), sizes.cost_repetitions))
    plot(results, path.with_suffix(".png"))
    print(report(results))
    if options.check and (failed := failures(results)):
        raise SystemExit("\n".join(failed))


def run(missing: list[tuple[str, int]], data: Images, sizes: Sizes, results: Results, *, workers: int) -> None:
    """Train and measure arms, ``workers`` at a time, each written when it is finished."""
    torch.manual_seed(0)
    net = ConvNet(data.shape[0], data.shape[1], data.num_classes, width=64)
    train_classifier(net, data, steps=sizes.net_steps)
    accuracy = held_out_accuracy(net, data)
    net.classifier = cast(Any, nn.Identity())
    judge = Judge(data, net, name="convnet", accuracy=accuracy, held_out=sizes.held_out, n=sizes.samples)
    judge.check(results.rows)
    results.add(*judge.bound_rows())
    # initial weights come from torch's global generator: drawn before there are threads
    denoisers = [(arm, build(arm, seed, data, sizes)) for arm, seed in missing]
    stop = threading.Event()
    one_thread_each = partial(torch.set_num_threads, 1)
    with progress_bar() as progress, ThreadPoolExecutor(workers, initializer=one_thread_each) as pool:
        task = progress.add_task("training steps", total=len(missing) * sizes.steps)

        def on_step() -> None:
            if stop.is_set():
                raise CancelledError
            progress.advance(task)

        options = {"steps": sizes.steps, "evaluations": [sizes.steps // part for part in (4, 2, 1)]}
        options |= {"sample_steps": sizes.sample_steps, "on_step": on_step}
        running = [pool.submit(run_arm, denoiser, judge, arm, **options) for arm, denoiser in denoisers]
        try:
            for finished in as_completed(running):
                rows = finished.result()
                results.add(*rows)
                progress.print(summary(rows))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def build(arm: str, seed: int, data: Images, sizes: Sizes) -> Denoiser:
    """An arm before its first step; all arms of a seed begin with the same weights."""
    noise_scheduler = DDPMScheduler(1000)
    torch.manual_seed(seed)
    model = unet(data.shape[0], data.shape[1], widths=sizes.widths)
    if not arm.endswith(PLAIN):
        model = LinearSkip(model, noise_scheduler, to_float(data.train).square().mean().item())
    sampler = SAMPLERS[arm.removesuffix(PLAIN)](noise_scheduler)
    return Denoiser(model, sampler, noise_scheduler, data.train, lr=1e-3, batch=sizes.batch, seed=seed)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A finished arm in a line."""
    *_, error, distance = rows
    arm, seed = error["arm"], error["seed"]
    return f"{arm}, seed {seed}: val/mse {error['value']:.4f}, {distance['claim']} {distance['value']:.3g}"


def _samplers(arms: Sequence[str]) -> dict[str, TimestepSampler]:
    return {arm: SAMPLERS[arm](DDPMScheduler(1000)) for arm in arms}


def _arms(text: str) -> list[str]:
    arms = list(SAMPLERS) if text == "all" else text.split(",")
    if unknown := set(arms) - set(SAMPLERS):
        raise argparse.ArgumentTypeError(f"expected all, or of {','.join(SAMPLERS)}, got {','.join(sorted(unknown))}")
    return arms


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/ or val/")
    parser.add_argument("--arms", type=_arms, default=["uniform", "speed"], help=f"all, or of {','.join(SAMPLERS)}")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--steps", type=int, help=f"default: {Sizes.steps}")
    parser.add_argument("--workers", type=int, default=2, help="arms trained at the same time, a core each; default: 2")
    parser.add_argument("--plain", action="store_true", help="add a pair without the linear skip, first seed")
    return parser


if __name__ == "__main__":
    main()
